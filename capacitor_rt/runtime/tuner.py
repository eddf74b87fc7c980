"""Configs chosen by the GPU at hand: candidates for the launches of a call, measured behind their check.

A candidate that does not compile, does not fit, or disagrees with plain torch more than the bounds of `doctor --check`
allow is passed over. The others are timed in turn with the present config, interleaved, and compared by the ratio of
medians, so that drifting clocks do not decide. Nothing here runs by itself: only `capacitor-rt tune` asks.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from capacitor_kernels import config_rows, gemm, gpu_limits, tuning, user_rows
from capacitor_kernels.launch import E4M3, INTERPRETED, Launch, dtype_name

from ..config import ModelConfig
from ..errors import CapacitorError, InputError
from .batching import ARENA_BUDGET, micro_batch
from .launch_cases import LaunchCase, launch_case
from .memory import DeviceMemoryError, is_out_of_memory
from .plan import PlanKey, Step, make_plan
from .platform import describe, one_line
from .precompile import compile_launches, identity
from .self_check import compare, device_works, undisturbed
from .timing import Ready, Variant, prepare, time_ready

WORTHWHILE = 0.99
"""A config must take less than this part of the present one's time to take its place."""
TILES = ((128, 128), (256, 128), (128, 256), (128, 64), (64, 128), (64, 64))
DEPTHS = ((64, 3), (64, 4), (32, 4))
# of 8 bits: as many bytes
E4M3_DEPTHS = ((128, 3), (128, 4), (64, 3), (64, 4))
AT_A_TIME = 8
CHECKED_IMAGES = 2
REPLAYS, WARM_SECONDS = 11, 0.1
# a rate that every GPU is in the order of: only shares of time follow from it
_FLOPS_PER_US, _BYTES_PER_US = 2e8, 2e6


class TuningError(CapacitorError):
    """The device was lost while candidates were measured."""


@dataclass(frozen=True)
class Subject:
    """One op at one shape.

    Attributes:
        key: of the plan that queues it, of as many images as run together.
        shape, dtype: by which its config is looked up.
        present: the config that is in force.
        count: how often the plan queues it.
        share: of the time of all subjects together, estimated.
        at: which of the plan's steps of this op is the first of this shape.
    """

    op: str
    key: PlanKey
    shape: dict[str, int]
    dtype: torch.dtype
    present: Any
    count: int
    share: float
    at: int = 0


@dataclass(frozen=True)
class Trial:
    """A candidate: its microseconds and their ratio to the present config's, or why it was passed over."""

    subject: Subject
    config: Any
    us: float = 0.0
    ratio: float = float("inf")
    problem: str = ""


@dataclass(frozen=True)
class Choice:
    """What came of a subject.

    Attributes:
        config: the best one, which is the present one where no other was worthwhile.
        us, before_us: microseconds of a launch, of it and of the present config.
        tried, passed_over: numbers of candidates.
    """

    subject: Subject
    config: Any
    us: float
    before_us: float
    tried: int
    passed_over: int

    @property
    def is_new(self) -> bool:
        return self.config != self.subject.present


class Tuner:
    """Measures candidates for the launches of some calls, for so many seconds.

    Args:
        model: whose shapes count.
        keys: calls, of so many images each; as many of them as the runtime runs together are measured.
        device: a CUDA device, or the CPU under Triton's interpreter, to try the tuner itself out.
        seconds: after which nothing new is begun. Ops share them by the time that they take.
        ops: to tune; all when empty.

    Raises:
        InputError: an op that these calls do not have.
    """

    def __init__(
        self, model: ModelConfig, keys: Sequence[PlanKey], device: torch.device, seconds: float, ops: Sequence[str] = ()
    ):
        self.model, self.device, self.seconds = model, device, seconds
        self.subjects = _subjects(model, keys, ops)
        self.choices: list[Choice] = []
        self._waiting = [candidates(subject) for subject in self.subjects]

    @property
    def total(self) -> int:
        """Number of candidates."""
        return sum(map(len, self._waiting))

    def run(self) -> Iterator[Trial]:
        """Measure; `choices` has what came of the subjects that were finished.

        Raises:
            DeviceMemoryError: not even the present launches fit. TuningError: the device was lost.
        """
        begin, left = time.monotonic(), sum(subject.share for subject in self.subjects)
        for subject, waiting in zip(self.subjects, self._waiting, strict=True):
            now = time.monotonic()
            slot = (begin + self.seconds - now) * subject.share / left
            left -= subject.share
            with undisturbed(self.device):
                yield from self._tune(subject, waiting, now + slot)

    def _tune(self, subject: Subject, waiting: Sequence[Any], deadline: float) -> Iterator[Trial]:
        present = self._ready_present(subject)
        before = time_ready({"present": present}, self.device, REPLAYS, WARM_SECONDS)["present"].us
        best, tried, passed_over = Trial(subject, subject.present, before, 1.0), 0, 0
        seen = {self._identity(subject, subject.present)}
        for at in range(0, len(waiting), AT_A_TIME):
            if time.monotonic() >= deadline:
                break
            group = []
            for config in waiting[at : at + AT_A_TIME]:
                same = self._identity(subject, config)
                # a field that this op does not look at changes nothing
                if same is None or same not in seen:
                    seen.add(same)
                    group.append(config)
            self._compile(subject, group)
            for config in group:
                if time.monotonic() >= deadline:
                    break
                trial = self._try(subject, config, present)
                tried, passed_over = tried + 1, passed_over + bool(trial.problem)
                best = trial if trial.ratio < min(best.ratio, WORTHWHILE) else best
                yield trial
        self.choices.append(Choice(subject, best.config, best.us, best.us / best.ratio, tried, passed_over))

    def _ready_present(self, subject: Subject) -> Ready:
        try:
            return self._ready(self._case(subject, subject.present))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"{subject.op} of {subject.key.batch} images of {subject.key.height}x{subject.key.width} does not fit "
                f"on {self.device} in the copies that a measurement takes: free memory or give a smaller --batch"
            ) from error

    def _try(self, subject: Subject, config: Any, present: Ready) -> Trial:
        try:
            few = replace(subject.key, batch=min(CHECKED_IMAGES, subject.key.batch))
            case = self._case(replace(subject, key=few), config)
            row = compare(case.name, case.run(self.device, torch.Generator("cpu").manual_seed(0)), few.dtype)
            if not row.ok:
                return Trial(subject, config, problem=row.problem)
            ready = {"present": present, "candidate": self._ready(self._case(subject, config))}
            timed = time_ready(ready, self.device, REPLAYS, WARM_SECONDS)
        except Exception as error:  # a compiler raises what it likes on a tile that it cannot do
            if not device_works(self.device):
                raise TuningError(
                    f"{self.device} was lost while {subject.op} ran by {config} ({one_line(error)}): start again, "
                    f"with --op for the other ops; this config is a bug, please report the line above"
                ) from error
            return Trial(subject, config, problem=one_line(error))
        return Trial(subject, config, timed["candidate"].us, timed["candidate"].us / timed["present"].us)

    def _case(self, subject: Subject, config: Any) -> LaunchCase:
        # shapes of partial sums and workspaces depend on the config
        with tuning.using(subject.op, config):
            steps = _steps(self.model, subject.key, subject.op)
            return launch_case(self.model, subject.key, subject.op, steps[subject.at])

    def _ready(self, case: LaunchCase) -> Ready:
        nbytes = sum(spec.nbytes for spec in case.specs.values())
        return prepare(Variant(case.name, lambda: case.prepare(self.device, None).call, nbytes), self.device)

    def _identity(self, subject: Subject, config: Any) -> tuple[object, ...] | None:
        """Equal for configs that launch the same; None where none can be made of it, which a trial will tell."""
        try:
            launches = self._case(subject, config).launches(subject.key.cc)
        except Exception:
            return None
        return tuple((launch.grid, identity(launch)) for launch in launches)

    def _compile(self, subject: Subject, configs: Sequence[Any]) -> None:
        """Side by side; what fails here fails again, with its reason, when it is tried."""
        if INTERPRETED:
            return
        launches: list[Launch] = []
        for config in configs:
            with suppress(Exception):
                launches += self._case(subject, config).launches(subject.key.cc)
        with suppress(Exception):
            compile_launches(launches)


def candidates(subject: Subject) -> list[Any]:
    """Configs worth a measurement, likely ones first, the present one left out."""
    family, present, dtype = config_rows.get_family(subject.op), subject.present, subject.dtype
    cc = subject.key.cc
    shipped = config_rows.rows(gpu_limits.base_cc(cc), family.name)
    found = [row.config for row in (*tuning.in_force(cc, family.name), *shipped)]
    found += [family.default(gpu_limits.base_cc(cc), subject.shape, dtype, use) for use in config_rows.USES]
    found += [*family.forms, *_neighbours(present)]
    if family.config is gemm.GemmConfig:
        for (block_m, block_n), (block_k, stages), warps in _tiles(dtype):
            tile = replace(present, block_m=block_m, block_n=block_n, block_k=block_k, maxnreg=None)
            found.append(replace(tile, num_warps=warps, num_stages=stages))
    else:
        found += [config for one in _neighbours(present) for config in _neighbours(one)]
    found += [row.config for known in gpu_limits.COMPUTE_CAPABILITIES for row in config_rows.rows(known, family.name)]
    if cc < 90:
        found = [config for config in found if not getattr(config, "tma", False)]
    if subject.key.use == "throughput":
        # slices of K cost a workspace for every image
        found = [config for config in found if getattr(config, "split_k", 1) <= max(1, getattr(present, "split_k", 1))]
    legal = (c for c in dict.fromkeys(found) if all(user_rows.legal(name, value) for name, value in vars(c).items()))
    return [config for config in legal if config != present]


def _tiles(dtype: torch.dtype) -> Iterator[tuple[tuple[int, int], tuple[int, int], int]]:
    depths = E4M3_DEPTHS if dtype == E4M3 else DEPTHS
    return ((tile, depth, warps) for depth in depths for tile in TILES for warps in (8, 4))


def _neighbours(config: Any) -> list[Any]:
    """One field changed: doubled, halved, one more or less, the other way."""
    found = []
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            values: list[Any] = [not value]
        elif field.name == "num_stages":
            values = [value - 1, value + 1]
        elif field.name == "maxnreg":
            values = [None, 128, 168, 224]
        elif isinstance(value, int):
            values = [value // 2, value * 2]
        else:
            values = []
        found += [replace(config, **{field.name: v}) for v in values if v is None or v >= 1 or isinstance(v, bool)]
    return found


def _subjects(model: ModelConfig, keys: Sequence[PlanKey], ops: Sequence[str]) -> list[Subject]:
    """Ops of the plans of some calls, each shape once, those that take longest first."""
    found: dict[Any, Subject] = {}
    for key in keys:
        together = micro_batch(model, replace(key, batch=1), ARENA_BUDGET)
        # rows are of many images; few of them take narrower tiles of the same bits by themselves
        key = replace(key, batch=min(key.batch, together), narrow=False)
        with tuning.listening() as asked:
            make_plan(model, key)
        for op in dict.fromkeys(family for family, *_ in asked):
            looked_up = [(shape, dtype) for family, shape, dtype in asked if family == op]
            # a plan looks a config up for each step that has one
            steps = _steps(model, key, op)
            for at, (step, (shape, dtype)) in enumerate(zip(steps, looked_up, strict=True)):
                present = step.options["config"]
                cost = max(step.flops / _FLOPS_PER_US, step.nbytes / _BYTES_PER_US)
                identity = (op, tuple(sorted(shape.items())), key.use)
                subject = found.setdefault(identity, Subject(op, key, shape, dtype, present, 0, 0.0, at))
                if subject.key == key:
                    found[identity] = replace(subject, count=subject.count + 1, share=subject.share + cost)
    unknown = sorted(set(ops) - {subject.op for subject in found.values()})
    if unknown:
        known = sorted({subject.op for subject in found.values()})
        raise InputError(f"op {' '.join(unknown)} is none of these calls': choose from {' '.join(known)}")
    chosen = [subject for subject in found.values() if not ops or subject.op in ops]
    total = sum(subject.share for subject in chosen)
    return sorted((replace(s, share=s.share / total) for s in chosen), key=lambda s: -s.share)


def _steps(model: ModelConfig, key: PlanKey, op: str) -> list[Step]:
    """Steps of an op that were given a config, in order."""
    return [step for step in make_plan(model, key).steps if step.op == op and step.options.get("config") is not None]


def row_of(choice: Choice, device: torch.device, command: str) -> dict[str, Any]:
    """A choice as a row of a config file, with where it comes from."""
    key, facts = choice.subject.key, describe(device)
    evidence: dict[str, Any] = {"kind": "measured", "us": round(choice.us, 2), "before_us": round(choice.before_us, 2)}
    evidence["images"] = f"{key.batch}x{key.height}x{key.width}"
    names = {"gpu": "GPU", "driver": "driver", "torch": "torch", "triton": "Triton", "capacitor_rt": "capacitor_rt"}
    evidence |= {name: facts.get(fact) for name, fact in names.items()}
    evidence["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    evidence["command"] = command[:400]
    line = {"shape": choice.subject.shape, "dtype": dtype_name(choice.subject.dtype), "use": key.use}
    return line | {"config": asdict(choice.config), "evidence": evidence}
