"""Packed weights of one model on one device: folded when first needed, dropped when the parameters change."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import blocks, conditioning, reference
from ..errors import NotFoldableError
from ..reference import Autoencoder
from . import fold, packed
from .as_loaded import Watch
from .fold_fp8 import Ranges, fold_fp8
from .memory import DeviceMemoryError, amount, free_bytes, retire
from .plan import LaunchPlan
from .stats import Stats

MAX_TIMES = 8
"""Folded decoders kept, one per time (full_capacitor in bfloat16: 111 MB each, computed)."""
FOLDED = (
    nn.Conv2d,
    nn.Linear,
    nn.ModuleList,
    conditioning.AdaLNBase,
    conditioning.AdaLNDelta,
    blocks.AffineRMSNorm,
    blocks.Block,
    blocks.ChannelAttention,
    blocks.ConvMLP,
    blocks.DicoBlock,
    reference.Decoder,
    reference.Encoder,
    blocks.GRN,
    reference.Patchify,
    blocks.RMSNorm,
    conditioning.TimeEmbed,
)
Time = tuple[float, float]


class PackedWeights:
    """Packed tensors by the names that plans use.

    Args:
        model: whose parameters are watched, held weakly.
        to_fold: from `model` to the one whose tensors are folded.
        evicted: called with the `(t, image_scale)` of a decoder that was dropped, whose plans must be freed too.
        lent: where weights are kept that a caller's graph reads.
        ranges: of a calibration, for an encoder in e4m3.
    """

    def __init__(
        self,
        model: Autoencoder,
        device: torch.device,
        dtype: torch.dtype,
        stats: Stats,
        to_fold: Callable[[Any], Autoencoder],
        evicted: Callable[[Time], None],
        lent: list[Any],
        ranges: Ranges | None = None,
    ):
        # a reference cycle would keep GPU memory until the next collection
        self._ref = weakref.ref(model)
        self._ranges = ranges
        self._to_fold = to_fold
        self._device, self._dtype, self._stats, self._evicted = device, dtype, stats, evicted
        self._lent = lent
        self._encoder: dict[str, Tensor] = {}
        self._decoders: OrderedDict[Time, dict[str, Tensor]] = OrderedDict()
        self._watches: dict[str, tuple[Watch, list[int]]] = {}

    def of(self, plan: LaunchPlan) -> Mapping[str, Tensor]:
        """Weights of a plan, folded and packed where they are not there yet."""
        if not plan.times:
            return self._encode()
        return {f"t{i}.{name}": t for i, time in enumerate(plan.times) for name, t in self._decode(time).items()}

    def ready_for(self, plan: LaunchPlan) -> bool:
        """Whether `of` would only look up."""
        return all(time in self._decoders for time in plan.times) if plan.times else bool(self._encoder)

    def lend(self, plan: LaunchPlan) -> Mapping[str, Tensor]:
        """As `of`, to a graph of the caller's: kept while the model lives, whatever becomes of these weights."""
        packed = self.of(plan)
        self._lent.append(packed)
        return packed

    def tensors(self) -> list[Tensor]:
        """Everything that is packed now."""
        return [t for packed in (self._encoder, *self._decoders.values()) for t in packed.values()]

    def touch(self, plan: LaunchPlan) -> None:
        """Count a plan's decoders as just used."""
        for time in plan.times:
            self._decoders.move_to_end(time)

    def stale(self, part: str) -> bool:
        """Whether the parameters of "encoder" or "decoder" changed since they were packed."""
        if part not in self._watches:
            return False
        model = self._model
        watch, statistics = self._watches[part]
        return watch.sees_change(getattr(model, part)) or statistics != _statistics(model)

    def clear(self) -> None:
        """Free everything. Work that the current stream has queued may still use it."""
        retire(self.tensors())
        self._encoder = {}
        self._decoders.clear()
        self._watches.clear()
        self._stats.weight_nbytes = 0

    def _encode(self) -> dict[str, Tensor]:
        if not self._encoder:
            self._encoder = self._pack(fold.ENCODER, self._fold_encoder)
            self._weigh()
        return self._encoder

    def _fold_encoder(self, model: Autoencoder) -> packed.PackedEncoder:
        folded = fold.fold_encoder(model)
        return folded if self._ranges is None else fold_fp8(folded, self._ranges)

    def _decode(self, time: Time) -> dict[str, Tensor]:
        if time not in self._decoders:
            t, image_scale = time
            self._decoders[time] = self._pack(fold.DECODER, lambda model: fold.fold_decoder(model, t, image_scale))
            if len(self._decoders) > MAX_TIMES:
                oldest, packed = self._decoders.popitem(last=False)
                self._evicted(oldest)
                retire(packed.values())
            self._weigh()
        self._decoders.move_to_end(time)
        return self._decoders[time]

    def _pack(
        self, part: str, folded: Callable[[Autoencoder], packed.PackedEncoder | packed.PackedDecoder]
    ) -> dict[str, Tensor]:
        model = self._model
        _refuse(part, getattr(model, part))
        if part not in self._watches:
            self._watches[part] = (Watch(getattr(model, part)), _statistics(model))
        self._stats.folds += 1
        try:
            # an enclosing autocast would round products of the fold
            with torch.autocast("cpu", enabled=False):
                return packed.named_tensors(packed.pack(folded(self._to_fold(model)), self._dtype, self._device))
        except torch.OutOfMemoryError as error:
            size = sum(p.numel() for p in getattr(model, part).parameters()) * self._dtype.itemsize
            message = (
                f"the packed {part} needs about {amount(size)}, and {amount(free_bytes(self._device))} are free on "
                f"{self._device}: free memory there, or use another device"
            )
            raise DeviceMemoryError(message) from error

    @property
    def _model(self) -> Autoencoder:
        model = self._ref()
        if model is None:
            raise RuntimeError("the model of these packed weights is gone")
        return model

    def _weigh(self) -> None:
        self._stats.weight_nbytes = sum(t.nbytes for t in self.tensors())


def _statistics(model: Autoencoder) -> list[int]:
    stats = (model.latent_norm_running_mean, model.latent_norm_running_var)
    return [n for t in stats if t is not None for n in (id(t), t.data_ptr(), 0 if t.is_inference() else t._version)]


def _refuse(part: str, module: nn.Module) -> None:
    """Refuse what cannot be folded: sharded tensors, forward hooks, and layers that wrap or replace the model's own.

    Raises:
        NotFoldableError: names the module, and what to do.
    """
    for name, p in module.named_parameters():
        if hasattr(p, "full_tensor"):
            raise NotFoldableError(
                f"{part}.{name} is sharded over processes: leave this model out of FSDP, e.g. "
                "fully_shard(parent, ignored_params=set(model.parameters()))"
            )
    for name, child in module.named_modules():
        where = f"{part}.{name}" if name else part
        if type(child) not in FOLDED:
            raise NotFoldableError(
                f"{where} is a {type(child).__name__}, which the Triton backend cannot fold: merge it into a plain "
                "layer (for LoRA: merge_and_unload), or use backend='torch'"
            )
        if child._forward_hooks or child._forward_pre_hooks or "forward" in child.__dict__:
            raise NotFoldableError(
                f"{where} has a forward hook, which the Triton backend would not call: remove it, or use "
                "backend='torch'"
            )
