"""Pictures that a GPU is given or resizes: a stream of its own, order with the encoder's, places that are let go."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capacitor_rt.cache.resizing import Resizer, Uploader, by_device
from capacitor_rt.images.deferred import record_bytes, write_records
from capacitor_rt.images.resample import Window

WINDOW = Window(24, 40, 0, 4, 24, 36)


class Chunk:
    """Records as a pool hands them out; `released` counts."""

    released = held = 0

    def __init__(self, count: int):
        pixels = np.zeros((48, 80, 3), np.uint8)
        nbytes = record_bytes(pixels.shape, [WINDOW], "lanczos")
        self._pixels = np.zeros(count * nbytes, np.uint8)
        self._offsets = np.arange(count, dtype=np.int64) * nbytes
        for begin in self._offsets:
            write_records(pixels, [WINDOW], 1, "lanczos", self._pixels[begin:])

    def records(self) -> tuple[np.ndarray, np.ndarray]:
        return self._offsets[self._offsets >= 0], self._pixels

    def hold(self) -> None:
        self.held += 1

    def release(self) -> None:
        self.released += 1


def test_batches_are_resized_beside_the_encoder_and_never_read_too_early(gpu):
    assert by_device("gpu", 90)
    resizer = Resizer(torch.device("cuda"))
    for _ in range(3):
        batch = resizer.buffer(4, 24, 32)
        chunk = Chunk(4)
        resizer.take(chunk)
        resizer.put(chunk._offsets[:2], batch, 0)
        resizer.put(chunk._offsets[2:], batch, 2)
        resizer.join(batch)
        # the encoder, on the stream that is current
        batch.float().sum()
    resizer.finish()
    assert gpu.settle() == []


def test_the_encoders_stream_comes_after_the_resizers_once_it_has_joined(gpu):
    resizer = Resizer(torch.device("cuda"))
    batch = resizer.buffer(2, 24, 32)
    chunk = Chunk(2)
    resizer.take(chunk)
    resizer.put(chunk._offsets, batch, 0)
    (side,) = set(gpu.spent) - {0}
    last = gpu.clocks[side][side]
    # two copies up and two launches at least, none of them on the stream that is current
    assert last >= 4 and not gpu.is_behind(0, side, last)
    resizer.join(batch)
    assert gpu.is_behind(0, side, last)
    resizer.finish()


def test_few_chunks_are_held_and_none_in_the_end(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda.Event, "query", lambda self: False)
    resizer = Resizer(torch.device("cuda"))
    chunks = [Chunk(1) for _ in range(5)]
    for i, chunk in enumerate(chunks):
        resizer.take(chunk)
        assert [c.released for c in chunks[: i + 1]].count(0) == min(i + 1, 2)
    resizer.finish()
    assert [c.released for c in chunks] == [c.held for c in chunks] == [1] * 5


@pytest.mark.parametrize("rows", [0, 1])
def test_a_chunk_without_pixels_is_released(gpu, rows):
    resizer = Resizer(torch.device("cuda"))
    chunk = Chunk(1)
    chunk._offsets = np.full(rows, -1, np.int64)
    resizer.take(chunk)
    resizer.finish()
    assert chunk.released == 1


def test_pixels_go_up_beside_the_encoder_which_never_reads_them_too_early(gpu):
    uploader = Uploader(torch.device("cuda"))
    pixels = np.zeros((4, 24, 32, 3), np.uint8)
    for _ in range(3):
        batch = uploader.buffer(6, 24, 32)
        chunks = [Chunk(0), Chunk(0)]
        for chunk, first in zip(chunks, (0, 4), strict=True):
            uploader.upload(pixels[: 6 - first], batch, first)
            uploader.hold(chunk)
        (side,) = set(gpu.spent) - {0}
        last = gpu.clocks[side][side]
        assert not gpu.is_behind(0, side, last)
        uploader.join(batch)
        assert gpu.is_behind(0, side, last)
        batch.float().sum()
        uploader.finish()
        assert [c.released for c in chunks] == [c.held for c in chunks] == [1, 1]
    assert gpu.settle() == []
