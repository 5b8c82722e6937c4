"""Exact order statistics of a stream that is never sorted and never held whole.

An :class:`OrderStatistic` watches a stream go by, keeping only the values strictly between
two fences and counting the rest, so its answer depends on the multiset of values alone:
not on how the stream is cut, in which order it comes, or on how good the fences were.
Bad fences cost another pass over the stream, never a wrong answer.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy
import torch

# Values held before the fences are drawn closer; doubled while the rank allows no closer ones.
POOL_ELEMENTS = 1 << 17
# Values held at the very most (16 MiB), then counted by bit pattern instead. Up to 2·10^10
# parameters the tails at the default clip fit into half of it, and take no pass of their own.
LARGEST_POOL = 1 << 22
# Cells of such a count: 8 MiB, and one cell per float32 pattern between close fences.
CELLS = 1 << 20


class OrderStatistic:
    """The value at 0-based ``rank`` in ascending order of ``count`` streamed values.

    ``low`` and ``high`` are a guess strictly between which the answer may lie (``None``: no
    guess; :func:`neighbour` widens one by a step). Call :meth:`push` with every part of the
    stream, then :meth:`settle`; while that returns ``None``, stream the same values again (a
    *pass*). Values must not be NaN. ``tied`` says that many values may equal ``low`` and
    be the answer: one more count then spares the pass that would find out.
    """

    def __init__(
        self,
        rank: int,
        count: int,
        low: float | None = None,
        high: float | None = None,
        *,
        tied: bool = False,
    ) -> None:
        if not 0 <= rank < count:
            raise ValueError(f"rank {rank} lies outside a stream of {count} values")
        self.rank, self.count = rank, count
        self._open(low, high, tied=tied)

    def _open(self, low: float | None, high: float | None, *, tied: bool = False) -> None:
        """Make ready for a pass between these fences."""
        self.low, self.high = low, high
        self.tied = tied
        self._below: int | torch.Tensor = 0  # values < low, counted if tied
        # Proven fences: the answer is not beyond them.
        self._at_least_low = self._at_most_high = False
        self._seen = 0
        self._at_most: int | torch.Tensor = 0  # values <= low; stays on the device meanwhile
        self._inside = 0  # low < values < high
        self._pool: list[_Array] = []
        self._pool_limit = POOL_ELEMENTS
        self._cells: _Cells | None = None

    def push(self, values: torch.Tensor) -> None:
        """Take in the next values of the stream: 1-D, float32 or float64, any device.

        The values are borrowed: what is kept of them is copied.
        """
        stream = _array(values)
        at_most: int | torch.Tensor = 0
        below: int | torch.Tensor = 0
        inside = None
        if self.low is not None:
            inside = stream > self.low
            at_most = len(stream) - _count(inside)
            if self.tied:
                below = _count(stream < self.low)
        if self.high is not None:
            under = stream < self.high
            inside = under if inside is None else inside & under
        kept = stream + 0.0 if inside is None else stream[inside]
        self.absorb(len(stream), (self.low, self.high), at_most, below, kept)

    def absorb(
        self,
        seen: int,
        fences: tuple[float | None, float | None],
        at_most: int | torch.Tensor,
        below: int | torch.Tensor,
        inside: _Array,
    ) -> None:
        """Take in what somebody else counted of ``seen`` values, between the fences of then.

        How many were at most and how many below the lower one, and a copy of those strictly
        between. Fences only come closer during a pass.
        """
        self._seen += seen
        self._dtype = torch.as_tensor(inside[:0]).dtype
        if fences[0] is not None:
            self._at_most = self._at_most + at_most
            self._below = self._below + below
        if self.low != fences[0]:
            above = inside[inside > self.low]
            self._at_most = self._at_most + (len(inside) - len(above))
            inside = above
        if self.high != fences[1]:
            inside = inside[inside < self.high]
        self._keep(inside)

    def settle(self) -> float | None:
        """The answer after a whole pass, or ``None`` if it takes another."""
        if self._seen != self.count:
            raise ValueError(f"a pass brought {self._seen} values where {self.count} were due")
        rank = self.rank - int(self._at_most)
        if rank < 0 and self.low is not None:
            if self._at_least_low or (self.tied and self.rank >= int(self._below)):
                return self.low
            self._open(None, neighbour(self.low, math.inf, self._dtype))
        elif rank >= self._inside and self.high is not None:
            if self._at_most_high:
                return self.high
            self._open(neighbour(self.high, -math.inf, self._dtype), None)
        elif self._cells is None:
            return _kth(_joined(self._pool), rank)
        else:
            low, high = self._cells.fences(rank)
            if low == high:
                return low
            self._open(low, high)
        return None

    def _keep(self, values: _Array) -> None:
        self._inside += len(values)
        if self._cells is not None:
            self._cells.add(torch.as_tensor(values))
        elif len(values):
            self._pool.append(values)
            if self._inside > self._pool_limit:
                self._draw_fences()

    def _draw_fences(self) -> None:
        """Draw the fences as close as the values seen so far prove right."""
        pool = _joined(self._pool)
        outside = int(self._at_most)
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
            held = torch.as_tensor(pool)
            self._cells = _Cells(self.low, self.high, held.dtype, held.device)
            self._cells.add(held)
            self._pool = []


class _Cells:
    """Counts of the values between two fences, by leading bits of their bit pattern."""

    def __init__(
        self, low: float | None, high: float | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype = dtype
        # First and last pattern that can occur strictly between the fences.
        self._first = _pattern_of(float("-inf") if low is None else low, dtype) + (low is not None)
        self._last = _pattern_of(float("inf") if high is None else high, dtype) - (high is not None)
        span = max(0, self._last - self._first)
        # One spare halving: the first cell may begin before the first pattern.
        self._shift = max(0, span.bit_length() - CELLS.bit_length() + 2)
        self._origin = self._first >> self._shift
        cells = (self._last >> self._shift) - self._origin + 1
        self._counts = torch.zeros(max(1, cells), dtype=torch.int64, device=device)

    def add(self, values: torch.Tensor) -> None:
        cells = (_pattern(values) >> self._shift) - self._origin
        self._counts += torch.bincount(cells, minlength=self._counts.numel())

    def fences(self, rank: int) -> tuple[float | None, float | None]:
        """Fences around the cell that holds ``rank``; equal when it holds a single value."""
        upto = self._counts.cumsum(0)
        cell = self._origin + int(torch.searchsorted(upto, upto.new_tensor(rank), right=True))
        first = max(self._first, cell << self._shift)
        last = min(self._last, ((cell + 1) << self._shift) - 1)
        if first == last:
            value = _value_of(first, self._dtype)
            return value, value
        return _value_of(first - 1, self._dtype), _value_of(last + 1, self._dtype)


_BITS = {torch.float32: (torch.int32, 0x7FFFFFFF), torch.float64: (torch.int64, 2**63 - 1)}


def _pattern(values: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the values; both zeros, which compare equal, become 0."""
    integer, magnitude = _BITS[values.dtype]
    bits = values.view(integer)
    return torch.where(bits < 0, -(bits & magnitude).long(), bits.long())


def _pattern_of(value: float, dtype: torch.dtype) -> int:
    return int(_pattern(torch.tensor([value], dtype=dtype)).item())


def _value_of(pattern: int, dtype: torch.dtype) -> float | None:
    """The value of a pattern; ``None`` for one beyond infinity, where no fence is needed."""
    bits = torch.tensor([abs(pattern)], dtype=_BITS[dtype][0])
    value = float(bits.view(dtype).item())
    return None if value != value else math.copysign(value, pattern)


# numpy's comparisons, selections and introselect are several times faster than torch's on a
# CPU, and read the same: the code above takes either kind of array.
_Array: TypeAlias = Any


def _array(values: torch.Tensor) -> _Array:
    return values.numpy() if values.device.type == "cpu" else values


def _count(mask: _Array) -> int | torch.Tensor:
    """How many are true; on an accelerator without waiting for it."""
    if isinstance(mask, torch.Tensor):
        return torch.count_nonzero(mask)
    return int(numpy.count_nonzero(mask))


def _joined(parts: list[_Array]) -> _Array:
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else numpy.concatenate(parts)


def _kth(values: _Array, rank: int) -> float:
    """The value at 0-based ``rank``; the values may be reordered in place."""
    if isinstance(values, torch.Tensor):
        return float(torch.kthvalue(values, rank + 1).values)
    values.partition(rank)
    return float(values[rank])


def neighbour(value: float, towards: float, dtype: torch.dtype) -> float:
    """The next value of ``dtype`` in a direction."""
    ends = torch.tensor([value, towards], dtype=dtype)
    return float(torch.nextafter(ends[0], ends[1]))


def kth(values: torch.Tensor, rank: int) -> float:
    """The value at 0-based ``rank`` in ascending order of values that are all at hand."""
    return _kth(_array(values.clone()), rank)
