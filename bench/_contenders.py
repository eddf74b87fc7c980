"""Who runs in the end-to-end benchmarks: the same model by several ways, each as its users would call it.

A contender is built anew for every shape from weights kept on the CPU, so that what it holds can be weighed. It is
picklable: it runs in a process of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig, ModelConfig
from capacitor_rt.diffusion import unit_noise
from capacitor_rt.evaluation.flux2 import CONFIG, Flux2
from capacitor_rt.evaluation.spatial_attention import use_attention
from capacitor_rt.reference import Autoencoder
from capacitor_rt.runtime.plan import PlanKey, make_plan

# enough for every code path of the runtime and of the VAE, small enough for the CPU
TINY = ModelConfig(
    model_dim=32,
    encoder_depth=1,
    decoder_depth=3,
    decoder_start_blocks=1,
    decoder_end_blocks=1,
    bottleneck_dim=8,
    mlp_ratio=2.0,
    adaln_low_rank_rank=4,
)
TINY_FLUX2 = CONFIG | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
FLUX2 = "flux2"
CAPACITOR = "full_capacitor"


@dataclass(frozen=True)
class Shape:
    """Square images of one call; `name` where a published table has this row."""

    direction: str
    batch: int
    size: int
    name: str = ""

    @property
    def pixels(self) -> int:
        return self.batch * self.size**2

    def __str__(self) -> str:
        return f"{self.direction} {self.batch}x{self.size}x{self.size}"


@dataclass
class Setting:
    """What all contenders share: where, in which type, and the weights."""

    device: torch.device
    dtype: torch.dtype
    config: ModelConfig = field(default_factory=ModelConfig)
    flux2_config: dict[str, Any] = field(default_factory=lambda: dict(CONFIG))

    @cached_property
    def capacitor(self) -> FullCapacitor:
        """full_capacitor in float32 on the CPU, random weights."""
        return random_model(self.config)

    @cached_property
    def flux2(self) -> Flux2:
        """The FLUX.2 VAE in float32 on the CPU, random weights."""
        return Flux2.random(self.flux2_config, attention="torch")

    def weights(self, model: str) -> FullCapacitor | Flux2:
        return self.capacitor if model == CAPACITOR else self.flux2

    def channels(self, model: str) -> int:
        """Of the latents that `decode` takes."""
        if model == CAPACITOR:
            return self.config.latent_channels
        return 4 * self.flux2_config["latent_channels"]

    @cached_property
    def _flops(self) -> dict[tuple[str, str, int], int]:
        return {}

    @cached_property
    def _truths(self) -> dict[str, Any]:
        return {}

    def truth(self, model: str) -> Autoencoder | Flux2:
        """The model in float32 on the device, in plain torch; kept, so that it is weighed with no contender."""
        if model not in self._truths:
            twin = reference_of(self.capacitor) if model == CAPACITOR else copy.deepcopy(self.flux2)
            self._truths[model] = twin.to(self.device)
        return self._truths[model]

    def flops(self, model: str, shape: Shape) -> int:
        """Floating point operations of a call, a multiply-add as two."""
        key = (model, shape.direction, shape.size)
        if key not in self._flops:
            self._flops[key] = (
                _capacitor_flops(self.config, shape) if model == CAPACITOR else _flux2_flops(self.flux2_config, shape)
            )
        return shape.batch * self._flops[key]


Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to run one model.

    Attributes:
        build: `(setting, shape, example input) -> run(input)`, ready to be called, not necessarily warm. A decode draws
            its noise from torch's generator of the device, as the public method does.
            Importable, or a partial of what is.
        compiles: "no", "default" or "autotune": whether it costs minutes of compilation per shape.
        graphs_only: differs from another contender by CUDA graphs alone, so it is left out on the CPU.
        single: differs from another contender for single images alone, so it is left out for larger batches.
        sweeps: is measured at every size, and not at those of published tables alone.
    """

    model: str
    name: str
    build: Callable[[Setting, Shape, Tensor], Run]
    compiles: str = "no"
    graphs_only: bool = False
    single: bool = False
    sweeps: bool = False

    @property
    def key(self) -> str:
        """Among the contenders of one shape."""
        return f"{self.model}/{self.name}"

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's runtime."""
        return self.name.startswith("ours")


def random_model(config: ModelConfig, seed: int = 0) -> FullCapacitor:
    """A model whose activations stay of order 1 and to whose output every weight matters, in float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FullCapacitor(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("layer_scale"):
                    parameter.normal_(0.3, 0.05)
                elif parameter.dim() > 1 and ".grn." not in name and "mask_feature" not in name:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
                else:
                    parameter.normal_(0, 0.2)
        if model.latent_norm_running_var is not None:
            model.latent_norm_running_mean.normal_(0, 0.2)
            model.latent_norm_running_var.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


def reference_of(model: FullCapacitor) -> Autoencoder:
    """The same weights in the plain model that everything is compared with, without a runtime around it."""
    twin = Autoencoder(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval().requires_grad_(False)


def call_of(model: FullCapacitor | Flux2, direction: str) -> Run:
    """The public method of a direction."""
    return model.encode if direction == "encode" else model.decode


def truth_of(setting: Setting, model: str, shape: Shape, x: Tensor, count: int, seed: int) -> Tensor:
    """float32 output for the first `count` inputs of a call that follows `torch.manual_seed(seed)`, in plain torch."""
    twin, first = setting.truth(model), x[:count].float()
    if shape.direction == "encode":
        return twin.encode(first)
    if isinstance(twin, Flux2):
        return twin.decode(first)
    torch.manual_seed(seed)
    noise = unit_noise((shape.batch, 3, shape.size, shape.size), None, setting.device)
    return twin.decode(first, noise=noise[:count])


def _place(setting: Setting, model: str, backend: str = "torch") -> Any:
    twin = copy.deepcopy(setting.weights(model))
    if isinstance(twin, FullCapacitor):
        twin.backend = backend
    return twin.to(setting.device, setting.dtype)


def _eager(model: str, setting: Setting, shape: Shape, example: Tensor) -> Run:
    return call_of(_place(setting, model), shape.direction)


def _our_attention(setting: Setting, shape: Shape, example: Tensor) -> Run:
    twin = _place(setting, FLUX2)
    use_attention(twin.vae, "triton")
    return call_of(twin, shape.direction)


def _channels_last(model: str, setting: Setting, shape: Shape, example: Tensor) -> Run:
    twin = _place(setting, model)
    nn.Module.to(twin, memory_format=torch.channels_last)
    call = call_of(twin, shape.direction)
    return lambda x: call(x.contiguous(memory_format=torch.channels_last))


def _compiled(model: str, mode: str | None, setting: Setting, shape: Shape, example: Tensor) -> Run:
    from torch._inductor import config as inductor

    torch._dynamo.reset()
    # the noise of a decode is then the one that eager torch draws, and the result can be checked
    inductor.fallback_random = True
    call = torch.compile(call_of(_place(setting, model), shape.direction), mode=mode, dynamic=False)

    def run(x: Tensor) -> Tensor:
        # outputs of the graphs that some modes capture are overwritten by the next call
        torch.compiler.cudagraph_mark_step_begin()
        return call(x)

    return run


def _graphed(model: str, setting: Setting, shape: Shape, example: Tensor) -> Run:
    call, static = call_of(_place(setting, model), shape.direction), example.clone()
    stream = torch.cuda.Stream(setting.device)
    stream.wait_stream(torch.cuda.current_stream(setting.device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(static)
    torch.cuda.current_stream(setting.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(static)

    def run(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return out.clone()

    return run


def _ours(
    graphs: bool, low_latency: bool, setting: Setting, shape: Shape, example: Tensor, overlap: bool = False
) -> Run:
    twin = _place(setting, CAPACITOR, "triton")
    twin.cuda_graphs, twin.low_latency, twin.overlap = graphs, low_latency, overlap
    return call_of(twin, shape.direction)


OURS = Contender(CAPACITOR, "ours", partial(_ours, True, False))
LOW_LATENCY = Contender(CAPACITOR, "ours, low_latency", partial(_ours, True, True), single=True)
EAGER = Contender(CAPACITOR, "eager", partial(_eager, CAPACITOR))
FLUX2_EAGER = Contender(FLUX2, "eager", partial(_eager, FLUX2))
CAPACITORS = (
    OURS,
    EAGER,
    LOW_LATENCY,
    Contender(CAPACITOR, "ours, no graphs", partial(_ours, False, False), graphs_only=True),
    Contender(CAPACITOR, "ours, overlap", partial(_ours, True, False, overlap=True), graphs_only=True),
    Contender(CAPACITOR, "eager, channels_last", partial(_channels_last, CAPACITOR)),
    Contender(CAPACITOR, "eager, CUDA graph", partial(_graphed, CAPACITOR), graphs_only=True),
    Contender(CAPACITOR, "torch.compile", partial(_compiled, CAPACITOR, None), "default"),
    Contender(CAPACITOR, "torch.compile max-autotune", partial(_compiled, CAPACITOR, "max-autotune"), "autotune"),
)
FLUX2S = (
    OURS,
    FLUX2_EAGER,
    LOW_LATENCY,
    EAGER,
    Contender(FLUX2, "eager, channels_last", partial(_channels_last, FLUX2)),
    Contender(FLUX2, "eager, our attention", _our_attention, sweeps=True),
    Contender(FLUX2, "torch.compile", partial(_compiled, FLUX2, None), "default"),
)
# the ways to run the FLUX.2 VAE: the fastest of them is what the speed-up is over
FLUX2_FORMS = tuple(contender.name for contender in FLUX2S if contender.model == FLUX2)


def _capacitor_flops(config: ModelConfig, shape: Shape) -> int:
    """Of one image."""
    inference = FullCapacitorInferenceConfig() if shape.direction == "decode" else None
    side, bf16 = shape.size, torch.bfloat16
    request = PlanKey(shape.direction, 1, side, side, bf16, bf16, "nchw", 90, inference=inference)
    return make_plan(config, request).flops


def _flux2_flops(config: dict[str, Any], shape: Shape) -> int:
    """Of one image, counted on meta tensors."""
    from diffusers import AutoencoderKLFlux2
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKLFlux2(**config).eval()
        image = torch.empty(1, 3, shape.size, shape.size)
        latents = torch.empty(1, config["latent_channels"], shape.size // 8, shape.size // 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(image) if shape.direction == "encode" else vae.decode(latents)
    return counter.get_total_flops()
