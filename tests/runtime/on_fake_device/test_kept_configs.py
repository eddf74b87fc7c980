"""A cache goes on with the launch configs that it was begun with, on the fake GPU, whose latents nobody looks at."""

from __future__ import annotations

import json

import pytest
import torch
from cache_cases import write_images
from models import randomise

from capacitor_kernels import tuning, user_rows
from capacitor_kernels.ops import grn as module
from capacitor_rt import CacheError, FullCapacitor
from capacitor_rt.cache import CacheRequest, cache_images
from capacitor_rt.cache.folder import CacheFolder
from capacitor_rt.cache.kept_configs import kept
from capacitor_rt.cache.plan import CachePlan, load_plan
from capacitor_rt.runtime import launch_cases

GPU = torch.device("cuda", 0)
MODEL = launch_cases.TINY.config
GRN = {"tiles": 1, "hidden": MODEL.hidden_dim}
REQUEST = CacheRequest(32, batch=2, task_inputs=2)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Writes a row of the user for grn, or with None removes it."""
    monkeypatch.setenv(user_rows.VARIABLE, str(tmp_path / "rows"))
    monkeypatch.setenv("CAPACITOR_SELF_CHECK", "0")
    path = tmp_path / "rows" / "sm_90.json"

    def write(block_f: int | None) -> None:
        path.unlink(missing_ok=True)
        if block_f is not None:
            config = {"split": True, "block_f": block_f, "num_warps": 4}
            line = {"shape": GRN, "dtype": "bf16", "use": "throughput", "config": config}
            user_rows.write(path, 90, {"grn": [line]})
        tuning.reload()

    write(None)
    yield write
    monkeypatch.undo()
    tuning.reload()


@pytest.fixture
def launched(monkeypatch):
    """Configs of grn that were launched by."""
    seen = []
    run = module.run_launches

    def note(launches, device):
        seen.extend(launch.args.get("BLOCK_F", 0) for launch in launches if "norms" in launch.kernel.fn.__name__)
        run(launches, device)

    monkeypatch.setattr(module, "run_launches", note)
    return seen


@pytest.fixture
def cache(tmp_path):
    """Caches photographs with a model that is in memory; only the first so many tasks."""
    write_images(tmp_path / "src", 4, sizes=((32, 32),))
    model = randomise(FullCapacitor(MODEL, backend="triton", strict_size=False)).to(GPU, torch.bfloat16)

    def run(out: str) -> dict:
        cache_images(tmp_path / "src", tmp_path / out, model, REQUEST, workers=0, progress=False)
        return json.loads((tmp_path / out / "plan.json").read_text())

    run.folder, run.model = tmp_path, model
    return run


def undo_a_task(out) -> None:
    """As if the run had ended before the last task."""
    log = out / "commits.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]))
    for folder in ("tasks", "index"):
        sorted((out / folder).iterdir())[-1].unlink()


def test_a_cache_keeps_the_configs_that_it_was_begun_with(cache, rows, launched):
    rows(64)
    plan = cache("one")
    (line,) = plan["configs"]["families"]["grn"]
    assert plan["configs"]["compute_capability"] == 90 and line["config"]["block_f"] == 64
    assert set(launched) == {64}
    rows(128)
    undo_a_task(cache.folder / "one")
    launched.clear()
    again = cache("one")
    assert again == plan and set(launched) == {64}
    # outside of the cache the new row counts, for a model that ran inside of it too
    launched.clear()
    with torch.no_grad():
        cache.model.encode(torch.zeros(1, 3, 32, 32, device=GPU).add_(torch.linspace(-1, 1, 32, device=GPU)))
    assert set(launched) == {128}
    other = cache("two")
    assert other["configs"]["families"]["grn"][0]["config"]["block_f"] == 128
    names = [sorted(path.name for path in (cache.folder / out / "tasks").iterdir()) for out in ("one", "two")]
    assert names[0] != names[1]


def test_without_rows_of_the_user_a_plan_says_nothing_of_them_and_stays_so(cache, rows, launched):
    plan = cache("one")
    assert "configs" not in plan
    shipped = set(launched)
    rows(64)
    undo_a_task(cache.folder / "one")
    launched.clear()
    assert cache("one") == plan and set(launched) == shipped


@pytest.mark.parametrize("gpu", [90], indirect=True)
def test_on_another_gpu_it_is_refused(cache, rows, gpu):
    rows(64)
    cache("one")
    undo_a_task(cache.folder / "one")
    gpu.reset(100)
    with pytest.raises(CacheError, match=r"launch configs tuned for sm_90, and this GPU is sm_100: go on where it was"):
        cache("one")


def test_damaged_configs_of_a_plan_are_refused(cache, rows):
    rows(64)
    cache("one")
    with CacheFolder(cache.folder / "one") as folder:
        fields = load_plan(folder).fields
    fields["configs"]["families"]["grn"][0]["config"]["block_f"] = 1 << 20
    with pytest.raises(ValueError, match="a plan: grn, row 0: block_f of the config is 1048576"):
        kept(CachePlan(fields), 90, None).__enter__()
