"""Finished caches: mutants of one are opened, checked, exported, repaired, and gone on with.

It is a finding if a row is returned that is not the one that was cached, if rows lack in silence, if `verify` finds
nothing wrong with what is wrong, if a run ends well over what is wrong, or if a file outside is touched. A mutant is
named by its mutators and their seeds: a case of the corpus is a line of JSON.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .cache_mutants import draw, mutate
from .checkpoints import GOLDEN
from .forked import Surface, scratch

CORPUS = Path(__file__).parent / "corpus" / "caches"
CASE = "case.json"
# with the folder of images of each
BASES = {
    "whole": "src",
    "updated": "src2",
    "underway": "src2",
    "shared": "src3",
    "views": "src",
    "views-underway": "src2",
}
# of those with a second view the mutated one, the second, and what that is in the end
VIEWS = {"views": ("whole", "other", "other-whole"), "views-underway": ("underway", "other-whole", "other-updated")}
# a file that says that a mutant is to be read by everything
EVERY = "every"
# long ago: how fast a machine is decides not what an update takes for unchanged, nor so which caches there are
LONG_AGO = 1_600_000_000


def settle(path: Path, later: int = 0) -> None:
    """Give a source's file a time that is always the same."""
    os.utime(path, (LONG_AGO + later, LONG_AGO + later))


class Caches(Surface):
    """A small cache with two sizes, mirrored and with logsnr, two of whose inputs are quarantined.

    A third of the mutants are of the same after an update, of one whose update is under way, of one in int8 in which
    inputs of the same bytes share a row, or of one view of two: the other is unfinished, or its update is not begun,
    and a run does what is to be done of both.
    """

    name = "caches"
    corpus = CORPUS

    def __init__(self) -> None:
        self.home: Path | None = None

    def warm(self) -> None:
        import numpy as np
        from PIL import Image

        from capacitor_rt import FullCapacitor, LatentDataset
        from capacitor_rt.cache import CacheRequest
        from capacitor_rt.errors import CacheError

        if self.home is not None:
            return
        self.home = Path(tempfile.mkdtemp(prefix="capacitor-caches-", dir=scratch()))
        atexit.register(shutil.rmtree, self.home, ignore_errors=True)
        rng = np.random.default_rng(0)
        source = self.home / "src"
        source.mkdir()
        for i in range(9):
            size = ((32, 32), (24, 64))[i % 2]
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(source / f"{i}.png")
        (source / "4b.png").write_bytes(b"no image")
        (source / "7b.png").write_bytes(b"")
        for path in source.iterdir():
            settle(path)
        self.model = FullCapacitor.from_pretrained(GOLDEN / "p16", strict_size=False)
        self.request = CacheRequest(48, area=True, posterior=True, task_inputs=4, batch=2)
        os.environ["XDG_CACHE_HOME"] = str(self.home / "xdg")
        self.go_on(self.home / "whole")
        self.update(rng)
        self.share()
        self.add_views()
        self.truths = {}
        for name in ("whole", "updated", "shared", "other-whole", "other-updated"):
            # leaves the table of rows, too
            rows = LatentDataset(self.home / name, verify=True)
            self.truths[name] = {rows.ids[i]: rows.tensors(i) for i in range(len(rows))}
        # everything that a child uses is imported
        for step in ("one_bit", "index_cells"):
            for base in BASES:
                folder = Path(tempfile.mkdtemp(dir=self.home))
                self.make(folder, [["base", base], [step, "0"]])
                # what the mutants find is found by the children
                with suppress(CacheError, AssertionError):
                    self.read_all(folder, every=True)

    def update(self, rng: Any) -> None:
        """Make `updated` of `whole`, and `underway`, the same before its last task was committed."""
        import numpy as np
        from PIL import Image

        assert self.home is not None
        whole, updated, underway = (self.home / base for base in ("whole", "updated", "underway"))
        source = self.home / "src2"
        shutil.copytree(self.home / "src", source)
        for name in ("1", "9"):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(source / f"{name}.png")
            settle(source / f"{name}.png", 100)
        (source / "3.png").unlink()
        shutil.copytree(whole, updated)
        self.go_on(updated, "updated")
        shutil.copytree(updated, underway)
        (record,) = (underway / "generations").iterdir()
        (log,) = underway.glob("commits-*")
        plan8 = log.stem[8:]
        (underway / "plan.json").rename(underway / "generations" / f"{plan8}.json")
        record.rename(underway / "plan.json")
        (underway / "quarantine.jsonl").write_bytes((whole / "quarantine.jsonl").read_bytes())
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
        for part in underway.glob(f"*/{plan8}-000002.*"):
            part.unlink()

    def share(self) -> None:
        """Make `shared`, two of whose inputs are there twice."""
        assert self.home is not None
        source = self.home / "src3"
        shutil.copytree(self.home / "src", source)
        for name in ("0", "5"):
            shutil.copy(source / f"{name}.png", source / f"{name}-again.png")
        self.go_on(self.home / "shared", "shared")

    def add_views(self) -> None:
        """Make `other`, an unfinished view, and what it is when it is finished and when it is updated."""
        from capacitor_rt.cache import RunOptions, cache_images

        assert self.home is not None
        other, whole, updated = (self.home / name for name in ("other", "other-whole", "other-updated"))
        self.second = replace(self.request, side=32, area=False, posterior=False, task_inputs=2)
        options = RunOptions(workers=0, progress=False)
        cache_images(self.home / "src", whole, self.model, self.second, options=options)
        shutil.copytree(whole, other)
        log = other / "commits.jsonl"
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-2]))
        for sub in ("tasks", "index"):
            for path in sorted((other / sub).iterdir())[-2:]:
                path.unlink()
        shutil.copytree(whole, updated)
        options = replace(options, update=True)
        cache_images(self.home / "src2", updated, self.model, self.second, options=options)

    def go_on(self, out: Path, base: str = "whole", retry: bool = False) -> Any:
        from capacitor_rt.cache import RunOptions, cache_images, cache_views

        assert self.home is not None
        is_update = base in ("updated", "underway", "views-underway")
        options = RunOptions(
            workers=0, progress=False, backoff=(0.0,), update=is_update, retry_quarantined=retry and not is_update
        )
        if base in VIEWS:
            views = {"cache": self.request, "other": self.second}
            return cache_views(self.home / BASES[base], out.parent, self.model, views, note=str, options=options)
        request = replace(self.request, dtype="int8", dedupe=True) if base == "shared" else self.request
        return cache_images(self.home / BASES[base], out, self.model, request, options=options)

    def write(self, seed: int, number: int, folder: Path) -> str:
        rng = random.Random(f"{seed}:{number}")
        steps = draw(rng, f"{seed}:{number}")
        if rng.random() < 0.35:
            steps.insert(0, ["base", rng.choice(list(BASES)[1:])])
        done = self.make(folder, steps)
        return f"{json.dumps(steps)} ({done})"

    def again(self, case: Path, folder: Path) -> None:
        self.make(folder, json.loads((case / CASE).read_text()))
        (folder / EVERY).touch()

    def make(self, folder: Path, steps: list[list[str]]) -> str:
        """A copy of the cache with these mutators applied, and a folder beside it that nothing may touch."""
        assert self.home is not None
        base = steps[0][1] if steps[0][0] == "base" else "whole"
        shutil.copytree(self.home / (VIEWS[base][0] if base in VIEWS else base), folder / "cache")
        if base in VIEWS:
            shutil.copytree(self.home / VIEWS[base][1], folder / "other")
        outside = folder / "outside"
        outside.mkdir()
        (outside / "mine").write_bytes(b"mine")
        (folder / CASE).write_text(json.dumps(steps))
        return mutate(folder / "cache", [step for step in steps if step[0] != "base"])

    def read(self, folder: Path) -> None:
        self.read_all(folder, every=(folder / EVERY).exists())

    def read_all(self, folder: Path, *, every: bool) -> None:
        """Whatever reads a cache; those that write are for some of the mutants only, unless `every`."""
        from capacitor_rt.errors import CacheError, CapacitorError

        case = (folder / CASE).read_text()
        rng = random.Random(case)
        name, value = json.loads(case)[0]
        self.base = value if name == "base" else "whole"
        self.may_be = ("whole", "updated") if self.base in ("updated", "underway", "views-underway") else (self.base,)
        self.may_be = ("whole",) if self.base == "views" else self.may_be
        # what is damaged of the earlier generation is encoded anew by an update, and lies elsewhere then
        self.is_exact = not self.base.endswith("underway")
        cache, outside = folder / "cache", folder / "outside"
        os.environ["XDG_CACHE_HOME"] = str(folder / "xdg")
        before = _snapshot(outside)
        refusals: list[CapacitorError] = []
        steps: list[Callable[[Path], None]] = [self.look, self.check, self.survey]
        steps += [self.export] if every or rng.random() < 0.1 else []
        steps.append(self.resume)
        steps += [self.collect] if every or rng.random() < 0.1 else []
        steps += [self.mend] if every or rng.random() < 0.2 else []
        self.is_retrying = rng.random() < 0.15
        for step in steps:
            try:
                step(cache)
            except CacheError as error:
                # a message is there to be printed
                str(error).encode()
                refusals.append(error)
            if _snapshot(outside) != before:
                raise AssertionError(f"{step.__name__} touched a file outside")
            if self.base in VIEWS:
                self.look_beside(folder / "other", is_done=False)
        if refusals:
            raise refusals[-1]

    def look_beside(self, other: Path, is_done: bool) -> None:
        """The view beside the mutant is whole, or unfinished as it was; if a run `is_done`, it is what it is to be."""
        from capacitor_rt import LatentDataset

        assert self.home is not None
        _, before, after = VIEWS[self.base]
        if is_done:
            found, wanted = (_contents(folder) for folder in (other, self.home / after))
            if found != wanted:
                differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
                raise AssertionError(f"{differing[0]} of the other view is not that of an undisturbed run")
        rows = LatentDataset(other, verify=True, allow_partial=True)
        found_rows = rows.__getitems__(range(len(rows)))
        wrong = [_wrong(found_rows, self.truths[name], True) for name in {before, after} & self.truths.keys()]
        if all(wrong):
            raise AssertionError(f"the other view: {wrong[-1]}")

    def look(self, cache: Path) -> None:
        """Every row is the one that was cached, and none lacks; of a cache that is not whole, as far as it goes."""
        from capacitor_rt import LatentDataset
        from capacitor_rt.errors import CacheError

        refusal = None
        for partial in (False, True):
            try:
                rows = LatentDataset(cache, verify=True, allow_partial=partial)
                found = rows.__getitems__(range(len(rows)))
            except CacheError as error:
                refusal = refusal or error
                continue
            wrong = [_wrong(found, self.truths[name], partial) for name in self.may_be]
            if all(wrong):
                raise AssertionError(wrong[-1])
            if not partial:
                return
        if refusal:
            raise refusal

    def check(self, cache: Path) -> None:
        """What `verify` finds nothing wrong with is what was written."""
        from capacitor_rt.cache.verify import verify
        from capacitor_rt.errors import CacheError

        found = verify(cache, workers=0)
        for line in (*found.problems, *found.notes):
            line.encode()
        if found.problems or found.unfinished:
            raise CacheError("\n".join(found.problems) or "unfinished")
        assert self.home is not None
        plan = json.loads((cache / "plan.json").read_bytes())
        bases = [self.home / base for base in self.may_be]
        if "generation" in plan and not self.is_exact:
            return
        of = [base for base in bases if json.loads((base / "plan.json").read_bytes()) == plan]
        if not of:
            if plan.get("generation", {}).get("number", 0) > 1:
                # an update of what was damaged is another one
                return
            raise AssertionError("verify finds nothing wrong with plan.json")
        whole = of[0]
        for name in found.files:
            if name.startswith("commits"):
                # lines in another order, or there twice, are no damage
                same = {*(whole / name).read_bytes().split(b"\n")} == {*(cache / name).read_bytes().split(b"\n")}
            else:
                same = name.startswith("source") or (cache / name).read_bytes() == (whole / name).read_bytes()
                same |= name == "plan.json"
            if not same:
                raise AssertionError(f"verify finds nothing wrong with {name}")

    def survey(self, cache: Path) -> None:
        """What `status`, `diff` and `gc --dry-run` say; they look at the index alone."""
        from capacitor_rt.cache.compare import compare
        from capacitor_rt.cache.garbage import collect
        from capacitor_rt.cache.status import status
        from capacitor_rt.errors import CacheError

        assert self.home is not None
        whole = self.home / "whole"
        for ask in (
            lambda: status(cache).to_json(),
            lambda: compare(whole, cache),
            lambda: collect(cache, dry_run=True),
        ):
            with suppress(CacheError):
                str(ask()).encode()

    def export(self, cache: Path) -> None:
        """Rows that an export writes are those that were cached."""
        from safetensors.torch import load_file

        from capacitor_rt.cache.export import ExportRequest, export_cache

        out = cache.parent / "export"
        report = export_cache(cache, out, ExportRequest("comfy", space="whitened"), progress=False)
        truths = [self.truths[name] for name in self.may_be]
        if report.rows not in map(len, truths):
            raise AssertionError(f"{report.rows} rows are exported of {len(truths[0])}")
        for path in out.rglob("*.latent"):
            exported = load_file(path)["latent_tensor"][0]
            cached = [row["latents"].float() for truth in truths for row in truth.values()]
            if not any(torch.equal(exported, latents) for latents in cached):
                raise AssertionError(f"{path.name} is none of the rows")

    def resume(self, cache: Path) -> None:
        """A run that ends well has left what an undisturbed one has."""
        from capacitor_rt.errors import CacheError

        report = self.go_on(cache, self.base, self.is_retrying)
        if report.exit_code == 1:
            raise CacheError("tasks are not finished")
        # where rows lie in files of earlier generations, a task whose files are gone may be encoded anew
        self.is_exact &= self.base in ("whole", "views")
        if self.base in VIEWS:
            self.look_beside(cache.parent / "other", is_done=True)
        try:
            self.check(cache)
            self.look(cache)
        except CacheError as error:
            if "the plan of another generation" in str(error):
                # on which nothing was built
                raise
            raise AssertionError(f"a run ended with {report.exit_code} over {error}") from error

    def collect(self, cache: Path) -> None:
        """What `gc` removes no row needs."""
        from capacitor_rt.cache.garbage import collect
        from capacitor_rt.errors import CacheError

        try:
            self.look(cache)
        except CacheError:
            collect(cache)
            return
        collect(cache)
        self.look(cache)

    def mend(self, cache: Path) -> None:
        """What `verify --repair` has made sound a run can go on with."""
        from capacitor_rt.cache.repair import repair
        from capacitor_rt.cache.verify import verify

        repair(cache, verify(cache, workers=0))
        self.resume(cache)


def _wrong(found: list[Any], truth: dict[str, dict[str, torch.Tensor]], partial: bool) -> str:
    """What rows are not as they were cached; empty for nothing."""
    ids = sorted(row["id"] for row in found)
    if not partial and ids != sorted(truth):
        return f"{len(found)} rows of {len(truth)}"
    for row in found:
        tensors = truth.get(row["id"], {})
        if not tensors or not all(torch.equal(row[kind], t) for kind, t in tensors.items()):
            return f"row {row['id']} is not the one that was cached"
    return ""


def _contents(folder: Path) -> dict[str, bytes]:
    """The files of a cache without what a machine notes for itself."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".stamps", ".rows")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _snapshot(folder: Path) -> dict[str, tuple[bytes | None, int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        data = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (data, info.st_ino, info.st_mtime_ns)
    return found
