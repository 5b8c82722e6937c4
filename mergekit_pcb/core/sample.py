"""A few elements of a scope, to guess where its order statistics lie.

They decide about work, never about an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import torch

from mergekit_pcb.core import ranks
from mergekit_pcb.core.ranks import at_ranks, neighbour, places
from mergekit_pcb.core.vectors import Aligned

# Elements of each task in the sample that guesses where thresholds lie: a share of the two-thirds
# power of all, which balances looking at a sample against keeping what its guess leaves open (one
# or two in a hundred of a large tensor), up to 4 MiB a task.
SAMPLE_SHARE = 0.35
LARGEST_SAMPLE = 1 << 20
# Up to so many elements a processor is quicker to keep all values than to guess.
FEW_ELEMENTS = 1 << 15


class Guess(TypedDict, total=False):
    """Where an order statistic may lie, as :class:`OrderStatistic` takes it."""

    low: float
    high: float
    tied: bool


class Sample:
    """Evenly spaced task vector elements of a scope, to guess order statistics from."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self._count, self._dtype = count, dtype
        # Odd, so that it does not fall in step with the rows of a matrix.
        size = min(max(1, round(SAMPLE_SHARE * count ** (2 / 3))), LARGEST_SAMPLE)
        self._step = (count // size) | 1
        self._passed = 0
        self._parts: list[list[torch.Tensor]] = []

    def take(self, aligned: Aligned) -> None:
        """Take what is due of a tensor's elements, unless all of the scope have passed."""
        on_host = aligned.base.device.type == ranks.HOST
        few = FEW_ELEMENTS if on_host else ranks.POOL_ELEMENTS  # of those, a device keeps all
        if self._count <= few or self._passed >= self._count:
            return
        start = -self._passed % self._step
        base = aligned.base[start :: self._step].to(self._dtype)
        taken = [task[start :: self._step].to(self._dtype) - base for task in aligned.tasks]
        for tau, mask in zip(taken, aligned.masks, strict=True):
            if mask is not None and len(tau):
                # The first bits instead of their own: drawing those would be drawing all.
                mask.apply_first_(tau, torch.empty_like(tau))
        self._parts.append(taken)
        self._passed += len(aligned)

    def task_vectors(self) -> list[torch.Tensor]:
        """Those of all tasks, as far as they were taken."""
        return [torch.cat(parts) for parts in zip(*self._parts, strict=True)]

    def guess(self, values: torch.Tensor | None, ranks: Sequence[int]) -> list[Guess]:
        """For every rank, values strictly between which its own should lie, unless it is tied.

        ``values`` are those of the sample.
        """
        if values is None or not len(values):
            return [{} for _ in ranks]
        size = values.numel()
        found = [places(rank, self._count, size) for rank in ranks]
        ends = [(max(first, 0), last, first >= 0) for first, last in found]
        wanted = sorted({place for *both, _ in ends for place in both if place < size})
        at = dict(zip(wanted, at_ranks(values, wanted), strict=True))
        guesses: list[Guess] = []
        for first, last, bounded in ends:
            guess, low = Guess(), at[first]
            # Zeros: DARE's, of tensors that training left alone, of steps that were rounded off.
            # Below one at the end of the sample there may be more, but nothing below 0.
            if (bounded or low == 0) and 2 * int((values == low).sum()) > last - first:
                guess["tied"], guess["low"] = True, low
            elif bounded:  # a step outwards, because a few elements may share the value of a fence
                guess["low"] = neighbour(low, -math.inf, values.dtype)
            if last < size:
                guess["high"] = neighbour(at[last], math.inf, values.dtype)
            guesses.append(guess)
        return guesses
