"""Which backend serves a model, and the life of the Triton backend: made on first use, warmed up, counted, freed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..checks import IMAGE_DTYPES, LATENT_DTYPES, check_choice, check_dtype
from ..config import FullCapacitorInferenceConfig, ModelConfig
from ..errors import InputError
from . import ops
from .placement import Place, PlacedModule
from .stats import Stats

if TYPE_CHECKING:
    from .runtime import Runtime

BACKENDS = ("auto", "torch", "triton")
DIRECTIONS = ("encode", "posterior", "decode")
HALF_DTYPES = (torch.bfloat16, torch.float16)
_making_runtime = threading.Lock()


class ServedModule(PlacedModule):
    """A module whose weights are packed by the Triton backend wherever that serves.

    Args:
        config: architecture.
        backend: "auto", "torch" or "triton".

    Raises:
        InputError: an unknown backend.
    """

    encoder: torch.nn.Module | None

    def __init__(self, config: ModelConfig, backend: str):
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        self.config = config
        self.backend = backend
        self._runtime: Runtime | None = None
        self._number = ops.register(self)

    def check_size(self, height: int, width: int) -> None:
        """Raise InputError unless `height` x `width` pixels can be encoded."""
        raise NotImplementedError

    def may_rest(self, place: Place) -> bool:
        return place[0].type in ("cuda", "cpu") and self._resolve(*place) == "triton"

    def weights_changed(self) -> None:
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            runtime.clear()

    def _resolve(self, device: torch.device, dtype: torch.dtype) -> str:
        """The backend that is to serve `device` and `dtype`."""
        if self.backend != "auto":
            return self.backend
        config = self.config
        fits = config.in_channels == 3 and config.depthwise_kernel_size == 7 and dtype in HALF_DTYPES
        return "triton" if fits and device.type == "cuda" and _launches_run_on(device) else "torch"

    @property
    def _fast(self) -> bool:
        """Whether the Triton backend serves; plain enough for torch.compile to see through."""
        if self.backend == "auto":
            return self._placed is not None and self._placed[0].type == "cuda"
        return self.backend == "triton"

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
                    self._runtime = Runtime(self, self.device, self.dtype)
        return self._runtime

    def __getstate__(self) -> dict:
        # graphs and packed weights are made anew where the copy runs
        return self.__dict__ | {"_runtime": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._number = ops.register(self)

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
        """Fold weights, compile launches and capture graphs for calls to come; nothing to do for the torch backend.

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
        if not self._fast:
            return
        if self.config.latent_patch != 1:
            # these models whiten by a step of its own, in float32
            direction = "posterior" if direction == "encode" else direction
            image_dtype = torch.float32 if direction == "decode" else image_dtype
        for height, width, batch in shapes:
            self.runtime.warmup(direction, batch, height, width, image_dtype, layout, inference_config)

    def _offload_hook(self) -> None:
        """Let accelerate's offloading, which hooks `forward`, also bring the model here for `encode` and `decode`."""
        hook = self.__dict__.get("_hf_hook")
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self)


@functools.cache
def _launches_run_on(device: torch.device) -> bool:
    """Whether Triton is here and `device` an NVIDIA GPU that the launches support."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8
