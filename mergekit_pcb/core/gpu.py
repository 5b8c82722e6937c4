"""Walks over a tensor on a GPU by the kernels of ``gpu_kernels.py``.

Nothing is taken to the host but what a walk has counted and the few values it kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from mergekit_pcb.core.cells import Cells, told_apart
from mergekit_pcb.core.formulas import Balance, table
from mergekit_pcb.core.ranks import OrderStatistic
from mergekit_pcb.core.tally import Open
from mergekit_pcb.core.vectors import Aligned

# Elements that a program, a single warp, looks at together; at most 2^9.
BLOCK_ELEMENTS = 1 << 8
# Programs of a walk: so many that all processors of a large GPU are busy.
PROGRAMS = 1 << 14
# Kernels are compiled for each number of tasks, up to this one.
MOST_TASKS = 16
# Values that a walk keeps for a statistic (4 MiB), where its cells could not tell them all apart.
KEPT_ELEMENTS = 1 << 20
# Counters of the generator that a program draws together: few, as rare ties cost it a second draw.
COUNTERS = 1 << 7


class OnGPU:
    """An aligned tensor whose elements are walked over by kernels; as ``fused.Fused``."""

    def __init__(self, aligned: Aligned, kernels: Any) -> None:
        self._aligned, self._kernels = aligned, kernels
        self._device, self._tasks = aligned.base.device, len(aligned.tasks)

    def magnitudes(self, open_: Open) -> float:
        most = self._integers(PROGRAMS, fill=0)
        self._count(self._kernels.walk_magnitudes, open_, most)
        return float(most.amax().view(torch.float32))

    def scores(self, open_: Open, intervals: Sequence[Balance]) -> list[float]:
        most = self._integers(PROGRAMS, self._tasks, fill=-(2**31) + 1)
        rows = self._table(intervals, len(intervals), [0.0] * self._tasks)
        self._count(self._kernels.walk_scores, open_, rows, most)
        patterns = most.amax(0)
        sizes = patterns.abs().view(torch.float32)
        found: list[float] = torch.where(patterns < 0, -sizes, sizes).tolist()
        return found

    def merge(
        self, balances: Sequence[Balance], tasks: int, factors: Sequence[float], out: torch.Tensor
    ) -> bool:
        most = self._integers(PROGRAMS, fill=0)
        rows = self._table(balances, tasks, factors)
        more = {"FROM_BASE": True, "NEAR": _near(balances)}
        self._launch(self._kernels.walk_merge, rows, out, most, **more)
        return float(most.amax().view(torch.float32)) <= torch.finfo(out.dtype).max

    def delta(
        self,
        balances: Sequence[Balance],
        tasks: int,
        factors: Sequence[float],
        begin: int,
        out: torch.Tensor,
    ) -> None:
        rows, most = self._table(balances, tasks, factors), self._integers(1, fill=0)
        more = {"begin": begin, "end": begin + len(out), "NEAR": _near(balances)}
        self._launch(self._kernels.walk_merge, rows, out, most, FROM_BASE=False, **more)

    def _count(self, kernel: Any, open_: Open, *more: torch.Tensor) -> None:
        """Show the statistics all values; another walk counts where the first had no room."""
        rows = [
            [
                _Line(statistic, len(self._aligned), self._device)
                for statistic in open_.get(task, ())
            ]
            for task in range(self._tasks)
        ]
        while True:
            width = max(map(len, rows))
            lines = [own[k] if k < len(own) else None for own in rows for k in range(width)]
            table = [_NOTHING if line is None else line.table for line in lines]
            slots = torch.zeros((PROGRAMS, len(lines), 3), dtype=torch.int64, device=self._device)
            self._launch(kernel, self._moved(table), slots, *more, LINES=width)
            for line, counted in zip(lines, slots.sum(0).tolist(), strict=True):
                if line is not None:
                    line.saw(*counted)
            rows = [[line for line in own if not line.done] for own in rows]
            if not any(rows):
                return

    def _launch(
        self, kernel: Any, *given: torch.Tensor, begin: int = 0, end: int | None = None, **more: Any
    ) -> None:
        aligned, device = self._aligned, self._device
        masks = [
            None if mask is None else mask.whole(device, self._draw)[begin // 8 :]
            for mask in aligned.masks
        ]
        base = aligned.base[begin:end]
        blocks, rest = divmod(len(base), BLOCK_ELEMENTS)
        inputs = (
            base,
            tuple(task[begin:end] for task in aligned.tasks),
            tuple(masks),
            torch.tensor(aligned.factors, dtype=torch.float32).to(device),
        )
        options = {"BLOCK": BLOCK_ELEMENTS, "num_warps": 1, "enable_fp_fusion": False, **more}
        with current(device):
            if blocks:
                kernel[(PROGRAMS,)](*inputs, 0, blocks, len(base), *given, WHOLE=True, **options)
            if rest:
                place = blocks, blocks + 1, len(base)
                kernel[(1,)](*inputs, *place, *given, WHOLE=False, **options)

    def _draw(
        self, key: int, upper: int, lower: int, count: int, device: torch.device
    ) -> torch.Tensor:
        """The bits of a mask; see ``Mask.whole``."""
        from mergekit_pcb.core import gpu_masks

        counters = -(-count // 16)
        bits = torch.empty(counters, dtype=torch.int16, device=device)
        halves = numpy.array(divmod(key, 1 << 64)[::-1], "u8").view("i8").tolist()
        with current(device):
            gpu_masks.draw_mask[(-(-counters // COUNTERS),)](
                bits,
                counters,
                self._moved(halves),
                upper,
                lower,
                BLOCK=COUNTERS,
                num_warps=1,
                enable_fp_fusion=False,  # said, or some versions warn
            )
        return bits.view(torch.uint8)

    def _table(
        self, balances: Sequence[Balance], tasks: int, factors: Sequence[float]
    ) -> torch.Tensor:
        return torch.from_numpy(table(balances, tasks, factors)).to(self._device)

    def _integers(self, *shape: int, fill: int) -> torch.Tensor:
        return torch.full(shape, fill, dtype=torch.int32, device=self._device)

    def _moved(self, numbers: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device)


# A line that nobody asked for: all values are below its fences.
_NOTHING = [0x7F800000, 0x7F800000, 0, 0, 0, 0, 0, 0]


class _Line:
    """An order statistic that is shown ``seen`` values, and where a walk puts those of interest.

    A few are kept and taken to the host; many are counted in cells. Few are kept only if they
    are all there is, and if cells would not tell them all apart.
    """

    def __init__(self, statistic: OrderStatistic, seen: int, device: torch.device) -> None:
        self.statistic, self._seen, self._device = statistic, seen, device
        self._cells: Cells | None = None
        self.done = False
        fences = statistic.low, statistic.high
        if seen == statistic.count and fences != (None, None) and not told_apart(*fences):
            self._kept = torch.empty(KEPT_ELEMENTS, dtype=torch.float32, device=device)
        else:
            self._cells = statistic.cells(seen, torch.float32, device)

    @property
    def table(self) -> list[int]:
        """The numbers of a line, as ``gpu_kernels._take`` reads them."""
        low, high = self.statistic.low, self.statistic.high
        fences = -math.inf if low is None else low, math.inf if high is None else high
        own = [*numpy.array(fences, "f4").view("i4").tolist(), self.statistic.tied]
        if self._cells is not None:
            return [*own, *self._cells.place, self._cells.counts.data_ptr(), 0, 0]
        return [*own, 0, 0, 0, self._kept.data_ptr(), KEPT_ELEMENTS]

    def saw(self, at_most: int, below: int, kept: int) -> None:
        """Give the statistic what was found; or ask for another walk, which counts."""
        own = self.statistic
        if self._cells is not None:
            self._cells.beside += torch.tensor([at_most, below], device=self._device)
        elif kept <= KEPT_ELEMENTS:
            values = self._kept[:kept].cpu().numpy()
            own.absorb(self._seen, (own.low, own.high), at_most, below, values)
        else:
            self._cells = own.cells(self._seen, torch.float32, self._device)
            return
        self.done = True


def _near(balances: Sequence[Balance]) -> bool:
    """Whether quotients of all scores above a threshold are far from underflow."""
    return all(
        b.silent or (b.threshold >= 2.0**-60 and b.peak - b.threshold <= 1) for b in balances
    )


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the GPU that is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
