"""Measured statistics and coefficients to merged values, chunk by chunk.

The result is linear in the coefficients; what each of them multiplies is a *contribution*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mergekit_pcb.core import fused
from mergekit_pcb.core.formulas import (
    SMALLEST_DIVISOR,
    magnitude,
    rescale_,
    score,
    signed_,
)
from mergekit_pcb.core.measure import OutOfRangeError, Statistics
from mergekit_pcb.core.vectors import Aligned, Chunk, Scratch, chunk_elements


def merge(
    aligned: Aligned, statistics: Statistics, weights: Sequence[float], scale: float
) -> torch.Tensor:
    """``b + scale · Σ_i weight_i w_i τ̂_i / max(Σ_i w_i, 1e-12)`` as a new flat tensor.

    The result is linear in ``weights`` (they do not enter the divisor) and has the base's
    dtype; elements no task weighs keep the base's bits. Raises
    :class:`~mergekit_pcb.core.measure.OutOfRangeError` where that dtype cannot hold the result.
    """
    if not _competing(statistics) or scale == 0 or not len(aligned):
        return aligned.base.clone()
    signed_weights = [-scale * weight for weight in weights]
    if max(map(abs, signed_weights)) > torch.finfo(statistics.dtype).max:
        raise OutOfRangeError(aligned.name)
    merged = torch.empty_like(aligned.base)
    thinned = aligned.under(statistics.dare)
    if (compiled := fused.of(thinned, statistics.dtype)) is not None:
        if not compiled.merge(statistics.balances, statistics.tasks, signed_weights, merged):
            raise OutOfRangeError(aligned.name)
        return merged
    overflow = torch.zeros((), dtype=torch.bool, device=merged.device)
    parts = torch.split(merged, chunk_elements(merged.device))
    chunks = thinned.chunks(Scratch.of_thread(statistics.dtype))
    for part, chunk in zip(parts, chunks, strict=True):
        # Subtracted with opposite sign: b − 0.0 is b to the bit, −0.0 + 0.0 would be 0.0.
        opposite = delta(chunk, statistics, signed_weights)
        values = torch.sub(chunk.base, opposite, out=opposite)
        part.copy_(values)
        overflow |= beyond(values, merged.dtype)
    if overflow:
        raise OutOfRangeError(aligned.name)
    return merged


def beyond(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Whether any value is more than ``dtype`` can hold, as one flag on the values' device."""
    # NaN fails the comparison too.
    return ~(torch.stack(torch.aminmax(values)).abs() <= torch.finfo(dtype).max).all()


def contributions(aligned: Aligned, statistics: Statistics) -> tuple[torch.Tensor, ...]:
    """``w_i τ̂_i / max(Σ_j w_j, 1e-12)`` of every task: what its ``weight`` multiplies.

    New flat tensors in the precision of ``statistics``. With :func:`merge`'s arguments, the merged
    tensor is ``b + scale · Σ_i weight_i · contribution_i``.
    """
    shape = len(aligned.tasks), len(aligned)
    parts = torch.empty(shape, dtype=statistics.dtype, device=aligned.base.device)
    for chunk in aligned.under(statistics.dare).chunks(Scratch.of_thread(statistics.dtype)):
        parts_of(chunk, statistics, out=parts[:, chunk.start : chunk.start + len(chunk.base)])
    return tuple(parts)


def parts_of(chunk: Chunk, statistics: Statistics, *, out: torch.Tensor) -> torch.Tensor:
    """The :func:`contributions` to a chunk, a row per task."""
    out.zero_()
    divisor = chunk.scratch("divisor", chunk.base).zero_()
    for task, share, clamped in _shares(chunk, _competing(statistics), statistics):
        divisor.add_(share)
        torch.mul(share, clamped, out=out[task])
    return out.div_(divisor.clamp_(min=SMALLEST_DIVISOR))


def delta(chunk: Chunk, statistics: Statistics, weights: Sequence[float]) -> torch.Tensor:
    """``Σ_i weight_i w_i τ̂_i / max(Σ_i w_i, 1e-12)`` of a chunk, never −0.0; borrowed."""
    competing, numerator = _competing(statistics), chunk.scratch("numerator", chunk.base)
    compiled = fused.of(chunk.aligned, statistics.dtype)
    if compiled is not None and competing and chunk.start % 8 == 0:
        own = statistics.balances, statistics.tasks, weights
        compiled.delta(*own, chunk.start, numerator)
        return numerator
    numerator.zero_()
    divisor = chunk.scratch("divisor", chunk.base).zero_()
    for task, share, clamped in _shares(chunk, competing, statistics):
        divisor.add_(share)
        numerator.add_(share.mul_(clamped).mul_(weights[task]))
    return numerator.div_(divisor.clamp_(min=SMALLEST_DIVISOR))


def _competing(statistics: Statistics) -> list[int]:
    return [task for task, balance in enumerate(statistics.balances) if not balance.silent]


def _shares(
    chunk: Chunk, competing: Sequence[int], statistics: Statistics
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each task with its weights ``w`` and clamped task vector ``τ̂`` in a chunk, to be used up."""
    if not competing:
        return
    total, buffer = chunk.total(), chunk.scratch
    for task in competing:
        tau, balance = chunk.task_vector(task), statistics.balances[task]
        clamped = magnitude(tau, balance, out=buffer("clamped", tau))
        scores, scratch = buffer("score", tau), buffer.passing(tau)
        score(tau, clamped, total, balance, statistics.tasks, out=scores, scratch=scratch)
        yield task, rescale_(scores, balance), signed_(clamped, tau, scratch=scratch[0])
