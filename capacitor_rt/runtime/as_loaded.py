"""A checkpoint's tensors as they were read, beside a model that holds their values in another type or place."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..reference import Autoencoder

if TYPE_CHECKING:
    from typing_extensions import Self


class Watch:
    """Notices changes of a module's tensors: other tensors or memory, or the same edited in place.

    Edits in place through `.data`, and of tensors made under `torch.inference_mode`, leave no trace and go unnoticed.
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
        self._versions = list(map(_version_of, self._tracked))
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def sees_change(self, module: nn.Module | None) -> bool:
        """Whether `module` is not the one that was seen, or not as it was."""
        # made on every call, so without a loop in Python
        return (
            module is not self._module
            or list(map(_version_of, self._tracked)) != self._versions
            or not all(map(operator.is_, map(dict.get, self._owners, self._names), self._tensors))
            or list(map(Tensor.data_ptr, self._tensors)) != self._addresses
        )


_version_of = operator.attrgetter("_version")


class AsLoaded:
    """Tensors that a model was loaded with; on the CPU, memory-mapped where the file allows, only read.

    They stand for the model's parameters until those are edited or replaced: moves and casts keep the values, the
    latter rounded, which is why what is folded starts from these.
    """

    def __init__(self, model: Autoencoder, tensors: dict[str, Tensor]):
        self._tensors = tensors
        self._twin: Autoencoder | None = None
        self.watch(model)

    def watch(self, model: Autoencoder) -> None:
        """Take the model's parameters as they are now for the tensors' values."""
        self._watch = Watch(model)

    def holds(self, model: Autoencoder) -> bool:
        """Whether the tensors are still the values of `model`."""
        return not self._watch.sees_change(model)

    def model(self, config: ModelConfig) -> Autoencoder:
        """An autoencoder that holds the tensors."""
        if self._twin is None:
            with torch.device("meta"):
                twin = Autoencoder(config)
            twin.hold(self._tensors)
            self._twin = twin
        return self._twin

    def copied(self, model: Autoencoder) -> AsLoaded | None:
        """The same for a copy of the model, where the tensors came along."""
        return AsLoaded(model, self._tensors) if self._tensors else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # the tensors are only read, so copies share them
        twin = object.__new__(type(self))
        twin.__dict__ |= self.__dict__ | {"_watch": None}
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # another process has no such memory map; it folds the parameters
        return {"_tensors": {}, "_twin": None, "_watch": None}
