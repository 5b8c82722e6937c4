"""One tensor, ready to be merged: its inputs, its statistics, and what is known of its merge."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_pcb.core import merge, refine
from mergekit_pcb.core.measure import Statistics, check_finite, measure_tensor
from mergekit_pcb.core.refine import Refinement, Spectrum
from mergekit_pcb.core.vectors import Aligned, working_dtype
from mergekit_pcb.errors import PCBError
from mergekit_pcb.host.groups import aligned, name_of
from mergekit_pcb.host.kinds import Kind, fitted, layout_of
from mergekit_pcb.host.parameters import MODEL, Values, recipe_of, refinement_of

#: The parameter under which a group comes with what is known of its merge.
KNOWN = "known"


@dataclass(frozen=True)
class Prepared:
    """One tensor, ready to be merged; what ``report`` and ``search`` look at.

    ``positions`` are the places of its tasks in the configuration, from 0, without the base.
    """

    aligned: Aligned
    statistics: Statistics
    positions: Sequence[int]
    weights: Sequence[float]
    scale: float
    refinement: Refinement | None = None

    def merged(self) -> torch.Tensor:
        """A new flat tensor of the base's dtype."""
        own = self.aligned, self.statistics, self.weights, self.scale
        return merge.merge(*own) if self.refinement is None else refine.merge(*own, self.refinement)

    def contributions(self) -> tuple[tuple[torch.Tensor, ...], Spectrum | None]:
        """What the ``weight`` of each task multiplies, flat, and the step on their sum, if any."""
        if self.refinement is None:
            return merge.contributions(self.aligned, self.statistics), None
        return refine.contributions(self.aligned, self.statistics, self.refinement)


@dataclass(frozen=True)
class Known:
    """What is known of the merge that a tensor belongs to.

    ``tasks`` are all of the configuration's, also where a tensor is missing in some.
    ``statistics`` are those of the whole model, under ``scope: model``; ``measured`` says that
    this tensor took part in them, so that it is finite. ``observe`` is shown every tensor.
    ``kind`` is what the tensor is to the activations, where its matrices are refined, and
    ``shape`` that of the module's own tensor, if it is known.
    """

    tasks: Sequence[Hashable]
    statistics: Statistics | None = None
    measured: bool = False
    observe: Callable[[Prepared], None] | None = None
    kind: Kind = Kind.ELEMENTS
    shape: tuple[int, ...] | None = None
    #: Whose DARE masks it gets, where it is tied to an earlier one.
    tied_to: str | None = None


def not_planned(asked: str, group: TensorGroup) -> PCBError:
    return PCBError(
        f"use {asked} for tensor {name_of(group)}",
        "this merge was not planned by mergekit-pcb, which so knows neither its other tensors nor "
        "its other models (the plan was made by hand, by another mergekit than 0.1.5, or behind a "
        "wrapper)",
        "run it with `mergekit-pcb yaml` or mergekit's own commands, version 0.1.5, or use scope: "
        "tensor without DARE and refine",
    )


def prepare(group: TensorGroup, parameters: Values) -> Prepared:
    """Measure one tensor, or take its part of the whole model's statistics."""
    flat, known = aligned(group), parameters[KNOWN]
    if known.tied_to is not None:
        flat = replace(flat, drawn_as=known.tied_to)
    ids = [task.id for task in group.non_base]
    # An optional tensor may be missing in some of the models.
    positions = [known.tasks.index(task) for task in ids]
    if known.statistics is None:
        if parameters["scope"] == MODEL:  # an executor that dropped an argument
            raise not_planned("scope: model", group)
        statistics = measure_tensor(flat, recipe_of(parameters, ids, positions))
    else:
        if not known.measured:
            check_finite(flat)
        statistics = known.statistics.of(positions)
        if working_dtype(flat.base.dtype) == torch.float64:
            statistics = replace(statistics, dtype=torch.float64)
    weights = [parameters["weight"][task] for task in ids]
    shape = group.entries[0].tensor.shape
    layout = layout_of(fitted(known.kind, known.shape, shape), shape)
    refinement = refinement_of(parameters, layout)
    return Prepared(flat, statistics, positions, weights, parameters["lambda"], refinement)
