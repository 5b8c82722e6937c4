"""Where tensors come from: the loading half of a plan, run ahead of the merge.

Tensors arrive as the merge will get them: cast, cut into slices, vocabularies aligned, LoRAs
merged, heads tied. Also the files they lie in, and which of them make which of the output.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.graph import Executor, TaskHandle, TaskUniverse
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.tokenizer import TokenizerInfo

from mergekit_pcb.core.vectors import Aligned
from mergekit_pcb.errors import PCBError
from mergekit_pcb.host import damage
from mergekit_pcb.host.checkpoints import loaders, tied, tokenizer_files
from mergekit_pcb.host.groups import aligned, check_shapes, is_infinite, refuse_other_buffers
from mergekit_pcb.host.method import PCBMerge
from mergekit_pcb.host.parameters import MODEL
from mergekit_pcb.host.plan import Plan, sources_of

Tensors = Mapping[Any, torch.Tensor | None]


@dataclass(frozen=True)
class Size:
    """Elements and dimensions of one tensor, bytes of it in all inputs, whether any is float64."""

    elements: int
    dimensions: int
    nbytes: int
    wide: bool


class Inputs:
    """What a plan reads.

    ``tokenizer`` is the result of the plan's tokenizer task, where that has run already.
    """

    def __init__(self, plan: Plan, tokenizer: TokenizerInfo | None = None) -> None:
        self.plan = plan
        self._tokenizer = tokenizer

    def tensors(self, device: torch.device) -> Iterator[Aligned]:
        """Load every tensor that the base and all models have in one shape, one at a time.

        The order is mergekit's own loading order. What is integers before casts takes no part:
        a mask or a counter. Of the tensors before, nothing is kept while the next are loaded.
        """
        sizes, loads = self.sizes, [task.gather_tensors for task in self.plan.tasks]
        for task, tensors in self._load(loads, device):
            if task.output_weight.name in sizes:
                yield aligned(group_of(task, tensors))

    def shapes(self) -> Iterator[tuple[ExecuteMergeMethodTask, Tensors]]:
        """Every planned tensor as the inputs have it, before casts; for shapes and dtypes.

        Safetensors files are mapped, not read, for this.
        """
        loads = [_without_cast(task.gather_tensors) for task in self.plan.tasks]
        return self._load(loads, torch.device("cpu"))

    @property
    def sizes(self) -> dict[str, Size]:
        """How large each tensor is that takes part in a whole model, by its name in the output."""
        return self._sizes_and_rest[0]

    @property
    def left_aside(self) -> list[str]:
        """Floating-point tensors that take no part, because not every input has them alike."""
        return self._sizes_and_rest[1]

    def refuse_unmergeable(self) -> None:
        """Raise :class:`PCBError` for the first tensor whose shapes say that it has no merge."""
        if (obstacle := self._sizes_and_rest[2]) is not None:
            raise obstacle

    @functools.cached_property
    def _sizes_and_rest(self) -> tuple[dict[str, Size], list[str], PCBError | None]:
        sizes: dict[str, Size] = {}
        rest, obstacle = [], None
        # Where each tensor is ranked by itself, a head is, too.
        ties = tied(self.plan) if self.plan.scope == MODEL else {}
        for task, tensors in self.shapes():
            name, group = task.output_weight.name, group_of(task, tensors)
            present = group.tensors
            try:
                refuse_unmergeable(task, group)
            except PCBError as error:
                obstacle = obstacle or error
            if name in ties or (present and is_infinite(group, self.plan.dtype)):
                continue
            floating = all(tensor.is_floating_point() for tensor in present)
            alike = len(present) == len(task.model_order) and len({t.shape for t in present}) == 1
            if floating and alike:
                sizes[name] = Size(
                    present[0].numel(),
                    present[0].ndim,
                    sum(tensor.nbytes for tensor in present),
                    any(tensor.dtype == torch.float64 for tensor in present),
                )
            elif floating:
                rest.append(name)
        return sizes, rest, obstacle

    def _load(
        self, loads: Sequence[Any], device: torch.device
    ) -> Iterator[tuple[ExecuteMergeMethodTask, Tensors]]:
        waiting: dict[Any, list[ExecuteMergeMethodTask]] = {}
        for task, load in zip(self.plan.tasks, loads, strict=True):
            waiting.setdefault(load, []).append(task)
        universe = TaskUniverse(waiting)
        known: dict[TaskHandle, Any] = {}
        tokenizer = self.plan.tokenizer
        if tokenizer is not None and self._tokenizer is not None:
            known[universe.add_task(tokenizer)] = self._tokenizer
        targets = [universe.add_task(load) for load in waiting]
        executor = Executor(targets, math_device=device, storage_device=device, cached_values=known)
        with damage.named(self.plan.checkpoints):
            for load, tensors in executor.run(quiet=True):
                for task in waiting[load]:
                    yield task, tensors
                tensors.clear()  # the executor holds the same, and would hold it beside the next

    def files(self, model: Any) -> list[pathlib.Path]:
        """The files that are read of a model: shards, and a tokenizer that is aligned."""
        cache, key = loaders(self.plan, model)
        index = cache.get(key).index
        folder = pathlib.Path(index.base_path)
        names = [shard.filename for shard in index.shards]
        files = [folder / name for name in names]
        return sorted(files + (tokenizer_files(folder) if self.plan.tokenizer is not None else []))

    def tokenizer_source(self) -> tuple[str, list[pathlib.Path]] | None:
        """A model that gives the tokenizer and nothing else, and its files, where they are here."""
        source: Any = getattr(self.plan.tokenizer, "tokenizer_source", None)
        if source in ("union", "base", None, self.plan.base, *self.plan.models):
            return None
        return str(source), tokenizer_files(pathlib.Path(source.model.path))

    def layout(self) -> Iterable[str]:
        """Which tensors of the inputs make which of the output, a line each, sorted by name."""
        models = (self.plan.base, *self.plan.models)
        tasks = {task.output_weight.name: task for task in self.plan.tasks}
        for name in sorted(self.sizes):
            how, infos = _vocabulary(tasks[name].gather_tensors, models), sources_of(tasks[name])
            sources = [infos[model].name for model in models] if infos is not None else []
            yield json.dumps([name, self.sizes[name].elements, sources, how])


def group_of(task: ExecuteMergeMethodTask, tensors: Tensors) -> TensorGroup:
    """The group that mergekit will make of a planned tensor, without models that lack it."""
    entries = [
        TensorEntry(id=model, tensor=tensor, is_base=model == task.base_model)
        for model in task.model_order
        if (tensor := tensors.get(model)) is not None
    ]
    return TensorGroup(tuple(entries), TensorMetadata.from_weight_info(task.output_weight))


def refuse_unmergeable(task: ExecuteMergeMethodTask, group: TensorGroup) -> None:
    """Raise :class:`PCBError` without a base, for other shapes, and for integers that differ."""
    ids = [entry.id for entry in group.entries]
    if len(ids) > 1 or not task.output_weight.optional:
        PCBMerge().validate_inputs(ids, task.base_model, group_name=task.output_weight.name)
    check_shapes(group)
    refuse_other_buffers(group)


def _vocabulary(load: Any, models: Sequence[Any]) -> str:
    """How a loading task aligns vocabularies, the inputs named by their position."""
    if not hasattr(load, "gather_tensors"):
        return ""
    task, tokens = getattr(load, "tokenizer_task", None), getattr(load, "tokens", None)
    parts = [
        getattr(load, "vocabulary_axis", None),
        getattr(load, "pad_to_multiple_of", None),
        sorted((token, repr(how)) for token, how in tokens.items()) if tokens else None,
        (repr(task.tokenizer_source), task.add_tokens) if task is not None else None,
    ]
    text = f"{type(load).__name__} {parts}"
    for position, model in enumerate(models):
        text = text.replace(repr(model), f"model {position}")
    return text


def _without_cast(load: Any) -> Any:
    """The same loading without casts to the merge's dtype, which would read the data."""
    if hasattr(load, "gather_tensors"):
        return load.model_copy(update={"gather_tensors": _without_cast(load.gather_tensors)})
    if hasattr(load, "tensors"):
        items = {model: _without_cast(inner) for model, inner in load.tensors.items()}
        return type(load)(tensors=items)
    # On a GPU a tensor that is read there is no longer mapped.
    fields = {name: None for name in ("dtype", "device") if hasattr(load, name)}
    return load.model_copy(update=fields) if fields else load
