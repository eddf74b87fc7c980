"""`capacitor-rt plan`: what a call will run, hold and at best take. Needs neither a GPU nor weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..sizes import check_multiple
from .options import AsJson, Dtype, Revision, check_model
from .terminal import echo, echo_json

if TYPE_CHECKING:
    from ..config import ModelConfig


def plan(
    size: Annotated[int, typer.Option(min=1, help="Height of the images in pixels; also the width, by default.")],
    batch: Annotated[int, typer.Option(min=1, help="Number of images per call.")] = 1,
    width: Annotated[int | None, typer.Option(min=1, help="Width of the images in pixels.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id, folder or file whose shapes count.", callback=check_model),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="Known architecture (full_capacitor, semdisdiffae, semdisdiffae_p32_v2, capacitor_decoder, ...) or a "
            "config.json; the default is full_capacitor."
        ),
    ] = None,
    revision: Revision = None,
    direction: Annotated[str, typer.Option(help="Direction of the call: encode, posterior or decode.")] = "encode",
    steps: Annotated[int, typer.Option(min=1, help="Number of passes through the decoder.")] = 1,
    sampler: Annotated[str, typer.Option(help="Sampler of the decoder: ddim or dpmpp_2m.")] = "ddim",
    pdg: Annotated[bool, typer.Option("--pdg", help="Use path-drop guidance, a second pass per step.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and activations.")] = Dtype.bf16,
    cc: Annotated[int, typer.Option(min=80, help="Compute capability of the GPU: 80, 89, 90, 100 or 120.")] = 90,
    low_latency: Annotated[
        bool, typer.Option("--low-latency", help="Plan launches that are shaped for a single image.")
    ] = False,
    encode_precision: Annotated[
        str | None,
        typer.Option("--encode-precision", help="Plan an encoder in fp8 (e4m3).", metavar="NAME"),
    ] = None,
    dependent_launch: Annotated[
        bool,
        typer.Option("--dependent-launch", help="Plan launches that start before the one in front is done."),
    ] = False,
    tflops: Annotated[float | None, typer.Option(min=1e-3, help="Ceiling of arithmetic in TFLOP/s.")] = None,
    gbps: Annotated[float | None, typer.Option(min=1e-3, help="Ceiling of memory traffic in GB/s.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the ops, buffers, memory and least time of a call."""
    from ..config import FullCapacitorInferenceConfig

    architecture = read_architecture(model, config, revision)
    height, width = size, width or size
    _check(architecture, direction, height, width)
    _check_precision(encode_precision, architecture, direction, cc)
    inference = FullCapacitorInferenceConfig(num_steps=steps, sampler=sampler, pdg=pdg)
    import torch

    from ..runtime.forecast import ceilings_of, forecast
    from ..runtime.plan import PlanKey

    compute = dtype.torch()
    decoding = direction == "decode"
    key = PlanKey(
        direction,
        batch,
        height,
        width,
        compute,
        torch.float32 if decoding else torch.uint8,
        "nchw",
        cc,
        "latency" if low_latency and batch == 1 else "throughput",
        inference if decoding else None,
        precision=encode_precision,
        dependent=dependent_launch,
    )
    if dependent_launch and cc < 90:
        raise InputError(f"--dependent-launch needs compute capability 9.0 or later, --cc is {cc}")
    result = forecast(architecture, key, ceilings_of(cc, compute, tflops, gbps))
    if as_json:
        echo_json(result.as_dict())
        return
    for line in result.lines():
        echo(line)


def read_architecture(model: str | None, config: str | None, revision: str | None) -> ModelConfig:
    """The architecture that a checkpoint's header, a known name or a `config.json` gives.

    Raises:
        InputError, CheckpointError, ConfigError: two of them given, an unknown name, or an unreadable file.
    """
    from ..config import KNOWN_MODELS, ModelConfig

    if model is not None and config is not None:
        raise InputError("--model and --config both name an architecture: give one of them")
    if model is not None:
        from ..checkpoint import read_header, resolve

        return read_header(resolve(model, revision=revision)).config
    name = config or "full_capacitor"
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name]
    if Path(name).is_file():
        return ModelConfig.from_json(name)
    raise InputError(f"config {name!r} is neither a file nor one of {', '.join(KNOWN_MODELS)}")


def _check(config: ModelConfig, direction: str, height: int, width: int) -> None:
    directions = ("encode", "posterior", "decode") if config.encoder_depth else ("decode",)
    if direction not in directions:
        raise InputError(f"direction {direction!r} is none of this model's: use one of {', '.join(directions)}")
    check_multiple(height, width, config.latent_stride, config.latent_stride)


def _check_precision(name: str | None, config: ModelConfig, direction: str, cc: int) -> None:
    """Refuse a precision that the call has no launches in."""
    if name is None:
        return
    from ..fp8_encoding import check_precision

    check_precision(name)
    if direction == "decode" or config.dico is not None:
        raise InputError(f"{direction} of this model has no launches in {name}: only full_capacitor's encoder has")
    from capacitor_kernels.launch import check_e4m3

    try:
        check_e4m3(cc)
    except ValueError as error:
        raise InputError(f"{error} (--cc 89, 90, 100 or 120)") from error
