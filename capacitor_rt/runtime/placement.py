"""Where a model's weights are: registered as in any module, or at rest on the CPU while packed copies do the work.

A backend that packs weights for its GPU needs the checkpoint's own tensors only to fold them. Those then *rest*: they
stay on the CPU in the type in which they were loaded, `.to()` changes the place and type in which the model computes
and nothing else, and a round trip over the CPU gives the same bits. Resting weights are no parameters of a parent
module: optimizers, DistributedDataParallel and FSDP neither move, broadcast nor shard them. `state_dict`,
`load_state_dict` and `parameters()` of the model itself see them as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..reference import at_least_float32

Place = tuple[torch.device, torch.dtype]


class PlacedModule(nn.Module):
    """A module whose children named in `weights` can rest. A subclass says when, and what to free at a change."""

    weights: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        # where the model computes while its weights rest, else None
        self._placed: Place | None = None
        self.register_load_state_dict_post_hook(_settle)

    def registered_place(self) -> Place:
        """Device and dtype of the weights themselves."""
        raise NotImplementedError

    def may_rest(self, place: Place) -> bool:
        """Whether packed copies serve a model at `place`."""
        raise NotImplementedError

    def weights_changed(self) -> None:
        """Called when weights are moved, cast or loaded: what was made of them is to be freed."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the convolutions compute."""
        return (self._placed or self.registered_place())[1]

    @property
    def device(self) -> torch.device:
        """Where images and latents must be."""
        return (self._placed or self.registered_place())[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        probe = fn(torch.empty(0, device=self.device, dtype=self.dtype))
        place = (probe.device, probe.dtype)
        # weights that rest may do so on the CPU too, until something computes with them there
        rests = self.may_rest(place) or (self._placed is not None and place[0].type == "cpu")
        if rests and place == self._placed:
            return self
        if recurse:
            for module in self._weight_modules().values():
                module._apply(self._mover(fn, place, rests))
        # what is left are statistics: they stay in float32, and go along
        super()._apply(at_least_float32(fn), recurse=False)
        self._placed = place if rests else None
        self.weights_changed()
        _settle(self)
        return self

    def _mover(self, fn: Callable[[Tensor], Tensor], place: Place, rests: bool) -> Callable[[Tensor], Tensor]:
        def to_rest(t: Tensor) -> Tensor:
            return fn(t).to("cpu") if t.is_meta else t.to("cpu")

        def wake(t: Tensor) -> Tensor:
            return fn(t).to(place[0], place[1] if t.is_floating_point() else None)

        if rests:
            return to_rest
        return fn if self._placed is None else wake

    def wake(self) -> None:
        """Register resting weights again, in the type and place in which the model computes."""
        if self._placed is None:
            return
        device, dtype = self._placed
        for module in self._weight_modules().values():
            module._apply(lambda t: t.to(device, dtype if t.is_floating_point() else None))
        self._placed = None
        _settle(self)

    def _weight_modules(self) -> dict[str, nn.Module]:
        found = {name: getattr(self, name) for name in self.weights}
        return {name: module for name, module in found.items() if module is not None}

    def _show(self) -> None:
        for name, module in self._weight_modules().items():
            self.__dict__.pop(name, None)
            self._modules[name] = module

    def _hide(self) -> None:
        for name, module in self._weight_modules().items():
            self._modules.pop(name, None)
            self.__dict__[name] = module

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module, resting weights included."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if recurse and self._placed is not None:
            for name, module in self._weight_modules().items():
                inner = f"{prefix}.{name}" if prefix else name
                yield from module.named_parameters(inner, recurse, remove_duplicate)

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._placed is not None:
            for name, module in self._weight_modules().items():
                module.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)

    def _load_from_state_dict(self, *args) -> None:
        # also called when a parent loads; its children are loaded next, and `_settle` ends it
        self.weights_changed()
        self._show()
        super()._load_from_state_dict(*args)


def _settle(module: PlacedModule, _keys: object = None) -> None:
    """Register the weights, or take them out, as the state of the module says; hook after `load_state_dict`."""
    if module._placed is None:
        module._show()
    else:
        module._hide()
