from __future__ import annotations

import numpy as np

class Machine:
    """Runs one launch of a program."""

    def __init__(self, program: Program, ops: list, shared_bytes: int, granule: int, *, max_lanes: int = 8192,
                 racecheck_ctas: int = 1, check_global_races: bool = True, count: bool = False) -> None:
        self.program, self.ops, self.shared_bytes, self.granule = program, ops, shared_bytes, granule
        self.max_lanes, self.racecheck_ctas, self.check_global_races = max_lanes, racecheck_ctas, check_global_races
        self.memory = Global()
        self.descriptors: dict = {}
        for block in program.blocks:
            block.spins = any(i.parts[:2] == ("mbarrier", "try_wait") for i in block.code)
        self.executed = Counter() if count else None
        self.line = 0
        self.blocks_run = 0

    def launch(self, grid: tuple[int, int, int], params: dict[str, np.ndarray], ctas: np.ndarray | None = None) -> None:
        """Run all CTAs of the grid, or those with the given linear ids, in that order."""
        total = grid[0] * grid[1] * grid[2]
        ctas = np.arange(total) if ctas is None else np.asarray(ctas)
        self.grid, self.params = grid, params
        per = max(1, self.max_lanes // self.program.reqntid)
        with np.errstate(all="ignore"):
            for first in range(0, len(ctas), per):
                self._run(ctas[first : first + per])

    def _run(self, ctas: np.ndarray) -> None:
        threads = self.program.reqntid
        self.N = self.n = len(ctas) * threads
        self.act = None
        self.R = [None] * len(self.program.widths)
        self.all_lanes = np.arange(self.N)
        self.cta_slot = np.repeat(np.arange(len(ctas)), threads)
        self.cta_id = np.repeat(ctas, threads)
        tid = np.tile(np.arange(threads), len(ctas))
        self.warp = (tid // 32).astype(np.int16)
        x, y, z = self.grid[0], self.grid[1], self.grid[2]
        one = lambda v: np.array([v], U32)  # noqa: E731
        self.special = {
            "%tid.x": tid.astype(U32), "%tid.y": one(0), "%tid.z": one(0),
            "%ntid.x": one(threads), "%ntid.y": one(1), "%ntid.z": one(1),
            "%ctaid.x": (self.cta_id % x).astype(U32), "%ctaid.y": (self.cta_id // x % y).astype(U32),
            "%ctaid.z": (self.cta_id // (x * y)).astype(U32),
            "%nctaid.x": one(x), "%nctaid.y": one(y), "%nctaid.z": one(z),
            "%laneid": (tid % 32).astype(U32), "%warpid": (tid // 32).astype(U32),
            "global_smem": one(SHARED_BASE),
        }  # fmt: skip
        self.special |= {name: value for name, value in self.params.items()}
        warps = -(-threads // 32)
        self.watched_lanes = min(self.racecheck_ctas, len(ctas)) * threads
        self.shared = Shared(self, len(ctas), self.shared_bytes, self.granule, self.racecheck_ctas, warps)
        self.commits = np.zeros(self.N, np.int64)  # cp.async groups committed by each lane
        self.copies: list[list] = []
        self.wg_commits = np.zeros(self.N, np.int64)
        self.wg_reads: list[list] = []
        self.fragments: dict = {}
        self.barriers: dict = {}
        self.events = 0
        self.tmem, self.columns, self.tc_reads, self.tc_columns = None, None, [], {}
        self._schedule(len(ctas), threads)
        if self.copies:
            raise MemoryFault(f"{self.program.name}: cp.async that nobody waited for at the end of the kernel")
        if self.columns is not None and self.columns.any():
            raise PtxError(f"{self.program.name}: tensor memory was not given back")

    def _schedule(self, ctas: int, threads: int) -> None:
        work: dict[int, np.ndarray | None] = {0: None}  # block -> lanes, None for all
        waiting: dict[int, np.ndarray] = {}  # block after a barrier -> lanes that arrived
        alive = np.full(ctas, threads)
        blocks = self.program.blocks

        def go(block: int, lanes) -> None:
            if lanes is not None and len(lanes) == 0:
                return
            if block in work:
                lanes = np.sort(np.concatenate([work[block], lanes]))
            work[block] = None if lanes is None or len(lanes) == self.N else lanes

        stalled: dict[int, np.ndarray] = {}  # lanes that spin on an mbarrier
        events = -1
        while work or stalled:
            if stalled and (self.events != events or not work):
                if self.events == events:
                    raise PtxError(f"{self.where()}: deadlock: {sum(map(len, stalled.values()))} lanes wait at an mbarrier for ever")
                for spin in list(stalled):
                    go(spin, stalled.pop(spin))
                events = self.events
            at = min(work)
            lanes = work.pop(at)
            block = blocks[at]
            self.set_active(lanes)
            self.blocks_run += 1
            for op in self.ops[at]:
                op(self)
            self.line = block.line or self.line
            if block.end == "fall":
                go(at + 1, lanes)
            elif block.end == "bra" and block.pred is None:
                go(block.target, lanes)
            elif block.end in ("bra", "ret"):
                if block.pred is None:
                    taken, rest = self.lanes(), np.zeros(0, np.int64)
                else:
                    p = self.get_pred(block.pred)
                    if p.all() or not p.any():
                        empty = np.zeros(0, np.int64)
                        taken, rest = (lanes, empty) if p.all() else (empty, lanes)
                    else:
                        p = np.broadcast_to(p, (self.n,))
                        taken, rest = self.lanes()[p], self.lanes()[~p]
                if block.end == "bra" and block.target == at and block.spins:
                    if taken is None or len(taken):
                        stalled[at] = self.lanes() if taken is None else taken
                elif block.end == "bra":
                    go(block.target, taken)
                else:
                    taken = self.lanes() if taken is None else taken
                    np.subtract.at(alive, self.cta_slot[taken], 1)
                go(at + 1, rest)
            else:
                lanes = self.lanes()
                before = waiting.pop(at + 1, None)
                lanes = lanes if before is None else np.sort(np.concatenate([before, lanes]))
                arrived = np.bincount(self.cta_slot[lanes], minlength=ctas)
                needed = alive
                if len(block.barrier) > 1:
                    needed = np.full(ctas, block.barrier[1].value)
                done = arrived == needed
                self.shared.epoch[done & (arrived > 0)] += 1
                free = done[self.cta_slot[lanes]]
                if free.all():
                    go(at + 1, lanes if len(lanes) < self.N else None)
                else:
                    go(at + 1, lanes[free])
                    waiting[at + 1] = lanes[~free]
        if waiting:
            raise PtxError(f"deadlock: {sum(map(len, waiting.values()))} lanes wait at a barrier for ever, first after block {min(waiting)}")

    # registers

    def set_active(self, lanes: np.ndarray | None) -> None:
        self.act = lanes
        self.n = self.N if lanes is None else len(lanes)

    def lanes(self) -> np.ndarray:
        return self.all_lanes if self.act is None else self.act

    def get(self, i: int) -> np.ndarray:
        x = self.R[i]
        if x is None:
            # LLVM leaves halves of pairs undefined where they are thrown away later: NaN shows if they are not
            if self.program.widths[i] == 1:
                raise PtxError(f"{self.where()}: {self.program.names[i]} is read before it is written")
            return POISON[self.program.widths[i]]
        return x if self.act is None or len(x) == 1 else x[self.act]

    def put(self, i: int, value: np.ndarray) -> None:
        if self.act is None:
            self.R[i] = value
            return
        old = self.R[i]
        if old is None:
            old = POISON.get(self.program.widths[i], np.zeros(1, bool))
        new = np.broadcast_to(old, (self.N,)).copy()
        new[self.act] = value
        self.R[i] = new

    def get_pred(self, pred: tuple[int, bool]) -> np.ndarray:
        p = self.get(pred[0])
        return ~p if pred[1] else p

    def full(self, x: np.ndarray) -> np.ndarray:
        return x if len(x) == self.n else np.broadcast_to(x, (self.n,))

    # messages

    def where(self) -> str:
        return f"{self.program.name} ({self.program.target}) line {self.line}"

    def who(self, lane: int) -> str:
        return f"CTA {int(self.cta_id[lane])} thread {int(lane) % self.program.reqntid}"
