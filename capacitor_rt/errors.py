"""Expected failures. Each message names the thing, the value and the way out; the CLI prints it without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class CapacitorError(Exception):
    """Base of every failure that a user can cause and mend. `problems` lists what went wrong, where it is several."""

    def __init__(self, message: str, problems: Iterable[str] = ()):
        self.problems = list(problems)
        super().__init__(_writable("\n  ".join([message, *self.problems])))

    def __reduce__(self) -> tuple[Any, ...]:
        # as it is: the arguments of a subclass are not those of an exception
        return _restored, (type(self), self.args, self.__dict__)


def _writable(text: str) -> str:
    """A text that can be written anywhere: of names that are no text the bytes are shown, as `\\xff`."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        # other halves of surrogate pairs stand for no byte
        return text.encode("utf-8", "backslashreplace").decode()


def _restored(kind: type[CapacitorError], args: tuple[Any, ...], state: dict[str, Any]) -> CapacitorError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class UnverifiedModelWarning(UserWarning):
    """A model is loaded of whose architecture a part is inferred, and not yet confirmed with its weights."""


class ConfigError(CapacitorError, ValueError):
    """A configuration value that no model or sampler of this family can have."""


class InputError(CapacitorError, ValueError):
    """A tensor, size or argument that does not fit the model."""


class NotFoldableError(InputError):
    """A part of a model that does more than its tensors say, so that weights folded from them would be another's."""


class CheckpointError(CapacitorError):
    """A checkpoint that cannot be found or read, or whose tensors do not fit together."""


class ImageError(CapacitorError):
    """An image file that cannot be turned into pixels. `reason` is the stable word written to the quarantine."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class CacheError(CapacitorError):
    """A latent cache that cannot be written, continued or read as asked."""


class HungError(CacheError):
    """A call of a library does not come back, and cannot be ended but with the process, by `os._exit` if need be."""
