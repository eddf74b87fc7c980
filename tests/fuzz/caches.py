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
from pathlib import Path

import torch

from .cache_bases import BASES, MIN_LIVE, WORN, CacheBases, contents, snapshot, wrong, wrong_samples
from .cache_mutants import draw, may_differ, mutate
from .forked import Surface, scratch

CORPUS = Path(__file__).parent / "corpus" / "caches"
CASE = "case.json"
# a file that says that a mutant is to be read by everything
EVERY = "every"


class Caches(Surface):
    """Small caches, as `CacheBases` has them; three of five mutants are of the simplest of them."""

    name = "caches"
    corpus = CORPUS

    def __init__(self) -> None:
        self.home: Path | None = None

    def warm(self) -> None:
        from capacitor_rt.errors import CacheError

        if self.home is not None:
            return
        self.home = Path(tempfile.mkdtemp(prefix="capacitor-caches-", dir=scratch()))
        atexit.register(shutil.rmtree, self.home, ignore_errors=True)
        os.environ["XDG_CACHE_HOME"] = str(self.home / "xdg")
        self.bases = CacheBases(self.home)
        # everything that a child uses is imported
        for step in ("one_bit", "index_cells"):
            for base in BASES:
                folder = Path(tempfile.mkdtemp(dir=self.home))
                self.make(folder, [["base", base], [step, "0"]])
                # what the mutants find is found by the children
                with suppress(CacheError, AssertionError):
                    self.read_all(folder, every=True)

    def write(self, seed: int, number: int, folder: Path) -> str:
        rng = random.Random(f"{seed}:{number}")
        steps = draw(rng, f"{seed}:{number}")
        if rng.random() < 0.4:
            steps.insert(0, ["base", rng.choice(list(BASES)[1:])])
        done = self.make(folder, steps)
        return f"{json.dumps(steps)} ({done})"

    def again(self, case: Path, folder: Path) -> None:
        self.make(folder, json.loads((case / CASE).read_text()))
        (folder / EVERY).touch()

    def make(self, folder: Path, steps: list[list[str]]) -> str:
        """A copy of the cache with these mutators applied, and a folder beside it that nothing may touch."""
        self.bases.lay(steps[0][1] if steps[0][0] == "base" else "whole", folder)
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
        self.may_be, self.is_exact = BASES[self.base].may_be, BASES[self.base].is_exact
        is_another = may_differ(json.loads(case))
        cache, outside = folder / "cache", folder / "outside"
        os.environ["XDG_CACHE_HOME"] = str(folder / "xdg")
        before = snapshot(outside)
        refusals: list[CapacitorError] = []
        steps: list[Callable[[Path], None]] = [self.look, self.check, self.survey]
        steps += [self.export] if every or rng.random() < 0.1 else []
        is_worn = self.base in WORN
        steps += [self.compact] if is_worn and (every or rng.random() < 0.4) else []
        steps.append(self.resume)
        steps += [self.compact] if is_worn and (every or rng.random() < 0.2) else []
        steps += [self.collect] if every or rng.random() < 0.1 else []
        steps += [self.mend] if every or rng.random() < 0.2 else []
        self.is_retrying = rng.random() < 0.15
        for step in steps:
            try:
                step(cache)
            except AssertionError:
                if not is_another:
                    raise
            except CacheError as error:
                # a message is there to be printed
                str(error).encode()
                refusals.append(error)
            if snapshot(outside) != before:
                raise AssertionError(f"{step.__name__} touched a file outside")
            if BASES[self.base].other:
                self.look_beside(folder / "other", is_done=False)
        if refusals:
            raise refusals[-1]

    def look_beside(self, other: Path, is_done: bool) -> None:
        """The view beside the mutant is whole, or unfinished as it was; if a run `is_done`, it is what it is to be."""
        from capacitor_rt import LatentDataset

        assert self.home is not None
        before, after = BASES[self.base].other or ("", "")
        if is_done:
            found, wanted = (contents(folder) for folder in (other, self.home / after))
            if found != wanted:
                differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
                raise AssertionError(f"{differing[0]} of the other view is not that of an undisturbed run")
        rows = LatentDataset(other, verify=True, allow_partial=True)
        differing = [wrong(rows, truth, True) for name, truth in self.bases.truths.items() if name in (before, after)]
        if all(differing):
            raise AssertionError(f"the other view: {differing[-1]}")

    def look(self, cache: Path) -> None:
        """Every row is the one that was cached, and none lacks; of a cache that is not whole, as far as it goes."""
        from capacitor_rt import LatentDataset
        from capacitor_rt.errors import CacheError

        refusal = None
        for partial in (False, True):
            try:
                rows = LatentDataset(cache, verify=True, allow_partial=partial)
                differing = [wrong(rows, self.bases.truths[name], partial) for name in self.may_be]
            except CacheError as error:
                refusal = refusal or error
                continue
            if all(differing):
                raise AssertionError(differing[-1])
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
        """Rows that an export writes are those that were cached, with their labels, captions and columns."""
        from safetensors.torch import load_file

        from capacitor_rt.cache.export import ExportRequest, export_cache

        has_columns, out = bool(BASES[self.base].columns), cache.parent / "export"
        request = ExportRequest("wds", dtype="fp32") if has_columns else ExportRequest("comfy", space="whitened")
        report = export_cache(cache, out, request, progress=False)
        truths = [self.bases.truths[name].rows for name in self.may_be]
        if report.rows not in map(len, truths):
            raise AssertionError(f"{report.rows} rows are exported of {len(truths[0])}")
        for path in out.rglob("*.tar"):
            differing = [wrong_samples(path, truth) for truth in truths]
            if all(differing):
                raise AssertionError(f"{path.name}: {differing[-1]}")
        for path in out.rglob("*.latent"):
            exported = load_file(path)["latent_tensor"][0]
            cached = [row["latents"].float() for truth in truths for row in truth.values()]
            if not any(torch.equal(exported, latents) for latents in cached):
                raise AssertionError(f"{path.name} is none of the rows")

    def resume(self, cache: Path) -> None:
        """A run that ends well has left what an undisturbed one has."""
        from capacitor_rt.errors import CacheError

        report = self.bases.go_on(self.base, cache, self.is_retrying)
        if report.exit_code == 1:
            raise CacheError("tasks are not finished")
        # where rows lie in files of earlier generations, a task whose files are gone may be encoded anew
        self.is_exact &= self.base in ("whole", "views")
        if BASES[self.base].other:
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

    def compact(self, cache: Path) -> None:
        """Rows that are copied are the same ones; where that is refused, nothing is another one than before."""
        from capacitor_rt.cache.compaction import compact
        from capacitor_rt.errors import CacheError

        def problem() -> CacheError | None:
            try:
                self.check(cache)
                self.look(cache)
            except CacheError as error:
                return error
            return None

        before = problem()
        try:
            compact(cache, MIN_LIVE)
        finally:
            if before is None and (after := problem()) is not None:
                raise AssertionError(f"sound before it was compacted: {after}")
        self.look(cache)

    def mend(self, cache: Path) -> None:
        """What `verify --repair` has made sound a run can go on with."""
        from capacitor_rt.cache.repair import repair
        from capacitor_rt.cache.verify import verify

        repair(cache, verify(cache, workers=0))
        self.resume(cache)
