"""From mergekit's group of tensors to an aligned one, and what is refused on the way.

Where the mathematics knows positions, an error here names the model, the tensor and a remedy.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.dtype import align_dtype

from mergekit_pcb.core.measure import NotFiniteError, OutOfRangeError, finite
from mergekit_pcb.core.solve import NotSolvableError
from mergekit_pcb.core.vectors import Aligned
from mergekit_pcb.errors import PCBError

LOG = logging.getLogger(__name__)
Name = TypeVar("Name", bound=Hashable)
#: End of the names of numbers that old checkpoints hold for their masks, infinite in float16.
CONSTANT = ".masked_bias"


def aligned(group: TensorGroup) -> Aligned:
    """Flatten a group's tensors, all of one shape, dtype and device; the base has to be there."""
    name = name_of(group)
    base, tasks = group.base, group.non_base
    if not base.tensor.is_floating_point():
        raise PCBError(
            f"merge tensor {name}",
            f"it holds {base.tensor.dtype}, and task vectors need floating point",
            "copy it from the base model instead",
        )
    if any(entry.tensor.layout != torch.strided for entry in group.entries):
        raise PCBError(f"merge tensor {name}", "it is sparse", "call to_dense() first")
    return Aligned.of(name, base.tensor, [task.tensor for task in tasks])


def name_of(group: TensorGroup) -> str:
    return "(unnamed)" if group.metadata.name is None else group.metadata.name


def is_constant(group: TensorGroup) -> bool:
    """Whether it is a mask's constant, the same in all models; it may be infinite."""
    first, *others = group.tensors
    return name_of(group).endswith(CONSTANT) and all(torch.equal(first, other) for other in others)


def is_infinite(group: TensorGroup, dtype: torch.dtype | None = None) -> bool:
    """Whether it is such a constant, and infinite when it is cast to a dtype (none: as it is)."""
    if not name_of(group).endswith(CONSTANT):
        return False
    cast = align_dtype(group, dtype)
    return is_constant(cast) and not finite(cast.entries[0].tensor)


@functools.cache
def warn_of_one_mask() -> None:
    """Say once that tensors without a name cannot be told apart."""
    LOG.warning("tensors without a name are all thinned by one DARE mask; give each a name (name=)")


def place_of(tensors: Sequence[torch.Tensor]) -> Hashable:
    """Where tensors lie in memory; the same for two names of one tensor in every model."""
    if not all(tensor.numel() and tensor.layout == torch.strided for tensor in tensors):
        return object()
    return tuple((t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for t in tensors)


def further_names(places: Mapping[Name, Hashable]) -> dict[Name, Name]:
    """Names that mean what an earlier name means, with the first such name."""
    first: dict[Hashable, Name] = {}
    named = {name: first.setdefault(place, name) for name, place in places.items()}
    return {name: known for name, known in named.items() if known != name}


def refuse_mixed(group: TensorGroup) -> None:
    """Refuse float8 beside another dtype: torch knows none that holds both."""
    first, *others = group.entries
    for other in others:
        kinds = first.tensor.dtype, other.tensor.dtype
        if kinds[0] != kinds[1] and any(k.is_floating_point and k.itemsize == 1 for k in kinds):
            raise PCBError(
                f"merge tensor {name_of(group)}",
                f"it is {kinds[0]} in {first.id} and {kinds[1]} in {other.id}",
                "set `dtype: float32`, or cast the models to one dtype",
            )


def check_shapes(group: TensorGroup) -> None:
    """Refuse inputs of different shapes, naming both models; mergekit's own error names none."""
    base = group.base
    for task in group.non_base if base is not None else ():
        if task.tensor.shape != base.tensor.shape:
            raise PCBError(
                f"merge tensor {group.metadata.name}",
                f"it has shape {tuple(base.tensor.shape)} in {base.id} but "
                f"{tuple(task.tensor.shape)} in {task.id}",
                "align vocabularies with `tokenizer: {source: base}`"
                if group.metadata.vocabulary_axis is not None
                else "merge only models fine-tuned from this base",
            )


def refuse_other_buffers(group: TensorGroup) -> None:
    """Refuse counters and masks that differ, in a sentence; mergekit's own error names no model."""
    for first, other in itertools.pairwise(group.entries):
        one, two = first.tensor, other.tensor
        if one.is_floating_point() and two.is_floating_point():
            continue
        if one.dtype != two.dtype or not torch.equal(one, two):
            raise PCBError(
                f"merge tensor {group.metadata.name}",
                f"it holds other numbers or another dtype in {other.id} ({two.dtype}) than in "
                f"{first.id} ({one.dtype}), and whole numbers are not merged",
                "make them alike, or leave it out of the models",
            )


def refuse_beyond(dtype: torch.dtype | None, merged: torch.Tensor, name: str) -> None:
    """Refuse a merged tensor that becomes infinite by a cast to a narrower dtype, if to any."""
    if dtype is None or not (dtype.is_floating_point and merged.is_floating_point()):
        return
    limits = torch.finfo(dtype)
    largest = limits.max
    if torch.finfo(merged.dtype).max > largest and merged.numel():
        # Casting keeps the order of numbers.
        values = merged.float() if merged.dtype.itemsize == 1 else merged  # float8 has no order
        extremes = torch.stack(values.aminmax())
        if not extremes.isfinite().all():
            return
        # What is rounded to the largest is not beyond it; torch clips float8 to it.
        rounded = largest + limits.eps * 2 ** (math.frexp(largest)[1] - 2)
        clipped = dtype.itemsize == 1 and float(extremes.abs().max()) >= rounded
        if clipped or not extremes.to(dtype).float().isfinite().all():
            raise beyond(dtype, name)


def beyond(dtype: torch.dtype, name: str) -> PCBError:
    return PCBError(
        f"store tensor {name}",
        f"its values do not fit into {dtype}",
        "lower lambda or the weights, or choose a wider dtype (`out_dtype`)",
    )


def explained_for(
    group: TensorGroup, *, of_whole_model: bool = False
) -> contextlib.AbstractContextManager[None]:
    """:func:`explained` for the models of a group."""
    base = group.base
    dtype = None if base is None or of_whole_model else base.tensor.dtype
    tasks = [task.id for task in group.non_base]
    return explained(dtype, None if base is None else base.id, tasks)


@contextlib.contextmanager
def explained(
    dtype: torch.dtype | None, base: Hashable, tasks: Sequence[Hashable]
) -> Iterator[None]:
    """Name the model and what to do where the mathematics knows only positions."""
    try:
        yield
    except NotFiniteError as error:
        raise PCBError(
            f"merge tensor {error.tensor}",
            f"{base if error.task is None else tasks[error.task]} holds NaN or infinity in it",
            "repair or replace that checkpoint (or, if it is sound, set a `dtype:` wide enough for "
            "its values)",
        ) from None
    except NotSolvableError as error:
        raise PCBError(
            f"refine tensor {error.tensor}",
            error.what,
            "raise anchor, or leave this tensor to PCB by a filter: `refine: [{filter: "
            f"{error.tensor}, value: none}}, {{value: solve}}]`, and the same for spectrum",
        ) from None
    except OutOfRangeError as error:
        because = f"its values do not fit into {dtype}"
        remedy = "lower lambda or the weights, or set a wider `dtype:`"
        if dtype in (None, torch.float64):
            because = "its values are too large or too small for float64"
            remedy = "lower lambda or the weights, scale the models, or leave it out"
        raise PCBError(f"merge tensor {error.tensor}", because, remedy) from None
