"""Backend "auto" on its first GPU. The fake one computes no kernel: every launch is wrong, which auto must notice."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from models import TINY, randomise

from capacitor_rt import FullCapacitor
from capacitor_rt.runtime import first_contact, launch_cases, self_check

GPU = torch.device("cuda", 0)
IMAGE = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A check at small sizes, remembered in a folder of the test's own."""
    monkeypatch.setattr(self_check, "sizes", lambda: launch_cases.TINY)
    monkeypatch.setattr(first_contact, "_met", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(first_contact.SWITCH, raising=False)
    return tmp_path / "capacitor_rt" / "self-check.json"


def model(backend: str) -> FullCapacitor:
    return randomise(FullCapacitor(TINY, backend=backend, strict_size=False)).to(GPU, torch.bfloat16)


def test_auto_serves_by_torch_where_launches_are_wrong(small, gpu):
    image = IMAGE.to(GPU)
    with torch.no_grad():
        expected = model("torch").encode(image)
    auto = model("auto")
    with pytest.warns(UserWarning, match=r"torch serves this model: the Triton backend failed its check on this GPU"):
        assert torch.equal(auto.encode(image).cpu(), expected.cpu())
    assert gpu.counts["launch"] > 0 and auto.stats().folds == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(auto.encode(image).cpu(), expected.cpu())
    ((key, reason),) = json.loads(small.read_text()).items()
    assert key.startswith("GPU fake GPU of compute capability 9.0, compute capability 9.0, driver ")
    assert (
        "(encode 2x32x32: " in reason
        and ("times its bound" in reason or "not finite" in reason)
        and "`capacitor-rt doctor --check --device cuda:0`" in reason
    )
    # the next model of this process, and a new process, are told without another launch
    launches = gpu.counts["launch"]
    for known in (first_contact._met, {}):
        first_contact._met = known
        with pytest.warns(UserWarning, match="failed its check"):
            model("auto").encode(image)
    assert gpu.counts["launch"] == launches


def test_without_the_check_auto_serves_by_triton(small, monkeypatch, gpu):
    monkeypatch.setenv(first_contact.SWITCH, "0")
    auto = model("auto")
    auto.encode(IMAGE.to(GPU))
    assert auto.stats().folds == 1 and gpu.counts["launch"] > 0 and not small.exists()


def test_whoever_asks_for_triton_is_not_second_guessed(small):
    asked = model("triton")
    asked.encode(IMAGE.to(GPU))
    assert asked.stats().folds == 1 and not small.exists()


def test_every_launch_of_the_check_is_queued_and_found_wrong(gpu):
    rows = self_check.check_launches(GPU, torch.bfloat16)
    assert [row.name for row in rows if row.ok] == []
    # kernels that wrote nothing leave what was there
    # bytes that nobody writes are no NaN, and still wrong
    assert all("are not finite" in row.problem or row.name.startswith("resize") for row in rows[:-2])
    assert gpu.counts["launch"] > len(rows)


def test_a_driver_older_than_what_triton_compiles_for(small, gpu, monkeypatch):
    real = gpu.count

    def count(kind: str) -> None:
        if kind == "load":
            raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
        real(kind)

    monkeypatch.setattr(gpu, "count", count)
    auto = model("auto")
    with pytest.warns(
        UserWarning, match=r"torch serves this model: Triton could not build a kernel .*too old for Triton"
    ):
        auto.encode(IMAGE.to(GPU))
    # a later process tries again: the driver may be another one
    assert not small.exists() and auto.runtime is None
