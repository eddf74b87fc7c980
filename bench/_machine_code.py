"""SASS of a cubin: its instructions, its loops, and the issue cycles of each region by pipe, without a GPU.

A region is what comes before, in and after the loops: prologue, main, epilogue. Pipes belong to a quarter of an SM, but
for shared memory with L1, and shuffles, which belong to the SM. What an instruction costs follows from the throughput
tables of the CUDA programming guide and from published microbenchmarks; bank conflicts are not counted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REGIONS = ("prologue", "main", "epilogue")
SM_PIPES = ("l1smem", "shfl")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;")
_MMA = ("HMMA", "HGMMA", "QMMA", "QGMMA", "OMMA", "UTCHMMA", "UTCQMMA")
# a quarter's cycles of m16n8k16
_HMMA_CYCLES = {80: 8, 89: 32, 90: 6.5, 100: 8, 120: 32}
_QMMA_CYCLES = {89: 32, 90: 8, 100: 8, 120: 32}
_PIPES: dict[str, tuple[str, ...]] = {
    "float": ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"),
    "multiply": ("IMAD", "IDP", "UMAD"),
    "half": ("HFMA2", "HADD2", "HMUL2", "HMNMX2"),
    "xu": ("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV", "I2I"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "memory": ("LDG", "STG", "LDGSTS", "LD", "ST", "LDL", "STL"),
    "atomic": ("RED", "ATOM", "ATOMG", "ATOMS"),
    "uniform": ("R2UR", "S2UR"),
    # issued, and done by no pipe that could be short
    "free": (
        *("BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "BRA", "EXIT", "NOP", "BSSY", "BSYNC", "WARPSYNC", "MEMBAR"),
        *("FENCE", "LDC", "LDCU", "S2R", "ERRBAR", "CCTL", "SYNCS", "ELECT", "ACQBULK", "PREEXIT", "RET", "CALL"),
        *("YIELD", "USETMAXREG"),
    ),
}
_KIND = {base: kind for kind, bases in _PIPES.items() for base in bases}


@dataclass
class Instruction:
    """One line of SASS.

    Attributes:
        op: mnemonic with modifiers, e.g. "HGMMA.64x128x16.F32.BF16".
        trips: how often it runs.
    """

    address: int
    predicate: str
    op: str
    operands: str
    trips: float = 1.0

    @property
    def base(self) -> str:
        return self.op.split(".")[0]

    @property
    def is_mma(self) -> bool:
        return self.base in _MMA

    @property
    def multiply_adds(self) -> int:
        """Of one warp, where it is a product."""
        if group := re.search(r"\.64x(\d+)x(\d+)", self.op):
            return 64 * int(group[1]) * int(group[2]) // 4
        depth = re.search(r"\.168(\d+)", self.op)
        return 16 * 8 * int(depth[1]) if depth else 0

    def cycles(self, cc: int) -> Counter[str]:
        """Cycles by pipe that one warp's instruction occupies."""
        found: Counter[str] = Counter(issue=1)
        base, op = self.base, self.op
        kind = _KIND.get(base)
        if base == "HMMA":
            halves = ".F16" in op and ".F32" not in op and cc in (89, 120)
            found["tensor"] = _HMMA_CYCLES[cc] * (0.5 if ".1688" in op else 1) * (0.5 if halves else 1)
        elif base in ("QMMA", "OMMA"):
            found["tensor"] = _QMMA_CYCLES[cc] * (0.5 if ".SF" in op else 1)
        elif base in ("HGMMA", "QGMMA", "IGMMA"):
            columns = int(re.search(r"\.64x(\d+)x", op)[1])  # type: ignore[index]
            found["tensor"] = columns / 2
            # B is read once for a warpgroup, and A unless it lies in registers
            from_registers = re.match(r"\s*R\d+,\s*gdesc", self.operands) is None
            found["l1smem"] = (columns * 32 / 128 + (0 if from_registers else 16)) / 4
        elif kind == "float":
            found["fma"] = (2 if cc == 80 else 1) * (2 if base.endswith("2") else 1)
        elif kind == "multiply":
            found["fma"] = 1 if cc == 120 else 2
        elif kind == "half":
            found["fma"] = 1 if cc in (90, 100) or (cc == 80 and "BF16" not in op) else 2
        elif kind == "xu":
            found["xu"] = 8
        elif kind == "shared":
            if self.predicate != "@!PT" and "[RZ]" not in self.operands:
                matrices = re.search(r"M88\.(\d)", op)
                whole = base in ("LDSM", "STSM")
                found["l1smem"] = (int(matrices[1]) if matrices else 1) if whole else max(1, _bytes(op) / 4)
        elif base.startswith("LDTM") or kind == "memory":
            found["l1smem"] = max(1, _bytes(op) / 4)
        elif kind == "atomic":
            found["l1smem"] = 2
        elif base == "SHFL":
            found["shfl"] = 1
        elif kind == "free":
            pass
        elif kind == "uniform" or base.startswith("U"):
            found["uniform"] = 2
        else:
            found["alu"] = 1 if cc == 120 and base in ("IADD3", "IADD", "MOV", "VIADD") else 2
        return found


def _bytes(op: str) -> int:
    """Bytes per thread of a load or store."""
    widths = (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1))
    return next((width for name, width in widths if f".{name}" in op), 4)


def disassemble(cubin: bytes) -> list[Instruction]:
    """Every instruction of a cubin, by the cuobjdump of Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True, check=True)
    return parse(done.stdout)


def parse(text: str) -> list[Instruction]:
    """Instructions of a disassembly."""
    found = []
    for line in filter(None, map(_LINE.match, text.splitlines())):
        predicate, body = "", line[2]
        if body.startswith("@"):
            predicate, _, body = body.partition(" ")
        op, _, operands = body.strip().partition(" ")
        if op:
            found.append(Instruction(int(line[1], 16), predicate, op, operands))
    return found


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """(first, last) index of every loop, spins on a barrier and the trap behind the end left out."""
    at = {instruction.address: n for n, instruction in enumerate(code)}
    found = []
    for n, instruction in enumerate(code):
        if instruction.base == "EXIT" and not instruction.predicate:
            break
        target = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.base == "BRA" else None
        if target is None or int(target[1], 16) >= instruction.address:
            continue
        first = at.get(int(target[1], 16))
        if first is not None and (n - first > 8 or all(code[i].base != "SYNCS" for i in range(first, n))):
            found.append((first, n))
    return sorted(found)


@dataclass
class Region:
    """What one warp does there: cycles by pipe, instructions by mnemonic."""

    pipes: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)


def regions(code: Sequence[Instruction], cc: int, trips: Sequence[float]) -> dict[str, Region]:
    """The regions of a kernel whose loops, in order of address, run `trips` times. Writes the trips into `code`."""
    found = loops(code)
    for (first, last), n in zip(found, trips, strict=True):
        for instruction in code[first : last + 1]:
            instruction.trips *= n
    first, last = _main(code, found)
    parts = {name: Region() for name in REGIONS}
    for n, instruction in enumerate(code):
        part = parts[REGIONS[0] if n < first else REGIONS[1] if n <= last else REGIONS[2]]
        for pipe, cycles in instruction.cycles(cc).items():
            part.pipes[pipe] += cycles * instruction.trips  # type: ignore[assignment]
        part.ops[instruction.base] += instruction.trips  # type: ignore[assignment]
        if instruction.base == "EXIT" and not instruction.predicate and n >= last:
            break
    return parts


def _main(code: Sequence[Instruction], found: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """From the first product to the last, with the loops around them; from the first loop to the last without any."""
    products = [n for n, instruction in enumerate(code) if instruction.is_mma]
    if not products:
        return (found[0][0], found[-1][1]) if found else (-1, -1)
    first, last = products[0], products[-1]
    for start, end in found:
        last = end if start <= last <= end else last
        first = start if start <= first <= end else first
    return first, last
