"""What mergekit is about to merge: its plan, read from inside, and the tensors of that plan.

mergekit hands a method one tensor at a time. For whole-model statistics the method has to
see all of them first, exactly as the merge will: with dtype casts, layer slices, aligned
vocabularies, merged LoRAs and tied weights. All that is in the tasks mergekit plans, so this
room collects those while they are planned and runs their loading half ahead of the merge.
It knows mergekit's plan and nothing of PCB.
"""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mergekit_pcb.task_vectors import Aligned

if TYPE_CHECKING:
    from types import FrameType

    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

LOG = logging.getLogger(__name__)
# Plans are small; more than one is alive only where merges feed each other.
_plans: deque[Plan] = deque(maxlen=8)
_lock = threading.Lock()


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
        self.lock = threading.Lock()
        #: What has been measured of this plan; set and read under ``lock`` by the method.
        self.measured: Any = None
        self._extents: dict[str, Extent] | None = None

    @property
    def models(self) -> tuple[Hashable, ...]:
        """The tasks' models in configuration order, without the base."""
        first = self.tasks[0]
        return tuple(model for model in first.model_order if model != first.base_model)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that inputs are cast to, if the configuration names one."""
        load: Any = self.tasks[0].gather_tensors
        while not hasattr(load, "dtype"):
            load = load.gather_tensors if hasattr(load, "gather_tensors") else _first(load.tensors)
        return getattr(torch, load.dtype.removeprefix("torch.")) if load.dtype else None

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
            gathers = [_without_cast(task.gather_tensors) for task in self.tasks]
            for task, tensors in self._load(gathers, torch.device("cpu")):
                aligned = self._aligned(task, tensors, warn=True)
                if aligned is not None:
                    held = (aligned.base, *aligned.tasks)
                    self._extents[aligned.name] = Extent(
                        len(aligned),
                        sum(tensor.nbytes for tensor in held),
                        any(tensor.dtype == torch.float64 for tensor in held),
                    )
        return self._extents

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


def begin() -> None:
    """Begin a new plan: mergekit has validated the inputs of a whole merge."""
    with _lock:
        if not _plans or _plans[-1].tasks:
            _plans.append(Plan())


def record(task: ExecuteMergeMethodTask) -> Plan:
    """Add a task that is being planned to the current plan."""
    with _lock:
        if not _plans:
            _plans.append(Plan())
        _plans[-1].tasks.append(task)
        return _plans[-1]


def plan_of(task: ExecuteMergeMethodTask) -> Plan | None:
    """The plan that a task belongs to."""
    with _lock:
        for plan in reversed(_plans):
            if any(task is planned for planned in plan.tasks):
                return plan
    return None


def latest() -> Plan | None:
    with _lock:
        return _plans[-1] if _plans else None


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
    frame = inspect.currentframe()
    while frame is not None:
        options = frame.f_locals.get("options") or frame.f_locals.get("merge_options")
        if getattr(options, "quiet", False) is True:
            return True
        frame = frame.f_back
    return False


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
