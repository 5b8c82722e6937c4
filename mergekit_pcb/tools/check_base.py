"""Whether the base is the base: the commonest mistake, looked for in a few tensors.

Experts of an instruct model over the pretrained one (or the reverse) share the whole step
between the two. Their task vectors then point the same way, and their size is that of the
step. Task vectors of experts that were trained from the base hardly do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mergekit_pcb.core.vectors import Aligned
from mergekit_pcb.files import listed
from mergekit_pcb.host.inputs import Inputs
from mergekit_pcb.host.plan import Plan

#: Bytes that are read at most, of all inputs together.
BUDGET = 256 * 2**20
#: Elements that are looked at together.
PIECE = 1 << 20
#: Tensors that are looked at, spread over the model.
TENSORS = 8
#: Cosine of two task vectors from which on more of them is shared than is their own.
SHARED = 0.5
#: A task vector of such a size, relative to the base, is no fine-tuning.
FAR = 0.7


def remarks(inputs: Inputs, names: Sequence[str]) -> Iterator[str]:
    """What the task vectors say of the base; ``names`` are the models', the base's first."""
    chosen = _chosen(inputs)
    if not chosen and any(size.dimensions >= 2 for size in inputs.sizes.values()):
        yield (
            f"whether {names[0]} is the base was not looked at: no matrix of all models together "
            f"is as small as {BUDGET >> 20} MiB"
        )
    sums = _products(_sample(inputs, chosen))
    if sums is None:
        return
    base, *norms = [math.sqrt(float(sums[i, i])) for i in range(len(sums))]
    tasks = range(1, len(sums))
    cosine = {
        (i, j): float(sums[i, j]) / (norms[i - 1] * norms[j - 1])
        for i in tasks
        for j in tasks
        if i < j and norms[i - 1] and norms[j - 1]
    }
    alike = {pair: value for pair, value in cosine.items() if value > SHARED}
    if alike:
        models = sorted({i for pair in alike for i in pair})
        sizes = [100 * norms[i - 1] / base for i in models] if base else [math.inf]
        yield (
            f"the changes of {listed([names[i] for i in models])} point the same way (cosines from "
            f"{min(alike.values()):.2f}, sizes from {min(sizes):.2g} % of the base's): either "
            f"{names[0]} is not the model they were trained from, such as a pretrained model under "
            "experts of its instruct version, or they are versions of one model; choose the base "
            "they were trained from"
        )
    for i in tasks:
        if base and norms[i - 1] > FAR * base:
            yield (
                f"{names[i]} lies as far from {names[0]} as models with nothing in common "
                f"({100 * norms[i - 1] / base:.0f} % of its size); choose the base that it was "
                "trained from"
            )


def _chosen(inputs: Inputs) -> list[Any]:
    """Tasks of matrices that all models have alike, spread over the model, within the budget.

    Where none is as small as its share, as many as fit of the smallest kind.
    """
    matrices = [
        (task, size.nbytes)
        for task in inputs.plan.tasks
        if (size := inputs.sizes.get(task.output_weight.name)) is not None
        and task.output_weight.vocabulary_axis is None
        and 0 < size.nbytes <= BUDGET
        and size.dimensions >= 2
    ]
    most = max(BUDGET // TENSORS, min((nbytes for _, nbytes in matrices), default=0))
    fitting = [task for task, nbytes in matrices if nbytes <= most]
    count = min(TENSORS, BUDGET // max(1, most))
    step = max(1, len(fitting) // max(1, count))
    return fitting[step // 2 :: step][:count]


def _sample(inputs: Inputs, chosen: Sequence[Any]) -> Iterator[Aligned]:
    plan = inputs.plan
    if chosen:
        yield from Inputs(Plan(chosen, plan.options)).tensors(torch.device("cpu"))


def _products(tensors: Iterator[Aligned]) -> torch.Tensor | None:
    """Inner products of the base and all task vectors, summed over tensors."""
    total = None
    for tensor in tensors:
        for start in range(0, len(tensor), PIECE):
            base, *tasks = (
                flat[start : start + PIECE].double() for flat in (tensor.base, *tensor.tasks)
            )
            rows = torch.stack([base, *(task - base for task in tasks)])
            total = rows @ rows.T if total is None else total + rows @ rows.T
    return total if total is not None and total.isfinite().all() else None
