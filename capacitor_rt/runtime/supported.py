"""What the Triton launches take: models, dtypes, and GPUs by compute capability."""

from __future__ import annotations

import torch

from capacitor_kernels.launch import INTERPRETED, check_e4m3, compute_capability

from ..config import ModelConfig
from ..errors import InputError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# from where programmatic dependent launch exists
DEPENDENT_CC = 90


def check_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> int:
    """The compute capability of `device`, such as 90.

    Raises:
        InputError: there are no launches for this architecture, dtype or device.
    """
    if config.in_channels != 3 or config.depthwise_kernel_size != 7:
        raise InputError(
            f"the Triton backend takes 3 channels and 7x7 convolutions, this model has {config.in_channels} and "
            f"{config.depthwise_kernel_size}: use backend='torch'"
        )
    if dtype not in DTYPES:
        raise InputError(f"the Triton backend has no launches for {dtype}: use .to(torch.float32), or backend='torch'")
    try:
        return compute_capability(device)
    except ValueError as error:
        raise InputError(f"{error}, backend='torch'") from error


def check_fp8(cc: int) -> None:
    """Raise InputError unless a GPU multiplies in e4m3."""
    try:
        check_e4m3(cc)
    except ValueError as error:
        raise InputError(f"{error}: load the model without encode_precision") from error


def check_dependent_launch(cc: int) -> None:
    """Raise InputError where there is no programmatic dependent launch."""
    if cc < DEPENDENT_CC or INTERPRETED:
        where = "Triton's interpreter" if INTERPRETED else f"compute capability {cc // 10}.{cc % 10}"
        raise InputError(f"dependent_launch needs compute capability 9.0 or later, not {where}: leave it off here")
