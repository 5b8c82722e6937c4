"""The plan: what mergekit is about to merge by ``pcb``, as its planner left it.

mergekit hands a method one tensor at a time. What it will hand over, in which shape and from
which models, stands in the tasks that its planner makes. A plan holds those of one merge and
refuses what would make "the whole model" ambiguous. It reads no tensor.
"""

from __future__ import annotations

import copy
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from mergekit.common import dtype_from_name, get_torch_accelerator_type
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer

from mergekit_pcb.core.measure import Recipe
from mergekit_pcb.errors import PCBError, one_line
from mergekit_pcb.host.architecture import Architecture, architecture_of
from mergekit_pcb.host.kinds import Kind
from mergekit_pcb.host.parameters import (
    MODEL,
    SPECS,
    Values,
    one_recipe,
    recipe_of,
    refines,
    scope_of,
)
from mergekit_pcb.host.prepared import Prepared


class PlanOptions(MergeOptions):
    """mergekit's options, and what a tool of this package asks of a plan beyond them."""

    #: Is shown every tensor before it is merged.
    observe: Callable[[Prepared], None] | None = None
    #: Whether to log advice; a tool that prints it itself says no.
    advise: bool = True
    #: Whether anything is merged or measured, so that its device has to be there.
    runs: bool = True
    #: As mergekit-pytorch has them.
    tensor_union: bool = False
    tensor_intersection: bool = False

    @classmethod
    def of(cls, options: MergeOptions, **more: Any) -> PlanOptions:
        return cls(**{**options.model_dump(), **more})


class Plan:
    """The tensors of one merge, in the order of planning; equal to itself alone.

    ``tasks`` are mergekit's own, one per tensor of the output and at least one.
    """

    def __init__(
        self,
        tasks: Sequence[ExecuteMergeMethodTask],
        options: MergeOptions,
        out_dtype: str | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.options = options if isinstance(options, PlanOptions) else PlanOptions.of(options)
        #: What mergekit casts results to, if the configuration names it.
        self.out_dtype = dtype_named("out_dtype", out_dtype)
        #: What inputs are cast to, if the configuration names it.
        self.dtype = dtype_named("dtype", _load_of(self.tasks[0]).dtype)
        self._check_inputs()
        named = [(task.output_weight.name, values_of(task)) for task in self.tasks]
        self.scope = scope_of(named)
        #: Of the whole model; ``None`` where every tensor has its own.
        self.recipe: Recipe | None = None
        if self.scope == MODEL:
            self._check_models()
            recipes = [(name, recipe_of(values, self.models)) for name, values in named]
            self.recipe = one_recipe(recipes)
        self._check_paths()
        self.statistics_file = str(self.tasks[0].parameters["statistics"])

    def observed(self, observe: Callable[[Prepared], None]) -> Plan:
        """The same plan, of which every tensor is shown before it is merged."""
        found = copy.copy(self)
        found.options = PlanOptions.of(self.options, observe=observe)
        return found

    @property
    def base(self) -> Any:
        return self.tasks[0].base_model

    @property
    def models(self) -> tuple[Any, ...]:
        """The tasks' models in configuration order, without the base."""
        return models_of(self.tasks[0])

    @property
    def checkpoints(self) -> list[str]:
        """The folders or files of the base and all models; names of the Hub as they are."""
        return [str(model.model) for model in dict.fromkeys((self.base, *self.models))]

    @property
    def device(self) -> torch.device:
        """Where the merge computes; of several accelerators the first."""
        if self.options.multi_gpu:
            try:
                return torch.device(get_torch_accelerator_type(), 0)
            except AttributeError:  # a build of torch for none
                return torch.device("cuda", 0)
        try:
            return torch.device(self.options.device)
        except RuntimeError as error:
            raise PCBError(
                f"merge on {self.options.device}", one_line(error), "name cpu, cuda or cuda:1"
            ) from None

    @property
    def device_is_there(self) -> bool:
        """Whether torch sees the device here; a merge may be looked at where it is not."""
        if self.device.type != "cuda":
            return True
        return (self.device.index or 0) < torch.cuda.device_count()

    @property
    def tokenizer(self) -> BuildTokenizer | None:
        """The task that aligns vocabularies, if the configuration asks for it."""
        found = (getattr(task.gather_tensors, "tokenizer_task", None) for task in self.tasks)
        return next((task for task in found if task is not None), None)

    @functools.cached_property
    def kinds(self) -> dict[str, Kind]:
        """What every tensor whose matrices are refined is, by its name in the output."""
        names = {
            task.output_weight.name: _name_in_base(task)
            for task in self.tasks
            if refines(values_of(task))
        }
        if not names or (architecture := self.architecture) is None:
            return dict.fromkeys(names, Kind.ASSUMED)
        return {name: architecture.kind(source) for name, source in names.items()}

    @property
    def known_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the base's tensors, as far as its architecture tells them."""
        found = {}
        for task in self.tasks:
            shape = self.architecture and self.architecture.shape(_name_in_base(task))
            if shape:
                found[task.output_weight.name] = tuple(shape)
        return found

    @functools.cached_property
    def architecture(self) -> Architecture | None:
        """That of the base, if its configuration tells."""
        return architecture_of(self.base, trust_remote_code=self.options.trust_remote_code)

    @property
    def is_raw(self) -> bool:
        """Whether it is mergekit-pytorch's, of single files."""
        return hasattr(self.tasks[0].gather_tensors, "tensors")

    def values(self) -> Iterator[Values]:
        return map(values_of, self.tasks)

    @property
    def thins(self) -> bool:
        """Whether DARE drops elements of any task vector."""
        return any(min(values["dare_density"].values()) < 1 for values in self.values())

    def _check_inputs(self) -> None:
        """Refuse tensors of which mergekit's plan loads fewer models than it names.

        Its plan of what follows the layers (the last norm, the head) takes the models of the last
        slice, and as many of them as the first one has.
        """
        for task in self.tasks:
            if left := [model for model in task.model_order if model not in task.input_parameters]:
                raise PCBError(
                    f"merge {task.output_weight.name} of {left[0]}",
                    "mergekit 0.1.5 loads it of as many models as the first slice has, and the "
                    "last slice has more",
                    "give both slices equally many models, or the larger one first",
                )

    def _check_paths(self) -> None:
        """Refuse one model under two spellings of its path, and paths that mergekit mistakes."""
        for order in dict.fromkeys(task.model_order for task in self.tasks):
            seen: dict[tuple[str, str], Any] = {}
            for model in order:
                path = pathlib.Path(model.model.path)
                if self.is_raw and {"@", "+"} & set(str(path)):
                    raise PCBError(
                        f"merge {path}",
                        "mergekit-pytorch 0.1.5 loses files with @ or + in their paths",
                        "rename it, or name a link to it",
                    )
                adapter = model.lora and str(pathlib.Path(model.lora.path).resolve())
                place = str(path.resolve()), str(adapter)
                if place in seen and path.exists():
                    raise PCBError(
                        f"merge {model} beside {seen[place]}",
                        "they are one model under two names, and every task vector competes once",
                        "list the model once, and the base only as the base",
                    )
                seen[place] = model

    def _check_models(self) -> None:
        first = self.tasks[0]
        for task in self.tasks:
            if (task.model_order, task.base_model) != (first.model_order, first.base_model):
                raise PCBError(
                    "use scope: model",
                    f"slices merge different models ({task.output_weight.name} others than "
                    f"{first.output_weight.name}), so there is no one model to rank",
                    "give every slice the same models, or use scope: tensor",
                )


def _load_of(task: ExecuteMergeMethodTask) -> Any:
    """What loads the tensors of a task."""
    load: Any = task.gather_tensors
    while not hasattr(load, "dtype"):
        inner = getattr(load, "gather_tensors", None)
        load = next(iter(load.tensors.values())) if inner is None else inner
    return load


def dtype_named(field: str, name: Any) -> torch.dtype | None:
    """What a field of a configuration says, if it says anything; raises :class:`PCBError`."""
    try:
        found: torch.dtype | None = dtype_from_name(name)
    except (RuntimeError, AttributeError):
        found, because = None, "mergekit knows no such dtype"
    else:
        because = "weights are no whole numbers"
        if found is None or found.is_floating_point:
            return found
    raise PCBError(f"use {field}: {name}", because, "write float32, bfloat16 or float16")


def _name_in_base(task: ExecuteMergeMethodTask) -> str:
    """What the base calls a planned tensor; slices may have moved it to another layer."""
    infos = sources_of(task)
    return str((task.output_weight if infos is None else infos[task.base_model]).name)


def sources_of(task: ExecuteMergeMethodTask) -> Any:
    """What a planned tensor is called in each model; ``None`` in a plan of mergekit-pytorch."""
    load = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
    return getattr(load, "weight_info", None)


def models_of(task: ExecuteMergeMethodTask) -> tuple[Any, ...]:
    """The models of a planned tensor in configuration order, without the base."""
    return tuple(model for model in task.model_order if model != task.base_model)


def values_of(task: ExecuteMergeMethodTask) -> Values:
    """The resolved parameters of a planned tensor: shared ones, and those of the tasks by model."""
    shared = dict(task.parameters.items())
    own = {
        name: {model: task.input_parameters[model][name] for model in models_of(task)}
        for name in SPECS
        if name not in shared
    }
    return {**shared, **own}
