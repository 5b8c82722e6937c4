"""PCB taken apart for models in memory: what each task contributes, and their weighted sum.

``merge = base + scale · Σ_i weight_i · contribution_i``, so whoever searches or learns weights
measures once (:func:`contributions`) and sums as often as needed (:func:`combine`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mergekit_pcb import dare, merging, whole_model
from mergekit_pcb.errors import PCBError
from mergekit_pcb.method import PARAMETERS
from mergekit_pcb.statistics import Recipe, measure
from mergekit_pcb.task_vectors import Aligned, promoted, working_dtype

StateDict = dict[str, torch.Tensor]
Model = Mapping[str, torch.Tensor] | torch.nn.Module
Weights = Sequence[float] | torch.Tensor | Mapping[str, torch.Tensor]


def contributions(
    base: Model,
    experts: Sequence[Model],
    *,
    density: float | Sequence[float] = 0.1,
    clip: float = 1e-4,
    scope: str = "tensor",
    dare_density: float | Sequence[float] = 1.0,
    seed: int = 0,
) -> list[StateDict]:
    """What the ``weight`` of each expert multiplies, in every floating-point tensor.

    ``base`` and ``experts`` are modules or state dicts with the same tensors; parameters are
    those of ``merge_method: pcb``, with one ``density`` and ``dare_density`` for all or one for
    each expert. Returns a state dict per expert, float32 (float64 for float64 inputs), of
    the tensors' shapes, outside of autograd. Raises :class:`~mergekit_pcb.errors.PCBError`.
    """
    states = [_state_dict(model) for model in (base, *experts)]
    recipe = _recipe(len(experts), density, clip, dare_density, seed)
    scope = _valid("scope", scope)
    walk = [_aligned(name, states) for name in states[0] if states[0][name].is_floating_point()]
    names = ["the base", *(f"expert {number}" for number in range(len(experts)))]
    with whole_model.explained(None, names[0], names[1:]):
        if scope == whole_model.MODEL and walk:
            whole = whole_model.of_groups(walk, recipe, names)
        found: list[StateDict] = [{} for _ in experts]
        for aligned in walk:
            dtype = working_dtype(aligned.base.dtype)
            if scope == whole_model.MODEL:
                statistics = replace(whole, dtype=max(whole.dtype, dtype, key=_itemsize))
            else:
                statistics = measure(lambda one=aligned: [one], len(aligned), recipe, dtype)  # type: ignore[misc]
            parts = merging.contributions(aligned, statistics)
            for state, part in zip(found, parts, strict=True):
                state[aligned.name] = part.to(dtype).view(states[0][aligned.name].shape)
    return found


def combine(
    base: Model,
    contributions: Sequence[Mapping[str, torch.Tensor]],
    weights: Weights,
    scale: float | torch.Tensor = 1.0,
) -> StateDict:
    """``base + scale · Σ_i weight_i · contribution_i`` in the base's dtypes.

    ``weights`` holds one number per contribution, or maps names of tensors to so many numbers.
    Where it (or ``scale``) requires gradients, so does the result. Tensors without
    contributions, such as integer buffers, are the base's own.
    """
    merged = dict(_state_dict(base))
    names = contributions[0] if contributions else ()
    for name in names:
        row = weights[name] if isinstance(weights, Mapping) else weights
        if len(row) != len(contributions):
            raise PCBError(
                f"combine {len(contributions)} contributions with {len(row)} weights",
                "each contribution has one",
                "give as many weights",
            )
        parts = [part[name] for part in contributions]
        delta = sum(
            (weight * part for weight, part in zip(row, parts, strict=True)),
            torch.zeros_like(parts[0]),
        )
        start = merged[name]
        merged[name] = (start.detach().to(delta.dtype) + scale * delta).to(start.dtype)
    return merged


def _state_dict(model: Model) -> Mapping[str, torch.Tensor]:
    return model.state_dict() if isinstance(model, torch.nn.Module) else model


def _aligned(name: str, states: Sequence[Mapping[str, torch.Tensor]]) -> Aligned:
    for number, state in enumerate(states[1:]):
        if name not in state:
            raise PCBError(
                f"merge tensor {name}", f"expert {number} lacks it", "give models of one kind"
            )
        if state[name].shape != states[0][name].shape:
            raise PCBError(
                f"merge tensor {name}",
                f"it has shape {tuple(states[0][name].shape)} in the base but "
                f"{tuple(state[name].shape)} in expert {number}",
                "merge only models fine-tuned from this base",
            )
    tensors = [state[name] for state in states]
    dtype = promoted(tensors)
    base, *tasks = [tensor.to(dtype) for tensor in tensors]
    return Aligned.of(name, base, tasks)


def _recipe(
    count: int,
    density: float | Sequence[float],
    clip: float,
    dare_density: float | Sequence[float],
    seed: int,
) -> Recipe:
    if not count:
        raise PCBError("merge with pcb", "there is no expert", "give at least one")
    kept = _for_each("density", density, count)
    drawn = _for_each("dare_density", dare_density, count)
    plan = dare.plan(drawn, _valid("seed", seed), range(count))
    return Recipe(tuple(kept), _valid("clip", clip), plan)


def _for_each(name: str, value: float | Sequence[float], count: int) -> list[float]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if values is None:
        return [_valid(name, value)] * count
    if len(values) != count:
        raise PCBError(
            f"use {len(values)} values of {name}", f"there are {count} experts", "give one for each"
        )
    return [_valid(name, one) for one in values]


def _valid(name: str, value: Any) -> Any:
    (spec,) = [spec for spec in PARAMETERS if spec.name == name]
    return spec.validate(value)


def _itemsize(dtype: torch.dtype) -> int:
    return dtype.itemsize
