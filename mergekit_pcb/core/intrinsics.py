"""What compiled code needs and numba has no words for: bits of vectors, memory, short floats.

Also how functions are compiled. Importing this module takes numba.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from mergekit_pcb.core.vectors import STRIP

_OPTIONS: Any = {"nogil": True, "error_model": "numpy"}
_SOURCES = "dare", "formulas", "intrinsics", "kernels", "philox", "ranks", "vectors", "walks"


def _digest() -> str:
    directory, found = pathlib.Path(__file__).parent, hashlib.blake2b(digest_size=8)
    for name in _SOURCES:
        found.update(directory.joinpath(name).with_suffix(".py").read_bytes())
    return found.hexdigest()


_DIGEST = _digest()


def loop(function: Callable[..., Any]) -> Any:
    """Compile a function that compiled ones call."""
    return njit(**_OPTIONS)(function)


def named(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile one of several functions of the same types that Python would call the same.

    What is loaded from a disk may meet what is compiled now, and is told from it by names.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        function.__qualname__ = name
        return loop(function)

    return compiled


def kept_on_disk(function: Callable[..., Any]) -> Any:
    """Compile a function that is called from outside, once on a machine.

    numba looks for it by name, and whether it is out of date by its own file alone; the name is
    made to say what all files hold that it is made from.
    """
    function.__qualname__ += f"_{_DIGEST}"
    return njit(cache=True, **_OPTIONS)(function)


@intrinsic
def read(_context, address, place, like):
    """The number at a place of memory that holds numbers like those of an array."""

    def generate(context, builder, signature, arguments):
        kind = context.get_data_type(signature.args[2].dtype)
        memory = builder.inttoptr(arguments[0], kind.as_pointer())
        return builder.load(builder.gep(memory, [arguments[1]]))

    return like.dtype(types.intp, types.intp, like), generate


def _lanes(comparison: str) -> Any:
    """A comparison of the 64 values from a place on with a number, a bit each, lowest first.

    Compilers make a few instructions on vectors of it, as they do of no loop.
    """

    @intrinsic
    def compare(_context, values, start, number):
        def generate(context, builder, signature, arguments):
            kind = signature.args[0].dtype
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            vector = ir.VectorType(context.get_data_type(kind), STRIP)
            place = builder.gep(array.data, [arguments[1]])
            taken = builder.load(
                builder.bitcast(place, vector.as_pointer()), align=kind.bitwidth // 8
            )
            fence = repeated(builder, arguments[2], vector)
            real = isinstance(kind, types.Float)
            compares = builder.fcmp_ordered if real else builder.icmp_unsigned
            return builder.bitcast(compares(comparison, taken, fence), ir.IntType(STRIP))

        return types.uint64(values, types.intp, values.dtype), generate

    return compare


above, below, equal = (_lanes(sign) for sign in (">", "<", "=="))


@intrinsic
def thin_strip(_context, values, start, packed, byte, factor):
    """Multiply 64 values from a place on by a factor, and by one or zero as bits say; add zero.

    The bits are those of eight bytes from a place on, lowest first.
    """

    def generate(context, builder, signature, arguments):
        memory, masks = (
            context.make_array(kind)(context, builder, array).data
            for kind, array in zip(signature.args[:4:2], arguments[:4:2], strict=True)
        )
        kind = signature.args[0].dtype
        vector = ir.VectorType(context.get_data_type(kind), STRIP)
        place = builder.bitcast(builder.gep(memory, [arguments[1]]), vector.as_pointer())
        word = builder.bitcast(builder.gep(masks, [arguments[3]]), ir.IntType(STRIP).as_pointer())
        kept = builder.bitcast(builder.load(word, align=1), ir.VectorType(ir.IntType(1), STRIP))
        one, zero = (ir.Constant(vector, [number] * STRIP) for number in (1.0, 0.0))
        align = kind.bitwidth // 8
        taken = builder.load(place, align=align)
        scaled = builder.fmul(taken, repeated(builder, arguments[4], vector))
        thinned = builder.fadd(builder.fmul(scaled, builder.select(kept, one, zero)), zero)
        builder.store(thinned, place, align=align)
        return context.get_dummy_value()

    return types.void(values, types.intp, packed, types.intp, values.dtype), generate


def repeated(builder: Any, number: Any, vector: Any) -> Any:
    """A vector of one number."""
    nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(builder.insert_element(nothing, number, first), nothing, lanes)


@intrinsic
def ones(_context, bits):
    """How many bits are set."""
    return types.uint64(bits), lambda _context, builder, _signature, given: builder.ctpop(given[0])


@intrinsic
def first_of(_context, bits):
    """The place of the lowest bit that is set; any place if none is."""

    def generate(_context, builder, _signature, arguments):
        found = builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))
        return builder.and_(found, ir.Constant(ir.IntType(64), STRIP - 1))

    return types.uint64(bits), generate


def by_precision(name: str, function: Callable[[int], Any]) -> Any:
    """What compiled code calls for numbers of 32 bits and of 64; ``function`` makes it for each."""

    def chosen(value):
        raise NotImplementedError

    @overload(chosen, jit_options=_OPTIONS)
    def _chosen(value):
        own = function(value.bitwidth)

        def call(value):
            return own(value)

        call.__qualname__ = f"{name}_by_precision"
        return call

    return chosen


def wide(value):
    """A number of a checkpoint in the precision of arithmetic; compiled code alone calls it."""
    raise NotImplementedError


@overload(wide, jit_options=_OPTIONS)
def _overloaded(value):
    if value == types.uint16:  # the bits of a bfloat16
        shift = numpy.uint32(16)
        return lambda value: numpy.uint32(numpy.uint32(value) << shift).view(numpy.float32)
    if value == types.int16:  # the bits of a float16
        return lambda value: _half(value)
    return lambda value: value


@loop
def _half(bits: Any) -> Any:
    """A float16; of subnormal ones nothing is computed, which a processor may take for zero."""
    sign = numpy.uint32((numpy.uint32(bits) & numpy.uint32(0x8000)) << numpy.uint32(16))
    rest = numpy.uint32(numpy.uint32(bits) & numpy.uint32(0x7FFF))
    wide = numpy.uint32(rest << numpy.uint32(13))
    # With the exponent of the smallest normal number, and less that number.
    least = numpy.uint32(wide + numpy.uint32(0x38800000)).view(numpy.float32)
    small = numpy.float32(least - numpy.float32(2.0**-14)).view(numpy.uint32)
    moved = numpy.uint32(wide + numpy.uint32(0x38000000))
    special = numpy.uint32(wide | numpy.uint32(0x7F800000))  # infinity and NaN
    number = small if rest < numpy.uint32(0x0400) else moved
    whole = special if rest >= numpy.uint32(0x7C00) else numpy.uint32(number)
    return numpy.uint32(whole | sign).view(numpy.float32)


def narrow(value, bits, kind):
    """A finite number, with its bits, as a checkpoint's; compiled code alone calls it."""
    raise NotImplementedError


@overload(narrow, jit_options=_OPTIONS)
def _overloaded_narrow(value, bits, kind):
    if kind.dtype == types.uint16:
        return lambda value, bits, kind: _to_bfloat16(bits)
    if kind.dtype == types.int16:
        return lambda value, bits, kind: _to_half(bits)
    return lambda value, bits, kind: value


@loop
def _to_bfloat16(bits: Any) -> Any:
    value = numpy.uint32(bits)
    odd = numpy.uint32(numpy.uint32(value >> numpy.uint32(16)) & numpy.uint32(1))
    rounded = numpy.uint32(value + numpy.uint32(0x7FFF) + odd)
    return numpy.uint16(rounded >> numpy.uint32(16))


@loop
def _to_half(bits: Any) -> Any:
    """A float16; where it is subnormal, a sum rounds it."""
    value = numpy.uint32(bits)
    size = numpy.uint32(value & numpy.uint32(0x7FFFFFFF))
    odd = numpy.uint32(numpy.uint32(size >> numpy.uint32(13)) & numpy.uint32(1))
    normal = numpy.uint32(numpy.uint32(size - numpy.uint32(0x37FFF001)) + odd) >> numpy.uint32(13)
    half = numpy.float32(0.5)
    moved = numpy.float32(size.view(numpy.float32) + half).view(numpy.uint32)
    subnormal = numpy.uint32(moved - half.view(numpy.uint32))
    chosen = subnormal if size < numpy.uint32(0x38800000) else numpy.uint32(normal)
    sign = numpy.uint32(numpy.uint32(value >> numpy.uint32(16)) & numpy.uint32(0x8000))
    return numpy.int16(numpy.uint16(chosen | sign))
