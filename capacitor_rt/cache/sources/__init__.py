"""Where the inputs of a cache come from: a folder, a list of files, tar files, Parquet files.

A source lists its inputs once, in an order that everyone finds again, and serves their bytes by their number. It is
picklable, and opened again in every process that reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from ..failures import IO_ERROR as IO_ERROR
from .columns import Columns as Columns
from .columns import ColumnsRequest as ColumnsRequest
from .listing import Listing as Listing
from .listing import load_listing as load_listing


class Reader(Protocol):
    """An open source. Threads may share it."""

    def read(self, ordinal: int) -> bytes:
        """The bytes of an input.

        Raises:
            ImageError: it cannot be read; `failures.is_retryable` tells from the reason whether it may be later.
        """

    def sample(self, ordinal: int, nbytes: int) -> bytes | None:
        """At most `nbytes` from the middle of an input; None where that is no cheaper than all of it. As `read`."""

    def name(self, ordinal: int) -> str:
        """What messages call an input: its id."""


@runtime_checkable
class Expecting(Protocol):
    """A reader that makes use of knowing what will be read."""

    def expect(self, ordinals: Iterable[int]) -> None:
        """These will be read soon, mostly in this order."""


@runtime_checkable
class Fetching(Protocol):
    """A reader that fetches what it expects before it is asked for it."""

    def fetch_at_most(self, nbytes: int) -> None:
        """Begin no more while it holds so much."""


@runtime_checkable
class Streaming(Protocol):
    """A source that may read its containers from the beginning, so that the worker that began one should go on with
    it.
    """

    @property
    def is_streaming(self) -> bool:
        """Whether it does."""


class Source(Protocol):
    """The inputs of a cache."""

    @property
    def listing(self) -> Listing:
        """The inputs."""

    @property
    def columns(self) -> Columns:
        """What is kept beside them."""

    @property
    def notes(self) -> list[str]:
        """What a user may want to know of them, one line per note."""

    def fields(self) -> dict[str, Any]:
        """Its entry in `plan.json`: kind, count, and the hash of the list. The number of tasks is added."""

    def open(self) -> Reader:
        """Open it in the process that reads."""

    def why_gone(self) -> str | None:
        """Why nothing at all can be read any more, such as a disk that was unmounted; None if that is not so."""
