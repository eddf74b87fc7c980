"""Progress of a run: a bar on the terminal, or messages to the process that started this one as one of several."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Protocol

from tqdm import tqdm

from ..errors import InputError
from .meters import Meters, write_metrics

_log = logging.getLogger("capacitor_rt")
METRICS_SECONDS = 10.0


class Watch(Protocol):
    """What a run tells while it works."""

    def begin(self, total: int, done: int) -> None:
        """The work begins: number of inputs, and how many of them were done before."""

    def advance(self, inputs: int, quarantined: int, measure: Callable[[], Meters]) -> None:
        """So many more inputs are done, and so many of these are quarantined; `measure` gives the meters as of now."""

    def end(self, meters: Meters | None) -> None:
        """The work has ended; None: it was cut short."""


class Bar:
    """A bar on stderr, and the file of `--metrics`.

    Args:
        progress: whether to show the bar.
        metrics: the file, JSON or Prometheus text by its name; None for none. That it cannot be written is an error
            before the work begins, and a warning afterwards.
    """

    def __init__(self, progress: bool, metrics: str | os.PathLike[str] | None = None):
        self.progress = progress
        self.metrics = metrics
        self.quarantined = 0
        self._told = time.monotonic()
        self._bar: tqdm | None = None
        self._is_warned = False

    def begin(self, total: int, done: int) -> None:
        if self.metrics is not None:
            write_metrics(self.metrics, Meters(0).report())
        # a bar for a person, a line now and then for a log
        interval = 0.2 if os.isatty(2) else 30
        self._bar = tqdm(
            total=total, initial=done, desc="cache", unit="img", disable=not self.progress, mininterval=interval
        )

    def advance(self, inputs: int, quarantined: int, measure: Callable[[], Meters]) -> None:
        self.quarantined += quarantined
        if self._bar is not None:
            if self.quarantined:
                self._bar.set_postfix(quarantined=self.quarantined, refresh=False)
            self._bar.update(inputs)
        if self.metrics is not None and time.monotonic() - self._told > METRICS_SECONDS:
            self._told = time.monotonic()
            self._write(measure())

    def end(self, meters: Meters | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if meters is not None:
            self._write(meters)

    def _write(self, meters: Meters) -> None:
        if self.metrics is None:
            return
        try:
            write_metrics(self.metrics, meters.report())
        except InputError as e:
            # hours of work do not end for a report of them
            if not self._is_warned:
                _log.warning("%s", e)
            self._is_warned = True
