"""The modelled time of a launch, and of every launch of a call: its machine code on the pipes of a GPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ._branches import Work, floor, simulate
from ._compile import compile_launch, ctas_per_sm
from ._gpu_model import CTA_START, EARLY_GAP, HIDING, Cta, Gpu, schedule
from ._machine_code import SM_PIPES, Instruction, Region, disassemble, loops, regions
from ._row_launches import identity

if TYPE_CHECKING:
    from capacitor_kernels.launch import Launch
    from capacitor_rt import ModelConfig
    from capacitor_rt.runtime.plan import LaunchPlan, PlanKey, Step

_BARRIER = 25
SPECIALISED = "expand_hopper_kernel"
_FP8 = ("expand_fp8_kernel", "project_fp8_kernel")
_compiled: dict[Any, tuple[bytes, int, int, int, int]] = {}


class Traffic(NamedTuple):
    """Bytes of one CTA, each address once: lanes and warps that share a line meet in L1."""

    read: float
    written: float


@dataclass
class Prediction:
    """One launch, as often as a call queues it. Times are in microseconds.

    Attributes:
        ctas: that fit an SM.
        limit: what binds: a pipe, with "+ exposed" where it idles for an eighth of the time or more, or memory.
        parts: time by what could bind.
        pipes: cycles of one CTA by region and pipe.
    """

    kernel: str
    grid: tuple[int, ...]
    registers: int
    stack: int
    smem: int
    ctas: int
    waves: float
    us: float
    limit: str
    parts: dict[str, float]
    flops: int
    count: int = 0
    pipes: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Branches:
    """Milliseconds of a call whose runs are two branches of halves each, by simulation.

    Attributes:
        floor: what no schedule gets below: the busiest pipe, L2, DRAM, or the rate of a whole-GPU product.
        expected: where CTAs of both branches share an SM as well as those of one launch do.
        turns: where they gain nothing from one another.
        sequence: one half after the other.
        whole: the whole batch as one branch.
    """

    floor: float = 0.0
    expected: float = 0.0
    turns: float = 0.0
    sequence: float = 0.0
    whole: float = 0.0


@dataclass
class CallPrediction:
    """One call of a model: its runs of a micro-batch each, its launches and the gaps between them, in milliseconds.

    Attributes:
        branches: of a call with `overlap`, whose launches do not follow each other.
    """

    name: str
    gpu: str
    runs: list[int]
    launches: list[Prediction]
    gaps: float
    floor: float
    branches: Branches | None = None

    @property
    def kernels(self) -> float:
        return sum(launch.us * launch.count for launch in self.launches) / 1e3

    @property
    def ms(self) -> float:
        return self.branches.expected if self.branches else self.kernels + self.gaps


def predict_call(
    model: ModelConfig, key: PlanKey, gpu: Gpu, name: str, hiding: float = HIDING, overlap: bool = False
) -> CallPrediction:
    """The time that the launches of a call take on a GPU, host time and copies in and out not counted.

    Args:
        overlap: of the runtime: an even run is two branches of a graph, each of half the images.
    """
    from capacitor_rt.runtime.batching import ARENA_BUDGET, branches, micro_batch, parts

    runs = parts(key.batch, min(micro_batch(model, key, ARENA_BUDGET), key.batch))
    found: dict[Any, tuple[Prediction, Work]] = {}
    call = CallPrediction(name, gpu.name, runs, [], 0.0, 0.0, Branches() if overlap else None)
    for size in dict.fromkeys(runs):
        branch, count = branches(replace(key, batch=size), overlap)
        times, works = runs.count(size), []
        for prediction, work in _trace(model, branch, gpu, found, hiding, count):
            prediction.count += times * count
            call.gaps += 1e3 * times * count * work.gap
            call.floor += 1e3 * times * count * work.flops / gpu.tflops / 1e12
            works.append(work)
        if call.branches:
            whole = [work for _, work in _trace(model, replace(key, batch=size), gpu, {}, hiding, 1)]
            both = [works] * count
            call.branches.floor += 1e3 * times * floor(both, gpu)
            call.branches.expected += 1e3 * times * simulate(both, gpu, hiding, hiding)
            call.branches.turns += 1e3 * times * simulate(both, gpu, 0.0, hiding)
            call.branches.sequence += 1e3 * times * count * simulate([works], gpu, hiding, hiding)
            call.branches.whole += 1e3 * times * simulate([whole], gpu, hiding, hiding)
    call.launches = [prediction for prediction, _ in found.values()]
    return call


def _trace(
    model: ModelConfig, key: PlanKey, gpu: Gpu, found: dict[Any, tuple[Prediction, Work]], hiding: float, count: int
) -> Iterator[tuple[Prediction, Work]]:
    """Every launch of a plan in order, of `count` branches side by side; those that are alike once in `found`."""
    from capacitor_rt.runtime.executor import trace
    from capacitor_rt.runtime.plan import make_plan

    plan = make_plan(model, key)
    for step, launches in trace(plan):
        for index, launch in enumerate(launches):
            flops = 0 if index else step.flops
            alike = identity(launch), launch.grid, flops
            if alike not in found:
                dram = _dram_bytes(plan, step, gpu, count) if index == 0 else _again(launch, gpu)
                found[alike] = predict(launch, gpu, flops, dram, hiding)
            yield found[alike]


def predict(launch: Launch, gpu: Gpu, flops: int, dram: float, hiding: float = HIDING) -> tuple[Prediction, Work]:
    """The time of one launch, and what it is in a branch.

    Args:
        flops: of the launch, against the ceiling of a whole-GPU product.
        dram: bytes that come from and go to memory.
    """
    alike = identity(launch), gpu.cc
    if alike not in _compiled:
        kernel, registers, stack = compile_launch(launch, gpu.cc)
        facts = kernel.metadata.shared, kernel.metadata.num_warps
        _compiled[alike] = kernel.asm["cubin"], registers, stack, *facts
    cubin, registers, stack, smem, warps = _compiled[alike]
    code, traffic = disassemble(cubin), _traffic(launch)
    per_sm, programs = ctas_per_sm(gpu.cc, registers, smem, warps), math.prod(launch.grid)
    short, ahead = 0, 0.0
    if launch.kernel.__name__ == SPECIALISED:
        cta, tiles, cycles = _specialised(launch, gpu, code, hiding)
        most = -(-tiles // programs)
        waves, whole = tiles / programs, _persistent(cta, most, cycles)
        short, ahead = most * programs - tiles, 1 / most
    else:
        tiles, trips = programs, trip_counts(launch, code)
        cta = whole = _cta(launch, gpu, regions(code, gpu.cc, trips), trips)
        cycles, waves = schedule(cta, programs, per_sm, gpu.sms, hiding)
    pipe, busiest = max(cta.totals().items(), key=lambda item: item[1])
    bounded = flops if cta.totals()["tensor"] else 0
    times = {
        "SM": cycles / gpu.ghz / 1e3,
        "L2": 1e6 * sum(traffic) * tiles / gpu.l2,
        "DRAM": 1e6 * dram / gpu.dram,
        "rate": bounded / _rate(launch, gpu) / 1e6,
    }
    limit = max(times, key=times.__getitem__)
    if limit == "SM":
        limit = pipe + (" + exposed" if times["SM"] > 1.15e-3 * tiles * busiest / gpu.sms / gpu.ghz else "")
    pipes = {region: {p: round(c) for p, c in of.items()} for region, of in cta.pipes.items()}
    where = launch.kernel.__name__, launch.grid, registers, stack, smem, per_sm, waves
    early = bool(launch.options.get("launch_pdl"))
    work = Work(
        launch.kernel.__name__, whole, programs, warps, registers, smem, l2=sum(traffic) * tiles, dram=dram,
        flops=flops * gpu.tflops / _rate(launch, gpu), gap=EARLY_GAP if early else gpu.gap, early=early,
        short=short, ahead=ahead, release=_release(whole) if launch.args.get("PDL") else 1.0,
    )  # fmt: skip
    return Prediction(*where, max(times.values()), limit, times, flops, pipes=pipes), work


def _persistent(tile: Cta, tiles: int, cycles: float) -> Cta:
    """A CTA that takes so many cycles, with so many tiles."""
    pipes = {pipe: count * tiles for pipe, count in tile.totals().items()}
    return Cta({"main": pipes}, {"main": max(0.0, cycles - CTA_START - max(pipes.values()))})


def _release(cta: Cta) -> float:
    """Share of a CTA's time after which it lets the next launch start: what is before its epilogue."""
    epilogue = max(cta.pipes["epilogue"].values(), default=0.0) + cta.latency["epilogue"]
    return 1 - epilogue / cta.alone()


def _cta(launch: Launch, gpu: Gpu, parts: dict[str, Region], trips: Sequence[float]) -> Cta:
    warps, depths, args = launch.options["num_warps"], _depths(launch), launch.args
    cta = Cta()
    for name, region in parts.items():
        pipes = {p: c * (warps if p in SM_PIPES else warps / 4) for p, c in region.pipes.items()}
        if "tensor" in pipes:
            pipes["tensor"] /= gpu.efficiency
        if name == "main":
            pipes["l2port"] = _traffic(launch).read / gpu.port
            if args.get("TMA"):
                # tensor copies write the tiles that no instruction of the code writes
                tile = args["BLOCK_M"] * _activation(launch) + args["BLOCK_N"] * _itemsize(launch)
                pipes["l1smem"] = pipes.get("l1smem", 0) + tile * sum(depths) / 128
        cta.pipes[name] = pipes
        cta.latency[name] = _latency(launch, gpu, name, region, trips)
    if depths:
        stages = max(1, launch.options["num_stages"] - 1)
        cta.floor = sum(depths) / args["BLOCK_K"] * gpu.latency / stages
    return cta


def _specialised(launch: Launch, gpu: Gpu, code: Sequence[Instruction], hiding: float) -> tuple[Cta, int, float]:
    """(pipes of one tile, tiles, cycles of the whole grid): two warpgroups multiply and write, one warp copies.

    At best a consumer's epilogue hides under the other's products for as long as the ring of stages lasts; at worst
    nothing of it does.
    """
    args = launch.args
    product = next(n for n, instruction in enumerate(code) if instruction.is_mma)
    # the loop over k, and around it the one over tiles
    around = sorted((end - start, end) for start, end in loops(code) if start <= product <= end)
    epilogue: Counter[str] = Counter()
    for instruction in code[around[0][1] + 1 : around[1][1] + 1]:
        epilogue.update(instruction.cycles(gpu.cc))
    steps, columns = args["DIM"] // 16, args["BLOCK_N"]
    tensor = 2 * steps * columns / 2
    shared = steps * (2 * (16 + columns / 4) + (args["BLOCK_M"] + columns) / 4)
    main = {"tensor": tensor / gpu.efficiency, "l1smem": shared, "l2port": _traffic(launch).read / gpu.port}
    ends = {pipe: cycles * (8 if pipe in SM_PIPES else 2) for pipe, cycles in epilogue.items()}
    cta = Cta({"main": main, "epilogue": ends}, {"main": 0.0, "epilogue": gpu.latency})
    lag = max(0.0, 1.5 * epilogue["issue"] - args["STAGES"] * args["BLOCK_K"] / 16 * columns / 2)
    best = max(*cta.totals().values(), main["tensor"] + lag)
    worst = max(main.values()) + max(ends.values()) + gpu.latency
    tiles = args["tiles_m"] * args["HIDDEN"] // columns
    return cta, tiles, -(-tiles // launch.grid[0]) * (hiding * best + (1 - hiding) * worst)


def _latency(launch: Launch, gpu: Gpu, name: str, region: Region, trips: Sequence[float]) -> float:
    """Cycles of a region that nothing in its own CTA hides."""
    kernel = launch.kernel.__name__
    if name == "prologue":
        # the wait for the first tile is in the floor of the loop
        return gpu.latency * (0.4 if _depths(launch) else 1.0)
    if name == "epilogue":
        return region.ops["BAR"] * _BARRIER + gpu.latency * (1.0 if region.ops["LDG"] else 0.3)
    if kernel == "dwconv_kernel":
        # the loads of a row wait on L1 and L2; four warps a scheduler hide most of it
        return 7 * 0.25 * gpu.latency
    if kernel.startswith("grn"):
        return gpu.latency * max(1.0, trips[0] if trips else 1.0)
    return 0.0 if region.pipes["tensor"] else region.ops["BAR"] * _BARRIER


def trip_counts(launch: Launch, code: Sequence[Instruction]) -> list[float]:
    """Trips of every loop, from the shape: for products, multiply-adds wanted over those of one trip.

    Raises:
        ValueError: the code multiplies more or less than the launch is to.
    """
    found, args, kernel = loops(code), launch.args, launch.kernel.__name__
    if kernel == "dwconv_kernel":
        return [7.0] * len(found)
    if kernel in ("grn_fused_kernel", "grn_norms_kernel"):
        return [float(-(-args["tiles"] // args["UNROLL"]))] * len(found)
    depths = _depths(launch)
    if not depths:
        return [1.0] * len(found)
    padded = [-(-depth // args["BLOCK_K"]) * args["BLOCK_K"] for depth in depths]
    wanted = args["BLOCK_M"] * _columns(launch) * sum(padded) / launch.options["num_warps"]
    inside = [sum(i.multiply_adds for i in code[first : last + 1] if i.is_mma) for first, last in found]
    left = wanted - sum(i.multiply_adds for i in code if i.is_mma) + sum(inside)
    multiplying = [n for n, products in enumerate(inside) if products]
    if not multiplying:
        if left:
            raise ValueError(f"{kernel}: {wanted:.0f} multiply-adds a warp are wanted, {left:.0f} are not in the code")
        return [1.0] * len(found)
    # one loop for each depth, or all depths in every loop alike
    shares = padded if len(multiplying) == len(padded) else [sum(padded)] * len(multiplying)
    trips = [1.0] * len(found)
    for n, share in zip(multiplying, shares, strict=True):
        trips[n] = left * share / sum(shares) / inside[n]
    return trips


def _depths(launch: Launch) -> list[int]:
    """Extents of K that one program multiplies; none where a kernel has no products."""
    args = launch.args
    match launch.kernel.__name__:
        case "expand_kernel" | "expand_fp8_kernel" | "unpatchify_kernel" | "head_kernel":
            return [args["DIM"]]
        case "project_kernel" | "project_fp8_kernel":
            unit = args["BLOCK_K"] * args["SPLIT_K"]
            return [-(-args["HIDDEN"] // unit) * args["BLOCK_K"]]
        case "patchify_kernel":
            return [3 * args["PATCH"] ** 2] + ([args["LATENTS"]] if args["LATENTS"] else [])
        case "fuse_skip_kernel":
            return [args["DIM"], args["DIM"]]
    return []


def _columns(launch: Launch) -> int:
    args = launch.args
    # the head multiplies mean and logsnr of a channel in one program
    return args["BLOCK_N"] * (2 if args.get("POSTERIOR") else 1)


def _rate(launch: Launch, gpu: Gpu) -> float:
    """TFLOP/s of a whole-GPU product in the type of this launch."""
    return gpu.tflops * (gpu.fp8 if launch.kernel.__name__ in _FP8 else 1)


def _itemsize(launch: Launch) -> int:
    """Bytes of an element of the weights, and, but for project in e4m3, of the activations beside them."""
    w = launch.args["w_ptr"]
    return getattr(w, "base", w).dtype.itemsize


def _activation(launch: Launch) -> int:
    """Bytes of an element of the activations that meet the weights."""
    return 1 if launch.kernel.__name__ in _FP8 else _itemsize(launch)


def _traffic(launch: Launch) -> Traffic:
    args = launch.args
    m, n = args.get("BLOCK_M", 0), args.get("BLOCK_N", 0)
    match launch.kernel.__name__:
        case "dwconv_kernel":
            rows = args["STRIPS_Y"] + (0 if args["STRIPS_Y"] >= args["height"] else 6)
            columns = min(args["width"], args["STRIPS_X"] * args["COLS"] + 6)
            size, pixels = args["x_ptr"].dtype.itemsize, args["STRIPS_Y"] * args["STRIPS_X"] * args["COLS"]
            written = pixels * (args["BLOCK_C"] * args["y_ptr"].dtype.itemsize + 4)
            return Traffic((rows * columns * size + 50 * 4) * args["BLOCK_C"], written)
        case "expand_kernel" | "expand_hopper_kernel":
            size = _itemsize(launch)
            return Traffic((m + n) * args["DIM"] * size + m * args["SUMSQ_TILES"] * 4 + n * 4, m * n * size + n * 4)
        case "expand_fp8_kernel":
            return Traffic((m + n) * args["DIM"] + m * args["SUMSQ_TILES"] * 4 + n * 12, m * n + n * 4)
        case "project_fp8_kernel":
            (depth,), split = _depths(launch), args["SPLIT_K"] > 1
            out = m * n * args["residual_ptr"].dtype.itemsize
            return Traffic((m + 2 * n + 2) * depth + (0 if split else out), 4 * m * n if split else out)
        case "project_kernel":
            (depth,), size = _depths(launch), _itemsize(launch)
            loop, split = (m + n + 1) * size * depth, args["SPLIT_K"] > 1
            return Traffic(loop + (0 if split else m * n * size), m * n * (4 if split else size))
        case "project_reduce_kernel":
            size = args["out_ptr"].dtype.itemsize
            return Traffic(args["BLOCK"] * (4 * args["SPLIT_K"] + size), args["BLOCK"] * size)
        case "patchify_kernel":
            pixels, latents, size = 3 * args["PATCH"] ** 2, args["LATENTS"], _itemsize(launch)
            row = pixels * args["image_ptr"].dtype.itemsize + latents * args["latents_ptr"].dtype.itemsize
            return Traffic(m * row + n * (pixels + latents) * size, m * n * size)
        case "fuse_skip_kernel":
            return Traffic((m + n) * sum(_depths(launch)) * _itemsize(launch), m * n * _itemsize(launch))
        case "unpatchify_kernel":
            return Traffic((m + n) * args["DIM"] * _itemsize(launch) + m * n * 4, m * n * 4)
        case "head_kernel":
            return Traffic((m + _columns(launch)) * args["DIM"] * _itemsize(launch), m * n * 4)
        case "grn_fused_kernel":
            return Traffic((args["tiles"] + 1) * args["HIDDEN"] * 4, args["HIDDEN"] * 6)
        case "grn_norms_kernel":
            return Traffic(args["tiles"] * args["BLOCK_F"] * 4, args["BLOCK_F"] * 4)
        case "grn_gain_kernel":
            return Traffic((args["HIDDEN"] + args["BLOCK_F"]) * 4, args["BLOCK_F"] * 2)
        case unknown:
            raise ValueError(f"the model knows no traffic of {unknown}: add it to bench/_predict.py")


def _dram_bytes(plan: LaunchPlan, step: Step, gpu: Gpu, branches: int = 1) -> float:
    """Weights, and activations where those of all branches do not stay in L2 from one launch to the next."""
    weights = sum(plan.spec(ref).nbytes for ref in step.args.values() if ref.startswith("weight:"))
    activations = sum(plan.spec(ref).nbytes for ref in step.args.values() if not ref.startswith("weight:"))
    return weights + (activations if branches * activations > gpu.l2_bytes else 0)


def _again(launch: Launch, gpu: Gpu) -> float:
    """Bytes from memory of a step's second launch: what the first one left, where L2 does not hold it."""
    moved = sum(_traffic(launch)) * math.prod(launch.grid)
    return moved if moved > gpu.l2_bytes else 0.0
