"""``scope: model``: statistics of all tensors of a merge, measured once, before the first.

The paper's setting. Nothing here computes: it says which tensors are walked (a plan's, or
those given in memory) and refuses what would make "the whole model" ambiguous.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from mergekit_pcb import checkpoints, dare, document
from mergekit_pcb.document import Document
from mergekit_pcb.errors import PCBError, PlanError
from mergekit_pcb.statistics import NotFiniteError, OutOfRangeError, Recipe, Statistics, measure
from mergekit_pcb.task_vectors import Aligned, working_dtype

if TYPE_CHECKING:
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    from mergekit_pcb.checkpoints import Plan

LOG = logging.getLogger(__name__)
TENSOR, MODEL = "tensor", "model"


def recipe_of(task: ExecuteMergeMethodTask) -> Recipe:
    """What determines the statistics, from the parameters of a planned task."""
    chosen = [task.input_parameters[model] for model in checkpoints.models_of(task)]
    densities = [values["dare_density"] for values in chosen]
    return Recipe(
        tuple(values["density"] for values in chosen),
        task.parameters["clip"],
        dare.plan(densities, task.parameters["seed"], range(len(densities))),
    )


def check(plan: Plan, task: ExecuteMergeMethodTask) -> None:
    """Refuse a task that would have statistics of its own in a whole-model plan."""
    first, name = plan.tasks[0], task.output_weight.name
    if task.parameters["statistics"] and task.parameters["scope"] == TENSOR:
        raise PlanError(
            f"use statistics {task.parameters['statistics']}",
            "they are of a whole model and the scope is tensor",
            "write `scope: model` beside them, or leave `statistics` out",
        )
    scopes = {first.parameters["scope"], task.parameters["scope"]}
    if scopes == {TENSOR}:
        return
    if len(scopes) > 1:
        raise PlanError(
            "rank some tensors within the whole model and others within themselves",
            f"scope is {first.parameters['scope']} for {first.output_weight.name} and "
            f"{task.parameters['scope']} for {name}",
            "write one scope, without a filter, under the top-level `parameters:`",
        )
    if task.model_order != first.model_order or task.base_model != first.base_model:
        raise PlanError(
            "use scope: model",
            f"slices merge different models ({name} others than {first.output_weight.name}), "
            "so there is no one model to rank",
            "give every slice the same models, or use scope: tensor",
        )
    ours, theirs = recipe_of(task), recipe_of(first)
    if ours != theirs:
        what = "density" if ours.densities != theirs.densities else "clip"
        if ours.dare != theirs.dare:
            what = "dare_density or seed"
        raise PlanError(
            f"use scope: model with several values of {what}",
            f"all tensors are ranked together, but {name} asks for another value than "
            f"{first.output_weight.name}",
            f"give {what} one value per model, without filter or gradient (weight may have "
            "them), or use scope: tensor",
        )


def of_plan(task: ExecuteMergeMethodTask, device: torch.device) -> Statistics:
    """The statistics of the plan that a task being executed belongs to.

    Whoever comes first measures, on its device; threads that come later wait for it.
    """
    plan = checkpoints.plan_of(task)
    if plan is None:
        raise PCBError(
            "measure the whole model",
            "this process executes a merge that another one planned",
            "plan and execute in one process, or use scope: tensor",
        )
    with plan.lock:
        if plan.measured is None:
            path = task.parameters["statistics"]
            if path:
                plan.measured = reuse(plan, pathlib.Path(path))
            else:
                plan.measured, _ = _measure_plan(plan, device, quiet=checkpoints.is_quiet())
        found: Statistics = plan.measured
    return found


def walked(task: ExecuteMergeMethodTask, name: str | None) -> bool:
    """Whether a tensor took part in the statistics of its plan."""
    plan = checkpoints.plan_of(task)
    return plan is not None and name in plan.extents()


def reuse(plan: Plan, path: pathlib.Path) -> Statistics:
    """Statistics measured before; refuses those that do not fit the plan."""
    measured = document.read(path)
    obstacle = document.difference(measured, _wanted(plan))
    if obstacle is not None:
        raise PCBError(
            f"use statistics {path}",
            obstacle,
            "measure again with `mergekit-pcb measure`, or leave `statistics` out",
        )
    return measured.statistics()


def measure_to_document(plan: Plan, device: torch.device | str, *, quiet: bool) -> Document:
    """Walk over all tensors of a plan and say what was found.

    Shows a progress bar on a terminal, unless ``quiet``.
    """
    if plan.tasks[0].parameters["scope"] != MODEL:
        raise PCBError(
            "measure this merge",
            "its scope is tensor, where each tensor has statistics of its own",
            "write `scope: model` under the top-level `parameters:`",
        )
    statistics, walks = _measure_plan(plan, device, quiet=quiet)
    extents = plan.extents().values()
    elements = sum(extent.elements for extent in extents)
    return document.compose(
        statistics, _wanted(plan), tensors=len(extents), elements=elements, walks=walks
    )


def _wanted(plan: Plan) -> document.Wanted:
    models = (plan.tasks[0].base_model, *plan.models)
    return document.Wanted(
        recipe_of(plan.tasks[0]),
        plan.dtype,
        document.digest_of(plan.layout()),
        [(str(model), plan.files(model)) for model in models],
    )


def _measure_plan(plan: Plan, device: torch.device | str, *, quiet: bool) -> tuple[Statistics, int]:
    """Measure; returns the number of walks, too."""
    extents = plan.extents()
    count = sum(extent.elements for extent in extents.values())
    nbytes = sum(extent.nbytes for extent in extents.values())
    walks = 0
    with tqdm(
        desc="Measuring whole model",
        unit="B",
        unit_scale=True,
        disable=True if quiet else None,  # None: only on a terminal
        leave=False,
    ) as bar:

        def walk() -> Iterator[Aligned]:
            nonlocal walks
            walks += 1
            bar.total = max(2, walks) * nbytes
            for number, aligned in enumerate(plan.groups(torch.device(device)), 1):
                yield aligned
                bar.set_postfix_str(f"walk {walks}, tensor {number}/{len(extents)}", refresh=False)
                bar.update(extents[aligned.name].nbytes)

        wide = plan.dtype == torch.float64 or any(extent.wide for extent in extents.values())
        with explained(None, plan.tasks[0].base_model, plan.models):
            statistics = measure(
                walk,
                count,
                recipe_of(plan.tasks[0]),
                torch.float64 if wide else torch.float32,
            )
    LOG.info("measured %d tensors of %d elements in %d walks", len(extents), count, walks)
    return statistics, walks


def of_groups(groups: Sequence[Aligned], recipe: Recipe, ids: Sequence[Hashable]) -> Statistics:
    """The statistics of groups that are all in memory; ``ids`` names the base first."""
    dtypes = (working_dtype(aligned.base.dtype) for aligned in groups)
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    with explained(None, ids[0], ids[1:]):
        return measure(lambda: groups, sum(map(len, groups)), recipe, dtype)


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
    except OutOfRangeError as error:
        raise PCBError(
            f"merge tensor {error.tensor}",
            f"its values do not fit into {dtype or torch.float64}",
            "lower lambda or the weights, or set a wider `dtype:`",
        ) from None
