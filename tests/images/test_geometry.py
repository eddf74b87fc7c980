from __future__ import annotations

import random
from fractions import Fraction

import image_files as files
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from capacitor_rt.errors import ImageError, InputError
from capacitor_rt.images.convert import orient
from capacitor_rt.images.geometry import (
    FILTERS,
    Placement,
    Size,
    apply,
    assign,
    bucket_table,
    place,
    square_bucket,
)

multiples = st.sampled_from([1, 8, 16, 32, 48, 64])
sizes = st.builds(Size, st.integers(1, 9000), st.integers(1, 9000))
PILLOW = {name: getattr(Image.Resampling, name.upper()) for name in FILTERS}
small = st.builds(Size, st.integers(1, 70), st.integers(1, 70))


@st.composite
def tables(draw):
    multiple = draw(multiples)
    area_side = multiple + draw(st.integers(0, 24 * multiple))
    return area_side, multiple, draw(st.floats(1, 8))


def legal_sizes(area_side: int, multiple: int, max_aspect: float) -> set[Size]:
    sides = range(multiple, area_side**2 // multiple + 1, multiple)
    found = set()
    for height in sides:
        for width in sides:
            if height * width > area_side**2:
                break
            if max(height, width) / min(height, width) <= max_aspect:
                found.add(Size(height, width))
    return found


class TestBuckets:
    @settings(max_examples=30, deadline=None)
    @given(tables())
    @example((11, 1, 1.2))
    def test_exactly_the_sizes_that_cannot_grow(self, arguments):
        legal = legal_sizes(*arguments)
        table = bucket_table(*arguments)
        maximal = {s for s in legal if not any(t != s and t.height >= s.height and t.width >= s.width for t in legal)}
        assert set(table) == maximal
        assert list(table) == sorted(maximal)
        assert {Size(s.width, s.height) for s in table} == set(table)

    def test_published_example(self):
        names = [str(s) for s in bucket_table(512, 32)]
        assert len(names) == 17
        assert names[:3] == ["256x1024", "288x896", "320x800"] and names[8] == "512x512"

    @pytest.mark.parametrize(
        ("side", "multiple"), [(256, 16), (256, 32), (512, 32), (1024, 32), (1024, 64), (2048, 64)]
    )
    def test_area_is_used_and_every_aspect_has_a_near_bucket(self, side, multiple):
        table = bucket_table(side, multiple)
        assert Size(side, side) in table
        # a size that cannot grow lacks less than one more row or column of blocks
        assert all(side**2 - s.area < multiple * min(s.height, s.width) for s in table)
        for aspect in np.geomspace(0.25, 4, 99):
            image = Size(4000, round(4000 * aspect))
            bucket = assign(image, table)
            ratio = (image.width * bucket.height) / (image.height * bucket.width)
            # neighbours are about one multiple of the shorter side apart
            assert max(ratio, 1 / ratio) <= 1 + 1.5 * multiple / min(bucket.height, bucket.width)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((31, 32), "31 is below 32"),
            ((512, 0), "multiple 0"),
            ((512, 32, 0.5), "max_aspect 0.5"),
            ((512, 32, float("nan")), "max_aspect nan"),
            ((512, 32, float("inf")), "max_aspect inf"),
        ],
    )
    def test_arguments_are_checked(self, arguments, message):
        with pytest.raises(InputError, match=message):
            bucket_table(*arguments)

    def test_square(self):
        assert square_bucket(512, 32) == Size(512, 512)
        with pytest.raises(InputError, match="size 500 is not a multiple of 32: use 480 or 512"):
            square_bucket(500, 32)
        for side in (20, 0, -64):
            with pytest.raises(InputError, match=f"size {side} is not a multiple of 32: use 32"):
                square_bucket(side, 32)

    def test_sizes_are_ordered_and_not_empty(self):
        assert sorted([Size(2, 1), Size(1, 9), Size(1, 2)]) == [Size(1, 2), Size(1, 9), Size(2, 1)]
        with pytest.raises(InputError, match="empty"):
            Size(0, 5)


class TestAssign:
    @settings(max_examples=60, deadline=None)
    @given(sizes, tables(), st.randoms(use_true_random=False))
    def test_nearest_aspect_whatever_the_order(self, size, arguments, rng: random.Random):
        table = list(bucket_table(*arguments))

        def distance(bucket):
            ratio = Fraction(size.width * bucket.height, size.height * bucket.width)
            return max(ratio, 1 / ratio)

        chosen = assign(size, table)
        assert float(distance(chosen)) == float(min(map(distance, table)))
        rng.shuffle(table)
        assert assign(size, table) == chosen

    @given(sizes, st.integers(1, 7))
    def test_scale_does_not_matter(self, size, factor):
        table = bucket_table(512, 32)
        assert assign(size, table) == assign(Size(size.height * factor, size.width * factor), table)

    def test_bucket_shaped_images_stay(self):
        for table in (bucket_table(512, 32), bucket_table(1000, 16, 2.5)):
            assert [assign(s, table) for s in table] == list(table)

    def test_ties(self):
        # a square lies as near to 32x64 as to 64x32: the wider one; of two squares the larger
        assert assign(Size(100, 100), bucket_table(46, 32)) == Size(32, 64)
        assert assign(Size(100, 100), [Size(32, 32), Size(64, 64)]) == Size(64, 64)

    def test_no_buckets(self):
        with pytest.raises(InputError, match="no buckets"):
            assign(Size(1, 1), [])


class TestPlace:
    @settings(max_examples=150)
    @given(sizes, sizes)
    def test_covers_and_centres(self, size, bucket):
        try:
            placement = place(size, bucket)
        except ImageError as error:
            assert error.reason == "too_large"
            scale = max(Fraction(bucket.height, size.height), Fraction(bucket.width, size.width))
            assert size.area * scale**2 > 178_000_000
            return
        resize = placement.resize
        assert placement.crop == bucket
        assert resize.height == bucket.height or resize.width == bucket.width
        below, right = resize.height - placement.top - bucket.height, resize.width - placement.left - bucket.width
        assert 0 <= placement.top <= below <= placement.top + 1
        assert 0 <= placement.left <= right <= placement.left + 1
        # the aspect is kept to half a pixel of the free side
        if resize.height == bucket.height:
            assert abs(Fraction(size.width * resize.height, size.height) - resize.width) <= Fraction(1, 2)
        else:
            assert abs(Fraction(size.height * resize.width, size.width) - resize.height) <= Fraction(1, 2)
        assert placement.upscaled == (resize.height > size.height or resize.width > size.width)

    @given(sizes, sizes)
    def test_transposed_images_are_placed_alike(self, size, bucket):
        try:
            a = place(size, bucket)
        except ImageError:
            return
        b = place(Size(size.width, size.height), Size(bucket.width, bucket.height))
        assert (a.resize.height, a.resize.width, a.top, a.left) == (b.resize.width, b.resize.height, b.left, b.top)

    def test_identity(self):
        assert place(Size(480, 512), Size(480, 512)) == Placement(Size(480, 512), 0, 0, Size(480, 512), False)

    def test_upscale_policy(self):
        assert place(Size(100, 900), Size(256, 256)).upscaled
        assert not place(Size(256, 900), Size(256, 256), upscale="refuse").upscaled
        with pytest.raises(ImageError, match=r"255x900.*smaller than its bucket 256x256") as caught:
            place(Size(255, 900), Size(256, 256), upscale="refuse")
        assert caught.value.reason == "too_small"
        with pytest.raises(InputError, match="upscale 'maybe'"):
            place(Size(9, 9), Size(9, 9), upscale="maybe")

    def test_needle_is_refused_instead_of_blown_up(self):
        with pytest.raises(ImageError, match="too elongated") as caught:
            place(Size(1, 10_000), Size(512, 512))
        assert caught.value.reason == "too_large"


class TestApply:
    @settings(max_examples=30, deadline=None)
    @given(small, small, st.sampled_from(sorted(FILTERS)))
    def test_is_pillows_resize_then_crop(self, size, bucket, filter):
        pixels = files.texture(size.height, size.width)
        before = pixels.copy()
        placement = place(size, bucket)
        got = apply(pixels, placement, filter)
        assert got.shape == (bucket.height, bucket.width, 3) and got.dtype == np.uint8
        assert got.flags.c_contiguous and got.flags.writeable
        resized = Image.fromarray(pixels).resize((placement.resize.width, placement.resize.height), PILLOW[filter])
        rows = slice(placement.top, placement.top + bucket.height)
        columns = slice(placement.left, placement.left + bucket.width)
        assert abs(got.astype(int) - np.asarray(resized)[rows, columns]).max() <= 2
        np.testing.assert_array_equal(pixels, before)

    @settings(max_examples=30, deadline=None)
    @given(small, small, st.integers(1, 8))
    def test_turned_last_as_if_turned_first(self, size, bucket, orientation):
        stored = files.texture(size.height, size.width)
        upright = orient(stored, orientation)
        placement = place(Size(*upright.shape[:2]), bucket)
        got = apply(stored, placement, orientation=orientation)
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, apply(upright, placement))

    @given(small, st.data())
    def test_identity_is_exact(self, size, data):
        pixels = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), np.uint8)
        crop = Size(data.draw(st.integers(1, size.height)), data.draw(st.integers(1, size.width)))
        top = data.draw(st.integers(0, size.height - crop.height))
        left = data.draw(st.integers(0, size.width - crop.width))
        for filter in FILTERS:
            got = apply(pixels, Placement(size, top, left, crop), filter)
            np.testing.assert_array_equal(got, pixels[top : top + crop.height, left : left + crop.width])
            assert not np.shares_memory(got, pixels)

    @pytest.mark.parametrize("filter", sorted(FILTERS))
    @pytest.mark.parametrize("value", [0, 1, 128, 255])
    def test_flat_stays_flat(self, filter, value):
        pixels = np.full((37, 91, 3), value, np.uint8)
        for bucket in (Size(32, 32), Size(128, 64), Size(1, 1)):
            assert (apply(pixels, place(Size(37, 91), bucket), filter) == value).all()

    def test_downscaling_averages_instead_of_skipping(self):
        # a one-pixel checkerboard of 0 and 254 has the mean 127 at a sixteenth of the size
        board = (np.indices((256, 256)).sum(0) % 2 * 254).astype(np.uint8)
        pixels = np.repeat(board[..., None], 3, 2)
        for filter in FILTERS:
            small = apply(pixels, place(Size(256, 256), Size(16, 16)), filter).astype(int)
            assert abs(small[2:-2, 2:-2] - 127).max() <= 1

    def test_non_contiguous_pixels(self):
        pixels = files.texture(40, 60)
        turned = pixels[::-1, ::-1].transpose(1, 0, 2)
        placement = place(Size(60, 40), Size(32, 32))
        np.testing.assert_array_equal(apply(turned, placement), apply(np.ascontiguousarray(turned), placement))

    def test_arguments_are_checked(self):
        placement = place(Size(4, 4), Size(2, 2))
        with pytest.raises(InputError, match="filter 'nearest' is unknown"):
            apply(np.zeros((4, 4, 3), np.uint8), placement, "nearest")
        for pixels in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
            with pytest.raises(InputError, match="expected uint8"):
                apply(pixels, placement)
        with pytest.raises(InputError, match=r"crop .* does not lie within"):
            apply(np.zeros((4, 4, 3), np.uint8), Placement(Size(4, 4), 3, 0, Size(2, 2)))
