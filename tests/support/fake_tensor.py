"""Tensors on "cuda" that hold their values on the CPU, for `fake_cuda`: each belongs to an allocation of `fake_gpu`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from fake_gpu import Memory, gpu
from torch import nn
from torch.utils._device import _device_constructors

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
# torch's own, whose names `install` takes
_data_ptr, _to, _empty, _tensor = torch.Tensor.data_ptr, torch.Tensor.to, torch.empty, torch.tensor
_library = torch.library.Library("aten", "IMPL")
_pinned: set[int] = set()


class Block:
    """What the tensors of one allocation share; it is freed with the last of them."""

    def __init__(self, like: torch.Tensor):
        self.memory = gpu.allocate(f"a {like.dtype} tensor of {[*like.shape]}".replace("torch.", ""), like.nbytes)

    def __del__(self) -> None:
        if hasattr(self, "memory"):
            gpu.free(self.memory)


class CudaTensor(torch.Tensor):
    """A tensor that says that it is on cuda:0. Its operations run on the CPU, in the order in which they are queued."""

    values: torch.Tensor
    block: Block
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor, block: Block | None = None) -> CudaTensor:
        block = block or Block(values)
        place = {"strides": values.stride(), "storage_offset": values.storage_offset(), "device": CUDA}
        self = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, **place)
        self.values, self.block = values, block
        return self

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if op.is_view:
            views, block = op(args[0].values, *args[1:], **kwargs), args[0].block
            # a view of an inference tensor is one too
            with torch.inference_mode() if args[0].is_inference() else nullcontext():
                return [cls(t, block) for t in views] if isinstance(views, (list, tuple)) else cls(views, block)
        to_host = "device" in kwargs and torch.device(kwargs["device"] or CUDA).type == "cpu"
        if "device" in kwargs:
            kwargs["device"] = CPU
        result = op(*_values(args), **dict(zip(kwargs, _values([*kwargs.values()]), strict=True)))
        used = [t for t in _flat([*args, *kwargs.values()]) if isinstance(t, torch.Tensor)]
        written: list[Any] = []
        if not to_host:
            known = {id(t.values) if isinstance(t, CudaTensor) else id(t): t for t in used}
            written = [_wrapped(t, known) for t in _flat([result])]
            result = written if isinstance(result, (list, tuple)) else written[0]
        gpu.work(_memory([*used, *written]), written=_memory(written))
        # with one of both on the host: torch's then waits too, unless it is told not to
        copies = op is _COPY and not all(isinstance(t, CudaTensor) for t in args[:2])
        at_once = kwargs.get("non_blocking") or (op is _COPY and True in args[2:])
        if op is _ITEM or ((copies or to_host) and not at_once):
            gpu.synchronize(gpu.stream)
        return result

    def data_ptr(self) -> int:
        return _data_ptr(self.values)

    def record_stream(self, stream: Any) -> None:
        self.block.memory.recorded.add(stream.cuda_stream)

    def is_pinned(self, device: Any = None) -> bool:
        return False

    # torch's own of these two ask for a guard of the device, which a build without CUDA lacks
    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return torch.ops.aten.copy_(self, source, non_blocking)

    def __getitem__(self, index: Any) -> torch.Tensor:
        t, dim = self, 0
        for i in index if isinstance(index, tuple) else (index,):
            if isinstance(i, slice):
                t = torch.ops.aten.slice.Tensor(t, dim, i.start, i.stop, i.step or 1)
            elif isinstance(i, int):
                t, dim = torch.ops.aten.select.int(t, dim, i), dim - 1
            elif i is None:
                t = t.unsqueeze(dim)
            elif i is Ellipsis:
                dim = t.dim() - len(index) + index.index(Ellipsis)
            else:
                t = t.index_select(dim, i)
            dim += 1
        return t

    def __setitem__(self, index: Any, value: Any) -> None:
        part = self[index]
        part.copy_(value) if isinstance(value, torch.Tensor) else part.fill_(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            twin = self.detach().clone()
            memo[id(self)] = nn.Parameter(twin, self.requires_grad) if isinstance(self, nn.Parameter) else twin
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.values!r})"


_COPY, _ITEM = torch.ops.aten.copy_.default, torch.ops.aten._local_scalar_dense.default


def _flat(items: Sequence[Any]) -> list[Any]:
    """The items, and those of lists among them."""
    return [t for item in items for t in (item if isinstance(item, (list, tuple)) else (item,))]


def _values(items: Sequence[Any]) -> list[Any]:
    """What an operation on the CPU takes for what one on the GPU was given."""
    return [
        item.values if isinstance(item, CudaTensor) else _values(item) if isinstance(item, (list, tuple)) else item
        for item in items
    ]


def _memory(items: Sequence[Any]) -> list[Memory]:
    return [t.block.memory for t in items if isinstance(t, CudaTensor)]


def _wrapped(result: Any, known: dict[int, torch.Tensor]) -> Any:
    """A result on the GPU: an argument that was written to, or a tensor of its own memory or an argument's."""
    if not isinstance(result, torch.Tensor):
        return result
    if id(result) in known:
        return known[id(result)]
    storage = result.untyped_storage()._cdata
    shares = [t for t in known.values() if isinstance(t, CudaTensor) and t.values.untyped_storage()._cdata == storage]
    return CudaTensor(result, shares[0].block if shares else None)


def _moved(t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to`."""
    like = next((a for a in (*args, kwargs.get("other")) if isinstance(a, torch.Tensor)), None)
    if like is not None:
        return _moved(t, like.device, like.dtype)
    copy, memory_format = kwargs.pop("copy", False), kwargs.pop("memory_format", None)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if isinstance(t, CudaTensor) or device is None or device.type != "cuda":
        more = {} if memory_format is None else {"memory_format": memory_format}
        return _to(t, device or t.device, dtype or t.dtype, non_blocking, copy, **more)
    source = _to(t, dtype or t.dtype, memory_format=memory_format or torch.preserve_format)
    return torch.empty_like(source, device=CUDA).copy_(source, non_blocking)


def _on_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*sizes: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        return CudaTensor(factory(*sizes, dtype=dtype))

    return made


def _pin(t: torch.Tensor) -> torch.Tensor:
    _pinned.add(t.untyped_storage()._cdata)
    return t


def install() -> None:
    """Let factories make such tensors on "cuda", and pin memory in name."""
    for name, factory in (("empty.memory_format", torch.empty), ("empty_strided", torch.empty_strided)):
        _library.impl(name, _on_cuda(factory), "CUDA")

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        t = _empty(*args, **kwargs)
        return _pin(t) if pin_memory else t

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        t = _tensor(data, **kwargs)
        return t if device is None else t.to(device)

    # `with torch.device(...)` knows factories as they are when it is first used
    _device_constructors()
    torch.empty, torch.tensor = empty, tensor
    torch.Tensor.to = _moved
    torch.Tensor.cuda = lambda t, device=None, non_blocking=False: _moved(t, CUDA, non_blocking=non_blocking)
    torch.Tensor.pin_memory = lambda t, device=None: _pin(t.clone())
    torch.Tensor.is_pinned = lambda t, device=None: t.untyped_storage()._cdata in _pinned
    torch.Tensor.data_ptr = lambda t: t.data_ptr() if isinstance(t, CudaTensor) else _data_ptr(t)
    # parameters of a moved module are new ones: `.data` of a wrapper cannot be exchanged
    torch.__future__.set_overwrite_module_params_on_conversion(True)
