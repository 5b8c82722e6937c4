"""What is not in mergekit: the two data-dependent rivals of the paper, and PCB with parts left out.

Sources: Matena and Raffel, arXiv 2111.09832 (Fisher merging); Jin et al., arXiv 2212.09849
(RegMean); the paper's table of ablations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy
import torch

from benchmarks.quality.suite import StateDict, Suite

Part = Literal["intra", "inter", "drop", "rescale"]
CLIP = 1e-4


def fisher(suite: Suite, floor: float, coefficients: Sequence[float] | None = None) -> StateDict:
    """The experts' mean, each value weighed by the diagonal of its expert's Fisher information.

    Each diagonal is scaled to norm one; ``floor`` more leaves at their mean the values that no
    expert depends on. (Its authors take 1e-6 for the least information of the first model alone,
    which is the one that matters to them, and before scaling.) ``coefficients`` multiply the
    weights, one per expert; all are 1 unless given.
    """
    factors = torch.tensor(coefficients or [1.0] * len(suite.experts))
    importances = [_fisher(suite, number) for number in range(len(suite.experts))]
    merged = {}
    for name in suite.base:
        weights = torch.stack([importance[name] for importance in importances]) + floor
        weights *= factors.view(-1, *[1] * suite.base[name].ndim)
        values = torch.stack([expert[name] for expert in suite.experts])
        merged[name] = (weights * values).sum(0) / weights.sum(0)
    return merged


@lru_cache(maxsize=8)
def _fisher(suite: Suite, number: int) -> StateDict:
    """Squared gradients of the log-likelihood of labels that the expert itself draws."""
    model = suite.model
    model.load_state_dict(suite.experts[number])
    model.eval()
    draw = torch.Generator().manual_seed(number)
    squares = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for inputs in _single(suite, suite.tasks[number]):
        logits = model(*inputs)
        labels = logits.detach().softmax(-1).multinomial(1, generator=draw)[:, 0]
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for name, value in model.named_parameters():
            if value.grad is not None:
                squares[name] += value.grad**2
    model.zero_grad()
    norm = torch.stack([square.norm() for square in squares.values()]).norm()
    return {name: square / norm.clamp(min=1e-30) for name, square in squares.items()}


def _single(suite: Suite, task: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """Training inputs one by one."""
    for inputs, _ in suite.data["train"][task]:
        rows, *others = inputs
        for row in rows:
            yield (row[None], *others)


def regmean(suite: Suite, off_diagonal: float) -> StateDict:
    """Layers that agree best with their experts' outputs on the experts' inputs, in closed form.

    ``off_diagonal`` scales all but the diagonal of the inputs' inner products. Linear layers and
    convolutions are solved for; all else is the experts' mean.
    """
    merged = {
        name: torch.stack([expert[name] for expert in suite.experts]).mean(0) for name in suite.base
    }
    products = [_products(suite, number) for number in range(len(suite.experts))]
    for name in products[0]:
        left, right = 0.0, 0.0
        for expert, found in zip(suite.experts, products, strict=True):
            product = found[name]
            diagonal = torch.diag(product.diag())
            product = off_diagonal * product + (1 - off_diagonal) * diagonal
            left = left + product
            right = right + product @ expert[name].double().flatten(1).T
        ridge = 1e-6 * left.diag().mean() * torch.eye(len(left), dtype=left.dtype)
        solved = torch.linalg.solve(left + ridge, right).T
        merged[name] = solved.reshape(merged[name].shape).to(merged[name].dtype)
    return merged


@lru_cache(maxsize=8)
def _products(suite: Suite, number: int) -> StateDict:
    """Inner products ``[inputs, inputs]`` of every layer's inputs, in float64."""
    model = suite.model
    model.load_state_dict(suite.experts[number])
    model.eval()
    products: StateDict = {}

    def watch(name: str, layer: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            (rows,) = inputs
            if isinstance(layer, torch.nn.Conv2d):
                rows = torch.nn.functional.unfold(
                    rows, layer.kernel_size, layer.dilation, layer.padding, layer.stride
                ).transpose(1, 2)
            rows = rows.reshape(-1, rows.shape[-1])
            products[name] = products.get(name, 0) + (rows.T @ rows).double()

        return layer.register_forward_pre_hook(hook)

    handles = [
        watch(f"{name}.weight", layer)
        for name, layer in model.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and f"{name}.weight" in suite.base
    ]
    with torch.no_grad():
        for inputs, _ in suite.data["train"][suite.tasks[number]]:
            model(*inputs)
    for handle in handles:
        handle.remove()
    return products


def without(suite: Suite, part: Part | None, density: float, scale: float, scope: str) -> StateDict:
    """PCB without one of its parts (with all of them: ``None``), on whole vectors in float32.

    Without ``intra`` a score is the tanh alone, without ``inter`` the exponential alone; without
    ``drop`` scores are rescaled from their minimum on (which is density 1); without ``rescale``
    what is kept weighs the same.
    """
    names = list(suite.base)
    groups = [names] if scope == "model" else [[name] for name in names]
    merged = {}
    for group in groups:
        base = _flat(suite.base, group)
        tau = torch.stack([_flat(expert, group) for expert in suite.experts]) - base
        vector = base + scale * _delta(tau, part, density)
        pieces = vector.split([suite.base[name].numel() for name in group])
        for name, piece in zip(group, pieces, strict=True):
            merged[name] = piece.view(suite.base[name].shape)
    return merged


def _flat(state: StateDict, names: Sequence[str]) -> torch.Tensor:
    return torch.cat([state[name].flatten() for name in names])


def _delta(tau: torch.Tensor, part: Part | None, density: float) -> torch.Tensor:
    """The merged task vector of ``tau``, ``[tasks, elements]``."""
    tasks, count = tau.shape
    total = tau.sum(0)
    weighted, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for row in tau:
        low, high = _at(row.abs(), int(count * CLIP), int(count * (1 - CLIP) - 1))
        if low >= high:
            continue
        size = row.abs().clamp(low, high)
        score = torch.ones_like(row)
        if part != "intra":
            score = torch.exp(tasks * (((size - low) / (high - low)) ** 2 - 1))
        if part != "inter":
            score = score * torch.tanh(row * total)
        rank = min(int(count * (1 - density)), count - 1)
        threshold = score.min() if part == "drop" else score.kthvalue(rank + 1).values
        peak = score.max()
        if threshold >= peak:
            continue
        share = ((score - threshold) / (peak - threshold)).clamp(min=0)
        if part == "rescale":
            share = (share > 0).float()
        weighted += share * size * row.sign()
        divisor += share
    return weighted / divisor.clamp(min=1e-12)


def _at(values: torch.Tensor, *ranks: int) -> torch.Tensor:
    """The values of these 0-based ranks."""
    return torch.from_numpy(numpy.partition(values.numpy(), sorted(set(ranks))))[list(ranks)]


def solved(suite: Suite, matrices: Sequence[str], anchor: float, prior: float) -> StateDict:
    """The merged task vectors of ``refine: solve`` and ``spectrum: auto`` with another prior.

    In place of PCB's merge, the sum of the task vectors times ``prior``, which is also what is
    merged of all that is no matrix. In float64, by an inverse and a decomposition.
    """
    merged = {}
    for name, base in suite.base.items():
        taus = [
            (expert[name] - base).double().flatten(1 if base.ndim > 1 else 0)
            for expert in suite.experts
        ]
        total = sum(taus)
        if name in matrices:
            total = evened(solution(taus, prior * total, anchor), agreement(taus))
        else:
            total = prior * total
        merged[name] = total.reshape(base.shape).to(base.dtype)
    return merged


def solution(taus: Sequence[torch.Tensor], prior: torch.Tensor, anchor: float) -> torch.Tensor:
    """``refine: solve`` for one matrix ``[out, in]`` and any prior, all weights 1."""
    grams = [tau.T @ tau / tau.square().sum() for tau in taus]
    system = sum(grams)
    ridge = anchor * system.diagonal().mean()
    right = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True)) + ridge * prior
    return torch.linalg.solve(system + ridge * torch.eye(len(system)), right, left=False)


def agreement(taus: Sequence[torch.Tensor]) -> float:
    """The norm of the task vectors' mean over their root-mean-square norm."""
    squares = sum(tau.square().sum() for tau in taus)
    return float(sum(taus).norm() / (len(taus) * squares).sqrt())


def evened(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """Singular values raised to ``exponent``, Frobenius norm kept."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    raised = values**exponent
    return (left * (raised * values.norm() / raised.norm())) @ right
