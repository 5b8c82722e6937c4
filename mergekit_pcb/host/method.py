"""The mergekit method ``pcb``: groups of tensors and their parameters in, merged tensors out.

mergekit calls it at two doors. In memory it brings all groups at once. In a graph it brings
one group a call, and what is known of the whole merge comes along as a parameter, put there
by the node that was planned for it (``nodes.py``). Importing this module registers the method.
It imports only what mergekit's registry has loaded, because it is imported while mergekit's
package of merge methods is half initialised (see ``_autoload.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    TensorGroup,
)
from mergekit.merge_methods.dtype import align_dtype

from mergekit_pcb import _autoload
from mergekit_pcb.core import merge, refine
from mergekit_pcb.core.measure import Statistics, check_finite, finite, measure_together
from mergekit_pcb.core.refine import Refinement, Spectrum
from mergekit_pcb.core.vectors import Aligned, working_dtype
from mergekit_pcb.errors import PCBError
from mergekit_pcb.host.groups import (
    aligned,
    beyond,
    check_shapes,
    explained_for,
    is_constant,
    is_infinite,
    name_of,
    warn_of_one_mask,
)
from mergekit_pcb.host.kinds import Kind, assumed, fitted, layout_of, unrefined
from mergekit_pcb.host.parameters import (
    MODEL,
    PARAMETERS,
    Values,
    density_remarks,
    one_recipe,
    recipe_of,
    refinement_of,
    refines,
    scope_of,
)

LOG = logging.getLogger(__name__)
#: The parameter under which a group comes with what is known of its merge.
KNOWN = "known"
_IN_MEMORY = object()  # in its place until all groups of a call in memory are seen


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


class PCBMerge(GroupMergeMethod):
    """PCB-Merging (Du et al., NeurIPS 2024, arXiv 2410.02396) of the inputs of one tensor.

    Inputs are borrowed, of one shape, floating dtype and device; the result is a new tensor
    of that shape and dtype, outside of autograd. Raises :class:`PCBError`, a
    ``ValueError``, for what cannot be merged.
    """

    spec = MergeMethodSpec(
        name="pcb",
        parameters=PARAMETERS,
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
        pretty_name="PCB-Merging",
        reference_url="https://arxiv.org/abs/2410.02396",
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
    )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Refuse what mergekit's contract would refuse, in sentences."""
        where = f" in {group_name}" if group_name else ""
        for position, input_id in enumerate(input_ids):
            if input_id in input_ids[:position]:
                raise PCBError(
                    f"merge {input_id} twice{where}",
                    "every task vector competes once",
                    "list the model once, and raise its weight if it should count for more",
                )
        if base_id is None:
            raise PCBError(
                f"merge with pcb{where}",
                "task vectors are differences from a base model, and none is given",
                "add `base_model:` to the configuration (in Python: base= or base_index=)",
            )
        if base_id not in input_ids:
            raise PCBError(
                f"merge{where or ' with pcb'}",
                f"the base model {base_id} lacks it",
                "choose a base that has every tensor, or leave this one out "
                "(mergekit-pytorch: --tensor-intersection)",
            )
        if len(input_ids) < 2:
            raise PCBError(
                f"merge with pcb{where}",
                f"only the base model {base_id} is given",
                "add at least one model fine-tuned from it",
            )
        super().validate_inputs(input_ids, base_id, group_name=group_name)

    def _bind_parameters(
        self, groups: Sequence[TensorGroup], parameters: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Bind what a call in memory gives; a graph has resolved its parameters while planning."""
        for group in groups:
            check_shapes(group)
        bound = super()._bind_parameters(groups, parameters)
        return [{**values, KNOWN: _IN_MEMORY} for values in bound]

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Merge the groups; under ``scope: model`` in memory, measure all of them first."""
        if not groups:
            return ()
        known = parameters[0].get(KNOWN)
        if known is None:
            parameters = [
                {**values, KNOWN: _unplanned(group, values)}
                for group, values in zip(groups, parameters, strict=True)
            ]
        elif known is _IN_MEMORY:
            parameters = in_memory(groups, parameters, input_dtypes)
        merged: tuple[torch.Tensor, ...] = super()._execute(
            groups, parameters, options, input_dtypes=input_dtypes, out_dtype=out_dtype
        )
        for group, tensor in zip(groups, merged, strict=True):
            # The methods' own check was of the dtype before this cast.
            if out_dtype is not None and not is_constant(group) and not finite(tensor):
                raise beyond(out_dtype, name_of(group))
        return merged

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        if is_constant(group):
            constant: torch.Tensor = group.entries[0].tensor
            return constant.clone()
        with explained_for(group):
            prepared = prepare(group, parameters)
            if (observe := parameters[KNOWN].observe) is not None:
                observe(prepared)
            merged = prepared.merged()
        return merged.view(group.entries[0].tensor.shape)


def in_memory(
    groups: Sequence[TensorGroup],
    parameters: Sequence[Values],
    dtypes: Sequence[torch.dtype | None],
    kinds: Mapping[str, Kind] | None = None,
) -> list[dict[str, Any]]:
    """Complete the bound parameters of groups that are all at hand: their whole-model statistics.

    ``dtypes`` are what the groups are cast to before they are merged, ``kinds`` what the groups
    are, by name; by default all of two dimensions are assumed to be weights of linear layers.
    """
    names = [name_of(group) for group in groups]
    ids = [[task.id for task in group.non_base] for group in groups]
    for remark in density_remarks(parameters).values():
        LOG.warning(remark)
    if any(
        group.metadata.name is None and min(values["dare_density"].values()) < 1
        for group, values in zip(groups, parameters, strict=True)
    ):
        warn_of_one_mask()
    statistics = None
    if scope_of(list(zip(names, parameters, strict=True))) == MODEL:
        if path := parameters[0]["statistics"]:
            raise PCBError(
                f"use statistics {path} in memory",
                "they belong to checkpoint files, and these models have none",
                "leave `statistics` out",
            )
        recipes = map(recipe_of, parameters, ids)
        recipe = one_recipe(list(zip(names, recipes, strict=True)))
        cast = [align_dtype(group, dtype) for group, dtype in zip(groups, dtypes, strict=True)]
        with explained_for(groups[0], of_whole_model=True):
            flat = [aligned(group) for group in cast if not is_infinite(group)]
            statistics = measure_together(flat, recipe) if flat else None
    chosen = {
        name: group.entries[0].tensor.ndim
        for name, group, values in zip(names, groups, parameters, strict=True)
        if refines(values)
    }
    if kinds is None:
        kinds = dict.fromkeys(names, Kind.ASSUMED)
        if matrices := [name for name, dimensions in chosen.items() if dimensions == 2]:
            LOG.warning(assumed(matrices, "nothing is known of tensors in memory but their shapes"))
    elif unknown := [
        name
        for name, dimensions in chosen.items()
        if dimensions > 1 and kinds.get(name, Kind.UNKNOWN) is Kind.UNKNOWN
    ]:
        LOG.warning(unrefined(unknown))
    measured = statistics is not None
    return [
        {**values, KNOWN: Known(tasks, statistics, measured, kind=kinds.get(name, Kind.UNKNOWN))}
        for name, values, tasks in zip(names, parameters, ids, strict=True)
    ]


def _unplanned(group: TensorGroup, values: Values) -> Known:
    """What is known of a tensor whose merge was not planned by this package: only itself."""
    if values["scope"] == MODEL or values["statistics"]:
        raise _not_planned("scope: model", group)
    # Masks go by position, and models that lack the tensor are not seen.
    if any(density < 1 for density in values["dare_density"].values()):
        raise _not_planned("dare_density", group)
    if refines(values):
        raise _not_planned("refine or spectrum", group)
    return Known([task.id for task in group.non_base])


def _not_planned(asked: str, group: TensorGroup) -> PCBError:
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
    ids = [task.id for task in group.non_base]
    # An optional tensor may be missing in some of the models.
    positions = [known.tasks.index(task) for task in ids]
    if known.statistics is None:
        if parameters["scope"] == MODEL:  # an executor that dropped an argument
            raise _not_planned("scope: model", group)
        statistics = measure_together([flat], recipe_of(parameters, ids, positions))
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


if not any(method.spec.name == PCBMerge.spec.name for method in registry.registered_methods()):
    registry.register(PCBMerge())
_autoload.watch()
