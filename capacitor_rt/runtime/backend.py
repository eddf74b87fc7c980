"""Which backend serves a model, and the life of the Triton backend: made on first use, warmed up, counted, freed."""

from __future__ import annotations

import dataclasses
import operator
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

from ..checks import IMAGE_DTYPES, LATENT_DTYPES, check_choice, check_dtype, odd_range
from ..config import FullCapacitorInferenceConfig, ModelConfig
from ..diffusion import token_mask
from ..errors import InputError, NotFoldableError
from ..reference import Autoencoder
from . import ops
from .as_loaded import AsLoaded
from .memory import DeviceMemoryError, is_out_of_memory
from .options import ServingOptions
from .platform import build_failure, why_not_triton
from .start_noise import StartNoise
from .stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Self

    from .fold_fp8 import Ranges
    from .runtime import Runtime

BACKENDS = ("auto", "torch", "triton")
DIRECTIONS = ("encode", "posterior", "decode")
HALF_DTYPES = (torch.bfloat16, torch.float16)
_making_runtime = threading.Lock()
_requires_grad = operator.attrgetter("requires_grad")
Result = TypeVar("Result")


class _Switch:
    """A setting of `ServingOptions` as an attribute of a model; the runtime looks at it again when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, model: None, owner: type) -> _Switch: ...

    @overload
    def __get__(self, model: ServedAutoencoder, owner: type) -> bool: ...

    def __get__(self, model: ServedAutoencoder | None, owner: type) -> _Switch | bool:
        return self if model is None else getattr(model._options, self._name)

    def __set__(self, model: ServedAutoencoder, value: bool) -> None:
        setattr(model._options, self._name, value)
        if self._name != "low_latency":
            # which is looked at in every call
            model._drop_runtime()


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

    cuda_graphs = _Switch()
    """Whether CUDA graphs are captured and replayed."""
    overlap = _Switch()
    """Whether the halves of an even batch are two branches of its graph."""
    narrow_tiles = _Switch()
    """Whether few images are run by narrower tiles of the same bits."""
    dependent_launch = _Switch()
    """Whether each launch starts while the one before is at its end."""
    low_latency = _Switch()
    """Whether a single image is run by launches shaped for it."""

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
        self._start_noise = StartNoise()
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

    def release(self) -> None:
        """Free CUDA graphs, arenas and packed weights, which a trainer cannot see; the next call makes them anew.

        The memory goes back to torch's allocator. Weights that a graph of the caller's reads stay with the model.
        """
        self._drop_runtime()
        self._start_noise.clear()

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
        """What packed weights are folded from: the tensors as loaded, or this model once its values differ from
        them.
        """
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
        """Start noise `shape`, float32."""
        seed, source = inference.seed, inference.noise
        if seed is not None and torch.compiler.is_compiling():
            return torch.ops.capacitor_rt.seeded_noise(like, list(shape), seed, source)
        return self._start_noise.draw(shape, seed, source, like.device)

    def _dropped(self, like: Tensor, seed: int | None) -> Tensor:
        """Tokens that guidance by tokens leaves out, for the whole batch of latents."""
        if like.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InputError(
                "the tokens that guidance leaves out are drawn on the CPU, which a CUDA graph that is being captured "
                "cannot do: pass dropped="
            )
        ratio = self.config.dico.pdg_mask_ratio if self.config.dico is not None else 0.0
        return token_mask(like.shape, ratio, seed, like.device)

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
        """Why a call has to be differentiable, with the way out; None where no gradient is asked for."""
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
        return self.__dict__ | {
            "_runtime": None,
            "_lent": [],
            "_start_noise": StartNoise(),
            "_as_loaded": self._intact(),
        }

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
