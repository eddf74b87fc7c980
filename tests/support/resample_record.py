"""What resampling gives, on record, by both of its paths; and mutants of them, which the record has to notice.

ATEN_CPU_CAPABILITY=avx2 python resample_record.py AVX2     the record holds there, and no mutant passes
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from capacitor_rt.images import resample as module
from capacitor_rt.images.resample import AxisWeights, Window

# the bytes are part of what a cache is: where they are others, old caches cannot be continued
RECORD = {
    "bicubic": "e94de5d0b3c2522dba8904a065280a7c615f890221510e079345def5700e66c0",
    "bilinear": "fdb84298f8fe18f74b120f7d1e4ab2cf51b8b0dfb68e21e268cdf9e1b0c4a6e3",
    "box": "f793ddd98d0b03eb7b2935004eb066922ba85660ddd7ad5b9e093f781e5e7147",
    "lanczos": "a38c209031ca00af597c7bde363936a4b81e8848dbc4e484d49501c5ea4abb5b",
}
# Lanczos came with torch 2.12
BY_TORCH = {"bicubic", "bilinear"} | ({"lanczos"} if hasattr(torch._C._nn, "_upsample_lanczos2d_aa") else set())
WINDOWS = (
    Window(128, 170, 0, 0, 128, 170),
    Window(512, 683, 100, 50, 356, 306),
    Window(64, 400, 0, 0, 64, 64),
    # of every remainder that a vector's end may leave
    *(Window(30 + n, 31 + n, 0, 0, 30 + n, 31 + n) for n in range(16)),
)
Path = Callable[[np.ndarray, Window, str, bool], np.ndarray]


def pictures() -> list[np.ndarray]:
    """Noise, and edges between black and white, where filters overshoot and sums are clipped."""
    noise = (np.arange(300 * 400 * 3, dtype=np.uint32) * 2654435761 >> 24).astype(np.uint8).reshape(300, 400, 3)
    return [noise, np.where(noise[:, :, :1] > 127, 255, noise & 1).astype(np.uint8)]


def digest(path: Path, filter: str) -> str:
    """Hash of all windows of all pictures, rows first and columns first."""
    found = hashlib.sha256()
    for pixels in pictures():
        for window in WINDOWS:
            for columns_first in (False, True):
                found.update(path(pixels, window, filter, columns_first).tobytes())
    return found.hexdigest()


def _one_by_torch(pixels: np.ndarray, *how: object) -> np.ndarray:
    return module._by_torch(pixels[None], *how)[0]


def check(paths: tuple[str, ...] = ("matrices", "torch", "chosen")) -> None:
    """Both paths give the bytes on record, and torch is chosen where it has the filter.

    Without the last a torch that rounds otherwise would pass: `resample` gives it up, for matrices ten times as slow.
    """
    for filter, expected in RECORD.items():
        if "matrices" in paths:
            assert digest(module.by_matrices, filter) == expected, ("matrices", filter)
        if "torch" in paths and filter in BY_TORCH:
            assert digest(_one_by_torch, filter) == expected, ("torch", filter)
        if "chosen" in paths:
            module.torch_agrees.cache_clear()
            assert module.torch_agrees(filter) == (filter in BY_TORCH), ("chosen", filter)


def _down(high: np.ndarray, low: np.ndarray, precision: int) -> np.ndarray:
    sums = (high.astype(np.int64) << 8) + low.astype(np.int64)
    return np.clip(sums >> precision, 0, 255).astype(np.uint8)


def _to_even(high: np.ndarray, low: np.ndarray, precision: int) -> np.ndarray:
    sums = (high.astype(np.int64) << 8) + low.astype(np.int64)
    return np.clip(np.rint(sums / (1 << precision)), 0, 255).astype(np.uint8)


def _wrapping(high: np.ndarray, low: np.ndarray, precision: int) -> np.ndarray:
    sums = (high.astype(np.int64) << 8) + low.astype(np.int64) + (1 << precision >> 1)
    return (sums >> precision).astype(np.uint8)


_axis_weights, _interpolate = module.axis_weights, functional.interpolate


def _fewer_bits(filter: str, length: int, resized: int, begin: int, end: int) -> AxisWeights:
    weights = _axis_weights(filter, length, resized, begin, end)
    return AxisWeights(weights.first, (weights.taps >> 1).astype(np.int16), weights.precision - 1)


def _cut_weights(filter: str, length: int, resized: int, begin: int, end: int) -> AxisWeights:
    weights = _axis_weights(filter, length, resized, begin, end)
    exact = module._exact_weights(filter, length, resized, begin, end)[1]
    return AxisWeights(weights.first, np.floor(exact * (1 << weights.precision)).astype(np.int16), weights.precision)


def _in_float(picture: Tensor, **options: object) -> Tensor:
    if options["mode"] == "lanczos":
        options["mode"] = "bicubic"
    return _interpolate(picture.float(), **options).round().clamp(0, 255).byte()


def _last_of_a_row(picture: Tensor, **options: object) -> Tensor:
    """The end of a row that is no whole vector is off by one, in large pictures alone."""
    found = _interpolate(picture, **options).clone()
    if found.shape[-1] % 16 and found.shape[-2] > 60:
        found[..., -1] ^= 1
    return found


def _some_rounding(picture: Tensor, **options: object) -> Tensor:
    """Grey is rounded down, in large pictures alone."""
    found = _interpolate(picture, **options)
    return found if found.shape[-2] < 100 else found - (found == 128).byte()


MUTANTS: dict[str, tuple[object, str, Callable[..., object], str]] = {
    "sums are rounded down": (module, "_rounded", _down, "matrices"),
    "sums are rounded to even": (module, "_rounded", _to_even, "matrices"),
    "sums wrap around": (module, "_rounded", _wrapping, "matrices"),
    "weights have a bit less": (module, "axis_weights", _fewer_bits, "matrices"),
    "weights are rounded down": (module, "axis_weights", _cut_weights, "matrices"),
    "torch computes in float": (functional, "interpolate", _in_float, "torch"),
    "torch errs at the end of rows": (functional, "interpolate", _last_of_a_row, "torch"),
    "torch rounds grey down": (functional, "interpolate", _some_rounding, "torch"),
    "torch errs, and is not chosen": (functional, "interpolate", _in_float, "chosen"),
}


@contextmanager
def mutated(name: str) -> Iterator[None]:
    where, what, mutant, _ = MUTANTS[name]
    before = getattr(where, what)
    setattr(where, what, mutant)
    try:
        yield
    finally:
        setattr(where, what, before)
        module.torch_agrees.cache_clear()


def notices(name: str) -> bool:
    """Whether the record tells a mutant by the path that it is of."""
    with mutated(name):
        try:
            check((MUTANTS[name][3],))
        except AssertionError:
            return True
    return False


if __name__ == "__main__":
    running = torch.backends.cpu.get_cpu_capability()
    assert running == sys.argv[1], f"torch runs as {running}, not as {sys.argv[1]}"
    torch.set_num_threads(1)
    check()
    torch.set_num_threads(3)
    check(("torch",))
    torch.set_num_threads(1)
    unnoticed = [name for name in MUTANTS if not notices(name)]
    assert not unnoticed, unnoticed
