"""Counts of a stream's values by their bit patterns, on any device.

A pass over the stream takes no value to the host and waits for nothing; what it finds comes over
with one transfer when it ends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch

# Cells of a count on a CPU, 8 MiB: one cell per float32 pattern between close fences.
CELLS = 1 << 20
# So many times as many on an accelerator, where a second look costs more than they do.
FINER_THERE = 4
#: Bytes of a count on an accelerator at the most.
BYTES_THERE = 8 * CELLS * FINER_THERE
# What is kept is kept in so many parts, because programs would wait for each other at one counter.
PARTS = 32
#: Numbers of a ``line``.
LINE = 7
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
        #: The patterns strictly between the fences; those of a cell agree but for the last bits.
        self.first, self.last = _span(low, high, dtype)
        self.shift, most = 0, _most(device)
        while (self.last >> self.shift) - (self.first >> self.shift) >= most:
            self.shift += 1
        self._origin = self.first >> self.shift
        self._cells = max(1, (self.last >> self.shift) - self._origin + 1)
        size = self._cells + SPARE_CELLS
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)
        #: Values at most and below the lower fence.
        self.beside = torch.zeros(2, dtype=torch.int64, device=device)

    def add(self, values: torch.Tensor) -> None:
        """Count values all of which lie strictly between the fences."""
        cells = (_pattern(values) >> self.shift) - self._origin
        self.counts += torch.bincount(cells, minlength=len(self.counts))

    def add_all(self, values: torch.Tensor, *, tied: bool) -> None:
        """Count any values; ``tied`` says that those below the lower fence count by themselves."""
        low, high = self._fences
        for part in torch.split(values, SLICE_ELEMENTS):
            cells = (_pattern(part) >> self.shift) - self._origin
            spare = _spare(len(part), part.device) + self._cells
            if low is not None:
                above = part > low
                self.beside[0] += len(part) - torch.count_nonzero(above)
                if tied:
                    self.beside[1] += torch.count_nonzero(part < low)
                cells = torch.where(above, cells, spare)
            if high is not None:
                cells = torch.where(part < high, cells, spare)
            # NaN, which somebody else finds, is beyond infinity and beyond all cells.
            cells = cells.clamp_(max=len(self.counts) - 1)
            self.counts.scatter_add_(0, cells, torch.ones_like(cells))

    @property
    def line(self) -> list[int]:
        """The numbers that ``gpu_kernels._take`` reads.

        The first and the last pattern, shift and address of the cells; then addresses of what is
        kept and of how many each part has, and its room.
        """
        return [self.first, self.last, self.shift, self.counts.data_ptr(), 0, 0, 0]

    def asked(self, rank: int) -> torch.Tensor:
        """Where a rank among all values counted lies, in numbers that :meth:`found` reads.

        They are on the device, which nobody waits for here.
        """
        upto = self.counts[: self._cells].cumsum(0)
        cell = torch.searchsorted(upto, rank - self.beside[:1], right=True)
        return torch.cat((self.beside, upto[-1:], cell))

    def found(self, rank: int, numbers: Sequence[int]) -> Found:
        """What the numbers say."""
        at_most, below, inside, place = numbers
        if not at_most <= rank < at_most + inside:
            return Found(at_most, below, inside)
        first = max(self.first, (self._origin + place) << self.shift)
        last = min(self.last, ((self._origin + place + 1) << self.shift) - 1)
        if first == last:
            value = _value_of(first, self._dtype)
            return Found(at_most, below, inside, value, value, exact=True)
        low, high = (_value_of(pattern, self._dtype) for pattern in (first - 1, last + 1))
        return Found(at_most, below, inside, low, high)


class Kept:
    """The patterns of float32 values between two fences, few enough to keep them all.

    ``room`` is how many each part of it holds.
    """

    def __init__(
        self, low: float | None, high: float | None, room: int, device: torch.device
    ) -> None:
        self.room = room
        self.first, self.last = _span(low, high, torch.float32)
        most = torch.iinfo(torch.int32).max
        self.patterns = torch.full((PARTS * room,), most, dtype=torch.int32, device=device)
        #: How many each part was given, more than it holds or not.
        self.fills = torch.zeros(PARTS, dtype=torch.int64, device=device)
        self.beside = torch.zeros(2, dtype=torch.int64, device=device)

    @property
    def line(self) -> list[int]:
        """As of :class:`Cells`; no shift and no cells."""
        places = self.patterns.data_ptr(), self.fills.data_ptr()
        return [self.first, self.last, 0, 0, *places, self.room]

    def asked(self, rank: int) -> torch.Tensor:
        """As of :class:`Cells`."""
        place = (rank - self.beside[:1]).clamp_(0, len(self.patterns) - 1)
        pattern = self.patterns.sort().values[place].long()
        return torch.cat((self.beside, pattern, self.fills))

    def found(self, rank: int, numbers: Sequence[int]) -> Found | None:
        """As of :class:`Cells`; ``None`` if there was no room for all."""
        at_most, below, pattern, *fills = numbers
        if max(fills) > self.room:
            return None
        inside = sum(fills)
        if not at_most <= rank < at_most + inside:
            return Found(at_most, below, inside)
        value = _value_of(pattern, torch.float32)
        return Found(at_most, below, inside, value, value, exact=True)


def told_apart(low: float | None, high: float | None, device: torch.device) -> bool:
    """Whether each float32 between fences has a cell of its own."""
    first, last = _span(low, high, torch.float32)
    return last - first < _most(device)


def _most(device: torch.device) -> int:
    return CELLS * (1 if device.type == "cpu" else FINER_THERE)


def _span(low: float | None, high: float | None, dtype: torch.dtype) -> tuple[int, int]:
    """The first and the last pattern that can occur between fences."""
    first = _pattern_of(-math.inf if low is None else low, dtype) + (low is not None)
    return first, _pattern_of(math.inf if high is None else high, dtype) - (high is not None)


@functools.lru_cache(maxsize=4)
def _spare(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device) % SPARE_CELLS


#: What the bits of values are taken for, by torch and by numpy.
BITS = {torch.float32: (torch.int32, 0x7FFFFFFF), torch.float64: (torch.int64, 2**63 - 1)}
KINDS = {torch.float32: ("f4", "i4"), torch.float64: ("f8", "i8")}


def _pattern(values: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the values; both zeros, which compare equal, become 0."""
    integer, magnitude = BITS[values.dtype]
    bits = values.view(integer)
    return torch.where(bits < 0, -(bits & magnitude).long(), bits.long())


def _pattern_of(value: float, dtype: torch.dtype) -> int:
    bits = int(numpy.array(value, KINDS[dtype][0]).view(KINDS[dtype][1]))
    return bits if bits >= 0 else -(bits & BITS[dtype][1])


def _value_of(pattern: int, dtype: torch.dtype) -> float | None:
    """The value of a pattern; ``None`` for one beyond infinity, where no fence is needed."""
    bits: Any = numpy.array(abs(pattern), KINDS[dtype][1])
    value = float(bits.view(KINDS[dtype][0]))
    return None if value != value else math.copysign(value, pattern)
