"""The Triton backend of one model on one device: plans, micro-batches, graphs, and what to do when memory runs out."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from capacitor_kernels.launch import INTERPRETED

from ..config import FullCapacitorInferenceConfig
from ..diffusion import sample
from ..errors import InputError
from ..reference import Autoencoder, Posterior
from . import weights
from .batching import ARENA_BUDGET, Limits, branches, cached_plan, parts
from .fold_fp8 import Ranges
from .graphs import Bound, BoundCache
from .memory import MIB, DeviceMemoryError, amount, copy_into, free_bytes, is_out_of_memory, new_arena, retire
from .options import ServingOptions
from .plan import LaunchPlan, PlanKey
from .precompile import precompile
from .stats import Stats
from .supported import check_dependent_launch, check_fp8, check_model

CACHE_BUDGET = 2048 * MIB
"""Bytes of all arenas; at most an eighth of the device's memory."""
# the interpreter keeps its state in globals
_interpreter = threading.RLock()


class Runtime:
    """Runs a model by the Triton launches. Calls from several threads take turns; any current stream will do.

    Args:
        model: whose tensors are folded when first needed; they are only read, and held weakly.
        device: a CUDA device, or the CPU under Triton's interpreter.
        dtype: of packed weights and activations.
        options: looked at when the runtime is made, and for `low_latency` at every call.
        to_fold: from `model` to the one whose tensors are folded, where that is another.
        lent: where packed weights are kept that a caller's graph reads.
        ranges: of a calibration of these weights: the encoder then runs in e4m3.

    Attributes:
        stats: counters.
        narrow: whether few images are run by narrower tiles; it may be turned off before the first call.

    Raises:
        InputError: a model, device or dtype that the launches do not take.
    """

    def __init__(
        self,
        model: Autoencoder,
        device: torch.device,
        dtype: torch.dtype,
        options: ServingOptions | None = None,
        to_fold: Callable[[Any], Autoencoder] = lambda model: model,
        lent: list[Any] | None = None,
        ranges: Ranges | None = None,
    ):
        self.cc = check_model(model.config, device, dtype)
        self.options = options or ServingOptions()
        if self.options.dependent_launch:
            check_dependent_launch(self.cc)
        if ranges is not None:
            check_fp8(self.cc)
        self._precision = None if ranges is None else "fp8"
        self.config, self.device, self.dtype = model.config, device, dtype
        self.stats = Stats()
        # the interpreter's products are numpy's, whose sums follow no instruction
        self.narrow = self.options.narrow_tiles and not INTERPRETED
        self._cuda = device.type == "cuda"
        budget = self.options.memory_budget or CACHE_BUDGET
        if self._cuda and self.options.memory_budget is None:
            budget = min(budget, torch.cuda.get_device_properties(device).total_memory // 8)
        self._arena_budget = min(ARENA_BUDGET, budget)
        self._cache = BoundCache(device, budget, self._arena_budget, self.stats, self.options.cuda_graphs)
        # bound to the cache, not to this object: a cycle would keep GPU memory until the next collection
        forget = partial(_forget, self._cache)
        lent = [] if lent is None else lent
        self._weights = weights.PackedWeights(model, device, dtype, self.stats, to_fold, forget, lent, ranges)
        self._limits = Limits(self.config, self._arena_budget)
        # keys of plans that ran: their kernels are compiled and loaded
        self._ran: set[PlanKey] = set()
        # of plans most of whose kernels are those of others that ran
        self._kinds: set[tuple[Any, ...]] = set()
        self._lock = threading.RLock() if self._cuda else _interpreter
        self._done = torch.cuda.Event() if self._cuda else None
        self._last = _LastStream()
        weakref.finalize(self, _end, self._cache, self._weights, self._last).atexit = False

    def encode(self, image: Tensor, out: Tensor | None = None) -> Tensor:
        """Whitened latents of a checked image, float32 `[B,Z,h,w]` of the bottleneck's shape, or `out`."""
        return self._image("encode", image, {} if out is None else {"latents": out})["latents"]

    def posterior(self, image: Tensor) -> Posterior:
        """Raw posterior of a checked image."""
        out = self._image("posterior", image, {})
        return Posterior(out["mean"], out.get("logsnr"))

    def decode(
        self,
        latents: Tensor,
        noise: Tensor,
        inference: FullCapacitorInferenceConfig,
        out: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Image of checked latents `[B,Z,h,w]` (whitened, or raw where whitening is not folded) and unit noise.

        `dropped [B,1,h,w]` are the tokens that guidance by tokens leaves out.
        """
        settings = replace(inference, seed=None, noise="cpu")
        if inference.num_steps <= weights.MAX_TIMES:
            return self._latents("decode", latents, noise, settings, None, out, dropped)

        # too many times to hold all their weights: one step after another, folding as it goes
        def predict(x: Tensor, t: float) -> Tensor:
            return self._latents("predict", latents, x, settings, t, None, dropped)

        image = sample(predict, noise, self.config, inference)
        return image if out is None else copy_into(out, image)

    def warmup(
        self,
        direction: str,
        shapes: Iterable[tuple[int, int, int]],
        image_dtype: torch.dtype,
        layout: str,
        inference: FullCapacitorInferenceConfig | None,
    ) -> None:
        """Compile, bind and capture what calls of these `(H, W, B)` will use: their micro-batches and tails."""
        at = None
        if direction == "decode":
            inference = replace(inference or FullCapacitorInferenceConfig(), seed=None, noise="cpu")
            layout = "nchw"
            if inference.num_steps > weights.MAX_TIMES:
                direction, at = "predict", 1.0
        else:
            inference = None
        keys = [self._key(direction, b, h, w, image_dtype, layout, inference, at) for h, w, b in shapes]
        with self._turn():
            if self._cuda:
                runs = {replace(key, batch=n): None for key in keys for n in parts(key.batch, self._limits.images(key))}
                precompile([self._plan(key)[0] for key in runs if key not in self._ran], self.stats)
            for key in keys:
                for _ in self._split(key):
                    pass

    def clear(self) -> None:
        """Free graphs, arenas and packed weights; limits learnt from running out of memory are forgotten."""
        with self._turn():
            self._drop_all()
            self._limits.clear()

    # one call

    def _key(
        self,
        direction: str,
        batch: int,
        height: int,
        width: int,
        image_dtype: torch.dtype,
        layout: str,
        inference: FullCapacitorInferenceConfig | None = None,
        at: float | None = None,
    ) -> PlanKey:
        use = "latency" if batch == 1 and self.options.low_latency else "throughput"
        size = batch, height, width
        key = PlanKey(direction, *size, self.dtype, image_dtype, layout, self.cc, use, inference, at)
        key = replace(key, narrow=self.narrow, dependent=self.options.dependent_launch)
        return replace(key, precision=self._precision) if direction in ("encode", "posterior") else key

    def _image(self, direction: str, image: Tensor, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        image, layout = as_it_lies(image)
        height, width = image.shape[2:] if layout == "nchw" else image.shape[1:3]
        key = self._key(direction, image.shape[0], height, width, image.dtype, layout)
        return self._run(key, {"image": image}, outputs)

    def _latents(
        self,
        direction: str,
        latents: Tensor,
        noise: Tensor,
        inference: FullCapacitorInferenceConfig,
        at: float | None,
        out: Tensor | None,
        dropped: Tensor | None,
    ) -> Tensor:
        batch, _, height, width = noise.shape
        key = self._key(direction, batch, height, width, latents.dtype, "nchw", inference, at)
        outputs = {} if out is None else {"image": out}
        inputs = {"latents": latents, "noise": noise} | ({} if dropped is None else {"dropped": dropped})
        return self._run(key, inputs, outputs)["image"]

    def _run(self, key: PlanKey, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as replays of one micro-batch and a tail, into the given outputs or fresh ones."""
        with self._turn():
            start = 0
            for bound in self._split(key):
                for executor, rows in bound.parts(start):
                    for name, static in executor.inputs.items():
                        static.copy_(inputs[name][rows])
                bound.run()
                self._count(bound)
                for executor, rows in bound.parts(start):
                    for name, static in executor.outputs.items():
                        if name not in outputs:
                            outputs[name] = self._output(key, bound.plan, name)
                        copy_into(outputs[name][rows], static)
                start += bound.key.batch
        return outputs

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time; a call on another stream waits for the one before to be done with the arenas."""
        on_device = torch.cuda.device(self.device) if self._cuda else nullcontext()
        # tensors that are kept must not be those of a caller's inference mode: they are written again later
        with self._lock, torch.inference_mode(False), torch.no_grad(), on_device:
            done = None if self._foreign_capture() else self._done
            if done is not None:
                torch.cuda.current_stream().wait_event(done)
            try:
                yield
            finally:
                if done is not None:
                    done.record()
                    self._last.stream = torch.cuda.current_stream()

    def _foreign_capture(self) -> bool:
        """Whether the caller is capturing a graph of its own on the current stream."""
        return self._cuda and torch.cuda.is_current_stream_capturing()

    def _split(self, key: PlanKey) -> Iterator[Bound]:
        """Bound plans for the parts of a batch, one after another; smaller ones when memory runs out."""
        self._refresh("encoder" if key.direction in ("encode", "posterior") else "decoder")
        left, freed = key.batch, False
        while left:
            batch = min(self._limits.images(key), left)
            part = key if batch == key.batch else replace(key, batch=batch)
            bound = self._bound(part)
            if bound is None:
                # the same once more without what is bound; then half of it
                self._cache.clear()
                free_bytes(self.device)
                if freed:
                    self._halve(part)
                freed = not freed
                continue
            freed = False
            yield bound
            self._limits.served(part)
            left -= batch

    def _bound(self, key: PlanKey) -> Bound | None:
        """The plan of `key`, bound and captured; None where memory ran out."""
        capturing = self._foreign_capture()
        bound = None if capturing else self._cache.find(key)
        if bound is not None:
            self._weights.touch(bound.plan)
            return bound
        started = time.perf_counter()
        plan, count = self._plan(key)
        if capturing:
            return self._bound_for_caller(key, plan, count)
        self._precompile(key, plan)
        try:
            packed = self._weights.of(plan)
        except DeviceMemoryError:
            # once more without what is bound
            self._cache.clear()
            free_bytes(self.device)
            packed = self._weights.of(plan)
        try:
            bound = Bound(key, plan, packed, self._cache.arena(count * plan.arena_bytes), count)
            # weights of single steps come and go, so no graph may keep their addresses
            if key.direction != "predict":
                self._cache.add(bound)
            if self._cuda and bound.graph is None and key not in self._ran:
                # compiles and loads kernels here, where memory that runs out can be mended
                bound.launch()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        self._ran.add(key)
        self.stats.capture_seconds += time.perf_counter() - started
        return bound

    def _precompile(self, key: PlanKey, plan: LaunchPlan) -> None:
        """The first plan of its kind has many kernels to compile, which its launches would do one after another."""
        kind = (key.direction, key.image_dtype, key.layout, key.use, key.batch == 1)
        if self._cuda and kind not in self._kinds:
            self._kinds.add(kind)
            precompile([plan], self.stats)

    def _plan(self, key: PlanKey) -> tuple[LaunchPlan, int]:
        """The plan of each branch of a run, and how many there are."""
        branch, count = branches(key, self.options.overlap)
        return cached_plan(self.config, branch), count

    def _bound_for_caller(self, key: PlanKey, plan: LaunchPlan, count: int) -> Bound:
        """Inside a caller's capture: plain launches, in memory that the caller's graph owns."""
        if key not in self._ran or not self._weights.ready_for(plan):
            raise InputError(
                f"this model has not run {key.direction} of {key.batch} images of {key.height}x"
                f"{key.width} in this form yet, and weights cannot be folded, nor kernels compiled, while a CUDA "
                "graph is being captured: call it once with the same shape, or warmup(), before the capture"
            )
        arena = new_arena(count * plan.arena_bytes, self.device)
        return Bound(key, plan, self._weights.lend(plan), arena, count)

    def _count(self, bound: Bound) -> None:
        if bound.graph is None:
            self.stats.eager += 1
        else:
            self.stats.replays += 1

    # memory

    def _halve(self, part: PlanKey) -> None:
        """Run half as many images of this shape together from now on, until there is room again."""
        if part.batch == 1:
            plan = cached_plan(self.config, part)
            raise DeviceMemoryError(
                f"{part.direction} of one {part.height}x{part.width} image needs {amount(plan.arena_bytes)} "
                f"beside the weights, and {amount(free_bytes(self.device))} are free on {self.device}, so that not "
                "even a micro-batch of 1 fits: free memory or use smaller images"
            )
        self._limits.halve(part)

    def _output(self, key: PlanKey, plan: LaunchPlan, name: str) -> Tensor:
        """A fresh output for the whole batch."""
        spec = plan.outputs[name]
        shape = (key.batch, *spec.shape[1:])
        with suppress(torch.OutOfMemoryError):
            return torch.empty(shape, dtype=spec.dtype, device=self.device)
        if not self._foreign_capture():
            # once more without what is bound, but for the plan that is running
            self._cache.clear()
            free_bytes(self.device)
        try:
            return torch.empty(shape, dtype=spec.dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            row = spec.nbytes // spec.shape[0]
            free = free_bytes(self.device)
            fits = "a smaller batch" if free is None else f"a batch of {free // row}"
            raise DeviceMemoryError(
                f"{name} of {key.batch} images need {amount(key.batch * row)}, and {amount(free)} are free on "
                f"{self.device}: {fits} would fit"
            ) from error

    # weights

    def _refresh(self, part: str) -> None:
        """Fold again where parameters were changed in place."""
        if not self._weights.stale(part):
            return
        if self._foreign_capture():
            raise InputError(
                f"parameters of the {part} changed, and weights cannot be folded while a CUDA graph is being "
                "captured: call the model once before the capture"
            )
        self._drop_all()

    def _drop_all(self) -> None:
        self._cache.clear()
        self._weights.clear()


class _LastStream:
    """The stream of the last call; each call waits for the one before, so it is behind all of them."""

    stream: torch.cuda.Stream | None = None


def _end(cache: BoundCache, packed: weights.PackedWeights, last: _LastStream) -> None:
    """When a runtime is freed, perhaps on another stream than its last call's, which may still be at work."""
    if last.stream is not None:
        retire([*cache.arenas(), *packed.tensors()], last.stream)


def _forget(cache: BoundCache, time: weights.Time) -> None:
    """Free the plans of weights that were freed: their graphs hold the addresses."""
    cache.drop(lambda plan: time in plan.times)


def as_it_lies(image: Tensor) -> tuple[Tensor, str]:
    """The image and its layout in memory: NHWC and channels_last images are taken as they lie."""
    if image.shape[1] != 3:
        return image, "nhwc"
    nhwc = image.permute(0, 2, 3, 1)
    return (nhwc, "nhwc") if nhwc.is_contiguous() and not image.is_contiguous() else (image, "nchw")
