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


def check_multiple(height: int, width: int, multiple: int, stride: int) -> None:
    """Refuse an image size in pixels that is no multiple of `multiple`, itself one of `stride`.

    Raises:
        InputError: names the nearest legal sizes, and the looser rule where the latents would allow the size.
    """
    for name, size in (("height", height), ("width", width)):
        if size % multiple or size == 0:
            below, above = size // multiple * multiple, (size // multiple + 1) * multiple
            use = f"{below} or {above}" if below else f"{above}"
            looser = multiple != stride and size and size % stride == 0
            hint = f", or strict_size=False, which admits multiples of {stride}" if looser else ""
            raise InputError(f"{name} {size} is not a multiple of {multiple}: use {use}{hint}")


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


def check_device(device: torch.device | str | None) -> torch.device:
    """The device, the CPU for None; refuse one that is not there."""
    try:
        target = torch.device(device if device is not None else "cpu")
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not a torch device: use e.g. 'cpu' or 'cuda:0'") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return target


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
