"""Merging methods of the literature that need no data, each for one matrix at a time.

A method takes the task vectors ``[out, in]`` of one weight matrix, one per expert, and returns the
merged task vector ``[out, in]`` in float32, which is added to the base as it is. ``merge`` applies
a method to whole state dicts. All is computed in float64, draws nothing at random and does not
depend on the order of the experts but for rounding.

| method | source | defaults | what its authors search |
|---|---|---|---|
| ``actmat`` | arXiv 2604.01329 | none needed | nothing |
| ``ace`` | arXiv 2603.02945 | eps 1e-5, threshold 0.3, fraction 0.3 | eps (1e-5, 2e-4, 4e-2) |
| ``wudi`` | arXiv 2503.08099 | rate 1e-5, steps 300 | nothing (rate 2e-5 for RoBERTa) |
| ``iso_c`` | arXiv 2502.04959 | scale 1 | scale (they found 0.8 to 1.5) |
| ``tsv_m`` | arXiv 2412.00081 | scale 1 | scale (0.1 to 3 by tenths) |
| ``svc`` | arXiv 2602.05536 | scale 0.3, alpha 1 / experts | nothing |

Where a paper and its released code differ, the code is followed, since it made the tables.
Tensors that are no matrices are averaged, by ``iso_c`` and ``tsv_m`` times the scale; ``svc``
leaves them to task arithmetic, ``wudi`` leaves them as they are in the base.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.quality.suite import StateDict

#: Task vectors of one tensor, one per expert, all of the same shape.
Taus = Sequence[torch.Tensor]
#: What ACE-Merging and SVC keep divisors and logarithms from zero with.
TINY = 1e-12


def actmat(taus: Taus, *, rtol: float | None = None) -> torch.Tensor:
    """Merge with each task's input covariance estimated as ``C = τᵀ τ`` (ACTMat).

    The merged task vector is ``(Σ τ C) (Σ C)⁺``, which is RegMean's solution. For weights in place
    of task vectors it is the same where ``Σ C`` has full rank, because ``Σ W₀ C (Σ C)⁻¹`` is
    ``W₀``; elsewhere task vectors leave to the base what no expert has changed.

    Source: Hameed et al., arXiv 2604.01329; ``merge_actmat`` in ``src/merging.py`` of the authors'
    repository, which merges differences. ``rtol`` is relative to the largest eigenvalue; smaller
    ones count as zero. The authors leave it at its default for float32, and so does ``None`` here.
    """
    stack = _stack(taus)
    products = stack.mT @ stack
    total = products.sum(0)
    if rtol is None:
        rtol = len(total) * torch.finfo(torch.float32).eps
    inverse = torch.linalg.pinv(total, rtol=rtol, hermitian=True)
    return ((stack @ products).sum(0) @ inverse).float()


def ace(
    taus: Taus, *, eps: float = 1e-5, threshold: float = 0.3, fraction: float = 0.3
) -> torch.Tensor:
    """Merge with covariances that are normalised, share a prior, and are refined (ACE-Merging).

    Task vectors lose the mean of each column, and their covariances are ``C = τᵀ τ``. If the
    logarithms of the squared norms vary by more than ``threshold`` of their squared mean, tasks are
    called mixed: covariances are divided by their traces, and so is the ridge ``eps``. ``R`` is a
    covariance and its ridge. The prior is a matrix whose rows all are the mean row of ``Σ C``; of
    mixed tasks it is divided by the mean squared norm. The merged task vector is
    ``(Σ τ R) (Σ R + prior)⁻¹``. Of mixed tasks, ``Σ τ (C - mean R)`` with the uncentred ``τ`` is
    added to it for a singular value decomposition, and the first ``fraction`` of its singular
    vectors, all with the mean of their singular values, are added to what is returned.

    Source: Xu et al., arXiv 2603.02945v2, equations 5 to 19; ``ace_merging`` in
    ``src/merge/strategy.py`` of the authors' repository, from which the variance that divides by
    one less than the number of tasks, and the centred task vectors in the product, are taken. The
    paper's ``eps`` is 4e-2 for GPT-2, 2e-4 for RoBERTa-base and 1e-5 for all other models, the
    code's default 1e-2. Where ``fraction`` is less than one vector, which makes the code return
    NaN, nothing is added.
    """
    stack = _stack(taus)
    tasks, _, columns = stack.shape
    energies = stack.square().sum((1, 2))
    logarithms = (energies + TINY).log()
    mixed = tasks > 1 and bool(logarithms.var() / (logarithms.mean().square() + TINY) > threshold)
    centred = stack - stack.mean(1, keepdim=True)
    covariances = centred.mT @ centred
    ridges = torch.full_like(energies, eps)
    if mixed:
        traces = centred.square().sum((1, 2)) + TINY
        covariances = covariances / traces.view(-1, 1, 1)
        ridges = ridges / traces
    identity = torch.eye(columns, dtype=stack.dtype, device=stack.device)
    regular = covariances + ridges.view(-1, 1, 1) * identity
    total = regular.sum(0)
    prior = covariances.sum(0).mean(0)
    if mixed:
        prior = prior / (energies.mean() + TINY)
    merged = torch.linalg.solve(total + prior, (centred @ regular).sum(0), left=False)
    if mixed:
        residual = (stack @ (covariances - total / tasks)).sum(0)
        left, values, right = torch.linalg.svd(merged + residual, full_matrices=False)
        kept = int(len(values) * fraction)
        if kept:
            merged = merged + values[:kept].mean() * (left[:, :kept] @ right[:kept])
    return merged.float()


def wudi(taus: Taus, *, rate: float = 1e-5, steps: int = 300) -> torch.Tensor:
    """Minimise the interference ``Σ ‖(M - τ) τᵀ‖² / ‖τ‖²`` with Adam (WUDI-Merging).

    The merged task vector ``M`` starts at the sum of the task vectors and goes ``steps`` steps,
    each of at most about ``rate`` per element. The published rate belongs to the size of their task
    vectors: 300 steps move an element by at most 3e-3. Task vectors that are zero have no part in
    the loss.

    Source: Cheng et al., arXiv 2503.08099, algorithm 1; ``get_redundant_task_vector`` in
    ``wudi_main.py`` of the authors' repository (rate 2e-5 in ``nlp_roberta/lamassu.py``). The
    gradient is written out; it is the one that their code has from autograd.
    """
    stack = _stack(taus)
    norms = stack.square().sum((1, 2))
    changed = stack[norms > 0]
    products = changed.mT @ changed * (2 / norms[norms > 0]).view(-1, 1, 1)
    slope, offset = products.sum(0), (changed @ products).sum(0)
    merged = torch.nn.Parameter(stack.sum(0))
    optimizer = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        merged.grad = merged.detach() @ slope - offset
        optimizer.step()
    return merged.detach().float()


def iso_c(taus: Taus, *, scale: float = 1.0) -> torch.Tensor:
    """Give every singular value of the task vectors' sum their mean (Iso-C).

    ``scale`` is the paper's α, which it chooses on held-out data: 1.3 to 1.5 for 8 experts, 1 to
    1.3 for 14, 0.8 to 1 for 20 (its table 5). Singular vectors whose value is exactly zero are
    arbitrary and are left out; the mean is over all values.

    Source: Marczak et al., arXiv 2502.04959, algorithm 1, equations 7 to 9.
    """
    total = _stack(taus).sum(0)
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    kept = _present(values, total)
    return (scale * values.mean() * (left[:, kept] @ right[kept])).float()


def tsv_m(taus: Taus, *, scale: float = 1.0) -> torch.Tensor:
    """Sum the experts' first singular components, made orthogonal to one another (TSV-M).

    Of ``r`` components each of ``T`` experts keeps the first ``r // T``. The left singular vectors
    of all experts are replaced by the nearest orthonormal ones, and so are the right ones.
    ``scale`` is the paper's α. The released code tries 0.1 to 3 by tenths on validation data.

    Source: Gargiulo et al., arXiv 2412.00081, algorithm 1; ``compute_and_sum_svd_mem_reduction`` in
    ``src/utils/TSVM_utils.py`` of the authors' repository. Two things are mended where their code
    gives zeros or arbitrary vectors: with fewer components than experts each keeps one, and what
    has a singular value of exactly zero, in a task vector or among the vectors that are made
    orthogonal, is left out.
    """
    stack = _stack(taus)
    kept = max(1, min(stack.shape[1:]) // len(stack))
    left, values, right = torch.linalg.svd(stack, full_matrices=False)
    present = _present(values, stack[0])[:, :kept].flatten()
    left = left[:, :, :kept].transpose(0, 1).flatten(1)[:, present]
    right = right[:, :kept].flatten(0, 1)[present]
    return (scale * (_polar(left) * values[:, :kept].flatten()[present]) @ _polar(right)).float()


def svc(taus: Taus, *, scale: float = 0.3, alpha: float | None = None) -> torch.Tensor:
    """Divide each singular value of task arithmetic's merge by how often it counts an expert (SVC).

    Task arithmetic's merge is ``scale`` times the sum. Of its left singular vector ``u`` and an
    expert's task vector, ``s = ⟨uᵀ merge, uᵀ τ⟩ / ‖uᵀ τ‖²`` says how much of the expert's response
    the merge has. The singular value is divided by the experts' mean of ``max(alpha, s)``.
    ``alpha`` is one by the number of experts unless given.

    Source: Li et al., arXiv 2602.05536, algorithm 1; ``coef_cal_multi_ranks``, ``Align`` and ``TA``
    in ``merge_func.py`` and ``alpha`` in ``run.sh`` of the authors' repository. An older version of
    that file has the mean of ``s`` in the place of the mean of ``max(alpha, s)``; the paper has the
    newer formula.
    """
    stack = _stack(taus)
    merged = scale * stack.sum(0)
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    responses = left.mT @ stack
    sizes = responses.square().sum(2).clamp(min=TINY)
    shares = (responses * right).sum(2) * values / sizes
    divisors = shares.clamp(min=1 / len(stack) if alpha is None else alpha).mean(0)
    return ((left * (values / divisors)) @ right).float()


def _stack(taus: Taus) -> torch.Tensor:
    """All task vectors as ``[experts, out, in]`` in float64."""
    return torch.stack(tuple(taus)).double()


def _present(values: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Which singular values, the largest first along the last dimension, are more than rounding."""
    return values > values[..., :1] * max(matrix.shape) * torch.finfo(values.dtype).eps


def _polar(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix whose singular values are all one, or zero where they were zero."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = _present(values, matrix)
    return left[:, kept] @ right[kept]


def mean(taus: Taus, *, scale: float = 1.0) -> torch.Tensor:
    """``scale`` times the mean of the task vectors."""
    return (scale * _stack(taus).mean(0)).float()


def task_arithmetic(taus: Taus, *, scale: float = 0.3) -> torch.Tensor:
    """``scale`` times the sum of the task vectors."""
    return (scale * _stack(taus).sum(0)).float()


def unchanged(taus: Taus, *, scale: float = 1.0) -> torch.Tensor:
    """The base, as a task vector."""
    return scale * torch.zeros_like(taus[0], dtype=torch.float32)


#: What each method does with a matrix.
MATRIX: Mapping[str, Callable[..., torch.Tensor]] = {
    "actmat": actmat,
    "ace": ace,
    "wudi": wudi,
    "iso_c": iso_c,
    "tsv_m": tsv_m,
    "svc": svc,
}

#: What each method does with all else (biases, norms, embeddings): as in its authors' code.
REST: Mapping[str, Callable[..., torch.Tensor]] = {
    "actmat": mean,
    "ace": mean,
    "wudi": unchanged,
    "iso_c": mean,
    "tsv_m": mean,
    "svc": task_arithmetic,
}


class Knob(NamedTuple):
    """A default, None where it depends on the number of experts, and where a search may look."""

    default: float | None
    low: float
    high: float


#: What may be searched, per method. The authors search ``eps`` of ACE-Merging per family of models,
#: and ``scale`` of Iso-C and TSV-M; the others are left at their defaults by theirs.
KNOBS: Mapping[str, Mapping[str, Knob]] = {
    "actmat": {},
    "ace": {"eps": Knob(1e-5, 1e-6, 0.1)},
    "wudi": {"rate": Knob(1e-5, 1e-6, 1e-2)},
    "iso_c": {"scale": Knob(1.0, 0.1, 3.0)},
    "tsv_m": {"scale": Knob(1.0, 0.1, 3.0)},
    "svc": {"scale": Knob(0.3, 0.1, 3.0), "alpha": Knob(None, 0.05, 1.0)},
}


def merge(
    method: str,
    base: StateDict,
    experts: Sequence[StateDict],
    matrices: Container[str],
    *,
    rest: Callable[..., torch.Tensor] | None = None,
    **knobs: float,
) -> StateDict:
    """A state dict of ``base``'s names, shapes and dtypes.

    Tensors named in ``matrices`` are merged by the method as ``[out, everything else]``, all others
    by its rule for the rest, or by ``rest`` if that is given; whole numbers stay as they are in
    ``base``. ``knobs`` are the method's own arguments, and ``scale`` is the rest's as well.
    """
    rule = REST[method] if rest is None else rest
    shared = {name: value for name, value in knobs.items() if name == "scale"}
    merged = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            merged[name] = tensor.clone()
            continue
        start = tensor.float()
        taus = [expert[name].float() - start for expert in experts]
        if name in matrices:
            delta = MATRIX[method]([tau.flatten(1) for tau in taus], **knobs).view(tensor.shape)
        else:
            delta = rule(taus, **shared)
        merged[name] = (start + delta).to(tensor.dtype)
    return merged
