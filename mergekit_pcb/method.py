"""The mergekit method ``pcb``: YAML names and aligned tensors in, one merged tensor out.

This module holds no formulas and loads nothing. Importing it registers the method, and it
imports only modules of mergekit that its registry has loaded, because it is itself imported
while mergekit's package of merge methods is half initialised (see ``_autoload.py``).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from mergekit.merge_methods.dtype import align_dtype

from mergekit_pcb import checkpoints, dare, whole_model
from mergekit_pcb.errors import PCBError
from mergekit_pcb.merging import merge
from mergekit_pcb.statistics import Recipe, Statistics, check_finite, measure
from mergekit_pcb.task_vectors import Aligned, working_dtype

if TYPE_CHECKING:
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

LOG = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class WholeNumberParameter(ParameterSpec):
    """A parameter that is a whole number of 64 bits with a sign."""

    because: str = ""
    remedy: str = "write a whole number such as 0"

    def validate(self, value: Any) -> int:
        try:
            number = int(value)
            exact = isinstance(value, str) or number == value
            if isinstance(value, bool) or not exact or not -(2**63) <= number < 2**63:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise PCBError(f"use {self.name}: {value!r}", self.because, self.remedy) from None
        return number


@dataclass(frozen=True)
class ChoiceParameter(ParameterSpec):
    """A parameter that is one of a few words."""

    choices: tuple[str, ...] = ()
    because: str = ""

    def validate(self, value: Any) -> str:
        if value not in self.choices:
            words = " or ".join(self.choices)
            raise PCBError(f"use {self.name}: {value!r}", self.because, f"write {words}")
        return str(value)


@dataclass(frozen=True)
class PathParameter(ParameterSpec):
    """The path of a file; empty for none."""

    def validate(self, value: Any) -> str:
        if not isinstance(value, (str, os.PathLike)):
            raise PCBError(
                f"use {self.name}: {value!r}", "it has to be the path of a file", "write a path"
            )
        return os.fspath(value)


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
    NumberParameter(
        "dare_density",
        float,
        ParameterScope.NON_BASE,
        default=1.0,
        description="fraction of a task's elements that DARE keeps before PCB",
        accepts=lambda value: dare.SMALLEST_DENSITY <= value <= 1,
        because="dare_density is the probability that an element of a task vector is kept",
        remedy="write a number above 0 (and not below 2e-9) up to 1, which switches DARE off",
    ),
    WholeNumberParameter(
        "seed",
        int,
        ParameterScope.SHARED,
        default=0,
        description="which elements DARE keeps",
        because="seed chooses the elements that DARE keeps and is a whole number of 64 bits",
    ),
    ChoiceParameter(
        "scope",
        str,
        ParameterScope.SHARED,
        default=whole_model.TENSOR,
        description="how far elements compete: within a tensor or within the whole model",
        choices=(whole_model.TENSOR, whole_model.MODEL),
        because="elements are ranked within their tensor or within the whole model",
    ),
    PathParameter(
        "statistics",
        str,
        ParameterScope.SHARED,
        default="",
        description="statistics of a whole model measured before",
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
        _look_at_caller(checkpoints.caller(1))

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Merge the groups; under ``scope: model`` measure all of the model first."""
        if not groups:
            return ()
        task = checkpoints.planned_task(checkpoints.caller(2))
        if task is None:
            remarks: dict[str, str] = {}
            for values in parameters:
                for model, density in values["density"].items():
                    _advise(remarks, model, density, values["dare_density"][model])
        else:
            _warn_of_tensors_left_out(task)
        measured = None
        if parameters[0]["scope"] == whole_model.MODEL:
            if task is not None:
                statistics = whole_model.of_plan(task, groups[0].entries[0].tensor.device)
            elif path := parameters[0]["statistics"]:
                raise PCBError(
                    f"use statistics {path} in memory",
                    "they belong to checkpoint files, and these models have none",
                    "leave `statistics` out",
                )
            else:
                statistics = _measure_in_memory(groups, parameters, input_dtypes)
            checked = task is None or whole_model.walked(task, groups[0].metadata.name)
            measured = _Measured(statistics, checked)
        elif path := parameters[0]["statistics"]:
            raise PCBError(
                f"use statistics {path}",
                "they are of a whole model and the scope is tensor",
                "set scope to model, or leave `statistics` out",
            )
        parameters = [
            {
                **values,
                "models": checkpoints.models_of(task)
                if task
                else [entry.id for entry in group.non_base],
                "measured": measured,
            }
            for group, values in zip(groups, parameters, strict=True)
        ]
        merged: tuple[torch.Tensor, ...] = super()._execute(
            groups, parameters, options, input_dtypes=input_dtypes, out_dtype=out_dtype
        )
        for group, tensor in zip(groups, merged, strict=True):
            # The methods' own check was of the dtype before this cast.
            if out_dtype is not None and not tensor.isfinite().all():
                raise PCBError(
                    f"store tensor {group.metadata.name}",
                    f"its values do not fit into {out_dtype}",
                    "lower lambda or the weights, or choose a wider `out_dtype`",
                )
        return merged

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        base, tasks = group.base, group.non_base
        name = group.metadata.name or "(unnamed)"
        if base is None or not tasks:
            raise PCBError(
                f"merge tensor {name}",
                "it needs a base and at least one task",
                "call the method with a base_index and two or more tensors",
            )
        if not base.tensor.is_floating_point():
            raise PCBError(
                f"merge tensor {name}",
                f"it holds {base.tensor.dtype}, and task vectors need floating point",
                "copy it from the base model instead",
            )
        aligned = _aligned(group)
        measured: _Measured | None = parameters["measured"]
        # An optional tensor may be missing in some of the models.
        positions = [parameters["models"].index(task.id) for task in tasks]
        dtype = working_dtype(base.tensor.dtype)
        with whole_model.explained(base.tensor.dtype, base.id, [task.id for task in tasks]):
            if measured is not None:
                if not measured.checked:
                    check_finite(aligned)
                statistics = measured.statistics.of(positions)
                if dtype == torch.float64:
                    statistics = replace(statistics, dtype=dtype)
            else:
                recipe = _recipe(group, parameters, positions)
                statistics = measure(lambda: [aligned], len(aligned), recipe, dtype)
            weights, scale = parameters["weight"].values_for(tasks), parameters["lambda"]
            for observe in _observers:
                observe(aligned, statistics, positions, weights, scale)
            merged = merge(aligned, statistics, weights, scale)
        return merged.view(base.tensor.shape)


@dataclass(frozen=True)
class _Measured:
    """Statistics of a whole model."""

    statistics: Statistics
    checked: bool  # the tensor at hand was walked over, so it is known to be finite


Observer = Callable[[Aligned, Statistics, Sequence[int], Sequence[float], float], None]
_observers: list[Observer] = []


@contextlib.contextmanager
def observed(observe: Observer) -> Iterator[None]:
    """Show every tensor that is merged meanwhile: its statistics, positions, weights and lambda."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


def _measure_in_memory(
    groups: Sequence[TensorGroup],
    parameters: Sequence[dict[str, Any]],
    dtypes: Sequence[torch.dtype | None],
) -> Statistics:
    recipes = {
        _recipe(group, values, range(len(group.non_base)))
        for group, values in zip(groups, parameters, strict=True)
    }
    if len(recipes) > 1:
        raise PCBError(
            "use scope: model with several values of density, dare_density, seed or clip",
            "all tensors are ranked together",
            "give each model one density and dare_density, or use scope: tensor",
        )
    walk = [
        _aligned(align_dtype(group, dtype)) for group, dtype in zip(groups, dtypes, strict=True)
    ]
    base = groups[0].base
    ids = [base.id if base else None, *(task.id for task in groups[0].non_base)]
    return whole_model.of_groups(walk, recipes.pop(), ids)


def _recipe(group: TensorGroup, parameters: dict[str, Any], positions: Sequence[int]) -> Recipe:
    return Recipe(
        tuple(parameters["density"].values_for(group.non_base)),
        parameters["clip"],
        dare.plan(
            parameters["dare_density"].values_for(group.non_base), parameters["seed"], positions
        ),
    )


def _aligned(group: TensorGroup) -> Aligned:
    tasks = [task.tensor for task in group.non_base]
    return Aligned.of(group.metadata.name or "(unnamed)", group.base.tensor, tasks)


def _look_at_caller(names: dict[str, Any]) -> None:
    """Check what the caller of ``validate_inputs`` holds beyond the ids it passed.

    mergekit validates ids three times: of the whole merge before planning it, of each tensor
    while planning, and of each group of tensors right before merging it, when its own check
    of the shapes comes next, whose error names no model.
    """
    group = names.get("group")
    if isinstance(group, TensorGroup):
        check_shapes(group)
    elif (task := checkpoints.planned_task(names)) is not None:
        plan = checkpoints.record(task)
        whole_model.check(plan, task)
        for model in checkpoints.models_of(task):
            values = task.input_parameters[model]
            _advise(plan.remarks, model, values["density"], values["dare_density"])
            if values["dare_density"] < 1:
                _advise_on_seed(plan, task.parameters["seed"])
    else:
        checkpoints.begin()


def _warn_of_tensors_left_out(task: ExecuteMergeMethodTask) -> None:
    """Say once a merge which tensors mergekit drops in silence (ViT: most of them)."""
    plan = checkpoints.plan_of(task)
    if plan is None:
        return
    with plan.lock:
        if "left out" in plan.remarks:
            return
        plan.remarks["left out"] = remark = left_out(plan)
    if remark:
        LOG.warning(remark)


def left_out(plan: checkpoints.Plan) -> str:
    """What to say of the tensors that mergekit leaves out, if there are any."""
    names = plan.left_out()
    more = ", …" if len(names) > 3 else ""
    return (
        f"mergekit leaves {len(names)} tensors of {plan.tasks[0].base_model} out of the result "
        f"({', '.join(names[:3])}{more}); if the model needs them, see which command merges it in "
        "the README of mergekit-pcb"
        if names
        else ""
    )


def _advise(remarks: dict[str, str], model: Hashable, density: float, dare_density: float) -> None:
    """Warn, once a model, of a density that cannot mean what it seems to say."""
    topic = f"density of {model}"
    if dare_density < 1 and density > dare_density and topic not in remarks:
        remarks[topic] = (
            f"density {density:g} keeps no more of {model} than its dare_density {dare_density:g} "
            "does: it is a fraction of all elements, those that DARE dropped included; choose "
            f"one below {dare_density:g} for PCB to drop any more"
        )
        LOG.warning(remarks[topic])


def _advise_on_seed(plan: checkpoints.Plan, seed: int) -> None:
    """Warn where a mask was applied before: what it kept once, it keeps again, and no more."""
    if "seed" in plan.remarks:
        return
    plan.remarks["seed"] = ""
    for model, document in plan.merged_before():
        earlier = document.get("parameters") or {}
        drawn = "'dare_density'" in repr(document)
        if document.get("merge_method") == "pcb" and drawn and earlier.get("seed", 0) == seed:
            plan.remarks["seed"] = (
                f"{model} was itself merged under DARE with seed {seed}, so its elements are kept "
                "and dropped by the same masks again; give each stage a seed of its own"
            )
            LOG.warning(plan.remarks["seed"])
            return


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


if not any(method.spec.name == PCBMerge.spec.name for method in registry.registered_methods()):
    registry.register(PCBMerge())
