"""What the decoder is told of the time: its embedding, and the modulation of every block (AdaLN), in float32.

A `Float32Module` keeps its weights in float32 when the model is cast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig

if TYPE_CHECKING:
    from typing_extensions import Self


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of `nn.Module._apply`, kept from casting a tensor below float32."""

    def apply(t: Tensor) -> Tensor:
        out = fn(t)
        if not out.is_floating_point() or out.dtype.itemsize >= 4:
            return out
        return t.to(out.device, torch.promote_types(torch.float32, t.dtype))

    return apply


class Float32Module(nn.Module):
    """A module whose tensors never go below float32, whatever `.to(dtype)` asks for."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(at_least_float32(fn), recurse)


class TimeEmbed(Float32Module):
    """Sinusoidal embedding of `1000 t` and a two-layer MLP: `[B] -> [B, D]`, in float32."""

    freqs: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.register_buffer("freqs", default_freqs())
        self.proj_in = nn.Linear(256, config.model_dim)
        self.proj_out = nn.Linear(config.model_dim, config.model_dim)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].to(self.freqs) * 1000.0 * self.freqs
        return self.proj_out(F.silu(self.proj_in(torch.cat([angles.sin(), angles.cos()], 1))))


def default_freqs() -> Tensor:
    """The 128 frequencies `10000^(-k/127)` of the time embedding, float32."""
    return torch.tensor([10000.0 ** (-k / 127) for k in range(128)], dtype=torch.float32)


class AdaLNBase(Float32Module):
    """`proj`: the modulation that all blocks share, from `SiLU(cond)`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.proj = nn.Linear(config.model_dim, config.modulation_channels)

    def forward(self, a: Tensor) -> Tensor:
        return self.proj(a)


class AdaLNDelta(Float32Module):
    """One block's low-rank correction of the shared modulation."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.down = nn.Linear(config.model_dim, config.adaln_low_rank_rank, bias=False)
        self.up = nn.Linear(config.adaln_low_rank_rank, config.modulation_channels, bias=False)

    def forward(self, a: Tensor) -> Tensor:
        return self.up(self.down(a))
