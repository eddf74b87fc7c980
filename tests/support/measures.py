"""How far results are from the truth."""

from __future__ import annotations

from torch import Tensor


def relative_error(got: Tensor, truth: Tensor) -> float:
    """L2 norm of the difference over L2 norm of the truth, in float64."""
    assert got.shape == truth.shape, (got.shape, truth.shape)
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()
