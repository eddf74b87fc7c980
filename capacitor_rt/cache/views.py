"""Several views of the same images: what they are called, what each asks for, and where they lie.

A view is a cache of its own in a folder under OUT, such as `OUT/256` and `OUT/512-flip`; nothing but these folders lies
in OUT, and nothing in a view says that there are others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CacheError, InputError
from .plan import PLAN
from .request import DTYPES, CacheRequest

_SWITCHES: dict[str, dict[str, Any]] = {
    "area": {"area": True},
    "adm": {"crop": "adm"},
    "posterior": {"posterior": True},
    "flip": {"flip": True},
}
OPTIONS = (*_SWITCHES, *DTYPES)
"""What may follow a view's side, in the order in which a folder's name has it."""
SYNTAX = "SIDE[@OPTION[+OPTION]...], such as 256, 512@flip or 1024@area+int8"


def parse_views(texts: Sequence[str], request: CacheRequest) -> dict[str, CacheRequest]:
    """What each view asks for, by the name of its folder, in the order given.

    Args:
        texts: views as `SYNTAX` has them, several in one text with commas between.
        request: what holds for all of them.

    Raises:
        InputError: a text that is no view, a view that is there twice, or one out of range.
    """
    views: dict[str, CacheRequest] = {}
    for text in (part.strip() for several in texts for part in several.split(",")):
        name, changes = _parse(text)
        if name in views:
            raise InputError(f"view {text!r} is there twice: give each once")
        views[name] = replace(request, **changes)
    if not views:
        raise InputError(f"no view is given: use {SYNTAX}")
    return views


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    side, _, tail = text.partition("@")
    options = tail.split("+") if tail else []
    if not (side.isascii() and side.isdecimal()) or len(side) > 6 or text.endswith("@"):
        raise InputError(f"view {text!r} is not one: use {SYNTAX}")
    for option in options:
        if option not in OPTIONS:
            raise InputError(f"view {text!r} has an unknown option {option!r}: use {', '.join(OPTIONS)}")
    if len(set(options)) < len(options) or sum(option in DTYPES for option in options) > 1:
        raise InputError(f"view {text!r} has an option twice: give each once, and one type")
    changes: dict[str, Any] = {"side": int(side)}
    for option in options:
        changes |= _SWITCHES.get(option, {"dtype": option})
    return "-".join([str(int(side)), *sorted(options, key=OPTIONS.index)]), changes


def views_in(root: str | os.PathLike[str]) -> list[Path]:
    """The caches under a folder that is none itself, by name; none where it is one, or holds none."""
    root = Path(root)
    if (root / PLAN).exists() or not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if (path / PLAN).is_file())


def check_views(out: Path, views: Mapping[str, object]) -> None:
    """Refuse a folder that holds something else than views.

    Raises:
        CacheError: it is a cache itself, a file, or has contents of others.
    """
    try:
        names = sorted(os.listdir(out))
    except FileNotFoundError:
        return
    except OSError as e:
        raise CacheError(f"cannot use {out}: {e.strerror}: give a folder") from e
    if PLAN in names:
        raise CacheError(f"{out} is a cache, and several views have a cache each in a folder: give another OUT")
    foreign = [name for name in names if not (name in views and (out / name).is_dir())]
    # beside views there may be what others have put there
    if foreign and not any((out / name / PLAN).is_file() for name in names):
        raise CacheError(f"{out} is not empty and holds {foreign[0]!r}, which is no cache: give a new or empty folder")


def no_cache(root: str | os.PathLike[str]) -> str:
    """Why a folder without a plan is no cache, and which ones it holds."""
    found = [path.name for path in views_in(root)]
    hint = f"; it holds the caches {', '.join(found)}: give one of them" if found else ""
    return f"{root} is no latent cache: it has no {PLAN}{hint}"
