"""Which backend serves a model, and the life of the Triton backend: made on first use, warmed up, counted, freed."""

from __future__ import annotations

import dataclasses
import operator
import threading
import warnings
from collections.abc import Callable, Iterable
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..checks import IMAGE_DTYPES, LATENT_DTYPES, check_choice, check_dtype, odd_range
from ..config import FullCapacitorInferenceConfig, ModelConfig
from ..diffusion import token_mask, unit_noise
from ..errors import InputError, NotFoldableError
from ..reference import Autoencoder
from . import ops
from .as_loaded import AsLoaded
from .memory import DeviceMemoryError, amount, free_bytes, is_out_of_memory
from .options import ServingOptions
from .platform import build_failure, why_not_triton
from .stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Self

    from .fold_fp8 import Ranges
    from .runtime import Runtime

BACKENDS = ("auto", "torch", "triton")
DIRECTIONS = ("encode", "posterior", "decode")
HALF_DTYPES = (torch.bfloat16, torch.float16)
NOISE_BYTES = 256 << 20
"""Of start noise kept for seeds that come again."""
_making_runtime = threading.Lock()
_drawing = threading.RLock()
_requires_grad = operator.attrgetter("requires_grad")
Result = TypeVar("Result")


class ServedAutoencoder(Autoencoder):
    """An autoencoder whose calls the Triton backend serves wherever it can.

    The parameters are those of any module. The Triton backend has folded and packed copies of them beside it, made when
    first needed; changes of the parameters in place, moves, casts and loads are noticed.

    Args:
        config: architecture.
        backend: "auto", "torch" or "triton".
        low_latency, cuda_graphs, overlap, memory_budget, narrow_tiles, dependent_launch: see
            `options.ServingOptions`.

    Raises:
        InputError: an unknown backend, or a bad budget.
    """

    _fast: bool

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: str = "auto",
        low_latency: bool = False,
        cuda_graphs: bool = True,
        overlap: bool = False,
        memory_budget: int | None = None,
        narrow_tiles: bool = True,
        dependent_launch: bool = False,
    ):
        super().__init__(config)
        self._options = ServingOptions(low_latency, cuda_graphs, overlap, memory_budget, narrow_tiles, dependent_launch)
        # weights that graphs of callers read: they stay as long as the model
        self._lent: list[Any] = []
        self._said: set[str] = set()
        self._looked = False
        self._drawn: dict[Any, Tensor] = {}
        self._as_loaded: AsLoaded | None = None
        self._runtime: Runtime | None = None
        # of an encoder in e4m3
        self._fp8_ranges: Ranges | None = None
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
            why = why_not_triton(self.device)
            if why is not None:
                raise InputError(f"{why}, or use backend='torch'")
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    if torch.cuda.is_current_stream_capturing():
                        raise InputError(
                            "this model has not run yet, and weights cannot be folded, nor kernels compiled, while a "
                            "CUDA graph is being captured: call it once with the same shape, or warmup(), before that"
                        )
            from .first_contact import few_images, first_contact, fp8_contact
            from .runtime import Runtime

            why = first_contact(self.device, self.dtype) if self._backend == "auto" else None
            if why is None and self._backend == "auto" and self._fp8_ranges is not None:
                why = fp8_contact(self.device, self.dtype)
            if why is not None:
                self._leave_to_torch(why)
                return None
            ask = self._backend == "auto"
            narrow = self._options.narrow_tiles and few_images(self.device, self.dtype, ask) is None
            if narrow and self._fp8_ranges is not None:
                narrow = few_images(self.device, self.dtype, ask, fp8=True) is None
            with _making_runtime:
                if self._runtime is None:
                    place = (self.device, self.dtype)
                    to_fold, ranges = ServedAutoencoder.to_fold, self._fp8_ranges
                    self._runtime = Runtime(self, *place, self._options, to_fold, self._lent, ranges)
                    self._runtime.narrow = narrow and self._runtime.narrow
        return self._runtime

    @property
    def cuda_graphs(self) -> bool:
        """Whether CUDA graphs are captured and replayed."""
        return self._options.cuda_graphs

    @cuda_graphs.setter
    def cuda_graphs(self, value: bool) -> None:
        self._options.cuda_graphs = value
        self._drop_runtime()

    @property
    def overlap(self) -> bool:
        """Whether the halves of an even batch are two branches of its graph."""
        return self._options.overlap

    @overlap.setter
    def overlap(self, value: bool) -> None:
        self._options.overlap = value
        self._drop_runtime()

    @property
    def narrow_tiles(self) -> bool:
        """Whether few images are run by narrower tiles of the same bits."""
        return self._options.narrow_tiles

    @narrow_tiles.setter
    def narrow_tiles(self, value: bool) -> None:
        self._options.narrow_tiles = value
        self._drop_runtime()

    @property
    def dependent_launch(self) -> bool:
        """Whether each launch starts while the one before is at its end."""
        return self._options.dependent_launch

    @dependent_launch.setter
    def dependent_launch(self, value: bool) -> None:
        self._options.dependent_launch = value
        self._drop_runtime()

    @property
    def low_latency(self) -> bool:
        """Whether a single image is run by launches shaped for it."""
        return self._options.low_latency

    @low_latency.setter
    def low_latency(self, value: bool) -> None:
        self._options.low_latency = value

    def release(self) -> None:
        """Free CUDA graphs, arenas and packed weights, which lie outside of a trainer's sight; a call makes them anew.

        The memory goes back to torch's allocator. Weights that a graph of the caller's reads stay with the model.
        """
        self._drop_runtime()
        with _drawing:
            self._drawn.clear()

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

    @property
    def is_as_loaded(self) -> bool:
        """Whether the parameters are those of the checkpoint, moved or cast at most; those are then what is folded."""
        return self._intact() is not None

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
        runtime.warmup(direction, shapes, image_dtype, layout, inference_config)

    def _by_triton(self, part: str, given: Tensor, call: Callable[[Runtime], Result]) -> Result | None:
        """What the Triton backend makes of a call to "encoder" or "decoder"; None where torch is to serve it.

        Raises:
            InputError: backend="triton" was asked for, and cannot do this.
        """
        if not self._fast:
            return None
        runtime, reason = self.runtime, self._why_differentiable(part, given)
        if runtime is None:
            return None
        if reason is None:
            try:
                with torch.no_grad():
                    return call(runtime)
            except Exception as error:
                if is_out_of_memory(error) and not isinstance(error, DeviceMemoryError):
                    raise DeviceMemoryError(
                        f"memory ran out on {self.device} in a call of {given.shape[0]} to the {part}: free some "
                        f"there, or pass fewer at a time ({error})"
                    ) from error
                reason = str(error) if isinstance(error, NotFoldableError) else build_failure(error)
                if self.backend == "triton" or reason is None:
                    raise
                if not isinstance(error, NotFoldableError):
                    self._leave_to_torch(reason)
                    return None
        elif self.backend == "triton":
            raise InputError(f"{reason}, and the Triton backend has no backward pass")
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"torch serves this call: {reason}", stacklevel=3)
        return None

    def _leave_to_torch(self, reason: str) -> None:
        """Serve by torch until the model is moved, cast or loaded, and say why."""
        self._fast = False
        self._drop_runtime()
        warnings.warn(f"torch serves this model: {reason}", stacklevel=4)

    def _traced(self, given: Tensor) -> bool:
        """Whether torch.compile or torch.export is to see one of our operators in place of a call."""
        return self._fast and torch.compiler.is_compiling() and self._why_differentiable("", given) is None

    def _noise(self, shape: tuple[int, ...], inference: FullCapacitorInferenceConfig, like: Tensor) -> Tensor:
        """Start noise; that of a seed and shape is kept, since drawing it costs more than a decode."""
        seed, source = inference.seed, inference.noise
        if seed is not None and torch.compiler.is_compiling():
            return torch.ops.capacitor_rt.seeded_noise(like, list(shape), seed, source)
        try:
            if seed is None or like.device.type != "cuda":
                return unit_noise(shape, seed, like.device, source)
            return self._noise_of_a_seed((shape, seed, source), like.device)
        except torch.OutOfMemoryError as error:
            with _drawing:
                self._drawn.clear()
            raise DeviceMemoryError(
                f"the noise for {shape[0]} images of {shape[2]}x{shape[3]} needs {amount(4 * prod(shape))}, and "
                f"{amount(free_bytes(like.device))} are free on {like.device}: decode fewer at a time"
            ) from error

    def _dropped(self, like: Tensor, seed: int | None) -> Tensor:
        """Tokens that guidance by tokens leaves out, for the whole batch of latents."""
        if like.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InputError(
                "the tokens that guidance leaves out are drawn on the CPU, which a CUDA graph that is being captured "
                "cannot do: pass dropped="
            )
        ratio = self.config.dico.pdg_mask_ratio if self.config.dico is not None else 0.0
        return token_mask(like.shape, ratio, seed, like.device)

    def _noise_of_a_seed(self, what: tuple[tuple[int, ...], int, str], device: torch.device) -> Tensor:
        """Noise of a (shape, seed, source) on a GPU, kept by stream: another one would have to wait for the copy."""
        with _drawing:
            if torch.cuda.is_current_stream_capturing():
                # a copy that is captured reads its source at every replay: better what is there already
                kept = next((noise for (known, _), noise in self._drawn.items() if known == what), None)
                if kept is not None:
                    self._lent.append(kept)
                    return kept
                return unit_noise(*what[:2], device, what[2])
            key = (what, torch.cuda.current_stream(device))
            if key not in self._drawn:
                nbytes = 4 * prod(what[0])
                while self._drawn and nbytes + sum(t.nbytes for t in self._drawn.values()) > NOISE_BYTES:
                    self._drawn.pop(next(iter(self._drawn)))
                self._drawn[key] = unit_noise(*what[:2], device, what[2])
            return self._drawn[key]

    def _look_once(self, image: Tensor) -> None:
        """Warn of float images in another range than [-1,1], by the first one; so a GPU is waited for once."""
        if self._looked or torch.compiler.is_compiling() or image.is_meta or not image.numel():
            return
        if image.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._looked = True
        try:
            odd = odd_range(image)
        except torch.OutOfMemoryError:
            return
        if odd is not None:
            warnings.warn(f"image {odd} (said once per model)", stacklevel=4)

    def _why_differentiable(self, part: str, given: Tensor) -> str | None:
        """Why a call has to be differentiable, with the way out; None where nobody asks for gradients."""
        if not torch.is_grad_enabled():
            return None
        if given.requires_grad:
            return "an input requires grad: pass it through .detach() if it need not"
        if torch.compiler.is_compiling():
            return None
        if part not in self._parameters_of:
            self._parameters_of[part] = tuple(getattr(self, part).parameters())
        if any(map(_requires_grad, self._parameters_of[part])):
            return f"parameters of the {part} require grad: freeze them by requires_grad_(False), or use no_grad()"
        return None

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
        self._parameters_of: dict[str, tuple[torch.nn.Parameter, ...]] = {}
        self._fast = self._serving(self.device, self.dtype) == "triton"
        if not self._fast:
            self._drop_runtime()

    def _serving(self, device: torch.device, dtype: torch.dtype) -> str:
        """The backend that is to serve `device` and `dtype`."""
        if self._backend != "auto":
            return self._backend
        config = self.config
        fits = config.in_channels == 3 and config.depthwise_kernel_size == 7 and dtype in HALF_DTYPES
        return "triton" if fits and device.type == "cuda" and why_not_triton(device) is None else "torch"

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
        return self.__dict__ | {"_runtime": None, "_lent": [], "_drawn": {}, "_as_loaded": self._intact()}

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
