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

from mergekit_pcb.core.cells import LINE
from mergekit_pcb.core.formulas import Balance, table
from mergekit_pcb.core.ranks import OrderStatistic
from mergekit_pcb.core.tally import Open
from mergekit_pcb.core.vectors import Aligned

# Elements that a program, a single warp, looks at together.
BLOCK_ELEMENTS = 1 << 7
# Programs of a walk at most: so many that all processors of a large GPU are busy.
PROGRAMS = 1 << 16
# Kernels are compiled for each number of tasks, up to this one.
MOST_TASKS = 16
LANES_OF_A_WARP = 32
# Counters of the generator that a program draws together: few, as rare ties cost it a second draw.
COUNTERS = 1 << 7


class OnGPU:
    """An aligned tensor whose elements are walked over by kernels; as ``fused.Fused``."""

    def __init__(self, aligned: Aligned, kernels: Any) -> None:
        self._aligned, self._kernels = aligned, kernels
        self._device, self._tasks = aligned.base.device, len(aligned.tasks)
        self._programs = min(PROGRAMS, len(aligned) // BLOCK_ELEMENTS)

    def magnitudes(self, open_: Open) -> float:
        most = self._most(1)
        self._count(self._kernels.walk_magnitudes, open_, most)
        return float(most.amax().view(torch.float32))

    def scores(self, open_: Open, intervals: Sequence[Balance]) -> list[float]:
        most = self._most(self._tasks)
        rows = _numbers(table(intervals, len(intervals), [0.0] * self._tasks))
        self._count(self._kernels.walk_scores, open_, rows, most)
        patterns = most.amax(0)
        sizes = patterns.abs().view(torch.float32)
        found: list[float] = torch.where(patterns < 0, -sizes, sizes).tolist()
        return found

    def merge(
        self, balances: Sequence[Balance], tasks: int, factors: Sequence[float], out: torch.Tensor
    ) -> bool:
        most = self._most(1)
        rows = _numbers(table(balances, tasks, factors))
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
        rows = _numbers(table(balances, tasks, factors))
        more = {"begin": begin, "end": begin + len(out), "NEAR": _near(balances)}
        kernel = self._kernels.walk_merge
        self._launch(kernel, rows, out, self._most(1), FROM_BASE=False, **more)

    def _count(self, kernel: Any, open_: Open, *more: Any) -> None:
        """Show the statistics all values."""
        width = max(map(len, open_.values()), default=0)
        own: list[OrderStatistic | None] = []
        for task in range(self._tasks):
            asked = open_.get(task, ())
            own += [*asked, *[None] * (width - len(asked))]
        count = len(self._aligned)
        counts = [None if k is None else k.there(count, self._device) for k in own]
        fences = tuple(number for k in own for number in _fences(k))
        lines = self._moved([[0] * LINE if k is None else k.line for k in counts])
        shape = self._programs + 1, len(own), 2
        slots = torch.zeros(shape, dtype=torch.int64, device=self._device)
        self._launch(kernel, fences, lines, slots, *more, LINES=width)
        for found, beside in zip(counts, slots.sum(0), strict=True):
            if found is not None:
                found.beside += beside

    def _launch(
        self, kernel: Any, *given: Any, begin: int = 0, end: int | None = None, **more: Any
    ) -> None:
        """Start a kernel's programs, each with a slot of its own, and one for what is left over."""
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
            tuple(map(float, numpy.array(aligned.factors, "f4"))),
        )
        row = BLOCK_ELEMENTS // LANES_OF_A_WARP
        options = {"BLOCK": BLOCK_ELEMENTS, "ROW": row, "num_warps": 1, "enable_fp_fusion": False}
        options |= more
        with current(device):
            if blocks:
                programs = min(self._programs, blocks)
                kernel[(programs,)](*inputs, 0, blocks, len(base), 0, *given, WHOLE=True, **options)
            if rest:
                place = blocks, blocks + 1, len(base), self._programs
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

    def _most(self, numbers: int) -> torch.Tensor:
        """Where each program says so many numbers that no other of its kind is more than."""
        least = torch.iinfo(torch.int32).min + 1
        shape = self._programs + 1, numbers
        return torch.full(shape, least, dtype=torch.int32, device=self._device)

    def _moved(self, numbers: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device)


def _numbers(rows: Any) -> tuple[float, ...]:
    """A table as kernels take it."""
    return tuple(rows.ravel().tolist())


def _fences(statistic: OrderStatistic | None) -> tuple[float, float, float]:
    """Between which values one looks, and whether ties count; all are below what nobody wants."""
    if statistic is None:
        return math.inf, math.inf, 0.0
    low, high = statistic.low, statistic.high
    tied = float(statistic.tied)
    return -math.inf if low is None else low, math.inf if high is None else high, tied


def _near(balances: Sequence[Balance]) -> bool:
    """Whether quotients of all scores above a threshold are far from underflow."""
    return all(
        b.silent or (b.threshold >= 2.0**-60 and b.peak - b.threshold <= 1) for b in balances
    )


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the GPU that is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
