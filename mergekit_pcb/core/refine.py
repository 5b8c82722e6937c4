"""PCB's merge of matrices, refined: solved for, and its spectrum evened.

Both steps are of one matrix at a time. The solve (``solve.py``) is linear in the weights, so
what each task contributes can be summed; the spectrum (``spectrum.py``) is a step on the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mergekit_pcb.core.matrices import Layout, Matrix, Norms, norms
from mergekit_pcb.core.measure import OutOfRangeError, Statistics
from mergekit_pcb.core.merge import beyond, delta
from mergekit_pcb.core.solve import NotSolvableError, solve
from mergekit_pcb.core.spectrum import even, even_
from mergekit_pcb.core.vectors import Aligned


@dataclass(frozen=True)
class Refinement:
    """What is done to the matrices of one tensor.

    ``anchor`` is ``None`` where PCB's own merge is kept. ``exponent`` is that of the singular
    values; ``None`` takes it from the task vectors, each matrix its own.
    """

    layout: Layout
    anchor: float | None
    exponent: float | None


@dataclass(frozen=True)
class Spectrum:
    """The step that follows once contributions are summed: an exponent for every matrix."""

    layout: Layout
    exponents: tuple[float, ...]


def merge(
    aligned: Aligned,
    statistics: Statistics,
    weights: Sequence[float],
    scale: float,
    refinement: Refinement,
) -> torch.Tensor:
    """``b + scale · M`` as a new flat tensor of the base's dtype.

    Arguments and errors are those of :func:`mergekit_pcb.core.merge.merge`; further raises
    :class:`~mergekit_pcb.core.solve.NotSolvableError`.
    """
    if scale == 0:
        return aligned.base.clone()
    # A tensor that is one matrix is merged in the memory of the matrix.
    merged = None if refinement.layout.count == 1 else aligned.base.clone()
    for found in refined(aligned, statistics, weights, refinement):
        place = slice(found.matrix.start, found.matrix.end)
        values = found.merged.mul_(scale).add_(aligned.base[place])
        if beyond(values, aligned.base.dtype):
            raise OutOfRangeError(aligned.name)
        if merged is None:
            return values.to(aligned.base.dtype)
        merged[place] = values
    return aligned.base.clone() if merged is None else merged


@dataclass(frozen=True)
class Refined:
    """One matrix, the exponent of its singular values, and its merged task vector ``M``, flat.

    ``agreement`` is the exponent that ``spectrum: auto`` takes.
    """

    matrix: Matrix
    exponent: float
    agreement: float
    merged: torch.Tensor


def refined(
    aligned: Aligned, statistics: Statistics, weights: Sequence[float], refinement: Refinement
) -> Iterator[Refined]:
    """Every matrix of a tensor that any task changed; the arguments are those of :func:`merge`."""
    for matrix, own in _measured(aligned, statistics, refinement):
        if own.changed:
            exponent = _exponent(own, refinement)
            (found,) = _unevened(matrix, own, statistics, [weights], refinement)
            merged = evened(found, refinement.layout, exponent, aligned.name)
            yield Refined(matrix, exponent, own.agreement, merged)


def contributions(
    aligned: Aligned, statistics: Statistics, refinement: Refinement
) -> tuple[tuple[torch.Tensor, ...], Spectrum | None]:
    """What the ``weight`` of each task multiplies, and the step that follows on the sum, if any.

    Flat tensors in the precision of ``statistics``, as
    :func:`mergekit_pcb.core.merge.contributions` returns them.
    """
    tasks = len(aligned.tasks)
    shape = tasks, len(aligned)
    parts = torch.zeros(shape, dtype=statistics.dtype, device=aligned.base.device)
    alone = [[float(task == other) for other in range(tasks)] for task in range(tasks)]
    exponents = []
    for matrix, own in _measured(aligned, statistics, refinement):
        exponents.append(_exponent(own, refinement))
        found = _unevened(matrix, own, statistics, alone, refinement)
        for part, flat in zip(parts, found, strict=True):
            part[matrix.start : matrix.end] = flat
    spectrum = Spectrum(refinement.layout, tuple(exponents))
    return tuple(parts), None if set(exponents) <= {1.0} else spectrum


def apply(spectrum: Spectrum, summed: torch.Tensor, name: str) -> torch.Tensor:
    """Even the sum of contributions to a tensor, flat; its memory may be used."""
    layout = spectrum.layout
    parts = torch.split(summed, layout.elements)
    return torch.cat(
        [
            evened(part, layout, exponent, name)
            for part, exponent in zip(parts, spectrum.exponents, strict=True)
        ]
    )


def evened(flat: torch.Tensor, layout: Layout, exponent: float, name: str) -> torch.Tensor:
    """One matrix with its singular values raised to ``exponent``, norm kept; as it is for 1.

    The memory of ``flat`` may be used, unless it requires gradients.
    """
    if exponent == 1:
        return flat
    # A spectrum and its power do not ask which side is which.
    rows = flat.view(-1, layout.rows if layout.transposed else layout.columns)
    if not torch.isfinite(flat).all():
        raise OutOfRangeError(name)
    try:
        return (even if flat.requires_grad else even_)(rows, exponent).reshape(-1)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise NotSolvableError(name, "its singular values do not converge") from None


def _measured(
    aligned: Aligned, statistics: Statistics, refinement: Refinement
) -> Iterator[tuple[Matrix, Norms]]:
    thinned = aligned.under(statistics.dare)
    for matrix in Matrix.all_of(thinned, refinement.layout, statistics.dtype):
        yield matrix, norms(matrix)


def _exponent(own: Norms, refinement: Refinement) -> float:
    return own.agreement if refinement.exponent is None else refinement.exponent


def _unevened(
    matrix: Matrix,
    own: Norms,
    statistics: Statistics,
    weights: Sequence[Sequence[float]],
    refinement: Refinement,
) -> list[torch.Tensor]:
    """The matrix for each choice of weights, its spectrum as it comes."""
    if refinement.anchor is not None:
        return solve(matrix, statistics, weights, refinement.anchor, own)
    found = []
    for row in weights:
        flat = torch.empty(
            matrix.layout.elements, dtype=matrix.dtype, device=matrix.aligned.base.device
        )
        for chunk, part in matrix.chunks(flat):
            part.copy_(delta(chunk, statistics, row))
        found.append(flat)
    return found
