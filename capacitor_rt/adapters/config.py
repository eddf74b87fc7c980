"""`config` of the adapters: the settings that pipelines and trainers read, as attributes and as a mapping."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from ..errors import InputError
from ..model import FullCapacitor


class AdapterConfig(dict[str, Any]):
    """Read-only settings: `config.scaling_factor`, `config["scaling_factor"]`, `config.get("scaling_factor")`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config has no {name!r}: it has {', '.join(self)}") from None

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise InputError("config describes the adapter and cannot be changed: make another adapter")

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def shared_settings(model: FullCapacitor, stride: int, channels: int) -> dict[str, Any]:
    """Settings of latents `[channels, H/stride, W/stride]`.

    The number of `block_out_channels` is what pipelines compute the stride from, `2 ** (len - 1)`.

    Raises:
        InputError: the stride is no power of 2.
    """
    levels = int(math.log2(stride))
    if stride < 2 or 2**levels != stride:
        raise InputError(f"latents of stride {stride} fit no pipeline of diffusers, which take powers of 2")
    width = model.config.model_dim
    return {
        "in_channels": model.config.in_channels,
        "out_channels": model.config.in_channels,
        "latent_channels": channels,
        "block_out_channels": (width,) * (levels + 1),
        "down_block_types": ("DownEncoderBlock2D",) * (levels + 1),
        "up_block_types": ("UpDecoderBlock2D",) * (levels + 1),
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "act_fn": "gelu",
        "sample_size": 1024,
        "force_upcast": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "spatial_compression_ratio": stride,
        "shift_factor": 0.0,
    }
