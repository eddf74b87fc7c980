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
from typing import Any

import torch

from .cache_mutators import draw, mutate
from .checkpoints import GOLDEN
from .forked import Surface, scratch

CORPUS = Path(__file__).parent / "corpus" / "caches"
CASE = "case.json"
# a file that says that a mutant is to be read by everything
EVERY = "every"


class Caches(Surface):
    """A small cache with two sizes, mirrored and with logsnr, two of whose inputs are quarantined."""

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
        self.model = FullCapacitor.from_pretrained(GOLDEN / "p16", strict_size=False)
        self.request = CacheRequest(48, area=True, posterior=True, task_inputs=4, batch=2)
        os.environ["XDG_CACHE_HOME"] = str(self.home / "xdg")
        self.go_on(self.home / "whole")
        # leaves the table of rows, too
        rows = LatentDataset(self.home / "whole", verify=True)
        self.truth = {rows.ids[i]: rows.tensors(i) for i in range(len(rows))}
        # everything that a child uses is imported
        for step in ("one_bit", "index_cells"):
            folder = Path(tempfile.mkdtemp(dir=self.home))
            self.make(folder, [[step, "0"]])
            with suppress(CacheError):
                self.read_all(folder, every=True)

    def go_on(self, out: Path) -> Any:
        from capacitor_rt.cache import RunOptions, cache_images

        assert self.home is not None
        options = RunOptions(workers=0, progress=False, backoff=(0.0,))
        return cache_images(self.home / "src", out, self.model, self.request, options=options)

    def write(self, seed: int, number: int, folder: Path) -> str:
        steps = draw(random.Random(f"{seed}:{number}"), f"{seed}:{number}")
        done = self.make(folder, steps)
        return f"{json.dumps(steps)} ({done})"

    def again(self, case: Path, folder: Path) -> None:
        self.make(folder, json.loads((case / CASE).read_text()))
        (folder / EVERY).touch()

    def make(self, folder: Path, steps: list[list[str]]) -> str:
        """A copy of the cache with these mutators applied, and a folder beside it that nothing may touch."""
        assert self.home is not None
        shutil.copytree(self.home / "whole", folder / "cache")
        outside = folder / "outside"
        outside.mkdir()
        (outside / "mine").write_bytes(b"mine")
        (folder / CASE).write_text(json.dumps(steps))
        return mutate(folder / "cache", steps)

    def read(self, folder: Path) -> None:
        self.read_all(folder, every=(folder / EVERY).exists())

    def read_all(self, folder: Path, *, every: bool) -> None:
        """Whatever reads a cache; those that write are for some of the mutants only, unless `every`."""
        from capacitor_rt.errors import CacheError, CapacitorError

        rng = random.Random((folder / CASE).read_text())
        cache, outside = folder / "cache", folder / "outside"
        os.environ["XDG_CACHE_HOME"] = str(folder / "xdg")
        before = _snapshot(outside)
        refusals: list[CapacitorError] = []
        steps: list[Callable[[Path], None]] = [self.look, self.check, self.survey]
        steps += [self.export] if every or rng.random() < 0.1 else []
        steps.append(self.resume)
        steps += [self.collect] if every or rng.random() < 0.1 else []
        steps += [self.mend] if every or rng.random() < 0.2 else []
        for step in steps:
            try:
                step(cache)
            except CacheError as error:
                # a message is there to be printed
                str(error).encode()
                refusals.append(error)
            if _snapshot(outside) != before:
                raise AssertionError(f"{step.__name__} touched a file outside")
        if refusals:
            raise refusals[-1]

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
            if not partial and sorted(rows.ids) != sorted(self.truth):
                raise AssertionError(f"{len(rows)} rows of {len(self.truth)}")
            for i, row in enumerate(found):
                truth = self.truth[rows.ids[i]]
                if not all(torch.equal(row[kind], t) for kind, t in truth.items()):
                    raise AssertionError(f"row {i} is not the one that was cached")
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
        whole = self.home / "whole"
        for name in found.files:
            if name == "commits.jsonl":
                # lines in another order, or there twice, are no damage
                same = {*(whole / name).read_bytes().split(b"\n")} == {*(cache / name).read_bytes().split(b"\n")}
            elif name == "plan.json":
                same = json.loads((whole / name).read_bytes()) == json.loads((cache / name).read_bytes())
            else:
                same = name == "source.parquet" or (cache / name).read_bytes() == (whole / name).read_bytes()
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
        if report.rows != len(self.truth):
            raise AssertionError(f"{report.rows} rows are exported of {len(self.truth)}")
        for path in out.rglob("*.latent"):
            exported = load_file(path)["latent_tensor"][0]
            if not any(torch.equal(exported, row["latents"].float()) for row in self.truth.values()):
                raise AssertionError(f"{path.name} is none of the rows")

    def resume(self, cache: Path) -> None:
        """A run that ends well has left what an undisturbed one has."""
        from capacitor_rt.errors import CacheError

        report = self.go_on(cache)
        if report.exit_code == 1:
            raise CacheError("tasks are not finished")
        try:
            self.check(cache)
            self.look(cache)
        except CacheError as error:
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


def _snapshot(folder: Path) -> dict[str, tuple[bytes | None, int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        data = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (data, info.st_ino, info.st_mtime_ns)
    return found
