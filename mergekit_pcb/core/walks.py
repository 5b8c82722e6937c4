"""Walks over a piece of a tensor, compiled, block by block.

What they make of a block stays in a core's cache. Nothing is compiled before it is called.
"""

from __future__ import annotations

from typing import Any

import numpy

from mergekit_pcb.core import ranks
from mergekit_pcb.core.intrinsics import kept_on_disk, loop
from mergekit_pcb.core.kernels import (
    add,
    combine,
    look_at_strip,
    magnitudes,
    peaks,
    scores,
    store,
    subtract,
    take,
    task_vectors,
)
from mergekit_pcb.core.vectors import AT_ONCE, STRIP


@kept_on_disk
def walk_magnitudes(
    base: Any, addresses: Any, masks: Any, factors: Any, first: int, start: int, end: int,
    tau: Any, values: Any, bits: Any, rows: Any, fences: Any, tied: Any, counts: Any, pools: Any,
    fills: Any,
) -> tuple[int, Any]:  # fmt: skip
    """Take the magnitudes of elements; returns where it ended, and the bits of the largest.

    It ends before ``end`` where ``pools`` may not hold what another block brings. ``masks`` begin
    at element ``first``.
    """
    largest = bits.dtype.type(0)
    while start < end:
        count = min(values.shape[1], end - start)
        task_vectors(base, addresses, masks, factors, first, start, tau, count)
        largest = max(largest, magnitudes(tau, values, bits, count))
        take(values, rows, fences, tied, counts, pools, fills, count)
        start += count
        if _full(pools, fills, values.shape[1]):
            break
    return start, largest


@kept_on_disk
def walk_scores(
    base: Any, addresses: Any, masks: Any, factors: Any, first: int, start: int, end: int,
    tau: Any, total: Any, table: Any, values: Any, bits: Any, products: Any,
    product_bits: Any, most: Any, rows: Any, fences: Any, tied: Any, counts: Any, pools: Any,
    fills: Any,
) -> int:  # fmt: skip
    """Take the scores of elements; returns where it ended, as :func:`walk_magnitudes` does.

    ``most`` is raised to the largest score of each task.
    """
    while start < end:
        count = min(values.shape[1], end - start)
        task_vectors(base, addresses, masks, factors, first, start, tau, count)
        add(tau, total, count)
        scores(tau, total, table, values, products, product_bits, count)
        peaks(values, bits, most, count)
        take(values, rows, fences, tied, counts, pools, fills, count)
        start += count
        if _full(pools, fills, values.shape[1]):
            break
    return start


@kept_on_disk
def walk_merge(
    base: Any, addresses: Any, masks: Any, factors: Any, first: int, start: int, end: int,
    tau: Any, total: Any, table: Any, values: Any, products: Any, product_bits: Any,
    smallest: Any, merged: Any, merged_bits: Any, out: Any,
) -> Any:  # fmt: skip
    """Merge elements into ``out``, a whole tensor; returns the bits of the largest magnitude.

    What ``out`` cannot hold becomes anything.
    """
    most = merged_bits.dtype.type(0)
    while start < end:
        count = min(values.shape[1], end - start)
        task_vectors(base, addresses, masks, factors, first, start, tau, count)
        add(tau, total, count)
        scores(tau, total, table, values, products, product_bits, count)
        combine(tau, values, table, smallest, merged, total, count)
        most = max(most, subtract(base, start, merged, merged_bits, count))
        store(merged, merged_bits, out[start : start + count], count)
        start += count
    return most


@kept_on_disk
def walk_delta(
    base: Any, addresses: Any, masks: Any, factors: Any, first: int, start: int, end: int,
    tau: Any, total: Any, table: Any, values: Any, products: Any, product_bits: Any,
    smallest: Any, begin: int, out: Any,
) -> None:  # fmt: skip
    """The merged task vector of elements, to ``out``, which begins at element ``begin``."""
    while start < end:
        count = min(values.shape[1], end - start)
        task_vectors(base, addresses, masks, factors, first, start, tau, count)
        add(tau, total, count)
        scores(tau, total, table, values, products, product_bits, count)
        combine(tau, values, table, smallest, out[start - begin :], total, count)
        start += count


@kept_on_disk
def _between(values: Any, low: Any, high: Any, counts_ties: bool, kept: Any) -> Any:
    at_most = less = fill = numpy.int64(0)
    last, rest = numpy.zeros(STRIP, values.dtype), len(values) % STRIP
    last[:rest] = values[len(values) - rest :]
    for start in range(0, len(values), STRIP):
        length = min(STRIP, len(values) - start)
        part, place = (values, start) if length == STRIP else (last, 0)
        given = place, length, low, high, counts_ties
        most, under, fill = look_at_strip(part, *given, kept, fill)
        at_most += most
        less += under
    return at_most, less, fill


def between(
    values: Any, low: float | None, high: float | None, *, tied: bool
) -> tuple[int, int, Any]:
    """As that of ``ranks.py``, to which it leaves what has one fence or lies apart in memory."""
    if low is None or high is None or not values.flags.c_contiguous:
        return ranks.between(values, low, high, tied=tied)
    kept = numpy.empty(len(values) + AT_ONCE, values.dtype)
    fences = values.dtype.type(low), values.dtype.type(high)
    at_most, less, fill = _between(values, *fences, tied, kept)
    return at_most, less, kept[:fill].copy()


@loop
def _full(pools: Any, fills: Any, size: int) -> bool:
    full = False
    for k in range(len(fills)):
        full |= fills[k] + size + AT_ONCE > pools.shape[1]
    return full
