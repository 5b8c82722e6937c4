"""A merge in memory: what is known of it once all of its groups are there."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.dtype import align_dtype

from mergekit_pcb.core.measure import Recipe, Statistics, measure
from mergekit_pcb.core.vectors import Aligned, promoted, working_dtype
from mergekit_pcb.errors import PCBError
from mergekit_pcb.host.groups import (
    aligned,
    explained_for,
    further_names,
    is_infinite,
    name_of,
    place_of,
    warn_of_one_mask,
)
from mergekit_pcb.host.kinds import Kind, assumed, unrefined
from mergekit_pcb.host.parameters import (
    MODEL,
    Values,
    density_remarks,
    one_recipe,
    recipe_of,
    refines,
    scope_of,
)
from mergekit_pcb.host.prepared import KNOWN, Known

LOG = logging.getLogger(__name__)


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
    # One tensor of several names has one rank and one mask.
    further = further_names({i: place_of(group.tensors) for i, group in enumerate(groups)})
    if scope_of(list(zip(names, parameters, strict=True))) == MODEL:
        if path := parameters[0]["statistics"]:
            raise PCBError(
                f"use statistics {path} in memory",
                "they belong to checkpoint files, and these models have none",
                "leave `statistics` out",
            )
        recipes = map(recipe_of, parameters, ids)
        recipe = one_recipe(list(zip(names, recipes, strict=True)))
        with explained_for(groups[0], of_whole_model=True):
            statistics = _measured(groups, dtypes, recipe, further)
    dimensions = {
        name: group.entries[0].tensor.ndim
        for name, group, values in zip(names, groups, parameters, strict=True)
        if refines(values)
    }
    kinds = _known_kinds(names, kinds, dimensions)
    measured = statistics is not None
    found = []
    for number, (name, values, tasks) in enumerate(zip(names, parameters, ids, strict=True)):
        tied = names[further[number]] if number in further else None
        known = Known(
            tasks,
            statistics,
            measured and tied is None,
            kind=kinds.get(name, Kind.UNKNOWN),
            tied_to=tied,
        )
        found.append({**values, KNOWN: known})
    return found


def _known_kinds(
    names: Sequence[str], kinds: Mapping[str, Kind] | None, dimensions: Mapping[str, int]
) -> Mapping[str, Kind]:
    """The kinds, assumed where there are none; says what that means for tensors to be refined.

    ``dimensions`` are theirs.
    """
    if kinds is None:
        if matrices := [name for name, count in dimensions.items() if count == 2]:
            LOG.warning(assumed(matrices, "nothing is known of tensors in memory but their shapes"))
        return dict.fromkeys(names, Kind.ASSUMED)
    unknown = [
        name
        for name, count in dimensions.items()
        if count > 1 and kinds.get(name, Kind.UNKNOWN) is Kind.UNKNOWN
    ]
    if unknown:
        LOG.warning(unrefined(unknown))
    return kinds


def _measured(
    groups: Sequence[TensorGroup],
    dtypes: Sequence[torch.dtype | None],
    recipe: Recipe,
    further: Container[int],
) -> Statistics | None:
    """The statistics of all groups together, each cast when it is looked at."""
    own = [
        (group, dtype or promoted(group.tensors))
        for number, (group, dtype) in enumerate(zip(groups, dtypes, strict=True))
        if number not in further and not is_infinite(group, dtype)
    ]
    if not own:
        return None
    if len(devices := {str(group.entries[0].tensor.device) for group, _ in own}) > 1:
        raise PCBError(
            "measure these models together",
            f"their tensors lie on {' and '.join(sorted(devices))}",
            "move them to one device, or use scope: tensor",
        )
    ready = [
        aligned(group) if all(tensor.dtype == dtype for tensor in group.tensors) else None
        for group, dtype in own
    ]

    def start_pass() -> Iterator[Aligned]:
        for (group, dtype), tensor in zip(own, ready, strict=True):
            yield aligned(align_dtype(group, dtype)) if tensor is None else tensor

    widest = max((working_dtype(dtype) for _, dtype in own), key=lambda dtype: dtype.itemsize)
    count = sum(group.entries[0].tensor.numel() for group, _ in own)
    at_hand = all(tensor is not None for tensor in ready)  # else a look ahead costs casts
    return measure(start_pass, count, recipe, widest, at_hand=at_hand)
