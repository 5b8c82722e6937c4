"""``spectrum``: the singular values of a merged matrix, evened out.

    M = U diag(σ) Vᵀ   →   U diag(c · σᵖ) Vᵀ        c such that the Frobenius norm stays

The leading singular directions of a merge are those in which its tasks disagree; with ``p = 0``
all count alike (Iso-C, Marczak et al., arXiv 2502.04959), with ``p = 1`` nothing changes. The
exponent that follows from the task vectors is :attr:`~mergekit_pcb.core.matrices.Norms.agreement`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from mergekit_pcb.core.matrices import norm
from mergekit_pcb.core.products import add_gram_, decomposed, mirror_, product

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
    any. Gradients pass through.
    """
    if exponent == 1 or not rows.numel():
        return rows.clone()
    if rows.requires_grad:
        if rows.shape[0] < rows.shape[1]:
            return even(rows.T, exponent).T
        return _Even.apply(rows, exponent)  # type: ignore[no-any-return, no-untyped-call]
    return even_(rows.clone(), exponent)


def even_(rows: torch.Tensor, exponent: float) -> torch.Tensor:
    """:func:`even` in the memory of ``rows``; beyond it: :func:`working_elements`."""
    if exponent != 1 and rows.numel():
        _even_(rows if rows.shape[0] >= rows.shape[1] else rows.T, exponent)
    return rows


def _even_(rows: torch.Tensor, exponent: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Even a matrix in its memory; return old singular values, factors, right singular vectors.

    Of the matrix scaled to norm one, which has no fewer rows than columns.
    """
    scale = norm(rows.reshape(-1))
    if scale == 0:
        none = rows.new_zeros(rows.shape[1])
        return none, torch.ones_like(none), torch.eye(rows.shape[1]).to(rows)
    steps = [scale]
    if scale > torch.finfo(rows.dtype).max:  # finite numbers of which the norm is not
        largest = float(torch.stack(rows.aminmax()).abs().amax())
        steps = [largest, scale / largest]
    for step in steps:
        rows.div_(step)
    gram = rows.new_zeros((rows.shape[1], rows.shape[1]))
    add_gram_(gram, rows)
    mirror_(gram)
    _, right = decomposed(torch.linalg.eigh, gram)
    del gram
    # Columns are singular values times left singular vectors, ascending.
    left = product(rows, right)
    values = torch.linalg.vector_norm(left, dim=0)
    weak = int((values < TOLD * values.amax()).sum())
    if weak:
        turn = decomposed(partial(torch.linalg.svd, full_matrices=False), left[:, :weak])
        right[:, :weak] = product(right[:, :weak], turn.Vh.T)
        left[:, :weak] = turn.U.mul_(turn.S)
        values[:weak] = turn.S
    factors = values.clamp(min=FLOOR * float(values.amax())).div_(float(values.amax()))
    factors.pow_(exponent - 1)
    left.mul_(factors)
    length = math.sqrt(math.fsum((values * factors).double().square().tolist()))
    product(left, right.T, out=rows)
    rows.mul_(steps[-1] / length)
    for step in steps[:-1]:
        rows.mul_(step)
    return values, factors, right


class _Even(torch.autograd.Function):
    """``even`` with the derivative of a matrix function (Daleckii and Krein; Noferini, 2017).

    Unlike that of a decomposition it is finite where singular values are equal or zero. What the
    strongest singular value has to do with the floor is left out of it.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exponent: float) -> torch.Tensor:
        evened = rows.detach().clone()
        values, factors, right = _even_(evened, exponent)
        ctx.exponent = exponent
        ctx.save_for_backward(rows.detach(), evened, values, factors, right)
        return evened

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return _Even._backward(ctx, gradient), None

    @staticmethod
    def _backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        rows, evened, values, factors, right = ctx.saved_tensors
        square = (rows * rows).sum()
        if not square:
            return gradient
        # evened = ‖rows‖ / ‖h‖ · h, where h has the singular values times their factors.
        raised = values * factors
        along = (gradient * evened).sum() / square
        inner = (gradient - along * evened) / raised.norm()
        lowest = FLOOR * values.amax()
        slopes = factors * torch.where(values > lowest, ctx.exponent, 1.0)
        told = values > torch.finfo(values.dtype).eps * len(rows) * values.amax()
        left = (rows / square.sqrt()) @ right[:, told] / values[told]
        right, values, factors, slopes = right[:, told], values[told], factors[told], slopes[told]
        raised = raised[told]
        core = left.T @ inner @ right
        gap = values[:, None] - values
        near = gap.abs() <= 1e-6 * values.amax()
        mean_slope = (slopes[:, None] + slopes) / 2
        gap = torch.where(near, torch.ones_like(gap), gap)
        sides = torch.where(near, mean_slope, (raised[:, None] - raised) / gap)
        turns = (raised[:, None] + raised) / (values[:, None] + values)
        inside = sides * (core + core.T) / 2 + turns * (core - core.T) / 2
        below = inner @ right - left @ core
        beside = left.T @ inner - core @ right.T
        outside = inner - left @ (left.T @ inner) - below @ right.T
        slope_at_zero = FLOOR ** (ctx.exponent - 1)
        found = left @ (inside @ right.T + factors[:, None] * beside) + (below * factors) @ right.T
        whole: torch.Tensor = found + slope_at_zero * outside + along * rows
        return whole


def flops(rows: int, columns: int) -> int:
    """Floating-point operations of :func:`even`: products, and 9 n³ for eigenvectors."""
    small, large = sorted((rows, columns))
    return small * small * large * 5 + 9 * small**3


def working_elements(rows: int, columns: int) -> int:
    """The numbers that :func:`even_` holds at most, beyond its argument.

    A Gram matrix, its eigenvectors and LAPACK's room for them; then they, the matrix turned, and,
    where most directions are weak, two copies more of it.
    """
    small = min(rows, columns)
    return max(4 * small * small, 3 * rows * columns + 3 * small * small)
