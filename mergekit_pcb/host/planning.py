"""Where mergekit's planners are told to put our nodes, and how a tool plans without merging.

mergekit offers no hook for this, so the two functions that return planned tasks are wrapped:
``MergePlanner._plan``, behind mergekit-yaml, mergekit-multi and mergekit-evolve, and
``plan_flat_merge``, behind mergekit-pytorch. Both are checked against mergekit 0.1.5. Where
they differ nothing is wrapped: then only what needs no plan is merged (see ``method.py``).
"""

from __future__ import annotations

import functools
import inspect
import pathlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.graph import Executor, Task
from mergekit.io.tasks import FinalizeModel, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions

from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import seen
from mergekit_pcb.host import advice, damage, refined, vocabulary
from mergekit_pcb.host.configuration import is_raw, named_models
from mergekit_pcb.host.method import PCBMerge
from mergekit_pcb.host.nodes import MergeTensor, nodes_of
from mergekit_pcb.host.plan import Plan, PlanOptions
from mergekit_pcb.host.prepared import Prepared

_WRAPPED = "planned_by_mergekit_pcb"
_TASK = {
    "method_name",
    "gather_tensors",
    "model_order",
    "base_model",
    "output_weight",
    "parameters",
    "input_parameters",
    "dtype",
    "out_dtype",
}


def wrap_planner(module: ModuleType) -> None:
    """Let mergekit's planner of whole models, in ``mergekit.plan``, plan our nodes."""
    planner: Any = module.MergePlanner
    original = planner._plan
    if hasattr(original, _WRAPPED):
        return
    expect(original, ["self"])
    expect(planner.__init__, ["self", "config", "arch_info", "options", "out_model_config"])

    @functools.wraps(original)
    def _plan(self: Any) -> None:
        if not isinstance(self._method, PCBMerge):
            return original(self)  # type: ignore[no-any-return]
        if self._tokenizer_task is not None:
            self._tokenizer_task = vocabulary.planned(self._tokenizer_task, self.config)
        original(self)
        weights, tasks = zip(*self._tensors, strict=True) if self._tensors else ((), ())
        self._tensors = list(zip(weights, _planned(tasks, self.options, self.config), strict=True))
        if self._tokenizer_task is not None:
            self._tokenizer_task = vocabulary.SavedTokenizer(tokenizer_task=self._tokenizer_task)
        return None

    setattr(_plan, _WRAPPED, True)
    planner._plan = _plan


def wrap_raw_planner(module: ModuleType) -> None:
    """Let the planner of single files, in ``mergekit.scripts.merge_raw_pytorch``, do the same."""
    original: Callable[..., list[Task[Any]]] = module.plan_flat_merge
    if hasattr(original, _WRAPPED):
        return
    expect(original, ["config", "out_path", "tensor_union", "tensor_intersection", "options"])

    @functools.wraps(original)
    def plan_flat_merge(
        config: Any,
        out_path: str,
        tensor_union: bool,
        tensor_intersection: bool,
        options: MergeOptions,
    ) -> list[Task[Any]]:
        targets = original(config, out_path, tensor_union, tensor_intersection, options)
        if not isinstance(merge_methods.get(config.merge_method), PCBMerge):
            return targets
        # mergekit takes the tensors' names from a set, in another order in every process.
        saves = [target for target in targets if isinstance(target, SaveTensor)]
        saves.sort(key=lambda save: save.tensor_name)
        nodes = _planned([save.tensor_task for save in saves], options, config)
        ours = [
            save.model_copy(update={"tensor_task": node})
            for save, node in zip(saves, nodes, strict=True)
        ]
        # The last node refers to all tensors once more; left as it is, it would merge them again.
        return [
            *ours,
            *(
                target.model_copy(update={"tensor_save_tasks": tuple(ours)})
                for target in targets
                if isinstance(target, FinalizeModel)
            ),
        ]

    setattr(plan_flat_merge, _WRAPPED, True)
    module.plan_flat_merge = plan_flat_merge  # type: ignore[attr-defined]


def expect(function: Callable[..., Any], parameters: list[str]) -> None:
    """Make sure that the host is the one this module was written for."""
    found = list(inspect.signature(function).parameters)
    if found != parameters:
        raise RuntimeError(f"mergekit's {function.__qualname__} takes {found}, not {parameters}")
    if set(ExecuteMergeMethodTask.model_fields) != _TASK:
        raise RuntimeError("mergekit's ExecuteMergeMethodTask has other fields than in 0.1.5")


def _planned(tasks: Any, options: MergeOptions, configuration: Any) -> list[MergeTensor]:
    if not tasks:
        return []
    plan = Plan(tasks, options, configuration.out_dtype)
    if plan.options.runs and not plan.device_is_there:
        raise PCBError(
            f"merge on {plan.device}",
            f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here",
            "name a device that is there, or leave --cuda out",
        )
    refined.refuse_too_large(plan)
    advice.give(plan, configuration)
    return nodes_of(plan)


def plan_without_merging(document: Any, options: MergeOptions) -> Plan:
    """Plan a merge as mergekit's commands do, and stop there.

    ``document`` is a configuration of ``mergekit-yaml`` or, where its base model is a file, of
    ``mergekit-pytorch``.
    """
    if not isinstance(document, dict) or document.get("merge_method") != "pcb":
        raise PCBError(
            "look into this merge", "it does not use pcb", "write `merge_method: pcb` and a base"
        )
    with damage.named(named_models(document)):
        try:
            targets = _targets(document, options)
        except KeyError as error:
            if error.args[0] not in (document.get("modules") or {}):
                raise
            what = f"mergekit finds no {error} in what it knows of these models"
            raise PCBError("plan this merge", what, "correct that name") from None
    nodes = [target.tensor_task for target in targets if isinstance(target, SaveTensor)]
    if not nodes:
        raise PCBError(
            "look into this merge", "it merges no tensor", "name models that hold weights"
        )
    if not isinstance(nodes[0], MergeTensor):
        raise PCBError(
            "look into this merge",
            "mergekit planned it without mergekit-pcb",
            "install mergekit 0.1.5",
        )
    return nodes[0].plan


def run(document: dict[str, Any], out: pathlib.Path, options: MergeOptions) -> None:
    """Run a whole merge in this process, as mergekit-yaml or mergekit-pytorch would."""
    with damage.named(named_models(document)):
        if is_raw(document):
            tasks = _raw_targets(document, str(out), options)
            Executor(tasks, math_device=options.device, storage_device="cpu").execute()
        else:
            from mergekit.config import MergeConfiguration
            from mergekit.merge import run_merge

            run_merge(MergeConfiguration.model_validate(document), str(out), options)


def _targets(document: dict[str, Any], options: MergeOptions) -> list[Task[Any]]:
    if is_raw(document):
        return _raw_targets(document, "", options, union=True)
    _refuse_raw_options(options)
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.plan import MergePlanner

    config = MergeConfiguration.model_validate(document)
    _refuse_adapters(config, options)
    loaders = LoaderCache()
    loaders.setup(options=options)
    for model in config.referenced_models():
        loaders.get(model)
    architecture = get_architecture_info(config, options)
    out = _model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
    planner = MergePlanner(config, architecture, options=options, out_model_config=out)
    return list(planner.plan_to_disk(""))


def _raw_targets(
    document: dict[str, Any], out: str, options: MergeOptions, *, union: bool = False
) -> list[Task[Any]]:
    from mergekit.scripts import merge_raw_pytorch as raw

    config = raw.RawPyTorchMergeConfig.model_validate(document)
    own = PlanOptions.of(options)
    either = union or own.tensor_union
    return list(raw.plan_flat_merge(config, out, either, own.tensor_intersection, options))


def _refuse_raw_options(options: MergeOptions) -> None:
    for name in ("tensor_union", "tensor_intersection"):
        if getattr(options, name, False):
            option = "--" + name.replace("_", "-")
            because = "it is mergekit-pytorch's, and the models are folders"
            raise PCBError(f"take {option}", because, "leave it out")


def _refuse_adapters(configuration: Any, options: MergeOptions) -> None:
    """Refuse what mergekit cannot load, in words that name the way out."""
    for model in configuration.referenced_models():
        place = pathlib.Path(model.model.path)
        if seen(str(place / "adapter_config.json")) and not seen(str(place / "config.json")):
            remedy = "name it after its base: BASE+ADAPTER"
            raise PCBError(f"merge {place}", "it is an adapter and no model", remedy)
        if model.lora is not None and options.lora_merge_cache is None:
            because = "mergekit adds the adapter to its base first and has no folder for that"
            raise PCBError(f"read {model}", because, "give --lora-merge-cache DIR")


def execute(plan: Plan, observe: Callable[[Prepared], None]) -> Iterator[Any]:
    """Merge tensor by tensor as mergekit would, show each before, and let go of it."""
    shown = plan.observed(observe)
    executor = Executor(nodes_of(shown), math_device=plan.device, storage_device="cpu")
    with damage.named(plan.checkpoints):
        yield from executor.run(quiet=True)
