"""Several coordinators as one run: one bar, one report, one outcome, whatever becomes of each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import CacheError, CapacitorError
from .coordinator import ADVANCE, BEGIN, ERROR, NOTE, REPORT, STOPPED, Progress
from .meters import Meters
from .report import Report, joined
from .watch import Watch

TAKEN_OVER = "its tasks are taken over by the others"


class Gathering:
    """What several coordinators have told so far.

    Attributes:
        begun: whether one of them has a plan, so that the others may go on with it.
        living: those that have not ended.

    Args:
        names: of the coordinators, for messages.
        note: told, line by line, what a user may want to know.
    """

    def __init__(self, names: list[str], note: Callable[[str], None], watch: Watch):
        self.names = names
        self.note = note
        self.watch = watch
        self.begun = False
        self.living = set(range(len(names)))
        self._reports: dict[int, Report] = {}
        self._errors: dict[int, CapacitorError] = {}
        self._lost: list[str] = []
        self._meters: dict[int, Meters] = {}
        self._notes: set[str] = set()
        self._at_work: set[int] = set()
        self._left = 0

    def hear(self, number: int, word: str, what: Any) -> None:
        """Take a message of a coordinator."""
        if word == NOTE:
            # what is to be said before the work the first has said
            if what not in self._notes and (not self.begun or number in self._at_work):
                self._notes.add(what)
                self.note(what)
        elif word == BEGIN:
            self._at_work.add(number)
            self._begin(*what)
        elif word == ADVANCE:
            self._advance(number, what)
        elif word == REPORT:
            self.living.discard(number)
            self._reports[number] = what
        elif word == ERROR:
            self.living.discard(number)
            self._errors[number] = what
            if self.begun and self.living:
                self.note(f"the coordinator on {self.names[number]} failed ({what}): {TAKEN_OVER}")
        elif word == STOPPED:
            self.lose(number, "was terminated")

    def lose(self, number: int, how: str) -> None:
        """A coordinator has gone without a word."""
        self.living.discard(number)
        line = f"the coordinator on {self.names[number]} {how}"
        self._lost.append(line)
        self.note(f"{line}: {TAKEN_OVER}" if self.living else line)

    def end(self, whole: bool) -> None:
        """Nothing more will be heard. `whole`: the coordinators have ended by themselves."""
        if self.begun:
            self.watch.end(self._joined() if whole and self._meters else None)

    def is_finished(self) -> bool:
        """Whether a coordinator has found every task done."""
        return any(not report.unfinished for report in self._reports.values())

    def has_failed(self) -> bool:
        """Whether a coordinator has ended in an error that it could name."""
        return bool(self._errors)

    def report(self) -> Report:
        """The outcome.

        Raises:
            CapacitorError: of the coordinator that failed first, if the others could not do without it.
            CacheError: all were lost.
        """
        report = joined(list(self._reports.values())) if self._reports else None
        if report is not None and not (report.unfinished and self._errors):
            return report
        for error in self._errors.values():
            raise error
        raise CacheError(
            "every coordinator has ended before the work was done: is there enough memory? Run the same command again "
            "with fewer of them",
            self._lost,
        )

    def _begin(self, total: int, done: int) -> None:
        if not self.begun:
            self.begun, self._left = True, total - done
            self.watch.begin(total, done)

    def _advance(self, number: int, progress: Progress) -> None:
        self._meters[number] = progress.meters
        # what was lost with a coordinator is done again
        inputs = min(progress.inputs, self._left)
        self._left -= inputs
        self.watch.advance(inputs, progress.quarantined, self._joined)

    def _joined(self) -> Meters:
        return Meters.joined(list(self._meters.values()))
