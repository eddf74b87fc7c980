"""What becomes of an input, and what is known of it then: names of statuses and columns, which workers need too."""

from __future__ import annotations

OK, QUARANTINED = "ok", "quarantined"
KNOWN = "known"
"""Of an input that was read and not decoded, since a row of its bytes is known; never of a row on disk."""
DECODED = (
    "bytes_hash",
    "width",
    "height",
    "orientation",
    "bucket",
    "resize_height",
    "resize_width",
    "crop_top",
    "crop_left",
)
"""Columns that are known once an input has been decoded."""
