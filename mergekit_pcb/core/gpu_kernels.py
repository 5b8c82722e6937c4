"""The walks of PCB over tensors on a GPU, compiled by Triton: what ``walks.py`` is for a CPU.

They follow ``formulas.py`` operation by operation in float32, each rounded by itself
(``enable_fp_fusion=False``, ``div_rn``), so that a merge has the same bits with them and without,
on a GPU and on a CPU. A program is one warp, takes one block of elements after the other, and reads
each once a walk. What it counts goes to places of its own.

``tasks`` and ``masks`` are tuples; a mask is ``None`` where nothing is dropped, else bits, eight to
a byte and the lowest first. ``factors`` are one over the density.
"""

from __future__ import annotations

import numpy
import triton
import triton.language as tl

from mergekit_pcb.core.formulas import (
    COLUMNS,
    HYPERBOLIC,
    LEAST_EXPONENT,
    LOG2_E,
    MIDDLE,
    POWER_OF_TWO,
    ROUNDING,
    SMALL,
    SMALLEST_DIVISOR,
)

#: Numbers of a line of the table of order statistics.
LINE = 8

_C0, _C1, _C2, _C3, _C4, _C5, _C6 = map(tl.constexpr, POWER_OF_TWO)
_H0, _H1, _H2, _H3, _H4 = map(tl.constexpr, HYPERBOLIC)
_ROUNDING, _LEAST = tl.constexpr(ROUNDING), tl.constexpr(LEAST_EXPONENT)
_SMALL, _MIDDLE = tl.constexpr(SMALL), tl.constexpr(MIDDLE)
_MINUS_2_LOG2_E, _MINUS_THIRD = tl.constexpr(-2 * LOG2_E), tl.constexpr(-1 / 3)
_SMALLEST_DIVISOR, _MAGNITUDE = tl.constexpr(SMALLEST_DIVISOR), tl.constexpr(0x7FFFFFFF)
_LINE, _COLUMNS = tl.constexpr(LINE), tl.constexpr(COLUMNS)
_SMALL_BITS, _MIDDLE_BITS = (
    tl.constexpr(int(numpy.float32(x).view("i4"))) for x in (SMALL, MIDDLE)
)


@triton.jit(do_not_specialize=["first", "last", "count"])
def walk_magnitudes(
    base, tasks, masks, factors, first, last, count, lines, slots, most,
    LINES: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the magnitudes of all tasks; ``most`` of each program is raised to the largest.

    Its bits, that is, which are in the order of the values.
    """
    own_slots = slots + tl.program_id(0) * (len(tasks) * LINES * 3)
    for block in range(first + tl.program_id(0), last, tl.num_programs(0)):
        start = block * tl.full((), BLOCK, tl.int64)
        inside = _inside(start, count, WHOLE, BLOCK)
        _, taus = _task_vectors(base, tasks, masks, factors, start, inside, BLOCK)
        largest = tl.zeros((BLOCK,), tl.int32)
        for task in tl.static_range(len(tasks)):
            values = tl.abs(taus[task])
            # The bits of NaN are above those of infinity, and those above all numbers'.
            largest = tl.maximum(largest, values.to(tl.int32, bitcast=True) & _MAGNITUDE)
            for line in tl.static_range(LINES):
                _take(values, inside, lines, task * LINES + line, own_slots, slots, BLOCK)
        largest = tl.where(inside, largest, 0)
        tl.atomic_max(most + tl.program_id(0), tl.max(largest), sem="relaxed")


@triton.jit(do_not_specialize=["first", "last", "count"])
def walk_scores(
    base, tasks, masks, factors, first, last, count, lines, slots, table, most,
    LINES: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the scores of all tasks; ``most`` of each program and task is raised to the largest.

    Its :func:`_pattern`, that is.
    """
    own_slots = slots + tl.program_id(0) * (len(tasks) * LINES * 3)
    for block in range(first + tl.program_id(0), last, tl.num_programs(0)):
        start = block * tl.full((), BLOCK, tl.int64)
        inside = _inside(start, count, WHOLE, BLOCK)
        _, taus = _task_vectors(base, tasks, masks, factors, start, inside, BLOCK)
        total = _sum(taus)
        for task in tl.static_range(len(tasks)):
            scores = _score(taus[task], total, inside, table + task * _COLUMNS)
            largest = tl.max(tl.where(inside, _pattern(scores), -_MAGNITUDE))
            tl.atomic_max(most + tl.program_id(0) * len(tasks) + task, largest, sem="relaxed")
            for line in tl.static_range(LINES):
                _take(scores, inside, lines, task * LINES + line, own_slots, slots, BLOCK)


@triton.jit(do_not_specialize=["first", "last", "count"])
def walk_merge(
    base, tasks, masks, factors, first, last, count, table, out, most,
    NEAR: tl.constexpr, FROM_BASE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the base less the merged task vector, or, without ``FROM_BASE``, the latter alone.

    ``most`` of each program is raised to the bits of the largest magnitude written. ``NEAR`` says
    that no quotient, divisor or remainder of a weight underflows.
    """
    for block in range(first + tl.program_id(0), last, tl.num_programs(0)):
        start = block * tl.full((), BLOCK, tl.int64)
        inside = _inside(start, count, WHOLE, BLOCK)
        own, taus = _task_vectors(base, tasks, masks, factors, start, inside, BLOCK)
        total = _sum(taus)
        numerator = tl.zeros((BLOCK,), tl.float32)
        divisor = tl.zeros((BLOCK,), tl.float32)
        for task in tl.static_range(len(tasks)):
            row = table + task * _COLUMNS
            if tl.load(row + 8) != 0:  # it competes
                tau, threshold = taus[task], tl.load(row + 4)
                above = tl.maximum(_score(tau, total, inside, row), threshold) - threshold
                share = _quotient(above, tl.load(row + 5), tl.load(row + 6), NEAR)
                divisor += share
                weight = tl.load(row + 7)
                signed = tl.where(tau > 0, weight, tl.where(tau < 0, -weight, 0.0))
                numerator += share * _clamped(tau, row) * signed
        values = tl.div_rn(numerator, tl.maximum(divisor, _SMALLEST_DIVISOR))
        if FROM_BASE:
            values = own - values
            bits = values.to(tl.int32, bitcast=True) & _MAGNITUDE
            largest = tl.max(tl.where(inside, bits, 0))
            tl.atomic_max(most + tl.program_id(0), largest, sem="relaxed")
        place = out + start + tl.arange(0, BLOCK)
        tl.store(place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _inside(start, count, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Which places of a block hold elements; all, if blocks are whole, which makes loads quick."""
    if WHOLE:
        return tl.full((BLOCK,), True, tl.int1)
    return tl.arange(0, BLOCK) < count - start


@triton.jit
def _wide(tensor, start, inside, BLOCK: tl.constexpr):
    """A block in float32."""
    return tl.load(tensor + start + tl.arange(0, BLOCK), mask=inside, other=0).to(tl.float32)


@triton.jit
def _task_vectors(base, tasks, masks, factors, start, inside, BLOCK: tl.constexpr):
    """A block of the base and of all task vectors, thinned."""
    own = _wide(base, start, inside, BLOCK)
    offsets = tl.arange(0, BLOCK)
    taus = ()
    for task in tl.static_range(len(tasks)):
        tau = _wide(tasks[task], start, inside, BLOCK) - own
        if masks[task] is not None:
            packed = tl.load(masks[task] + start // 8 + offsets // 8, mask=inside, other=0)
            kept = ((packed.to(tl.int32) >> (offsets % 8)) & 1).to(tl.float32)
            tau = tau * tl.load(factors + task) * kept + 0.0
        taus = taus + (tau,)
    return own, taus


@triton.jit
def _sum(taus):
    """The sum of all task vectors, in the order of the configuration."""
    total = taus[0]
    for task in tl.static_range(1, len(taus)):
        total += taus[task]
    return total


@triton.jit
def _clamped(tau, row):
    return tl.minimum(tl.maximum(tl.abs(tau), tl.load(row)), tl.load(row + 1))


@triton.jit
def _score(tau, total, inside, row):
    """``row`` begins with low, high, √(n log₂ e) / (high − low) and n log₂ e."""
    x = (_clamped(tau, row) - tl.load(row)) * tl.load(row + 2)
    z = tau * total
    size = tl.where(inside, z.to(tl.int32, bitcast=True) & _MAGNITUDE, 0)
    return _power_of_two(x * x - tl.load(row + 3)) * _tanh(z, tl.max(size))


@triton.jit
def _quotient(above, width, inverse, NEAR: tl.constexpr):
    """The quotient to the last bit; ``inverse`` is one over ``width``, rounded.

    Where nothing underflows, one step makes the product faithful and a second one right (Markstein,
    "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
    """
    if NEAR:
        found = above * inverse
        found = tl.fma(tl.fma(-found, width, above), inverse, found)
        return tl.fma(tl.fma(-found, width, above), inverse, found)
    return tl.div_rn(above, width)


@triton.jit
def _power_of_two(y):
    """As ``formulas.power_of_two_``: 2^fraction, to whose exponent the whole part is added."""
    y = tl.maximum(y, _LEAST)
    whole = y + _ROUNDING
    f = y - (whole - _ROUNDING)
    p = (((((f * _C6 + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _C0
    # The last bits of the rounded number are the whole part; the others are shifted out.
    bits = p.to(tl.int32, bitcast=True) + (whole.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _tanh(z, largest):
    """``largest`` are the bits of a block's largest magnitude; it decides about work alone."""
    found = z + z * z * z * _MINUS_THIRD
    if largest > _SMALL_BITS:
        size = tl.abs(z)
        w = z * z
        middle = z + ((((w * _H4 + _H3) * w + _H2) * w + _H1) * w + _H0) * w * z
        if largest > _MIDDLE_BITS:
            t = _power_of_two(size * _MINUS_2_LOG2_E)
            far = tl.div_rn(1.0 - t, 1.0 + t)
            middle = tl.where(size <= _MIDDLE, middle, tl.where(z > 0, far, -far))
        found = tl.where(size <= _SMALL, found, middle)
    return found


@triton.jit
def _pattern(values):
    """Integers in the order of the values; both zeros become 0."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & _MAGNITUDE), bits)


@triton.jit
def _take(values, inside, lines, line, own_slots, slots, BLOCK: tl.constexpr):
    """Count values below fences; keep those between them, or count these in cells.

    A line is low, high, whether ties count, shift and origin of cells, their address or 0, and
    address and room of what is kept. A program's slot takes how many values are at most and how
    many below the lower fence; the first of all slots takes how many were kept.
    """
    row = lines + line * _LINE
    low = tl.load(row).to(tl.int32).to(tl.float32, bitcast=True)
    high = tl.load(row + 1).to(tl.int32).to(tl.float32, bitcast=True)
    above = inside & (values > low)
    within = above & (values < high)
    # At most 2^9 of a block each, so that three counts fit into one number.
    beside = (inside & (above == 0)).to(tl.int32) + (within.to(tl.int32) << 20)
    if tl.load(row + 2) != 0:
        beside += (inside & (values < low)).to(tl.int32) << 10
    counted = tl.sum(beside)
    slot = own_slots + line * 3
    tl.atomic_add(slot, (counted & 0x3FF).to(tl.int64), sem="relaxed")
    if tl.load(row + 2) != 0:
        tl.atomic_add(slot + 1, ((counted >> 10) & 0x3FF).to(tl.int64), sem="relaxed")
    if (counted >> 20) > 0:
        cells = tl.load(row + 5)
        if cells != 0:
            cell = _pattern(values) >> tl.load(row + 3).to(tl.int32)
            cell -= tl.load(row + 4).to(tl.int32)
            places = cells.to(tl.pointer_type(tl.int64)) + cell
            tl.atomic_add(places, tl.full((BLOCK,), 1, tl.int64), mask=within, sem="relaxed")
        else:
            fill, room = slots + line * 3 + 2, tl.load(row + 7)
            if tl.load(fill) < room:
                number = tl.cumsum(within.to(tl.int32)) - 1
                place = tl.atomic_add(fill, (counted >> 20).to(tl.int64), sem="relaxed") + number
                kept = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + place
                tl.store(kept, values, mask=within & (place < room))
            else:  # it will be walked again
                tl.atomic_max(fill, room + 1, sem="relaxed")
