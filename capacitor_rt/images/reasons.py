"""Why an image file gives no pixels: the reasons of `ImageError`, and the limit of one of them."""

from __future__ import annotations

EMPTY = "empty"
"""No bytes."""
NOT_AN_IMAGE = "not_an_image"
"""No known image format begins like this."""
TRUNCATED = "truncated"
"""The file ends before the picture does."""
CORRUPT = "corrupt"
"""It has the form of an image and cannot be decoded. JPEG has no checksum: damage that still decodes is not seen."""
TOO_LARGE = "too_large"
"""More pixels than allowed; found in the header, before memory is taken."""
OUT_OF_MEMORY = "out_of_memory"
"""There was no memory to decode it, which says nothing of the file."""
UNREADABLE = "unreadable"
"""The file cannot be opened or read: permission, I/O error, missing, not a regular file."""
UNSUPPORTED = "unsupported"
"""An image, of a format or sample type that is not decoded here."""
REASONS = (EMPTY, NOT_AN_IMAGE, TRUNCATED, CORRUPT, TOO_LARGE, OUT_OF_MEMORY, UNREADABLE, UNSUPPORTED)

DEFAULT_MAX_PIXELS = 178_956_970
"""Pillow's own hard limit, 512 MiB of RGB; beyond it a file counts as a decompression bomb."""
