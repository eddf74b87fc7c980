"""Restoring the list of files that an update has taken over, whose hash is in the plan, from what else tells of them.

The header of each file of latents names its plan, its task and its index, and tells its rows; its hash is computed by
reading it. Which files the list had is learnt from what is left of it, from the indexes of the update and from those of
the generation before. The list's hash in the plan tells whether the result is right.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress

from ..errors import CacheError
from ..schema import Invalid
from ..strict_json import StrictJSONError
from .carried import Carried, CarriedFile, load_carried, most_bytes, parse_carried
from .commits import read_log
from .folder import TASKS, CacheFolder
from .generations import recorded
from .latent_files import has_header, read_header
from .plan import CachePlan
from .store import read_index
from .survey import survey

_NAME = re.compile(r"([0-9a-f]{8}-\d{6,12})\.safetensors")


def restore_carried(folder: CacheFolder, plan: CachePlan) -> bool:
    """Write the list of carried files of a plan anew if it is damaged; whether it was.

    Raises:
        CacheError: it cannot be known any more; says what is lacking.
    """
    try:
        load_carried(folder, plan)
        return False
    except CacheError:
        pass
    wanted = plan.fields["generation"]["carried"]
    listed, named = _listed(folder, plan), _named(folder, plan)
    found = {}
    for trusting in (True, False):
        found = _found(folder, plan, listed if trusting else {})
        for files in _guesses(folder, plan, listed, named, found):
            carried = Carried(files.values())
            if carried.digest() == wanted:
                folder.set_aside(plan.carried_name)
                carried.save(folder, plan)
                return True
    raise CacheError(_why(folder, plan, listed, named, found))


def _listed(folder: CacheFolder, plan: CachePlan) -> dict[str, CarriedFile]:
    """What can be read of the list as it is."""
    files = {}
    with suppress(FileNotFoundError, CacheError):
        for line in folder.read(plan.carried_name, most_bytes(plan)).split(b"\n"):
            with suppress(StrictJSONError, Invalid):
                file = parse_carried(line)
                files[file.stem] = file
    return files


def _named(folder: CacheFolder, plan: CachePlan) -> set[str]:
    """The files that the plan's own indexes name."""
    stems: set[str | None] = set()
    for commit in read_log(folder, plan).commits.values():
        with suppress(CacheError):
            stems |= set(read_index(folder, plan, commit)["file"].unique().to_pylist())
    return {stem for stem in stems if stem is not None}


def _found(folder: CacheFolder, plan: CachePlan, listed: dict[str, CarriedFile]) -> dict[str, CarriedFile]:
    """The files that lie there, of other plans than this one, by their headers. `listed`: believed where it fits."""
    files = {}
    numbers = {str(bucket): number for number, bucket in enumerate(plan.buckets)}
    for base in folder.names(TASKS):
        match = _NAME.fullmatch(base)
        if match is None or match[1].startswith(plan.plan8):
            continue
        name = f"{TASKS}/{base}"
        with suppress(FileNotFoundError, CacheError, KeyError, TypeError, ValueError), folder.open(name) as opened:
            known = listed.get(match[1])
            if known is not None and has_header(opened.fileno(), known.layout(plan)):
                files[match[1]] = known
                continue
            header = read_header(opened.fileno()) or {}
            about = header["__metadata__"]
            kind = plan.parts[0].name
            rows = {
                numbers[key.partition("/")[2]]: value["shape"][0]
                for key, value in header.items()
                if key.partition("/")[0] == kind
            }
            size, task = os.fstat(opened.fileno()).st_size, int(about["task"])
            counts = tuple(sorted(rows.items()))
            file = CarriedFile(about["plan"], task, about["index_xxh3"], size, "", counts)
            if file.stem == match[1] and has_header(opened.fileno(), file.layout(plan)):
                files[match[1]] = file._replace(data_xxh3=folder.hash(name))
    return files


def _guesses(
    folder: CacheFolder,
    plan: CachePlan,
    listed: dict[str, CarriedFile],
    named: set[str],
    found: dict[str, CarriedFile],
) -> Iterator[dict[str, CarriedFile]]:
    """What the list may have had, the likeliest first."""
    known = listed | found
    for stems in ({*listed, *named}, {*listed, *found}, named | {*found}, named):
        yield {stem: known[stem] for stem in stems if stem in known}
    earlier = [p for p in recorded(folder) if p.id != plan.id and p.number < plan.number]
    looked = survey(folder, earlier, has_rows=False)
    for plans in ([p for p in earlier if p.id == plan.fields["generation"]["of"]], earlier):
        yield dict(looked.carried(plans))


def _why(
    folder: CacheFolder,
    plan: CachePlan,
    listed: dict[str, CarriedFile],
    named: set[str],
    found: dict[str, CarriedFile],
) -> str:
    path = folder.path / plan.carried_name
    lost = sorted(named - {*listed, *found})
    if lost:
        why = f"{len(lost)} of the {len(named)} files that rows lie in are missing or damaged too, such as {lost[0]}"
    else:
        why = "it had files that no row lies in any more and `capacitor-rt gc` has removed, of which nothing else tells"
    return f"{path} is damaged and cannot be restored ({why}): restore it from a copy, or cache into a new OUT"
