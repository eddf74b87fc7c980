"""JPEGs from the ring to pixels on the device, which decodes and resizes them, a chunk ahead of the encoder.

A thread of its own takes the chunks in order: it hands a piece of the encoded pictures to nvJPEG, copies what is
needed of each beside the tables that came with it, and resizes it, so that of a piece of decoded pictures nothing is
left but the pixels that will be encoded. Pieces are as large as the memory that is set aside for them.

What fails is judged: what nvJPEG refuses is decoded by the CPU, in every run, as it is a matter of the file. A lack of
memory, or a decoder that fails with some file and goes on with others, is no property of the file: the input fails for
now. A decoder that is broken ends the run, which the next one goes on with. So does one that does not come back: who
decodes a file is a matter of the file alone, so that nothing else may take over what it is at.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from capacitor_kernels.pictures import UNIT, Field

from ..errors import CacheError, HungError, ImageError
from ..images.encoded import Encoded, exact_pixels, read_encoded
from .decoding import DecodedChunk
from .failures import CRASHED, OUT_OF_MEMORY
from .nvjpeg import JpegDecoder, Refused
from .resizing import Resizer, end_of, rows_of

# chunks that are decoded, or being decoded, while one is encoded
_AHEAD = 1
_GO_ON = "what is committed is safe, run the same command again"
_LOOK_SECONDS = 0.25
Failures = dict[int, tuple[str, str]]
"""Reason and message of pictures that have no pixels, by their source."""


class _Picture(NamedTuple):
    """A row of a part of a chunk: its record, where that begins, and if it is to be decoded, what of.

    `source` is the place of what it is made from, which rows of several views share.
    """

    part: int
    row: int
    offset: int
    source: int
    record: np.ndarray
    encoded: Encoded | None

    @property
    def nbytes(self) -> int:
        """Of the picture, decoded."""
        return 3 * self.encoded.shape[0] * self.encoded.shape[1] if self.encoded else len(self.record)


@dataclass
class _Finished:
    """Pixels of a chunk's rows: `[N,H,W,3]` of each bucket of each part, and the place there of each record, by its
    offset."""

    pixels: dict[tuple[int, int], Tensor]
    places: dict[int, tuple[tuple[int, int], int]]


class GpuDecoder(Resizer):
    """Decodes and resizes the pictures of one chunk after another.

    Attributes:
        seconds: that its thread has worked.
        waited: seconds that `ahead` has waited for it.

    Args:
        decode: on `device`.
        piece_bytes: of decoded pictures that are held at a time, unless one alone is larger; twice as much is taken.
        timeout: seconds that a call of the decoder may take, or the device to be done with a chunk.
        name: of an input by its ordinal, for messages.
    """

    def __init__(
        self,
        device: torch.device,
        decode: JpegDecoder,
        piece_bytes: int,
        timeout: float = 60.0,
        name: Callable[[int], str] = "input {}".format,
    ):
        super().__init__(device)
        self._timeout, self._name = timeout, name
        # when the call began that is under way, and the rows of the chunk that it is for
        self._since: float | None = None
        self._rows: list[int] = []
        self._is_hung = False
        self.seconds = self.waited = 0.0
        self._decode = decode
        self._piece_bytes = piece_bytes
        self._thread: _Thread | None = None
        self._taken = _Finished({}, {})

    def ahead(self, chunks: Iterable[DecodedChunk]) -> Iterator[DecodedChunk]:
        """The chunks as they may be taken, in order; those that follow are decoded meanwhile.

        Raises:
            CacheError: the decoder is broken; HungError: it does not come back.
        """
        thread = self._thread = _Thread("gpu-decode")
        under_way: deque[tuple[DecodedChunk, Future[_Finished]]] = deque()
        for chunk in chunks:
            under_way.append((chunk, thread.submit(self._finish, chunk)))
            if len(under_way) > _AHEAD:
                yield self._next(*under_way.popleft())
        while under_way:
            yield self._next(*under_way.popleft())

    def take(self, chunk: DecodedChunk) -> None:
        """It is there already."""

    def put(self, offsets: np.ndarray, batch: Tensor, first: int) -> None:
        """Copy pixels of the chunk, whose records begin there, all of a bucket, into `batch[first:first + len]`."""
        places = [self._taken.places[offset] for offset in offsets.tolist()]
        if not places:
            return
        at = [place for _, place in places]
        pixels = self._taken.pixels[places[0][0]]
        with self._on_stream():
            is_run = at == [*range(at[0], at[0] + len(at))]
            chosen = pixels[at[0] : at[-1] + 1] if is_run else pixels[torch.tensor(at, device=pixels.device)]
            batch[first : first + len(at)].copy_(chosen)

    def spent(self) -> tuple[float, float]:
        """Seconds that its thread has worked, and that it was waited for."""
        return self.seconds, self.waited

    def finish(self) -> None:
        """Release all chunks, and end the thread; nothing of one that hangs."""
        if self._thread is not None:
            self._thread.end(wait=not self._is_hung)
        if self._is_hung:
            return
        self._thread, self._taken = None, _Finished({}, {})
        super().finish()

    def _next(self, chunk: DecodedChunk, future: Future[_Finished]) -> DecodedChunk:
        begin = time.perf_counter()
        try:
            self._taken = self._result(chunk, future)
        except torch.OutOfMemoryError as e:
            raise CacheError("not enough GPU memory to decode images: use a smaller batch or pixel budget") from e
        except RuntimeError as e:
            raise CacheError(f"the GPU failed at decoding ({e}): {_GO_ON}") from e
        self.waited += time.perf_counter() - begin
        return chunk

    def _result(self, chunk: DecodedChunk, future: Future[_Finished]) -> _Finished:
        while True:
            try:
                return future.result(_LOOK_SECONDS)
            except NotDone:
                since = self._since
                if since is None or time.monotonic() - since < self._timeout:
                    continue
            self._is_hung = True
            inputs = chunk.columns["input"].to_pylist()
            names = [self._name(inputs[row]) for row in self._rows]
            some = f"{names[0]} to {names[-1]}, {len(names)} images" if len(names) > 1 else f"{names[0]}"
            raise HungError(
                f"the GPU does not come back from decoding ({some}) after {self._timeout:g} s: {_GO_ON}; if it happens "
                "at the same images again leave them out, or cache into a new OUT with --decode exact"
            )

    @contextmanager
    def _watched(self, pictures: Sequence[_Picture]) -> Iterator[None]:
        """A call that may hang, for these pictures."""
        self._rows = [p.row for p in pictures] or self._rows
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    @torch.no_grad()
    def _finish(self, chunk: DecodedChunk) -> _Finished:
        """Decode and resize a chunk, and release it; rows that fail are marked as failed."""
        begin = time.perf_counter()
        _, host = chunk.records()
        finished, failed = _Finished({}, {}), Failures()
        pictures: list[_Picture] = []
        with self._on_stream():
            for number, part in enumerate(chunk.parts()):
                for rows, bucket in part.groups():
                    size, key = part.size(bucket), (number, bucket)
                    finished.pixels[key] = self._held(len(rows), size.height, size.width)
                    offsets = part.offsets(rows).tolist()
                    finished.places |= {offset: (key, place) for place, offset in enumerate(offsets)}
                    pictures += [_picture(number, *at, host) for at in zip(rows.tolist(), offsets, strict=True)]
            # those of a source become neighbours
            pictures.sort(key=lambda p: p.offset)
            for piece in _pieces(pictures, self._piece_bytes):
                failed |= self._piece(piece, finished)
            if self._stream is not None:
                # the ring's bytes are read until then
                with self._watched(pictures):
                    self._stream.synchronize()
        for number, part in enumerate(chunk.parts()):
            part.fail({p.row: failed[p.source] for p in pictures if p.part == number and p.source in failed})
        chunk.release()
        self.seconds += time.perf_counter() - begin
        return finished

    def _held(self, *shape: int) -> Tensor:
        return torch.empty(*shape, 3, dtype=torch.uint8, device=self.device)

    def _piece(self, pictures: Sequence[_Picture], finished: _Finished) -> Failures:
        """Decode and resize pictures, fewer at a time where there is no memory for all."""
        try:
            failed = Failures()
            sources = {p.source: p for p in pictures if p.encoded}
            self._resized(pictures, self._decoded([*sources.values()], failed), failed, finished)
            return failed
        except torch.OutOfMemoryError as e:
            # its traceback holds what there was memory for
            message = str(e)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(pictures) == 1:
            return {pictures[0].source: (OUT_OF_MEMORY, f"no GPU memory to decode it: {message}")}
        half = len(pictures) // 2
        return self._piece(pictures[:half], finished) | self._piece(pictures[half:], finished)

    def _decoded(self, pictures: Sequence[_Picture], failed: Failures) -> dict[int, Tensor]:
        """The pictures by their sources, uint8 `[3,H,W]`, and what failed of them."""
        if not pictures:
            return {}
        streams = [p.encoded.stream for p in pictures if p.encoded]
        try:
            with self._watched(pictures):
                decoded = self._decode(streams)
        except torch.OutOfMemoryError:
            raise
        except (Refused, RuntimeError) as e:
            if len(pictures) > 1:
                # one fails all of them
                half = len(pictures) // 2
                return self._decoded(pictures[:half], failed) | self._decoded(pictures[half:], failed)
            return self._alone(pictures[0], e, failed)
        found: dict[int, Tensor] = {}
        for p, picture in zip(pictures, decoded, strict=True):
            assert p.encoded is not None
            if tuple(picture.shape) == (3, *p.encoded.shape):
                found[p.source] = picture
            else:
                found |= self._alone(p, Refused(f"nvJPEG: a picture of {tuple(picture.shape)}"), failed)
        return found

    def _alone(self, picture: _Picture, error: Exception, failed: Failures) -> dict[int, Tensor]:
        """A picture that nvJPEG did not decode by itself."""
        assert picture.encoded is not None
        if isinstance(error, Refused):
            try:
                pixels = exact_pixels(picture.encoded.stream, name="image")
            except ImageError as e:
                failed[picture.source] = e.reason, f"{e} ({error})"
                return {}
            except MemoryError:
                failed[picture.source] = OUT_OF_MEMORY, "no memory to decode it"
                return {}
            return {picture.source: torch.from_numpy(pixels).to(self.device).permute(2, 0, 1)}
        if not self._decode.works():
            raise CacheError(f"the GPU does not decode JPEGs any more ({error}): {_GO_ON}")
        failed[picture.source] = CRASHED, f"its decoding by the GPU failed: {error}"
        return {}

    def _resized(
        self, pictures: Sequence[_Picture], decoded: dict[int, Tensor], failed: Failures, finished: _Finished
    ) -> None:
        """Bring pictures into their places."""
        pictures = [p for p in pictures if p.source not in failed]
        if not pictures:
            return
        parts = [p.encoded.row if p.encoded else p.record for p in pictures]
        begins = np.cumsum([0, *(len(part) for part in parts)])
        # decoded pixels lie behind what comes from the host
        sizes = [_window_bytes(p.encoded) if p.encoded else 0 for p in pictures]
        places = begins[-1] + np.cumsum([0, *sizes])
        records = torch.empty(int(places[-1]), dtype=torch.uint8, device=self.device)
        host = torch.from_numpy(np.concatenate(parts))
        records[: len(host)].copy_(host.pin_memory() if self._stream else host, non_blocking=True)
        table = rows_of(host.numpy(), begins[:-1])
        for i, p in enumerate(pictures):
            if p.encoded is None:
                table[i, Field.SOURCE] += begins[i] // UNIT
                continue
            rows, columns = p.encoded.window
            at, (height, width) = int(places[i]), (rows.stop - rows.start, columns.stop - columns.start)
            window = records[at : at + 3 * height * width].view(height, width, 3)
            window.copy_(decoded[p.source][:, rows, columns].permute(1, 2, 0))
            table[i, Field.SOURCE] = at // UNIT
        for field in (Field.WEIGHTS_A, Field.WEIGHTS_B):
            table[:, field] += (begins[:-1] // 4).astype(np.int32)
        where = [finished.places[p.offset] for p in pictures]
        table[:, Field.IMAGE] = [place for _, place in where]
        for key in dict.fromkeys(key for key, _ in where):
            chosen = [i for i, (other, _) in enumerate(where) if other == key]
            self._resize(records, table[chosen], finished.pixels[key])


class _Thread:
    """Does one call after another. The interpreter does not wait for it, as for a pool's, at its end: it may hang."""

    def __init__(self, name: str):
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[DecodedChunk], _Finished], chunk: DecodedChunk) -> Future[_Finished]:
        future: Future[_Finished] = Future()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(chunk))
                except BaseException as e:
                    future.set_exception(e)

        self._calls.put(call)
        return future

    def end(self, wait: bool) -> None:
        """Finish the call that is under way, and none after it. `wait`: until it is finished."""
        with suppress(Empty):
            while True:
                self._calls.get_nowait()
        self._calls.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            # what it holds goes before the next one comes
            del call


def resizer_of(
    decode: str,
    device: torch.device,
    budget: int,
    timeout: float = 60.0,
    name: Callable[[int], str] = "input {}".format,
) -> Resizer:
    """What resizes on the device in a run, and decodes there where that is how the plan decodes.

    Args:
        budget: the run's `pixel_budget`.
        timeout, name: as those of `GpuDecoder`.
    """
    if decode != "gpu":
        return Resizer(device)
    # half of the budget is the ring; a piece takes twice its size
    return GpuDecoder(device, JpegDecoder(device), budget // 4, timeout, name)


def _picture(part: int, row: int, offset: int, records: np.ndarray) -> _Picture:
    record = records[offset:]
    encoded = read_encoded(record)
    if encoded is None:
        return _Picture(part, row, offset, offset, record[: end_of(np.zeros(1, np.int64), record)], None)
    return _Picture(part, row, offset, offset + encoded.begin, record, encoded)


def _window_bytes(encoded: Encoded) -> int:
    rows, columns = encoded.window
    return -(-3 * (rows.stop - rows.start) * (columns.stop - columns.start) // UNIT) * UNIT


def _pieces(pictures: Iterable[_Picture], most: int) -> Iterator[list[_Picture]]:
    """Neighbours whose decoded pictures have so many bytes together, one at least with all of its views."""
    piece, nbytes = list[_Picture](), 0
    for picture in pictures:
        more = 0 if piece and piece[-1].source == picture.source else picture.nbytes
        if piece and nbytes + more > most and more:
            yield piece
            piece, nbytes = [], 0
        piece.append(picture)
        nbytes += more
    if piece:
        yield piece
