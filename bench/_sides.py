"""What the processes of the end-to-end benchmarks hold: one contender, or the references that all are compared with."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capacitor_rt.runtime.timing import copies_for, elapsed_us

from ._contenders import Contender, Run, Setting, Shape, truth_of
from ._device import MemoryMeter, exact_float32, release

# relative rms difference from the float32 reference beyond which no time is reported: in bfloat16 and plain torch
# random weights give 0.8 % for full_capacitor and 3.6 % for FLUX.2, which is many more layers deep
LIMITS = {
    "full_capacitor": {"bfloat16": 2e-2, "float16": 3e-3, "float32": 2e-4},
    "flux2": {"bfloat16": 1e-1, "float16": 2e-2, "float32": 2e-4},
}
TRUTH_PIXELS = 4 * 512 * 512
SEED = 0


def make_inputs(setting: Setting, model: str, shape: Shape, count: int | None = None) -> list[Tensor]:
    """Random inputs of one model: `count`, or enough copies to exceed three L2 caches."""
    if shape.direction == "encode":
        size = (shape.batch, 3, shape.size, shape.size)
    else:
        size = (shape.batch, setting.channels(model), shape.size // 16, shape.size // 16)
    on_gpu = setting.device.type == "cuda"
    nbytes = setting.dtype.itemsize * torch.Size(size).numel()
    l2 = max(torch.cuda.get_device_properties(setting.device).L2_cache_size, 64 << 20) if on_gpu else 0
    draw = torch.rand if shape.direction == "encode" else torch.randn
    copies = count or min(copies_for(nbytes, l2), 64)
    made = [draw(size, device=setting.device, dtype=setting.dtype) for _ in range(copies)]
    return [x.mul_(2).sub_(1) for x in made] if shape.direction == "encode" else made


class References:
    """Both models in float32 without TF32, on the device."""

    def __init__(self, setting: Setting):
        self.setting = setting

    def write(self, model: str, shape: Shape, path: Path) -> None:
        """Save the first images of a random input and what the model makes of them."""
        count = max(1, min(shape.batch, TRUTH_PIXELS // shape.size**2))
        try:
            (x,) = make_inputs(self.setting, model, shape, 1)
            with torch.no_grad(), exact_float32():
                truth = truth_of(self.setting, model, shape, x, count, SEED)
            unfinished = path.with_suffix(".tmp")
            torch.save((x[:count].clone(), truth.clone()), unfinished)
            os.replace(unfinished, path)
        finally:
            x = truth = None
            release(self.setting.device)


class Side:
    """One contender: checked, weighed, and called for a sample when it is its turn."""

    def __init__(self, setting: Setting, contender: Contender):
        self.setting, self.contender = setting, contender
        self._run: Run | None = None
        self._inputs: list[Tensor] = []
        self._turn = itertools.count()

    def ready(self) -> None:
        """Answer when the device has been set up for this process, so that no other process's memory is counted with
        it.
        """
        torch.zeros(1, device=self.setting.device)

    def prepare(self, shape: Shape, reference: Path) -> dict[str, Any]:
        """Build it for a shape and compare it with the reference; what was found, with no timing if it is wrong."""
        device = self.setting.device
        x, truth = torch.load(reference, map_location=device, weights_only=True)
        self._inputs = make_inputs(self.setting, self.contender.model, shape)
        self._inputs[0][: len(x)].copy_(x)
        meter, begin = MemoryMeter(device), time.perf_counter()
        run = self.contender.build(self.setting, shape, self._inputs[0])
        # captured graphs replay from the third call on at the latest, and replays are what is checked and weighed
        for _ in range(3 if device.type == "cuda" else 0):
            run(self._inputs[0])
        torch.manual_seed(SEED)
        got = run(self._inputs[0])[: len(truth)].float()
        gap = ((got - truth).square().mean() / truth.square().mean()).sqrt().item()
        del got
        found: dict[str, Any] = {"error": gap, "build_s": round(time.perf_counter() - begin, 3)}
        limit = LIMITS[self.contender.model][str(self.setting.dtype).removeprefix("torch.")]
        if not gap <= limit:
            return found | {"refused": f"differs from float32 by {gap:.2e}, more than {limit:.0e}"}
        memory = meter.measure(partial(run, self._inputs[-1]))
        if memory:
            found |= {"peak_bytes": memory.peak_bytes, "device_bytes": memory.device_bytes}
        self._run = run
        return found

    def sample(self, count: int) -> float:
        """Microseconds per call, of `count` calls."""
        device = self.setting.device
        if device.type == "cuda":
            # the first call after another process had the device pays for the change, and allocates
            self._call()

        def work() -> None:
            for _ in range(count):
                self._call()

        us = elapsed_us(work, device) / count
        if device.type == "cuda":
            # what is not used between turns is free for the others
            torch.cuda.empty_cache()
        return us

    def latency(self) -> float:
        """Median milliseconds of a call that is waited for, seen by the host."""
        seen = []
        for _ in range(20 if self.setting.device.type == "cuda" else 1):
            begin = time.perf_counter()
            self._call()
            if self.setting.device.type == "cuda":
                torch.cuda.synchronize(self.setting.device)
            seen.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(seen)

    def drop(self) -> None:
        """Give back everything but the weights on the CPU."""
        self._run, self._inputs = None, []
        release(self.setting.device)

    def _call(self) -> None:
        assert self._run is not None
        self._run(self._inputs[next(self._turn) % len(self._inputs)])
