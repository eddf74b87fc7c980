"""Pictures that are resized together are those that are resized alone."""

from __future__ import annotations

import image_files as files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capacitor_rt.errors import ImageError
from capacitor_rt.images import together as module
from capacitor_rt.images.geometry import Size
from capacitor_rt.images.load import PixelPolicy, View, load_image, load_views
from capacitor_rt.images.together import Together

VIEW = View(PixelPolicy(), (Size(32, 32), Size(32, 48)))
SIZES = ((40, 60), (60, 40), (32, 32), (32, 70), (90, 90), (500, 20))
KINDS = {
    "jpeg": {},
    "grey": {"mode": "L"},
    "turned": {"exif": files.exif(6)},
    "profile": {"icc_profile": files.icc_profile()},
    "png": {"format": "PNG"},
    "cut": {},
}


def image(size: tuple[int, int], kind: str, seed: int) -> bytes:
    options = dict(KINDS[kind])
    picture = np.roll(files.texture(*size), seed, (0, 1))
    picture = picture[..., 0] if options.pop("mode", None) else picture
    data = files.encoded(picture, options.pop("format", "JPEG"), **options)
    return data[: len(data) // 2] if kind == "cut" else data


def loaded_together(datas: list[bytes], view: View, together: Together) -> tuple[list, list]:
    """What each came to, a copy of its pixels or an error; and which of them could not be resized."""
    outs = [np.zeros(view.slot, np.uint8) for _ in datas]
    found = []
    for number, (data, out) in enumerate(zip(datas, outs, strict=True)):
        try:
            found += load_views(data, [view], [out], together=together, token=number)
        except ImageError as e:
            found.append(e)
    failed = together.finish()
    for loaded, out in zip(found, outs, strict=True):
        assert isinstance(loaded, ImageError) or np.shares_memory(loaded.pixels, out)
    return found, failed


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from(sorted(KINDS)), st.integers(1, 4)), min_size=1),
    st.sampled_from((0, 30_000, 1 << 20)),
    st.sampled_from(("exact", "fast")),
)
def test_pixels_are_those_of_each_alone(groups, nbytes, decode):
    view = VIEW._replace(policy=PixelPolicy(decode=decode))
    datas = [image(size, kind, seed) for size, kind, count in groups for seed in range(count)]
    found, failed = loaded_together(datas, view, Together(nbytes))
    assert not failed
    for data, loaded in zip(datas, found, strict=True):
        try:
            alone = load_image(data, view.policy, view.buckets)
        except ImageError as e:
            assert (type(loaded), loaded.args) == (type(e), e.args)
            continue
        assert (loaded.header, loaded.bucket, loaded.placement) == (alone.header, alone.bucket, alone.placement)
        np.testing.assert_array_equal(loaded.pixels, alone.pixels)


def test_weights_are_computed_once_for_those_of_one_size(monkeypatch):
    counts = []

    def noted(pictures, *args, **options):
        counts.append(len(pictures))
        return original(pictures, *args, **options)

    original = module.resample_all
    monkeypatch.setattr(module, "resample_all", noted)
    sizes = [(40, 60)] * 6 + [(60, 40)] + [(40, 60)] * 3 + [(32, 32)] + [(40, 60)]
    loaded_together([image(size, "jpeg", 0) for size in sizes], VIEW, Together())
    assert counts == [4, 2, 1, 4]


def test_memory_has_a_limit():
    together = Together(50_000)
    loaded_together([image((40, 60), "jpeg", seed) for seed in range(9)], VIEW, together)
    loaded_together([image((300, 300), "jpeg", seed) for seed in range(3)], VIEW, together)
    assert 0 < len(together._memory) <= 50_000


@pytest.mark.parametrize("alone", [False, True])
def test_who_cannot_be_resized_is_named_and_nobody_else(alone, monkeypatch):
    def failing(*args, **options):
        raise MemoryError

    def failing_once(pixels, *args, **options):
        if next(numbers) == 1:
            raise MemoryError
        return original(pixels, *args, **options)

    original, numbers = module.resample, iter(range(9))
    monkeypatch.setattr(module, "resample_all", failing)
    monkeypatch.setattr(module, "resample", failing_once)
    datas = [image((40, 60), "jpeg", seed) for seed in range(1 if alone else 3)]
    found, failed = loaded_together(datas, VIEW, Together())
    assert [(token, type(error)) for token, error in failed] == [(0 if alone else 1, MemoryError)]
    for number in () if alone else (0, 2):
        np.testing.assert_array_equal(found[number].pixels, load_image(datas[number], VIEW.policy, VIEW.buckets).pixels)
