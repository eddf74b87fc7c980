"""JPEGs that a GPU decodes: streams, memory, and a JPEG engine that waits for nobody."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_torchvision import FakeTorchvision

from capacitor_rt.cache import gpu_decoding
from capacitor_rt.cache.gpu_decoding import GpuDecoder, resizer_of
from capacitor_rt.cache.nvjpeg import JpegDecoder
from capacitor_rt.cache.resizing import Resizer
from capacitor_rt.images import encoded
from capacitor_rt.images.geometry import Size
from capacitor_rt.images.load import PixelPolicy, View

GPU = torch.device("cuda", 0)
BUCKET = Size(32, 32)


def jpeg(seed: int) -> bytes:
    import image_files as files

    return files.encoded(files.texture(48, 64, seed), "JPEG")


class Chunk:
    """Records as a pool hands them out; `released` and `failed` count."""

    def __init__(self, count: int):
        self.released, self.failed = 0, {}
        self._pixels = np.zeros(count * encoded.RECORD_BYTES, np.uint8)
        self._offsets = np.arange(count, dtype=np.int64) * encoded.RECORD_BYTES
        for i, begin in enumerate(self._offsets):
            assert encoded.load_encoded(jpeg(i), [View(PixelPolicy("gpu"), (BUCKET,))], self._pixels[begin:])

    def records(self):
        return self._offsets, self._pixels

    def offsets(self, rows):
        return self._offsets[rows]

    def groups(self):
        rows = np.array([row for row in range(len(self._offsets)) if row not in self.failed], np.int64)
        return [(rows, 0)] if len(rows) else []

    def parts(self):
        return [self]

    def size(self, bucket: int) -> Size:
        return BUCKET

    def fail(self, failed) -> None:
        self.failed |= failed

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def fake(gpu, monkeypatch) -> FakeTorchvision:
    """An engine, whose work begins at once: what uses memory of the current stream has to be done by then."""
    fake = FakeTorchvision(kind="cuda").install(monkeypatch)

    def before() -> None:
        stream = gpu.stream
        if not gpu.host.get(stream, 0) >= gpu.clocks[stream].get(stream, 0):
            gpu.fault("nvJPEG writes memory that may still be read")

    fake.before = before
    # launches compute nothing here, and so does whatever would bring pixels back
    monkeypatch.setattr(JpegDecoder, "_why_not", lambda self: None)
    return fake


def test_pictures_are_decoded_beside_the_encoder_and_never_written_or_read_too_early(gpu, fake):
    decoder = GpuDecoder(GPU, JpegDecoder(GPU), 1 << 20)
    chunks = [Chunk(3) for _ in range(4)]
    for i, chunk in enumerate(decoder.ahead(iter(chunks))):
        assert chunk is chunks[i] and chunk.released == 1
        decoder.take(chunk)
        batch = decoder.buffer(4, 32, 32)
        decoder.put(chunk.offsets(np.arange(3)), batch, 0)
        decoder.join(batch)
        # the encoder, on the stream that is current
        batch.float().sum()
    decoder.finish()
    assert fake.calls == [3] * 4 and gpu.settle() == []
    assert [c.released for c in chunks] == [1] * 4
    seconds, waited = decoder.spent()
    assert seconds > 0 and waited >= 0


def test_all_of_it_is_on_a_stream_of_its_own(gpu, fake):
    decoder = GpuDecoder(GPU, JpegDecoder(GPU), 1 << 20)
    spent = dict(gpu.spent)
    for chunk in decoder.ahead([Chunk(2)]):
        decoder.take(chunk)
    assert {stream for stream, n in gpu.spent.items() if n != spent.get(stream, 0)} == {decoder._stream.cuda_stream}
    decoder.finish()


def test_pictures_are_held_by_pieces(gpu, fake):
    decoder = GpuDecoder(GPU, JpegDecoder(GPU), 2 * 3 * 48 * 64)
    list(decoder.ahead([Chunk(5)]))
    decoder.finish()
    assert fake.calls == [2, 2, 1] and gpu.settle() == []


def test_without_memory_for_a_piece_it_is_made_smaller(gpu, fake):
    decoder = GpuDecoder(GPU, JpegDecoder(GPU), 1 << 30)
    fake.most_bytes = 2 * 3 * 48 * 64
    chunk = Chunk(5)
    list(decoder.ahead([chunk]))
    assert chunk.failed == {} and sorted(fake.calls)[-1] == 5 and gpu.settle() == []
    fake.most_bytes = 10
    chunk = Chunk(2)
    list(decoder.ahead([chunk]))
    assert {row: reason for row, (reason, _) in chunk.failed.items()} == dict.fromkeys((0, 1), "out_of_memory")
    decoder.finish()
    assert chunk.released == 1


def test_without_memory_for_what_is_encoded_the_run_ends(gpu, fake):
    decoder = GpuDecoder(GPU, JpegDecoder(GPU), 1 << 30)
    gpu.limit = gpu.allocated + 100
    from capacitor_rt.errors import CacheError

    with pytest.raises(CacheError, match="not enough GPU memory to decode images"):
        list(decoder.ahead([Chunk(2)]))
    decoder.finish()
    gpu.limit = 80 << 30


def test_an_end_in_between_waits_for_what_is_under_way(gpu, fake, monkeypatch):
    decoder = GpuDecoder(GPU, JpegDecoder(GPU), 1 << 30)
    chunks = [Chunk(1) for _ in range(3)]
    found = decoder.ahead(iter(chunks))
    next(found)
    decoder.finish()
    # the first, and the one that was begun: nothing reads the ring any more
    assert decoder._thread is None and chunks[2].released == 0
    assert gpu.settle() == []


def test_who_resizes(gpu, fake):
    assert type(resizer_of("exact", GPU, 1 << 30)) is Resizer and type(resizer_of("fast", GPU, 1 << 30)) is Resizer
    decoder = resizer_of("gpu", GPU, 1 << 30)
    assert isinstance(decoder, gpu_decoding.GpuDecoder) and decoder._piece_bytes == 1 << 28


def test_a_whole_run(gpu, fake, tmp_path, monkeypatch):
    """Caching JPEGs on the GPU: their latents mean nothing here, but memory and streams are watched."""
    from models import randomise

    from capacitor_rt import FullCapacitor
    from capacitor_rt.cache import CacheRequest, cache_images
    from capacitor_rt.cache.options import RunOptions
    from capacitor_rt.runtime import launch_cases

    monkeypatch.setenv("CAPACITOR_SELF_CHECK", "0")
    (tmp_path / "src").mkdir()
    for i in range(9):
        (tmp_path / "src" / f"{i}.jpg").write_bytes(jpeg(i) if i != 5 else jpeg(i)[:-200])
    model = FullCapacitor(launch_cases.TINY.config, backend="triton", strict_size=False)
    model = randomise(model).to(GPU, torch.bfloat16)
    request = CacheRequest(32, batch=2, task_inputs=4, decode="gpu")
    options = RunOptions(workers=0, progress=False)
    report = cache_images(tmp_path / "src", tmp_path / "out", model, request, options=options)
    assert report.quarantined["truncated"] == 1 and report.cached + report.quarantined.total() == 9
    assert sum(fake.calls) == 8 and report.meters.seconds["gpu_decode"] > 0
    assert gpu.settle() == []
