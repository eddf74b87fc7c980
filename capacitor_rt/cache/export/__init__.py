"""A cache in the formats of trainers: `export_cache` writes them, resumes, and reads every row back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .request import ExportRequest
    from .run import ExportOutlook, ExportReport, describe_export, export_cache

_EXPORTS = {
    "ExportOutlook": "run",
    "ExportReport": "run",
    "ExportRequest": "request",
    "describe_export": "run",
    "export_cache": "run",
}

__all__ = ["ExportOutlook", "ExportReport", "ExportRequest", "describe_export", "export_cache"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
