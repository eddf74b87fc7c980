"""Shared by the kernel tests: guard-banded NaN buffers, error-ratio asserts, grids and inputs."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch

from capacitor_kernels.launch import INTERPRETED

GRIDS = [(1, 1), (2, 6), (7, 5), (14, 14), (16, 16), (32, 32)]
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
DTYPES = [torch.float32, torch.float16]
_GUARD = 256
Case = TypeVar("Case")


class Guarded:
    """A tensor inside a larger buffer of NaN (or 0xA5 for integers), to catch stray reads and writes.

    `tensor` starts out as NaN, or as `values`; `check()` fails if anything around it changed.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, values: torch.Tensor | None = None) -> None:
        count = 1
        for size in shape:
            count *= size
        # a gap that is a multiple of 16 bytes keeps the alignment that launchers ask for
        self._count = count
        filler = float("nan") if dtype.is_floating_point else 0xA5
        self._buffer = torch.full((count + 2 * _GUARD,), filler, dtype=dtype, device=DEVICE)
        self.tensor = self._buffer[_GUARD : _GUARD + count].view(shape)
        if values is not None:
            self.tensor.copy_(values)

    def check(self) -> None:
        """Assert that the bands on both sides still hold the filler."""
        for side, band in (
            ("before", self._buffer[:_GUARD]),
            ("after", self._buffer[_GUARD + self._count :]),
        ):
            intact = band.isnan() if band.dtype.is_floating_point else band == 0xA5
            assert intact.all(), f"{int((~intact).sum())} elements {side} the tensor were overwritten"


def guarded_output(*shape: int, dtype: torch.dtype) -> Guarded:
    """An output full of NaN between guard bands."""
    return Guarded(shape, dtype)


def guarded_input(values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy of `values` on the test device with NaN on both sides: a read outside shows up in the result."""
    return Guarded(tuple(values.shape), dtype or values.dtype, values).tensor


def randn(*shape: int, seed: int, scale: float = 1.0, heavy: bool = False) -> torch.Tensor:
    """Seeded normal float32 values on the CPU; `heavy` gives Student-t tails (3 degrees of freedom)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if heavy:
        chi = torch.randn((3, *shape), generator=generator).square().mean(0)
        x = x / chi.sqrt().clamp_min(0.05)
    return x * scale


def exact(case: Case) -> Case:
    """`case` with its float32 values rounded to sixteenths where products are numpy's: sums are then exact.

    In which order BLAS adds depends on a row's place in its tile, on some CPUs; on a GPU it does not.
    """
    for t in vars(case).values() if INTERPRETED else ():
        if isinstance(t, torch.Tensor) and t.dtype == torch.float32:
            t.copy_((t * 16).round() / 16)
    return case


def rms(x: torch.Tensor) -> float:
    """Root mean square in float64."""
    return x.double().square().mean().sqrt().item()


def assert_close(
    name: str,
    got: torch.Tensor,
    truth: torch.Tensor,
    baseline: torch.Tensor | None = None,
    *,
    ratio: float = 2.0,
    floor: float = 1e-6,
    max_ratio: float = 0.05,
) -> None:
    """Compare with a float64 truth, using the same maths in plain torch and the working dtype as the
    yardstick.

    Two limits, both relative to the rms of the truth: the rms of the error is at most `ratio` times the
    baseline's plus `floor`; the largest error is at most `max_ratio`, or twice the baseline's own largest
    where that is more.
    """
    got64, truth64 = got.double().cpu(), truth.double().cpu()
    assert got64.shape == truth64.shape, f"{name}: shape {tuple(got64.shape)}, expected {tuple(truth64.shape)}"
    bad = ~got64.isfinite()
    assert not bad.any(), f"{name}: {int(bad.sum())} values are not finite, first at {bad.nonzero()[0].tolist()}"
    scale = max(rms(truth64), 1e-30)
    error = (got64 - truth64).abs()
    error_rms, error_max = rms(error) / scale, error.max().item() / scale
    base = (baseline.double().cpu() - truth64).abs() if baseline is not None else torch.zeros(1, dtype=torch.float64)
    base_rms, base_max = rms(base) / scale, base.max().item() / scale
    print(f"{name}: rms error {error_rms:.2e} (baseline {base_rms:.2e}), max {error_max:.2e} ({base_max:.2e})")
    where = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    assert error_rms <= ratio * base_rms + floor, f"{name}: rms error {error_rms:.2e}, baseline {base_rms:.2e}"
    limit = max(max_ratio, 2 * base_max)
    assert error_max <= limit, (
        f"{name}: max error {error_max:.2e} of rms at {where}: {got64[tuple(where)]:.6g}, "
        f"expected {truth64[tuple(where)]:.6g}; limit {limit:.2e}"
    )


def assert_same_bits(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Bitwise equality, with the first differing coordinate."""
    assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.shape} {a.dtype} against {b.shape} {b.dtype}"
    if not torch.equal(a, b):
        where = (a != b).nonzero()[0].tolist()
        raise AssertionError(f"{name}: differs first at {where}: {a[tuple(where)]} against {b[tuple(where)]}")


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Limits of `assert_close` beyond the baseline's own error: a few roundings of the dtype."""
    return {"floor": 1e-6, "max_ratio": 3e-5} if dtype == torch.float32 else {"floor": 2e-5, "max_ratio": 1e-2}


def needs_gpu(test):
    """Mark a test as `gpu` and skip it, with the reason, where there is none."""
    skip = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU and no interpreter")
    return pytest.mark.gpu(skip(test))


def grid_id(grid: tuple[int, int]) -> str:
    """Readable test id of a token grid."""
    return f"{grid[0]}x{grid[1]}"
