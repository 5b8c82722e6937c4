"""Walks over a piece of a tensor, compiled, block by block.

What they make of a block stays in a core's cache. Nothing is compiled before it is called.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call, no-untyped-def, call-arg"
# mypy: disable-error-code="attr-defined, unreachable, unused-ignore"

from __future__ import annotations

from typing import Any

import numpy

from mergekit_pcb.core.intrinsics import kept_on_disk, loop
from mergekit_pcb.core.kernels import (
    add,
    combine,
    magnitudes,
    peaks,
    scores,
    store,
    take,
    task_vectors,
)


@kept_on_disk
def walk_magnitudes(
    base: Any, addresses: Any, masks: Any, factors: Any, first: int, start: int, end: int,
    tau: Any, values: Any, bits: Any, extremes: Any, extreme_bits: Any, rows: Any, fences: Any,
    tied: Any, counts: Any, pools: Any, fills: Any,
) -> tuple[int, Any]:  # fmt: skip
    """Take the magnitudes of elements; returns where it ended, and the bits of the largest.

    It ends before ``end`` where ``pools`` may not hold what another block brings. ``masks`` begin
    at element ``first``.
    """
    largest = numpy.int32(0)
    while start < end:
        count = min(values.shape[1], end - start)
        task_vectors(base, addresses, masks, factors, first, start, tau, count)
        largest = max(largest, magnitudes(tau, values, bits, extreme_bits, count))
        take(values, extremes, True, rows, fences, tied, counts, pools, fills, count)
        start += count
        if _full(pools, fills, values.shape[1]):
            break
    return start, largest


@kept_on_disk
def walk_scores(
    base: Any, addresses: Any, masks: Any, factors: Any, first: int, start: int, end: int,
    tau: Any, total: Any, table: Any, values: Any, bits: Any, products: Any,
    product_bits: Any, extremes: Any, most: Any, rows: Any, fences: Any, tied: Any, counts: Any,
    pools: Any, fills: Any,
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
        take(values, extremes, False, rows, fences, tied, counts, pools, fills, count)
        start += count
        if _full(pools, fills, values.shape[1]):
            break
    return start


@kept_on_disk
def walk_merge(
    base: Any, addresses: Any, masks: Any, factors: Any, first: int, start: int, end: int,
    tau: Any, total: Any, table: Any, values: Any, products: Any, product_bits: Any,
    weights: Any, smallest: Any, merged: Any, merged_bits: Any, out: Any,
) -> Any:  # fmt: skip
    """Merge elements into ``out``, a whole tensor; returns the bits of the largest magnitude.

    What ``out`` cannot hold becomes anything.
    """
    most = numpy.int32(0)
    while start < end:
        count = min(values.shape[1], end - start)
        task_vectors(base, addresses, masks, factors, first, start, tau, count)
        add(tau, total, count)
        scores(tau, total, table, values, products, product_bits, count)
        found = combine(
            base, start, tau, values, weights, smallest, merged, total, merged_bits, count
        )
        most = max(most, found)
        store(merged, merged_bits, out[start : start + count], count)
        start += count
    return most


@loop
def _full(pools: Any, fills: Any, size: int) -> bool:
    full = False
    for k in range(len(fills)):
        full |= fills[k] + size > pools.shape[1]
    return full
