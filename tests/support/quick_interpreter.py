"""Triton's interpreter without its repeated work: the same arithmetic in half the time.

What the interpreter spends its time on is bookkeeping. It replaces the functions of `triton.language` by its own at
every call of a jit function, those calls included that a running kernel makes to its helpers, which find the
replacements in place; and it makes the type of every intermediate result anew. Here that is done once a launch, and
once a type.
"""

from __future__ import annotations

import inspect
from functools import lru_cache


class _Nothing:
    def restore(self) -> None:
        pass


def install() -> None:
    """Replace what is slow; nothing, where a version of Triton has not the form of 3.6 to 3.9."""
    try:
        import triton.language as tl
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter

        missing = not all((interpreter._LangPatchScope, interpreter._get_np_dtype, TritonSemantic.broadcast_impl_value))
    except (ImportError, AttributeError):
        return
    if missing or getattr(interpreter._patch_lang, "quick", False):
        return
    _replace_once_a_launch(interpreter, tl)
    _make_types_once(interpreter, tl, TritonSemantic)


def _replace_once_a_launch(interpreter, tl) -> None:
    replace, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[int] | None = None

    @lru_cache(None)
    def languages(fn) -> frozenset[int]:
        modules = (value for value in fn.__globals__.values() if inspect.ismodule(value))
        return frozenset(id(module) for module in modules if module is tl or module is tl.core)

    def quick_replace(fn):
        nonlocal replaced
        if replaced is not None and languages(fn) <= replaced:
            return _Nothing()
        if replaced is not None:
            replaced |= languages(fn)
        return replace(fn)

    def quick_execute(self, *args, **kwargs):
        nonlocal replaced
        outer, replaced = replaced, set()
        try:
            return execute(self, *args, **kwargs)
        finally:
            replaced = outer

    quick_replace.quick = True
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = quick_replace, quick_execute


def _make_types_once(interpreter, tl, semantic) -> None:
    block_types: dict[tuple, dict] = {}
    shapes: dict[tuple, tuple] = {}
    numpy_types: dict[object, object] = {}
    make_block_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    numpy_type, broadcast = interpreter._get_np_dtype, semantic.broadcast_impl_value

    def quick_block_type(self, element_ty, shape):
        # sizes are ints, or constants that hold them
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if known := block_types.get(key):
            self.__dict__.update(known)
        else:
            make_block_type(self, element_ty, shape)
            block_types[key] = dict(self.__dict__)

    def quick_tensor(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if known := shapes.get(key):
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known
        else:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel

    def quick_numpy_type(dtype):
        key = dtype.name
        if key not in numpy_types:
            numpy_types[key] = numpy_type(dtype)
        return numpy_types[key]

    def quick_broadcast(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and a.shape.values == b.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    tl.block_type.__init__, tl.tensor.__init__ = quick_block_type, quick_tensor
    interpreter._get_np_dtype, semantic.broadcast_impl_value = quick_numpy_type, quick_broadcast
