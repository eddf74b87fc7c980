"""Launch configs that a user tuned: a cache records those that its calls are launched by, and goes on with them.

Another config may sum in another order, which changes the last bits of latents. Rows that are shipped are no part of
this: they are those of a version, which a cache notes when it changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..config import ModelConfig
from ..errors import CacheError
from ..images.geometry import Size
from ..reference import Autoencoder
from .model_source import ModelIdentity
from .plan import CachePlan


def configs_of(identity: ModelIdentity, buckets: Iterable[Size], posterior: bool) -> dict[str, Any] | None:
    """The entry `configs` of a plan: compute capability, and rows by family; None where no row of the user's launches.

    Raises:
        ConfigError: the user's config file is damaged.
    """
    if identity.cc is None:
        return None
    from ..runtime.configs import configs_in_force

    sizes = [(bucket.height, bucket.width) for bucket in buckets]
    direction = "posterior" if posterior else "encode"
    dtype = getattr(torch, identity.compute_dtype)
    model, precision = ModelConfig.from_dict(identity.config), "fp8" if identity.encoding else None
    families = configs_in_force(model, sizes, dtype, identity.cc, (direction,), precision)
    return {"compute_capability": identity.cc, "families": families} if families else None


@contextmanager
def kept(plan: CachePlan, cc: int | None, model: Autoencoder | None) -> Iterator[None]:
    """Launch by the configs that a cache was begun with.

    Args:
        cc: compute capability of the GPU that computes, None for none.
        model: that is in memory already.

    Raises:
        CacheError: they are another GPU's. ConfigError: they are damaged.
    """
    with kept_together([plan], cc, [model]):
        yield


@contextmanager
def kept_together(plans: Sequence[CachePlan], cc: int | None, models: Sequence[Autoencoder | None]) -> Iterator[None]:
    """As `kept`, of several caches whose images are encoded by turns: each plan's rows are of its own sizes."""
    families: dict[str, list[Any]] = {}
    for plan in plans:
        recorded = plan.fields.get("configs")
        _check_gpu(recorded, cc)
        for family, rows in (recorded["families"] if recorded else {}).items():
            known = families.setdefault(family, [])
            known += [row for row in rows if row not in known]
    if cc is None:
        yield
        return
    from ..runtime.configs import keep_configs

    with keep_configs(families, cc):
        # what ran before was launched by whatever was in force then
        for model in models:
            _release(model)
        try:
            yield
        finally:
            for model in models:
                _release(model)


def _check_gpu(recorded: dict[str, Any] | None, cc: int | None) -> None:
    if recorded is not None and recorded["compute_capability"] != cc:
        here = "no such GPU is here" if cc is None else f"this GPU is sm_{cc}"
        raise CacheError(
            f"the cache was begun with launch configs tuned for sm_{recorded['compute_capability']}, and {here}: "
            "go on where it was begun, or cache into a new OUT"
        )


def _release(model: Autoencoder | None) -> None:
    release = getattr(model, "release", nullcontext)
    release()
