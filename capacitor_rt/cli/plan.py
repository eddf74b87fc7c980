"""`capacitor-rt plan`: what a call will launch, hold and at best take. Needs neither a GPU nor weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .options import Dtype, Revision

if TYPE_CHECKING:
    from ..config import ModelConfig


def plan(
    size: Annotated[int, typer.Option(min=1, help="Height of the images in pixels; also the width, by default.")],
    batch: Annotated[int, typer.Option(min=1, help="Images in a call.")] = 1,
    width: Annotated[int | None, typer.Option(min=1, help="Width of the images in pixels.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub id, folder or file: its shapes count.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="full_capacitor (the default), semdisdiffae, semdisdiffae_p32_v2, capacitor_decoder, or a config.json."
        ),
    ] = None,
    revision: Revision = None,
    direction: Annotated[str, typer.Option(help="encode, posterior or decode.")] = "encode",
    steps: Annotated[int, typer.Option(min=1, help="Passes through the decoder.")] = 1,
    sampler: Annotated[str, typer.Option(help="ddim or dpmpp_2m.")] = "ddim",
    pdg: Annotated[bool, typer.Option("--pdg", help="Path-drop guidance: a second pass a step.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.bf16,
    cc: Annotated[int, typer.Option(min=80, help="Compute capability: 80, 89, 90, 100, 120.")] = 90,
    low_latency: Annotated[bool, typer.Option("--low-latency", help="Launches shaped for a single image.")] = False,
    tflops: Annotated[float | None, typer.Option(min=1e-3, help="Ceiling of arithmetic, TFLOP/s.")] = None,
    gbps: Annotated[float | None, typer.Option(min=1e-3, help="Ceiling of memory, GB/s.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the launches, buffers, memory and least time of a call."""
    import torch

    from ..config import FullCapacitorInferenceConfig
    from ..runtime.forecast import ceilings_of, forecast
    from ..runtime.plan import PlanKey

    architecture = read_architecture(model, config, revision)
    height, width = size, width or size
    _check(architecture, direction, height, width)
    inference = FullCapacitorInferenceConfig(num_steps=steps, sampler=sampler, pdg=pdg)
    compute = dtype.torch()
    decoding = direction == "decode"
    request = PlanKey(
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
    )
    result = forecast(architecture, request, ceilings_of(cc, compute, tflops, gbps))
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
        return
    for line in result.lines():
        typer.echo(line)


def read_architecture(model: str | None, config: str | None, revision: str | None) -> ModelConfig:
    """The architecture that a checkpoint's header, a known name or a `config.json` gives.

    Raises:
        InputError, CheckpointError, ConfigError: two of them given, an unknown name, or an unreadable file.
    """
    from ..config import ModelConfig
    from ..runtime.family import FAMILY

    if model is not None and config is not None:
        raise InputError("--model and --config both name an architecture: give one of them")
    if model is not None:
        from ..checkpoint import read_header, resolve

        return read_header(resolve(model, revision=revision)).config
    name = config or "full_capacitor"
    if name in FAMILY:
        return FAMILY[name]
    if Path(name).is_file():
        return ModelConfig.from_json(name)
    raise InputError(f"config {name!r} is neither a file nor one of {', '.join(FAMILY)}")


def _check(config: ModelConfig, direction: str, height: int, width: int) -> None:
    directions = ("encode", "posterior", "decode") if config.encoder_depth else ("decode",)
    if direction not in directions:
        raise InputError(f"direction {direction!r} is none of this model's: use one of {', '.join(directions)}")
    for name, pixels in (("height", height), ("width", width)):
        if pixels % config.latent_stride:
            below, above = (
                n * config.latent_stride for n in (pixels // config.latent_stride, pixels // config.latent_stride + 1)
            )
            use = f"{below} or {above}" if below else f"{above}"
            raise InputError(f"{name} {pixels} is not a multiple of {config.latent_stride}: use {use}")
