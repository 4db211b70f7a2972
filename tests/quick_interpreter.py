"""Triton's interpreter without what it computes and throws away; every number stays what it was.

Most of the tests' time passes in the interpreter, and most of the interpreter's in making the same types again.
test_quick_interpreter.py compares it with Triton's own.
"""
from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kernels.runtime import tl

_changes = pytest.MonkeyPatch()


def hurry() -> None:
    """Quicken the interpreter of this process."""
    from triton.runtime import interpreter

    put = _changes.setattr
    _sum_integers_once(put, interpreter)
    _patch_once_a_launch(put, interpreter)
    _remember_dtypes(put, interpreter)
    _remember_shapes(put)
    _answer_at_once(put)


@contextmanager
def as_triton_has_it():
    """Triton's own interpreter for a while."""
    _changes.undo()
    try:
        yield
    finally:
        hurry()


def _sum_integers_once(put, interpreter) -> None:
    """Each sum of integers is made again in 64 bits, for an assertion that is skipped unless one debugs."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    put(builder, "options", replace(builder.options, sanitize_overflow=False))


def _patch_once_a_launch(put, interpreter) -> None:
    """triton.language is patched whole at a launch, and not anew in Triton's own functions, such as tl.zeros."""
    places = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    found = {place: [(name, member) for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]
             for place in places}

    def interpreted(member):
        def call(*given, **named):
            named["_semantic"] = interpreter.interpreter_semantic
            return member(*given, **named)
        return call

    def patch_builtin(place, builder, scope):
        for name, member in found[place]:
            scope.set_attr(place, name, interpreted(member))

    patch, both = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    put(interpreter, "_patch_builtin", patch_builtin)
    put(interpreter, "_patch_lang", lambda fn: patch(both))
    put(interpreter.InterpretedFunction, "__call__", lambda self, *given, **named: self.rewrite()(*given, **named))


def _remember_dtypes(put, interpreter) -> None:
    """NumPy's dtype for one of Triton's stands in a table that is made anew at each look."""
    slow, known = interpreter._get_np_dtype, {}

    def numpys(dtype):
        name = dtype.element_ty.name if isinstance(dtype, tl.block_type) else dtype.name
        if name not in known:
            known[name] = slow(dtype)
        return known[name]
    put(interpreter, "_get_np_dtype", numpys)


def _remember_shapes(put) -> None:
    """Every result gets a type, a shape of constants and a number of elements: one for all results of these sizes."""
    slow, known, constexpr, none = tl.block_type.__init__, {}, tl.constexpr, tl.tuple([])

    def block_type(self, element_ty, shape):
        sizes = tuple([s.value if isinstance(s, constexpr) else s for s in shape])
        if not isinstance(shape, (list, tl.tuple)) or {*map(type, sizes)} != {int} or sizes not in known:
            slow(self, element_ty, shape)
            known[sizes] = (self.shape, self.numel, str(self.shape), tl.tuple([constexpr(s) for s in self.shape]), {})
        self.element_ty = element_ty
        self.shape, self.numel, text, self.constants, self.others = known[sizes]
        self.name = f"<{text}, {element_ty}>"

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = (type.constants, constexpr(type.numel)) if type.is_block() else (none, constexpr(1))

    with_element, broadcast = tl.block_type.with_element_ty, tl.semantic.TritonSemantic.broadcast_impl_value

    def with_element_ty(self, scalar):
        if id(scalar) not in self.others:
            self.others[id(scalar)] = with_element(self, scalar), scalar  # kept, so that nothing else gets its id
        return self.others[id(scalar)][0]

    def broadcast_impl_value(self, lhs, rhs):
        sizes = [value.type.shape if value.type.is_block() else None for value in (lhs, rhs)]
        return (lhs, rhs) if sizes[0] is sizes[1] else broadcast(self, lhs, rhs)

    put(tl.block_type, "__init__", block_type)
    put(tl.tensor, "__init__", tensor)
    put(tl.block_type, "with_element_ty", with_element_ty)
    put(tl.block_type, "to_ir", lambda self, builder: self.with_element_ty(self.element_ty.to_ir(builder)))
    put(tl.semantic.TritonSemantic, "broadcast_impl_value", broadcast_impl_value)


def _answer_at_once(put) -> None:
    """A type is equal to itself, and a plain value holds no constant to unwrap."""
    equal, unwrap = tl.dtype.__eq__, tl.core._unwrap_if_constexpr
    plain = frozenset((int, float, bool, str, type(None), tl.dtype, tl.block_type, tl.tensor))
    put(tl.dtype, "__eq__", lambda self, other: self is other or equal(self, other))
    put(tl.core, "_unwrap_if_constexpr", lambda value: value if type(value) in plain else unwrap(value))
