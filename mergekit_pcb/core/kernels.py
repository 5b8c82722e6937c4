"""The loops of PCB, compiled: what torch does in one pass over memory an operation, in one for all.

They follow ``formulas.py`` operation by operation in float32 or float64, each rounded by itself,
so that a merge has the same bits with them and without. Arrays are parts of scratch, a row per
task, of which the first ``count`` columns are meant; ``bits`` are an array beside them, seen as
integers, whose order is that of numbers from 0 on, and which compilers compare by vectors.
``walks.py`` calls them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy

from mergekit_pcb.core.formulas import DOUBLE, LOG2_E, MIDDLE, SINGLE
from mergekit_pcb.core.intrinsics import (
    above,
    below,
    by_precision,
    first_of,
    loop,
    named,
    narrow,
    ones,
    read,
    thin_strip,
    wide,
)
from mergekit_pcb.core.vectors import AT_ONCE, STRIP

_ALL = numpy.uint64(2**64 - 1)


def _polynomial(name: str, coefficients: Sequence[Any]) -> Any:
    """Compiled Horner's rule for a polynomial, given from its constant on."""
    first, *rest = coefficients
    own = named(f"{name}_{len(rest)}")
    if not rest:
        return own(lambda x: first)  # noqa: ARG005 - as the others
    higher = _polynomial(name, rest)
    return own(lambda x: higher(x) * x + first)


@functools.cache
def _elementary(width: int) -> dict[str, Any]:
    """Compiled functions of numbers of so many bits, spelled out as ``formulas.py`` has them."""
    own = SINGLE if width == 32 else DOUBLE
    real, whole = (numpy.dtype(f"{kind}{width // 8}").type for kind in "fi")
    one, middle, small = real(1), real(MIDDLE), real(own.small)
    minus_third, minus_2_log2_e = real(-1 / 3), real(-2 * LOG2_E)
    rounding, least = real(own.rounding), real(own.least_exponent)
    bias, fraction = whole(1 - own.least_exponent), whole(own.fraction)
    all_but_sign = whole(numpy.iinfo(whole).max)
    powers = _polynomial("powers", [real(number) for number in own.power_of_two])
    hyperbolic = _polynomial("hyperbolic", [real(number) for number in own.hyperbolic])

    @loop
    def number(bits: Any) -> Any:
        return whole(bits).view(real)

    @loop
    def magnitude(bits: Any) -> Any:
        return whole(bits & all_but_sign)

    @loop
    def power_of_two(y: Any) -> Any:
        y = max(y, least)
        rounded = (y + rounding) - rounding
        bits = whole(whole(whole(rounded) + bias) << fraction)
        return powers(y - rounded) * bits.view(real)

    @loop
    def is_small(z: Any) -> Any:
        return abs(z) <= small

    @loop
    def is_middle(z: Any) -> Any:
        return abs(z) <= middle

    @loop
    def tanh_of_small(z: Any) -> Any:
        return z + z * z * z * minus_third

    @loop
    def tanh_of_middle(z: Any) -> Any:
        w = z * z
        return z + hyperbolic(w) * w * z

    @loop
    def tanh_of_large(z: Any) -> Any:
        t = power_of_two(abs(z) * minus_2_log2_e)
        found = (one - t) / (one + t)
        return found if z > 0 else -found

    return {
        function.__name__: function
        for function in (
            number, magnitude, power_of_two, is_small, is_middle, tanh_of_small, tanh_of_middle,
            tanh_of_large,
        )
    }  # fmt: skip


def _by_precision(name: str) -> Any:
    return by_precision(name, lambda width: _elementary(width)[name])


_number, _magnitude = map(_by_precision, ("number", "magnitude"))
_power_of_two, _is_small, _is_middle = map(_by_precision, ("power_of_two", "is_small", "is_middle"))
_tanh_of_small, _tanh_of_middle, _tanh_of_large = (
    _by_precision(f"tanh_of_{size}") for size in ("small", "middle", "large")
)


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
    largest = bits.dtype.type(0)
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
    largest = product_bits.dtype.type(0)
    for task in range(len(tau)):
        low, high = table[task, 0], table[task, 1]
        factor, exponent = table[task, 2], table[task, 3]
        for i in range(count):
            x = (min(max(abs(tau[task, i]), low), high) - low) * factor
            out[task, i] = _power_of_two(x * x - exponent)
        for i in range(count):
            products[task, i] = tau[task, i] * total[i]
        for i in range(count):
            largest = max(largest, _magnitude(product_bits[task, i]))
    for task in range(len(tau)):
        if _is_small(_number(largest)):
            for i in range(count):
                out[task, i] *= _tanh_of_small(products[task, i])
        elif _is_middle(_number(largest)):
            for i in range(count):
                z = products[task, i]
                out[task, i] *= _tanh_of_small(z) if _is_small(z) else _tanh_of_middle(z)
        else:
            for i in range(count):
                z = products[task, i]
                near = _tanh_of_middle(z) if _is_middle(z) else _tanh_of_large(z)
                out[task, i] *= _tanh_of_small(z) if _is_small(z) else near


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
            signed = weight if delta > 0 else (-weight if delta < 0 else delta)
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
    largest = bits.dtype.type(0)
    for i in range(count):
        largest = max(largest, _magnitude(bits[i]))
    return largest


@loop
def store(values: Any, bits: Any, out: Any, count: int) -> None:
    """What a checkpoint holds of numbers: the nearest, of two the even one."""
    for i in range(count):
        out[i] = narrow(values[i], bits[i], out.dtype)
