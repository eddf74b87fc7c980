"""Checks of the tensors and names that a model is given, made before any work starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import FullCapacitorInferenceConfig
from .errors import ConfigError, InputError
from .sizes import check_multiple as check_multiple

IMAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    # parameters of a truth to compare with; images and latents stay within float32
    "float64": torch.float64,
}


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among `choices`."""
    if value not in choices:
        raise InputError(f"{name} {value!r} is unknown: use one of {', '.join(map(repr, choices))}")


def check_input(
    name: str,
    t: Tensor,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Refuse what is no tensor of rank 4 (or of `shape`) and one of `dtypes` on `device`.

    Raises:
        InputError: names the tensor, what it is, and what would do.
    """
    if not isinstance(t, Tensor):
        raise InputError(f"{name} is a {type(t).__name__}: pass a torch.Tensor")
    if t.dim() != 4:
        extra = f"; add the batch dimension: {name}[None]" if t.dim() == 3 else ""
        raise InputError(f"{name} has rank {t.dim()} (shape {list(t.shape)}), not 4{extra}")
    check_dtype(name, t.dtype, dtypes)
    if t.device != device:
        raise InputError(f"{name} is on {t.device} and the model on {device}: move one of them with .to()")
    if shape is not None and tuple(t.shape) != shape:
        raise InputError(f"{name} has shape {list(t.shape)}: expected {list(shape)}")


def check_dtype(name: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a dtype that is not among `dtypes`."""
    if dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputError(f"{name} has dtype {dtype}: convert it to one of {names}")


def check_out(out: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse an `out` that a result of `shape` on `device` cannot be written to; None is fine."""
    if out is None:
        return
    check_input("out", out, LATENT_DTYPES, device)
    if out.requires_grad and torch.is_grad_enabled():
        raise InputError("out requires grad, and a result written to it has no history: leave out away, or detach it")
    if tuple(out.shape) != shape:
        raise InputError(f"out has shape {list(out.shape)}: the result is {list(shape)}")


def check_latents(
    latents: Tensor, channels: int, stride: int, height: int | None, width: int | None
) -> tuple[int, int, int]:
    """(B, H, W) of the image that latents `[B,channels,h,w]` decode to; `height` and `width` must agree if given.

    Raises:
        InputError: another number of channels, no pixels, or a size that does not fit.
    """
    if latents.shape[1] != channels:
        raise InputError(f"latents have shape {list(latents.shape)}: expected [B,{channels},h,w]")
    batch, _, h, w = latents.shape
    if h < 1 or w < 1:
        raise InputError(f"latents have shape {list(latents.shape)}: h and w must be at least 1")
    size = (h * stride, w * stride)
    for name, given, fits in zip(("height", "width"), (height, width), size, strict=True):
        if given is not None and given != fits:
            raise InputError(
                f"{name} {given} does not fit latents of {h}x{w}, which decode to {size[0]}x{size[1]}: "
                f"pass {name}={fits} or leave it out"
            )
    return batch, *size


def check_dropped(dropped: Tensor, drop: str | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse a mask of dropped tokens that is no bool or float tensor of `shape`, or that no pass would use.

    Raises:
        InputError: names what is wrong; `drop` is what guidance drops.
    """
    if drop != "tokens":
        raise InputError(
            f"dropped is given, and guidance drops {drop or 'nothing'}: leave it out, or set pdg=True and "
            "pdg_drop='tokens' (mdiffae)"
        )
    check_input("dropped", dropped, (torch.bool, *LATENT_DTYPES), device, shape)


def check_device(device: torch.device | str | int | None) -> torch.device:
    """The device, the CPU for None; refuse one that is not there."""
    try:
        target = torch.device(device if device is not None else "cpu")
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {device!r} is not a torch device: use e.g. 'cpu' or 'cuda:0'") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    if target.type not in ("cpu", "cuda", "meta"):
        try:
            torch.empty(0, device=target)
        except Exception as error:
            # what is raised for a backend that this build or machine lacks differs from backend to backend
            raise InputError(f"device {device!r} cannot be used here: use e.g. 'cpu' or 'cuda:0'") from error
    return target


def check_model_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The floating point type that a dtype or its name stands for: "bfloat16", "torch.bfloat16" or "bf16".

    Raises:
        InputError: anything else, or a type that no convolution here computes in.
    """
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in _DTYPES.values():
        names = ", ".join(str(known) for known in LATENT_DTYPES)
        raise InputError(f"dtype {dtype!r} is no type that the model computes in: use one of {names}, or its name")
    return found


def check_inference_config(
    settings: FullCapacitorInferenceConfig | Mapping[str, Any] | None,
) -> FullCapacitorInferenceConfig:
    """The settings; the defaults for None; those of a dict of the settings' fields.

    Raises:
        ConfigError: an unknown field, or a value out of range. InputError: neither settings nor a dict.
    """
    if settings is None:
        return FullCapacitorInferenceConfig()
    if isinstance(settings, FullCapacitorInferenceConfig):
        return settings
    if not isinstance(settings, Mapping):
        raise InputError(
            f"inference_config is {settings!r}: pass a FullCapacitorInferenceConfig, or a dict of its fields"
        )
    known = [field.name for field in dataclasses.fields(FullCapacitorInferenceConfig)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ConfigError(f"inference_config has no {', '.join(map(repr, unknown))}: its fields are {', '.join(known)}")
    return FullCapacitorInferenceConfig(**settings)


def odd_range(image: Tensor) -> str | None:
    """What is odd about the values of a float image that should lie in [-1,1], None for nothing. Waits for a GPU."""
    low, high = (x.item() for x in image.detach().aminmax())
    if low != low or high != high:
        return "holds NaN"
    if low < -1.01 or high > 1.01:
        scale = "divide bytes by 127.5 and subtract 1" if low >= 0 and high > 2 else "scale it to that first"
        return f"has values from {low:.4g} to {high:.4g}, and [-1, 1] is expected: {scale}"
    if low >= 0:
        return f"has values from {low:.4g} to {high:.4g}, and [-1, 1] is expected: multiply [0, 1] by 2 and subtract 1"
    return None
