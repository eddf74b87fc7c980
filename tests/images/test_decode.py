from __future__ import annotations

import io
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import image_files as files
import numpy as np
import pytest
from image_files import pixels_of, reason_of
from PIL import Image, ImageCms

from capacitor_rt.errors import InputError
from capacitor_rt.images import jpeg
from capacitor_rt.images.decode import decode_image, decoder_versions, probe

PICTURE = files.texture(37, 53)
PHOTOS = sorted((Path(jpeg.__file__).parents[1] / "sample" / "photos").glob("*.jp*g"))


class TestExact:
    @pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000", "QOI"])
    @pytest.mark.parametrize("size", [(37, 53), (1, 1), (1, 40), (40, 1)])
    def test_lossless_formats(self, format, size):
        picture = files.texture(*size)
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        if format == "JPEG2000":
            options = {"irreversible": False}
        if format == "QOI" and "QOI" not in Image.SAVE:
            pytest.skip("this Pillow does not write QOI")
        np.testing.assert_array_equal(pixels_of(files.encoded(picture, format, **options)), picture)

    @pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "AVIF"])
    def test_one_pixel(self, format):
        if format not in Image.OPEN:
            pytest.skip(f"this Pillow has no {format}")
        picture = np.full((1, 1, 3), 200, np.uint8)
        assert abs(pixels_of(files.encoded(picture, format)).astype(int) - 200).max() <= 3

    def test_grey_and_bilevel(self):
        grey = PICTURE[..., 0]
        expected = np.repeat(grey[..., None], 3, 2)
        np.testing.assert_array_equal(pixels_of(files.encoded(grey, "PNG")), expected)
        bilevel = Image.fromarray(grey).convert("1")
        expected = np.repeat(np.array(bilevel.convert("L"))[..., None], 3, 2)
        np.testing.assert_array_equal(pixels_of(files.encoded(bilevel, "PNG")), expected)
        np.testing.assert_array_equal(pixels_of(files.encoded(bilevel, "TIFF", compression="group4")), expected)

    def test_grey_jpeg_has_equal_channels(self):
        pixels = pixels_of(files.encoded(PICTURE[..., 0], "JPEG", quality=95))
        assert (pixels == pixels[..., :1]).all()
        assert abs(pixels[..., 0].astype(int) - PICTURE[..., 0]).mean() < 3

    def test_first_frame_of_animations(self):
        frames = [Image.new("RGB", (20, 10), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
        for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
            data = files.encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
            assert Image.open(io.BytesIO(data)).n_frames == 3
            assert (pixels_of(data) == (255, 0, 0)).all(), format

    def test_icc_profile_is_noted_and_not_applied(self):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        data = files.encoded(PICTURE, "PNG", icc_profile=profile)
        assert probe(data).icc and not probe(files.encoded(PICTURE, "PNG")).icc
        np.testing.assert_array_equal(pixels_of(data), PICTURE)


class TestJpeg:
    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
    def test_fast_path_gives_pillows_pixels(self, subsampling, progressive, monkeypatch):
        simplejpeg = pytest.importorskip("simplejpeg")
        for height, width in ((64, 96), (63, 95), (17, 1), (1, 1), (9, 130)):
            for quality in (40, 90, 100):
                data = simplejpeg.encode_jpeg(files.texture(height, width), quality, colorsubsampling=subsampling)
                if progressive:
                    buffer = io.BytesIO()
                    Image.open(io.BytesIO(data)).save(buffer, "JPEG", quality="keep", progressive=True)
                    data = buffer.getvalue()
                fast = pixels_of(data)
                with monkeypatch.context() as patch:
                    patch.setattr(jpeg, "simplejpeg", None)
                    np.testing.assert_array_equal(fast, pixels_of(data))

    def test_fast_path_is_taken(self, monkeypatch):
        simplejpeg = pytest.importorskip("simplejpeg")
        calls = []
        monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: calls.append(a) or PICTURE.copy())
        np.testing.assert_array_equal(decode_image(files.encoded(PICTURE, "JPEG")).pixels, PICTURE)
        assert len(calls) == 1

    @pytest.mark.skipif(not PHOTOS, reason="no bundled JPEG photographs")
    def test_fast_path_on_the_bundled_photographs(self, monkeypatch):
        pytest.importorskip("simplejpeg")
        fast = [pixels_of(path.read_bytes()) for path in PHOTOS]
        monkeypatch.setattr(jpeg, "simplejpeg", None)
        for path, pixels in zip(PHOTOS, fast, strict=True):
            np.testing.assert_array_equal(pixels, pixels_of(path.read_bytes()), err_msg=path.name)

    def test_rgb_colour_space(self):
        data = files.encoded(PICTURE, "JPEG", quality=98, subsampling=0, keep_rgb=True)
        assert abs(pixels_of(data).astype(int) - PICTURE).mean() < 2

    @pytest.mark.parametrize("adobe", [True, False])
    @pytest.mark.parametrize("ink", [(0, 0, 0, 0), (255, 0, 0, 0), (30, 200, 90, 40), (0, 0, 0, 255)])
    def test_cmyk(self, ink, adobe):
        if adobe:
            data = files.encoded(Image.new("CMYK", (24, 16), ink), "JPEG", quality=100)
        else:
            # Pillow stores inverted samples under Adobe's marker: the plain file holds the ink itself, and no marker
            inverted = tuple(255 - v for v in ink)
            data = files.encoded(Image.new("CMYK", (24, 16), inverted), "JPEG", quality=100)
            at = data.index(b"\xff\xee\x00\x0eAdobe")
            data = data[:at] + data[at + 16 :]
        c, m, y, k = (1 - v / 255 for v in ink)
        expected = np.array([c * k, m * k, y * k]) * 255
        assert abs(pixels_of(data) - expected).max() <= 2

    @pytest.mark.parametrize("ink", [(0, 0, 0, 0), (30, 200, 90, 40), (240, 10, 60, 0)])
    def test_ycck(self, ink):
        # stored: the inks' YCbCr, and inverted black, under Adobe's transform 2
        luma = Image.new("RGB", (1, 1), ink[:3]).convert("YCbCr").getpixel((0, 0))
        samples = (*luma, 255 - ink[3])
        data = files.encoded(Image.new("CMYK", (24, 16), tuple(255 - v for v in samples)), "JPEG", quality=100)
        at = data.index(b"Adobe") + 11
        assert data[at] == 0
        data = data[:at] + b"\2" + data[at + 1 :]
        c, m, y, k = (1 - v / 255 for v in ink)
        assert abs(pixels_of(data) - np.array([c * k, m * k, y * k]) * 255).max() <= 3


class TestSixteenBits:
    SAMPLES = np.array([0, 1, 127, 128, 129, 255, 256, 257, 32767, 32768, 65279, 65407, 65408, 65534, 65535])

    @staticmethod
    def scaled(samples):
        return np.floor(samples.astype(np.float64) * 255 / 65535 + 0.5).astype(np.uint8)

    def samples(self, channels):
        rng = np.random.default_rng(channels)
        values = np.concatenate([self.SAMPLES, rng.integers(0, 65536, 20 * 9 * channels)])
        return values[: 20 * 9 * channels].astype(np.uint16).reshape(9, 20, channels)

    def test_every_value(self):
        ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
        np.testing.assert_array_equal(pixels_of(files.png16(ramp))[..., :1], self.scaled(ramp))

    @pytest.mark.parametrize("channels", [1, 3])
    def test_png(self, channels):
        samples = self.samples(channels)
        expected = np.broadcast_to(self.scaled(samples), (9, 20, 3))
        np.testing.assert_array_equal(pixels_of(files.png16(samples)), expected)

    @pytest.mark.parametrize("channels", [2, 4])
    def test_png_with_alpha(self, channels):
        samples = self.samples(channels)
        scaled = self.scaled(samples).astype(float)
        color, alpha = scaled[..., :-1], scaled[..., -1:] / 255
        expected = np.floor(color * alpha + np.array([10, 20, 30]) * (1 - alpha) + 0.5 + 1e-9)
        got = pixels_of(files.png16(samples), background=(10, 20, 30))
        np.testing.assert_array_equal(got, np.broadcast_to(expected, got.shape))

    @pytest.mark.parametrize("channels", [1, 3])
    def test_png_colour_key_counts_all_sixteen_bits(self, channels):
        samples = np.full((4, 4, channels), 0x1234, np.uint16)
        samples[1, 2] = 0x1235
        key = (b"tRNS", struct.pack(f">{channels}H", *[0x1234] * channels))
        got = pixels_of(files.png16(samples, key), background=(255, 0, 255))
        expected = np.full((4, 4, 3), (255, 0, 255), np.uint8)
        expected[1, 2] = 0x12
        np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("deflate", [False, True])
    @pytest.mark.parametrize("big_endian", [False, True])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_tiff(self, channels, big_endian, deflate):
        samples = self.samples(channels)
        data = files.tiff16(samples, big_endian=big_endian, deflate=deflate)
        expected = np.broadcast_to(self.scaled(samples), (9, 20, 3))
        np.testing.assert_array_equal(pixels_of(data), expected)

    @pytest.mark.parametrize("deflate", [False, True])
    def test_tiff_with_white_as_zero(self, deflate):
        samples = self.samples(1)
        expected = np.broadcast_to(self.scaled(65535 - samples), (9, 20, 3))
        np.testing.assert_array_equal(pixels_of(files.tiff16(samples, deflate=deflate, white_is_zero=True)), expected)

    def test_pgm(self):
        samples = self.samples(1)
        data = b"P5 20 9 65535\n" + samples.astype(">u2").tobytes()
        np.testing.assert_array_equal(pixels_of(data), np.broadcast_to(self.scaled(samples), (9, 20, 3)))

    @pytest.mark.parametrize("mode", ["F", "I"])
    def test_samples_without_a_range_are_refused(self, mode):
        data = files.encoded(Image.new(mode, (8, 8), 70000), "TIFF")
        assert reason_of(data) == "unsupported"


class TestTransparency:
    BACKGROUND = (10, 200, 30)

    def composite(self, rgba):
        alpha = rgba[..., 3:] / 255
        return np.floor(rgba[..., :3] * alpha + np.array(self.BACKGROUND) * (1 - alpha) + 0.5 + 1e-9).astype(np.uint8)

    @pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
    def test_rgba(self, format):
        alpha = np.random.default_rng(1).integers(0, 256, (*PICTURE.shape[:2], 1), np.uint8)
        rgba = np.concatenate([PICTURE, alpha], 2)
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        got = pixels_of(files.encoded(rgba, format, **options), background=self.BACKGROUND)
        np.testing.assert_array_equal(got, self.composite(rgba))

    def test_white_is_the_default(self):
        assert (pixels_of(files.encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG")) == 255).all()

    def test_grey_with_alpha(self):
        alpha = np.random.default_rng(2).integers(0, 256, PICTURE.shape[:2], np.uint8)
        grey = PICTURE[..., 0]
        image = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
        rgba = np.dstack([grey, grey, grey, alpha])
        got = pixels_of(files.encoded(image, "PNG"), background=self.BACKGROUND)
        np.testing.assert_array_equal(got, self.composite(rgba))

    def test_palette_with_alpha_per_entry(self):
        palette = Image.fromarray(PICTURE).quantize(16)
        colors = np.array(palette.getpalette()[:48], np.uint8).reshape(-1, 3)
        alphas = np.linspace(0, 255, len(colors)).astype(np.uint8)
        data = files.encoded(palette, "PNG", transparency=alphas.tobytes())
        rgba = np.concatenate([colors, alphas[:, None]], 1)[np.array(palette)]
        np.testing.assert_array_equal(pixels_of(data, background=self.BACKGROUND), self.composite(rgba))

    @pytest.mark.parametrize("format", ["PNG", "GIF"])
    def test_palette_with_one_transparent_entry(self, format):
        palette = Image.fromarray(PICTURE).quantize(16)
        colors = np.array(palette.getpalette()[:48], np.uint8).reshape(-1, 3)
        data = files.encoded(palette, format, transparency=3)
        expected = colors[np.array(palette)]
        expected[np.array(palette) == 3] = self.BACKGROUND
        np.testing.assert_array_equal(pixels_of(data, background=self.BACKGROUND), expected)

    def test_palette_without_transparency(self):
        palette = Image.fromarray(PICTURE).quantize(200)
        np.testing.assert_array_equal(pixels_of(files.encoded(palette, "PNG")), np.array(palette.convert("RGB")))

    @pytest.mark.parametrize(("mode", "key", "other"), [("L", 7, 8), ("1", 0, 255)])
    def test_grey_key(self, mode, key, other):
        image = Image.new(mode, (4, 4), key)
        image.putpixel((2, 1), other)
        expected = np.full((4, 4, 3), self.BACKGROUND, np.uint8)
        expected[1, 2] = other
        data = files.encoded(image, "PNG", transparency=key)
        np.testing.assert_array_equal(pixels_of(data, background=self.BACKGROUND), expected)

    def test_colour_key(self):
        image = Image.new("RGB", (4, 4), (1, 2, 3))
        image.putpixel((2, 1), (1, 2, 4))
        expected = np.full((4, 4, 3), self.BACKGROUND, np.uint8)
        expected[1, 2] = (1, 2, 4)
        data = files.encoded(image, "PNG", transparency=(1, 2, 3))
        np.testing.assert_array_equal(pixels_of(data, background=self.BACKGROUND), expected)

    @pytest.mark.parametrize("background", [(0, 0), (0, 0, 256), (0, 0, 0.5), "red"])
    def test_background_is_checked(self, background):
        with pytest.raises(InputError, match="background"):
            decode_image(files.encoded(PICTURE, "PNG"), background=background)


class TestOrientation:
    UPRIGHT = files.texture(11, 17, seed=3)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
    def test_lossless(self, format, orientation):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        data = files.encoded(files.stored(self.UPRIGHT, orientation), format, exif=files.exif(orientation), **options)
        header = probe(data)
        assert (header.width, header.height, header.orientation) == (17, 11, orientation)
        np.testing.assert_array_equal(pixels_of(data), self.UPRIGHT)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_jpeg_corners(self, orientation):
        upright = np.full((48, 64, 3), 128, np.uint8)
        corners = {(0, 0): (255, 0, 0), (0, 1): (0, 255, 0), (1, 0): (0, 0, 255), (1, 1): (255, 255, 255)}
        for (y, x), color in corners.items():
            upright[y * 32 : y * 32 + 16, x * 48 : x * 48 + 16] = color
        stored = files.stored(upright, orientation)
        data = files.encoded(stored, "JPEG", quality=98, subsampling=0, exif=files.exif(orientation))
        pixels = pixels_of(data)
        assert pixels.shape == (48, 64, 3)
        for (y, x), color in corners.items():
            assert abs(pixels[y * 32 + 8, x * 48 + 8].astype(int) - color).max() <= 4

    @pytest.mark.parametrize("orientation", [0, 9, 65535])
    def test_invalid_values_mean_upright(self, orientation):
        data = files.encoded(self.UPRIGHT, "PNG", exif=files.exif(orientation))
        assert probe(data).orientation == 1
        np.testing.assert_array_equal(pixels_of(data), self.UPRIGHT)

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
    @pytest.mark.parametrize(
        "block",
        [
            b"Exif\0\0",
            b"Exif\0\0garbage",
            b"Exif\0\0II*\0\xff\xff\xff\x7f",
            b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12",
            b"Exif\0\0" + bytes(range(256)),
        ],
    )
    def test_broken_exif_does_no_harm(self, format, block):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        data = files.encoded(self.UPRIGHT, format, exif=block, **options)
        np.testing.assert_array_equal(pixels_of(data), pixels_of(files.encoded(self.UPRIGHT, format, **options)))


def test_threads_agree_with_one():
    datas = [files.encoded(files.texture(90, 70, seed), f) for seed in range(4) for f in ("JPEG", "PNG", "WEBP")]
    alone = [decode_image(d).pixels for d in datas]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for a, b in zip(alone, pool.map(decode_image, datas), strict=True):
                np.testing.assert_array_equal(a, b.pixels)


def test_versions_are_recorded():
    versions = decoder_versions()
    assert versions["pillow"] == Image.__version__
    assert all(isinstance(v, str) for v in versions.values())
