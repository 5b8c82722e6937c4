"""A few elements of a scope, to guess where its order statistics lie.

They decide about work, never about an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict, TypeVar

import torch

from mergekit_pcb.core import pools, ranks
from mergekit_pcb.core.cells import BITS, KINDS
from mergekit_pcb.core.ranks import at_ranks, neighbour, places
from mergekit_pcb.core.vectors import Aligned

_Result = TypeVar("_Result")
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
    expected: int


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
        due = slice(-self._passed % self._step, None, self._step)

        def take() -> list[torch.Tensor]:
            base = aligned.base[due].to(self._dtype)
            taken = [task[due].to(self._dtype) - base for task in aligned.tasks]
            for tau, mask in zip(taken, aligned.masks, strict=True):
                if mask is not None and len(tau):
                    # The first bits instead of their own: drawing those would be drawing all.
                    mask.apply_first_(tau, torch.empty_like(tau))
            return taken

        self._parts.append(_alone(take, len(aligned) // self._step, aligned.base))
        self._passed += len(aligned)

    def guesses(
        self,
        values_of: Callable[[torch.Tensor], torch.Tensor],
        wanted: Sequence[Sequence[int]],
    ) -> list[list[Guess]]:
        """For every rank wanted of each task, values strictly between which its own should lie.

        ``values_of`` makes values of the sample's task vectors, a row for each task. Without a
        sample nothing is guessed.
        """
        count = sum(len(part[0]) for part in self._parts)
        if not count or not wanted:
            return [[Guess() for _ in own] for own in wanted]

        def look() -> list[list[Guess]]:
            taken = [torch.cat(parts) for parts in zip(*self._parts, strict=True)]
            return self._guessed(values_of(torch.stack(taken)), wanted)

        return _alone(look, count * len(self._parts[0]), self._parts[0][0])

    def _guessed(self, values: torch.Tensor, wanted: Sequence[Sequence[int]]) -> list[list[Guess]]:
        size = values.shape[1]
        found = [[places(rank, self._count, size) for rank in own] for own in wanted]
        look = _looked if values.device.type == ranks.HOST else _looked_there
        ends = [[(max(first, 0), min(last, size - 1)) for first, last in own] for own in found]
        guesses: list[list[Guess]] = []
        for own, seen in zip(found, look(values, ends), strict=True):
            guesses.append([])
            for (first, last), (low, high, below, at_most, upto) in zip(own, seen, strict=True):
                guess, floor = Guess(), 0
                # Zeros: DARE's, of tensors that training left alone, of steps that were rounded
                # off. Below one at the end of the sample there may be more, but nothing below 0.
                if (first >= 0 or low == 0) and 2 * (at_most - below) > last - max(first, 0):
                    guess["tied"], guess["low"], floor = True, low, at_most
                elif first >= 0:  # a step outwards, because a few elements may share its value
                    guess["low"], floor = neighbour(low, -math.inf, values.dtype), below
                if last < size:
                    guess["high"] = neighbour(high, math.inf, values.dtype)
                if upto is not None:
                    inside = (upto if last < size else size) - floor
                    guess["expected"] = math.ceil(inside / size * self._count)
                guesses[-1].append(guess)
        return guesses


def _alone(work: Callable[[], _Result], elements: int, like: torch.Tensor) -> _Result:
    """Leave a processor's other cores alone, which walks are about to use."""
    return pools.alone(work, elements) if like.device.type == ranks.HOST else work()


#: Values at both ends of a guess; how many are below and at most the first, and at most the second.
_Seen = tuple[float, float, int, int, int | None]


def _looked(
    values: torch.Tensor, ends: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[list[_Seen]]:
    """What is seen at pairs of ranks, as far as it is needed there."""
    for own, pairs in zip(values, ends, strict=True):
        wanted = sorted({place for pair in pairs for place in pair})
        at = dict(zip(wanted, at_ranks(own, wanted), strict=True))
        seen: list[_Seen] = []
        for first, last in pairs:
            ties = int(torch.count_nonzero(own == at[first]))
            seen.append((at[first], at[last], 0, ties, None))
        yield seen


def _looked_there(
    values: torch.Tensor, ends: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[list[_Seen]]:
    """The same on an accelerator, which is waited for once."""
    ordered = values.sort(1).values
    at = ordered.gather(1, torch.tensor(ends, device=ordered.device).flatten(1))
    low, high = at[:, ::2].contiguous(), at[:, 1::2].contiguous()
    (bits, _), (real, whole) = BITS[ordered.dtype], KINDS[ordered.dtype]
    numbers = [  # integers, for some accelerators have no float64
        low.view(bits).long(),
        high.view(bits).long(),
        torch.searchsorted(ordered, low),
        torch.searchsorted(ordered, low, right=True),
        torch.searchsorted(ordered, high, right=True),
    ]
    found = torch.stack(numbers, -1).cpu().numpy()
    both = found[..., :2].astype(whole).view(real) + 0.0
    for own, counts in zip(both.tolist(), found[..., 2:].tolist(), strict=True):
        yield [(*pair, *three) for pair, three in zip(own, counts, strict=True)]
