"""The walks of PCB over tensors on a GPU, compiled by Triton: what ``walks.py`` is for a CPU.

They follow ``formulas.py`` operation by operation in float32, each rounded by itself
(``enable_fp_fusion=False``, ``div_rn``), so that a merge has the same bits with them and without,
on a GPU and on a CPU. A program is one warp, takes one block of elements after the other, and reads
each once a walk. What it counts goes to places of its own.

``tasks`` and ``masks`` are tuples; a mask is ``None`` where nothing is dropped, else bits, eight to
a byte and the lowest first. ``factors`` are one over the density. Of ``fences`` there are three
numbers a line, of ``table`` a row a task: numbers that programs find among their arguments. A
program writes to the slot of its own number from ``slot`` on. Elements of a block that one lane
reads at once are a ``ROW``.
"""

from __future__ import annotations

import numpy
import triton
import triton.language as tl

from mergekit_pcb.core.cells import LINE, PARTS
from mergekit_pcb.core.formulas import COLUMNS, LOG2_E, MIDDLE, SINGLE, SMALLEST_DIVISOR

_C0, _C1, _C2, _C3, _C4, _C5, _C6 = map(tl.constexpr, SINGLE.power_of_two)
_H0, _H1, _H2, _H3, _H4 = map(tl.constexpr, SINGLE.hyperbolic)
_ROUNDING, _LEAST = tl.constexpr(SINGLE.rounding), tl.constexpr(SINGLE.least_exponent)
_SMALL, _MIDDLE = tl.constexpr(SINGLE.small), tl.constexpr(MIDDLE)
_MINUS_2_LOG2_E, _MINUS_THIRD = tl.constexpr(-2 * LOG2_E), tl.constexpr(-1 / 3)
_SMALLEST_DIVISOR, _MAGNITUDE = tl.constexpr(SMALLEST_DIVISOR), tl.constexpr(0x7FFFFFFF)
_LINE, _COLUMNS, _PARTS = tl.constexpr(LINE), tl.constexpr(COLUMNS), tl.constexpr(PARTS)
_SMALL_BITS, _MIDDLE_BITS = (
    tl.constexpr(int(numpy.float32(x).view("i4"))) for x in (SINGLE.small, MIDDLE)
)


@triton.jit(do_not_specialize=["first", "last", "count", "slot"])
def walk_magnitudes(
    base, tasks, masks, factors, first, last, count, slot, fences, lines, slots, most,
    LINES: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Take the magnitudes of all tasks; each program says which one is its largest.

    By its bits, that is, which are in the order of the values.
    """
    counts = _all(0, len(tasks) * LINES * 2, BLOCK // ROW)
    largest = tl.zeros((BLOCK // ROW,), tl.int32)
    for block in range(first + tl.program_id(0), last, tl.num_programs(0)):
        start = block * tl.full((), BLOCK, tl.int64)
        inside = _inside(start, count, WHOLE, BLOCK)
        _, taus = _task_vectors(base, tasks, masks, factors, start, count, inside, BLOCK)
        counted = ()
        for task in tl.static_range(len(tasks)):
            values = tl.abs(taus[task])
            # The bits of NaN are above those of infinity, and those above all numbers'.
            bits = values.to(tl.int32, bitcast=True) & _MAGNITUDE
            largest = tl.maximum(largest, tl.max(tl.reshape(bits, (BLOCK // ROW, ROW)), 1))
            for line in tl.static_range(LINES):
                counted = counted + _take(
                    values, inside, counts, fences, lines, task * LINES + line, BLOCK, ROW
                )
        counts = counted
    _give(counts, slots, slot, len(tasks) * LINES)
    tl.store(most + slot + tl.program_id(0), tl.max(largest))


@triton.jit(do_not_specialize=["first", "last", "count", "slot"])
def walk_scores(
    base, tasks, masks, factors, first, last, count, slot, fences, lines, slots, table, most,
    LINES: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Take the scores of all tasks; each program says which one is each task's largest.

    By its :func:`_pattern`, that is.
    """
    counts = _all(0, len(tasks) * LINES * 2, BLOCK // ROW)
    peaks = _all(-_MAGNITUDE, len(tasks), BLOCK // ROW)
    for block in range(first + tl.program_id(0), last, tl.num_programs(0)):
        start = block * tl.full((), BLOCK, tl.int64)
        inside = _inside(start, count, WHOLE, BLOCK)
        _, taus = _task_vectors(base, tasks, masks, factors, start, count, inside, BLOCK)
        total, far = _sum(taus)
        counted, found = (), ()
        for task in tl.static_range(len(tasks)):
            scores = _score(taus[task], total, far, table, task)
            pattern = _pattern(scores)
            if not WHOLE:
                pattern = tl.where(inside, pattern, -_MAGNITUDE)
            peak = tl.max(tl.reshape(pattern, (BLOCK // ROW, ROW)), 1)
            found = found + (tl.maximum(peaks[task], peak),)
            for line in tl.static_range(LINES):
                counted = counted + _take(
                    scores, inside, counts, fences, lines, task * LINES + line, BLOCK, ROW
                )
        counts, peaks = counted, found
    _give(counts, slots, slot, len(tasks) * LINES)
    for task in tl.static_range(len(tasks)):
        place = most + (slot + tl.program_id(0)) * len(tasks) + task
        tl.store(place, tl.max(peaks[task]))


@triton.jit(do_not_specialize=["first", "last", "count", "slot"])
def walk_merge(
    base, tasks, masks, factors, first, last, count, slot, table, out, most,
    NEAR: tl.constexpr, FROM_BASE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """Write the base less the merged task vector, or, without ``FROM_BASE``, the latter alone.

    Each program says the bits of the largest magnitude that it wrote. ``NEAR`` says that no
    quotient, divisor or remainder of a weight underflows.
    """
    largest = tl.zeros((BLOCK // ROW,), tl.int32)
    for block in range(first + tl.program_id(0), last, tl.num_programs(0)):
        start = block * tl.full((), BLOCK, tl.int64)
        inside = _inside(start, count, WHOLE, BLOCK)
        own, taus = _task_vectors(base, tasks, masks, factors, start, count, inside, BLOCK)
        total, far = _sum(taus)
        numerator = tl.zeros((BLOCK,), tl.float32)
        divisor = tl.zeros((BLOCK,), tl.float32)
        for task in tl.static_range(len(tasks)):
            if _number(table, task * _COLUMNS + 8) != 0:  # it competes
                tau, threshold = taus[task], _number(table, task * _COLUMNS + 4)
                above = tl.maximum(_score(tau, total, far, table, task), threshold) - threshold
                share = _quotient(above, table, task, NEAR)
                divisor += share
                weight = _number(table, task * _COLUMNS + 7)
                signed = tl.where(tau > 0, weight, tl.where(tau < 0, -weight, 0.0))
                numerator += share * _clamped(tau, table, task) * signed
        values = tl.div_rn(numerator, tl.maximum(divisor, _SMALLEST_DIVISOR))
        if FROM_BASE:
            values = own - values
            bits = values.to(tl.int32, bitcast=True) & _MAGNITUDE
            if not WHOLE:
                bits = tl.where(inside, bits, 0)
            largest = tl.maximum(largest, tl.max(tl.reshape(bits, (BLOCK // ROW, ROW)), 1))
        place = out + start + tl.arange(0, BLOCK)
        tl.store(place, values.to(out.dtype.element_ty), mask=inside)
    tl.store(most + slot + tl.program_id(0), tl.max(largest))


@triton.jit
def _number(numbers, place: tl.constexpr):
    """One of an argument's numbers; Triton's interpreter takes some for float64."""
    return tl.full((), numbers[place], tl.float32)


@triton.jit
def _all(value: tl.constexpr, NUMBER: tl.constexpr, ROWS: tl.constexpr):
    """So many counts, or largest values, of each row of a block."""
    counts = ()
    for _ in tl.static_range(NUMBER):
        counts = counts + (tl.full((ROWS,), value, tl.int32),)
    return counts


@triton.jit
def _give(counts, slots, slot, LINES: tl.constexpr):
    """What a program has counted, to its own slot."""
    for count in tl.static_range(LINES * 2):
        place = slots + (slot + tl.program_id(0)) * (LINES * 2) + count
        tl.store(place, tl.sum(counts[count].to(tl.int64)))


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
def _task_vectors(base, tasks, masks, factors, start, count, inside, BLOCK: tl.constexpr):
    """A block of the base and of all task vectors, thinned; 0 where no elements are."""
    own = _wide(base, start, inside, BLOCK)
    taus = ()
    for task in tl.static_range(len(tasks)):
        tau = _wide(tasks[task], start, inside, BLOCK) - own
        if masks[task] is not None:
            octets = tl.arange(0, BLOCK // 8)
            there = octets * 8 < count - start
            packed = tl.load(masks[task] + start // 8 + octets, mask=there, other=0)
            bits = (packed.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
            kept = tl.reshape(bits, (BLOCK,)).to(tl.float32)
            tau = tau * _number(factors, task) * kept + 0.0
        taus = taus + (tau,)
    return own, taus


@triton.jit
def _sum(taus):
    """The sum of all task vectors, in the order of the configuration.

    And the bits of the largest product of one and the sum, of a block; it decides about work alone.
    """
    total = taus[0]
    size = tl.abs(taus[0])
    for task in tl.static_range(1, len(taus)):
        total += taus[task]
        size = tl.maximum(size, tl.abs(taus[task]))
    far = (size * tl.abs(total)).to(tl.int32, bitcast=True)
    return total, tl.max(far)


@triton.jit
def _clamped(tau, table, task: tl.constexpr):
    low, high = _number(table, task * _COLUMNS), _number(table, task * _COLUMNS + 1)
    return tl.minimum(tl.maximum(tl.abs(tau), low), high)


@triton.jit
def _score(tau, total, far, table, task: tl.constexpr):
    """``table`` begins with low, high, √(n log₂ e) / (high − low) and n log₂ e."""
    low, own_factor = _number(table, task * _COLUMNS), _number(table, task * _COLUMNS + 2)
    x = (_clamped(tau, table, task) - low) * own_factor
    z = tau * total
    return _power_of_two(x * x - _number(table, task * _COLUMNS + 3)) * _tanh(z, far)


@triton.jit
def _quotient(above, table, task: tl.constexpr, NEAR: tl.constexpr):
    """By peak less threshold, to the last bit; the table has one over it, rounded.

    Where nothing underflows, one step makes the product faithful and a second one right (Markstein,
    "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
    """
    width, inverse = _number(table, task * _COLUMNS + 5), _number(table, task * _COLUMNS + 6)
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
def _take(
    values, inside, counts, fences, lines, line: tl.constexpr, BLOCK: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """Count values below fences; keep those between them, or count these in cells.

    ``fences`` are low, high and whether ties count. A line of ``lines`` is the first and the last
    pattern between them; shift of cells and their address, or 0; address of what is kept, of how
    many each part has, and the room of a part. Returns how many values are at most and how many
    below the lower fence.
    """
    low, high = _number(fences, line * 3), _number(fences, line * 3 + 1)
    at_most, below = counts[line * 2], counts[line * 2 + 1]
    above = inside & (values > low)
    beside = (inside & (above == 0)).to(tl.int32)
    at_most += tl.sum(tl.reshape(beside, (BLOCK // ROW, ROW)), 1)
    if _number(fences, line * 3 + 2) != 0:  # ties count
        under = (inside & (values < low)).to(tl.int32)
        below += tl.sum(tl.reshape(under, (BLOCK // ROW, ROW)), 1)
    if tl.max((above & (values < high)).to(tl.int32)) > 0:
        row = lines + line * _LINE
        first, pattern = tl.load(row).to(tl.int32), _pattern(values)
        # Said by patterns, for what is used on both sides of a branch goes through memory.
        within = inside & (pattern >= first) & (pattern <= tl.load(row + 1).to(tl.int32))
        shift, cells = tl.load(row + 2).to(tl.int32), tl.load(row + 3)
        ones = tl.full((BLOCK,), 1, tl.int64)
        if cells != 0:
            cell = (pattern >> shift) - (first >> shift)
            places = cells.to(tl.pointer_type(tl.int64)) + cell
            tl.atomic_add(places, ones, mask=within, sem="relaxed")
        else:
            # A column of a matrix would always be in one part, if its programs came in turn.
            own, room = tl.program_id(0), tl.load(row + 6)
            part = (own ^ (own >> 5) ^ (own >> 10)) % _PARTS
            fill = tl.load(row + 5).to(tl.pointer_type(tl.int64)) + part
            seen = tl.load(fill + tl.zeros((BLOCK // ROW,), tl.int32), volatile=True)
            if tl.max(seen.to(tl.int32)) < room:  # other programs go on counting meanwhile
                each = fill + tl.zeros((BLOCK,), tl.int32)
                place = tl.atomic_add(each, ones, mask=within, sem="relaxed")
                kept = tl.load(row + 4).to(tl.pointer_type(tl.int32)) + part * room
                tl.store(kept + place, pattern, mask=within & (place < room))
            else:  # more than has room: they will be counted
                tl.atomic_max(fill, room + 1, sem="relaxed")
    return at_most, below
