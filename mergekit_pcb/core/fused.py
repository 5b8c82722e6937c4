"""Walks over a tensor in main memory by the compiled loops of ``kernels.py``, on all threads.

A walk is cut into blocks that stay in a core's cache, and into pieces of blocks that threads take
one after the other. What they count is whole numbers, and what they keep are values of which one
is selected by rank, so nothing depends on who does which piece. Threads are as many as torch uses
(``torch.set_num_threads``, ``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch

from mergekit_pcb.core.dare import pool
from mergekit_pcb.core.formulas import LOG2_E, SMALLEST_DIVISOR, Balance, factor, tanh_
from mergekit_pcb.core.ranks import OrderStatistic
from mergekit_pcb.core.threads import Lines, Open, Room
from mergekit_pcb.core.vectors import STRIP, Aligned

LOG = logging.getLogger(__name__)
#: The environment variable that turns compiled loops off (``0``), or on for tensors of any size.
SWITCH = "MERGEKIT_PCB_COMPILED"
# torch spreads an operation over threads of its own from more elements than this on.
BLOCK_ELEMENTS = 1 << 15
# Rows of so many tasks fit into a core's second cache, together with what is made of them.
BLOCK_TASKS = 8
BLOCKS_PER_PIECE = 16
# Elements of a tensor below which torch's own operations are as good.
SMALLEST = 1 << 12
# Elements from which on loading the loops, most of a second, pays (compiling them takes some more,
# once after installation).
WORTH_LOADING = 1 << 22
_ready: set[torch.dtype] = set()
# What numpy takes the bits of a dtype for.
_KINDS = {torch.float32: "f4", torch.bfloat16: "u2", torch.float16: "i2"}


def of(aligned: Aligned, dtype: torch.dtype) -> Fused | None:
    """The tensor for compiled walks in this precision; ``None`` where there are none for it."""
    kind, chosen = aligned.base.dtype, os.environ.get(SWITCH)
    least = 1 if chosen == "1" else SMALLEST if kind in _ready else WORTH_LOADING
    if (
        chosen == "0"
        or len(aligned) < least
        or dtype != torch.float32
        or kind not in _KINDS
        or any(
            tensor.device.type != "cpu" or tensor.dtype != kind or not tensor.is_contiguous()
            for tensor in (aligned.base, *aligned.tasks)
        )
    ):
        return None
    kernels = compiled(kind)
    return None if kernels is None else Fused(aligned, kernels)


@functools.cache
def compiled(kind: torch.dtype) -> Any:
    """The compiled loops for checkpoints of a dtype; ``None``, and a warning, if there are none.

    All are tried on a few numbers first, so that a broken installation, or a folder that cannot be
    written to, is found here and not in the middle of a merge.
    """
    try:
        from mergekit_pcb.core import kernels

        _rehearse(kernels, kind)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        LOG.warning(
            "merging without compiled loops, more slowly and to the same bits, because numba did "
            "not give them (%s: %s); %s=0 says this is meant",
            type(error).__name__,
            said,
            SWITCH,
        )
        return None
    _ready.add(kind)
    return kernels


def _rehearse(kernels: Any, kind: torch.dtype) -> None:
    base = torch.linspace(-1, 1, 4 * STRIP).to(kind)
    tasks = [base * 1.5, base * 0.75]
    fused = Fused(Aligned.of("", base, tasks), kernels)
    middle, both = OrderStatistic(len(base) // 2, len(base)), [Balance(0.0, 1.0, 0.0, 1.0)] * 2
    magnitudes = (tasks[0].float() - base.float()).abs()
    right = fused.magnitudes({0: [middle]}) == float(magnitudes.max())
    right &= middle.settle() == float(magnitudes.sort().values[len(base) // 2])
    scores = fused.scores({}, both)
    right &= scores[0] > 0 and fused.merge(both, 2, [-1.0, -1.0], torch.empty_like(base))
    if not right:
        raise RuntimeError("compiled code gives wrong numbers")


class Fused:
    """An aligned tensor whose elements are walked over by compiled loops."""

    def __init__(self, aligned: Aligned, kernels: Any) -> None:
        self._aligned, self._kernels, self._count = aligned, kernels, len(aligned.tasks)
        self._base = _bits(aligned.base)
        self._addresses = numpy.array([task.data_ptr() for task in aligned.tasks], "i8")
        self._block = max(1, BLOCK_ELEMENTS * BLOCK_TASKS // max(BLOCK_TASKS, self._count))

    def magnitudes(self, open_: Open) -> float:
        """Show the statistics all magnitudes; the largest, NaN or infinite where one of them is."""
        lines, largest = Lines(open_), [0]

        def work(room: Room, blocks: Iterator[tuple[int, int]]) -> None:
            tally = lines.tally(room)
            most = 0
            for start, count in blocks:
                self._task_vectors(room, start, count)
                own = room.tau, room.values, room.bits, room.extreme_bits
                most = max(most, int(self._kernels.magnitudes(*own, count)))
                tally.take(count, self._kernels.take_extremes, room.values, room.extremes)
            tally.give()
            largest.append(most)

        self._walk(work)
        return _number(max(largest))

    def scores(self, open_: Open, intervals: Sequence[Balance]) -> list[float]:
        """Show the statistics all scores; the largest of each task."""
        lines, table = Lines(open_), self._intervals(intervals, len(intervals))
        peaks: list[Any] = []

        def work(room: Room, blocks: Iterator[tuple[int, int]]) -> None:
            tally = lines.tally(room)
            most = numpy.full(self._count, -math.inf, "f4")
            for start, count in blocks:
                self._task_vectors(room, start, count)
                self._scores(room, table, count)
                self._kernels.peaks(room.values, room.bits, most, count)
                tally.take(count, self._kernels.take, room.values)
            tally.give()
            peaks.append(most)

        self._walk(work)
        found: list[float] = numpy.max(peaks, axis=0).tolist()
        return found

    def merge(
        self, balances: Sequence[Balance], tasks: int, factors: Sequence[float], out: torch.Tensor
    ) -> bool:
        """Write ``b − Σ_i factor_i w_i τ̂_i / max(Σ_i w_i, 1e-12)``; whether ``out`` can hold it."""
        table = self._intervals(balances, tasks)
        rows = [
            (b.low, b.high, b.threshold, b.peak - b.threshold, factor, not b.silent)
            for b, factor in zip(balances, factors, strict=True)
        ]
        weights, smallest = numpy.array(rows, "f4"), numpy.float32(SMALLEST_DIVISOR)
        limit = torch.finfo(out.dtype).max
        direct = _bits(out) if out.dtype == torch.float32 else None
        halves = _bits(out) if out.dtype == torch.bfloat16 else None
        beyond: list[bool] = []

        def work(room: Room, blocks: Iterator[tuple[int, int]]) -> None:
            most = 0
            for start, count in blocks:
                self._task_vectors(room, start, count)
                self._scores(room, table, count)
                given = self._base, start, room.tau, room.values, weights, smallest
                if direct is None:
                    own = room.merged, room.total, room.merged_bits
                else:
                    written = direct[start : start + count]
                    own = written, room.total, written.view("i4")
                most = max(most, int(self._kernels.combine(*given, *own, count)))
                if halves is not None:
                    written = halves[start : start + count]
                    self._kernels.to_bfloat16(room.merged_raw, written, count)
                elif direct is None:
                    out[start : start + count].copy_(room.merged_row[:count])
            beyond.append(not _number(most) <= limit)

        self._walk(work)
        return not any(beyond)

    def _intervals(self, balances: Sequence[Balance], tasks: int) -> Any:
        rows = [
            (b.low, b.high, 0 if b.constant else factor(b, tasks), tasks * LOG2_E) for b in balances
        ]
        return numpy.array(rows, "f4")

    def _task_vectors(self, room: Room, start: int, count: int) -> None:
        """Those of a block, thinned."""
        kernels, tau = self._kernels, room.tau
        kernels.task_vectors(self._base, self._addresses, start, tau, count)
        for task, mask in enumerate(self._aligned.masks):
            if mask is not None:
                packed, skipped = mask.packed(start, count)
                kernels.thin(tau[task], packed, skipped, numpy.float32(1 / mask.density), count)

    def _scores(self, room: Room, table: Any, count: int) -> None:
        """The scores of a block, in ``room.values``."""
        kernels, own = self._kernels, (room.products, room.product_bits)
        kernels.add(room.tau, room.total, count)
        if not kernels.scores(room.tau, room.total, table, room.values, *own, count):
            for row in room.product_rows:
                tanh_(row[:count], scratch=room.spare[:count])
            kernels.multiply(room.values, room.products, count)

    def _walk(self, work: Callable[[Room, Iterator[tuple[int, int]]], None]) -> None:
        """Let threads do the work, each on the blocks that it gets hold of."""
        total, size = len(self._aligned), self._block
        pieces = iter(range(0, total, size * BLOCKS_PER_PIECE))  # next() is one step for threads
        stopped = threading.Event()

        def blocks() -> Iterator[tuple[int, int]]:
            for begin in pieces:
                for start in range(begin, min(begin + size * BLOCKS_PER_PIECE, total), size):
                    if stopped.is_set():
                        return
                    yield start, min(size, total - start)

        def run() -> None:
            work(Room.of_thread(self._count, size), blocks())

        threads = torch.get_num_threads()
        helpers = min(threads, -(-total // (size * BLOCKS_PER_PIECE))) - 1
        others = [pool("walks", threads).submit(run) for _ in range(helpers)]
        try:
            run()
            for other in others:
                other.result()
        finally:
            stopped.set()
            for other in others:
                other.exception()


def _bits(tensor: torch.Tensor) -> Any:
    """The same memory as the loops take it."""
    plain = tensor if tensor.dtype == torch.float32 else tensor.view(torch.int16)
    return plain.numpy().view(_KINDS[tensor.dtype])


def _number(bits: int) -> float:
    """The float32 that has these bits."""
    return float(numpy.int32(bits).view("f4"))
