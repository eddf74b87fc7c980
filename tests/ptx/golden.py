"""Whole models: golden inputs through the runtime's plans, every launch executed, against golden outputs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from capacitor_kernels.launch import recording
from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig
from capacitor_rt.diffusion import unit_noise
from capacitor_rt.reference import Posterior
from capacitor_rt.runtime import fold, packed
from capacitor_rt.runtime.arena import ALIGNMENT
from capacitor_rt.runtime.executor import Executor
from capacitor_rt.runtime.fold_fp8 import BlockRange, Ranges, fold_fp8
from capacitor_rt.runtime.fp8 import Fp8Encoder
from capacitor_rt.runtime.plan import LaunchPlan, PlanKey, make_plan
from tests.support.golden_cases import inference_of
from tests.support.measures import relative_error

from .compare import RATIO
from .execution import Device, Ran
from .parse import PtxError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# of float32, whose eager path is the oracle itself
_FLOAT32_LIMIT, _FLOOR = 1e-4, 2e-5
_FP8_SHARE = 0.25
_QUICK_DECODES = ("decode_ddim1_", "decode_dpmpp4_")


@dataclass(frozen=True)
class Line:
    """One check: its verdict, its text, and error over eager's (NaN where there is none)."""

    ok: bool
    text: str
    ratio: float = float("nan")


class ExecutedModel:
    """A model whose plans run launch by launch on an imaginary GPU; `launches` is what ran.

    With ranges of a calibration its encoder runs in e4m3.
    """

    def __init__(self, folder: Path, cc: int, dtype: torch.dtype, ranges: Ranges | None = None) -> None:
        self.cc, self.dtype, self._ranges = cc, dtype, ranges
        self.launches: list[Ran] = []
        self._model = FullCapacitor.from_pretrained(folder, backend="torch", device="cpu", strict_size=False)
        self._weights: dict[tuple[float, float] | None, dict[str, Tensor]] = {}

    def encode(self, image: Tensor) -> Tensor:
        """Whitened latents."""
        if self._model.config.latent_patch != 1:
            outputs = self.posterior(image)
            return self._model.latents_of(Posterior(outputs["mean"], outputs.get("logsnr")))
        return self._run(self._key("encode", image), {"image": image})["latents"]

    def posterior(self, image: Tensor) -> dict[str, Tensor]:
        """Raw mean and logsnr."""
        return self._run(self._key("posterior", image), {"image": image})

    def decode(self, latents: Tensor, noise: Tensor, inference: FullCapacitorInferenceConfig) -> Tensor:
        """Image of whitened latents and unit noise."""
        if self._model.config.latent_patch != 1:
            latents = self._model.unfold_latent_patches(self._model.dewhiten(latents))
        key = self._key("decode", noise, inference)
        return self._run(key, {"latents": latents, "noise": noise})["image"]

    def _key(self, direction: str, image: Tensor, inference: FullCapacitorInferenceConfig | None = None) -> PlanKey:
        batch, _, height, width = image.shape
        size = (batch, height, width)
        key = PlanKey(direction, *size, self.dtype, torch.float32, "nchw", self.cc, inference=inference)
        return replace(key, precision=None if self._ranges is None or direction == "decode" else "fp8")

    def _run(self, key: PlanKey, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        plan = make_plan(self._model.config, key)
        memory = torch.full((plan.arena_bytes + ALIGNMENT,), 0xFF, dtype=torch.uint8)
        arena = memory[-memory.data_ptr() % ALIGNMENT :][: plan.arena_bytes]
        executor = Executor(plan, self._packed(plan), arena)
        for name, value in inputs.items():
            executor.inputs[name].copy_(value)
        device = Device(self.cc)
        device.unwritten(arena)
        device.written(*executor.inputs.values())
        # step by step: some ops are torch's and run at once
        for call in executor.calls:
            with recording(key.cc) as launches:
                call()
            if launches:
                device.run(launches)
            else:
                device.written(*(t for t in call.keywords.values() if isinstance(t, Tensor)))
        self.launches += device.launches
        return {name: value.clone() for name, value in executor.outputs.items()}

    def _packed(self, plan: LaunchPlan) -> dict[str, Tensor]:
        """Weights by the names of the plan."""
        if not plan.times:
            return self._fold(None)
        return {f"t{i}.{name}": w for i, at in enumerate(plan.times) for name, w in self._fold(at).items()}

    def _fold(self, at: tuple[float, float] | None) -> dict[str, Tensor]:
        if at not in self._weights:
            folded = fold.fold_encoder(self._model) if at is None else fold.fold_decoder(self._model, *at)
            if at is None and self._ranges is not None:
                folded = fold_fp8(folded, self._ranges)
            self._weights[at] = packed.named_tensors(packed.pack(folded, self.dtype, torch.device("cpu")))
        return self._weights[at]


def check_folder(folder: Path, cc: int, dtype: str = "bf16", every: bool = False) -> Iterator[Line]:
    """Hold a folder's golden outputs against what the launches compute, beside eager torch in the same dtype.

    Args:
        folder: config.json, model.safetensors and io.safetensors (tests/golden/README.md).
        every: all recorded decodes, not the shortest of each kind alone.
    """
    io = load_file(folder / "io.safetensors")
    model = ExecutedModel(folder, cc, DTYPES[dtype])
    eager = FullCapacitor.from_pretrained(folder, backend="torch", device="cpu", strict_size=False, dtype=DTYPES[dtype])
    where = f"sm_{cc} {dtype} {folder.name}"
    for key in _keys(io, every):
        start, before = time.perf_counter(), len(model.launches)
        try:
            got, base = _outputs(key, io, model, eager)
            lines = [_judge(name, got[name], base[name], io, dtype) for name in got]
        except PtxError as error:
            lines = [Line(False, f"{type(error).__name__}: {error}")]
        ran = model.launches[before:]
        seconds = time.perf_counter() - start
        for line in lines:
            text = f"{where} {key}: {line.text} | {len(ran)} launches, {sum(r.ctas for r in ran)} CTAs, {seconds:.1f} s"
            yield Line(line.ok, text, line.ratio)
    same = torch.equal(model.encode(io["image"][:1]), model.encode(io["image"])[:1])
    yield Line(same, f"{where}: an image alone has the bits that it has in a batch")


def check_fp8(folder: Path, cc: int) -> Iterator[Line]:
    """Hold an encoder in e4m3, executed, against its emulation; scales are of the golden image itself.

    Values between two numbers of 8 bits fall to either side by the order of sums: that may cost a part of what 8 bits
    cost.
    """
    image = load_file(folder / "io.safetensors")["image"]
    loaded = FullCapacitor.from_pretrained(folder, backend="torch", device="cpu", strict_size=False)
    found: dict[int, BlockRange] = {}
    truth, _ = Fp8Encoder(loaded, None, torch.float32).posterior(image, found.__setitem__)
    ranges = tuple(found[i] for i in range(len(found)))
    emulated = Fp8Encoder(loaded, ranges, torch.bfloat16)
    model = ExecutedModel(folder, cc, torch.bfloat16, ranges)
    where = f"sm_{cc} bf16 {folder.name}"
    try:
        got, base = model.posterior(image)["mean"], emulated.posterior(image).mean
        whole, alone = model.encode(image), model.encode(image[:1])
    except PtxError as error:
        yield Line(False, f"{where} in fp8: {type(error).__name__}: {error}")
        return
    gap, cost = relative_error(got, base), relative_error(base, truth)
    text = f"{where} in fp8: {gap:.2e} from the emulation, which errs by {cost:.2e}"
    yield Line(bool(got.isfinite().all()) and gap <= _FP8_SHARE * cost, text)
    yield Line(torch.equal(alone, whole[:1]), f"{where} in fp8: an image alone has the bits that it has in a batch")
    near = relative_error(whole, emulated.encode(image)) <= _FP8_SHARE * cost
    yield Line(near, f"{where} in fp8: whitened latents")


def _keys(io: dict[str, Tensor], every: bool) -> list[str]:
    decodes = sorted(key for key in io if key.startswith("decode_"))
    posterior = ["posterior"] if "posterior_mean" in io else []
    return ["latents", *posterior, *(key for key in decodes if every or key.startswith(_QUICK_DECODES))]


def _outputs(
    key: str, io: dict[str, Tensor], model: ExecutedModel, eager: FullCapacitor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(executed, eager) outputs by their golden names."""
    if key == "latents":
        return {key: model.encode(io["image"])}, {key: eager.encode(io["image"])}
    if key == "posterior":
        got, base = model.posterior(io["image"]), eager.encode_posterior(io["image"])._asdict()
        return {f"posterior_{name}": got[name] for name in got}, {f"posterior_{name}": base[name] for name in got}
    inference = inference_of(key)
    noise = unit_noise(tuple(io[key].shape), inference.seed, torch.device("cpu"))
    image = eager.decode(io["latents"], inference_config=inference, noise=noise)
    return {key: model.decode(io["latents"], noise, inference)}, {key: image}


def _judge(name: str, got: Tensor, base: Tensor, io: dict[str, Tensor], dtype: str) -> Line:
    error, of_eager = relative_error(got.float(), io[name]), relative_error(base.float(), io[name])
    text = f"{name} {error:.2e} (eager {of_eager:.2e}"
    if dtype == "bf16" and f"bf16_{name}" in io:
        recorded = relative_error(io[f"bf16_{name}"], io[name])
        text += f", recorded {recorded:.2e}"
        of_eager = min(of_eager, recorded)
    limit = _FLOAT32_LIMIT if dtype == "fp32" else RATIO * of_eager + _FLOOR
    return Line(bool(got.isfinite().all()) and error <= limit, text + ")", error / of_eager)
