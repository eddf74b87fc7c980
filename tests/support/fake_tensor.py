"""Tensors on "cuda" that hold their values on the CPU, for `fake_cuda`: each belongs to an allocation of `fake_gpu`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fake_gpu import Memory, gpu
from torch.utils import _pytree as pytree

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
_pinned: set[int] = set()
_data_ptr, _is_pinned = torch.Tensor.data_ptr, torch.Tensor.is_pinned
_library = torch.library.Library("aten", "IMPL")


class Block:
    """What tensors of one allocation share; the last of them frees it."""

    def __init__(self, like: torch.Tensor):
        self.memory = gpu.allocate(f"a {like.dtype} tensor of {[*like.shape]}".replace("torch.", ""), like.nbytes)

    def __del__(self) -> None:
        if hasattr(self, "memory"):
            gpu.free(self.memory)


class CudaTensor(torch.Tensor):
    """A tensor that says that it is on cuda:0."""

    values: torch.Tensor
    block: Block
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor, block: Block | None = None) -> CudaTensor:
        block = block or Block(values)
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        self = torch.Tensor._make_wrapper_subclass(cls, values.shape, **layout, dtype=values.dtype, device=CUDA)
        self.values, self.block = values, block
        return self

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(t, torch.Tensor)]
        mine = [t for t in tensors if isinstance(t, CudaTensor)]
        target = kwargs.get("device")
        if target is not None:
            kwargs = kwargs | {"device": CPU}
        to_host = target is not None and torch.device(target).type == "cpu"
        if not op.is_view:
            gpu.work([t.block.memory for t in mine])
            crosses = to_host or op is torch.ops.aten.copy_.default and not all(isinstance(t, CudaTensor) for t in args[:2])
            asynchronous = kwargs.get("non_blocking") or (op is torch.ops.aten.copy_.default and args[2:3] == (True,))
            if (crosses and not asynchronous) or op is torch.ops.aten._local_scalar_dense.default:
                gpu.synchronize(gpu.stream)
        result = op(*pytree.tree_map_only(CudaTensor, lambda t: t.values, args), **pytree.tree_map_only(CudaTensor, lambda t: t.values, kwargs))
        if to_host:
            return result
        known = {id(t.values): t for t in mine}
        blocks = {t.values.untyped_storage()._cdata: t.block for t in mine} if op.is_view else {}

        def wrap(values: torch.Tensor) -> torch.Tensor:
            if id(values) in known:
                return known[id(values)]
            return CudaTensor(values, blocks.get(values.untyped_storage()._cdata))

        if op is torch.ops.aten.copy_.default and not isinstance(args[0], CudaTensor):
            return args[0]
        return pytree.tree_map_only(torch.Tensor, wrap, result)
