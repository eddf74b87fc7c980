"""Batches of uint8 pixels to rows ready to be stored."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import Autoencoder
from ..runtime.backend import ServedAutoencoder
from .quantization import stored_as, values_of
from .resizing import Resizer, Uploader


@dataclass
class Marks:
    """Points in a CUDA stream: computing begins, computing ends, and the results are on the host."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    copied: torch.cuda.Event


@dataclass
class Encoded:
    """A batch under way, which is on the host once `BatchEncoder.fetch` has returned it.

    Attributes:
        tensors: the parts by name, as they are stored: `[B,C,h,w]`, and `[B,C]` of what turns integers into values.
        stats: min, max, mean and standard deviation of each row of `latents` as a reader gets it, float32 `[B,4]`.
        finite: whether all values of all tensors of the row are finite, bool `[B]`.
        marks: of a batch on a GPU.
    """

    tensors: dict[str, Tensor]
    stats: Tensor
    finite: Tensor
    marks: Marks | None = None


class BatchEncoder:
    """uint8 pixels to the tensors of a shard. On CUDA `submit` returns while the GPU works, and `fetch` waits for it.

    Attributes:
        uploader: fills the buffers of a GPU: the resizer, or one that copies; None where the CPU encodes, which is done
            with pixels when `submit` returns.
        busy: seconds that the device has computed.
        waited: seconds that `fetch` has waited for it.
        seconds: spent in `submit` and `fetch`.

    Args:
        tensors: names of the plan's tensors.
        dtype: that they are stored in, such as "bfloat16".
        resizer: of a run whose images are resized on the device.
    """

    def __init__(self, model: Autoencoder, tensors: tuple[str, ...], dtype: str, resizer: Resizer | None = None):
        self.model = model
        self.names = tensors
        self.dtype = dtype
        self.on_gpu = model.device.type == "cuda"
        self.resizer = resizer
        self.uploader = resizer or (Uploader(model.device) if self.on_gpu else None)
        self.busy = self.waited = self.seconds = 0.0
        self._spare: dict[torch.Size, list[Tensor]] = {}

    def buffer(self, rows: int, height: int, width: int) -> Tensor:
        """uint8 `[rows,height,width,3]` to be filled with pixels: on a GPU the uploader's."""
        if spare := self._spare.get(torch.Size((rows, height, width, 3))):
            return spare.pop()
        if self.uploader is not None:
            return self.uploader.buffer(rows, height, width)
        return torch.empty(rows, height, width, 3, dtype=torch.uint8)

    def give_back(self, buffer: Tensor) -> None:
        """A buffer whose batch has been fetched: its pages, once touched, serve again."""
        self._spare.setdefault(buffer.shape, []).append(buffer)

    def warmup(self, shapes: Iterable[tuple[int, int, int]]) -> float:
        """Make batches of `(height, width, rows)` ready; seconds that compiling kernels took."""
        if not isinstance(self.model, ServedAutoencoder):
            return 0.0
        direction = "posterior" if "logsnr" in self.names else "encode"
        self.model.warmup(shapes, direction=direction, image_dtype=torch.uint8, layout="nhwc")
        return self.model.stats().compile_seconds

    @torch.no_grad()
    def submit(self, pixels: Tensor) -> Encoded:
        """Begin to encode uint8 `[B,H,W,3]`, B at least 1."""
        if not self.on_gpu:
            start = time.perf_counter()
            encoded = self._compute(pixels)
            self.busy += time.perf_counter() - start
            self.seconds += time.perf_counter() - start
            return encoded
        start = time.perf_counter()
        with torch.cuda.device(self.model.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self.uploader is not None:
                self.uploader.join(pixels)
            pixels = pixels.to(self.model.device, non_blocking=True)
            begin.record()
            encoded = self._compute(pixels)
            end.record()
            encoded = self._to_host(encoded, begin, end)
        self.seconds += time.perf_counter() - start
        return encoded

    def fetch(self, encoded: Encoded) -> Encoded:
        """Wait until a submitted batch is on the host."""
        if encoded.marks:
            start = time.perf_counter()
            encoded.marks.copied.synchronize()
            self.waited += time.perf_counter() - start
            self.seconds += time.perf_counter() - start
            self.busy += encoded.marks.begin.elapsed_time(encoded.marks.end) / 1e3
        return encoded

    def _compute(self, pixels: Tensor) -> Encoded:
        tensors = self._encode(pixels, "")
        if "latents_flip" in self.names:
            tensors |= self._encode(pixels.flip(2), "_flip")
        tensors = stored_as({name: tensors[name] for name in self.names}, self.dtype)
        rows = values_of(tensors, ["latents"])["latents"].float().flatten(1)
        finite = torch.stack([_finite(t) for t in tensors.values()]).all(0)
        return Encoded(tensors, _statistics(rows), finite)

    def _encode(self, pixels: Tensor, suffix: str) -> dict[str, Tensor]:
        if "logsnr" not in self.names:
            return {f"latents{suffix}": self.model.encode(pixels)}
        posterior = self.model.encode_posterior(pixels)
        # a plan with logsnr is refused for a deterministic model
        assert posterior.logsnr is not None
        # folded, logsnr lies element by element under the latents
        logsnr = self.model.fold_latent_patches(posterior.logsnr)
        return {f"latents{suffix}": self.model.latents_of(posterior), f"logsnr{suffix}": logsnr}

    def _to_host(self, encoded: Encoded, begin: torch.cuda.Event, end: torch.cuda.Event) -> Encoded:
        def copy(t: Tensor) -> Tensor:
            host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
            return host.copy_(t, non_blocking=True)

        tensors = {name: copy(t) for name, t in encoded.tensors.items()}
        stats, finite = copy(encoded.stats), copy(encoded.finite)
        copied = torch.cuda.Event()
        copied.record()
        return Encoded(tensors, stats, finite, Marks(begin, end, copied))


class IdleEncoder(BatchEncoder):
    """Of a run in which nothing is to be encoded, and for which no model is loaded."""

    def __init__(self) -> None:
        self.on_gpu, self.uploader, self.resizer = False, None, None
        self.busy = self.waited = self.seconds = 0.0


def _statistics(rows: Tensor) -> Tensor:
    """Min, max, mean and standard deviation of rows `[B,N]`, float32 `[B,4]`; on a CPU a twelfth of `std`'s time."""
    mean = rows.mean(1)
    # the mean is taken off first, so that nothing cancels
    deviation = torch.linalg.vector_norm(rows - mean[:, None], dim=1) / rows.shape[1] ** 0.5
    return torch.stack((rows.amin(1), rows.amax(1), mean, deviation), 1)


def _finite(t: Tensor) -> Tensor:
    """Whether all values of each row are finite, bool `[B]`: those that are not are its smallest or largest."""
    rows = t.flatten(1)
    return rows.amin(1).isfinite() & rows.amax(1).isfinite()
