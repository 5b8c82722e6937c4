"""``refine: solve``: the matrix that acts like every expert on what the expert was trained on.

    G_i = τ_iᵀ τ_i / ‖τ_i‖²      A = Σ_i G_i      e = anchor · mean(diag A)
    M   = (Σ_i weight_i τ_i G_i + e · M_pcb)(A + e I)⁻¹

``G_i`` stands for the second moments of the layer's inputs in training task ``i``: a step of
gradient descent lies in their span. Sources: the closed form of RegMean (Jin et al., arXiv
2212.09849) with the covariances of ACTMat (arXiv 2604.01329), held to PCB's merge by a ridge.
A task that did not change the matrix takes no part. The result is linear in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from mergekit_pcb.core.matrices import Layout, Matrix, Norms
from mergekit_pcb.core.measure import OutOfRangeError, Statistics
from mergekit_pcb.core.merge import delta
from mergekit_pcb.core.products import (
    add_gram_,
    add_product_,
    cholesky_,
    divide_,
    mirror_,
    product,
)

# Rounding moves the solution by some four times eps · ‖A‖ / e (in float32 then 3e-4 of its norm at
# most); where the largest eigenvalue is further above the ridge, all is computed in float64.
LARGEST_CONDITION = 1 << 10
POWER_STEPS = 8


class NotSolvableError(Exception):
    """A factorisation of a tensor's matrix failed."""

    def __init__(self, tensor: str, what: str) -> None:
        super().__init__(tensor, what)
        self.tensor, self.what = tensor, what


def solve(
    matrix: Matrix,
    statistics: Statistics,
    weights: Sequence[Sequence[float]],
    anchor: float,
    norms: Norms,
) -> list[torch.Tensor]:
    """The solved ``M`` for each of several choices of ``weights``, one number per task each.

    New flat tensors in the precision of ``matrix``. Memory beyond them and the inputs:
    :func:`working_elements`.
    """
    largest = max(abs(weight) for row in weights for weight in row)
    if largest > torch.finfo(matrix.dtype).max:
        raise OutOfRangeError(matrix.aligned.name)
    found = _solved(matrix, statistics, weights, anchor, norms, matrix.dtype)
    if found is None:
        found = _solved(matrix, statistics, weights, anchor, norms, torch.float64)
    assert found is not None  # noqa: S101 - float64 always answers
    return [flat.to(matrix.dtype) for flat in found]


def working_elements(layout: Layout) -> int:
    """The numbers that solving for a matrix holds at most, beyond inputs and result."""
    rows, columns = layout.rows, layout.columns
    if _from_the_left(layout):
        return columns * columns + rows * rows + rows * columns
    return 2 * columns * columns + layout.block_rows() * columns


def flops(layout: Layout, tasks: int) -> int:
    """Floating-point operations of the solve for a whole tensor; one addition or product each."""
    rows, columns = layout.rows, layout.columns
    if _from_the_left(layout):
        a_task = rows * columns * columns + 3 * rows * rows * columns
    else:
        a_task = 3 * rows * columns * columns
    return layout.count * (tasks * a_task + columns**3 // 3 + 2 * rows * columns * columns)


def _from_the_left(layout: Layout) -> bool:
    """Whether ``(τ τᵀ) τ`` costs less than ``τ (τᵀ τ)``."""
    return 3 * layout.rows < 2 * layout.columns


def _solved(
    matrix: Matrix,
    statistics: Statistics,
    weights: Sequence[Sequence[float]],
    anchor: float,
    norms: Norms,
    dtype: torch.dtype,
) -> list[torch.Tensor] | None:
    """The same in ``dtype``; ``None`` where that is too narrow."""
    layout, device = matrix.layout, matrix.aligned.base.device
    results = [torch.zeros(layout.elements, dtype=dtype, device=device) for _ in weights]
    if not norms.changed:
        return results
    ridge = anchor * len(norms.changed) / layout.columns
    factors = [abs(row[task]) * norms.tasks[task] for row in weights for task in norms.changed]
    factors += [1 / norms.tasks[task] for task in norms.changed]
    if max(ridge, *factors) > torch.finfo(dtype).max:
        if dtype == torch.float64:
            raise OutOfRangeError(matrix.aligned.name)
        return None
    shape = layout.columns, layout.columns
    ridged = torch.zeros(shape, dtype=dtype, device=device)  # A, and in the end A + e I
    # The trace of every G_i is 1.
    largest = LARGEST_CONDITION * anchor / layout.columns if dtype != torch.float64 else math.inf
    for task in norms.changed:
        own = [row[task] * norms.tasks[task] for row in weights]
        if not _add(matrix, task, 1 / norms.tasks[task], own, ridged, results, largest):
            return None
    mirror_(ridged)
    ridged.diagonal().add_(ridge)
    for result, row in zip(results, weights, strict=True):
        for chunk, part in matrix.chunks(result):
            part.add_(delta(chunk, statistics, row), alpha=ridge)
    if not cholesky_(ridged):
        if dtype != torch.float64:
            return None
        raise NotSolvableError(matrix.aligned.name, "its ridge is lost in rounding")
    for result in results:
        divide_(matrix.view(result), ridged)
    return results


def _add(
    matrix: Matrix,
    task: int,
    scale: float,
    weights: Sequence[float],
    gram: torch.Tensor,
    results: Sequence[torch.Tensor],
    largest: float,
) -> bool:
    """Add ``G`` to the lower half of ``gram``, and ``weight τ G`` to each result.

    False, and no answer, where an eigenvalue of ``G`` is above ``largest``. From the left it goes
    through ``τ τᵀ``, which has the same ones, and takes all rows at once.
    """
    left = _from_the_left(matrix.layout)

    def blocks() -> Iterator[tuple[slice, torch.Tensor]]:
        return _blocks(matrix, task, scale, gram.dtype, whole=left)

    whole = list(blocks()) if left else None
    side = matrix.layout.rows if left else matrix.layout.columns
    own = torch.zeros((side, side), dtype=gram.dtype, device=gram.device)
    for _, tau in whole or blocks():
        add_gram_(own, tau.T if left else tau)
        del tau
    mirror_(own)
    if not _largest_eigenvalue(own) <= largest:  # NaN is not, either
        return False
    if not left:
        gram.add_(own)
    for rows, tau in whole or blocks():
        if left:
            add_gram_(gram, tau)
        factors = (own, tau) if left else (tau, own)
        for weight, result in zip(weights, results, strict=True):
            add_product_(matrix.view(result)[rows], *factors, weight)
        del tau, factors  # before the next block is made
    return True


def _largest_eigenvalue(gram: torch.Tensor) -> float:
    """About the largest, from below, by power iteration.

    It starts from the longest column, and from signs that no structure of a matrix follows: rows
    that cancel one another would leave nothing of their sum.
    """
    vector = gram[:, int(gram.diagonal().argmax())].unsqueeze(1).clone()
    vector.div_(torch.linalg.vector_norm(vector))
    # The bits in the middle of multiples of a large odd number (Knuth's multiplicative hashing).
    signs = torch.arange(1, len(gram) + 1).mul_(2654435761).bitwise_right_shift_(31) & 1
    vector.add_((2 * signs - 1).unsqueeze(1).to(gram), alpha=len(gram) ** -0.5)
    length = 0.0
    for _ in range(POWER_STEPS):
        vector = product(gram, vector.div_(torch.linalg.vector_norm(vector)))
        length = float(torch.linalg.vector_norm(vector))
    return length


def _blocks(
    matrix: Matrix, task: int, scale: float, dtype: torch.dtype, *, whole: bool
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows after the other of a task vector, scaled; each valid until the next."""
    blocks = matrix.blocks(whole=whole)
    length = max(end - begin for _, begin, end in blocks)
    buffer = torch.empty(length, dtype=dtype, device=matrix.aligned.base.device)
    for rows, begin, end in blocks:
        tau = matrix.task_vector(task, begin, buffer[: end - begin])
        yield rows, matrix.view(tau.mul_(scale))
