"""What the threads of a compiled walk work with: memory of their own, and what they have counted.

Counts are whole numbers, and kept values are looked at by rank alone, so a result does not depend
on who gave them first.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from mergekit_pcb.core.ranks import OrderStatistic
from mergekit_pcb.core.vectors import AT_ONCE

# Values that a line keeps before they are given to its statistic.
KEPT_ELEMENTS = 1 << 14
#: Open order statistics of each task's values.
Open = Mapping[int, Sequence[OrderStatistic]]


class Room:
    """The memory of a thread: rows of a block for each task.

    They are ``real`` numbers, seen as ``whole`` ones too, as numpy calls them. A block has
    ``size`` elements, and a piece ``piece`` at most.
    """

    def __init__(self, tasks: int, size: int, piece: int, real: str, whole: str) -> None:
        self.size = size
        self.tau, self.values, products = numpy.empty((3, tasks, size), real)
        self.total, merged = numpy.empty((2, size), real)
        self.masks = numpy.zeros((tasks, piece // 8), "u1")
        self.bits = self.values.view(whole)
        self.products = products, products.view(whole)
        self.merged = merged, merged.view(whole)
        self._pools = numpy.empty((0, 0), real)

    def pools(self, lines: int) -> Any:
        """Memory for what each of so many lines keeps, more than a block."""
        if len(self._pools) < lines:
            size = KEPT_ELEMENTS + self.size + AT_ONCE
            self._pools = numpy.empty((lines, size), self._pools.dtype)
        return self._pools[:lines]

    @classmethod
    def of_thread(cls, *needed: Any) -> Room:
        """The room that this thread uses for one tensor after the other."""
        if getattr(_thread, "needed", None) != needed:
            _thread.room, _thread.needed = cls(*needed), needed
        room: Room = _thread.room
        return room


class Lines:
    """Order statistics that several threads show values to: each a line of a table."""

    def __init__(self, open_: Open) -> None:
        self.statistics = [statistic for own in open_.values() for statistic in own]
        self.rows = numpy.array([task for task, own in open_.items() for _ in own], numpy.int64)
        self.lock = threading.Lock()


class Tally:
    """What one thread has seen since it last gave it to the statistics."""

    def __init__(self, lines: Lines, room: Room) -> None:
        self._lines = lines
        count = len(lines.statistics)
        self._counts = numpy.zeros((count, 2), numpy.int64)
        self._fills = numpy.zeros(count, numpy.int64)
        self._pools = room.pools(count)
        self._seen = 0
        self._look()

    def _look(self) -> None:
        self._fences = [(statistic.low, statistic.high) for statistic in self._lines.statistics]
        table = [
            (-math.inf if low is None else low, math.inf if high is None else high)
            for low, high in self._fences
        ]
        self._table = numpy.array(table, self._pools.dtype).reshape(-1, 2)
        self._tied = numpy.array([statistic.tied for statistic in self._lines.statistics], bool)

    @property
    def lines(self) -> tuple[Any, ...]:
        """What compiled loops take of it and fill."""
        asked = self._lines.rows, self._table, self._tied
        return *asked, self._counts, self._pools, self._fills

    def saw(self, count: int) -> None:
        """So many elements more were shown to every line."""
        self._seen += count
        if self._fills.max(initial=0) > KEPT_ELEMENTS:
            self.give()

    def give(self) -> None:
        """Give it to the statistics, and look where their fences are now."""
        lines = self._lines
        with lines.lock:
            for k, statistic in enumerate(lines.statistics):
                kept = self._pools[k, : self._fills[k]].copy()
                at_most, below = map(int, self._counts[k])
                statistic.absorb(self._seen, self._fences[k], at_most, below, kept)
            self._look()
        self._counts[:] = 0
        self._fills[:] = 0
        self._seen = 0


_thread = threading.local()
