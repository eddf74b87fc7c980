"""`capacitor-rt`: images to latents and back from a shell."""

from __future__ import annotations

import sys

from ..extras import what_is_missing

__all__ = ["main"]


def main() -> None:
    """Entry point. Installed by `pip install --no-deps`, it says in one line what it lacks."""
    try:
        from .app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (missing := what_is_missing(error)) is None:
            raise
        sys.exit(f"error: {missing}")
    run()
