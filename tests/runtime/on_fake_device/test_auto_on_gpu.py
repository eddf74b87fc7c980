"""Backend "auto" on its first GPU. The fake one computes no kernel: every launch is wrong, which auto must notice."""

from __future__ import annotations

import json
import threading
import warnings

import pytest
import torch
import triton
from models import TINY, randomise

from capacitor_rt import FullCapacitor
from capacitor_rt.runtime import first_contact, launch_cases, self_check
from capacitor_rt.runtime.runtime import Runtime

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


def test_a_first_call_makes_its_kernels_side_by_side(gpu, monkeypatch):
    """And further ones make no more of them, nor look for them again."""
    monkeypatch.setenv(first_contact.SWITCH, "0")
    makers, compiled = set(), triton.compiler.compile

    def noting(*args, **kwargs):
        makers.add(threading.current_thread())
        return compiled(*args, **kwargs)

    monkeypatch.setattr(triton.compiler, "compile", noting)
    ours, image = model("triton"), IMAGE.to(GPU)
    ours.encode(image)
    seconds, count = ours.stats().compile_seconds, gpu.counts["compile"]
    assert seconds > 0 and count > 3 and makers and threading.current_thread() not in makers
    ours.encode(image)
    ours.encode(IMAGE[:, :, :, :8].repeat(1, 1, 1, 4).to(GPU))
    assert ours.stats().compile_seconds == seconds


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


def test_tiles_whose_bits_differ_are_not_taken_for_few_images(small, gpu, monkeypatch):
    differ = [self_check.CheckRow("encode 1x32x32 among 64", 1.0, 0.0, "1 of 1 images have other bits than among 64")]
    monkeypatch.setattr(first_contact, "check_model", lambda *_: [])
    monkeypatch.setattr(first_contact, "check_bits", lambda *_: differ)
    for backend in ("auto", "triton"):
        one = model(backend)
        one.encode(IMAGE.to(GPU))
        # who asks for triton is told what is known
        assert one.narrow_tiles and not one.runtime.narrow
    reasons = json.loads(small.read_text())
    assert sorted(key.endswith(", few images") for key in reasons) == [False, True]
    assert "few images took other bits on this GPU (encode 1x32x32" in next(filter(None, reasons.values()))
    first_contact._met.clear()
    small.unlink()
    monkeypatch.setattr(first_contact, "check_bits", lambda *_: [])
    agreed = model("auto")
    agreed.encode(IMAGE.to(GPU))
    assert agreed.runtime.narrow
    agreed.narrow_tiles = False
    agreed.encode(IMAGE.to(GPU))
    assert not agreed.runtime.narrow


def test_the_bits_of_few_images_are_compared(gpu, monkeypatch):
    """On this device no kernel computes: what an arena holds is what comes out, so a mark in it must be found."""
    rows = self_check.check_bits(GPU, torch.bfloat16)
    names = [f"{what} {n}x32x32 among 64" for what in ("encode", "decode") for n in self_check.FEW]
    assert [row.name for row in rows] == names, rows[0].problem
    assert gpu.counts["launch"] > 0

    real = Runtime.encode

    def marked(self, image, out=None):
        latents = real(self, image, out)
        latents.copy_(torch.arange(float(len(image)), device=GPU)[:, None, None, None].expand_as(latents))
        latents[0] += len(image)
        return latents

    monkeypatch.setattr(Runtime, "encode", marked)
    rows = self_check.check_bits(GPU, torch.bfloat16)
    assert [row.error for row in rows[:3]] == [1.0, 1.0, 1.0]
    assert all("1 of" in row.problem and "other bits" in row.problem for row in rows[:3])


def test_the_bits_of_few_images_in_fp8_are_compared(gpu, monkeypatch):
    rows = self_check.check_fp8_bits(GPU, torch.bfloat16)
    assert [row.name for row in rows] == [f"encode in fp8 {n}x32x32 among 64" for n in self_check.FEW], rows[0].problem
    assert gpu.counts["launch"] > 0
    real = Runtime.encode

    def marked(self, image, out=None):
        latents = real(self, image, out)
        latents.copy_(torch.zeros_like(latents))
        latents[0] += len(image)
        return latents

    monkeypatch.setattr(Runtime, "encode", marked)
    rows = self_check.check_fp8_bits(GPU, torch.bfloat16)
    assert [row.error for row in rows] == [1.0, 1.0, 1.0] and all("other bits" in row.problem for row in rows)


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
