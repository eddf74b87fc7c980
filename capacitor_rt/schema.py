"""What a JSON document may hold. All that is read is checked once, by one of these, before anything is made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

MAX_TEXT = 1 << 16


class Invalid(ValueError):
    """A value that does not fit; the message names it by its path, such as `store.batch`."""


class Kind(Protocol):
    """What a value may be."""

    def check(self, path: str, value: Any) -> None:
        """Raises Invalid."""


def _refuse(path: str, value: Any, wanted: str) -> None:
    shown = repr(value)[:60] if not isinstance(value, (dict, list)) else f"a JSON {type(value).__name__}"
    raise Invalid(f"{path or 'it'} is {shown}, not {wanted}")


@dataclass(frozen=True)
class Number:
    """A whole number, or with `whole=False` any finite one; a bool is none."""

    low: float
    high: float
    whole: bool = True

    def check(self, path: str, value: Any) -> None:
        kinds = (int,) if self.whole else (int, float)
        if type(value) not in kinds or not math.isfinite(value) or not self.low <= value <= self.high:
            _refuse(path, value, f"a number of {self.low:g} to {self.high:g}")


@dataclass(frozen=True)
class Text:
    """A string that `pattern` matches as a whole."""

    pattern: str | None = None
    longest: int = MAX_TEXT

    def check(self, path: str, value: Any) -> None:
        if type(value) is not str or len(value) > self.longest:
            _refuse(path, value, f"a text of at most {self.longest} characters")
        if self.pattern and not re.fullmatch(self.pattern, value):
            _refuse(path, value, f"like {self.pattern}")


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Any, ...]

    def check(self, path: str, value: Any) -> None:
        if not any(type(value) is type(v) and value == v for v in self.values):
            _refuse(path, value, "one of " + ", ".join(map(repr, self.values)))


@dataclass(frozen=True)
class Optional:
    """Null, or of a kind."""

    kind: Kind

    def check(self, path: str, value: Any) -> None:
        if value is not None:
            self.kind.check(path, value)


@dataclass(frozen=True)
class ListOf:
    """A list of `least` to `most` values of a kind."""

    kind: Kind
    least: int = 0
    most: int = 1 << 16

    def check(self, path: str, value: Any) -> None:
        if type(value) is not list or not self.least <= len(value) <= self.most:
            _refuse(path, value, f"a list of {self.least} to {self.most}")
        for i, item in enumerate(value):
            self.kind.check(f"{path}[{i}]", item)


@dataclass(frozen=True)
class MapOf:
    """An object with any keys and values of a kind."""

    kind: Kind
    most: int = 1 << 16

    def check(self, path: str, value: Any) -> None:
        if type(value) is not dict or len(value) > self.most:
            _refuse(path, value, f"an object of at most {self.most} entries")
        for key, item in value.items():
            self.kind.check(f"{path}.{key[:40]}", item)


class Anything:
    """Whatever JSON can say."""

    def check(self, path: str, value: Any) -> None:
        pass


@dataclass(frozen=True)
class Record:
    """An object with just these keys; those in `optional` may lack."""

    fields: Mapping[str, Kind]
    optional: tuple[str, ...] = ()

    def check(self, path: str, value: Any) -> None:
        if type(value) is not dict:
            _refuse(path, value, "an object")
        missing = [key for key in self.fields if key not in value and key not in self.optional]
        unknown = [key for key in value if key not in self.fields]
        if missing or unknown:
            names = [f"lacks {key!r}" for key in missing] + [f"has an unknown {key[:40]!r}" for key in unknown]
            raise Invalid(f"{path or 'it'} {', '.join(names[:3])}")
        for key, item in value.items():
            self.fields[key].check(f"{path}.{key}".lstrip("."), item)


HEX32, HEX64 = Text("[0-9a-f]{32}"), Text("[0-9a-f]{64}")
