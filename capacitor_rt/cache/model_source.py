"""The model as the cache sees it before it is loaded: its identity for the plan, and where it comes from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..checkpoint import CheckpointSource, read_header, resolve, tensors_sha256
from ..config import ModelConfig
from ..errors import CacheError
from ..fp8_encoding import check_precision, encoding_name, find_calibration
from ..model import FullCapacitor
from ..pretrained import SIZE_MULTIPLE
from ..reference import Autoencoder
from ..runtime.platform import why_not_triton


@dataclass(frozen=True)
class ModelIdentity:
    """What a plan records of a model.

    Attributes:
        id, revision: as given, and the hub's commit or None.
        sha256: of the weights file, or of the tensors of a model that was built in memory.
        channels, stride: channels of a latent, and pixels per latent in each direction.
        multiple: sides of a bucket are multiples of this, in pixels.
        compute_dtype: type of the convolutions, "bfloat16", "float16" or "float32".
        device: type of the device that computes, such as "cpu".
        where: the device itself, such as "cuda:1".
        encoding: what latents differ by from those of the same weights in 16 or 32 bits, such as "fp8-12345678".
        cc: compute capability of the GPU, where launches of ours may serve; else None.
        whitening: per-channel "mean" and "std", `[C]` each; None before the model is loaded, or without statistics.
    """

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
    cc: int | None = field(default=None, compare=False)
    encoding: str | None = None
    where: str = field(default="cpu", compare=False)

    def fields(self) -> dict[str, Any]:
        """Entries of `plan.json` under "model"."""
        names = ["id", "revision", "sha256", "latent_space", "config", "channels", "stride", "compute_dtype"]
        if self.encoding:
            names.append("encoding")
        return {name: getattr(self, name) for name in names}


class ModelSource(Protocol):
    """A model that need not be loaded to be identified."""

    def identity(self, compute_dtype: str | None = None) -> ModelIdentity:
        """What a plan records. `compute_dtype` is an existing plan's, for sources that are free to choose one."""

    def load(self, identity: ModelIdentity) -> Autoencoder:
        """The model itself, which computes as `identity` says."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by name: hub id, folder, file or "sample". Identified by its header and hash, loaded on demand.

    Attributes:
        compute_dtype: "bfloat16", "float16" or "float32"; None: an existing plan's, else bfloat16 on CUDA and
            float32 on the CPU.
        encode_precision: "fp8", or None for that of `compute_dtype`.
    """

    name: str
    device: str = "cpu"
    compute_dtype: str | None = None
    revision: str | None = None
    backend: str = "auto"
    encode_precision: str | None = None

    def identity(self, compute_dtype: str | None = None) -> ModelIdentity:
        source = resolve(self.name, revision=self.revision)
        check_precision(self.encode_precision)
        if self.encode_precision == "fp8":
            source = dataclasses.replace(source, encoding=encoding_name(find_calibration(source)))
        kind = torch.device(self.device).type
        dtype = self.compute_dtype or compute_dtype or ("bfloat16" if kind == "cuda" else "float32")
        identity = _identity(source, read_header(source).config, dtype, kind)
        cc = _served_cc(torch.device(self.device), self.backend)
        return dataclasses.replace(identity, cc=cc, where=self.device)

    def load(self, identity: ModelIdentity) -> FullCapacitor:
        dtype = getattr(torch, identity.compute_dtype)
        return FullCapacitor.from_pretrained(
            self.name,
            device=self.device,
            dtype=dtype,
            revision=identity.revision or self.revision,
            backend=self.backend,
            encode_precision=self.encode_precision,
        )


@dataclass(frozen=True)
class Loaded:
    """A model that is in memory already."""

    model: FullCapacitor

    def identity(self, compute_dtype: str | None = None) -> ModelIdentity:
        # parameters that were edited are no checkpoint's, and are what is computed with
        kept = self.model.source if self.model.is_as_loaded else None
        source = kept or _in_memory(self.model)
        dtype = str(self.model.dtype).removeprefix("torch.")
        identity = _identity(source, self.model.config, dtype, self.model.device.type)
        cc = _served_cc(self.model.device, self.model.backend)
        where = str(self.model.device)
        return dataclasses.replace(identity, multiple=self.model.size_multiple, cc=cc, where=where)

    def load(self, identity: ModelIdentity) -> FullCapacitor:
        return self.model


@dataclass(frozen=True)
class _InMemory:
    """Stands in for the `CheckpointSource` of a model that was built in memory."""

    id: str
    revision: None
    sha256: str
    latent_space: str
    encoding: None = None


def _in_memory(model: FullCapacitor) -> _InMemory:
    sha256 = tensors_sha256(model.state_dict())
    return _InMemory("memory", None, sha256, f"full_capacitor/whitened@sha256:{sha256[:16]}")


def _served_cc(device: torch.device, backend: str) -> int | None:
    """Compute capability of a GPU where the Triton backend may serve."""
    if backend == "torch" or device.type != "cuda" or why_not_triton(device) is not None:
        return None
    from capacitor_kernels.launch import compute_capability

    return compute_capability(device)


def _identity(
    source: CheckpointSource | _InMemory, config: ModelConfig, compute_dtype: str, device: str
) -> ModelIdentity:
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
        encoding=source.encoding,
    )


def with_whitening(identity: ModelIdentity, model: Autoencoder) -> ModelIdentity:
    """Add the per-channel mean and standard deviation (`sqrt(var + eps)`) that whitening subtracts and divides by."""
    statistics = model.statistics(torch.float64)
    if statistics is None:
        return identity
    mean, std = (t.cpu() for t in statistics)
    return dataclasses.replace(identity, whitening={"mean": mean.tolist(), "std": std.tolist()})
