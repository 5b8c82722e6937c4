"""What compiled code has to get right on a few numbers before a merge relies on it.

It is measured against torch's operations on the same device, bit by bit, on every way through it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch

from mergekit_pcb.core import dare, ranks
from mergekit_pcb.core.formulas import (
    SMALLEST_DIVISOR,
    Balance,
    magnitude,
    rescale_,
    score,
    signed_,
)
from mergekit_pcb.core.ranks import OrderStatistic
from mergekit_pcb.core.vectors import STRIP, Aligned, Scratch

# Ordinary ones, and such that what is divided is subnormal.
_WEIGHTS = (-1.0, 0.5), (-1e-40, 5e-41)
# Quotients of scores that may underflow, and others.
_THRESHOLDS = 0.0, 2.0**-10
# Walks in which a rank of a few numbers is found.
_MOST_WALKS = 8


def walks(walk: Callable[[Aligned], Any], device: str, kind: torch.dtype) -> None:
    """Try what walks over tensors of a dtype on a device, as ``fused.Fused`` does.

    Raises ``RuntimeError`` where it is wrong, and whatever the code itself raises.
    """
    base = torch.linspace(-1, 1, 4 * STRIP + 1, dtype=torch.float32).to(device, kind)
    mask = dare.Mask(dare.Dare(0.3, 0, 0), "", len(base))
    aligned = Aligned("", base, (base * 1.5, base * 0.75), masks=(mask, None))
    walked = walk(aligned)
    chunks = aligned.chunks(Scratch(torch.float32))
    parts = [[chunk.task_vector(task).clone() for task in range(2)] for chunk in chunks]
    taus = [torch.cat(own) for own in zip(*parts, strict=True)]
    sizes, (low, high) = [tau.abs() for tau in taus], (0.0, 1.0)
    scores, _ = _expected(taus, [Balance(low, high, 0.0, 1.0)] * 2, _WEIGHTS[0])
    most, peaks = float(torch.stack(sizes).max()), [float(own.max()) for own in scores]

    def magnitudes(waiting: list[OrderStatistic]) -> bool:
        return bool(walked.magnitudes({0: waiting}) == most)

    def all_scores(waiting: list[OrderStatistic]) -> bool:
        return bool(walked.scores({0: waiting}, [Balance(low, high)] * 2) == peaks)

    # As many at a time as merges look for.
    right = _ranks_are_right(magnitudes, sizes[0], 2) and _ranks_are_right(all_scores, scores[0], 1)
    for threshold, weights in itertools.product(_THRESHOLDS, _WEIGHTS):
        both = [Balance(low, high, threshold, 1.0)] * 2
        _, opposite = _expected(taus, both, weights)
        merged, found = torch.empty_like(base), torch.empty_like(opposite)
        right &= walked.merge(both, 2, weights, merged)
        walked.delta(both, 2, weights, 0, found)
        right &= torch.equal(found, opposite)
        right &= torch.equal(merged, (base.float() - opposite).to(kind))
    if not right:
        raise RuntimeError("compiled code gives wrong numbers")


def _ranks_are_right(
    shown: Callable[[list[OrderStatistic]], bool], values: torch.Tensor, together: int
) -> bool:
    """Whether ranks are found, also where values are kept, are too many to be, or equal a fence.

    ``shown`` shows the values to statistics, so many together, and says whether what else it finds
    is right.
    """
    ordered, count = values.sort().values, len(values)
    asked = [
        OrderStatistic(3 * count // 4, count),
        OrderStatistic(count - 3, count, -8.0, 8.0, expected=count),
        OrderStatistic(count // 4, count, 0.0, 8.0, tied=True),
        OrderStatistic(count // 2, count, -8.0, 8.0, expected=1),
    ]
    for first in range(0, len(asked), together):
        waiting = asked[first : first + together]
        for _ in range(_MOST_WALKS):  # counts in cells need a second look
            if waiting and not shown(waiting):
                return False
            found = ranks.settle(waiting)
            for statistic, value in zip(waiting, found, strict=True):
                if value is not None and value != float(ordered[statistic.rank]):
                    return False
            waiting = [own for own, value in zip(waiting, found, strict=True) if value is None]
        if waiting:
            return False
    return True


def _expected(
    taus: list[torch.Tensor], balances: list[Balance], weights: tuple[float, float]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The scores, and the weighted merge of the task vectors, by torch's operations."""
    total = taus[0] + taus[1]
    numerator, divisor, all_scores = torch.zeros_like(total), torch.zeros_like(total), []
    for tau, balance, weight in zip(taus, balances, weights, strict=True):
        first, second, third = tau.new_empty((3, len(tau)))
        clamped = magnitude(tau, balance, out=torch.empty_like(tau))
        scores = score(tau, clamped, total, balance, 2, out=first, scratch=(second, third))
        all_scores.append(scores.clone())
        share = rescale_(scores, balance)
        divisor += share
        numerator += share.mul_(signed_(clamped, tau, scratch=second)).mul_(weight)
    return all_scores, numerator.div_(divisor.clamp_(min=SMALLEST_DIVISOR))


def looks(compiled: Any) -> None:
    """Try what looks between fences, as ``ranks.between`` does."""
    values = numpy.linspace(0, 1, 3 * STRIP + 1, dtype="f4")
    given = values, float(values[9]), float(values[-9])
    if not _alike(*(module.between(*given, tied=True) for module in (compiled, ranks))):
        raise RuntimeError("compiled code counts wrong")


def masks(compiled: Any) -> None:
    """Try what draws masks, as ``dare.against`` does."""
    asked = 1 << 100, 3, 4 * STRIP, 1 << 15
    if not _alike(*(module.against(*asked) for module in (compiled, dare))):
        raise RuntimeError("compiled code draws wrong masks")


def _alike(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return all(numpy.array_equal(*both) for both in zip(ours, theirs, strict=True))
