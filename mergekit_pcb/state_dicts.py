"""PCB taken apart for models in memory: what each task contributes, and their weighted sum.

``merge = base + scale · Σ_i weight_i · contribution_i``, so whoever searches or learns weights
measures once (:func:`contributions`) and sums as often as needed (:func:`combine`). Only a
spectrum that is evened is no sum: it is a step after it.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.dtype import align_dtype

from mergekit_pcb.core.measure import finite
from mergekit_pcb.core.refine import Spectrum, apply
from mergekit_pcb.core.vectors import working_dtype
from mergekit_pcb.errors import PCBError
from mergekit_pcb.host.groups import (
    explained,
    explained_for,
    further_names,
    is_infinite,
    name_of,
    place_of,
    refuse_beyond,
    refuse_mixed,
)
from mergekit_pcb.host.in_memory import in_memory
from mergekit_pcb.host.kinds import kinds_of
from mergekit_pcb.host.method import PCBMerge
from mergekit_pcb.host.prepared import prepare

LOG = logging.getLogger(__name__)
#: What quantised weights and complex ones are stored in.
QUANTISED = (
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.qint8, torch.quint8, torch.qint32,
    torch.complex64, torch.complex128,
)  # fmt: skip
StateDict = dict[str, torch.Tensor]
Model = Mapping[str, torch.Tensor] | torch.nn.Module
Weights = Sequence[float] | torch.Tensor | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Contributions(Sequence[StateDict]):
    """What the ``weight`` of each expert multiplies, and what is done to the weighted sum.

    ``spectra`` are by name, for tensors whose singular values are evened after summing. ``tied``
    maps the further names of a tensor to its first one, such as a head's to the embedding's.
    """

    experts: Sequence[StateDict]
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, number: Any) -> Any:
        return self.experts[number]


def contributions(
    base: Model,
    experts: Sequence[Model],
    *,
    density: float | Sequence[float] = 0.1,
    clip: float = 1e-4,
    scope: str = "tensor",
    dare_density: float | Sequence[float] = 1.0,
    seed: int = 0,
    refine: str = "none",
    anchor: float = 0.1,
    spectrum: float | str | None = None,
    architecture: torch.nn.Module | None = None,
) -> Contributions:
    """What the ``weight`` of each expert multiplies, in every floating-point tensor.

    ``base`` and ``experts`` are modules or state dicts with the same tensors; one that has several
    names in all of them is merged once. What is no floating point is not merged (where it looks
    like quantised weights that differ, that is an error), and what only experts have is left out,
    which is logged. Parameters are
    those of ``merge_method: pcb``, with one ``density`` and ``dare_density`` for all or one for
    each expert. The modules of ``architecture`` (of ``base``, where it is one) say which tensors
    are matrices to refine; without one, all of two dimensions are taken for ``[out, in]``, which
    is logged. Returns a state dict per expert, float32 (float64 for float64 inputs), of the
    tensors' shapes, outside of autograd. Raises :class:`~mergekit_pcb.errors.PCBError`.
    """
    experts = _listed(experts, density=density, dare_density=dare_density)
    states = [_state_dict(model) for model in (base, *experts)]
    _refuse_other_tensors(states)
    tied = _tied(states)
    names = [
        name
        for name, tensor in states[0].items()
        if tensor.is_floating_point() and name not in tied
    ]
    groups = [group for group in (_group(name, states) for name in names) if not is_infinite(group)]
    names = [name_of(group) for group in groups]
    apart = further_names({name: _place(states[:1], name) for name in names})
    for name in sorted(apart)[:1]:
        LOG.warning(
            "%s and %s are one tensor in the base and not in all experts; they are merged apart",
            apart[name],
            name,
        )
    tied = {name: first for name, first in tied.items() if first in names}
    given = {
        "density": density,
        "clip": clip,
        "scope": scope,
        "dare_density": dare_density,
        "seed": seed,
        "refine": refine,
        "anchor": anchor,
        "spectrum": spectrum,
    }
    method = PCBMerge()
    bound = method._bind_parameters(groups, given)
    if architecture is None and isinstance(base, torch.nn.Module):
        architecture = base
    kinds = None if architecture is None else kinds_of(architecture)
    if groups:
        bound = in_memory(groups, bound, [None] * len(groups), kinds)
    found: list[StateDict] = [{} for _ in experts]
    spectra: dict[str, Spectrum] = {}
    for name, group, values in zip(names, groups, bound, strict=True):
        group = align_dtype(group)
        with explained_for(group):
            parts, step = prepare(group, values).contributions()
        tensor = group.entries[0].tensor
        for state, part in zip(found, parts, strict=True):
            state[name] = part.to(working_dtype(tensor.dtype)).view(tensor.shape)
        if step is not None:
            spectra[name] = step
    for name, first in tied.items():
        for state in found:
            state[name] = state[first]
    return Contributions(found, spectra, tied)


def combine(
    base: Model,
    contributions: Contributions,
    weights: Weights,
    scale: float | torch.Tensor = 1.0,
) -> StateDict:
    """``base + scale · Σ_i weight_i · contribution_i`` in the base's dtypes.

    The sum's spectrum is evened where the contributions say so. ``weights`` holds one number
    per contribution, or maps names of tensors to so many numbers. Where it (or ``scale``)
    requires gradients, so does the result. Tensors without contributions, such as integer
    buffers, are the base's own; tied ones are one tensor. Raises
    :class:`~mergekit_pcb.errors.PCBError`.
    """
    if not isinstance(contributions, Contributions):
        raise PCBError(
            f"combine a {type(contributions).__name__}",
            "it does not say whether a step follows on the sum",
            "give what contributions() returned, or Contributions(…) of your own state dicts",
        )
    merged = dict(base.state_dict() if isinstance(base, torch.nn.Module) else base)
    names = contributions[0] if len(contributions) else {}
    for part in contributions:
        _refuse_other_base(merged, part)
        if part.keys() != names.keys():
            raise PCBError(
                "combine these contributions",
                f"not all have {min(part.keys() ^ names.keys())}",
                "give each the same tensors",
            )
    if isinstance(weights, Mapping) and (
        missing := names.keys() - contributions.tied.keys() - weights.keys()
    ):
        raise PCBError(
            f"combine the contributions to {min(missing)}",
            "there are no weights of that name",
            "give weights for every tensor, or one sequence for all",
        )
    for name in names:
        if name in contributions.tied:
            continue
        own = weights[name] if isinstance(weights, Mapping) else weights
        row = _weights_of(own, contributions)
        parts = [part[name] for part in contributions]
        delta = sum(
            (weight * part for weight, part in zip(row, parts, strict=True)),
            torch.zeros_like(parts[0]),
        )
        if (step := contributions.spectra.get(name)) is not None:
            with explained(None, "the base", []):
                delta = apply(step, delta.reshape(-1), name).view(delta.shape)
        start = merged[name]
        wide = torch.promote_types(delta.dtype, working_dtype(start.dtype))
        summed = start.detach().to(wide) + scale * delta
        if not summed.requires_grad:
            if not finite(summed):
                raise PCBError(
                    f"combine the contributions to {name}",
                    "their sum is infinite or no number",
                    "give weights and a scale that are smaller, and finite",
                )
            refuse_beyond(start.dtype, summed, name)
        merged[name] = summed.to(start.dtype)
    for name, first in contributions.tied.items():
        merged[name] = merged[first]
    return merged


def _listed(experts: Sequence[Model], **of_each: float | Sequence[float]) -> list[Model]:
    """The experts, if they are several and so are the values that each has."""
    one = isinstance(experts, torch.nn.Module) and not isinstance(experts, torch.nn.ModuleList)
    if one or isinstance(experts, Mapping):
        raise PCBError("merge with pcb", "experts is one model", "give a list of models")
    found = list(experts)
    if not found:
        raise PCBError("merge with pcb", "there is no expert", "give at least one")
    for name, value in of_each.items():
        if isinstance(value, (list, tuple)) and len(value) != len(found):
            what, why = f"use {len(value)} values of {name}", f"there are {len(found)} experts"
            raise PCBError(what, why, "give one for each")
    return found


def _weights_of(row: Any, contributions: Contributions) -> Any:
    """The weights of one tensor, if each contribution has one."""
    shape = tuple(getattr(row, "shape", (len(row),) if hasattr(row, "__len__") else ()))
    if shape != (len(contributions),):
        shown = " × ".join(map(str, shape)) or "one"
        what = f"combine {len(contributions)} contributions with {shown} weights"
        raise PCBError(what, "each contribution has one", "give a sequence of as many")
    return row


def _state_dict(model: Model) -> Mapping[str, torch.Tensor]:
    """The tensors of a model; extra state that is no tensor is left out."""
    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    if not isinstance(state, Mapping):
        raise PCBError(
            "merge these models",
            f"one of them is a {type(state).__name__}",
            "give modules or state dicts",
        )
    found, items = {}, dict[Any, Any](state)
    for name, value in items.items():
        if isinstance(value, torch.Tensor) and isinstance(name, str):
            found[name] = value
        elif not str(name).endswith("_extra_state"):
            raise PCBError(
                "merge these models",
                f"{name} is a {type(value).__name__} and no tensor"
                if isinstance(name, str)
                else f"{name!r} is no name of a tensor",
                "give modules or state dicts, which map names to tensors",
            )
    return found


def _refuse_other_tensors(states: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Raise :class:`PCBError` where experts have other tensors than the base, or others' kinds."""
    base, *experts = states
    for number, state in enumerate(experts):
        if left := [name for name in state if name not in base]:
            LOG.warning("%s, of expert %d, is left out: the base lacks it", left[0], number)
        for name, tensor in base.items():
            where = f"merge tensor {name}"
            if name not in state:
                if not tensor.is_floating_point():
                    continue
                raise PCBError(where, f"expert {number} lacks it", "give models of one kind")
            other = state[name]
            if tensor.is_meta or other.is_meta:
                remedy = "load the weights (offloaded ones, too) before merging"
                raise PCBError(where, "it is on the device meta, without values", remedy)
            if tensor.device != other.device:
                apart = f"the base has it on {tensor.device} and expert {number} on {other.device}"
                raise PCBError(where, apart, "move all models to one device")
            if tensor.is_floating_point() and other.is_floating_point():
                continue
            same = tensor.shape == other.shape and bool((tensor == other).all())
            # Others are masks, positions and counters, of which the base's are kept.
            weights = any(
                one.is_floating_point() or (one.dtype in QUANTISED and one.ndim > 1)
                for one in (tensor, other)
            )
            if weights and not same:
                raise PCBError(
                    where,
                    f"it is {tensor.dtype} in the base, {other.dtype} in expert {number} and not "
                    "the same, and task vectors need floating point",
                    "give models that are not quantised",
                )


def _tied(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, str]:
    """Further names of tensors that are one and the same in every model, with the first name."""
    return further_names({name: _place(states, name) for name in states[0]})


def _place(states: Sequence[Mapping[str, torch.Tensor]], name: str) -> Hashable:
    """Where a tensor of all models lies; where one lacks it, nowhere."""
    there = all(name in state for state in states)
    return place_of([state[name] for state in states]) if there else object()


def _refuse_other_base(base: Mapping[str, torch.Tensor], names: Mapping[str, torch.Tensor]) -> None:
    """Raise :class:`PCBError` unless contributions are to this base's tensors."""
    for name, part in names.items():
        if name not in base or base[name].shape != part.shape:
            had = tuple(base[name].shape) if name in base else "none"
            raise PCBError(
                f"add the contributions to {name}",
                f"they have the shape {tuple(part.shape)}, and the base's is {had}",
                "give the base that they were computed for",
            )


def _group(name: str, states: Sequence[Mapping[str, torch.Tensor]]) -> TensorGroup:
    """The tensors of one name, as they are."""
    ids = ["the base", *(f"expert {number}" for number in range(len(states) - 1))]
    tensors = [state[name] for state in states]
    group = TensorGroup.from_tensors(tensors, ids=ids, base_index=0, name=name)
    refuse_mixed(group)
    return group
