"""The model as the cache sees it: its identity for the plan, and batches of uint8 pixels to rows ready to be stored."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import CacheError
from ..model import SIZE_MULTIPLE, FullCapacitor
from ..reference import posterior_mode


@dataclass(frozen=True)
class ModelIdentity:
    """What a plan records of a model. `sha256`: of the weights file, or of the tensors of a model built in memory."""

    id: str
    revision: str | None
    sha256: str
    latent_space: str
    config: dict[str, Any]
    channels: int
    stride: int
    multiple: int
    compute_dtype: str
    device: str = field(compare=False)
    whitening: dict[str, list[float]] | None = field(default=None, compare=False)

    def fields(self) -> dict[str, Any]:
        """Entries of `plan.json` under "model"."""
        names = ("id", "revision", "sha256", "latent_space", "config", "channels", "stride", "compute_dtype")
        return {name: getattr(self, name) for name in names}


class ModelSource(Protocol):
    """A model that need not be loaded to be identified."""

    def identity(self, compute_dtype: str | None = None) -> ModelIdentity:
        """Identity; `compute_dtype` is an existing plan's, for sources that are free to choose one."""

    def load(self, identity: ModelIdentity) -> FullCapacitor: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by name: hub id, folder, file or "sample". Identified by its header and hash, loaded on demand.

    Attributes:
        compute_dtype: "bfloat16", "float16" or "float32"; None: an existing plan's, else bfloat16 on CUDA and
            float32 on the CPU.
    """

    name: str
    device: str = "cpu"
    compute_dtype: str | None = None
    revision: str | None = None

    def identity(self, compute_dtype: str | None = None) -> ModelIdentity:
        from ..checkpoint import read_header, resolve

        source = resolve(self.name, revision=self.revision)
        kind = torch.device(self.device).type
        dtype = self.compute_dtype or compute_dtype or ("bfloat16" if kind == "cuda" else "float32")
        return _identity(source, read_header(source).config, dtype, kind)

    def load(self, identity: ModelIdentity) -> FullCapacitor:
        dtype = getattr(torch, identity.compute_dtype)
        return FullCapacitor.from_pretrained(
            self.name, device=self.device, dtype=dtype, revision=identity.revision or self.revision
        )


@dataclass(frozen=True)
class Loaded:
    """A model that is in memory already."""

    model: FullCapacitor

    def identity(self, compute_dtype: str | None = None) -> ModelIdentity:
        source = getattr(self.model, "source", None) or _in_memory(self.model)
        dtype = str(self.model.dtype).removeprefix("torch.")
        identity = _identity(source, self.model.config, dtype, self.model.device.type)
        return dataclasses.replace(identity, multiple=self.model.size_multiple)

    def load(self, identity: ModelIdentity) -> FullCapacitor:
        return self.model


@dataclass(frozen=True)
class _InMemory:
    id: str
    revision: None
    sha256: str
    latent_space: str


def _in_memory(model: FullCapacitor) -> _InMemory:
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(_bytes(t.detach().cpu()))
    sha256 = digest.hexdigest()
    return _InMemory("memory", None, sha256, f"full_capacitor/whitened@sha256:{sha256[:16]}")


def _identity(source: Any, config: ModelConfig, compute_dtype: str, device: str) -> ModelIdentity:
    if not config.encoder_depth:
        raise CacheError(f"{source.id} has a decoder only: caching needs a checkpoint with encoder.* tensors")
    return ModelIdentity(
        source.id,
        source.revision,
        source.sha256,
        source.latent_space,
        config.to_dict(),
        config.latent_channels,
        config.latent_stride,
        math.lcm(SIZE_MULTIPLE, config.latent_stride),
        compute_dtype,
        device,
    )


def with_whitening(identity: ModelIdentity, model: FullCapacitor) -> ModelIdentity:
    """Add the per-channel mean and standard deviation (`sqrt(var + eps)`) that whitening subtracts and divides by."""
    mean, var = model.latent_norm_running_mean, model.latent_norm_running_var
    if mean is None:
        return identity
    std = (var.double() + model.config.latent_running_stats_eps).sqrt()
    return dataclasses.replace(identity, whitening={"mean": mean.double().tolist(), "std": std.tolist()})


def _bytes(t: Tensor) -> np.ndarray:
    """The bytes of a tensor on the CPU, uint8 `[nbytes]`; no copy if it is contiguous."""
    return t.contiguous().flatten().view(torch.uint8).numpy()


@dataclass
class Encoded:
    """A batch under way: on the host once `BatchEncoder.fetch` has returned it.

    `tensors`: name -> stored dtype `[B,C,h,w]`; `stats`: float32 `[B,4]`, min, max, mean and standard deviation of
    each row of `latents` as stored; `finite`: bool `[B]`, of all tensors of the row.
    """

    tensors: dict[str, Tensor]
    stats: Tensor
    finite: Tensor
    events: tuple[Any, Any] | None = None


class BatchEncoder:
    """uint8 pixels to the tensors of a shard. On CUDA `submit` returns while the GPU works, `fetch` waits for it.

    `busy` counts the seconds that the device has computed.
    """

    def __init__(self, model: FullCapacitor, tensors: tuple[str, ...], dtype: str):
        self.model = model
        self.names = tensors
        self.dtype = getattr(torch, dtype)
        self.on_gpu = model.device.type == "cuda"
        self.busy = 0.0

    def buffer(self, rows: int, height: int, width: int) -> Tensor:
        """uint8 `[rows,height,width,3]` to be filled with pixels, page-locked for a GPU."""
        return torch.empty(rows, height, width, 3, dtype=torch.uint8, pin_memory=self.on_gpu)

    @torch.no_grad()
    def submit(self, pixels: Tensor) -> Encoded:
        """Begin to encode uint8 `[B,H,W,3]`, B at least 1."""
        if not self.on_gpu:
            begin = time.perf_counter()
            encoded = self._compute(pixels)
            self.busy += time.perf_counter() - begin
            return encoded
        with torch.cuda.device(self.model.device):
            events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            pixels = pixels.to(self.model.device, non_blocking=True)
            events[0].record()
            encoded = self._compute(pixels)
            events[1].record()
            return self._to_host(encoded, events)

    def fetch(self, encoded: Encoded) -> Encoded:
        """Wait until a submitted batch is on the host."""
        if encoded.events:
            (begin, end), done = encoded.events
            done.synchronize()
            self.busy += begin.elapsed_time(end) / 1e3
        return encoded

    def _compute(self, pixels: Tensor) -> Encoded:
        tensors = self._encode(pixels, "")
        if "latents_flip" in self.names:
            tensors |= self._encode(pixels.flip(2), "_flip")
        tensors = {name: tensors[name].to(self.dtype).contiguous() for name in self.names}
        rows = tensors["latents"].float().flatten(1)
        low, high = rows.aminmax(dim=1)
        stats = torch.stack((low, high, rows.mean(1), rows.std(1, correction=0)), 1)
        finite = torch.stack([t.isfinite().flatten(1).all(1) for t in tensors.values()]).all(0)
        return Encoded(tensors, stats, finite)

    def _encode(self, pixels: Tensor, suffix: str) -> dict[str, Tensor]:
        if "logsnr" not in self.names:
            return {f"latents{suffix}": self.model.encode(pixels)}
        mean, logsnr = self.model.encode_posterior(pixels)
        latents = self.model.whiten(self._fold(posterior_mode(mean, logsnr)))
        return {f"latents{suffix}": latents, f"logsnr{suffix}": self._fold(logsnr)}

    def _fold(self, t: Tensor) -> Tensor:
        """The family's 2x2 latent patches, so that logsnr lies element by element under the latents."""
        patch = self.model.config.latent_patch
        return t if patch == 1 else nn.functional.pixel_unshuffle(t, patch)

    def _to_host(self, encoded: Encoded, events: tuple[Any, ...]) -> Encoded:
        def copy(t: Tensor) -> Tensor:
            host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
            return host.copy_(t, non_blocking=True)

        done = torch.cuda.Event()
        host = Encoded(
            {name: copy(t) for name, t in encoded.tensors.items()}, copy(encoded.stats), copy(encoded.finite)
        )
        done.record()
        host.events = (events, done)
        return host
