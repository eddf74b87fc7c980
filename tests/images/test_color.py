"""Colour profiles: as lcms has it, or left alone."""

from __future__ import annotations

import io

import image_files as files
import numpy as np
import pytest
from image_files import pixels_of
from PIL import Image, ImageCms

from capacitor_rt.images.color import to_srgb
from capacitor_rt.images.decode import decode_image, probe
from capacitor_rt.images.geometry import Size
from capacitor_rt.images.load import PixelPolicy, load_image

P3 = files.icc_profile()
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def by_lcms(pixels: np.ndarray, profile: bytes) -> np.ndarray:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    image = ImageCms.profileToProfile(Image.fromarray(pixels), source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return np.asarray(image)


@pytest.mark.parametrize("profile", [P3, files.icc_profile(gamma=1.8), files.icc_profile(files.SRGB, gamma=2.2)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pixels_are_within_one_of_lcms(format, profile):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    data = files.encoded(PICTURE, format, icc_profile=profile, **options)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    expected = by_lcms(stored, profile)
    assert abs(expected.astype(int) - stored).max() > 5
    assert abs(pixels_of(data).astype(int) - expected).max() <= 1
    loaded = load_image(data, PixelPolicy(), [Size(48, 64)])
    np.testing.assert_array_equal(loaded.pixels, pixels_of(data))
    ignored = load_image(data, PixelPolicy(icc="ignore"), [Size(48, 64)])
    np.testing.assert_array_equal(ignored.pixels, stored)
    np.testing.assert_array_equal(decode_image(data, icc="ignore").pixels, stored)


def test_a_resized_photograph_is_near_what_lcms_makes_of_it_before():
    photo = files.texture(300, 400)
    data = files.encoded(photo, "PNG", icc_profile=P3)
    loaded = load_image(data, PixelPolicy(), [Size(96, 128)])
    plain = files.encoded(by_lcms(photo, P3), "PNG")
    error = abs(loaded.pixels.astype(int) - load_image(plain, PixelPolicy(), [Size(96, 128)]).pixels)
    assert error.mean() < 1 and np.quantile(error, 0.99) <= 8


def test_srgb_is_left_alone():
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), files.icc_profile(files.SRGB)):
        assert to_srgb(profile, "RGB") is None
        np.testing.assert_array_equal(pixels_of(files.encoded(PICTURE, "PNG", icc_profile=profile)), PICTURE)


@pytest.mark.parametrize("profile", [b"", b"no profile", P3[:200], P3[:-40], files.icc_profile(space=b"GRAY")])
def test_what_is_no_profile_of_the_samples_is_passed_over(profile):
    np.testing.assert_array_equal(pixels_of(files.encoded(PICTURE, "PNG", icc_profile=profile)), PICTURE)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey(mode):
    profile = files.icc_profile(gamma=1.0, space=b"GRAY")
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert(mode)
    got = pixels_of(files.encoded(ramp, "PNG", icc_profile=profile))[0]
    expected = by_lcms(np.arange(256, dtype=np.uint8)[None], profile)[0]
    assert expected[128, 0] > 180
    np.testing.assert_array_equal(got, expected)
    # a grey picture with a profile of colours keeps its samples
    np.testing.assert_array_equal(pixels_of(files.encoded(ramp, "PNG", icc_profile=P3))[0, :, 0], np.arange(256))


def test_orientation_and_profile_together():
    data = files.encoded(files.stored(PICTURE, 6), "PNG", icc_profile=P3, exif=files.exif(6))
    np.testing.assert_array_equal(pixels_of(data), by_lcms(PICTURE, P3))


@pytest.mark.parametrize("at", ["before", "behind", "split"])
def test_a_profile_counts_where_pillow_finds_it(at):
    """Behind the frame it finds none, and of one that lies on both sides of it none either."""
    data = files.encoded(PICTURE, "JPEG", icc_profile=P3)
    begin = data.index(b"\xff\xe2")
    end = begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")
    profile, rest = data[begin:end], data[:begin] + data[end:]
    frame = rest.index(b"\xff\xc0")
    behind = frame + 2 + int.from_bytes(rest[frame + 2 : frame + 4], "big")
    if at == "split":
        body, half = profile[18:], len(profile) // 2
        parts = [
            b"\xff\xe2" + (16 + len(part)).to_bytes(2, "big") + b"ICC_PROFILE\0" + bytes((number, 2)) + part
            for number, part in ((1, body[:half]), (2, body[half:]))
        ]
        moved = rest[:frame] + parts[0] + rest[frame:behind] + parts[1] + rest[behind:]
    else:
        moved = rest[:frame] + profile + rest[frame:] if at == "before" else rest[:behind] + profile + rest[behind:]
    decoded = decode_image(moved)
    assert probe(moved) == decoded.header and decoded.header.icc == (at == "before")
    expected = decode_image(data if at == "before" else rest)
    np.testing.assert_array_equal(decoded.pixels, expected.pixels)
