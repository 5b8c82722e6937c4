"""Tensors that multiply activations, seen as matrices ``[out, in]``.

What is computed of a matrix comes from blocks of its rows, whose size follows from its shape
alone, so it does not depend on how tensors are cut into chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mergekit_pcb.core.vectors import Aligned, Chunk, Scratch

# Rows of a block: enough for a product of matrices to be worth its call, in 32 MiB where possible.
BLOCK_ROWS = (256, 1024)
BLOCK_ELEMENTS = 1 << 23
NORM_ELEMENTS = 1 << 22
# torch adds up so many values in one thread, and so in one order.
PIECE_ELEMENTS = 1 << 15


@dataclass(frozen=True)
class Layout:
    """How a tensor is made of ``count`` matrices, one after the other.

    Each is ``rows × columns``, ``[out, in]``, and stored as it is or ``transposed``.
    """

    count: int
    rows: int
    columns: int
    transposed: bool = False

    @property
    def elements(self) -> int:
        """Of one matrix."""
        return self.rows * self.columns

    def block_rows(self, *, whole: bool = False) -> int:
        """Rows that are taken at a time: all, if asked for or where rows are not contiguous."""
        fewest, most = BLOCK_ROWS
        if whole or self.transposed:
            return self.rows
        return min(self.rows, most, max(fewest, BLOCK_ELEMENTS // self.columns))


@dataclass(frozen=True)
class Matrix:
    """One matrix of an aligned tensor, its elements from ``start`` on; ``dtype`` computes."""

    aligned: Aligned
    layout: Layout
    start: int
    dtype: torch.dtype

    @classmethod
    def all_of(cls, aligned: Aligned, layout: Layout, dtype: torch.dtype) -> list[Matrix]:
        starts = range(0, layout.count * layout.elements, max(1, layout.elements))
        return [cls(aligned, layout, start, dtype) for start in starts]

    @property
    def end(self) -> int:
        return self.start + self.layout.elements

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Elements of the matrix, or of some of its rows where it is not transposed, as rows."""
        if self.layout.transposed:
            return flat.view(self.layout.columns, self.layout.rows).T
        return flat.view(-1, self.layout.columns)

    def chunks(
        self, flat: torch.Tensor, begin: int | None = None
    ) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """Chunks, and the parts of ``flat`` that lie where they do.

        ``flat`` stands for elements of the matrix, from ``begin`` on, or for all of it.
        """
        begin = self.start if begin is None else begin
        scratch = Scratch.of_thread(self.dtype)
        for chunk in self.aligned.chunks(scratch, begin, begin + len(flat)):
            yield chunk, flat[chunk.start - begin :][: len(chunk.base)]

    def blocks(self, *, whole: bool = False) -> list[tuple[slice, int, int]]:
        """Some rows each, and where their elements begin and end in the tensor."""
        rows, columns = self.layout.rows, self.layout.columns
        step = self.layout.block_rows(whole=whole)
        return [
            (
                slice(row, min(row + step, rows)),
                self.start + row * columns,
                self.start + min(row + step, rows) * columns,
            )
            for row in range(0, rows, step)
        ]

    def task_vector(self, task: int, begin: int, out: torch.Tensor) -> torch.Tensor:
        """As many elements of a task vector, from ``begin`` on, as ``out`` is long; in ``out``."""
        for chunk, part in self.chunks(out, begin):
            part.copy_(chunk.task_vector(task))
        return out


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of the task vectors of a matrix, and of their sum."""

    tasks: tuple[float, ...]
    total: float

    @property
    def changed(self) -> list[int]:
        """The tasks that changed the matrix."""
        return [task for task, norm in enumerate(self.tasks) if norm > 0]

    @property
    def agreement(self) -> float:
        """``‖Σ τ_i‖ / √(n Σ ‖τ_i‖²)`` over the ``n`` tasks that changed the matrix.

        The norm of their mean over their root-mean-square norm: 1 where all are equal, ``1/√n``
        where they are orthogonal, 0 where they cancel out.
        """
        if len(self.changed) < 2:
            return 1.0
        largest = max(self.tasks)
        squares = math.fsum((norm / largest) ** 2 for norm in self.tasks)
        return min(1.0, self.total / largest / math.sqrt(len(self.changed) * squares))


def norms(matrix: Matrix) -> Norms:
    """Measure the norms, in float64."""
    found: list[list[torch.Tensor]] = [[] for _ in range(len(matrix.aligned.tasks) + 1)]
    shape = 2, min(matrix.layout.elements, NORM_ELEMENTS)
    buffers = torch.empty(shape, dtype=matrix.dtype, device=matrix.aligned.base.device)
    for begin in range(matrix.start, matrix.end, NORM_ELEMENTS):
        end = min(begin + NORM_ELEMENTS, matrix.end)
        tau, total = buffers[:, : end - begin]
        for task, norms in enumerate(found[:-1]):
            matrix.task_vector(task, begin, tau)
            norms += _norms_of_pieces(tau)
            total.copy_(tau) if task == 0 else total.add_(tau)
        found[-1] += _norms_of_pieces(total)
    *tasks, total_norm = [_joined(norms) for norms in found]
    return Norms(tuple(tasks), total_norm)


def norm(flat: torch.Tensor) -> float:
    """The Euclidean norm of a vector, in float64 and in one order."""
    return _joined(_norms_of_pieces(flat))


def _norms_of_pieces(flat: torch.Tensor) -> list[torch.Tensor]:
    pieces = torch.split(flat, PIECE_ELEMENTS)
    return [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]


def _joined(pieces: Sequence[torch.Tensor]) -> float:
    return math.hypot(*torch.stack(list(pieces)).tolist())
