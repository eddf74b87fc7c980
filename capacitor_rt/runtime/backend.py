"""Which backend serves a model, and the life of the Triton backend: made on first use, warmed up, counted, freed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import IMAGE_DTYPES, LATENT_DTYPES, check_choice, check_dtype
from ..config import FullCapacitorInferenceConfig, ModelConfig
from ..errors import InputError
from ..reference import Autoencoder
from . import ops
from .as_loaded import AsLoaded
from .stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Self

    from .runtime import Runtime

BACKENDS = ("auto", "torch", "triton")
DIRECTIONS = ("encode", "posterior", "decode")
HALF_DTYPES = (torch.bfloat16, torch.float16)
_making_runtime = threading.Lock()


class ServedAutoencoder(Autoencoder):
    """An autoencoder whose calls the Triton backend serves wherever it can.

    The parameters are those of any module. The Triton backend has folded and packed copies of them beside it, made when
    first needed; changes of the parameters in place, moves, casts and loads are noticed.

    Args:
        config: architecture.
        backend: "auto", "torch" or "triton".
        low_latency: run a single image by launches shaped for it.

    Raises:
        InputError: an unknown backend.
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto", low_latency: bool = False):
        super().__init__(config)
        self._low_latency = low_latency
        self._as_loaded: AsLoaded | None = None
        self._runtime: Runtime | None = None
        self._number = ops.register(self)
        self.backend = backend
        self.register_load_state_dict_post_hook(_loaded)

    @property
    def backend(self) -> str:
        """ "auto", "torch" or "triton", as asked for."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        check_choice("backend", name, BACKENDS)
        self._backend = name
        self._settle()

    @property
    def runtime(self) -> Runtime | None:
        """The Triton backend where it serves, made on first use; None where the torch backend does.

        Raises:
            InputError: the Triton backend was asked for where it cannot run.
        """
        if self._runtime is None and self._fast:
            from .runtime import Runtime

            with _making_runtime:
                if self._runtime is None:
                    self._runtime = Runtime(self, self.device, self.dtype, ServedAutoencoder.to_fold)
                    self._runtime.low_latency = self._low_latency
        return self._runtime

    @property
    def low_latency(self) -> bool:
        """Whether a single image is run by launches shaped for it."""
        return self._low_latency

    @low_latency.setter
    def low_latency(self, value: bool) -> None:
        self._low_latency = value
        if self._runtime is not None:
            self._runtime.low_latency = value

    @property
    def triton(self) -> Runtime:
        """The Triton backend, for calls that it serves."""
        runtime = self.runtime
        if runtime is None:
            raise InputError(f"the torch backend serves this model on {self.device}: use backend='triton'")
        return runtime

    def load_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        """Hold a checkpoint's tensors in float32, frozen.

        Packed weights are folded from the tensors as they are, for as long as the parameters have their values: so they
        are rounded once, whatever type the parameters are cast to.
        """
        self.hold({name: t.float() for name, t in tensors.items()})
        self._as_loaded = AsLoaded(self, tensors)

    def to_fold(self) -> Autoencoder:
        """What packed weights are folded from: the tensors as loaded, or this model once they are not its values."""
        loaded = self._intact()
        return self if loaded is None else loaded.model(self.config)

    def _intact(self) -> AsLoaded | None:
        """The tensors as loaded, while they are the parameters' values."""
        loaded = self._as_loaded
        return loaded if loaded is not None and loaded.holds(self) else None

    def stats(self) -> Stats:
        """Counters of the Triton backend since the model was last moved, cast or loaded (a copy)."""
        return Stats() if self._runtime is None else dataclasses.replace(self._runtime.stats)

    def warmup(
        self,
        shapes: Iterable[tuple[int, int, int]],
        *,
        direction: str = "encode",
        image_dtype: torch.dtype = torch.float32,
        layout: str = "nchw",
        inference_config: FullCapacitorInferenceConfig | None = None,
    ) -> None:
        """Fold weights, compile kernels and capture graphs for calls to come; nothing to do for the torch backend.

        A graph is otherwise captured by the first call of its shape. Torch's own generator must not be drawn from by
        other threads in the meantime: warm up before starting such threads, and before capturing graphs that call the
        model.

        Args:
            shapes: `(H, W, B)` of the images, H and W in pixels.
            direction: "encode", "posterior" (for `encode_posterior`) or "decode".
            image_dtype: of the images; of the latents in decoding.
            layout: "nchw" or "nhwc", of the images in memory.
            inference_config: sampler settings of "decode".

        Raises:
            InputError: a size, batch, dtype or name that the call itself would refuse.
        """
        check_choice("direction", direction, DIRECTIONS)
        check_choice("layout", layout, ("nchw", "nhwc"))
        check_dtype("image_dtype", image_dtype, LATENT_DTYPES if direction == "decode" else IMAGE_DTYPES)
        if direction != "decode" and self.encoder is None:
            raise InputError("this checkpoint has a decoder only: warm up direction='decode'")
        shapes = list(shapes)
        for height, width, batch in shapes:
            self.check_size(height, width)
            if batch < 1:
                raise InputError(f"batch {batch} of shape {(height, width, batch)} is too small: it is at least 1")
        runtime = self.runtime
        if runtime is None:
            return
        if self.config.latent_patch != 1:
            # these models whiten by a step of its own, in float32
            direction = "posterior" if direction == "encode" else direction
            image_dtype = torch.float32 if direction == "decode" else image_dtype
        for height, width, batch in shapes:
            runtime.warmup(direction, batch, height, width, image_dtype, layout, inference_config)

    def check_size(self, height: int, width: int) -> None:
        """Raise InputError unless `height` x `width` pixels can be encoded."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before, loaded = (self.device, self.dtype), self._intact()
        super()._apply(fn, recurse)
        if loaded is not None:
            # the same values, elsewhere or rounded
            loaded.watch(self)
        self._as_loaded = loaded
        if (self.device, self.dtype) != before:
            self._drop_runtime()
        self._settle()
        return self

    def _settle(self) -> None:
        """Decide who serves; kept as a plain attribute, which torch.compile sees through."""
        self._fast: bool = self._serving(self.device, self.dtype) == "triton"
        if not self._fast:
            self._drop_runtime()

    def _serving(self, device: torch.device, dtype: torch.dtype) -> str:
        """The backend that is to serve `device` and `dtype`."""
        if self._backend != "auto":
            return self._backend
        config = self.config
        fits = config.in_channels == 3 and config.depthwise_kernel_size == 7 and dtype in HALF_DTYPES
        return "triton" if fits and device.type == "cuda" and _launches_run_on(device) else "torch"

    def _drop_runtime(self) -> None:
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            runtime.clear()

    def _offload_hook(self) -> None:
        """Let accelerate's offloading, which hooks `forward`, also bring the model here for `encode` and `decode`."""
        hook = self.__dict__.get("_hf_hook")
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self)

    def __getstate__(self) -> dict[str, Any]:
        # graphs and packed weights are made anew where the copy runs
        return self.__dict__ | {"_runtime": None, "_as_loaded": self._intact()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = ops.register(self)
        if self._as_loaded is not None:
            self._as_loaded = self._as_loaded.copied(self)


def _loaded(model: ServedAutoencoder, _keys: object) -> None:
    """Hook after `load_state_dict`: other values, possibly of another type or elsewhere."""
    model._as_loaded = None
    model._drop_runtime()
    model._settle()


@functools.cache
def _launches_run_on(device: torch.device) -> bool:
    """Whether Triton is here and `device` an NVIDIA GPU that the launches support."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8
