"""The Triton backend of one model on one device: folded weights, plans, micro-batches, graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from capacitor_kernels.common import compute_capability

from ..config import FullCapacitorInferenceConfig
from ..diffusion import sample
from ..errors import InputError
from ..model import FullCapacitor, Posterior
from . import fold
from .graphs import Bound, BoundCache, Stats, new_arena
from .plan import Plan, Request, make_plan

MIB = 1 << 20
ARENA_BUDGET = 384 * MIB
"""Of one micro-batch's temporaries: 128 images of 256x256, or 32 of 512x512, in bfloat16."""
CACHE_BUDGET = 2048 * MIB
"""Of all graphs' arenas, inputs and outputs."""
MAX_TIMES = 8
"""Folded decoders kept, one per time (full_capacitor in bfloat16: about 120 MB each)."""


class Runtime:
    """Runs a model by the Triton launches. Calls from several threads take turns; any current stream will do.

    Args:
        model: whose tensors are folded when first needed; they are only read.
        device: a CUDA device, or the CPU under Triton's interpreter.
        dtype: of packed weights and activations.
    """

    def __init__(self, model: FullCapacitor, device: torch.device, dtype: torch.dtype):
        config = model.config
        if config.in_channels != 3 or config.depthwise_kernel_size != 7:
            raise InputError(
                f"the Triton backend takes 3 channels and 7x7 convolutions, this model has {config.in_channels} and "
                f"{config.depthwise_kernel_size}: use backend='torch'"
            )
        self.config, self.device, self.dtype = config, device, dtype
        try:
            self.cc = compute_capability(device)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.stats = Stats()
        self._cache = BoundCache(device, CACHE_BUDGET, self.stats)
        self._model = model
        self._encoder: dict[str, Tensor] | None = None
        self._decoders: OrderedDict[tuple[float, float], dict[str, Tensor]] = OrderedDict()
        self._limits: dict[tuple, int] = {}
        self._lock = threading.RLock()
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    def encode(self, image: Tensor) -> Tensor:
        """Whitened latents of a checked image, float32 `[B,Z,h,w]` (bottleneck shape, without 2x2 patches)."""
        return self._image("encode", image)["latents"]

    def posterior(self, image: Tensor) -> Posterior:
        """Raw posterior of a checked image."""
        out = self._image("posterior", image)
        return Posterior(out["mean"], out.get("logsnr"))

    def decode(self, latents: Tensor, noise: Tensor, inference: FullCapacitorInferenceConfig) -> Tensor:
        """Image of checked latents `[B,Z,h,w]` (whitened, or raw where whitening is not folded) and unit noise."""
        settings = replace(inference, seed=None)
        if inference.num_steps <= MAX_TIMES:
            return self._latents("decode", latents, noise, settings, None)

        # too many times to hold all their weights: one step after another, folding as it goes
        def predict(x: Tensor, t: float) -> Tensor:
            return self._latents("predict", latents, x, settings, t)

        return sample(predict, noise, self.config, inference)

    def warmup(self, request: Request) -> None:
        """Bind and capture what a call of this request will use: its micro-batch and its tail."""
        with self._turn():
            size = self._micro_batch(request)
            for batch in {min(size, request.batch), request.batch % size} - {0}:
                self._bind(replace(request, batch=batch))

    def clear(self) -> None:
        """Free graphs, arenas and packed weights."""
        with self._lock:
            self._cache.clear()
            self._encoder = None
            self._decoders.clear()
            self.stats.weight_nbytes = 0

    def request(
        self,
        direction: str,
        batch: int,
        height: int,
        width: int,
        *,
        image_dtype: torch.dtype,
        layout: str = "nchw",
        inference: FullCapacitorInferenceConfig | None = None,
        time: float | None = None,
    ) -> Request:
        """Key of a call: what the plan depends on."""
        use = "latency" if self._model.low_latency and batch == 1 else "throughput"
        return Request(direction, batch, height, width, self.dtype, image_dtype, layout, self.cc, use, inference, time)

    def _image(self, direction: str, image: Tensor) -> dict[str, Tensor]:
        image, layout = _dense(image)
        height, width = image.shape[2:] if layout == "nchw" else image.shape[1:3]
        request = self.request(direction, image.shape[0], height, width, image_dtype=image.dtype, layout=layout)
        return self._run(request, {"image": image})

    def _latents(
        self,
        direction: str,
        latents: Tensor,
        noise: Tensor,
        inference: FullCapacitorInferenceConfig,
        time: float | None,
    ) -> Tensor:
        batch, _, height, width = noise.shape
        request = self.request(
            direction, batch, height, width, image_dtype=latents.dtype, inference=inference, time=time
        )
        return self._run(request, {"latents": latents, "noise": noise})["image"]

    def _run(self, request: Request, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch as replays of one micro-batch and a tail, into fresh outputs."""
        outputs: dict[str, Tensor] = {}
        with self._turn():
            size = self._micro_batch(request)
            start = 0
            while start < request.batch:
                part = replace(request, batch=min(size, request.batch - start))
                try:
                    bound = self._bind(part)
                except torch.cuda.OutOfMemoryError as error:
                    size = self._smaller(part, error)
                    continue
                stop = start + part.batch
                for name, static in bound.inputs.items():
                    static.copy_(inputs[name][start:stop])
                bound.run()
                self._count(bound)
                for name, static in bound.outputs.items():
                    if name not in outputs:
                        outputs[name] = static.new_empty((request.batch, *static.shape[1:]))
                    outputs[name][start:stop].copy_(static)
                start = stop
        return outputs

    @contextmanager
    def _turn(self):
        """One call at a time; a call on another stream waits for the one before to be done with the static tensors."""
        on_device = torch.cuda.device(self.device) if self._done is not None else nullcontext()
        with self._lock, on_device:
            shared = self._done is not None and not self._foreign_capture()
            if shared:
                torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                if shared:
                    self._done.record()

    def _foreign_capture(self) -> bool:
        """Whether the caller is capturing a graph of its own on the current stream."""
        return self._done is not None and torch.cuda.is_current_stream_capturing()

    def _bind(self, request: Request) -> Bound:
        plan = make_plan(self.config, request)
        weights = self._weights(plan)
        if self._foreign_capture():
            # the caller's graph records plain launches, and owns the memory they use
            return Bound(plan, weights, new_arena(plan.arena_bytes, self.device), self.device)
        if request.direction == "predict":
            # its weights come and go, so no graph may keep their addresses
            return Bound(plan, weights, self._cache.arena(plan.arena_bytes), self.device)
        return self._cache.get(request, lambda arena: Bound(plan, weights, arena(plan.arena_bytes), self.device))

    def _count(self, bound: Bound) -> None:
        if bound.graph is None:
            self.stats.eager += 1
        else:
            self.stats.replays += 1

    def _micro_batch(self, request: Request) -> int:
        """Images that run together: as many as the arena budget holds, a power of two, at least 1."""
        key = replace(request, batch=1)
        if key not in self._limits:
            one, two = (make_plan(self.config, replace(key, batch=n)).arena_bytes for n in (1, 2))
            most = max(1, (ARENA_BUDGET - one) // max(1, two - one) + 1)
            self._limits[key] = 1 << (most.bit_length() - 1)
        return min(self._limits[key], request.batch)

    def _smaller(self, request: Request, error: Exception) -> int:
        """Half the micro-batch for this shape from now on, with everything cached freed first."""
        needed = make_plan(self.config, request).arena_bytes
        self._cache.clear()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        if request.batch == 1:
            raise InputError(
                f"{request.direction} of one {request.height}x{request.width} image needs {needed / MIB:.0f} MiB "
                f"beside the weights, and {free / MIB:.0f} MiB are free on {self.device}: "
                "free memory or use smaller images"
            ) from error
        half = request.batch // 2
        self._limits[replace(request, batch=1)] = half
        return half

    # weights

    def _weights(self, plan: Plan) -> dict[str, Tensor]:
        if plan.request.direction in ("encode", "posterior"):
            if self._encoder is None:
                self._encoder = self._pack(fold.fold_encoder(self._model))
                nhwc = fold.rows_nhwc(self._encoder["patch_w"], self.config.patch_size)
                self._encoder["patch_w_nhwc"] = nhwc
                self._weigh()
            return self._encoder
        weights: dict[str, Tensor] = {}
        for i, key in enumerate(plan.times):
            weights |= {f"t{i}.{name}": t for name, t in self._decoder(*key).items()}
        return weights

    def _decoder(self, t: float, image_scale: float) -> dict[str, Tensor]:
        key = (t, image_scale)
        if key not in self._decoders:
            self._decoders[key] = self._pack(fold.fold_decoder(self._model, t, image_scale))
            if len(self._decoders) > MAX_TIMES:
                self._decoders.popitem(last=False)
                # graphs hold addresses of the weights that went
                self._cache.drop(lambda r: r.direction == "decode")
            self._weigh()
        self._decoders.move_to_end(key)
        return self._decoders[key]

    def _pack(self, folded) -> dict[str, Tensor]:
        return fold.named_tensors(fold.pack(folded, self.dtype, self.device))

    def _weigh(self) -> None:
        sets = [self._encoder or {}, *self._decoders.values()]
        self.stats.weight_nbytes = sum(t.nbytes for s in sets for t in s.values())


def _dense(image: Tensor) -> tuple[Tensor, str]:
    """The image without gaps, and its layout: NHWC and channels_last images are taken as they lie in memory."""
    if image.shape[1] != 3:
        return image.contiguous(), "nhwc"
    nhwc = image.permute(0, 2, 3, 1)
    if nhwc.is_contiguous() and not image.is_contiguous():
        return nhwc, "nhwc"
    return image.contiguous(), "nchw"
