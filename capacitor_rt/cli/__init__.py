"""`capacitor-rt`: images to latents and back from a shell."""

from .app import app, main

__all__ = ["app", "main"]
