"""The machine: lanes in lockstep by basic block, barriers, registers.

All threads of several CTAs are the lanes of numpy arrays. A block runs for every lane whose program counter points at
it, lowest block first, so that diverged lanes meet again where the code does. A value that all lanes share is an array
of length 1. Arrays are never changed in place once they are in a register.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import Global, MemoryFault
from .operands import src
from .parse import Block, Instr, Program, PtxError
from .shared import SHARED_BASE, Shared

if TYPE_CHECKING:
    from .operands import Action
    from .tensor_map import TensorMap

POISON = {
    1: np.zeros(1, bool),
    16: np.array([0xFFAD], np.uint16),
    32: np.array([0xFFFFDEAD], np.uint32),
    64: np.array([0xFFFFDEADFFFFDEAD], np.uint64),
}
_NOBODY = np.zeros(0, np.int64)
Lanes = np.ndarray | None


class Machine:
    """Runs one launch of a program.

    Args:
        actions: one list of closures per block, from `compile_program`.
        shared_bytes: dynamic shared memory of a CTA.
        granule: bytes of shared memory over which races are told apart.
        max_lanes: threads that run at a time.
        watched_ctas: CTAs of such a batch whose shared memory is checked for races.
        last_warps_first: where warpgroups have parts of their own, the last one goes on until it has to wait, so that a
            copy that nothing holds back is found out; or the first one, for a product that waits for no copy.

    Attributes:
        memory: the buffers of the launch; add them before it.
        descriptors: tensor maps by the token that stands for their address.
        act: lanes that are active, None for all; `n` is their number.
    """

    def __init__(
        self,
        program: Program,
        actions: list[list[Action]],
        shared_bytes: int,
        granule: int,
        *,
        max_lanes: int = 8192,
        watched_ctas: int = 1,
        last_warps_first: bool = True,
    ) -> None:
        self.program, self.actions = program, actions
        self.shared_bytes, self.granule = shared_bytes, granule
        self.max_lanes, self.watched_ctas = max_lanes, watched_ctas
        self.last_warps_first = last_warps_first
        self.memory = Global()
        self.descriptors: dict[int, TensorMap] = {}
        for block in program.blocks:
            block.spins = any(i.parts[:2] == ("mbarrier", "try_wait") for i in block.code)
        # a kernel that may start before the one in front of it is done
        self.starts_early = any(i.parts[0] == "griddepcontrol" for block in program.blocks for i in block.code)
        self.at: Instr | None = None
        self.act: Lanes = None

    def launch(self, grid: tuple[int, int, int], params: dict[str, np.ndarray], ctas: np.ndarray | None = None) -> None:
        """Run all CTAs of the grid, or those with the given linear ids, in that order.

        Raises:
            PtxError: whatever a GPU would not do, or would do wrongly.
        """
        ctas = np.arange(grid[0] * grid[1] * grid[2]) if ctas is None else np.asarray(ctas)
        self.grid, self.params = grid, params
        per_batch = max(1, self.max_lanes // self.program.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(ctas), per_batch):
                self._run(ctas[first : first + per_batch])

    def _run(self, ctas: np.ndarray) -> None:
        threads = self.program.threads
        self.lane_count = self.n = len(ctas) * threads
        self.act = None
        self.registers: list[np.ndarray | None] = [None] * len(self.program.widths)
        self.all_lanes = np.arange(self.lane_count)
        self.cta_slot = np.repeat(np.arange(len(ctas)), threads)
        self.cta_id = np.repeat(ctas, threads)
        thread = np.tile(np.arange(threads), len(ctas))
        self.warp = (thread // 32).astype(np.int16)
        self.symbols = self._symbols(thread)
        self.watched_lanes = min(self.watched_ctas, len(ctas)) * threads
        self.shared = Shared(self, len(ctas), self.shared_bytes, self.granule, self.watched_ctas, -(-threads // 32))
        # lanes that have waited for the launch before
        self.waited = np.full(self.lane_count, not self.starts_early)
        # cp.async: groups that each lane committed, copies under way
        self.commits = np.zeros(self.lane_count, np.int64)
        self.copies: list[list[Any]] = []
        # wgmma: likewise, groups and reads under way
        self.wg_commits = np.zeros(self.lane_count, np.int64)
        self.wg_reads: list[list[Any]] = []
        self.fragments: dict[Any, Any] = {}
        # by (slot of the CTA, address); `events` counts what happens to them
        self.barriers: dict[tuple[int, int], Any] = {}
        self.events = 0
        # tensor memory [CTA, lane, column], columns given out to each CTA, reads and columns of products under way
        self.tmem: np.ndarray | None = None
        self.columns: np.ndarray | None = None
        # epoch of each warp's last access to it
        self.tmem_epoch = np.zeros((len(ctas), -(-threads // 32)), np.int32)
        self.tc_reads: list[Any] = []
        self.tc_columns: dict[tuple[int, int, int], Any] = {}
        _Schedule(self, len(ctas)).run()
        if self.copies:
            raise MemoryFault(f"{self.program.name}: cp.async that nobody waited for at the end of the kernel")
        if self.columns is not None and self.columns.any():
            raise PtxError(f"{self.program.name}: tensor memory was not given back")

    def _symbols(self, thread: np.ndarray) -> dict[str, np.ndarray]:
        x, y, z = self.grid
        numbers = {
            "%tid.x": thread,
            "%tid.y": 0,
            "%tid.z": 0,
            "%ntid.x": self.program.threads,
            "%ntid.y": 1,
            "%ntid.z": 1,
            "%ctaid.x": self.cta_id % x,
            "%ctaid.y": self.cta_id // x % y,
            "%ctaid.z": self.cta_id // (x * y),
            "%nctaid.x": x,
            "%nctaid.y": y,
            "%nctaid.z": z,
            "%laneid": thread % 32,
            "%warpid": thread // 32,
            "global_smem": SHARED_BASE,
        }
        return {
            name: np.atleast_1d(np.asarray(number)).astype(np.uint32) for name, number in numbers.items()
        } | self.params

    # registers

    def set_active(self, lanes: Lanes) -> None:
        self.act = lanes
        self.n = self.lane_count if lanes is None else len(lanes)

    def lanes(self) -> np.ndarray:
        """Indices of the active lanes."""
        return self.all_lanes if self.act is None else self.act

    def get(self, index: int) -> np.ndarray:
        """Bits of a register in the active lanes, or of length 1."""
        x = self.registers[index]
        if x is None:
            # LLVM leaves halves of pairs undefined where they are thrown away later: NaN shows if they are not
            if self.program.widths[index] == 1:
                raise PtxError(f"{self.where()}: {self.program.names[index]} is read before it is written")
            return POISON[self.program.widths[index]]
        return x if self.act is None or len(x) == 1 else x[self.act]

    def put(self, index: int, bits: np.ndarray) -> None:
        """Write a register in the active lanes."""
        if self.act is None:
            self.registers[index] = bits
            return
        old = self.registers[index]
        if old is None:
            old = POISON[self.program.widths[index]]
        new = np.broadcast_to(old, (self.lane_count,)).copy()
        new[self.act] = bits
        self.registers[index] = new

    def get_pred(self, pred: tuple[int, bool]) -> np.ndarray:
        """A guard: (register, negated)."""
        p = self.get(pred[0])
        return ~p if pred[1] else p

    def symbol(self, name: str) -> np.ndarray:
        """A special register, a parameter, or the address of shared memory."""
        if name not in self.symbols:
            raise PtxError(f"{self.where()}: {name} is not known")
        x = self.symbols[name]
        return x if self.act is None or len(x) == 1 else x[self.act]

    def full(self, x: np.ndarray) -> np.ndarray:
        """`x` with one element per active lane."""
        return x if len(x) == self.n else np.broadcast_to(x, (self.n,))

    # messages

    def check_waited(self, lanes: np.ndarray) -> None:
        """Refuse an access to global memory of a thread that has not waited for the launch before.

        Raises:
            MemoryFault: what it reads may not be written yet, and what it overwrites may still be read.
        """
        if not self.waited[lanes].all():
            raise MemoryFault(f"{self.where()}: global memory is touched before the launch in front is waited for")

    def where(self) -> str:
        """Kernel, line and instruction."""
        if self.at is None:
            return f"{self.program.name} ({self.program.target})"
        source = f", {self.at.source}" if self.at.source else ""
        text = " ".join(self.at.text.split())
        return f"{self.program.name} ({self.program.target}) line {self.at.line}{source}: `{text[:120]}`"

    def who(self, lane: int) -> str:
        return f"CTA {int(self.cta_id[lane])} thread {int(lane) % self.program.threads}"


class _Schedule:
    """Which lanes are at which block. The lowest block with lanes runs next, of the warpgroup whose turn it is."""

    def __init__(self, vm: Machine, ctas: int) -> None:
        self.vm, self.ctas = vm, ctas
        self.blocks = vm.program.blocks
        self.ready: dict[int, Lanes] = {0: None}
        # block after a barrier -> lanes that arrived
        self.arrived: dict[int, np.ndarray] = {}
        # number of a barrier that counts arrivals anywhere in the code -> (block after it, lanes)
        self.gathered: dict[int, list[tuple[int, np.ndarray]]] = {}
        # lanes that spin on an mbarrier
        self.spinning: dict[int, np.ndarray] = {}
        self.alive = np.full(ctas, vm.program.threads)
        self.events = -1
        self.specialised = any(block.end == "brx" for block in self.blocks)

    def run(self) -> None:
        vm = self.vm
        while self.ready or self.spinning:
            if self.spinning and (vm.events != self.events or not self.ready):
                self._wake()
            at = min(self.ready, key=self._rank)
            lanes = self.ready.pop(at)
            block = self.blocks[at]
            vm.set_active(lanes)
            for action in vm.actions[at]:
                action(vm)
            if block.end == "fall":
                self._go(at + 1, lanes)
            elif block.end == "bar":
                self._gather(at, block) if block.anywhere else self._barrier(at, block)
            elif block.end == "brx":
                self._indirect(block)
            else:
                self._branch(at, block)
        if self.arrived or self.gathered:
            waiting = [*self.arrived.values(), *(lanes for group in self.gathered.values() for _, lanes in group)]
            count = sum(map(len, waiting))
            raise PtxError(f"{vm.where()}: deadlock: {count} lanes wait for ever at a barrier")

    def _rank(self, block: int) -> tuple[int, int]:
        lanes = self.ready[block]
        if not self.specialised or lanes is None:
            return 0, block
        warpgroup = int(self.vm.warp[lanes[0]]) // 4
        return -warpgroup if self.vm.last_warps_first else warpgroup, block

    def _go(self, block: int, lanes: Lanes) -> None:
        if lanes is not None and len(lanes) == 0:
            return
        if block in self.ready:
            before = self.ready[block]
            lanes = None if before is None or lanes is None else np.sort(np.concatenate([before, lanes]))
        self.ready[block] = None if lanes is None or len(lanes) == self.vm.lane_count else lanes

    def _wake(self) -> None:
        """Let spinning lanes look again; nothing happened since they did means that nothing will."""
        if self.vm.events == self.events:
            count = sum(map(len, self.spinning.values()))
            raise PtxError(f"{self.vm.where()}: deadlock: {count} lanes wait for ever at an mbarrier")
        for block, lanes in self.spinning.items():
            self._go(block, lanes)
        self.spinning.clear()
        self.events = self.vm.events

    def _branch(self, at: int, block: Block) -> None:
        vm = self.vm
        lanes, taken, rest = vm.lanes(), vm.lanes(), _NOBODY
        if block.pred is not None:
            chosen = np.broadcast_to(vm.get_pred(block.pred), (vm.n,))
            if not chosen.all():
                taken, rest = lanes[chosen], lanes[~chosen]
        if block.end == "ret":
            np.subtract.at(self.alive, vm.cta_slot[taken], 1)
        elif block.target == at and block.spins:
            if len(taken):
                self.spinning[at] = taken
        else:
            self._go(block.target, taken)
        self._go(at + 1, rest)

    def _barrier(self, at: int, block: Block) -> None:
        """Lanes go on where all that are alive in their CTA have arrived."""
        vm = self.vm
        lanes = vm.lanes()
        before = self.arrived.pop(at + 1, None)
        lanes = lanes if before is None else np.sort(np.concatenate([before, lanes]))
        arrived = np.bincount(vm.cta_slot[lanes], minlength=self.ctas)
        needed = self.alive if len(block.barrier) < 2 else np.full(self.ctas, block.barrier[1].value)
        done = (arrived == needed) & (arrived > 0)
        vm.shared.epoch[done] += 1
        free = done[vm.cta_slot[lanes]]
        self._go(at + 1, lanes[free])
        if not free.all():
            self.arrived[at + 1] = lanes[~free]

    def _gather(self, at: int, block: Block) -> None:
        """As `_barrier`, of threads that arrive at different places of the code."""
        vm, number = self.vm, block.barrier[0].value
        group = [*self.gathered.pop(number, []), (at + 1, vm.lanes())]
        arrived = sum(np.bincount(vm.cta_slot[lanes], minlength=self.ctas) for _, lanes in group)
        needed = self.alive if len(block.barrier) < 2 else np.full(self.ctas, block.barrier[1].value)
        done = (arrived == needed) & (arrived > 0)
        vm.shared.epoch[done] += 1
        waiting = []
        for after, lanes in group:
            free = done[vm.cta_slot[lanes]]
            self._go(after, lanes[free])
            waiting += [] if free.all() else [(after, lanes[~free])]
        if waiting:
            self.gathered[number] = waiting

    def _indirect(self, block: Block) -> None:
        """Lanes go on at the label that their index says."""
        vm = self.vm
        lanes, index = vm.lanes(), vm.full(src(block.index, 32)(vm))
        if (index >= len(block.targets)).any():
            raise PtxError(
                f"{vm.where()}: index {int(index.max())} of an indirect branch to {len(block.targets)} labels"
            )
        for chosen in np.unique(index).tolist():
            self._go(block.targets[chosen], lanes[index == chosen])
