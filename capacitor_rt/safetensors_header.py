"""The header of a safetensors file, read and checked before any tensor is touched.

The file is: 8 bytes, the header's length n, little-endian; n bytes of JSON, `{name: {dtype, shape, data_offsets}}`;
the data. Tensors lie side by side in it, without overlaps or holes, and fill it.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .strict_json import StrictJSONError, open_regular, parse

# far above the models of this family, which have 200 tensors in a header of 20 kB
MAX_TENSORS = 4096
MAX_HEADER_BYTES = 2 << 20
MAX_NAME = 1024
# torch's own limit is 64
MAX_RANK = 16
# of an element, in bits
DTYPES = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True)
class StoredTensor:
    """What the header says of a tensor; its bytes are `begin` to `end` of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file by its name, in the header's order; it takes as much memory as the header.

    Raises:
        CheckpointError: not a whole safetensors file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header = _header_bytes(file.read(8), size)
            text = file.read(header)
        if len(text) < header:
            raise _Damaged("the header is cut short")
        return _tensors(parse(text), size - 8 - header)
    except (_Damaged, StrictJSONError, OSError) as error:
        reason = f"the header is not valid JSON: {error}" if isinstance(error, StrictJSONError) else str(error)
        raise unreadable(path, reason) from error


def unreadable(path: Path, reason: object) -> CheckpointError:
    """The error for a file that is no whole safetensors file."""
    return CheckpointError(
        f"{path} cannot be read as safetensors ({reason}): it is damaged or cut short; download it again"
    )


class _Damaged(Exception):
    """What is wrong with a header."""


def _header_bytes(prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise _Damaged(f"the file has {size} bytes, and a header takes more")
    (header,) = struct.unpack("<Q", prefix)
    if header > size - 8:
        raise _Damaged(f"the header is said to take {header} bytes of a file of {size}")
    if header > MAX_HEADER_BYTES:
        raise _Damaged(f"the header is said to take {header} bytes, more than {MAX_HEADER_BYTES}")
    return header


def _tensors(header: Any, data: int) -> dict[str, StoredTensor]:
    """The tensors of a parsed header, for `data` bytes of data."""
    if not isinstance(header, dict):
        raise _Damaged(f"the header is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    ):
        raise _Damaged("__metadata__ is no object of strings")
    if len(header) > MAX_TENSORS:
        raise _Damaged(f"the header lists {len(header)} tensors, more than {MAX_TENSORS}")
    tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    reached = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != reached:
            kind = "overlaps what is before it" if tensor.begin < reached else "leaves a hole before it"
            raise _Damaged(f"{name!r} begins at {tensor.begin} of the data and {kind}, which ends at {reached}")
        reached = tensor.end
    if reached != data:
        raise _Damaged(f"the tensors take {reached} bytes and the file has {data} for them")
    return tensors


def _tensor(name: str, entry: Any) -> StoredTensor:
    if len(name) > MAX_NAME:
        raise _Damaged(f"a tensor's name has {len(name)} characters, more than {MAX_NAME}")
    if not isinstance(entry, dict) or not all(key in entry for key in _FIELDS):
        raise _Damaged(f"{name!r} is not described by {', '.join(_FIELDS)}")
    dtype, shape, offsets = (entry[key] for key in _FIELDS)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        shown = dtype[:20] if isinstance(dtype, str) else type(dtype).__name__
        raise _Damaged(f"{name!r} has dtype {shown!r}, which is unknown")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise _Damaged(f"the shape of {name!r} is not a list of at most {MAX_RANK} sizes")
    # also of an empty tensor: its strides must fit 64 bits
    if math.prod(max(1, n) for n in shape) * 8 >= 2**63:
        raise _Damaged(f"the shape of {name!r} overflows 64 bits")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Damaged(f"the data_offsets of {name!r} are not a begin and an end")
    begin, end = offsets
    if math.prod(shape) * DTYPES[dtype] != 8 * (end - begin):
        raise _Damaged(f"{name!r}, {dtype} {shape}, does not take the {end - begin} bytes from {begin} to {end}")
    return StoredTensor(dtype, tuple(shape), begin, end)


def _are_sizes(values: Any) -> bool:
    """Whether these are a list of whole numbers of 0 or more; a bool is none."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)
