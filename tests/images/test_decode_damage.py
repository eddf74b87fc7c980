from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import image_files as files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import pixels_of, reason_of
from PIL import Image, ImageFile

from capacitor_rt.errors import ImageError, InputError
from capacitor_rt.images import jpeg
from capacitor_rt.images.decode import decode_image, probe
from capacitor_rt.images.reading import read_bytes
from capacitor_rt.images.reasons import REASONS

PICTURE = files.texture(37, 53)


@pytest.fixture
def no_hang():
    def stop(*_):
        raise TimeoutError("reading hangs")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def outcome(data: bytes) -> tuple:
    try:
        return decode_image(data).pixels.tobytes(), probe(data)
    except ImageError as error:
        assert error.reason in REASONS
        return (error.reason,)


FORMAT_OPTIONS = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "GIF": {},
    "TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
    "JPEG2000": {},
    "AVIF": {},
}


def sample_file(format: str, **options) -> bytes:
    if format not in Image.OPEN:
        pytest.skip(f"this Pillow has no {format}")
    return files.encoded(files.texture(60, 80), format, **FORMAT_OPTIONS[format] | options)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
class TestDamage:
    @pytest.mark.parametrize("format", [*FORMAT_OPTIONS, "progressive JPEG"])
    def test_cut_anywhere_is_an_error_or_the_same_picture(self, format):
        data = sample_file("JPEG", progressive=True, quality=95) if format.startswith("prog") else sample_file(format)
        whole = pixels_of(data)
        rng = np.random.default_rng(0)
        cuts = {*range(1, 40), *rng.integers(40, len(data), 40).tolist(), *range(len(data) - 12, len(data))}
        for cut in sorted(cuts):
            try:
                pixels = decode_image(data[:cut]).pixels
            except ImageError as error:
                assert error.reason in ("truncated", "corrupt", "not_an_image"), (cut, error)
                if format in ("JPEG", "PNG", "GIF", "WEBP", "progressive JPEG") and cut >= 16:
                    assert error.reason == "truncated", (cut, error)
            else:
                np.testing.assert_array_equal(pixels, whole, err_msg=f"cut at {cut} of {len(data)}")

    @pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
    def test_half_a_file_is_truncated(self, format, fraction):
        data = sample_file(format)
        assert reason_of(data[: int(len(data) * fraction)]) == "truncated"

    @pytest.mark.parametrize("format", FORMAT_OPTIONS)
    @settings(max_examples=25, deadline=None)
    @given(draw=st.data())
    def test_changed_bytes_raise_nothing_else(self, format, draw):
        data = bytearray(sample_file(format))
        at = st.one_of(st.integers(0, min(700, len(data) - 1)), st.integers(0, len(data) - 1))
        for index, value in draw.draw(st.lists(st.tuples(at, st.integers(0, 255)), min_size=1, max_size=6)):
            data[index] = value
        with pytest.MonkeyPatch.context() as patch:
            first = outcome(bytes(data))
            patch.setattr(jpeg, "simplejpeg", None)
            assert outcome(bytes(data)) == first

    @settings(max_examples=25, deadline=None)
    @given(
        head=st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM", b"P6 "]),
        tail=st.binary(max_size=80),
    )
    def test_noise_raises_nothing_else(self, head, tail):
        assert len(outcome(head + tail)) in (1, 2)

    def test_empty(self):
        assert reason_of(b"") == "empty"

    @pytest.mark.parametrize(
        "data",
        [b"hello, this is no picture\n" * 9, b"\0" * 4096, b"<html></html>", b"x", b"Python", b"P5 is text", b"BMW"],
    )
    def test_not_an_image(self, data):
        assert reason_of(data) == "not_an_image"

    @pytest.mark.parametrize(
        "head", [b"\0\0\0\x18ftypheic\0\0\0\0", b"\xff\x0a\xfa", b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF-3.0", b"8BPS\0\1"]
    )
    def test_other_formats_are_named(self, head):
        with pytest.raises(ImageError, match="convert it to") as caught:
            decode_image(head + bytes(64))
        assert caught.value.reason == "unsupported"

    def test_a_build_of_pillow_without_the_codec_is_told(self, monkeypatch):
        monkeypatch.setitem(Image.OPEN, "WEBP", (None, lambda head: b"WEBP" in head and "WEBP support not installed"))
        with pytest.raises(ImageError, match="is WEBP: WEBP support not installed") as caught:
            decode_image(b"RIFF\0\0\0\0WEBPVP8 " + bytes(99))
        assert caught.value.reason == "unsupported"

    def test_twelve_bit_jpeg_is_unsupported(self):
        data = bytearray(files.encoded(PICTURE, "JPEG"))
        data[data.index(b"\xff\xc0") + 4] = 12
        assert reason_of(bytes(data)) == "unsupported"

    def test_truncated_stays_an_error_when_pillow_was_told_to_fill_in(self, monkeypatch):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with pytest.raises(InputError, match="LOAD_TRUNCATED_IMAGES"):
            decode_image(files.encoded(PICTURE, "JPEG")[:-200])

    def test_messages_name_the_image(self):
        with pytest.raises(ImageError, match=r"^cats/1\.jpg "):
            decode_image(b"no", name="cats/1.jpg")


class TestBomb:
    @pytest.mark.parametrize("side", [60_000, 2**31 - 1])
    def test_fails_before_allocating(self, side):
        bomb = files.png(side, side, 8, 2, bytes(1000))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert reason_of(bomb) == "too_large"
        with pytest.raises(ImageError) as caught:
            probe(bomb)
        assert caught.value.reason == "too_large"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024

    def test_between_pillows_warning_and_the_limit_is_no_bomb(self, recwarn):
        header = probe(files.png(12_000, 10_000, 8, 2, bytes(1000)))
        assert (header.width, header.height) == (12_000, 10_000)
        assert not recwarn.list

    def test_limit_is_inclusive_and_adjustable(self):
        data = files.encoded(PICTURE, "PNG")
        area = PICTURE.shape[0] * PICTURE.shape[1]
        np.testing.assert_array_equal(pixels_of(data, max_pixels=area), PICTURE)
        with pytest.raises(ImageError, match=f"53x37.*{area - 1}"):
            decode_image(data, max_pixels=area - 1)


class TestFiles:
    @pytest.mark.parametrize("name", ["plain.png", "with space.png", "new\nline.png", os.fsdecode(b"not\xffutf8.png")])
    def test_names(self, tmp_path, name):
        path = tmp_path / name
        data = files.encoded(PICTURE, "PNG")
        path.write_bytes(data)
        assert read_bytes(path) == data
        assert probe(path) == probe(str(path)) == probe(data)
        path.write_bytes(b"text")
        with pytest.raises(ImageError) as caught:
            probe(path)
        assert caught.value.reason == "not_an_image"
        str(caught.value).encode("utf-8")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("kind", ["directory", "fifo", "device", "missing", "loop", "nul"])
    def test_unreadable(self, tmp_path, kind, no_hang):
        path = tmp_path / "it.jpg"
        if kind == "directory":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            path = Path("/dev/zero")
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "nul":
            path = f"{path}\0"
        for read in (probe, read_bytes):
            with pytest.raises(ImageError) as caught:
                read(path)
            assert caught.value.reason == "unreadable"

    def test_permission(self, tmp_path):
        path = tmp_path / "it.png"
        path.write_bytes(files.encoded(PICTURE, "PNG"))
        path.chmod(0)
        user = os.geteuid()
        if user == 0:
            # root may read everything
            os.seteuid(65534)
        try:
            for read in (probe, read_bytes):
                with pytest.raises(ImageError, match=r"it\.png.? cannot be read: Permission denied") as caught:
                    read(path)
                assert caught.value.reason == "unreadable"
        finally:
            os.seteuid(user)

    def test_input_output_error(self, no_hang):
        # reads of this file fail: nothing is mapped at address 0
        path = Path("/proc/self/mem")
        if not path.exists():
            pytest.skip("no procfs")
        with pytest.raises(ImageError) as caught:
            read_bytes(path)
        assert caught.value.reason == "unreadable"

    def test_empty_file(self, tmp_path):
        path = tmp_path / "zero.jpg"
        path.touch()
        for read in (probe, read_bytes):
            with pytest.raises(ImageError) as caught:
                read(path)
            assert caught.value.reason == "empty"

    def test_probe_reads_only_the_header(self, tmp_path):
        data = files.encoded(files.texture(400, 500), "PNG")
        path = tmp_path / "cut.png"
        path.write_bytes(data[: len(data) // 2])
        assert (probe(path).width, probe(path).height) == (500, 400)
        assert reason_of(read_bytes(path)) == "truncated"


@pytest.mark.parametrize("kind", ["VP8 ", "VP8L", "VP8X"])
def test_a_webp_canvas_is_measured_before_memory_is_taken(kind, monkeypatch):
    options = {"VP8 ": {}, "VP8L": {"lossless": True}, "VP8X": {"icc_profile": bytes(200)}}[kind]
    data = files.encoded(PICTURE, "WEBP", **options)
    assert data[12:16] == kind.encode()
    height, width = PICTURE.shape[:2]
    assert probe(data, max_pixels=height * width).width == width
    monkeypatch.delitem(Image.OPEN, "WEBP")
    monkeypatch.setitem(Image.OPEN, "WEBP", (None, lambda head: head[8:12] == b"WEBP"))
    with pytest.raises(ImageError, match=f"{width}x{height}"):
        probe(data, max_pixels=height * width - 1)
