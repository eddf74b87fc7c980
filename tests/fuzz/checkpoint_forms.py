"""Mutators of checkpoints that leave them whole, or nearly: other forms of JSON, orders, types, values, other files."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .checkpoints import Checkpoint


def reorder(c: Checkpoint, rng: random.Random) -> str:
    """Tensors in another order, in the header, in the data, or in both."""
    places = c.tensors()
    if rng.random() < 0.5:
        order, data = rng.sample(places, len(places)), b""
        for at in order:
            name, value = c.header[at]
            fields = dict(value)
            begin, end = fields["data_offsets"]
            fields["data_offsets"] = [len(data), len(data) + end - begin]
            data += c.data[begin:end]
            c.put(at, name, fields)
        c.data = data
    if rng.random() < 0.7:
        rng.shuffle(c.header)
    return "another order"


def convert(c: Checkpoint, rng: random.Random) -> str:
    """Tensors in another type, by their values."""
    kinds = {
        "F16": np.float16,
        "F64": np.float64,
        "I32": np.int32,
        "U8": np.uint8,
        "BOOL": np.bool_,
        "C64": np.complex64,
    }
    kind = rng.choice(("F16", "F64", "F64", "I32", "U8", "BOOL", "C64"))
    chosen = set(c.tensors() if rng.random() < 0.5 else [rng.choice(c.tensors())])
    data = b""
    for at in c.tensors():
        name, value = c.header[at]
        fields = dict(value)
        begin, end = fields["data_offsets"]
        part = c.data[begin:end]
        if at in chosen and fields["dtype"] == "F32" and len(part) % 4 == 0:
            with np.errstate(all="ignore"):
                part = np.frombuffer(part, np.float32).astype(kinds[kind]).tobytes()
            fields["dtype"] = kind
        fields["data_offsets"] = [len(data), len(data) + len(part)]
        data += part
        c.put(at, name, fields)
    c.data = data
    return f"{len(chosen)} as {kind}"


def extreme(c: Checkpoint, rng: random.Random) -> str:
    """All of a tensor one value, or of all tensors."""
    value = rng.choice((0.0, -0.0, float("nan"), float("inf"), -1.0, 3e38, 1e-45, -3e38, 1e20))
    data = bytearray(c.data)
    chosen = c.tensors() if rng.random() < 0.2 else [rng.choice(c.tensors())]
    named = [at for at in c.tensors() if "running" in c.header[at][0] or "var" in c.header[at][0]]
    if named and rng.random() < 0.4:
        chosen = [rng.choice(named)]
    for at in chosen:
        begin, end = dict(c.header[at][1])["data_offsets"]
        data[begin:end] = struct.pack("<f", value) * ((end - begin) // 4) + bytes((end - begin) % 4)
    c.data = bytes(data)
    return f"{c.header[chosen[0]][0]} is {value}"


def json_form(text: str, rng: random.Random) -> str:
    """JSON of the same meaning in another form, or of one that is no JSON to everybody."""
    what = rng.randrange(8)
    if what == 0:
        return "\ufeff" + text
    if what == 1:
        return rng.choice((" ", "\n", "\t", "\r\n", "\x0b", "\xa0", "\u2028")) * rng.choice((1, 7, 100)) + text
    if what == 2:
        return json.dumps(json.loads(text), indent=rng.choice((0, 4)))
    if what == 3:
        return json.dumps(dict(reversed(json.loads(text).items())))
    if what == 4:
        return text.replace('"', "'")
    if what == 5:
        key = rng.choice(sorted(json.loads(text)))
        return text.replace(json.dumps(key), '"' + "".join(f"\\u{ord(x):04x}" for x in key) + '"', 1)
    if what == 6:
        key = rng.choice(sorted(json.loads(text)))
        value = json.loads(text)[key]
        return text.replace("{", "{" + f"{json.dumps(key)}: {json.dumps(value)}, ", 1)
    numbers = [value for value in json.loads(text).values() if type(value) is int]
    if not numbers:
        return text + "\n"
    number = rng.choice(numbers)
    return text.replace(
        str(number), rng.choice((f"{number}.0", f"{number}e0", f"0{number}", f"+{number}", f"{number}E+0"))
    )


def beside(folder: Path, rng: random.Random) -> str:
    """Other files where a checkpoint is looked for, and names that are others' or nobody's."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    what = rng.randrange(6)
    if what == 0:
        parts: Any = rng.choice(
            ({"a": "../../../etc/passwd"}, {"a": "model.safetensors"}, {"a": "/dev/zero"}, {}, [], None, {"a": 1})
        )
        index = {"metadata": {"total_size": rng.choice((0, -1, 2**70))}, "weight_map": parts}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if rng.random() < 0.5:
            weights.unlink()
        return "an index of parts"
    if what == 1:
        names = (
            "pytorch_model.bin",
            "diffusion_pytorch_model.safetensors",
            "model-00001-of-00002.safetensors",
            "x.ckpt",
        )
        weights.rename(folder / rng.choice(names))
        return "weights of another name"
    if what == 2:
        data = weights.read_bytes()
        weights.write_bytes(config.read_bytes())
        config.write_bytes(data)
        return "each the other"
    if what == 3:
        weights.unlink()
        os.link(config, weights)
        return "one file of two names"
    if what == 4:
        for name in ("a.safetensors", "model_ema.safetensors", "\udcff.safetensors", "\x1b[2J.safetensors"):
            (folder / name).write_bytes(weights.read_bytes() if rng.random() < 0.5 else b"")
        if rng.random() < 0.5:
            weights.unlink()
        return "several files of weights"
    weights.write_bytes(b"\x80\x04\x95" + rng.randbytes(20) if rng.random() < 0.5 else b"PK\x03\x04" + bytes(60))
    return "a pickle or an archive"


FORMS: tuple[Callable[[Checkpoint, random.Random], str], ...] = (reorder, convert, extreme)
