"""When the launches of several branches of a graph are done: a simulation of CTAs on SMs, in fluid rates.

Branches queue their launches in order, each after the one before and a gap. Like a GPU's block scheduler, one queue
hands out CTAs: those of the launch that came first, to the SM with the fewest warps that has room, and those of the
next one only when all of the first are out. What an SM holds is limited by registers, shared memory, threads and CTAs
of whatever shares it, and a CTA's place is free when it ends.

CTAs of one launch on an SM are as fast as `Cta.cycles` says. Those of several launches lie between two bounds: they
take turns, each launch as if alone in its turns (`mixed` 0), or no pipe is idle that one of them waits for (`mixed` 1).
L2, DRAM and the rate of a whole-GPU product slow all that use them alike where more is asked of them than they give.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ._gpu_model import HIDING, Cta, Gpu

# SMs whose CTAs differ by less than this share of their time are taken together, at their mean
_ALIKE = 0.02
_DONE = 1 - 1e-9
# registers are given out to a warp in units
_REGISTER_UNIT = 256
_CTAS = 32


@dataclass(frozen=True, eq=False)
class Work:
    """A launch in a branch.

    Attributes:
        cta: what each of its CTAs does.
        programs: how many CTAs.
        short, ahead: so many of them, the last ones, have this share less to do.
        warps, registers, smem: of a CTA, of a thread, and bytes of a CTA.
        l2, dram: bytes of the launch.
        flops: of the launch where a whole-GPU product bounds it, in units of the rate of `Gpu.tflops`; else 0.
        gap: seconds after the launch before it.
        early: its CTAs take places as soon as the launch before lets it, and wait there.
        release: share of its time after which a CTA lets the next launch start, once all are so far; 1 at its end.
    """

    kernel: str
    cta: Cta
    programs: int
    warps: int
    registers: int
    smem: int
    l2: float = 0.0
    dram: float = 0.0
    flops: float = 0.0
    gap: float = 0.0
    early: bool = False
    short: int = 0
    ahead: float = 0.0
    release: float = 1.0

    @property
    def whole(self) -> float:
        """The work of the launch, in CTAs."""
        return self.programs - self.short * self.ahead

    def room(self, cc: int) -> tuple[int, int, int, int]:
        """Registers, bytes, threads and CTAs that one CTA takes of an SM."""
        from capacitor_kernels.gpu_limits import SMEM_RESERVED_PER_CTA

        registers = -(-self.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT * self.warps
        return registers, self.smem + SMEM_RESERVED_PER_CTA, 32 * self.warps, 1

    def demands(self, gpu: Gpu) -> tuple[float, float, float]:
        """Seconds that L2, DRAM and the rate of a product would take for the whole launch."""
        return self.l2 / gpu.l2, self.dram / gpu.dram, self.flops / gpu.tflops / 1e12


@dataclass(eq=False)
class _Queued:
    """A launch on its way. Branches are numbered, and the launches of one follow each other."""

    work: Work
    branch: int
    place: int
    left: int
    running: int = 0
    # whether the next launch of the branch is on its way
    followed: bool = False
    # an early launch waits until the one before is done and has made its writes visible
    starts: float | None = None
    shares: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(eq=False)
class _Sms:
    """SMs that hold the same: so many CTAs of a launch, at the same point, for each entry."""

    count: int
    held: list[tuple[_Queued, int, float]] = field(default_factory=list)

    def taken(self, cc: int) -> tuple[int, ...]:
        rooms = [[n * x for x in q.work.room(cc)] for q, n, _ in self.held]
        return tuple(map(sum, zip(*rooms, strict=True))) if rooms else (0, 0, 0, 0)


def floor(branches: Iterable[Sequence[Work]], gpu: Gpu) -> float:
    """Seconds below which no schedule gets: of each pipe of all SMs, L2, DRAM and the rate what all launches ask."""
    pipes: dict[str, float] = {}
    memory = [0.0, 0.0, 0.0]
    for work in (w for branch in branches for w in branch):
        for pipe, cycles in work.cta.totals().items():
            pipes[pipe] = pipes.get(pipe, 0.0) + cycles * work.whole / gpu.sms / gpu.ghz / 1e9
        memory = [a + b for a, b in zip(memory, work.demands(gpu), strict=True)]
    return max(*pipes.values(), *memory)


def simulate(branches: Sequence[Sequence[Work]], gpu: Gpu, mixed: float, hiding: float = HIDING) -> float:
    """Seconds from the start of all branches to the end of the last.

    Args:
        mixed: between CTAs of several launches on an SM that take turns (0) and that interleave ideally (1).
        hiding: the same for CTAs of one launch, as in `Cta.cycles`.
    """
    return _Simulation(branches, gpu, mixed, hiding).run()


class _Simulation:
    def __init__(self, branches: Sequence[Sequence[Work]], gpu: Gpu, mixed: float, hiding: float):
        from capacitor_kernels.gpu_limits import REGISTERS_PER_SM, limits

        self.branches, self.gpu, self.mixed, self.hiding = branches, gpu, mixed, hiding
        limit = limits(gpu.cc)
        self.limits = REGISTERS_PER_SM, limit.smem_per_sm, limit.threads_per_sm, _CTAS
        self.now = 0.0
        self.sms = [_Sms(gpu.sms)]
        # launches of which CTAs are to be handed out, the first come first, and those that come at a time
        self.queue: list[_Queued] = []
        self.coming: list[tuple[float, _Queued]] = []
        self._rates: dict[frozenset[tuple[Work, int]], dict[Work, float]] = {}
        for branch, works in enumerate(branches):
            if works:
                self.coming.append((works[0].gap, self._queued(branch, 0, works[0].gap)))

    def _queued(self, branch: int, place: int, starts: float | None) -> _Queued:
        work = self.branches[branch][place]
        of_cta = tuple(seconds / work.whole for seconds in work.demands(self.gpu))
        return _Queued(work, branch, place, work.programs, 0, False, starts, of_cta)  # type: ignore[arg-type]

    def run(self) -> float:
        while True:
            self.coming.sort(key=lambda item: item[0])
            while self.coming and self.coming[0][0] <= self.now:
                self.queue.append(self.coming.pop(0)[1])
            self._hand_out()
            self._release()
            rates = self._all_rates()
            steps = [at - self.now for at, _ in self.coming]
            steps += [q.starts - self.now for q in self._waiting() if q.starts is not None]
            for sms, of in zip(self.sms, rates, strict=True):
                for (queued, _, done), rate in zip(sms.held, of, strict=True):
                    until = self._until(queued)
                    steps += [(goal - done) / rate for goal in (1.0, until) if rate > 0 and goal > done]
            if not steps:
                if self.queue:
                    raise ValueError(f"a CTA of {self.queue[0].work.kernel} fits no SM of {self.gpu.name}")
                return self.now
            self._advance(max(0.0, min(steps)), rates)

    def _waiting(self) -> list[_Queued]:
        """Launches with CTAs in their places that wait for the launch before them."""
        found = {id(q): q for sms in self.sms for q, _, _ in sms.held if self._waits(q)}
        return list(found.values())

    def _waits(self, queued: _Queued) -> bool:
        return queued.starts is None or queued.starts > self.now

    # places

    def _hand_out(self) -> None:
        while self.queue:
            head = self.queue[0]
            need = head.work.room(self.gpu.cc)
            while head.left:
                fitting = []
                for sms in self.sms:
                    taken = sms.taken(self.gpu.cc)
                    if all(a + b <= c for a, b, c in zip(taken, need, self.limits, strict=True)):
                        fitting.append((taken[2], sms))
                if not fitting:
                    return
                self._place(head, min(fitting, key=lambda item: item[0])[1])
            self.queue.pop(0)

    def _place(self, queued: _Queued, sms: _Sms) -> None:
        """One CTA on each of these SMs, or on so many of them as there are CTAs left with as much to do."""
        long = queued.left - queued.work.short
        alike, begun = (long, 0.0) if long > 0 else (queued.left, queued.work.ahead)
        if alike < sms.count:
            self.sms.append(_Sms(sms.count - alike, list(sms.held)))
            sms.count = alike
        queued.left -= sms.count
        queued.running += sms.count
        for i, (other, n, done) in enumerate(sms.held):
            if other is queued and done == begun:
                sms.held[i] = other, n + 1, begun
                return
        sms.held.append((queued, 1, begun))

    def _until(self, queued: _Queued) -> float:
        """Share of a CTA's time at which it lets the next launch start; 0 where none waits for that."""
        works, after = self.branches[queued.branch], queued.place + 1
        waits = not queued.followed and after < len(works) and works[after].early
        return queued.work.release if waits and queued.work.release < 1 else 0.0

    def _release(self) -> None:
        """Launches that start early come when all CTAs of the one before have let them."""
        least: dict[_Queued, float] = {}
        for sms in self.sms:
            for queued, _, done in sms.held:
                if not queued.left and self._until(queued):
                    least[queued] = min(done, least.get(queued, 1.0))
        for queued, done in least.items():
            if done >= self._until(queued) - 1e-9:
                queued.followed = True
                self.coming.append((self.now, self._queued(queued.branch, queued.place + 1, None)))

    def _ended(self, queued: _Queued) -> None:
        works = self.branches[queued.branch]
        after = queued.place + 1
        if after == len(works):
            return
        at = self.now + works[after].gap
        if not queued.followed:
            self.coming.append((at, self._queued(queued.branch, after, at)))
            return
        held = [q for sms in self.sms for q, _, _ in sms.held]
        for follower in [*held, *self.queue, *(q for _, q in self.coming)]:
            if (follower.branch, follower.place) == (queued.branch, after):
                follower.starts = at

    # time

    def _all_rates(self) -> list[list[float]]:
        """Shares of a CTA's work per second, of every entry of all SMs."""
        found = [self._sm_rates(sms) for sms in self.sms]
        asked = [0.0, 0.0, 0.0]
        for sms, rates in zip(self.sms, found, strict=True):
            for (queued, n, _), rate in zip(sms.held, rates, strict=True):
                for i, share in enumerate(queued.shares):
                    asked[i] += sms.count * n * rate * share
        if max(asked) <= 1:
            return found
        for sms, rates in zip(self.sms, found, strict=True):
            for j, (queued, _, _) in enumerate(sms.held):
                slow = [a for a, share in zip(asked, queued.shares, strict=True) if share]
                rates[j] /= max([1.0, *slow])
        return found

    def _sm_rates(self, sms: _Sms) -> list[float]:
        # CTAs of one launch in two branches are alike
        counts: dict[Work, int] = {}
        for queued, n, _ in sms.held:
            if not self._waits(queued):
                counts[queued.work] = counts.get(queued.work, 0) + n
        alike = frozenset(counts.items())
        if alike not in self._rates:
            shared = self._shared([(work.cta, n) for work, n in counts.items()])
            self._rates[alike] = {w: 1e9 * self.gpu.ghz * rate for w, rate in zip(counts, shared, strict=True)}
        found = self._rates[alike]
        return [0.0 if self._waits(queued) else found[queued.work] for queued, _, _ in sms.held]

    def _shared(self, ctas: Sequence[tuple[Cta, int]]) -> list[float]:
        """Shares of a CTA's work per cycle, of each kind of CTA on one SM."""
        if len(ctas) < 2:
            return [1 / cta.cycles(n, self.hiding) for cta, n in ctas]
        together = sum(n for _, n in ctas)
        turns = [n / together / cta.cycles(n, self.hiding) for cta, n in ctas]
        ideal = interleaved(ctas)
        return [1 / (self.mixed / best + (1 - self.mixed) / worst) for best, worst in zip(ideal, turns, strict=True)]

    def _advance(self, step: float, rates: Sequence[Sequence[float]]) -> None:
        self.now += step
        ended: list[_Queued] = []
        for sms, of in zip(self.sms, rates, strict=True):
            held = []
            for (queued, n, done), rate in zip(sms.held, of, strict=True):
                done += rate * step
                if done < _DONE:
                    held.append((queued, n, done))
                    continue
                queued.running -= n * sms.count
                if not queued.running and not queued.left:
                    ended.append(queued)
            sms.held = held
        for queued in ended:
            self._ended(queued)
        self._take_together()

    def _take_together(self) -> None:
        """SMs that hold the same, nearly as far, become one entry at the mean, so that no work is lost or won."""
        kinds: dict[tuple[tuple[int, int], ...], list[_Sms]] = {}
        for sms in self.sms:
            sms.held.sort(key=lambda item: (id(item[0]), -item[2]))
            like = kinds.setdefault(tuple((id(q), n) for q, n, _ in sms.held), [])
            for other in like:
                if all(abs(a[2] - b[2]) <= _ALIKE for a, b in zip(sms.held, other.held, strict=True)):
                    total = sms.count + other.count
                    other.held = [
                        (q, n, (a * other.count + b * sms.count) / total)
                        for (q, n, a), (_, _, b) in zip(other.held, sms.held, strict=True)
                    ]
                    other.count = total
                    break
            else:
                like.append(sms)
        self.sms = [sms for like in kinds.values() for sms in like]


def interleaved(ctas: Sequence[tuple[Cta, int]]) -> list[float]:
    """Shares of a CTA's work per cycle where no pipe idles that one waits for.

    All speed up alike from nothing, as shares of what each does alone, until a pipe is busy; those that use it stay
    there, and the others go on.
    """
    alone = [cta.alone() for cta, _ in ctas]
    uses = [{p: n * c / t for p, c in cta.totals().items() if c} for (cta, n), t in zip(ctas, alone, strict=True)]
    shares = [0.0] * len(ctas)
    growing = set(range(len(ctas)))
    left = {pipe: 1.0 for use in uses for pipe in use}
    while growing:
        asked = {pipe: sum(uses[i].get(pipe, 0.0) for i in growing) for pipe in left}
        most = min([1 - shares[next(iter(growing))], *(left[p] / a for p, a in asked.items() if a)])
        for i in growing:
            shares[i] += most
        left = {pipe: left[pipe] - most * a for pipe, a in asked.items()}
        full = {pipe for pipe, rest in left.items() if rest <= 1e-9}
        growing = {i for i in growing if shares[i] < 1 - 1e-9 and not full & set(uses[i])}
    return [share / t for share, t in zip(shares, alone, strict=True)]
