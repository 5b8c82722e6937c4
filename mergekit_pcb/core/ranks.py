"""Exact order statistics of a stream that is never sorted and never held whole.

An :class:`OrderStatistic` watches a stream go by, keeping only the values strictly between
two fences and counting the rest, so its answer depends on the multiset of values alone:
not on how the stream is cut, in which order it comes, or on how good the fences were.
Bad fences cost another pass over the stream, never a wrong answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch

from mergekit_pcb.core.cells import PARTS, Cells, Kept, told_apart

# Values held before the fences are drawn closer; doubled while the rank allows no closer ones.
POOL_ELEMENTS = 1 << 17
# So many times as many between two guesses: nothing closer is proven before nearly all have passed.
MORE_BETWEEN = 8
# Values held at the very most (16 MiB), then counted by bit pattern instead. Up to 2·10^10
# parameters the tails at the default clip fit into half of it, and take no pass of their own.
LARGEST_POOL = 1 << 22
# Values that an accelerator keeps for a statistic at the most, with room for twice as many (4 MiB),
# rather than count them; and how many of those that cells tell apart: more would wait for one
# another longer than they save.
KEPT_THERE = 1 << 19
FEW_THERE = 1 << 16
# Where values are arrays of numpy, whose comparisons, selections and introselect are several times
# faster than torch's on a CPU.
HOST = "cpu"


class OrderStatistic:
    """The value at 0-based ``rank`` in ascending order of ``count`` streamed values.

    ``low`` and ``high`` are a guess strictly between which the answer may lie (``None``: no
    guess; :func:`neighbour` widens one by a step). Call :meth:`push` with every part of the
    stream, then :meth:`settle`; while that returns ``None``, stream the same values again (a
    *pass*). Values must not be NaN. ``tied`` says that many values may equal ``low`` and
    be the answer: one more count then spares the pass that would find out. ``expected`` says how
    many should lie between the fences, if anybody knows.
    """

    def __init__(
        self,
        rank: int,
        count: int,
        low: float | None = None,
        high: float | None = None,
        *,
        tied: bool = False,
        expected: int | None = None,
    ) -> None:
        if not 0 <= rank < count:
            raise ValueError(f"rank {rank} lies outside a stream of {count} values")
        self.rank, self.count = rank, count
        self._open(low, high, tied=tied, expected=expected)

    def _open(
        self,
        low: float | None,
        high: float | None,
        *,
        tied: bool = False,
        expected: int | None = None,
    ) -> None:
        """Make ready for a pass between these fences."""
        self.low, self.high = low, high
        self.tied = tied
        self._below = 0  # values < low, counted if tied
        # Proven fences: the answer is not beyond them.
        self._at_least_low = self._at_most_high = False
        self._seen = 0
        self._at_most = 0  # values <= low
        self._inside = 0  # low < values < high
        self._pool: list[Any] = []
        self._held: list[torch.Tensor] = []  # all values of a short stream on an accelerator
        self._pool_limit = POOL_ELEMENTS * (1 if None in (low, high) else MORE_BETWEEN)
        self._expected = expected
        self._counts: Cells | Kept | None = None

    def push(self, values: torch.Tensor) -> None:
        """Take in the next values of the stream: 1-D, float32 or float64, any device.

        The values are borrowed: what is kept of them is copied. On an accelerator nothing waits
        for them.
        """
        if values.device.type != HOST:
            self._push_there(values)
            return
        stream, fences = values.numpy(), (self.low, self.high)
        self.absorb(len(stream), fences, *look(stream, *fences, tied=self.tied))

    def _push_there(self, values: torch.Tensor) -> None:
        """Keep the values of a short stream; count those of a long one."""
        self._seen += len(values)
        if self.low is None and self.high is None and self.count <= POOL_ELEMENTS:
            self._held.append(values + 0.0)
        else:
            self._dtype = values.dtype
            if self._counts is None:
                self._counts = Cells(self.low, self.high, values.dtype, values.device)
            if isinstance(self._counts, Cells):  # else all have come before, which settle refuses
                self._counts.add_all(values, tied=self.tied)

    def there(self, seen: int, device: torch.device) -> Cells | Kept:
        """Where somebody else counts so many of the stream's values, on an accelerator.

        They are in float32. Those between the fences may be kept where they are all that will come.
        """
        self._seen += seen
        self._dtype = torch.float32
        if self._counts is None:
            own, expected = (self.low, self.high), self._expected
            most = FEW_THERE if told_apart(*own, device) else KEPT_THERE
            if seen == self.count and expected is not None and expected <= most:
                # Twice the room, and some, for parts do not fill alike.
                self._counts = Kept(*own, 2 * expected // PARTS + 64, device)
            else:
                self._counts = Cells(*own, torch.float32, device)
        return self._counts

    def absorb(
        self,
        seen: int,
        fences: tuple[float | None, float | None],
        at_most: int,
        below: int,
        inside: Any,
    ) -> None:
        """Take in what somebody else counted of ``seen`` values, between the fences of then.

        How many were at most and how many below the lower one, and a copy of those strictly
        between, as an array of numpy. Fences only come closer during a pass.
        """
        self._seen += seen
        self._dtype = torch.as_tensor(inside[:0]).dtype
        if fences[0] is not None:
            self._at_most += at_most
            self._below += below
        if self.low != fences[0]:
            above = inside[inside > self.low]
            self._at_most += len(inside) - len(above)
            inside = above
        if self.high != fences[1]:
            inside = inside[inside < self.high]
        self._keep(inside)

    def asked(self) -> torch.Tensor | None:
        """The numbers of a whole pass that :meth:`settle` needs from an accelerator, if any."""
        return None if self._counts is None else self._counts.asked(self.rank - self._at_most)

    def settle(self, numbers: Sequence[int] | None = None) -> float | None:
        """The answer after a whole pass, or ``None`` if it takes another.

        ``numbers`` are what was :meth:`asked`, if that is at hand already.
        """
        if self._seen != self.count:
            raise ValueError(f"a pass brought {self._seen} values where {self.count} were due")
        if self._held:
            return float(torch.cat(self._held).sort().values[self.rank])
        found = None
        if self._counts is not None:
            rank = self.rank - self._at_most
            given = self._counts.asked(rank).tolist() if numbers is None else numbers
            found = self._counts.found(rank, given)
            if found is None:  # all will be counted
                self._open(self.low, self.high, tied=self.tied)
                return None
            self._at_most += found.at_most
            self._below += found.below
            self._inside = found.inside
        rank = self.rank - self._at_most
        if rank < 0 and self.low is not None:
            if self._at_least_low or (self.tied and self.rank >= self._below):
                return self.low
            self._open(None, neighbour(self.low, math.inf, self._dtype))
        elif rank >= self._inside and self.high is not None:
            if self._at_most_high:
                return self.high
            self._open(neighbour(self.high, -math.inf, self._dtype), None)
        elif found is None:
            return _kth(numpy.concatenate(self._pool), rank)
        elif found.exact:
            return found.low
        else:
            self._open(found.low, found.high)
        return None

    def _keep(self, values: Any) -> None:
        self._inside += len(values)
        if isinstance(self._counts, Cells):
            self._counts.add(torch.from_numpy(values))
        elif len(values):
            self._pool.append(values)
            if self._inside > self._pool_limit:
                self._draw_fences()

    def _draw_fences(self) -> None:
        """Draw the fences as close as the values seen so far prove right."""
        pool = numpy.concatenate(self._pool)
        outside = self._at_most
        # At most: what is yet to come can only push the answer down among what was seen.
        at_most = self.rank - outside
        if 0 <= at_most < len(pool):
            self.high, self._at_most_high = _kth(pool, at_most), True
            pool = pool[pool < self.high]
        # At least: even if all of it came below.
        at_least = self.rank - (self.count - self._seen) - outside
        if 0 <= at_least < len(pool):
            self.low, self._at_least_low, self.tied = _kth(pool, at_least), True, False
            above = pool[pool > self.low]
            self._at_most = outside + len(pool) - len(above)
            pool = above
        self._pool, self._inside = [pool], len(pool)
        self._pool_limit = min(max(POOL_ELEMENTS, 2 * self._inside), LARGEST_POOL)
        if 2 * self._inside > LARGEST_POOL:
            held = torch.from_numpy(pool)
            self._counts = Cells(self.low, self.high, held.dtype, held.device)
            self._counts.add(held)
            self._pool = []


def settle(statistics: Sequence[OrderStatistic]) -> list[float | None]:
    """Settle each after a whole pass; waits for an accelerator once."""
    asked = [statistic.asked() for statistic in statistics]
    there = [numbers for numbers in asked if numbers is not None]
    numbers = iter(torch.cat(there).tolist() if there else ())
    return [
        statistic.settle(None if own is None else list(itertools.islice(numbers, len(own))))
        for statistic, own in zip(statistics, asked, strict=True)
    ]


def between(
    values: Any, low: float | None, high: float | None, *, tied: bool
) -> tuple[int, int, Any]:
    """How many values are at most ``low``, and how many below it; those between it and ``high``.

    Strictly between, that is, and copied. ``values`` are an array of numpy; those below are counted
    if ``tied``.
    """
    at_most = below = 0
    inside = None
    if low is not None:
        inside = values > low
        at_most = len(values) - int(numpy.count_nonzero(inside))
        if tied:
            below = int(numpy.count_nonzero(values < low))
    if high is not None:
        under = values < high
        inside = under if inside is None else inside & under
    return at_most, below, values + 0.0 if inside is None else values[inside]


#: What looks between fences; :func:`mergekit_pcb.core.fused.compiled` puts a quicker one here.
look: Callable[..., tuple[int, int, Any]] = between
# A guess misses about once in 16 000 times.
DEVIATIONS = 4.0


def places(rank: int, count: int, size: int) -> tuple[int, int]:
    """Between which ranks of ``size`` sampled values the one at ``rank`` of ``count`` should lie.

    They may lie outside the sample.
    """
    share = rank / count
    margin = DEVIATIONS * math.sqrt(size * share * (1 - share)) + 2
    return math.floor(share * size - margin), math.ceil(share * size + margin)


# numpy's selection takes tens of times as long where the smallest values are equal; up to so many
# it is quick all the same, and from there on counting bits is quicker than the best of it.
FEW = 1 << 11
# Values from which on a sample tells where to look for one.
MANY = 1 << 14
SAMPLED = 1 << 10
# Bits that are told apart at a time.
_BITS_AT_ONCE = 12


def _kth(values: Any, rank: int) -> float:
    """The value at 0-based ``rank`` of an array, by counts of its bits."""
    if len(values) > MANY:
        values, rank = _near(values, rank)
    bits = values.view(f"i{values.itemsize}")
    if len(values) > FEW and bits.min() < 0:  # below 0, where the order of integers is another
        bits = bits ^ ((bits >> (8 * values.itemsize - 1)) & numpy.iinfo(bits.dtype).max)
    while len(values) > FEW:
        least, most = int(bits.min()), int(bits.max())
        if least == most:
            return float(values[0]) + 0.0  # of both zeros, the one
        shift = max(0, (most - least).bit_length() - _BITS_AT_ONCE)
        keys = (bits >> shift) - (least >> shift)
        upto = numpy.bincount(keys).cumsum()
        key = int(numpy.searchsorted(upto, rank, side="right"))
        rank -= int(upto[key - 1]) if key else 0
        kept = keys == key
        values, bits = values[kept], bits[kept]
    return float(numpy.partition(values, rank)[rank]) + 0.0


def _near(values: Any, rank: int) -> tuple[Any, int]:
    """The values near the one at ``rank``, and its rank among them; all if a sample misleads."""
    sample = numpy.sort(values[:: len(values) // SAMPLED])
    first, last = places(rank, len(values), len(sample))
    low = float(sample[first]) if first >= 0 else None
    high = float(sample[last]) if last < len(sample) else None
    at_most, _, kept = look(values, low, high, tied=False)
    return (kept, rank - at_most) if 0 <= rank - at_most < len(kept) else (values, rank)


def neighbour(value: float, towards: float, dtype: torch.dtype) -> float:
    """The next value of ``dtype`` in a direction."""
    kind = numpy.float64 if dtype == torch.float64 else numpy.float32
    with numpy.errstate(all="ignore"):
        return float(numpy.nextafter(kind(value), kind(towards)))


def at_ranks(values: torch.Tensor, ranks: Sequence[int]) -> list[float]:
    """Those at 0-based ranks in ascending order of values that are all at hand."""
    if values.device.type != HOST:
        found: list[float] = (values.sort().values[list(ranks)] + 0.0).tolist()
        return found
    return [_kth(values.numpy(), rank) for rank in ranks]
