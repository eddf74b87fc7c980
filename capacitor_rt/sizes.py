"""Which sizes of an image a model takes: plain numbers, checked without torch."""

from __future__ import annotations

from .errors import InputError

SIZE_MULTIPLE = 32
"""Sides of an image are multiples of this, unless `strict_size=False`, and of the latents' stride."""


def check_multiple(height: int, width: int, multiple: int, stride: int) -> None:
    """Refuse an image size in pixels that is no multiple of `multiple`, itself one of `stride`.

    Raises:
        InputError: names the nearest legal sizes, and the looser rule where the latents would allow the size.
    """
    for name, size in (("height", height), ("width", width)):
        if size % multiple or size == 0:
            below, above = size // multiple * multiple, (size // multiple + 1) * multiple
            use = f"{below} or {above}" if below else f"{above}"
            looser = multiple != stride and size and size % stride == 0
            hint = f", or strict_size=False, which admits multiples of {stride}" if looser else ""
            raise InputError(f"{name} {size} is not a multiple of {multiple}: use {use}{hint}")
