"""A pytest plugin for machines that lack packages of the tests: `-p bench._missing_packages`, and under `-m gpu`.

Where hypothesis is absent, whole files of examples that do not need it could not be imported for the few properties in
them. This puts a module in its place with which they can, and skips the properties. A file that needs any other package
is skipped with its name: else pytest would run nothing at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from ._processes import missing_package

REASON = "hypothesis is not installed: pip install '.[test]'"


class _Anything:
    """Stands for strategies and settings: whatever is done with it gives it again."""

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __or__(self, _: Any) -> _Anything:
        return self


class _Settings(_Anything):
    def __call__(self, *given: Any, **_: Any) -> Any:
        # as a decorator it leaves the test as it is
        return given[0] if len(given) == 1 and callable(given[0]) and not isinstance(given[0], _Anything) else self


def _given(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return pytest.mark.skip(reason=REASON)


def _module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name, __doc__)
    # torch looks at it for every module that it knows
    made.__spec__ = ModuleSpec(name, None)
    made.__getattr__ = lambda attribute: getattr(_Anything(), attribute)  # type: ignore[method-assign]
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


def pytest_configure() -> None:
    """Before any test is imported."""
    try:
        import hypothesis  # noqa: F401

        return
    except ModuleNotFoundError:
        pass
    strategies = _module("hypothesis.strategies")
    decorators = {"given": _given, "example": lambda *_, **__: lambda test: test, "settings": _Settings()}
    sys.modules["hypothesis"] = _module("hypothesis", strategies=strategies, **decorators)
    sys.modules["hypothesis.strategies"] = strategies


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """What could not be imported for the lack of a package is skipped."""
    report = yield
    package = missing_package(report.longreprtext) if report.failed else None
    if package is not None:
        report.outcome, report.result = "skipped", []
        report.longrepr = (str(collector.path), 0, f"Skipped: {package} is not installed")
    return report
