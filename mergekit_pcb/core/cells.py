"""Counts of a stream's values by their bit patterns, on any device.

A pass over the stream takes no value to the host and waits for nothing; what it finds comes over
with one transfer when it ends.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

# Cells of a count: 8 MiB, and one cell per float32 pattern between close fences.
CELLS = 1 << 20
# Values whose cells are made out at a time, for their integers take more room than they do.
SLICE_ELEMENTS = 1 << 22
# Many values that lie beyond the fences would wait for each other at a single counter.
SPARE_CELLS = 1 << 12


class Found(NamedTuple):
    """What a pass counted, and the cell of a rank, if one of those between the fences has it.

    ``at_most`` and ``below`` count values beside the lower fence, ``inside`` those between the
    fences. The rank's value lies strictly between ``low`` and ``high`` (``None``: no bound), or is
    both of them if it is ``exact``.
    """

    at_most: int
    below: int
    inside: int
    low: float | None = None
    high: float | None = None
    exact: bool = False


class Cells:
    """Counts of the values between two fences, by leading bits of their bit pattern."""

    def __init__(
        self, low: float | None, high: float | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype, self._fences = dtype, (low, high)
        self._first, self._last, self._shift = _span(low, high, dtype)
        self._origin = self._first >> self._shift
        self._cells = max(1, (self._last >> self._shift) - self._origin + 1)
        size = self._cells + SPARE_CELLS
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)
        #: Values at most and below the lower fence.
        self.beside = torch.zeros(2, dtype=torch.int64, device=device)

    @property
    def place(self) -> tuple[int, int]:
        """A value's pattern, shifted so far to the right, less the second number is its cell."""
        return self._shift, self._origin

    def add(self, values: torch.Tensor) -> None:
        """Count values all of which lie strictly between the fences."""
        cells = (_pattern(values) >> self._shift) - self._origin
        self.counts += torch.bincount(cells, minlength=len(self.counts))

    def add_all(self, values: torch.Tensor, *, tied: bool) -> None:
        """Count any values; ``tied`` says that those below the lower fence count by themselves."""
        low, high = self._fences
        for part in torch.split(values, SLICE_ELEMENTS):
            cells = (_pattern(part) >> self._shift) - self._origin
            spare = _spare(len(part), part.device) + self._cells
            if low is not None:
                above = part > low
                self.beside[0] += len(part) - torch.count_nonzero(above)
                if tied:
                    self.beside[1] += torch.count_nonzero(part < low)
                cells = torch.where(above, cells, spare)
            if high is not None:
                cells = torch.where(part < high, cells, spare)
            self.counts.scatter_add_(0, cells, torch.ones_like(cells))

    def settle(self, rank: int) -> Found:
        """Where a rank among all values counted lies; waits for the device."""
        upto = self.counts[: self._cells].cumsum(0)
        cell = torch.searchsorted(upto, rank - self.beside[:1], right=True)
        at_most, below, inside, place = torch.cat((self.beside, upto[-1:], cell)).tolist()
        if not at_most <= rank < at_most + inside:
            return Found(at_most, below, inside)
        first = max(self._first, (self._origin + place) << self._shift)
        last = min(self._last, ((self._origin + place + 1) << self._shift) - 1)
        if first == last:
            value = _value_of(first, self._dtype)
            return Found(at_most, below, inside, value, value, exact=True)
        low, high = (_value_of(pattern, self._dtype) for pattern in (first - 1, last + 1))
        return Found(at_most, below, inside, low, high)


def _span(low: float | None, high: float | None, dtype: torch.dtype) -> tuple[int, int, int]:
    """First and last pattern that can occur between fences, and the shift to their cells."""
    first = _pattern_of(float("-inf") if low is None else low, dtype) + (low is not None)
    last = _pattern_of(float("inf") if high is None else high, dtype) - (high is not None)
    # One spare halving: the first cell may begin before the first pattern.
    return first, last, max(0, max(0, last - first).bit_length() - CELLS.bit_length() + 2)


def told_apart(low: float | None, high: float | None) -> bool:
    """Whether every float32 between fences has a cell of its own."""
    return _span(low, high, torch.float32)[2] == 0


@functools.lru_cache(maxsize=4)
def _spare(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device) % SPARE_CELLS


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
