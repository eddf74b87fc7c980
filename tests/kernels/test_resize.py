"""Resizing on a GPU against the CPU's: the same bits for any sizes, scales, crops, turns and filters; bad inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, Guarded, needs_gpu

from capacitor_kernels import reference
from capacitor_kernels.ops.resize import ResizeConfig, resize
from capacitor_kernels.pictures import Field, between_bytes
from capacitor_rt.images.convert import orient
from capacitor_rt.images.deferred import record_bytes, write_ready, write_records
from capacitor_rt.images.resample import FILTERS, Window, resample
from capacitor_rt.runtime.pictures import table, tent_weights

# few programs: the interpreter takes as long for a large tile as for a small one
CONFIG = ResizeConfig(64, 512, 4)
IMAGE = (24, 40)


@dataclass(frozen=True)
class Wish:
    """A picture, and the window of it that is wanted."""

    pixels: np.ndarray
    window: Window
    orientation: int = 1
    filter: str = "lanczos"

    def on_the_cpu(self) -> np.ndarray:
        framed = resample(self.pixels, self.window, self.filter, self.orientation >= 5)
        return orient(framed, self.orientation)

    def record(self) -> np.ndarray:
        out = np.full(record_bytes(self.pixels.shape, [self.window], self.filter), 0xA5, np.uint8)
        assert write_records(self.pixels, [self.window], self.orientation, self.filter, out) == ([0], len(out))
        return out


def wish(height: int, width: int, scale: float, orientation: int = 1, seed: int = 0, filter: str = "lanczos") -> Wish:
    """A random picture of which a window of IMAGE, upright, is wanted, resized to `scale` times that at least."""
    rows, columns = IMAGE if orientation < 5 else IMAGE[::-1]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    resized = max(rows, round(scale * rows)), max(columns, round(scale * columns))
    top, left = (resized[0] - rows) // 2, (resized[1] - columns) // 3
    return Wish(pixels, Window(*resized, top, left, top + rows, left + columns), orientation, filter)


def joined(records: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Records one behind another, and their table."""
    begins = np.cumsum([0, *map(len, records)])[:-1]
    sizes = torch.from_numpy(np.stack([record[: 4 * len(Field)].view(np.int32) for record in records]))
    sizes[:, Field.SOURCE] += torch.from_numpy(begins // 16).int()
    sizes[:, [Field.WEIGHTS_A, Field.WEIGHTS_B]] += torch.from_numpy(begins // 4).int()[:, None]
    sizes[:, Field.IMAGE] = torch.arange(len(records)).int()
    between = between_bytes(sizes)
    sizes[:, Field.BETWEEN] = ((between.cumsum(0) - between) // 16).int()
    return torch.from_numpy(np.concatenate(records)), sizes


def run(records: Sequence[np.ndarray], config: ResizeConfig | None = CONFIG, spare: int = 0) -> np.ndarray:
    """Resize records between guard bands; `spare` more images belong to nobody."""
    values, sizes = joined(records)
    source = Guarded(tuple(values.shape), torch.uint8, values)
    workspace = Guarded((int(between_bytes(sizes).sum()),), torch.uint8)
    out = Guarded((len(records) + spare, *IMAGE, 3), torch.uint8)
    out.tensor.fill_(0x5A)
    weights = source.tensor.view(torch.int32)
    resize(source.tensor, weights, sizes.to(DEVICE), workspace.tensor, out.tensor, sizes=sizes, config=config)
    workspace.check()
    out.check()
    assert (out.tensor[len(records) :] == 0x5A).all()
    return out.tensor.cpu().numpy()


def test_every_orientation_and_filter_has_the_bits_of_the_cpu():
    wishes = [wish(70 - 3 * o, 50 + 4 * o, 1.3, o, seed=o) for o in range(1, 9)]
    wishes += [wish(31, 61, 1.0, seed=9, filter=name) for name in sorted(FILTERS)]
    got = run([w.record() for w in wishes], spare=1)
    for w, image in zip(wishes, got, strict=False):
        np.testing.assert_array_equal(image, w.on_the_cpu(), f"{w.filter}, turned {w.orientation}")


def test_what_is_ready_is_copied():
    pixels = np.random.default_rng(1).integers(0, 256, (*IMAGE, 3), np.uint8)
    record = np.zeros(8192, np.uint8)
    nbytes = write_ready(pixels, record)
    np.testing.assert_array_equal(run([record[:nbytes]])[0], pixels)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    pictures=st.lists(
        st.tuples(st.integers(1, 150), st.integers(1, 150), st.floats(1.0, 3.0), st.integers(1, 8)),
        min_size=1,
        max_size=3,
    ),
    filter=st.sampled_from(sorted(FILTERS)),
)
def test_any_size_has_the_bits_of_the_cpu(pictures, filter):
    wishes = [wish(*picture, seed=i, filter=filter) for i, picture in enumerate(pictures)]
    for w, image in zip(wishes, run([w.record() for w in wishes]), strict=True):
        np.testing.assert_array_equal(image, w.on_the_cpu())


def test_the_shipped_config_has_the_same_bits():
    wishes = [wish(20, 33, 1.0), wish(9, 90, 1.0, 6)]
    records = [w.record() for w in wishes]
    np.testing.assert_array_equal(run(records, None), run(records))


def test_the_reference_has_the_same_bits():
    wishes = [wish(*picture) for picture in ((40, 60, 1.5), (10, 9, 1.0, 8))]
    source, sizes = joined([w.record() for w in wishes])
    found = reference.resize(source, source.view(torch.int32), sizes=sizes, shape=(2, *IMAGE, 3))
    for w, image in zip(wishes, found.numpy(), strict=True):
        np.testing.assert_array_equal(image, w.on_the_cpu())


@dataclass(frozen=True)
class Call:
    """Arguments of one call, the table changed in one place."""

    change: tuple[Field, int] | None = None
    source: int = 0
    weights: int = 0
    workspace: int = 0
    out: tuple[int, ...] = (2, *IMAGE, 3)
    dtype: torch.dtype = torch.uint8
    rows: int = 2

    def run(self) -> None:
        sizes, source, weights = table([(30, 41), (9, 50)], *IMAGE)
        if self.change:
            sizes[1, self.change[0]] = self.change[1]
        tensors = {
            "source": torch.zeros(source + self.source, dtype=self.dtype, device=DEVICE),
            "weights": torch.zeros(weights + self.weights, dtype=torch.int32, device=DEVICE),
            "images": sizes[: self.rows].to(DEVICE),
            "workspace": torch.zeros(20000 + self.workspace, dtype=torch.uint8, device=DEVICE),
            "out": torch.full(self.out, 7, dtype=torch.uint8, device=DEVICE),
        }
        resize(**tensors, sizes=sizes, config=CONFIG)


BAD = {
    "source dtype": (Call(dtype=torch.int32), TypeError, "source is int32, expected uint8"),
    "source too short": (Call(source=-20), ValueError, r"picture 1 uses elements \d+ to \d+ of source"),
    "source before its begin": (Call((Field.STEP_B, -300)), ValueError, "picture 1 uses elements -"),
    "weights too short": (Call(weights=-1), ValueError, "picture 1 uses elements .* of weights"),
    "weights negative": (Call((Field.WEIGHTS_A, -1)), ValueError, "of weights"),
    "workspace too short": (Call(workspace=-19000), ValueError, "of workspace, which has 1000"),
    "out too narrow": (Call(out=(2, IMAGE[0], IMAGE[1] - 1, 3)), ValueError, "picture 0 .* of an image of out"),
    "no such image": (Call((Field.IMAGE, 2)), ValueError, "picture 1 uses elements 2 to 3 of out, which has 2"),
    "out beyond its begin": (Call((Field.OUT, 0)), ValueError, "picture 1 uses elements -.* of an image of out"),
    "no taps": (Call((Field.TAPS_B, 0)), ValueError, "TAPS_B of picture 1 is 0, expected at least 1"),
    "precision": (Call((Field.PRECISION_A, 23)), ValueError, "PRECISION_A of picture 1 is 23, expected 0 to 22"),
    "another table": (Call(rows=1), ValueError, r"sizes has shape \[2, 19\], images \[1, 19\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call.run()


def test_the_good_call_is_good():
    Call().run()


def test_weights_that_point_outside_read_nothing_there():
    # what lies around the source is 0xA5, so a stray read would show
    sizes, source, _ = table([(30, 41)], *IMAGE)
    tables = tent_weights(sizes)
    count = int(sizes[0, Field.COUNT_A])
    tables[: count // 2], tables[count // 2 : count] = -1000, 1000
    pixels = Guarded((source,), torch.uint8, torch.full((source,), 3, dtype=torch.uint8))
    out = torch.zeros(1, *IMAGE, 3, dtype=torch.uint8, device=DEVICE)
    workspace = torch.zeros(int(between_bytes(sizes).sum()), dtype=torch.uint8, device=DEVICE)
    resize(pixels.tensor, tables.to(DEVICE), sizes.to(DEVICE), workspace, out, sizes=sizes, config=CONFIG)
    assert (out == 3).all()


@needs_gpu
def test_photographs_have_the_bits_of_the_cpu():
    wishes = [replace(wish(768, 1024, 1.2, o, seed=o)) for o in range(1, 9)]
    for w, image in zip(wishes, run([w.record() for w in wishes], None), strict=True):
        np.testing.assert_array_equal(image, w.on_the_cpu())
