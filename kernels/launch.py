"""What every op does before and at a launch: checks of its arguments, compiler options, queueing or recording, work.

Every check raises before any work starts, and says which argument is wrong, what it is, and what would do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from triton import knobs

# the jit decorator looks at the flag once, when a kernel is defined; so does this
INTERPRETED: bool = bool(knobs.runtime.interpret)
MIN_COMPUTE_CAPABILITY = 80
DEFAULT_INTERPRETER_CC = 90
INT32_MAX = 2**31 - 1
ALIGNMENT = 16

FLOATS: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = torch.float8_e4m3fn
E4M3_COMPUTE_CAPABILITY = 89
_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "uint8",
    E4M3: "e4m3",
}


def dtype_name(dtype: torch.dtype) -> str:
    """The short name used in configs and messages: bf16, fp16, fp32, uint8, e4m3."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def check_tensor(
    name: str,
    t: torch.Tensor,
    *,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] | torch.dtype | None = None,
    like: torch.Tensor | None = None,
    contiguous: bool = True,
) -> None:
    """Refuse a tensor that a kernel cannot take.

    Args:
        name: the argument's name, for the message.
        shape: expected sizes; None leaves that size free. The rank is checked either way.
        dtypes: one dtype or the accepted ones.
        like: another argument whose device this one must share.
        contiguous: require row-major layout without gaps.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: rank, size, device, stride or alignment.
    """
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}, expected a torch.Tensor")
    if dtypes is not None:
        accepted = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
        if t.dtype not in accepted:
            names = " or ".join(dtype_name(d) for d in accepted)
            raise TypeError(f"{name} is {dtype_name(t.dtype)}, expected {names}: convert it with .to()")
    if shape is not None:
        _check_shape(name, t, tuple(shape))
    _check_device(name, t, like)
    if contiguous and not t.is_contiguous():
        raise ValueError(
            f"{name} of shape {list(t.shape)} has strides {list(t.stride())}, expected row-major: "
            "pass it through .contiguous()"
        )
    if t.numel() and t.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"{name} starts at an address {t.data_ptr() % ALIGNMENT} bytes past a multiple of {ALIGNMENT}: "
            "pass a tensor of its own, or a slice that starts on such a boundary"
        )


def _check_shape(name: str, t: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    if t.dim() != len(shape):
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {len(shape)} dimensions: {wanted}")
    for axis, (have, want) in enumerate(zip(t.shape, shape, strict=True)):
        if want is not None and have != want:
            raise ValueError(
                f"{name} has shape {list(t.shape)}, expected {wanted}: dimension {axis} is {have}, not {want}"
            )


def _check_device(name: str, t: torch.Tensor, like: torch.Tensor | None) -> None:
    if like is not None and t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, the other tensors on {like.device}: move it there")
    if t.device.type == "cuda" or (t.device.type == "cpu" and INTERPRETED) or _recording.get() is not None:
        return
    raise ValueError(
        f"{name} is on {t.device}: these kernels run on an NVIDIA GPU, or on the CPU under Triton's "
        "interpreter (set TRITON_INTERPRET=1 before importing triton)"
    )


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors start at the same address; meta tensors, which all start at zero, in one storage."""
    if a.data_ptr() != b.data_ptr():
        return False
    return not a.is_meta or a.untyped_storage()._cdata == b.untyped_storage()._cdata


def check_rows(name: str, tokens: int, tokens_per_image: int) -> int:
    """Number of images in `tokens` rows; refuses a remainder."""
    if tokens_per_image < 1:
        raise ValueError(f"tokens_per_image is {tokens_per_image}, expected at least 1")
    if tokens < 1 or tokens % tokens_per_image:
        raise ValueError(
            f"{name} has {tokens} rows, not a positive multiple of tokens_per_image {tokens_per_image}: "
            "pass whole images"
        )
    return tokens // tokens_per_image


def check_patches(batch: int, height: int, width: int, patch: int) -> tuple[int, int]:
    """(rows, columns) of patches in the argument `image`; refuses no images, and sizes that are not whole patches."""
    for name, size in (("height", height), ("width", width)):
        if size < patch or size % patch:
            below = max(size // patch, 1) * patch
            raise ValueError(f"{name} {size} of image is not a multiple of {patch}: use {below} or {below + patch}")
    if batch < 1:
        raise ValueError("image has no images: its first dimension is 0")
    return height // patch, width // patch


def check_int32(name: str, n: int) -> None:
    """Refuse a count that is indexed in 32 bits and does not fit."""
    if n > INT32_MAX:
        raise ValueError(f"{name} is {n}, over the 32-bit limit {INT32_MAX}: split the batch")


def check_tma(tma: bool, **operands: torch.Tensor) -> None:
    """Refuse tensor descriptors for operands whose rows are not multiples of 16 bytes or number over 2^31."""
    for name, t in operands.items() if tma else ():
        check_int32(f"number of rows of {name}", t.shape[0])
        if t.shape[1] * t.element_size() % ALIGNMENT:
            raise ValueError(
                f"{name} has rows of {t.shape[1]} elements, not a multiple of {ALIGNMENT} bytes as tensor "
                "descriptors need: use a config with tma=False"
            )


def compute_capability(device: torch.device | torch.Tensor) -> int:
    """Compute capability as major * 10 + minor, e.g. 90; under the interpreter CAPACITOR_INTERPRET_CC or 90.

    Inside `recording(cc)` it is that `cc`, whatever the device.

    Raises:
        ValueError: a device without a supported NVIDIA GPU.
    """
    recorded = _recording.get()
    if recorded is not None and recorded.cc is not None:
        return recorded.cc
    device = device.device if isinstance(device, torch.Tensor) else torch.device(device)
    if INTERPRETED:
        return int(os.environ.get("CAPACITOR_INTERPRET_CC", DEFAULT_INTERPRETER_CC))
    if device.type != "cuda":
        raise ValueError(f"no compute capability on {device}: these kernels need an NVIDIA GPU")
    major, minor = torch.cuda.get_device_capability(device)
    cc = major * 10 + minor
    if cc < MIN_COMPUTE_CAPABILITY:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; these kernels "
            "need 8.0 or later (A100, RTX 30 series and newer): use the plain torch backend on this GPU"
        )
    return cc


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b for positive integers."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: float32 products stay float32 instead of TF32; others ignore it."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_e4m3(cc: int) -> None:
    """Refuse GPUs without products of e4m3.

    Raises:
        ValueError: names what has them, and the way out.
    """
    if cc < E4M3_COMPUTE_CAPABILITY:
        raise ValueError(
            f"compute capability {cc // 10}.{cc % 10} has no fp8: it needs 8.9 or later (RTX 40 series, H100 and "
            "newer), so use bf16 there"
        )


def e4m3_products(cc: int) -> str:
    """By which instruction this GPU multiplies e4m3, a form of `jit.dot_e4m3`."""
    return "scaled" if cc // 10 == 12 and not INTERPRETED else "plain"


class TensorLike(Protocol):
    """A tensor, or the mere description of one."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Work(NamedTuple):
    """What one call of an op costs at least.

    Attributes:
        flops: a multiply-add is two.
        nbytes: memory traffic if every operand is read once and every output written once.
    """

    flops: int
    nbytes: int


def nbytes_of(*tensors: TensorLike | None) -> int:
    """Bytes of these tensors together; None counts nothing."""
    return sum(prod(t.shape) * t.dtype.itemsize for t in tensors if t is not None)


@dataclass(frozen=True)
class Launch:
    """One kernel launch as data: what a launcher runs, and what the ahead-of-time check compiles.

    Attributes:
        kernel: the jit function.
        grid: number of programs along each axis.
        args: every argument of the kernel by name, constexprs included.
        options: compiler options: num_warps, num_stages, maxnreg, launch_pdl.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def chained(self) -> Launch:
        """The same, to start while the launch before is at its end; itself where its kernel has no such form."""
        if "PDL" not in self.kernel.arg_names:
            return self
        return replace(self, args={**self.args, "PDL": True}, options={**self.options, "launch_pdl": True})


class _Recording(NamedTuple):
    launches: list[Launch]
    cc: int | None


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(cc: int | None = None) -> Iterator[list[Launch]]:
    """Collect the launches of the ops called inside, in order, instead of queueing them; yields their list.

    Tensors may then be on any one device, the meta device included; every other check of the ops holds. It is for the
    current thread (or task) alone. Of nested recordings the innermost collects.

    Args:
        cc: compute capability that configs are looked up for; the one around it, or the device's, when None.
    """
    outer = _recording.get()
    if cc is None and outer is not None:
        cc = outer.cc
    launches: list[Launch] = []
    token = _recording.set(_Recording(launches, cc))
    try:
        yield launches
    finally:
        _recording.reset(token)


_chained: ContextVar[bool] = ContextVar("chained", default=False)


@contextmanager
def chained(on: bool = True) -> Iterator[None]:
    """Programmatic dependent launch for the ops called inside, from sm_90 on: each launch starts early, and waits.

    What is called before must be done, or be such launches too, but for the launch just before the first. Memory that a
    launch reads or writes belongs to it from its wait on.
    """
    token = _chained.set(on)
    try:
        yield
    finally:
        _chained.reset(token)


def run_launches(launches: Iterable[Launch], device: torch.device) -> None:
    """Queue launches in order on the current stream of `device`; inside `recording()` only collect them."""
    if _chained.get():
        launches = [launch.chained() for launch in launches]
    recorded = _recording.get()
    if recorded is not None:
        recorded.launches.extend(launches)
        return
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device:
        for launch in launches:
            launch.kernel[launch.grid](**launch.args, **launch.options)


def compiler_options(num_warps: int, num_stages: int, maxnreg: int | None = None) -> dict[str, Any]:
    """Options of a launch; contraction of a*b+c is asked for, since its default changes between releases."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return options if maxnreg is None else options | {"maxnreg": maxnreg}
