"""What compiled code has to get right on a few numbers before a merge relies on it.

It is measured against torch's operations on the same device, bit by bit, on every way through it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from mergekit_pcb.core.vectors import STRIP, Aligned, Scratch, working_dtype

# Ordinary ones, and, in parts of the smallest normal number, such that what is divided is not one.
_WEIGHTS, _TINY_WEIGHTS = (-1.0, 0.5), (-(2.0**-7), 2.0**-8)
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
    chunks = aligned.chunks(Scratch(working_dtype(kind)))
    parts = [[chunk.task_vector(task).clone() for task in range(2)] for chunk in chunks]
    taus = [torch.cat(own) for own in zip(*parts, strict=True)]
    sizes, intervals = [tau.abs() for tau in taus], [Balance(0.0, 1.0)] * 2
    scores = _scores(taus, intervals)
    most, peaks = float(torch.stack(sizes).max()), [float(own.max()) for own in scores]

    def magnitudes(waiting: list[OrderStatistic]) -> bool:
        return bool(walked.magnitudes({0: waiting}) == most)

    def all_scores(waiting: list[OrderStatistic]) -> bool:
        return bool(walked.scores({0: waiting}, intervals) == peaks)

    # As many at a time as merges look for.
    right = _ranks_are_right(magnitudes, sizes[0], 2) and _ranks_are_right(all_scores, scores[0], 1)
    smallest = torch.finfo(scores[0].dtype).tiny
    tiny = tuple(smallest * weight for weight in _TINY_WEIGHTS)
    for threshold, weights in itertools.product(_THRESHOLDS, (_WEIGHTS, tiny)):
        both = [replace(own, threshold=threshold, peak=1.0) for own in intervals]
        opposite = _opposite(taus, both, weights)
        merged, found = torch.empty_like(base), torch.empty_like(opposite)
        right &= walked.merge(both, 2, weights, merged)
        walked.delta(both, 2, weights, 0, found)
        right &= torch.equal(found, opposite)
        right &= torch.equal(merged, (base.to(opposite.dtype) - opposite).to(kind))
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


def _scores(taus: list[torch.Tensor], balances: list[Balance]) -> list[torch.Tensor]:
    """By torch's operations."""
    total, found = taus[0] + taus[1], []
    for tau, balance in zip(taus, balances, strict=True):
        first, second, third = tau.new_empty((3, len(tau)))
        clamped = magnitude(tau, balance, out=first)
        found.append(score(tau, clamped, total, balance, 2, out=first, scratch=(second, third)))
    return found


def _opposite(
    taus: list[torch.Tensor], balances: list[Balance], weights: tuple[float, ...]
) -> torch.Tensor:
    """The weighted merge of the task vectors, by torch's operations."""
    numerator, divisor = torch.zeros_like(taus[0]), torch.zeros_like(taus[0])
    given = zip(taus, _scores(taus, balances), balances, weights, strict=True)
    for tau, scores, balance, weight in given:
        clamped, scratch = tau.new_empty((2, len(tau)))
        share = rescale_(scores, balance)
        divisor += share
        signed = signed_(magnitude(tau, balance, out=clamped), tau, scratch=scratch)
        numerator += share.mul_(signed).mul_(weight)
    return numerator.div_(divisor.clamp_(min=SMALLEST_DIVISOR))


def looks(compiled: Any, precision: Any) -> None:
    """Try what looks between fences, as ``ranks.between`` does, in a precision of numpy."""
    values = numpy.linspace(0, 1, 3 * STRIP + 1, dtype=precision)
    given = values, float(values[9]), float(values[-9])
    if not _alike(*(module.between(*given, tied=True) for module in (compiled, ranks))):
        raise RuntimeError("compiled code counts wrong")


def masks(compiled: Any) -> None:
    """Try what draws masks, as ``dare.against`` does."""
    asked = 1 << 100, (1 << 64) - 20, 8 * STRIP, 1 << 15  # the counter's upper half is reached
    if not _alike(*(module.against(*asked) for module in (compiled, dare))):
        raise RuntimeError("compiled code draws wrong masks")


def _alike(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return all(numpy.array_equal(*both) for both in zip(ours, theirs, strict=True))
