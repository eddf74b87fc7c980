"""Why an input has no latents: for good, or for now.

A permanent failure is a property of the input's bytes: it is quarantined, and its task is finished. A retryable one is
tried again within the run, and again by the next run; a task with one is never finished.
"""

from __future__ import annotations

import errno

CHANGED = "changed"
"""Other bytes than when the cache was planned."""
IO_ERROR = "io_error"
"""The storage failed."""
OUT_OF_MEMORY = "out_of_memory"
TIMEOUT = "timeout"
"""Decoding took too long."""
CRASHED = "crashed"
"""The decoder took its process with it."""
NAN_LATENT = "nan_latent"
"""A latent is not finite in the stored dtype."""

RETRYABLE = (CHANGED, IO_ERROR, OUT_OF_MEMORY, TIMEOUT, CRASHED)

# what will not mend itself: no such file, no permission, not a file
_FOR_GOOD = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EISDIR,
    errno.ENXIO,
}


def is_retryable(reason: str) -> bool:
    """Whether an input that failed for this reason may succeed later, its bytes being what they are."""
    return reason in RETRYABLE


def is_for_good(error: OSError) -> bool:
    """Whether an operating system's error says something of the file rather than of the moment."""
    return error.errno in _FOR_GOOD
