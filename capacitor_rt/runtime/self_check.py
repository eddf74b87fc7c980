"""Every launch, and a small model's encode and decode, on the device at hand against plain torch.

Bounds are those of the tests: in rms, twice the error that eager torch makes in the same dtype plus a floor, and four
times its largest error. The truth is torch in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from capacitor_kernels.launch import INTERPRETED, compute_capability

from ..conditioning import default_freqs
from ..config import FullCapacitorInferenceConfig, ModelConfig
from ..reference import Autoencoder
from .fold_fp8 import BlockRange, Ranges
from .fp8 import Fp8Encoder
from .launch_cases import Tensors, cases, sizes
from .platform import one_line
from .precompile import compile_launches
from .runtime import Runtime

RATIO, LARGEST_RATIO = 2.0, 4.0
# below these, relative to the rms of the truth, an error is roundings of the dtype and their order
FLOORS = {torch.float32: 1e-6, torch.float16: 2e-5, torch.bfloat16: 2e-5}
LARGEST_FLOORS = {torch.float32: 3e-5, torch.float16: 1.6e-2, torch.bfloat16: 0.125}
# images enough for the tiles of many, and numbers of them that take narrower ones
MANY, FEW = 64, (1, 2, 8)
LOST = "not run: after the error above this process can use the device no more"


@dataclass(frozen=True)
class CheckRow:
    """One launch of an op, or one call of a model.

    Attributes:
        name: the op with its sizes in images and tokens and its form, or the call with its sizes in pixels.
        error, bound: rms over the rms of the truth, of the output that comes nearest to its bound; the
            error is None where it is not finite, both are where an exception came first.
        problem: what is wrong, in one line; empty if nothing is.
        raised: the exception, if one came.
    """

    name: str
    error: float | None
    bound: float | None
    problem: str = ""
    raised: Exception | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        return not self.problem


def check_launches(device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[CheckRow]:
    """All of `checks`."""
    return list(checks(device, dtype, seed))


def checks(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[CheckRow]:
    """Check every op in the forms that plans launch it in, then encode and decode. No failure is raised.

    Args:
        device: a CUDA device, or the CPU under Triton's interpreter.
        dtype: of weights and activations.
        seed: of the random weights and inputs, which are drawn on the CPU.
    """
    cc = compute_capability(device)
    wanted = list(cases(sizes(), dtype, cc))
    if not INTERPRETED:
        with undisturbed(device):
            compile_launches(launch for case in wanted for launch in case.launches(cc))
    for case in wanted:
        with undisturbed(device):
            try:
                row = compare(case.name, case.run(device, torch.Generator("cpu").manual_seed(seed)), dtype)
            except Exception as error:
                row = _failed(case.name, error)
        yield row
        if not (row.ok or device_works(device)):
            yield CheckRow("all that follows", None, None, LOST)
            return
    yield from check_model(device, dtype, seed)


def check_model(device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[CheckRow]:
    """One encode and one decode of a small random model by the Triton backend, graphs included, against torch."""
    rows: list[CheckRow] = []
    with undisturbed(device):
        try:
            rows += _model_rows(device, dtype, torch.Generator("cpu").manual_seed(seed))
        except Exception as error:
            rows.append(_failed("a small model", error))
    return rows


def check_fp8(device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[CheckRow]:
    """One encode of a small random model in e4m3, whose emulation sets the bound; the truth is in float32."""
    with undisturbed(device):
        try:
            return [_fp8_row(device, dtype, torch.Generator("cpu").manual_seed(seed))]
        except Exception as error:
            return [_failed("encode in fp8", error)]


def check_bits(device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[CheckRow]:
    """Whether few images have the bits that they have among many, by which other tiles run them.

    That instructions of one kind and another width add alike is documented for no GPU (`gemm.product_bits`): it is
    compared here, and where it is not so, `ServingOptions.narrow_tiles` is to be off. Errors are counts of images.
    """
    with undisturbed(device):
        try:
            return list(_bit_rows(device, dtype, torch.Generator("cpu").manual_seed(seed)))
        except Exception as error:
            return [_failed("few images among many", error)]


def check_fp8_bits(device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[CheckRow]:
    """The same of encoding in e4m3, whose products are other instructions."""
    with undisturbed(device):
        try:
            return list(_fp8_bit_rows(device, dtype, torch.Generator("cpu").manual_seed(seed)))
        except Exception as error:
            return [_failed("few images among many in fp8", error)]


def compare(name: str, results: Sequence[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> CheckRow:
    """The row of a check's outputs, each `(result, truth, eager torch's)`, where eager's errors set the bounds."""
    worst, elsewhere = (0.0, FLOORS[dtype]), ""
    for outputs in results:
        # on the CPU: the device in question is no judge of itself
        got, truth, eager = (t.cpu().double() for t in outputs)
        scale = max(_rms(truth), 1e-30)
        error, base = got - truth, eager - truth
        found, bound = _rms(error) / scale, RATIO * _rms(base) / scale + FLOORS[dtype]
        if not math.isfinite(found):
            wrong = int((~got.isfinite()).sum())
            return CheckRow(name, None, bound, f"{wrong} of {got.numel()} values are not finite")
        largest, base_largest = (e.abs().max().item() / scale for e in (error, base))
        limit = max(LARGEST_FLOORS[dtype], LARGEST_RATIO * base_largest)
        if largest > limit:
            at = [int(i) for i in torch.unravel_index(error.abs().argmax(), error.shape)]
            elsewhere = f"the largest error, at {at}, is {largest:.2g} of the rms, and {limit:.2g} the limit"
        if found * worst[1] >= worst[0] * bound:
            worst = found, bound
    over = worst[0] / worst[1]
    return CheckRow(name, *worst, f"the error is {over:.3g} times its bound" if over > 1 else elsewhere)


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _failed(name: str, error: Exception) -> CheckRow:
    return CheckRow(name, None, None, one_line(error), error)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Neither gradients nor the caller's autocast or inference mode; `device` is the current one."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def device_works(device: torch.device) -> bool:
    """Whether the device still does work for this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


# a model


def _model_rows(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> Iterator[CheckRow]:
    config, (h, w), *_ = sizes()
    height, width = h * config.patch_size, w * config.patch_size
    tensors = random_tensors(config, draw)
    pixels = torch.randint(0, 256, (2, 3, height, width), generator=draw, dtype=torch.uint8, device="cpu").to(device)
    latents, noise = (
        torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(device)
        for shape in ((2, config.bottleneck_dim, h, w), (2, 3, height, width))
    )
    one_step = FullCapacitorInferenceConfig()
    # packed weights are rounded once, from the tensors as a checkpoint has them
    loaded = _model(config, tensors, torch.device("cpu"), torch.float32)
    plain = [_model(config, tensors, device, kind) for kind in (torch.float64, dtype)]
    runtime = Runtime(loaded, device, dtype)
    by_torch = partial(Autoencoder.decode, latents=latents, inference_config=one_step, noise=noise)
    calls = {
        "encode": (partial(runtime.encode, pixels), [partial(model.encode, pixels) for model in plain]),
        "decode": (partial(runtime.decode, latents, noise, one_step), [partial(by_torch, model) for model in plain]),
    }
    for name, (ours, (truth, eager)) in calls.items():
        name = f"{name} 2x{height}x{width}"
        try:
            yield compare(name, [(ours(), truth(), eager())], dtype)
        except Exception as error:
            yield _failed(name, error)
            if not device_works(device):
                return
    runtime.clear()


def _fp8_row(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> CheckRow:
    loaded, pixels = _small_encoder(2, draw)
    exact, ranges = _seen(loaded, pixels)
    runtime = Runtime(loaded, device, dtype, ranges=ranges)
    results = runtime.encode(pixels.to(device)), exact.encode(pixels), Fp8Encoder(loaded, ranges, dtype).encode(pixels)
    runtime.clear()
    return compare(f"encode in fp8 2x{pixels.shape[2]}x{pixels.shape[3]}", [results], dtype)


def _seen(loaded: Autoencoder, pixels: Tensor) -> tuple[Fp8Encoder, Ranges]:
    """The encoder in float32, and the ranges that these images have in it."""
    exact, found = Fp8Encoder(loaded, None, torch.float32), dict[int, BlockRange]()
    exact.posterior(pixels, found.__setitem__)
    return exact, tuple(found[i] for i in range(len(found)))


def _small_encoder(images: int, draw: torch.Generator) -> tuple[Autoencoder, Tensor]:
    """A small random model in float32 on the CPU, and pixels for it. A runtime holds its model weakly."""
    config, (h, w), *_ = sizes()
    loaded = _model(config, random_tensors(config, draw), torch.device("cpu"), torch.float32)
    size = (images, 3, h * config.patch_size, w * config.patch_size)
    return loaded, torch.randint(0, 256, size, generator=draw, dtype=torch.uint8, device="cpu")


def _bit_rows(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> Iterator[CheckRow]:
    loaded, pixels = _small_encoder(MANY, draw)
    (h, w), size, pixels = sizes().even, tuple(pixels.shape[2:]), pixels.to(device)
    runtime = Runtime(loaded, device, dtype)
    latents, noise = (
        torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(device)
        for shape in ((MANY, loaded.config.bottleneck_dim, h, w), (MANY, 3, *size))
    )
    one_step = FullCapacitorInferenceConfig()
    yield from _few_among_many("encode", size, lambda n: runtime.encode(pixels[:n]))
    yield from _few_among_many("decode", size, lambda n: runtime.decode(latents[:n], noise[:n], one_step))
    runtime.clear()


def _fp8_bit_rows(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> Iterator[CheckRow]:
    loaded, pixels = _small_encoder(MANY, draw)
    # any images give ranges
    _, ranges = _seen(loaded, pixels[:2])
    runtime, size, pixels = Runtime(loaded, device, dtype, ranges=ranges), tuple(pixels.shape[2:]), pixels.to(device)
    yield from _few_among_many("encode in fp8", size, lambda n: runtime.encode(pixels[:n]))
    runtime.clear()


def _few_among_many(what: str, size: tuple[int, ...], call: Callable[[int], Tensor]) -> Iterator[CheckRow]:
    """Whether the first images have the bits that they have among many; `call` is told how many there are."""
    height, width = size
    # on the CPU: the device in question is no judge of itself
    many = call(MANY).cpu()
    for n in FEW:
        same = (call(n).cpu() == many[:n]).flatten(1).all(1)
        wrong = n - int(same.sum())
        problem = f"{wrong} of {n} images have other bits than among {MANY}" if wrong else ""
        yield CheckRow(f"{what} {n}x{height}x{width} among {MANY}", float(wrong), 0.0, problem)


def random_tensors(config: ModelConfig, draw: torch.Generator) -> Tensors:
    """Tensors of a checkpoint in float32 on the CPU, such that every one matters to the output."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Autoencoder(config).state_dict().items()}
    tensors = {}
    for name, shape in shapes.items():
        t = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
        if name.endswith("freqs"):
            t = default_freqs().to("cpu")
        elif name.endswith("running_var"):
            t = t.abs() + 0.5
        elif not name.endswith("running_mean"):
            t *= shape[1:].numel() ** -0.5 if len(shape) > 1 and shape[0] > 1 else 0.2
        tensors[name] = t
    return tensors


def _model(config: ModelConfig, tensors: Tensors, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    with torch.device("meta"):
        model = Autoencoder(config)
    model.hold(tensors)
    return model.to(device, dtype)
