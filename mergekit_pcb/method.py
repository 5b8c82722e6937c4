"""The mergekit method ``pcb``: YAML names and aligned tensors in, one merged tensor out.

This module holds no formulas and loads nothing. Importing it registers the method, and it
imports only two modules of mergekit, because it is itself imported while mergekit's
package of merge methods is half initialised (see ``_autoload.py``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from mergekit_pcb.combine import merge
from mergekit_pcb.errors import PCBError
from mergekit_pcb.statistics import NotFiniteError, OutOfRangeError, Recipe, measure
from mergekit_pcb.task_vectors import Aligned, working_dtype


@dataclass(frozen=True)
class NumberParameter(ParameterSpec):
    """A numeric parameter whose error names it; pydantic's own names neither it nor a remedy."""

    accepts: Callable[[float], bool] = math.isfinite
    because: str = "it has to be a finite number"
    remedy: str = "write a number such as 1.0"

    def validate(self, value: Any) -> float:
        """Accept numbers and, because YAML reads ``1e-4`` as text, numerals."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not self.accepts(number):
            raise PCBError(f"use {self.name}: {value!r}", self.because, self.remedy)
        return number


PARAMETERS = (
    NumberParameter(
        "density",
        float,
        ParameterScope.NON_BASE,
        default=0.1,
        description="fraction of a task's elements that keep weight",
        accepts=lambda value: 0 <= value <= 1,
        because="density is the fraction of a task vector's elements that keep weight",
        remedy="write a number from 0 (the base model) to 1; small ones such as 0.1 work best",
    ),
    NumberParameter(
        "weight",
        float,
        ParameterScope.NON_BASE,
        default=1.0,
        description="coefficient of a task",
        because="weight is a task's coefficient and has to be a finite number",
        remedy="write a number such as 1.0, or leave it out",
    ),
    NumberParameter(
        "lambda",
        float,
        ParameterScope.SHARED,
        default=1.0,
        description="scale of the merged task vector",
        because="lambda scales the merged task vector and has to be a finite number",
        remedy="write one number such as 1.0 under the top-level `parameters:`",
    ),
    NumberParameter(
        "clip",
        float,
        ParameterScope.SHARED,
        default=1e-4,
        description="fraction of the magnitudes clamped at each end",
        accepts=lambda value: 0 <= value < 0.5,
        because="clip is the fraction of a task vector's magnitudes clamped at each end",
        remedy="write a number from 0 to less than 0.5, such as 0.0001",
    ),
)


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
                f"the base model {base_id} does not take part or lacks this tensor",
                "name it as an input too, or choose a base that has every tensor",
            )
        if len(input_ids) < 2:
            raise PCBError(
                f"merge with pcb{where}",
                f"only the base model {base_id} is given",
                "add at least one model fine-tuned from it",
            )
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        _check_shapes(_group_of_caller())

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        base, tasks = group.base, group.non_base
        if base is None or not tasks:
            raise PCBError(
                f"merge tensor {group.metadata.name}",
                "it needs a base and at least one task",
                "call the method with a base_index and two or more tensors",
            )
        if not base.tensor.is_floating_point():
            raise PCBError(
                f"merge tensor {group.metadata.name}",
                f"it holds {base.tensor.dtype}, and task vectors need floating point",
                "copy it from the base model instead",
            )
        name = group.metadata.name or "(unnamed)"
        aligned = Aligned.of(name, base.tensor, [task.tensor for task in tasks])
        recipe = Recipe(tuple(parameters["density"].values_for(tasks)), parameters["clip"])
        try:
            statistics = measure(
                lambda: [aligned], len(aligned), recipe, working_dtype(base.tensor.dtype)
            )
            merged = merge(
                aligned, statistics, parameters["weight"].values_for(tasks), parameters["lambda"]
            )
        except NotFiniteError as error:
            culprit = base if error.task is None else tasks[error.task]
            raise PCBError(
                f"merge tensor {name}",
                f"{culprit.id} holds NaN or infinity in it",
                "repair or replace that checkpoint",
            ) from None
        except OutOfRangeError:
            raise PCBError(
                f"merge tensor {name}",
                f"the result does not fit into {base.tensor.dtype}",
                "lower lambda or the weights, or set a wider `dtype:`",
            ) from None
        return merged.view(base.tensor.shape)


def _group_of_caller() -> TensorGroup | None:
    """The tensors behind the ids that mergekit just passed to ``validate_inputs``, if any.

    mergekit compares shapes right after validating the ids, out of a method's reach, and its
    error names no model. Both of its callers hold the tensors as ``group``; where a later
    mergekit does not, its own error is what users see.
    """
    frame = inspect.currentframe()
    for _ in range(2):  # this function, validate_inputs
        frame = frame.f_back if frame else None
    group = frame.f_locals.get("group") if frame else None
    return group if isinstance(group, TensorGroup) else None


def _check_shapes(group: TensorGroup | None) -> None:
    if group is None or group.base is None:
        return
    base = group.base
    for task in group.non_base:
        if task.tensor.shape != base.tensor.shape:
            raise PCBError(
                f"merge tensor {group.metadata.name}",
                f"it has shape {tuple(base.tensor.shape)} in {base.id} but "
                f"{tuple(task.tensor.shape)} in {task.id}",
                "align vocabularies with `tokenizer: {source: base}`"
                if group.metadata.vocabulary_axis is not None
                else "merge only models fine-tuned from this base",
            )


if not any(method.spec.name == PCBMerge.spec.name for method in registry.registered_methods()):
    registry.register(PCBMerge())
