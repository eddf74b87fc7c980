"""Packed weights of one model on one device: folded when first needed, dropped when the parameters change."""

from __future__ import annotations

import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from . import fold
from .memory import DeviceMemoryError, amount, free_bytes, retire
from .plan import LaunchPlan
from .stats import Stats

if TYPE_CHECKING:
    from ..model import FullCapacitor

MAX_TIMES = 8
"""Folded decoders kept, one per time (full_capacitor in bfloat16: 111 MB each, computed)."""
Time = tuple[float, float]


class Watch:
    """Notices changes of a module's tensors: other tensors, or the same edited in place.

    Edits through `.data`, and of tensors made under `torch.inference_mode`, leave no trace and go unnoticed.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        seen = [
            (owner, name, t)
            for m in module.modules()
            for owner in (m._parameters, m._buffers)
            for name, t in owner.items()
            if t is not None
        ]
        self._owners, self._names, self._tensors = zip(*seen, strict=True)
        self._tracked = [t for t in self._tensors if not t.is_inference()]
        self._versions = [t._version for t in self._tracked]

    def sees_change(self, module: nn.Module | None) -> bool:
        """Whether `module` is not the one that was seen, or not as it was."""
        # made on every call, so without a loop in Python
        return (
            module is not self._module
            or list(map(_version_of, self._tracked)) != self._versions
            or not all(map(operator.is_, map(dict.get, self._owners, self._names), self._tensors))
        )


_version_of = operator.attrgetter("_version")


class PackedWeights:
    """Packed tensors by the names that plans use.

    Args:
        evicted: called with the `(t, image_scale)` of a decoder that went, whose plans are to go too.
    """

    def __init__(
        self,
        model: FullCapacitor,
        device: torch.device,
        dtype: torch.dtype,
        stats: Stats,
        evicted: Callable[[Time], None],
    ):
        # a reference cycle would keep GPU memory until the next collection
        self._model = weakref.ref(model)
        self._device, self._dtype, self._stats, self._evicted = device, dtype, stats, evicted
        self._encoder: dict[str, Tensor] = {}
        self._decoders: OrderedDict[Time, dict[str, Tensor]] = OrderedDict()
        self._watches: dict[str, tuple[Watch, list[int]]] = {}

    def of(self, plan: LaunchPlan) -> Mapping[str, Tensor]:
        """Weights of a plan, folded and packed where they are not there yet."""
        if not plan.times:
            return self._encode()
        return {f"t{i}.{name}": t for i, key in enumerate(plan.times) for name, t in self._decode(key).items()}

    def ready_for(self, plan: LaunchPlan) -> bool:
        """Whether `of` would only look up."""
        return all(key in self._decoders for key in plan.times) if plan.times else bool(self._encoder)

    def touch(self, plan: LaunchPlan) -> None:
        """Count a plan's decoders as just used."""
        for key in plan.times:
            self._decoders.move_to_end(key)

    def stale(self, part: str) -> bool:
        """Whether the parameters of "encoder" or "decoder" changed since they were packed."""
        if part not in self._watches:
            return False
        model = self._model()
        watch, statistics = self._watches[part]
        return watch.sees_change(getattr(model, part)) or statistics != _statistics(model)

    def clear(self) -> None:
        """Free everything. Work that the current stream has queued may still use it."""
        for packed in (self._encoder, *self._decoders.values()):
            retire(packed.values())
        self._encoder = {}
        self._decoders.clear()
        self._watches.clear()
        self._stats.weight_nbytes = 0

    def _encode(self) -> dict[str, Tensor]:
        if not self._encoder:
            packed = self._pack("encoder", fold.fold_encoder)
            packed["patch_w_nhwc"] = fold.rows_nhwc(packed["patch_w"], self._model().config.patch_size)
            self._encoder = packed
            self._weigh()
        return self._encoder

    def _decode(self, key: Time) -> dict[str, Tensor]:
        if key not in self._decoders:
            t, image_scale = key
            self._decoders[key] = self._pack("decoder", lambda model: fold.fold_decoder(model, t, image_scale))
            if len(self._decoders) > MAX_TIMES:
                oldest, packed = self._decoders.popitem(last=False)
                self._evicted(oldest)
                retire(packed.values())
            self._weigh()
        self._decoders.move_to_end(key)
        return self._decoders[key]

    def _pack(self, part: str, folded: Callable[[FullCapacitor], object]) -> dict[str, Tensor]:
        model = self._model()
        _refuse_sharded(part, getattr(model, part))
        if part not in self._watches:
            self._watches[part] = (Watch(getattr(model, part)), _statistics(model))
        self._stats.folds += 1
        try:
            # an enclosing autocast would round products of the fold
            with torch.autocast("cpu", enabled=False):
                return fold.named_tensors(fold.pack(folded(model), self._dtype, self._device))
        except torch.OutOfMemoryError as error:
            size = sum(p.numel() for p in getattr(model, part).parameters()) * self._dtype.itemsize
            message = (
                f"the packed {part} needs about {amount(size)}, and {amount(free_bytes(self._device))} are free on "
                f"{self._device}: free memory there, or use another device"
            )
            raise DeviceMemoryError(message) from error

    def _weigh(self) -> None:
        sets = (self._encoder, *self._decoders.values())
        self._stats.weight_nbytes = sum(t.nbytes for s in sets for t in s.values())


def _statistics(model: FullCapacitor) -> list[int]:
    stats = (model.latent_norm_running_mean, model.latent_norm_running_var)
    return [n for t in stats if t is not None for n in (id(t), 0 if t.is_inference() else t._version)]


def _refuse_sharded(part: str, module: nn.Module) -> None:
    for name, p in module.named_parameters():
        if hasattr(p, "full_tensor"):
            raise InputError(
                f"{part}.{name} is sharded over processes: leave this model out of FSDP, e.g. "
                "fully_shard(parent, ignored_params=set(model.parameters()))"
            )
