"""Checks of the tensors and names that a model is given, made before any work starts."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError

IMAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among `choices`."""
    if value not in choices:
        raise InputError(f"{name} {value!r} is unknown: use one of {', '.join(map(repr, choices))}")


def check_tensor(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Refuse what is no tensor of rank 4 and one of `dtypes` on `device`, or requires grad.

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
    if t.requires_grad and torch.is_grad_enabled():
        raise InputError(f"{name} requires grad, and there is no backward pass yet: pass {name}.detach()")


def check_dtype(name: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a dtype that is not among `dtypes`."""
    if dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputError(f"{name} has dtype {dtype}: convert it to one of {names}")


def check_out(out: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse an `out` that a result of `shape` on `device` cannot be written to; None is fine."""
    if out is None:
        return
    check_tensor("out", out, LATENT_DTYPES, device)
    if tuple(out.shape) != shape:
        raise InputError(f"out has shape {list(out.shape)}: the result is {list(shape)}")
