"""Bytes to the pixels of a bucket: one definition, whichever way they are decoded."""

from __future__ import annotations

import io
from contextlib import contextmanager

import image_files as files
import numpy as np
import pytest
from PIL import Image

from capacitor_rt.errors import ImageError, InputError
from capacitor_rt.images import jpeg
from capacitor_rt.images.decode import OpenedImage, decode_image, probe
from capacitor_rt.images.geometry import Size, apply, assign, bucket_table, place
from capacitor_rt.images.load import PixelPolicy, View, load_image, load_views

BUCKETS = bucket_table(64, 16)
PHOTO = files.texture(240, 320)


def jpeg_of(picture: np.ndarray, **options) -> bytes:
    return files.encoded(picture, "JPEG", **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_is_the_decoded_image_placed_in_its_bucket(format, orientation):
    picture = files.texture(100, 170)
    data = files.encoded(files.stored(picture, orientation), format, exif=files.exif(orientation))
    loaded = load_image(data, PixelPolicy(), BUCKETS)
    decoded = decode_image(data)
    bucket = assign(Size(100, 170), BUCKETS)
    assert loaded.header == decoded.header == probe(data)
    assert BUCKETS[loaded.bucket] == bucket == loaded.placement.crop
    assert loaded.placement == place(Size(100, 170), bucket)
    np.testing.assert_array_equal(loaded.pixels, apply(decoded.pixels, loaded.placement))
    assert loaded.pixels.flags.c_contiguous


def test_pixels_lie_where_they_are_wanted():
    out = np.full(64 * 64 * 3 + 100, 7, np.uint8)
    loaded = load_image(jpeg_of(PHOTO), PixelPolicy(), BUCKETS, out, buffer=bytearray)
    assert np.shares_memory(loaded.pixels, out)
    np.testing.assert_array_equal(loaded.pixels, load_image(jpeg_of(PHOTO), PixelPolicy(), BUCKETS).pixels)
    assert (out[loaded.pixels.size :] == 7).all()


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("progressive", [False, True])
def test_fast_is_pillows_reduced_decoding_and_never_below_twice_the_size(progressive, components, monkeypatch):
    picture = files.texture(515, 771)[..., 0] if components == 1 else files.texture(515, 771)
    data = jpeg_of(picture, progressive=progressive)
    for side, shrink in ((32, 3), (64, 2), (96, 1), (128, 1), (160, 0)):
        fast = load_image(data, PixelPolicy(decode="fast"), [Size(side, side)])
        image = Image.open(io.BytesIO(data))
        if shrink:
            image.draft(image.mode, (771 >> shrink, 515 >> shrink))
        assert image.height == -(-515 >> shrink) and (shrink == 0 or image.height >= 2 * side)
        expected = apply(np.array(image.convert("RGB")), place(Size(515, 771), Size(side, side)))
        np.testing.assert_array_equal(fast.pixels, expected)
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "simplejpeg", None)
            np.testing.assert_array_equal(
                load_image(data, PixelPolicy(decode="fast"), [Size(side, side)]).pixels, expected
            )
    exact = load_image(data, PixelPolicy(), [Size(64, 64)]).pixels.astype(int)
    near = load_image(data, PixelPolicy(decode="fast"), [Size(64, 64)]).pixels
    # a synthetic picture of sharp waves; photographs differ by less
    assert 0 < abs(near - exact).mean() < 5


def test_fast_is_exact_where_the_decoder_cannot_shrink():
    data = files.encoded(PHOTO, "PNG")
    fast = load_image(data, PixelPolicy(decode="fast"), BUCKETS)
    np.testing.assert_array_equal(fast.pixels, load_image(data, PixelPolicy(), BUCKETS).pixels)


def test_damage_behind_the_header_is_found_by_either_decoder(monkeypatch):
    data = jpeg_of(PHOTO)[:-300]
    for _ in range(2):
        with pytest.raises(ImageError) as caught:
            load_image(data, PixelPolicy(), BUCKETS)
        assert caught.value.reason == "truncated"
        monkeypatch.setattr(jpeg, "simplejpeg", None)


def test_memory_is_asked_for_before_it_is_taken():
    asked, inside = [], []

    @contextmanager
    def admit(nbytes):
        asked.append(nbytes)
        inside.append(True)
        yield
        inside.pop()

    load_image(jpeg_of(PHOTO), PixelPolicy(), BUCKETS, admit=admit)
    load_image(files.encoded(PHOTO, "PNG"), PixelPolicy(), BUCKETS, admit=admit)
    rgba = np.dstack([PHOTO, PHOTO[..., :1]])
    load_image(files.encoded(rgba, "PNG"), PixelPolicy(), BUCKETS, admit=admit)
    assert PHOTO.size <= asked[0] < asked[1] < asked[2] < 12 * PHOTO.size and not inside
    # too large is refused without asking
    with pytest.raises(ImageError, match="limit is 100"):
        load_image(jpeg_of(PHOTO), PixelPolicy(max_pixels=100), BUCKETS, admit=admit)
    assert len(asked) == 3


def test_small_images_by_policy():
    data = files.encoded(PHOTO[:32], "PNG")
    assert load_image(data, PixelPolicy(), [Size(64, 64)]).placement.upscaled
    with pytest.raises(ImageError) as caught:
        load_image(data, PixelPolicy(upscale="refuse"), [Size(64, 64)])
    assert caught.value.reason == "too_small"


@pytest.mark.parametrize(
    "field", [{"decode": "turbo"}, {"icc": "p3"}, {"background": (0, 0)}, {"upscale": "never"}, {"max_pixels": 0}]
)
def test_the_policy_is_checked(field):
    with pytest.raises(InputError, match=next(iter(field))):
        PixelPolicy(**field)


def test_policies_differ_in_their_fields():
    policies = [PixelPolicy(), PixelPolicy(decode="fast"), PixelPolicy(icc="ignore"), PixelPolicy(background=(0, 0, 0))]
    assert len({str(p.fields()) for p in policies}) == len(policies)


def noted(shrinks: list[int]):
    """`stored_pixels` that notes by how much it is to shrink."""
    original = OpenedImage.stored_pixels

    def stored_pixels(self, *args, **options):
        shrinks.append(options["shrink"])
        return original(self, *args, **options)

    return stored_pixels


class TestViews:
    VIEWS = (
        View(PixelPolicy(), (Size(64, 64),)),
        View(PixelPolicy(), tuple(BUCKETS)),
        View(PixelPolicy(crop="adm"), (Size(48, 48),)),
        View(PixelPolicy(), (Size(128, 128),)),
    )

    @pytest.mark.parametrize("orientation", [1, 6])
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
    def test_each_is_what_it_is_alone(self, format, orientation):
        data = files.encoded(files.stored(PHOTO, orientation), format, exif=files.exif(orientation))
        outs = [np.zeros(view.slot + 5, np.uint8) for view in self.VIEWS]
        for found in (load_views(data, self.VIEWS, buffer=bytearray), load_views(data, self.VIEWS, outs)):
            for view, loaded in zip(self.VIEWS, found, strict=True):
                alone = load_image(data, view.policy, view.buckets)
                assert (loaded.header, loaded.bucket, loaded.placement) == (alone.header, alone.bucket, alone.placement)
                np.testing.assert_array_equal(loaded.pixels, alone.pixels)
        assert all(np.shares_memory(loaded.pixels, out) for loaded, out in zip(found, outs, strict=True))

    def test_a_file_is_decoded_once(self, monkeypatch):
        decoded = []
        monkeypatch.setattr(OpenedImage, "stored_pixels", noted(decoded))
        load_views(jpeg_of(PHOTO), self.VIEWS)
        assert decoded == [0]

    def test_fast_shrinks_for_each_view_as_it_does_alone(self, monkeypatch):
        data = jpeg_of(files.texture(515, 771))
        views = [View(PixelPolicy(decode="fast"), (Size(side, side),)) for side in (160, 32, 128, 96)]
        decoded = []
        alone = [load_image(data, view.policy, view.buckets).pixels for view in views]
        monkeypatch.setattr(OpenedImage, "stored_pixels", noted(decoded))
        for loaded, pixels in zip(load_views(data, views), alone, strict=True):
            np.testing.assert_array_equal(loaded.pixels, pixels)
        assert decoded == [0, 1, 3]

    def test_one_that_cannot_be_made_leaves_the_others(self):
        refusing = View(PixelPolicy(upscale="refuse"), (Size(512, 512),))
        found = load_views(jpeg_of(PHOTO), [refusing, self.VIEWS[0]])
        assert found[0].reason == "too_small"
        np.testing.assert_array_equal(found[1].pixels, load_image(jpeg_of(PHOTO), PixelPolicy(), [Size(64, 64)]).pixels)
        few = View(PixelPolicy(max_pixels=100), (Size(64, 64),))
        found = load_views(jpeg_of(PHOTO), [few, self.VIEWS[0]])
        assert found[0].reason == "too_large" and found[1].bucket == 0

    def test_what_is_no_image_is_none_in_every_view(self):
        with pytest.raises(ImageError):
            load_views(b"no image", self.VIEWS)
        cut = jpeg_of(PHOTO)[:2000]
        found = load_views(cut, self.VIEWS)
        assert all(isinstance(e, ImageError) and e.reason == found[0].reason for e in found)

    @pytest.mark.parametrize("cut", [False, True])
    def test_nothing_decoded_is_left_when_others_are_admitted(self, cut, monkeypatch):
        import gc
        import weakref

        kept, left = [], []
        original = OpenedImage.stored_pixels

        class Pixels(np.ndarray):
            """An array that can be watched."""

        def stored_pixels(self, *args, **options):
            pixels = original(self, *args, **options).view(Pixels)
            kept.append(weakref.ref(pixels))
            return pixels[:-1] if cut else pixels

        @contextmanager
        def admit(nbytes):
            yield
            left.append(sum(ref() is not None for ref in kept))

        monkeypatch.setattr(OpenedImage, "stored_pixels", stored_pixels)
        gc.disable()
        try:
            found = load_views(jpeg_of(PHOTO), self.VIEWS, admit=admit)
        finally:
            gc.enable()
        assert left == [0] and len(kept) == 1
        assert all(isinstance(loaded, ImageError) == cut for loaded in found)
