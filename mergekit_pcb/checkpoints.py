"""What mergekit is about to merge: its plan, read from inside, and the tensors of that plan.

mergekit hands a method one tensor at a time. For whole-model statistics the method has to
see all of them first, exactly as the merge will: with dtype casts, layer slices, aligned
vocabularies, merged LoRAs and tied weights. All that is in the tasks mergekit plans, so this
room collects those while they are planned and runs their loading half ahead of the merge.
It knows mergekit's plans and nothing of PCB.
"""

from __future__ import annotations

import inspect
import json
import logging
import pathlib
import re
import sys
import threading
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import yaml

from mergekit_pcb.errors import PCBError
from mergekit_pcb.task_vectors import Aligned

if TYPE_CHECKING:
    from types import FrameType

    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

LOG = logging.getLogger(__name__)
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# What old checkpoints hold of causal masks and positions.
BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "rotary_emb.inv_freq",
    "position_ids",
)
# Plans are small; more than one is alive only where merges feed each other.
_plans: deque[Plan] = deque(maxlen=64)
_lock = threading.Lock()
_thread = threading.local()  # .plan: what this thread is planning


@dataclass(frozen=True)
class Extent:
    """Elements of one tensor, bytes of it in all inputs, and whether any is float64."""

    elements: int
    nbytes: int
    wide: bool


class Plan:
    """The planned tensors of one merge, in the order of planning."""

    def __init__(self) -> None:
        self.tasks: list[ExecuteMergeMethodTask] = []
        self._identities: set[int] = set()
        self.lock = threading.Lock()
        #: What has been measured of this plan; set and read under ``lock`` by the method.
        self.measured: Any = None
        #: What the user has been told about this plan already, by topic.
        self.remarks: dict[str, str] = {}
        self._extents: dict[str, Extent] | None = None

    def add(self, task: ExecuteMergeMethodTask) -> None:
        self.tasks.append(task)
        self._identities.add(id(task))

    def __contains__(self, task: ExecuteMergeMethodTask) -> bool:
        return id(task) in self._identities

    @property
    def models(self) -> tuple[Hashable, ...]:
        """The tasks' models in configuration order, without the base."""
        return models_of(self.tasks[0])

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that inputs are cast to, if the configuration names one."""
        load: Any = self.tasks[0].gather_tensors
        while not hasattr(load, "dtype"):
            load = load.gather_tensors if hasattr(load, "gather_tensors") else _first(load.tensors)
        return getattr(torch, load.dtype.removeprefix("torch.")) if load.dtype else None

    def files(self, model: Any) -> list[pathlib.Path]:
        """The files that the plan reads of a model: shards, and a tokenizer it aligns."""
        cache, key = self._cache(model)
        index = cache.get(key).index
        folder = pathlib.Path(index.base_path)
        names = [shard.filename for shard in index.shards]
        if any(hasattr(task.gather_tensors, "tokenizer_task") for task in self.tasks):
            names += [name for name in TOKENIZER_FILES if (folder / name).exists()]
        return [folder / name for name in sorted(names)]

    def layout(self) -> Iterator[str]:
        """Which tensors of the inputs make which of the output, a line each, sorted by name."""
        extents, models = self.extents(), (self.tasks[0].base_model, *self.models)
        by_name = {task.output_weight.name: task.gather_tensors for task in self.tasks}
        for name in sorted(extents):
            load = by_name[name]
            how = self._vocabulary(load)
            load = getattr(load, "gather_tensors", load)
            infos = getattr(load, "weight_info", None)
            sources = [infos[model].name for model in models] if infos is not None else []
            yield json.dumps([name, extents[name].elements, sources, how])

    def _vocabulary(self, load: Any) -> str:
        """How a loading task aligns vocabularies, the inputs named by their position."""
        if not hasattr(load, "gather_tensors"):
            return ""
        task = getattr(load, "tokenizer_task", None)
        tokens = getattr(load, "tokens", None)
        parts = [
            getattr(load, "vocabulary_axis", None),
            getattr(load, "pad_to_multiple_of", None),
            sorted((token, repr(how)) for token, how in tokens.items()) if tokens else None,
            (repr(task.tokenizer_source), task.add_tokens) if task is not None else None,
        ]
        text = f"{type(load).__name__} {parts}"
        for position, model in enumerate((self.tasks[0].base_model, *self.models)):
            text = text.replace(repr(model), f"model {position}")
        return text

    def left_out(self) -> list[str]:
        """Tensors of the base that mergekit leaves out of the result.

        mergekit-pytorch leaves out what only the base has. In plans of mergekit-yaml layer
        numbers are left aside, because slices may leave layers out on purpose, and the answer
        is empty where mergekit fuses tensors, because only transformers knows which. Buffers
        that models make anew do not count.
        """
        cache, key = self._cache(self.tasks[0].base_model)
        loader = cache.loaders.get(key)
        if loader is None:
            return []
        held = loader.index.tensor_paths
        if self._is_raw():
            return sorted(set(held) - {task.output_weight.name for task in self.tasks})
        planned: set[str] = set()
        for task in self.tasks:
            load: Any = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
            info = load.weight_info[task.base_model]
            names = [info.name, *(info.aliases or ()), *(info.tied_names or ())]
            if not info.optional and not any(name in held for name in names):
                return []
            planned |= {_kind(name) for name in names}
        left = (name for name in held if _kind(name) not in planned)
        return sorted(name for name in left if not name.endswith(BUFFERS))

    def merged_before(self) -> Iterator[tuple[Hashable, dict[str, Any]]]:
        """Models that mergekit made, and the configurations it left beside them."""
        for model in self.models if not self._is_raw() else ():
            folder: Any = getattr(model, "model", None)
            file = pathlib.Path(str(getattr(folder, "path", ""))) / "mergekit_config.yml"
            try:
                document = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue
            if isinstance(document, dict):
                yield model, document

    def _cache(self, model: Any) -> tuple[Any, Any]:
        """The cache of mergekit's loaders for this plan, and what it calls a model."""
        if self._is_raw():
            from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache

            return SimpleLoaderCache(), model.model.path
        from mergekit.io.tasks import LoaderCache

        return LoaderCache(), model

    def _is_raw(self) -> bool:
        return hasattr(self.tasks[0].gather_tensors, "tensors")

    def groups(self, device: torch.device) -> Iterator[Aligned]:
        """Load every tensor that the base and all models hold in one shape, one at a time.

        The order is mergekit's own loading order. What cannot take part is named once.
        """
        for task, tensors in self._load([task.gather_tensors for task in self.tasks], device):
            aligned = self._aligned(task, tensors)
            if aligned is not None:
                yield aligned

    def extents(self) -> dict[str, Extent]:
        """How large each tensor of a walk is, by its name in the output.

        Looks at shapes only: safetensors files are mapped, not read, for this.
        """
        if self._extents is None:
            self._extents = {}
            for task, tensors in self.look():
                aligned = self._aligned(task, tensors, warn=True)
                if aligned is not None:
                    held = (aligned.base, *aligned.tasks)
                    self._extents[aligned.name] = Extent(
                        len(aligned),
                        sum(tensor.nbytes for tensor in held),
                        any(tensor.dtype == torch.float64 for tensor in held),
                    )
        return self._extents

    def execute(self, device: str | torch.device) -> Iterator[Any]:
        """Merge tensor by tensor as mergekit would, and let go of each."""
        from mergekit.graph import Executor

        yield from Executor(self.tasks, math_device=device, storage_device="cpu").run(quiet=True)

    def look(
        self,
    ) -> Iterator[tuple[ExecuteMergeMethodTask, Mapping[Hashable, torch.Tensor | None]]]:
        """Every planned tensor as the inputs hold it, before casts; for shapes and dtypes."""
        gathers = [_without_cast(task.gather_tensors) for task in self.tasks]
        return self._load(gathers, torch.device("cpu"))

    def _load(
        self, gathers: Sequence[Any], device: torch.device
    ) -> Iterator[tuple[ExecuteMergeMethodTask, dict[Hashable, torch.Tensor]]]:
        from mergekit.graph import Executor

        waiting: dict[Any, list[ExecuteMergeMethodTask]] = {}
        for task, gather in zip(self.tasks, gathers, strict=True):
            waiting.setdefault(gather, []).append(task)
        executor = Executor(list(waiting), math_device=device, storage_device=device)
        for gather, tensors in executor.run(quiet=True):
            for task in waiting[gather]:
                yield task, tensors

    def _aligned(
        self,
        task: ExecuteMergeMethodTask,
        tensors: Mapping[Hashable, torch.Tensor | None],
        *,
        warn: bool = False,
    ) -> Aligned | None:
        name = task.output_weight.name
        entries = [tensors.get(model) for model in (task.base_model, *self.models)]
        held = [tensor for tensor in entries if tensor is not None]
        if not all(tensor.is_floating_point() for tensor in held):
            return None
        if len(held) < len(entries) or any(t.shape != held[0].shape for t in held):
            if warn:
                LOG.warning(
                    "tensor %s takes no part in the statistics of the whole model, because not "
                    "every input holds it in one shape; it is merged with them all the same",
                    name,
                )
            return None
        return Aligned.of(name, held[0], held[1:])


def begin() -> Plan:
    """Begin a new plan: mergekit has validated the inputs of a whole merge."""
    plan: Plan | None = getattr(_thread, "plan", None)
    if plan is None or plan.tasks:
        plan = _thread.plan = Plan()
        with _lock:
            _plans.append(plan)
    return plan


def record(task: ExecuteMergeMethodTask) -> Plan:
    """Add a task that is being planned to this thread's plan."""
    plan: Plan | None = getattr(_thread, "plan", None)
    if plan is None:
        plan = begin()
    plan.add(task)
    return plan


def plan_of(task: ExecuteMergeMethodTask) -> Plan | None:
    """The plan that a task belongs to."""
    with _lock:
        return next((plan for plan in reversed(_plans) if task in plan), None)


def is_raw(document: Mapping[str, Any]) -> bool:
    """Whether a configuration is for mergekit-pytorch: its base model is a file."""
    base = document.get("base_model")
    return isinstance(base, str) and pathlib.Path(base).is_file()


def models_of(task: ExecuteMergeMethodTask) -> tuple[Hashable, ...]:
    """The models of a planned tensor in configuration order, without the base."""
    return tuple(model for model in task.model_order if model != task.base_model)


def plan_without_merging(configuration: str, options: Any) -> Plan:
    """Plan a merge as mergekit's commands do, and stop there.

    ``configuration`` is YAML for ``mergekit-yaml`` or, where its base model is a file, for
    ``mergekit-pytorch``; ``options`` are mergekit's ``MergeOptions``.
    """
    document = yaml.safe_load(configuration)
    if not isinstance(document, dict) or document.get("merge_method") != "pcb":
        raise PCBError(
            "look into this merge", "it does not use pcb", "write `merge_method: pcb` and a base"
        )
    begin()
    if is_raw(document):
        _plan_files(document, options)
    else:
        _plan_models(document, options)
    plan: Plan = _thread.plan
    if not plan.tasks:
        raise PCBError(
            "look into this merge", "it merges no tensor", "name models that hold weights"
        )
    return plan


def run(configuration: str, out: pathlib.Path, options: Any) -> None:
    """Run a whole merge in this process, as mergekit-yaml or mergekit-pytorch would."""
    document = yaml.safe_load(configuration)
    if is_raw(document):
        from mergekit.graph import Executor
        from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

        config = RawPyTorchMergeConfig.model_validate(document)
        union, intersection = False, False
        tasks = plan_flat_merge(config, str(out), union, intersection, options)
        Executor(tasks, math_device=options.device, storage_device="cpu").execute()
    else:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge

        run_merge(MergeConfiguration.model_validate(document), str(out), options)


def _plan_files(document: Any, options: Any) -> None:
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

    config = RawPyTorchMergeConfig.model_validate(document)
    plan_flat_merge(config, "", tensor_union=True, tensor_intersection=False, options=options)


def _plan_models(document: Any, options: Any) -> None:
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.plan import MergePlanner

    config = MergeConfiguration.model_validate(document)
    loaders = LoaderCache()
    loaders.setup(options=options)
    for model in config.referenced_models():
        loaders.get(model)
    architecture = get_architecture_info(config, options)
    out = _model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
    MergePlanner(config, architecture, options=options, out_model_config=out).plan_to_disk("")


def caller(depth: int) -> dict[str, Any]:
    """Local names of the function ``depth`` calls above this function's caller.

    mergekit shows a method no more than ids or one tensor; what it is about to do stands in
    the frames that call the method. This is the one place that looks there.
    """
    frame: FrameType | None = inspect.currentframe()
    for _ in range(depth + 1):
        frame = frame.f_back if frame is not None else None
    return dict(frame.f_locals) if frame is not None else {}


def planned_task(names: dict[str, Any]) -> ExecuteMergeMethodTask | None:
    """``self`` among local names, if it is a task of mergekit's that executes a method."""
    adapter = sys.modules.get("mergekit.merge_methods.task_adapter")
    candidate = names.get("self")
    if adapter is not None and isinstance(candidate, adapter.ExecuteMergeMethodTask):
        return candidate
    return None


def is_quiet() -> bool:
    """Whether the command that is running was told to be quiet (``--quiet``)."""
    from mergekit.options import MergeOptions

    frame = inspect.currentframe()
    while frame is not None:
        for name in ("options", "merge_options"):
            options = frame.f_locals.get(name)
            if isinstance(options, MergeOptions):
                return bool(options.quiet)
        frame = frame.f_back
    return False


def _kind(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def _without_cast(load: Any) -> Any:
    """The same loading without casts to the merge's dtype, which would read the data."""
    if hasattr(load, "gather_tensors"):
        return load.model_copy(update={"gather_tensors": _without_cast(load.gather_tensors)})
    if hasattr(load, "tensors"):
        items = {model: _without_cast(inner) for model, inner in load.tensors.items()}
        return type(load)(tensors=items)
    return load.model_copy(update={"dtype": None}) if hasattr(load, "dtype") else load


def _first(mapping: Any) -> Any:
    return next(iter(mapping.values()))
