"""PTX text to a `Program`: parameters, registers, and basic blocks of decoded instructions."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_WIDTHS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16}
_WIDTHS |= {f"{kind}{width}": width for width in (32, 64) for kind in "busf"}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_IGNORED = (".file", ".section", ".pragma")


class PtxError(Exception):
    """The program cannot be decoded, or did something that a GPU forbids."""


@dataclass(frozen=True)
class Op:
    """An operand.

    Attributes:
        kind: "reg", "notreg" (a negated predicate), "imm", "vec", "mem", "tensor" (descriptor and coordinates), "sink"
            or "sym" (a special register or symbol).
        value: register index, integer bits, operands of a vector, base operand of an address, or a name.
        offset: bytes added to an address.
        width: bits of a register.
    """

    kind: str
    value: Any = None
    offset: int = 0
    width: int = 0
    name: str = ""


@dataclass
class Instr:
    """Parts of the opcode, operands, guard (register index, negated), line of the PTX and of the Python source."""

    parts: tuple[str, ...]
    ops: tuple[Op, ...]
    pred: tuple[int, bool] | None
    line: int
    text: str
    source: str = ""


@dataclass
class Block:
    """Straight-line code and how it ends: "fall", "ret", "bra", "brx" (to one of `targets`, by index) or "bar".

    `anywhere` says that a barrier counts threads wherever in the code they arrive.
    """

    code: list[Instr] = field(default_factory=list)
    end: str = "fall"
    target: int = -1
    targets: tuple[int, ...] = ()
    index: Op | None = None
    anywhere: bool = False
    label: tuple[str, ...] = ()
    pred: tuple[int, bool] | None = None
    barrier: tuple[Op, ...] = ()
    line: int = 0
    spins: bool = False


@dataclass
class Program:
    """One kernel. `params` are (name, type), `widths` and `names` describe its registers, `opcodes` counts them."""

    name: str
    target: str
    params: list[tuple[str, str]]
    threads: int
    widths: list[int]
    names: list[str]
    blocks: list[Block]
    opcodes: Counter[str]


class _Piece(NamedTuple):
    """A statement without its semicolon, a label, or a brace, with its line number."""

    kind: str
    text: str
    line: int
    source: str


def parse(text: str) -> Program:
    """Decode PTX with one entry function.

    Raises:
        PtxError: anything that Triton's kernels do not use: calls, static shared memory, other directives.
    """
    head = re.search(r"\.entry\s+([\w$]+)\s*\(", text)
    if head is None:
        raise PtxError("no .entry in the PTX")
    if len(re.findall(r"\.entry\s", text)) != 1 or re.search(r"^\s*\.(visible\s+|weak\s+)?\.?func\s", text, re.M):
        raise PtxError("more than one function in the PTX: calls are not supported")
    if re.search(r"^\s*\.shared", text, re.M):
        raise PtxError("static .shared variables are not supported, only global_smem")
    arch = re.search(r"\.target\s+(\w+)", text)
    if arch is None:
        raise PtxError("no .target in the PTX")
    listed = text[head.end() : text.index(")", head.end())]
    params = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,)]*?([\w$]+_param_\d+)", listed)
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    body = _Body(text)
    for piece in _pieces(text, text[: text.index("{", text.index(")", head.end()))].count("\n")):
        body.take(piece)
    body.link()
    return Program(
        name=head[1],
        target=arch[1],
        params=[(name, kind) for kind, name in params],
        threads=int(threads[1]) if threads else 0,
        widths=body.widths,
        names=body.names,
        blocks=body.blocks,
        opcodes=body.opcodes,
    )


def _pieces(text: str, first: int) -> Iterator[_Piece]:
    """Labels, braces and statements of the body that starts at line `first`, up to the brace that closes it."""
    files = {
        m[1]: m[2].rsplit("/", 1)[-1]
        for m in re.finditer(r"^\s*\.file\s+(\d+)\s+(?:\"[^\"]*\"\s+)?\"(.*?)\"", text, re.M)
    }
    lines = text.split("\n")
    buffer, started, depth, source = "", 0, 0, ""
    for number in range(first, len(lines)):
        line = _COMMENT.sub("", lines[number]).strip()
        if line.startswith(".loc"):
            _, file, at, *_ = line.split()
            source = f"{files.get(file, '?')}:{at}"
            continue
        if line.startswith(_IGNORED):
            continue
        while line:
            if not buffer:
                label = re.match(r"([$\w.]+):(?!:)\s*", line)
                if label:
                    yield _Piece("label", label[1], number + 1, source)
                    line = line[label.end() :]
                    continue
                if line[0] in "{}":
                    depth += 1 if line[0] == "{" else -1
                    if depth == 0:
                        return
                    # the outermost braces are the function's
                    if depth > 1 or line[0] == "}":
                        yield _Piece(line[0], "", number + 1, source)
                    line = line[1:].lstrip()
                    continue
                started = number + 1
            if ";" not in line:
                buffer += line + " "
                break
            piece, line = line.split(";", 1)
            line = line.lstrip()
            statement, buffer = (buffer + piece).strip(), ""
            if statement:
                yield _Piece("statement", statement, started, source)


class _Body:
    """Registers and blocks of a function, as its pieces are read. Names declared inside braces live there only."""

    def __init__(self, text: str) -> None:
        self.widths: list[int] = []
        self.names: list[str] = []
        self.blocks: list[Block] = [Block()]
        self.opcodes: Counter[str] = Counter()
        self._targets = set(re.findall(r"\bbra(?:\.uni)?\s+([$\w]+)", text))
        # lists of labels for indirect branches, by the label before them
        self._tables: dict[str, list[str]] = {}
        for name, listed in re.findall(r"([$\w]+):\s*\.branchtargets\s+([^;]*);", text):
            self._tables[name] = split(listed.replace("\n", " "))
            self._targets |= {label.strip() for label in self._tables[name]}
        self._index: dict[str, int] = {}
        self._labels: dict[str, int] = {}
        self._scopes: list[dict[str, str]] = [{}]
        self._opened = 0

    def take(self, piece: _Piece) -> None:
        if piece.kind == "label":
            self._label(piece.text)
        elif piece.kind == "{":
            self._opened += 1
            self._scopes.append({})
        elif piece.kind == "}":
            self._scopes.pop()
        elif piece.text.startswith(".reg"):
            self._declare(piece)
        elif piece.text.startswith(".branchtargets"):
            # read with the labels, before the first instruction
            pass
        elif piece.text.startswith("."):
            raise PtxError(f"line {piece.line}: directive {piece.text[:60]} is not supported")
        else:
            self._instruction(piece)

    def link(self) -> None:
        """Resolve the labels of branches."""
        for block in self.blocks:
            if block.end == "bra":
                found = [self._labels[name] for name in block.label if name in self._labels]
                if not found:
                    raise PtxError(f"line {block.line}: label {block.label[-1]} not found")
                block.target = found[0]
            elif block.end == "brx":
                block.targets = tuple(self._labels[name.strip()] for name in self._tables[block.label[0]])

    def _local(self, name: str) -> str:
        return f"{name}@{self._opened}" if len(self._scopes) > 1 else name

    def _label(self, name: str) -> None:
        if name not in self._targets:
            return
        if self.blocks[-1].code or self.blocks[-1].end != "fall":
            self.blocks.append(Block())
        self._labels[self._local(name)] = len(self.blocks) - 1

    def _declare(self, piece: _Piece) -> None:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", piece.text, re.S)
        if match is None or match[1] not in _WIDTHS:
            raise PtxError(f"line {piece.line}: {piece.text[:60]} is not understood")
        for item in match[2].split(","):
            many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", item.strip())
            for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [item.strip()]:
                unique = self._local(name)
                if unique != name:
                    self._scopes[-1][name] = unique
                self._index[unique] = len(self.widths)
                self.names.append(unique)
                self.widths.append(_WIDTHS[match[1]])

    def _unique(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), name)

    def _register(self, name: str) -> int:
        if self._unique(name) not in self._index:
            raise PtxError(f"register {name} was not declared")
        return self._index[self._unique(name)]

    def _instruction(self, piece: _Piece) -> None:
        text, pred = piece.text, None
        guard = re.match(r"@(!?)([%\w$]+)\s+", text)
        if guard:
            pred = (self._register(guard[2]), bool(guard[1]))
            text = text[guard.end() :]
        opcode, *rest = text.split(None, 1)
        operands = split(rest[0]) if rest else []
        parts = tuple(opcode.replace("::", "__").split("."))
        self.opcodes[opcode] += 1
        block = self.blocks[-1]
        if parts[0] == "bra":
            target = operands[0].strip()
            block.label = (self._local(target), target)
            block.end, block.pred, block.line = "bra", pred, piece.line
            self.blocks.append(Block())
        elif parts[0] == "brx":
            if pred is not None or operands[1].strip() not in self._tables:
                raise PtxError(f"line {piece.line}: {text[:60]} is not understood")
            block.end, block.line = "brx", piece.line
            block.index, block.label = self._operand(operands[0]), (operands[1].strip(),)
            self.blocks.append(Block())
        elif parts[0] in ("ret", "exit"):
            block.end, block.pred, block.line = "ret", pred, piece.line
            self.blocks.append(Block())
        elif parts[0] in ("bar", "barrier") and "warp" not in parts:
            if pred is not None:
                raise PtxError(f"line {piece.line}: predicated barrier")
            block.end, block.line = "bar", piece.line
            block.barrier = tuple(self._operand(x) for x in operands)
            block.anywhere = parts[0] == "barrier" and "aligned" not in parts
            self.blocks.append(Block())
        else:
            ops = tuple(self._operand(x) for x in operands)
            block.code.append(Instr(parts, ops, pred, piece.line, text, piece.source))

    def _operand(self, text: str) -> Op:
        text = text.strip()
        if text == "_":
            return Op("sink")
        if text.startswith("{"):
            return Op("vec", tuple(self._operand(x) for x in split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if (unique := self._unique(text)) in self._index:
            index = self._index[unique]
            return Op("reg", index, width=self.widths[index], name=text)
        if (bits := _immediate(text)) is not None:
            return Op("imm", bits)
        if "|" in text:
            return Op("vec", tuple(self._operand(x) for x in text.split("|")))
        if text.startswith("!"):
            inner = self._operand(text[1:])
            return Op("notreg", inner.value, width=1, name=inner.name)
        return Op("sym", text)

    def _address(self, inner: str) -> Op:
        if len(parts := split(inner)) > 1:
            return Op("tensor", tuple(self._operand(x) for x in parts))
        match = re.fullmatch(r"([%\w$.]+)\s*(?:\+\s*(-?(?:0x)?[0-9a-fA-F]+))?", inner)
        if match is None:
            raise PtxError(f"address [{inner}] is not understood")
        return Op("mem", self._operand(match[1]), int(match[2], 0) if match[2] else 0)


def _immediate(text: str) -> int | None:
    """Bits of a literal; a decimal fraction is a float32."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    if re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", text):
        return int(struct.unpack("<I", struct.pack("<f", float(text)))[0])
    return None


def split(text: str) -> list[str]:
    """Split at commas outside braces, brackets and parentheses."""
    out, depth, last = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            out.append(text[last:i])
            last = i + 1
    if text[last:].strip():
        out.append(text[last:])
    return out
