"""The loops of PCB, compiled: what torch does in one pass over memory an operation, in one for all.

They follow ``formulas.py`` operation by operation in float32, each rounded by itself, so that a
merge has the same bits with them and without. Arrays are parts of scratch, a row per task, of
which the first ``count`` columns are meant; ``bits`` are an array beside them, seen as integers,
whose order is that of numbers from 0 on, and which compilers compare by vectors. ``walks.py`` calls
them.
"""

from __future__ import annotations

from typing import Any

import numpy

from mergekit_pcb.core.formulas import (
    HYPERBOLIC,
    LEAST_EXPONENT,
    LOG2_E,
    MIDDLE,
    POWER_OF_TWO,
    ROUNDING,
    SMALL,
)
from mergekit_pcb.core.intrinsics import (
    above,
    below,
    first_of,
    loop,
    narrow,
    ones,
    read,
    thin_strip,
    wide,
)
from mergekit_pcb.core.vectors import AT_ONCE, STRIP

# Numbers of no precision of their own would be of float64.
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = map(numpy.float32, POWER_OF_TWO)
_ROUNDING, _LEAST = numpy.float32(ROUNDING), numpy.float32(LEAST_EXPONENT)
_H0, _H1, _H2, _H3, _H4 = map(numpy.float32, HYPERBOLIC)
_MIDDLE, _MINUS_2_LOG2_E = numpy.float32(MIDDLE), numpy.float32(-2 * LOG2_E)
_SMALL, _MINUS_THIRD = numpy.float32(SMALL), numpy.float32(-1 / 3)
_ZERO, _ONE = numpy.float32(0), numpy.float32(1)
_MAGNITUDE = numpy.int32(0x7FFFFFFF)
_ALL = numpy.uint64(2**64 - 1)


@loop
def _number(bits: Any) -> Any:
    """The float32 of these bits."""
    return numpy.int32(bits).view(numpy.float32)


@loop
def task_vectors(
    base: Any,
    addresses: Any,
    masks: Any,
    factors: Any,
    first: int,
    start: int,
    tau: Any,
    count: int,
) -> None:
    """Those of a block, from element ``start`` on, thinned.

    ``base`` is a whole tensor as the checkpoint holds it, bfloat16 seen as ``uint16`` and float16
    as ``int16``; ``addresses`` are those of the tasks' tensors of the same length and dtype. A row
    of ``masks`` holds the bits of a task from element ``first`` on, lowest first; ``factors`` are
    one over the density, or 0 where nothing is dropped.
    """
    own = base[start : start + count]
    for task in range(len(addresses)):
        address = addresses[task]
        for i in range(count):
            tau[task, i] = wide(read(address, start + i, base)) - wide(own[i])
        if factors[task] != 0:
            thin(tau, task, masks, (start - first) // 8, factors[task], count)


@loop
def add(tau: Any, total: Any, count: int) -> None:
    """The sum of all task vectors, in the order of the configuration."""
    for i in range(count):
        total[i] = tau[0, i]
    for task in range(1, len(tau)):
        for i in range(count):
            total[i] += tau[task, i]


@loop
def thin(tau: Any, task: int, masks: Any, byte: int, factor: Any, count: int) -> None:
    """DARE of a row in place: ``masks`` hold eight bits a byte, lowest first, from ``byte`` on.

    Both have room for whole strips, whatever the last one holds beyond ``count``.
    """
    place, bits = task * tau.shape[1], task * masks.shape[1] + byte
    for start in range(0, count, STRIP):
        thin_strip(tau, place + start, masks, bits + start // 8, factor)


@loop
def magnitudes(tau: Any, out: Any, bits: Any, count: int) -> Any:
    """``|τ|`` of all tasks, and the bits of the largest.

    Those of NaN are above those of infinity, and those above all numbers'.
    """
    largest = numpy.int32(0)
    for task in range(len(tau)):
        for i in range(count):
            out[task, i] = abs(tau[task, i])
        for i in range(count):
            largest = max(largest, bits[task, i])
    return largest


@loop
def take(
    values: Any, rows: Any, fences: Any, tied: Any, counts: Any, pools: Any, fills: Any, count: int
) -> None:
    """Count the values below fences, and keep those between them.

    Line ``k`` looks at row ``rows[k]`` between ``fences[k]``: ``counts[k]`` grows by how many are
    at most and, where ``tied`` says so, how many are less than the lower one; ``pools[k]`` from
    ``fills[k]`` on takes those strictly between, and has room for them and for ``AT_ONCE`` more. A
    row has room for whole strips, whatever the last one holds beyond ``count``.
    """
    for k in range(len(rows)):
        row, low, high, counts_ties = rows[k], fences[k, 0], fences[k, 1], tied[k]
        at_most = less = numpy.int64(0)
        fill = fills[k]
        for start in range(0, count, STRIP):
            given = row * values.shape[1] + start, min(STRIP, count - start), low, high, counts_ties
            most, under, fill = look_at_strip(values, *given, pools[k], fill)
            at_most += most
            less += under
        counts[k, 0] += at_most
        counts[k, 1] += less
        fills[k] = fill


@loop
def look_at_strip(
    values: Any, place: int, length: int, low: Any, high: Any, counts_ties: bool, out: Any,
    fill: int,
) -> Any:  # fmt: skip
    """How many of up to 64 values are at most ``low`` and below it; how far ``out`` is filled.

    It takes those strictly between the fences, and has room for ``AT_ONCE`` more. There is a whole
    strip at ``place``, whatever it holds beyond ``length``.
    """
    valid = numpy.uint64(_ALL >> numpy.uint64(STRIP - length))
    beyond = numpy.uint64(above(values, place, low) & valid)
    less = numpy.int64(0)
    if counts_ties:
        less = numpy.int64(ones(numpy.uint64(below(values, place, low) & valid)))
    inside = numpy.uint64(beyond & below(values, place, high))
    end = fill + numpy.int64(ones(inside))
    while True:  # a processor foresees that one turn will do, but not how many values
        for _ in range(AT_ONCE):
            out[fill] = read(values.ctypes.data, place + numpy.int64(first_of(inside)), values)
            inside = numpy.uint64(inside & numpy.uint64(inside - numpy.uint64(1)))
            fill += 1
        if fill >= end:
            return length - numpy.int64(ones(beyond)), less, end


@loop
def scores(
    tau: Any, total: Any, table: Any, out: Any, products: Any, product_bits: Any, count: int
) -> None:
    """The scores of all tasks; ``table`` is that of ``formulas.py``, ``products`` scratch."""
    largest = numpy.int32(0)
    for task in range(len(tau)):
        low, high = table[task, 0], table[task, 1]
        factor, exponent = table[task, 2], table[task, 3]
        for i in range(count):
            x = (min(max(abs(tau[task, i]), low), high) - low) * factor
            out[task, i] = _power_of_two(x * x - exponent)
        for i in range(count):
            products[task, i] = tau[task, i] * total[i]
        for i in range(count):
            largest = max(largest, numpy.int32(product_bits[task, i] & _MAGNITUDE))
    for task in range(len(tau)):
        if _number(largest) <= _SMALL:
            for i in range(count):
                out[task, i] *= _tanh_of_small(products[task, i])
        elif _number(largest) <= _MIDDLE:
            for i in range(count):
                z = products[task, i]
                found = _tanh_of_small(z) if abs(z) <= _SMALL else _tanh_of_middle(z)
                out[task, i] *= found
        else:
            for i in range(count):
                z = products[task, i]
                near = _tanh_of_middle(z) if abs(z) <= _MIDDLE else _tanh_of_large(z)
                out[task, i] *= _tanh_of_small(z) if abs(z) <= _SMALL else near


@loop
def _power_of_two(y: Any) -> Any:
    y = max(y, _LEAST)
    whole = (y + _ROUNDING) - _ROUNDING
    f = y - whole
    p = (((((f * _C6 + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _C0
    bits = numpy.int32(numpy.int32(numpy.int32(whole) + numpy.int32(127)) << 23)
    return p * bits.view(numpy.float32)


@loop
def _tanh_of_small(z: Any) -> Any:
    return z + z * z * z * _MINUS_THIRD


@loop
def _tanh_of_middle(z: Any) -> Any:
    w = z * z
    return z + ((((w * _H4 + _H3) * w + _H2) * w + _H1) * w + _H0) * w * z


@loop
def _tanh_of_large(z: Any) -> Any:
    t = _power_of_two(abs(z) * _MINUS_2_LOG2_E)
    found = (_ONE - t) / (_ONE + t)
    return found if z > 0 else -found


@loop
def peaks(values: Any, bits: Any, out: Any, count: int) -> None:
    """Raise ``out``, a number per task, to the task's largest value."""
    for task in range(len(values)):
        largest = bits[task, 0]
        for i in range(count):
            largest = max(largest, bits[task, i])
        if largest >= 0:
            out[task] = max(out[task], _number(largest))
        else:  # all are below 0, where the order of integers is another
            for i in range(count):
                out[task] = max(out[task], values[task, i])


@loop
def combine(
    tau: Any, scores: Any, table: Any, smallest: Any, numerator: Any, divisor: Any, count: int
) -> None:
    """The merged task vector, in ``numerator``; ``divisor`` is scratch.

    ``table`` is that of ``formulas.py``, ``smallest`` the least divisor.
    """
    for i in range(count):
        numerator[i] = 0
        divisor[i] = 0
    for task in range(len(tau)):
        low, high, threshold = table[task, 0], table[task, 1], table[task, 4]
        width, weight = table[task, 5], table[task, 7]
        if table[task, 8] == 0:
            continue
        for i in range(count):
            delta = tau[task, i]
            share = (max(scores[task, i], threshold) - threshold) / width
            clamped = min(max(abs(delta), low), high)
            signed = weight if delta > 0 else (-weight if delta < 0 else _ZERO)
            divisor[i] += share
            numerator[i] += share * clamped * signed
    for i in range(count):
        numerator[i] = numerator[i] / max(divisor[i], smallest)


@loop
def subtract(base: Any, start: int, values: Any, bits: Any, count: int) -> Any:
    """The base, from element ``start`` on, less ``values``, in their place.

    Returns the ``bits`` of the largest magnitude.
    """
    own = base[start : start + count]
    for i in range(count):
        values[i] = wide(own[i]) - values[i]
    largest = numpy.int32(0)
    for i in range(count):
        largest = max(largest, numpy.int32(bits[i] & _MAGNITUDE))
    return largest


@loop
def store(values: Any, bits: Any, out: Any, count: int) -> None:
    """Float32 to what a checkpoint holds: the nearest, of two the even one."""
    for i in range(count):
        out[i] = narrow(values[i], bits[i], out.dtype)
