"""Mutants of checkpoints: bytes, header, `config.json` and the files themselves."""

from __future__ import annotations

import json
import os
import random
import struct
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from .checkpoint_forms import FORMS, beside, json_form
from .forked import Surface

GOLDEN = Path(__file__).parents[1] / "golden"
CORPUS = Path(__file__).parent / "corpus" / "checkpoints"
MODELS = ("p8", "p8", "p16")

# text of JSON values, put where a number, a string, a list or an object is expected
VALUES = (
    "0", "-1", "1", "2", "3", "7", "8", "56", "64", "224", "1.5", "4.0", "0.0", "-0", "1e3", "1e999", "-1e999",
    "1e-400", "1e308", "NaN", "Infinity", "-Infinity", "true", "false", "null", '""', '"1"', '"wide"', '"\\ud800"',
    '"\\u0000"', '"\\u001b[31m"', "[]", "[1]", "{}", '{"a": 1}', "1000000", "10000000", "1000000000", "4294967296",
    "2147483647", "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616",
    "1" + "0" * 30, "9" * 5000, "-" + "9" * 5000, "0." + "1" * 5000, "[" * 2000, "[" * 2000 + "]" * 2000,
    '{"a":' * 1200 + "1" + "}" * 1200,
    "[" * 600 + "]" * 600, '"' + "x" * 100_000 + '"', "bare", '"deterministic"', '"channel_wise"',
)  # fmt: skip
DTYPES = (
    "BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64", "C64", "F4", "F6_E2M3",
    "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F128", "f32", "", "BF", "F",
)  # fmt: skip
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "I64": 8, "U8": 1, "I8": 1, "BOOL": 1, "C64": 8}
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 1 << 16, 10**6, 10**7, 10**9, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30)
NAMES = (
    "", "a", "__metadata__", "encoder", "encoder.", "decoder.blocks", "\x00", "\x1b[2J", "\n", "..", "/etc/passwd",
    "model." * 5000, "module.model." * 20_000, "x" * 200_000, "." * 50_000, "encoder.blocks.10000000.dwconv.weight",
    "decoder.middle_blocks.999999999.dwconv.bias", "decoder.end_blocks.20000.grn.beta", "encoder.blocks.-1.grn.beta",
    "encoder.blocks.\u0663\u0663.grn.beta", "encoder.blocks." + "9" * 5000 + ".grn.beta",
    "decoder.adaln_deltas.5000.up.weight", "encoder.blocks.00001.grn.gamma", "model.decoder.fuse_in.bias",
    "bn_running_mean", "running_var", "latent_norm_running_mean", "patchify.proj.weight", "lm_head.weight",
    "\U0001f600",
)  # fmt: skip
Pairs = list[tuple[str, Any]]


class Raw(str):
    """JSON text that is written as it is."""


def dump(value: Any) -> str:
    """JSON of objects as lists of pairs, which may repeat a key, and of `Raw` text."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(v, tuple) for v in value):
        return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(dump(v) for v in value) + "]"
    return json.dumps(value)


class Checkpoint:
    """A checkpoint in parts that can be edited: header pairs, data, and the text of `config.json`."""

    def __init__(self, folder: Path):
        weights = (folder / "model.safetensors").read_bytes()
        (n,) = struct.unpack("<Q", weights[:8])
        self.header: Pairs = json.loads(weights[8 : 8 + n], object_pairs_hook=list)
        self.data = weights[8 + n :]
        self.config: Pairs = json.loads((folder / "config.json").read_text(), object_pairs_hook=list)
        self.tail = ""

    def weights(self) -> bytes:
        header = (dump(self.header) + self.tail).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(header)) + header + self.data

    def tensors(self) -> list[int]:
        """Places of the tensors that earlier edits have left whole."""
        return [i for i, (_, value) in enumerate(self.header) if _is_whole(value)]

    def pick(self, rng: random.Random) -> tuple[int, str, dict[str, Any]]:
        at = rng.choice(self.tensors())
        name, fields = self.header[at]
        return at, name, dict(fields)

    def put(self, at: int, name: str, fields: dict[str, Any]) -> None:
        self.header[at] = (name, list(fields.items()))

    def append(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        span = [len(self.data), len(self.data) + len(data)]
        self.header.append((name, [("dtype", dtype), ("shape", shape), ("data_offsets", span)]))
        self.data += data


def _is_whole(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    fields = dict(value)
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    lists = isinstance(shape, list) and isinstance(offsets, list) and isinstance(fields.get("dtype"), str)
    return lists and len(offsets) == 2 and all(type(n) is int for n in (*shape, *offsets))


def edit_field(c: Checkpoint, rng: random.Random) -> str:
    at, name, fields = c.pick(rng)
    key = rng.choice(("dtype", "shape", "data_offsets"))
    what = rng.randrange(5)
    if what == 0:
        del fields[key]
    elif what == 1 or key == "dtype":
        fields[key] = rng.choice(DTYPES) if key == "dtype" and what else Raw(rng.choice(VALUES))
    else:
        numbers = list(fields[key])
        if what == 2 or not numbers:
            numbers.insert(rng.randint(0, len(numbers)), rng.choice(NUMBERS))
        else:
            i = rng.randrange(len(numbers))
            replacements = [rng.choice(NUMBERS), numbers[i] + rng.choice((-4, -1, 1, 4)), Raw(rng.choice(VALUES))]
            numbers[i] = rng.choice(replacements)
        fields[key] = numbers
    c.put(at, name, fields)
    return f"{key} of {name}"


def edit_consistently(c: Checkpoint, rng: random.Random) -> str:
    """Another shape or dtype over the same bytes: the header stays whole."""
    at, name, fields = c.pick(rng)
    size = fields["data_offsets"][1] - fields["data_offsets"][0]
    dtype = rng.choice([d for d, w in WIDTHS.items() if size % w == 0])
    numel = size // WIDTHS[dtype]
    divisor = rng.choice([d for d in range(1, 65) if numel % d == 0])
    ones = rng.choice((0, 0, 1, 2, 5, 20, 60, 70, 500, 20_000))
    shape = rng.choice(([numel], [divisor, numel // divisor], [numel // divisor, divisor], fields["shape"]))
    if shape is fields["shape"]:
        dtype = rng.choice([d for d, w in WIDTHS.items() if w == 4])
    fields |= {"dtype": dtype, "shape": [*shape, *[1] * ones]}
    c.put(at, name, fields)
    return f"{name} as {dtype} {shape} and {ones} ones"


def rename(c: Checkpoint, rng: random.Random) -> str:
    at, name, fields = c.pick(rng)
    other = rng.choice((*NAMES, name + ".x", "model." + name, c.pick(rng)[1], name.replace("0", "1"), name[:-1]))
    c.put(at, other, fields)
    return f"{name} renamed {other[:40]!r}"


def drop(c: Checkpoint, rng: random.Random) -> str:
    at, name, _ = c.pick(rng)
    del c.header[at]
    return f"without {name}"


def add(c: Checkpoint, rng: random.Random) -> str:
    """More tensors of any name and dtype, empty ones of huge shapes among them; the header stays whole."""
    name = rng.choice((*NAMES, "encoder.blocks.2.dwconv.bias", "decoder.middle_blocks.5.dwconv.weight"))
    if rng.random() < 0.4:
        shape = [0, *(abs(rng.choice(NUMBERS)) for _ in range(rng.choice((0, 1, 2, 70))))]
        rng.shuffle(shape)
        c.append(name, rng.choice(list(WIDTHS)), shape, b"")
        return f"empty {name[:40]!r}"
    dtype = rng.choice(list(WIDTHS))
    n = rng.choice((1, 3, 56))
    c.append(name, dtype, [n], rng.randbytes(n * WIDTHS[dtype]))
    return f"added {name[:40]!r} {dtype} [{n}]"


def add_many(c: Checkpoint, rng: random.Random) -> str:
    pattern = rng.choice(
        (
            "encoder.blocks.{}.dwconv.bias",
            "decoder.start_blocks.{}.grn.beta",
            "t{}",
            "decoder.adaln_deltas.{}.up.weight",
        )
    )
    n = rng.choice((100, 2000, 15_000))
    span = [len(c.data), len(c.data)]
    for i in range(n):
        c.header.append((pattern.format(i), [("dtype", "F32"), ("shape", [0]), ("data_offsets", span)]))
    return f"{n} of {pattern}"


def swap_offsets(c: Checkpoint, rng: random.Random) -> str:
    (i, a, one), (j, b, two) = c.pick(rng), c.pick(rng)
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
    if rng.random() < 0.3:
        one["data_offsets"] = two["data_offsets"]
    c.put(i, a, one)
    c.put(j, b, two)
    return f"offsets of {a} and {b}"


def metadata(c: Checkpoint, rng: random.Random) -> str:
    c.header.insert(rng.randint(0, 1), ("__metadata__", Raw(rng.choice(VALUES))))
    return "__metadata__"


def nest(c: Checkpoint, rng: random.Random) -> str:
    at, name, _ = c.pick(rng)
    c.header[at] = (name, Raw(rng.choice(VALUES)))
    return f"value of {name}"


def tail(c: Checkpoint, rng: random.Random) -> str:
    c.tail = rng.choice((" " * rng.randrange(9), " " * 1_000_000, "\x00" * 8, "{}", "]", ',"a":1}', "\ud800"))
    return f"header followed by {c.tail[:8]!r}"


def scale(c: Checkpoint, rng: random.Random) -> str:
    """Values of one tensor that floats can have and weights cannot."""
    _, name, fields = c.pick(rng)
    begin, end = fields["data_offsets"]
    word = struct.pack("<I", rng.choice((0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00000001, 0x80000000)))
    at = begin + rng.randrange(max(1, (end - begin) // 4)) * 4
    c.data = c.data[:at] + word + c.data[at + 4 :]
    return f"a value of {name}"


def edit_config(c: Checkpoint, rng: random.Random) -> str:
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(c.config))
        key = c.config[at][0]
        what = rng.randrange(8)
        if what == 0:
            c.config.append((key, Raw(rng.choice(VALUES))))
        elif what == 1:
            c.config.append((rng.choice(NAMES), Raw(rng.choice(VALUES))))
        else:
            c.config[at] = (key, Raw(rng.choice(VALUES)))
    return f"config.json: {key}"


EDITS: tuple[Callable[[Checkpoint, random.Random], str], ...] = (
    edit_field, edit_field, edit_field, edit_consistently, edit_consistently, rename, drop, add, add_many, swap_offsets,
    metadata, nest, tail, scale, edit_config, edit_config, edit_config, *FORMS,
)  # fmt: skip


def flip(data: bytes, rng: random.Random, upto: int) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(min(upto, len(out)))] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(out)


def damage(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bytes of any file, flipped, cut, lengthened or moved; half of them in its first few kB."""
    what, at = rng.randrange(7), rng.randrange(min(len(data), rng.choice((16, 9000, len(data)))))
    if what <= 2:
        upto = rng.choice((8, 9000, len(data)))
        return flip(data, rng, upto), f"flips in the first {upto} bytes"
    if what == 3:
        return data[:at], f"cut at {at}"
    if what == 4:
        n = rng.choice((1, 8, 4096))
        return data + rng.randbytes(n), f"{n} bytes more"
    if what == 5:
        n = rng.choice((1, 8, 300))
        return data[:at] + rng.randbytes(n) + data[at:], f"{n} bytes put in at {at}"
    return data[:at] + data[at + rng.choice((1, 8, 300)) :], f"bytes taken out at {at}"


def length(data: bytes, rng: random.Random) -> bytes:
    (n,) = struct.unpack("<Q", data[:8])
    choices = (0, 1, 2, n - 1, n + 1, n + 8, len(data), len(data) - 8, 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1)
    return struct.pack("<Q", rng.choice(choices)) + data[8:]


def special(path: Path, rng: random.Random) -> str:
    """Put at `path` what is no ordinary file, or one that is only said to be large."""
    kind = rng.choice(("fifo", "folder", "zeros", "null", "dangling", "loop", "sparse", "empty", "sparse header"))
    data = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("sparse", "sparse header"):
        path.write_bytes(data if kind == "sparse" else struct.pack("<Q", rng.choice((10**6, 10**8, 10**11))))
        os.truncate(path, 1 << 40)
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        targets = {"zeros": "/dev/zero", "null": "/dev/null", "dangling": path.with_name("gone"), "loop": path}
        path.symlink_to(targets[kind])
    return f"{path.name}: {kind}"


class Checkpoints(Surface):
    """Checkpoint folders, read by `from_pretrained` and by `capacitor-rt inspect`."""

    name = "checkpoints"

    corpus = CORPUS

    def __init__(self, models: tuple[Path, ...] = tuple(GOLDEN / name for name in MODELS)):
        self.models = models

    def warm(self) -> None:
        self.read(self.models[0])

    def write(self, seed: int, number: int, folder: Path) -> str:
        rng = random.Random(f"{seed}:{number}")
        source = rng.choice(self.models)
        checkpoint = Checkpoint(source)
        weights, config = folder / "model.safetensors", folder / "config.json"
        kind = rng.random()
        done = []
        if kind < 0.6:
            done = [rng.choice(EDITS)(checkpoint, rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        weights.write_bytes(checkpoint.weights())
        config.write_text(dump(checkpoint.config))
        if 0.6 <= kind < 0.8:
            data, what = damage(weights.read_bytes(), rng)
            weights.write_bytes(data)
            done.append(f"weights: {what}")
        elif 0.8 <= kind < 0.84:
            config.write_bytes(json_form(config.read_text(), rng).encode("utf-8", "surrogatepass"))
            done.append("config.json in another form")
        elif 0.84 <= kind < 0.87:
            header = json_form(dump(checkpoint.header), rng).encode()
            weights.write_bytes(struct.pack("<Q", len(header)) + header + checkpoint.data)
            done.append("header in another form")
        elif 0.87 <= kind < 0.9:
            data, what = damage(config.read_bytes(), rng)
            config.write_bytes(data)
            done.append(f"config.json: {what}")
        elif 0.9 <= kind < 0.96:
            weights.write_bytes(length(weights.read_bytes(), rng))
            done.append("header length")
        elif 0.96 <= kind < 0.98:
            done.append(special(rng.choice((weights, config)), rng))
        elif kind >= 0.98:
            done.append(beside(folder, rng))
        if rng.random() < 0.1 and config.is_file():
            config.unlink()
            done.append("no config.json")
        return f"{source.name}: " + ", ".join(done)

    def read(self, folder: Path) -> None:
        import torch
        import typer

        from capacitor_rt import CheckpointError, FullCapacitor
        from capacitor_rt.cli.inspect_checkpoint import inspect

        refusals = []
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                model = FullCapacitor.from_pretrained(folder, strict_size=False)
                # what is taken works
                model.decode(torch.zeros(1, model.latent_channels, 1, 1))
            except CheckpointError as error:
                refusals.append(error)
                # a message is there to be printed
                str(error).encode()
            try:
                with redirect_stdout(StringIO()) as shown:
                    inspect(str(folder), None, as_json=True)
            except CheckpointError as error:
                refusals.append(error)
            except typer.Exit:
                refusals.append(CheckpointError("inspect names problems"))
        for text in (shown.getvalue(), *(str(w.message) for w in warned)):
            text.encode()
        if len(refusals) == 1:
            raise AssertionError(f"from_pretrained and inspect differ: {refusals[0]}")
        if refusals:
            raise refusals[0]
