"""The attention of the FLUX.2 VAE by this project's kernel: an attention processor for diffusers.

The VAE has one attention in the middle of each half, with a single head of width 512 over all tokens: at 1024x1024 they
are 16,384, and a matrix of their scores takes 512 MiB in bfloat16. The kernel never makes it. Of the rest of the layer
(norm, projections, residual) everything is torch, as before.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..runtime.platform import build_failure, why_not_triton

CHOICES = ("auto", "triton", "torch")
HALVES = (torch.bfloat16, torch.float16)


class SpatialAttention:
    """A processor of diffusers' `Attention` that runs its softmax and products by `capacitor_kernels.attention`.

    A layer or a call of another kind (several heads, a mask, other tokens to attend to, gradients) goes to the
    processor that was there before.

    Args:
        before: the processor that it takes the place of.
        wanted: "auto" (on NVIDIA GPUs in bfloat16 and float16) or "triton" (wherever the kernels run).
    """

    def __init__(self, before: Any, wanted: str = "auto"):
        self.before, self.wanted = before, wanted

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._suits(attn, hidden_states, args, kwargs):
            try:
                return _attend(attn, hidden_states)
            except Exception as error:
                failure = build_failure(error)
                if failure is None or self.wanted == "triton":
                    raise
                warnings.warn(f"torch's attention runs in the FLUX.2 VAE: {failure}", stacklevel=2)
                self.wanted = "torch"
        return self.before(attn, hidden_states, *args, **kwargs)

    def _suits(self, attn: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self.wanted == "torch" or x.dim() != 4 or not _is_plain(attn, x.shape[1]):
            return False
        if any(value is not None for value in (*args, *kwargs.values())):
            return False
        if torch.is_grad_enabled() and _trains(attn, x):
            return False
        if self.wanted == "triton":
            reason = why_not_triton(x.device)
            if reason is not None:
                raise InputError(f'attention="triton": {reason}')
            return True
        return x.device.type == "cuda" and _dtype(attn, x) in HALVES and why_not_triton(x.device) is None


def use_attention(model: nn.Module, wanted: str) -> int:
    """Choose what runs the attentions of a diffusers model; returns how many it has.

    Args:
        wanted: "auto", "triton", or "torch" for the processors that diffusers chose.

    Raises:
        InputError: another choice.
    """
    if wanted not in CHOICES:
        raise InputError(f"attention {wanted!r} is unknown: use one of {', '.join(CHOICES)}")
    found = 0
    for layer in model.modules():
        processor = getattr(layer, "processor", None)
        if processor is None or not hasattr(layer, "set_processor"):
            continue
        found += 1
        before = processor.before if isinstance(processor, SpatialAttention) else processor
        layer.set_processor(before if wanted == "torch" else SpatialAttention(before, wanted))  # type: ignore[operator]
    return found


def _is_plain(attn: Any, channels: int) -> bool:
    """Whether a layer is one head over the channels of an image, with a norm before it and nothing between."""
    from capacitor_kernels.ops.attention import MOST_COLUMNS

    absent = ("spatial_norm", "norm_q", "norm_k", "norm_cross")
    if attn.heads != 1 or attn.group_norm is None or any(getattr(attn, name, None) is not None for name in absent):
        return False
    return attn.to_q.out_features == attn.to_v.out_features == channels <= MOST_COLUMNS


def _trains(attn: Any, x: Tensor) -> bool:
    return x.requires_grad or any(parameter.requires_grad for parameter in attn.parameters())


def _dtype(attn: Any, x: Tensor) -> torch.dtype:
    """The dtype of the projections."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else attn.to_q.weight.dtype


def _attend(attn: Any, x: Tensor) -> Tensor:
    """`x [B,C,h,w]` through a layer: norm, attention over its `h*w` tokens, residual."""
    from capacitor_kernels import attention

    batch, channels, height, width = x.shape
    tokens = attn.group_norm(x.flatten(2)).transpose(1, 2).reshape(-1, channels)
    q, k, v = (project(tokens).contiguous() for project in (attn.to_q, attn.to_k, attn.to_v))
    out = torch.empty_like(q)
    attention(q, k, v, out, tokens_per_image=height * width)
    for layer in attn.to_out:
        out = layer(out)
    y = out.view(batch, height * width, channels).transpose(1, 2).reshape(x.shape)
    return (y + x if attn.residual_connection else y) / attn.rescale_output_factor
