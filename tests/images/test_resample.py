"""Resampling in whole numbers: one result whoever computes it, near Pillow's, and bit for bit on record."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import image_files as files
import numpy as np
import pytest
import resample_record as record
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capacitor_rt.images import resample as module
from capacitor_rt.images.resample import FILTERS, Window, axis_weights, by_matrices, resample, torch_agrees

PILLOW = {name: getattr(Image.Resampling, name.upper()) for name in FILTERS}
side = st.integers(1, 90)


def whole(height: int, width: int) -> Window:
    return Window(height, width, 0, 0, height, width)


def literally(pixels: np.ndarray, height: int, width: int, filter: str) -> np.ndarray:
    """Rows, then columns, one output pixel after the other."""
    for axis, resized in ((1, width), (0, height)):
        length = pixels.shape[axis]
        weights = axis_weights(filter, length, resized, 0, resized)
        planes = []
        for first, taps in zip(weights.first, weights.taps.astype(int), strict=True):
            window = np.take(pixels, np.arange(first, min(first + len(taps), length)), axis).astype(int)
            total = np.tensordot(window, taps[: window.shape[axis]], ([axis], [0]))
            planes.append(np.clip((total + (1 << weights.precision >> 1)) >> weights.precision, 0, 255))
        pixels = np.stack(planes, axis).astype(np.uint8)
    return pixels


@settings(max_examples=40, deadline=None)
@given(side, side, side, side, st.sampled_from(sorted(FILTERS)), st.booleans(), st.data())
def test_torch_and_matrices_give_the_window_of_the_literal_result(h, w, height, width, filter, columns_first, draw):
    pixels = np.random.default_rng(h * w).integers(0, 256, (h, w, 3), np.uint8)
    top, left = draw.draw(st.integers(0, height - 1)), draw.draw(st.integers(0, width - 1))
    bottom, right = draw.draw(st.integers(top + 1, height)), draw.draw(st.integers(left + 1, width))
    window = Window(height, width, top, left, bottom, right)
    if columns_first:
        expected = literally(pixels.transpose(1, 0, 2), width, height, filter).transpose(1, 0, 2)
    else:
        expected = literally(pixels, height, width, filter)
    expected = expected[top:bottom, left:right]
    np.testing.assert_array_equal(by_matrices(pixels, window, filter, columns_first), expected)
    np.testing.assert_array_equal(resample(pixels, window, filter, columns_first), expected)
    if torch_agrees(filter):
        np.testing.assert_array_equal(module._by_torch(pixels[None], window, filter, columns_first)[0], expected)


def test_this_torch_is_used():
    assert torch_agrees("bicubic") and torch_agrees("bilinear") and not torch_agrees("box")
    assert torch_agrees("lanczos") == hasattr(torch._C._nn, "_upsample_lanczos2d_aa")


def test_a_torch_of_other_bytes_is_not_used(monkeypatch):
    monkeypatch.setattr(module, "_by_torch", lambda pictures, window, *rest: [by_matrices(pictures[0], window, "box")])
    assert not torch_agrees.__wrapped__("lanczos")


@pytest.mark.parametrize("filter", sorted(FILTERS))
@pytest.mark.parametrize(
    ("size", "resized"), [((375, 500), (256, 341)), ((40, 60), (128, 192)), ((999, 97), (100, 96))]
)
def test_near_pillow(size, resized, filter):
    for pixels in (files.texture(*size), np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)):
        got = resample(pixels, whole(*resized), filter).astype(int)
        theirs = np.asarray(Image.fromarray(pixels).resize(resized[::-1], PILLOW[filter]))
        error = abs(got - theirs)
        assert error.max() <= 1 and error.mean() < 0.02


def test_more_taps_than_float32_sums_exactly():
    pixels = np.random.default_rng(1).integers(0, 256, (1, 4000, 3), np.uint8)
    assert axis_weights("lanczos", 4000, 10, 0, 10).taps.shape[1] > module._MOST_TAPS
    np.testing.assert_array_equal(by_matrices(pixels, whole(1, 10), "lanczos"), literally(pixels, 1, 10, "lanczos"))


def test_a_small_part_of_a_picture_enlarged_without_bounds():
    pixels = files.texture(1300, 2)
    # 170 megapixels in whole
    window = Window(332_800, 512, 166_144, 0, 166_656, 512)
    tracemalloc.start()
    part = resample(pixels, window)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert part.shape == (512, 512, 3) and peak < 40 << 20
    assert abs(part[256, 0].astype(int) - pixels[650, 0]).max() <= 30


CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
# what numpy's products run by
CORES = {"DEFAULT": "Prescott", "AVX2": "Haswell", "AVX512": "SkylakeX"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bits_on_record_under_every_cpu_capability(capability):
    """By torch and by matrices, by one thread and by three; and mutants of both are noticed under each."""
    best = torch.backends.cpu.get_cpu_capability()
    if capability in CAPABILITIES[1 + (CAPABILITIES.index(best) if best in CAPABILITIES else 0) :]:
        pytest.skip(f"this processor has no {capability}")
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability.lower(), "OPENBLAS_CORETYPE": CORES[capability]}
    path = os.pathsep.join([os.path.dirname(record.__file__), *sys.path])
    command = [sys.executable, record.__file__, capability]
    run = subprocess.run(command, env=env | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_layout_of_a_picture_does_not_matter(monkeypatch):
    planar = lambda picture, **options: record._interpolate(picture.contiguous(), **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "interpolate", planar)
    record.check(("torch",))
