"""``spectrum``: the singular values of a merged matrix, evened out.

    M = U diag(σ) Vᵀ   →   U diag(c · σᵖ) Vᵀ        c such that the Frobenius norm stays

The leading singular directions of a merge are those in which its tasks disagree; with ``p = 0``
all count alike (Iso-C, Marczak et al., arXiv 2502.04959), with ``p = 1`` nothing changes. The
exponent that follows from the task vectors is :attr:`~mergekit_pcb.core.matrices.Norms.agreement`.
"""

from __future__ import annotations

import math

import torch

from mergekit_pcb.core.matrices import add_gram_, mirror_, norm

# A direction that is weaker than this part of the strongest is raised no more than one that is
# not: so small a one may be the rounding of the solve, or what low-rank tasks left alone.
FLOOR = 1e-3
# Eigenvectors of a Gram matrix tell singular values down to some √eps of the largest (3e-4 in
# float32). Directions below this part of it are told apart again, among themselves.
TOLD = 1e-2


def even(rows: torch.Tensor, exponent: float) -> torch.Tensor:
    """A new matrix with the singular values of ``rows`` raised to ``exponent``, norm kept.

    ``rows`` is ``[out, in]``, finite. Through the eigenvectors of the smaller of its Gram matrices.
    Of what a decomposition in float64 gives, the result in float32 is away by at most 3e-4 of the
    norm for an exponent of 0.5, and 5e-3 for 0, where directions at the floor count as much as
    any. Memory beyond the result: :func:`working_elements`.
    """
    if exponent == 1 or not rows.numel():
        return rows.clone()
    if rows.shape[0] < rows.shape[1]:
        return even(rows.T, exponent).T
    scale = norm(rows.reshape(-1))
    if scale == 0:
        return rows.clone()
    rows = rows / scale
    gram = rows.new_zeros((rows.shape[1], rows.shape[1]))
    add_gram_(gram, rows)
    mirror_(gram)
    _, right = torch.linalg.eigh(gram)
    del gram
    left = rows @ right  # columns are singular values times left singular vectors, ascending
    values = torch.linalg.vector_norm(left, dim=0)
    weak = int((values < TOLD * values.amax()).sum())
    if weak:
        turn = torch.linalg.svd(left[:, :weak], full_matrices=False)
        right[:, :weak] = right[:, :weak] @ turn.Vh.T
        left[:, :weak] = turn.U * turn.S
        values[:weak] = turn.S
    highest = float(values.amax())
    factors = values.clamp(min=FLOOR * highest).div_(highest).pow_(exponent - 1)
    left.mul_(factors)
    length = math.sqrt(math.fsum((values * factors).double().square().tolist()))
    evened = left @ right.T
    return torch.mul(evened, scale / length, out=evened)


def flops(rows: int, columns: int) -> int:
    """Floating-point operations of :func:`even`: products, and 9 n³ for eigenvectors."""
    small, large = sorted((rows, columns))
    return small * small * large * 5 + 9 * small**3


def working_elements(rows: int, columns: int) -> int:
    """The numbers that :func:`even` holds at most, beyond its argument and its result."""
    small = min(rows, columns)
    return rows * columns + 4 * small * small
