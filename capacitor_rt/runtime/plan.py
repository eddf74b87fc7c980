"""Plans: (architecture, key) -> steps in order, buffers in one arena, FLOPs and bytes. Pure: no GPU needed."""

from __future__ import annotations

from capacitor_kernels.launch import check_e4m3
from capacitor_kernels.user_rows import UserRowsError

from ..config import ModelConfig
from ..errors import ConfigError
from .launch_plan import DIRECTIONS, LaunchPlan, PlanKey, Step, Tensors
from .plan_builder import Builder
from .plan_dico import DicoBuilder
from .plan_fp8 import Fp8Builder

__all__ = ["DIRECTIONS", "LaunchPlan", "PlanKey", "Step", "Tensors", "make_plan"]


def make_plan(config: ModelConfig, key: PlanKey) -> LaunchPlan:
    """Plan a key for a model of `config`.

    Raises:
        ConfigError: the user's config file is damaged.
        ValueError: an unknown direction, a size that is not whole patches, or fp8 for what has no launches in it.
    """
    if key.direction not in DIRECTIONS:
        raise ValueError(f"direction {key.direction!r} is unknown: use one of {DIRECTIONS}")
    p = config.patch_size
    if key.height % p or key.width % p or min(key.batch, key.height, key.width) < 1:
        raise ValueError(f"{key.batch} images of {key.height}x{key.width} are not whole patches of {p} pixels")
    if key.precision is not None:
        if key.precision != "fp8" or key.direction not in ("encode", "posterior") or config.dico is not None:
            raise ValueError(
                f"{key.direction} has no launches in {key.precision}: only full_capacitor's encoder has, in fp8"
            )
        check_e4m3(key.cc)
    kind = DicoBuilder if config.dico is not None else Fp8Builder if key.precision else Builder
    builder = kind(config, key)
    try:
        return builder.decode() if key.direction in ("decode", "predict") else builder.encode()
    except UserRowsError as error:
        raise ConfigError(str(error)) from error
