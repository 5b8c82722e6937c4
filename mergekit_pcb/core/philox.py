"""The numbers of Philox4x64-10 against a threshold, compiled: the bits are those of ``dare.py``."""

from __future__ import annotations

from typing import Any

import numpy
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mergekit_pcb.core.dare import MULTIPLIERS, ROUNDS, WEYL, WORDS_PER_COUNTER
from mergekit_pcb.core.intrinsics import below, equal, kept_on_disk, repeated
from mergekit_pcb.core.vectors import STRIP

# Counters that are drawn at a time, by vectors, and the words of 16 bits that they give.
COUNTERS = 16
_WORDS = WORDS_PER_COUNTER * COUNTERS
_NUMBER = ir.IntType(64)
_VECTOR = ir.VectorType(_NUMBER, COUNTERS)


@intrinsic
def numbers_of(_context, k0, k1, low, high, out):
    """The numbers of the next counters, four of 64 bits each.

    The key is ``k0 + 2^64 k1``, and the counter stood at ``low + 2^64 high``: like numpy, one is
    added before they are drawn.
    """

    def generate(context, builder, signature, arguments):
        *key, lowest, highest = arguments[:4]
        before = repeated(builder, lowest, _VECTOR)
        c0 = builder.add(before, ir.Constant(_VECTOR, list(range(1, COUNTERS + 1))))
        carried = builder.zext(builder.icmp_unsigned("<", c0, before), _VECTOR)
        c1 = builder.add(repeated(builder, highest, _VECTOR), carried)
        c2 = c3 = _constant(0)
        for _ in range(ROUNDS):
            high0, low0 = _product(builder, c0, MULTIPLIERS[0])
            high1, low1 = _product(builder, c2, MULTIPLIERS[1])
            a, b = (repeated(builder, half, _VECTOR) for half in key)
            c0, c1 = builder.xor(builder.xor(high1, c1), a), low1
            c2, c3 = builder.xor(builder.xor(high0, c3), b), low0
            key = [
                builder.add(half, ir.Constant(_NUMBER, step))
                for half, step in zip(key, WEYL, strict=True)
            ]
        found = _in_turn(builder, _in_turn(builder, c0, c2), _in_turn(builder, c1, c3))
        memory = context.make_array(signature.args[4])(context, builder, arguments[4]).data
        builder.store(found, builder.bitcast(memory, found.type.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(k0, k1, low, high, out), generate


def _constant(number: int) -> Any:
    return ir.Constant(_VECTOR, [number] * COUNTERS)


def _product(builder: Any, values: Any, factor: int) -> tuple[Any, Any]:
    """The upper and the lower 64 bits of products, from those of halves, which processors have."""
    half, rest = _constant(32), _constant(0xFFFFFFFF)
    low, high = builder.and_(values, rest), builder.lshr(values, half)
    lower, upper = (_constant(number) for number in (factor & 0xFFFFFFFF, factor >> 32))
    least = builder.mul(low, lower)
    middle = builder.add(builder.mul(high, lower), builder.lshr(least, half))
    other = builder.add(builder.mul(low, upper), builder.and_(middle, rest))
    most = builder.add(builder.mul(high, upper), builder.lshr(middle, half))
    return (
        builder.add(most, builder.lshr(other, half)),
        builder.or_(builder.shl(other, half), builder.and_(least, rest)),
    )


def _in_turn(builder: Any, one: Any, other: Any) -> Any:
    """One of this vector, one of that, and so on."""
    count = one.type.count
    order = [place + half * count for place in range(count) for half in (0, 1)]
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), 2 * count), order)
    return builder.shuffle_vector(one, other, lanes)


@kept_on_disk
def compare(
    k0: Any, k1: Any, low: Any, high: Any, fence: Any, numbers: Any, words: Any, less: Any,
    same: Any,
) -> None:  # fmt: skip
    """Which words are less than ``fence`` and which are equal to it, 64 to a number, lowest first.

    They are those of :func:`numbers_of`, whose ``out`` is ``numbers``; ``words`` is its memory.
    """
    for first in range(0, len(less), _WORDS // STRIP):
        numbers_of(k0, k1, low, high, numbers)
        low += numpy.uint64(COUNTERS)
        high += numpy.uint64(low < numpy.uint64(COUNTERS))
        for strip in range(_WORDS // STRIP):
            less[first + strip] = below(words, strip * STRIP, fence)
            same[first + strip] = equal(words, strip * STRIP, fence)


def against(key: int, counter: int, count: int, fence: int) -> tuple[Any, Any]:
    """As that of ``dare.py``, with more bits than words asked for."""
    numbers, strips = numpy.empty(4 * COUNTERS, "u8"), -(-count // _WORDS) * (_WORDS // STRIP)
    less, same = (numpy.empty(strips, "<u8") for _ in range(2))
    halves = [
        numpy.uint64(half) for whole in (key, counter) for half in divmod(whole, 1 << 64)[::-1]
    ]
    asked = *halves, numpy.uint16(fence)
    compare(*asked, numbers, numbers.view("u2"), less, same)
    return less.view("u1"), same.view("u1")
