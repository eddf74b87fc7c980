"""Which JPEGs a GPU decodes, and what it is given of them."""

from __future__ import annotations

import io

import image_files as files
import numpy as np
import pytest
from PIL import Image

from capacitor_rt.errors import ImageError
from capacitor_rt.images import encoded, gpu_jpeg, jpeg
from capacitor_rt.images.decode import decode_image
from capacitor_rt.images.geometry import Size
from capacitor_rt.images.gpu_jpeg import stream_of
from capacitor_rt.images.load import PixelPolicy, View

PICTURE = files.texture(70, 90)
BUCKETS = (Size(32, 48), Size(40, 40), Size(48, 32))


def data(**options) -> bytes:
    return files.encoded(PICTURE, "JPEG", **{"quality": 85} | options)


def segments(jpeg_data: bytes) -> list[bytes]:
    """Markers with their bodies, up to the scan's header."""
    found, at = [], 2
    while True:
        end = at + 2 + int.from_bytes(jpeg_data[at + 2 : at + 4], "big")
        found.append(jpeg_data[at:end])
        at = end
        if found[-1][1] == 0xDA:
            return [*found, jpeg_data[at:]]


def changed(marker: int, at: int, value: int, **options) -> bytes:
    """A JPEG of which one byte of the first such segment is another."""
    parts = segments(data(**options))
    i = next(i for i, part in enumerate(parts) if part[1] == marker)
    parts[i] = parts[i][:at] + bytes([value]) + parts[i][at + 1 :]
    return b"\xff\xd8" + b"".join(parts)


TAKEN = {
    "plain": data(),
    "4:4:4": data(subsampling=0),
    "4:2:2": data(subsampling=1),
    "restarts": data(restart_marker_blocks=2),
    "restart rows": data(restart_marker_rows=1),
    "own tables": data(optimize=True),
    "rotated": data(exif=files.exif(6)),
    "comment": data(comment=b"\xff\xd9 no end"),
    "profile": data(icc_profile=files.icc_profile()),
    "behind the end": data() + b"trailer" * 9 + b"\xff\xd9",
    "Adobe": b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01" + data()[2:],
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_gpu_is_given_has_the_same_pixels_and_no_metadata(name):
    stream = stream_of(TAKEN[name])
    assert stream is not None and {part[1] for part in segments(stream)[:-1]} <= {0xC0, 0xC4, 0xDB, 0xDD, 0xDA}
    assert stream.count(b"\xff\xd9") == 1 and stream.endswith(b"\xff\xd9")
    # twice is once
    assert stream_of(stream) == stream
    upright = decode_image(TAKEN[name], icc="ignore").pixels
    turned = np.rot90(upright) if name == "rotated" else upright
    np.testing.assert_array_equal(encoded.exact_pixels(np.frombuffer(stream, np.uint8), name="x"), turned)


SCAN = len(b"".join(segments(data())[:-1])) + 2
LEFT = {
    "empty": b"",
    "no JPEG": files.encoded(PICTURE, "PNG"),
    "header alone": data()[:SCAN],
    "progressive": data(progressive=True),
    "grey": files.encoded(Image.fromarray(PICTURE).convert("L"), "JPEG"),
    "CMYK": files.encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"),
    "RGB": data(keep_rgb=True),
    "tiny": files.encoded(PICTURE[:12], "JPEG"),
    "long": files.encoded(np.zeros((16, 8200, 3), np.uint8), "JPEG"),
    "no end": data()[:-2],
    "half": data()[: SCAN + (len(data()) - SCAN) // 2],
    "half with an end": data()[: SCAN + 40] + b"\xff\xd9",
    "a hole": data(quality=98)[: SCAN + 900] + bytes(512) + data(quality=98)[SCAN + 1412 :],
    "a restart too many": data()[:-2] + b"\xff\xd0\xff\xd9",
    "restarts in disorder": data(restart_marker_blocks=2).replace(b"\xff\xd1", b"\xff\xd2", 1),
    "a restart too few": data(restart_marker_blocks=2).replace(b"\xff\xd3", b"\xff\x00", 1),
    "filled with FF": data()[:-2] + b"\xff\xff\xd9",
    "a second scan": data()[:-2] + segments(data())[-2] + data()[SCAN:],
    "a second picture inside": data()[:SCAN] + data(),
    "12 bits": changed(0xC0, 4, 12),
    "extended": data().replace(b"\xff\xc0\x00\x11", b"\xff\xc1\x00\x11", 1),
    "arithmetic": data().replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11", 1),
    "no height": data().replace(b"\x00\x46\x00\x5a", b"\x00\x00\x00\x5a", 1),
    "more rows than the scan": data().replace(b"\x00\x46\x00\x5a", b"\x1f\x46\x00\x5a", 1),
    "4:1:1": changed(0xC0, 11, 0x41),
    "chroma of its own": changed(0xC0, 14, 0x21),
    "other components": changed(0xC0, 10, 0),
    "a table that is not there": changed(0xC0, 12, 3),
    "a code that is not there": changed(0xDA, 6, 0x22),
    "table of 16 bits": changed(0xDB, 4, 0x10),
    "a divisor of 0": changed(0xDB, 9, 0),
    "more codes than fit": changed(0xC4, 5, 255),
    "half a spectrum": changed(0xDA, 12, 40),
    "inks of Adobe": b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00" + data()[2:],
    "half an Adobe": b"\xff\xd8\xff\xee\x00\x07Adobe" + data()[2:],
    "lines counted later": data()[:-2] + b"\xff\xdc\x00\x04\x00\x46\xff\xd9",
    "no marker": data()[:2] + b"\x00" + data()[2:],
    "segment past the end": data()[:4] + b"\xff\xff" + data()[6:],
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_the_cpu(name):
    assert LEFT[name] not in TAKEN.values()
    assert stream_of(LEFT[name]) is None


def test_no_beginning_of_a_file_is_taken_for_the_whole():
    whole = data(restart_marker_blocks=2)
    assert all(stream_of(whole[:n]) is None for n in range(len(whole)))
    assert stream_of(whole) is not None


def test_whatever_byte_is_damaged_nothing_is_raised_and_the_stream_is_whole():
    whole, noise = data(), np.random.default_rng(0)
    taken = 0
    for _ in range(2000):
        damaged = bytearray(whole)
        for at in noise.integers(0, len(whole), 1 + noise.integers(3)):
            damaged[at] = noise.integers(256)
        stream = stream_of(bytes(damaged))
        if stream is not None:
            taken += 1
            assert stream.endswith(b"\xff\xd9") and stream_of(stream) == stream
            assert jpeg.read_header(stream) is not None
    assert 0 < taken < 2000


def loaded(of: bytes, policy: PixelPolicy, out: np.ndarray | None = None):
    out = np.full(encoded.RECORD_BYTES, 7, np.uint8) if out is None else out
    found = encoded.load_encoded(of, [View(policy, BUCKETS)], out)
    if found is None:
        return None
    if isinstance(found[0], ImageError):
        raise found[0]
    return found[0]


def test_records_and_what_they_say():
    policy = PixelPolicy(decode="gpu")
    found = loaded(data(exif=files.exif(6)), policy)
    assert found is not None and found.header.orientation == 6 and BUCKETS[found.bucket] == Size(48, 32)
    record = encoded.read_encoded(found.pixels)
    assert record is not None and record.shape == (70, 90) and record.stream.tobytes() == stream_of(data())
    rows, columns = record.window
    assert 0 <= rows.start < rows.stop <= 70 and 0 <= columns.start < columns.stop <= 90


def test_profiles_sizes_and_other_policies_are_left_to_the_cpu(monkeypatch):
    policy = PixelPolicy(decode="gpu")
    assert loaded(data(), PixelPolicy()) is None and loaded(data(), PixelPolicy("fast")) is None
    assert loaded(data(icc_profile=files.icc_profile()), policy) is None
    assert loaded(data(icc_profile=files.icc_profile()), PixelPolicy("gpu", icc="ignore")) is not None
    assert loaded(data(exif=b"Exif\0\0nothing that is known"), policy) is None
    assert loaded(files.encoded(PICTURE, "PNG"), policy) is None
    monkeypatch.setattr(encoded, "STREAM_BYTES", 1000)
    assert loaded(data(), policy) is None
    monkeypatch.setattr(gpu_jpeg, "MOST_PIXELS", 70 * 90 - 1)
    assert stream_of(data()) is None


def test_errors_are_those_of_the_other_way():
    for policy in (PixelPolicy("gpu", max_pixels=1000), PixelPolicy("gpu", upscale="refuse")):
        of = files.encoded(PICTURE[:20, :24], "JPEG") if policy.upscale == "refuse" else data()
        with pytest.raises(ImageError) as one:
            loaded(of, policy)
        with pytest.raises(ImageError) as other:
            from capacitor_rt.images.load import load_image

            load_image(of, policy, BUCKETS)
        assert one.value.reason == other.value.reason and str(one.value) == str(other.value)


def test_pillow_takes_the_stream_too():
    stream = stream_of(TAKEN["restarts"])
    assert stream is not None
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stream))), decode_image(TAKEN["restarts"]).pixels)


def test_several_views_share_the_stream_and_fail_by_themselves():
    policies = [PixelPolicy("gpu"), PixelPolicy("gpu", max_pixels=1000), PixelPolicy("gpu")]
    views = [View(p, (Size(side, side),)) for p, side in zip(policies, (32, 48, 64), strict=True)]
    out = np.full(3 * encoded.RECORD_BYTES, 7, np.uint8)
    found = encoded.load_encoded(data(), views, out)
    assert found is not None and isinstance(found[1], ImageError) and found[1].reason == "too_large"
    records = [encoded.read_encoded(out[f.offset :]) for f in (found[0], found[2])]
    assert records[0].stream.tobytes() == records[1].stream.tobytes() == stream_of(data())
    assert found[0].offset + records[0].begin == found[2].offset + records[1].begin
    for record, side in zip(records, (32, 64), strict=True):
        alone = np.empty(encoded.RECORD_BYTES, np.uint8)
        (single,) = encoded.load_encoded(data(), [View(PixelPolicy("gpu"), (Size(side, side),))], alone)
        expected = encoded.read_encoded(single.pixels)
        assert record[:2] == expected[:2] and record.row[80:].tobytes() == expected.row[80:].tobytes()


@pytest.mark.parametrize(
    ("shape", "side"), [((8192, 4096), 8192), ((4096, 8192), 100), ((5792, 5792), 8192), ((16, 16), 8192)]
)
def test_the_largest_record_finds_room(shape, side):
    from capacitor_rt.images import deferred
    from capacitor_rt.images.geometry import stored_window

    placement = PixelPolicy("gpu").place(Size(*shape), Size(side, side))
    assert 2 * side <= encoded.MOST_SIDES
    nbytes = deferred.table_bytes(shape, stored_window(placement, 1), "lanczos")
    assert 48 + nbytes + encoded.STREAM_BYTES <= encoded.RECORD_BYTES
