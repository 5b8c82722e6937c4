"""``scope: model``: statistics of all tensors of a plan, measured or taken from a file.

The paper's setting. Nothing here computes: it passes over the inputs and says what was found.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from mergekit_pcb.core.measure import Recipe, Statistics, measure
from mergekit_pcb.core.vectors import Aligned
from mergekit_pcb.errors import PCBError
from mergekit_pcb.host import statistics_file
from mergekit_pcb.host.groups import explained
from mergekit_pcb.host.inputs import Inputs
from mergekit_pcb.host.statistics_file import Document

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """Statistics of a whole model, and the names of the tensors that they are of.

    Not a tuple or dict: mergekit's executor makes those anew between devices.
    """

    statistics: Statistics
    names: frozenset[str]
    #: How often each checkpoint was read for this.
    reads: int


def statistics_of(inputs: Inputs) -> Measured:
    """What a merge with ``scope: model`` needs before its first tensor.

    Measured on the merge's device, with a progress bar on a terminal unless the options say
    quiet; or read from the configuration's ``statistics``, if they fit.
    """
    inputs.refuse_unmergeable()
    for name in inputs.left_aside:
        LOG.warning(
            "tensor %s takes no part in the statistics of the whole model, because not every "
            "input holds it in one shape; it is merged with them all the same",
            name,
        )
    if path := inputs.plan.statistics_file:
        return Measured(reuse(inputs, pathlib.Path(path)), frozenset(inputs.sizes), 0)
    return _measure(inputs)


def reuse(inputs: Inputs, path: pathlib.Path) -> Statistics:
    """Statistics measured before; refuses those that do not fit the plan."""
    document = statistics_file.read(path)
    obstacle = statistics_file.difference(document, _wanted(inputs))
    if obstacle is not None:
        raise PCBError(
            f"use statistics {path}",
            obstacle,
            "measure again with `mergekit-pcb measure`, or leave `statistics` out",
        )
    return document.statistics()


def measure_to_document(inputs: Inputs) -> Document:
    """Measure a plan, whatever ``statistics`` it names, and say what was found."""
    wanted = _wanted(inputs)
    inputs.refuse_unmergeable()
    before = wanted.marks()
    measured = _measure(inputs)
    document = statistics_file.compose(
        measured.statistics,
        wanted,
        tensors=len(inputs.sizes),
        elements=sum(size.elements for size in inputs.sizes.values()),
        reads=measured.reads,
    )
    if changed := [path for path, mark in wanted.marks().items() if before[path] != mark]:
        raise PCBError(
            "measure this merge",
            f"{changed[0]} was changed meanwhile",
            "measure again when nothing writes to the models",
        )
    return document


def _recipe_of(inputs: Inputs) -> Recipe:
    if inputs.plan.recipe is None:
        raise PCBError(
            "measure this merge",
            "its scope is tensor, where each tensor has statistics of its own",
            "write `scope: model` under the top-level `parameters:`",
        )
    return inputs.plan.recipe


def _wanted(inputs: Inputs) -> statistics_file.Wanted:
    plan = inputs.plan
    return statistics_file.Wanted(
        _recipe_of(inputs),
        plan.dtype,
        statistics_file.digest_of(inputs.layout()),
        [(str(model), inputs.files(model)) for model in (plan.base, *plan.models)],
        inputs.tokenizer_source(),
    )


def _measure(inputs: Inputs) -> Measured:
    plan, sizes = inputs.plan, inputs.sizes
    count = sum(size.elements for size in sizes.values())
    nbytes = sum(size.nbytes for size in sizes.values())
    reads = 0
    with tqdm(
        desc="Measuring whole model",
        unit="B",
        unit_scale=True,
        disable=True if plan.options.quiet else None,  # None: only on a terminal
        leave=False,
    ) as bar:

        def start_pass() -> Iterator[Aligned]:
            nonlocal reads
            reads += 1
            bar.total = max(2, reads) * nbytes
            number = 0
            for tensor in inputs.tensors(plan.device):
                number, name = number + 1, tensor.name
                yield tensor
                del tensor  # before the next one is loaded
                bar.set_postfix_str(f"pass {reads}, tensor {number}/{len(sizes)}", refresh=False)
                bar.update(sizes[name].nbytes)

        inputs_are_wide = any(size.wide for size in sizes.values())
        wide = inputs_are_wide if plan.dtype is None else plan.dtype == torch.float64
        with explained(None, plan.base, plan.models):
            statistics = measure(
                start_pass, count, _recipe_of(inputs), torch.float64 if wide else torch.float32
            )
    LOG.info("measured %d tensors of %d elements in %d passes", len(sizes), count, reads)
    return Measured(statistics, frozenset(sizes), reads)
