"""Vectors of sixteen float32 for functions that Numba compiles.

Its compiler makes vectors of loops by itself, but neither of a sum over a head nor of sums that are
to stay in registers, which is what attention and products of few rows consist of. One vector is
one register where the processor has AVX-512, and several elsewhere; the numbers are the same.

Numba looks at the file of a compiled function alone to see whether what it kept is still good: who
changes this one in a checkout also touches ``compiled.py``, which an installation writes anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
"""Numbers of one vector."""
WIDE = bool(get_host_cpu_features().get("avx512f"))
"""Whether a vector is one register, of thirty-two. Else it is two of sixteen at best, and of more
than six vectors that are summed at once some go to memory and back."""


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


def _inlined(function: Callable[..., Any]) -> Any:
    """An intrinsic of Numba, which checkers of types would take for what generates it."""
    return intrinsic(function)


_vector = _Vector()
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INDEX = ir.IntType(32)
_SIXTEEN = ir.Constant(_INDEX, 16)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def _integers(bits: int) -> Any:
    return ir.VectorType(ir.IntType(bits), LANES)


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> Any:
    """Where a vector begins in an array of one dimension."""
    return builder.bitcast(_one(context, builder, kind, array, index), vector.as_pointer())


def _one(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Where a number of it is."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


@_inlined
def load(_: Any, array: Any, index: Any) -> Any:
    """``LANES`` numbers of a contiguous array [n] of float32, or of uint16 that are the bits of
    bfloat16, from ``index`` on. Nothing is checked."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        if kind.dtype == types.float32:
            place = _place(context, builder, kind, args[0], args[1], _FLOATS)
            return builder.load(place, align=4)
        place = _place(context, builder, kind, args[0], args[1], _integers(16))
        halves = builder.load(place, align=2)
        bits = builder.shl(builder.zext(halves, _integers(32)), _every(_integers(32), 16))
        return builder.bitcast(bits, _FLOATS)

    return _vector(array, types.intp), generate


@_inlined
def store(_: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write a vector into an array as ``load`` reads it, from ``index`` on, rounded as by
    ``store_one``. Nothing is checked."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        if kind.dtype == types.float32:
            place = _place(context, builder, kind, args[0], args[1], _FLOATS)
            builder.store(args[2], place, align=4)
        else:
            place = _place(context, builder, kind, args[0], args[1], _integers(16))
            builder.store(_halved(builder, args[2], _every), place, align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@_inlined
def load_one(_: Any, array: Any, index: Any) -> Any:
    """One number of an array as ``load`` reads it. Nothing is checked."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        place = _one(context, builder, kind, args[0], args[1])
        read = builder.load(place)
        if kind.dtype == types.float32:
            return read
        bits = builder.shl(builder.zext(read, _INDEX), _SIXTEEN)
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(array, types.intp), generate


@_inlined
def store_one(_: Any, array: Any, index: Any, value: Any) -> Any:
    """Write one float32 into an array as ``load`` reads it: as bfloat16 rounded to the nearest,
    of two to the even one. Nothing is checked."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, value = signature.args[0], args[2]
        place = _one(context, builder, kind, args[0], args[1])
        if kind.dtype != types.float32:
            value = _halved(builder, value, ir.Constant)
        builder.store(value, place)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), generate


@_inlined
def fetch(_: Any, array: Any, index: Any) -> Any:
    """Have the cache line of a number fetched; it is read later. Nothing is checked, and a place
    outside of memory does no harm."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _one(context, builder, signature.args[0], args[0], args[1])
        place = builder.bitcast(place, ir.IntType(8).as_pointer())
        function = ir.FunctionType(ir.VoidType(), [place.type, _INDEX, _INDEX, _INDEX])
        hint = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0i8")
        read, soon, data = (ir.Constant(_INDEX, number) for number in (0, 3, 1))
        builder.call(hint, [place, read, soon, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@_inlined
def splat(_: Any, number: Any) -> Any:
    """A float32 in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        nothing = ir.Constant(_FLOATS, ir.Undefined)
        first = builder.insert_element(nothing, args[0], ir.Constant(_INDEX, 0))
        return builder.shuffle_vector(first, nothing, ir.Constant(_integers(32), [0] * LANES))

    return _vector(types.float32), generate


@_inlined
def times(_: Any, a: Any, b: Any) -> Any:
    """``a * b``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(*args)

    return _vector(a, b), generate


@_inlined
def plus(_: Any, a: Any, b: Any) -> Any:
    """``a + b``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(*args)

    return _vector(a, b), generate


@_inlined
def larger(_: Any, a: Any, b: Any) -> Any:
    """The larger of ``a`` and ``b``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _larger(builder, *args)

    return _vector(a, b), generate


@_inlined
def add_times(_: Any, total: Any, a: Any, b: Any) -> Any:
    """``total + a * b`` of vectors or of single float32, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        name = f"llvm.fmuladd.v{LANES}f32" if kind == _FLOATS else "llvm.fmuladd.f32"
        function = ir.FunctionType(kind, [kind] * 3)
        fused = cgutils.get_or_insert_function(builder.module, function, name)
        return builder.call(fused, [args[1], args[2], args[0]])

    kind = _vector if total == _vector else types.float32
    return kind(kind, kind, kind), generate


@_inlined
def total(_: Any, vector: Any) -> Any:
    """The sum of the lanes, halves of them added until one is left."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], builder.fadd)

    return types.float32(vector), generate


@_inlined
def pairs(_: Any, a: Any, b: Any) -> Any:
    """Sums of two neighbours each: those of ``a``, then those of ``b``. Vectors by two, the results
    by two and so on, until one is left, give the sums of sixteen vectors, in their order."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        every = ir.VectorType(_INDEX, LANES)
        even = ir.Constant(every, list(range(0, 2 * LANES, 2)))
        odd = ir.Constant(every, list(range(1, 2 * LANES, 2)))
        return builder.fadd(builder.shuffle_vector(*args, even), builder.shuffle_vector(*args, odd))

    return _vector(a, b), generate


@_inlined
def largest(_: Any, vector: Any) -> Any:
    """The largest of the lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], partial(_larger, builder))

    return types.float32(vector), generate


@_inlined
def smaller(_: Any, a: Any, b: Any) -> Any:
    """The smaller of ``a`` and ``b``; ``b`` where ``a`` is no number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return _vector(a, b), generate


@_inlined
def ratio(_: Any, a: Any, b: Any) -> Any:
    """``a / b``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fdiv(*args)

    return _vector(a, b), generate


@_inlined
def floor(_: Any, vector: Any) -> Any:
    """The whole numbers that are not above."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(_FLOATS, [_FLOATS])
        name = f"llvm.floor.v{LANES}f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)

    return _vector(vector), generate


@_inlined
def power_of_two(_: Any, vector: Any) -> Any:
    """2 to the power of whole numbers in -126..127."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integers = _integers(32)
        exponent = builder.add(builder.fptosi(args[0], integers), _every(integers, 127))
        return builder.bitcast(builder.shl(exponent, _every(integers, 23)), _FLOATS)

    return _vector(vector), generate


def _every(kind: Any, number: int) -> Any:
    """A number in every lane."""
    return ir.Constant(kind, [number] * LANES)


def _halved(builder: Any, value: Any, constant: Callable[[Any, int], Any]) -> Any:
    """The bits of bfloat16 of one float32, or a vector: rounded to the nearest, of two to the even
    one. ``constant`` gives one of such a kind."""
    one = constant is ir.Constant
    whole, half = (ir.IntType(n) if one else _integers(n) for n in (32, 16))
    bits, sixteen = builder.bitcast(value, whole), constant(whole, 16)
    odd = builder.and_(builder.lshr(bits, sixteen), constant(whole, 1))
    up = builder.add(builder.add(bits, constant(whole, 0x7FFF)), odd)
    # What is no number would overflow into one.
    none = builder.fcmp_unordered("uno", value, value)
    up = builder.select(none, constant(whole, 0x7FC00000), up)
    return builder.trunc(builder.lshr(up, sixteen), half)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _folded(builder: Any, left: Any, join: Callable[[Any, Any], Any]) -> Any:
    """One number of a vector: halves of it joined until one is left."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        nothing = ir.Constant(left.type, ir.Undefined)
        half = ir.VectorType(_INDEX, lanes)
        low = builder.shuffle_vector(left, nothing, ir.Constant(half, list(range(lanes))))
        high = ir.Constant(half, list(range(lanes, 2 * lanes)))
        left = join(low, builder.shuffle_vector(left, nothing, high))
    return builder.extract_element(left, ir.Constant(_INDEX, 0))
