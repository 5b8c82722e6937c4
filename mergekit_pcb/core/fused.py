"""Walks over a tensor by compiled loops: those of ``walks.py`` on all threads, or of a GPU.

A walk is cut into pieces that threads take one after the other. What they count is whole numbers,
and what they keep are values of which one is selected by rank, so nothing depends on who does which
piece. Threads are as many as torch uses (``torch.set_num_threads``, ``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy
import torch

from mergekit_pcb.core import dare, pools, ranks, rehearsal
from mergekit_pcb.core.cells import KINDS
from mergekit_pcb.core.formulas import SMALLEST_DIVISOR, Balance, table
from mergekit_pcb.core.gpu import MOST_TASKS, OnGPU, current
from mergekit_pcb.core.tally import Lines, Open, Room, Tally
from mergekit_pcb.core.vectors import Aligned, working_dtype

LOG = logging.getLogger(__name__)
#: The environment variable that turns compiled loops off (``0``), or on at the first tensor (``1``)
SWITCH = "MERGEKIT_PCB_COMPILED"
# What is made of so many elements of a few tasks fits into a core's first cache; whole strips.
BLOCK_ELEMENTS = 1 << 8
# Elements of the pieces that threads take: so many that calling the loops costs nothing beside
# them, and no more than leaves each thread some pieces of a tensor.
SMALLEST_PIECE = 1 << 15
LARGEST_PIECE = 1 << 18
PIECES_PER_THREAD = 8
# Elements from which on loading the loops, most of a second, pays (compiling them takes some more,
# once after installation).
WORTH_LOADING = 1 << 22
_ready: set[tuple[str, torch.dtype]] = set()
# What looks between fences, as ``ranks.between`` does, by the precision in which it was tried.
_Look = Callable[..., tuple[int, int, Any]]
_looks: dict[Any, _Look] = {}
#: Who compiles loops for tensors on a device.
_COMPILERS = {"cpu": "numba", "cuda": "Triton"}
# What numpy takes the bits of a dtype for.
_KINDS = {torch.float32: "f4", torch.float64: "f8", torch.bfloat16: "u2", torch.float16: "i2"}


def of(aligned: Aligned, dtype: torch.dtype) -> Fused | OnGPU | None:
    """The tensor for compiled walks in this precision; ``None`` where there are none for it."""
    kind, device, chosen = aligned.base.dtype, aligned.base.device, os.environ.get(SWITCH)
    loaded = (str(device), kind) in _ready
    least = 1 if loaded or chosen == "1" else WORTH_LOADING
    if device.type != "cpu":  # which keeps the values of short streams
        least = max(least, ranks.POOL_ELEMENTS + 1)
    if (
        chosen == "0"
        or len(aligned) < least
        or dtype != working_dtype(kind)
        or kind not in _KINDS
        or device.type not in _COMPILERS
        or (device.type != "cpu" and (dtype != torch.float32 or len(aligned.tasks) > MOST_TASKS))
        or any(
            tensor.device != device or tensor.dtype != kind or not tensor.is_contiguous()
            for tensor in (aligned.base, *aligned.tasks)
        )
    ):
        return None
    with current(device):  # where the compiled code is tried
        loops = compiled(str(device), kind)
    if loops is None:
        return None
    return Fused(aligned, loops) if device.type == "cpu" else OnGPU(aligned, loops)


@functools.cache
def compiled(device: str, kind: torch.dtype) -> Any:
    """The compiled loops for checkpoints of a dtype; ``None``, and a warning, if there are none.

    Each device of a machine is asked for by itself, for they may not be alike.

    All are tried on a few numbers first, so that a broken installation, or a folder that cannot be
    written to, is found here and not in the middle of a merge.
    """
    loops: Any
    try:
        if device == "cpu":
            from mergekit_pcb.core import philox
            from mergekit_pcb.core import walks as loops

            precision = numpy.dtype(KINDS[working_dtype(kind)][0])
            rehearsal.walks(lambda aligned: Fused(aligned, loops), device, kind)
            rehearsal.looks(loops, precision)
            rehearsal.masks(philox)
            _looks[precision] = loops.between
            dare.compare, ranks.look = philox.against, _look
        else:
            from mergekit_pcb.core import gpu_kernels as loops

            rehearsal.walks(lambda aligned: OnGPU(aligned, loops), device, kind)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        LOG.warning(
            "merging without compiled loops, more slowly and to the same bits, because %s did "
            "not give them (%s: %s); %s=0 says this is meant",
            _COMPILERS[torch.device(device).type],
            type(error).__name__,
            said,
            SWITCH,
        )
        return None
    _ready.add((device, kind))
    return loops


def _look(values: Any, *fences: float | None, tied: bool) -> tuple[int, int, Any]:
    look: _Look = _looks.get(values.dtype, ranks.between)
    return look(values, *fences, tied=tied)


class Fused:
    """An aligned tensor whose elements are walked over by compiled loops."""

    def __init__(self, aligned: Aligned, walks: Any) -> None:
        self._aligned, self._loops, self._count = aligned, walks, len(aligned.tasks)
        self._base = _bits(aligned.base)
        self._addresses = numpy.array([task.data_ptr() for task in aligned.tasks], "i8")
        self._real, self._whole = KINDS[working_dtype(aligned.base.dtype)]
        self._factors = numpy.array(aligned.factors, self._real)

    def magnitudes(self, open_: Open) -> float:
        """Show the statistics all magnitudes; the largest, NaN or infinite where one of them is."""
        lines, largest = Lines(open_), [0]

        def work(room: Room, pieces: Iterator[tuple[int, int]]) -> None:
            tally = Tally(lines, room)
            own = room.tau, room.values, room.bits
            for first, end in pieces:
                inputs, start = self._inputs(room, first, end), first
                while start < end:
                    given = *inputs, start, end, *own, *tally.lines
                    stop, found = self._loops.walk_magnitudes(*given)
                    largest.append(found)
                    tally.saw(stop - start)
                    start = stop
            tally.give()

        self._walk(work)
        return self._number(max(largest))

    def scores(self, open_: Open, intervals: Sequence[Balance]) -> list[float]:
        """Show the statistics all scores; the largest of each task."""
        lines, rows = Lines(open_), self._table(intervals, len(intervals), [0.0] * self._count)
        peaks: list[Any] = []

        def work(room: Room, pieces: Iterator[tuple[int, int]]) -> None:
            tally = Tally(lines, room)
            most = numpy.full(self._count, -math.inf, self._real)
            own = room.tau, room.total, rows, room.values, room.bits, *room.products, most
            for first, end in pieces:
                inputs, start = self._inputs(room, first, end), first
                while start < end:
                    stop = self._loops.walk_scores(*inputs, start, end, *own, *tally.lines)
                    tally.saw(stop - start)
                    start = stop
            tally.give()
            peaks.append(most)

        self._walk(work)
        found: list[float] = numpy.max(peaks, axis=0).tolist()
        return found

    def merge(
        self, balances: Sequence[Balance], tasks: int, factors: Sequence[float], out: torch.Tensor
    ) -> bool:
        """Write ``b − Σ_i factor_i w_i τ̂_i / max(Σ_i w_i, 1e-12)``; whether ``out`` can hold it.

        ``out`` has the inputs' dtype.
        """
        rows, written, largest = self._table(balances, tasks, factors), _bits(out), [0]

        def work(room: Room, pieces: Iterator[tuple[int, int]]) -> None:
            own = self._scored(room, rows)
            for first, end in pieces:
                given = *self._inputs(room, first, end), first, end, *own, *room.merged, written
                largest.append(self._loops.walk_merge(*given))

        self._walk(work)
        return self._number(max(largest)) <= torch.finfo(out.dtype).max

    def delta(
        self,
        balances: Sequence[Balance],
        tasks: int,
        factors: Sequence[float],
        begin: int,
        out: torch.Tensor,
    ) -> None:
        """Write ``Σ_i factor_i w_i τ̂_i / max(Σ_i w_i, 1e-12)`` of elements from ``begin`` on.

        ``out`` is in the precision of arithmetic, as long as there are elements, and ``begin`` a
        multiple of 8.
        """
        rows, written = self._table(balances, tasks, factors), out.numpy()

        def work(room: Room, pieces: Iterator[tuple[int, int]]) -> None:
            own = self._scored(room, rows)
            for first, end in pieces:
                given = *self._inputs(room, first, end), first, end, *own, begin, written
                self._loops.walk_delta(*given)

        self._walk(work, begin, begin + len(out))

    def _scored(self, room: Room, rows: Any) -> tuple[Any, ...]:
        smallest = rows.dtype.type(SMALLEST_DIVISOR)
        return room.tau, room.total, rows, room.values, *room.products, smallest

    def _table(self, balances: Sequence[Balance], tasks: int, weights: Sequence[float]) -> Any:
        return table(balances, tasks, weights, self._real)

    def _number(self, bits: int) -> float:
        """The number that has these bits."""
        return float(numpy.array(bits, self._whole).view(self._real))

    def _inputs(self, room: Room, first: int, end: int) -> tuple[Any, ...]:
        """What the loops read of a piece; masks are given as bits."""
        for task, mask in enumerate(self._aligned.masks):
            if mask is not None:
                packed, _ = mask.packed(first, end - first)
                room.masks[task, : len(packed)] = packed
        return self._base, self._addresses, room.masks, self._factors, first

    def _walk(
        self,
        work: Callable[[Room, Iterator[tuple[int, int]]], None],
        begin: int = 0,
        end: int | None = None,
    ) -> None:
        """Let threads do the work, each on the pieces of a tensor that it gets hold of."""
        end, threads = len(self._aligned) if end is None else end, torch.get_num_threads()
        share = -(-(end - begin) // (threads * PIECES_PER_THREAD))
        # Whole blocks, so that pieces begin at whole bytes of masks.
        size = -(-min(max(share, SMALLEST_PIECE), LARGEST_PIECE) // BLOCK_ELEMENTS) * BLOCK_ELEMENTS
        starts = iter(range(begin, end, size))  # next() is one step for threads
        stopped = threading.Event()

        def pieces() -> Iterator[tuple[int, int]]:
            for start in starts:
                if stopped.is_set():
                    return
                yield start, min(start + size, end)

        def run() -> None:
            piece = LARGEST_PIECE + BLOCK_ELEMENTS
            kinds = self._real, self._whole
            room = Room.of_thread(self._count, BLOCK_ELEMENTS, piece, *kinds)
            work(room, pieces())

        helpers = min(threads, -(-(end - begin) // size)) - 1
        others: list[Future[None]] = []
        try:
            with contextlib.suppress(RuntimeError):  # the system may have no thread left
                others.extend(pools.pool("walks", threads).submit(run) for _ in range(helpers))
            run()
            for other in others:
                other.result()
        finally:
            stopped.set()
            for other in others:
                other.exception()


def _bits(tensor: torch.Tensor) -> Any:
    """The same memory as the loops take it."""
    plain = tensor if tensor.itemsize > 2 else tensor.view(torch.int16)
    return plain.numpy().view(_KINDS[tensor.dtype])
