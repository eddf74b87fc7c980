"""What decode workers take: large images in turn, and no more of one than is kept of it."""

from __future__ import annotations

from pathlib import Path

import image_files as files
import numpy as np
from decode_sources import Images, contents
from descendants import workers_of
from waiting import until

from capacitor_rt.cache.decoding import DecodePool
from capacitor_rt.images.geometry import Size
from capacitor_rt.images.load import PixelPolicy


def test_large_images_are_decoded_one_at_a_time():
    side, few = 3000, 64
    small, large = (files.encoded(np.full((n, n, 3), 90, np.uint8), "JPEG") for n in (40, side))
    source = Images((*[small] * few, *[large] * 8))
    one = 3 * side * side
    with DecodePool(source, PixelPolicy(), [Size(32, 32)], workers=4, pixel_budget=one) as decoder:
        until(lambda: len(workers_of(decoder)) == 4)
        # what a worker takes for itself, once it has worked
        for chunk in decoder.decode([range(i, i + 1) for i in range(few)]):
            chunk.release()
        rest = _memory(workers_of(decoder))
        peak = 0
        for chunk in decoder.decode([range(few + i, few + i + 1) for i in range(8)]):
            peak = max(peak, _memory(workers_of(decoder)))
            assert chunk.columns["status"][0].as_py() == "ok"
            chunk.release()
        assert decoder.meter.queued > 0
    # four at a time take four; one takes up to two for a moment
    assert peak - rest < 2.5 * one


def test_a_narrow_strip_is_not_enlarged_in_whole():
    data = (files.encoded(files.texture(1300, 2), "PNG"),)
    with DecodePool(Images(data), PixelPolicy(), [Size(512, 512)], workers=1) as decoder:
        (row, pixels) = contents(decoder.decode([range(1)]))[0]
        assert row["resize_height"] == 332_800 and pixels[0] == (512, 512, 3)
        assert _peak(workers_of(decoder)[0]) < 500 << 20


def _memory(pids: list[int]) -> int:
    """Private memory of processes in bytes."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Private_"))
    return total


def _peak(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmHWM"))
