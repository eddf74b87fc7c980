"""Caches and models to the Hugging Face hub, whole and with a card: `push_to_hub`."""

from __future__ import annotations

from .push import HubError, Pushed, push_to_hub

__all__ = ["HubError", "Pushed", "push_to_hub"]
