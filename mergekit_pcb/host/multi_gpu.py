"""mergekit's executor for several accelerators, kept from losing what it has computed.

Its workers queue their results, and a thread of its own collects them until it is told that all
workers have ended. What is queued by then is dropped. mergekit 0.1.5 then takes a tensor for
unmerged that is merged and written, and ends with "No value for required tensor".
"""

from __future__ import annotations

import functools
import queue
import threading
from types import ModuleType
from typing import Any

from mergekit_pcb.host.nodes import MergeTensor
from mergekit_pcb.host.planning import expect

_WRAPPED = "collects_all_for_mergekit_pcb"


class _EndOnceEmpty(threading.Event):
    """Set only once nothing is left to collect."""

    def __init__(self, results: queue.Queue[Any]) -> None:
        super().__init__()
        self._results = results

    def is_set(self) -> bool:
        return super().is_set() and self._results.empty()


def wrap_executor(module: ModuleType) -> None:
    """Let the executor of ``mergekit.multigpu_executor`` collect every result of our merges."""
    executor: Any = module.MultiGPUExecutor
    original = executor.__init__
    if hasattr(original, _WRAPPED):
        return
    expect(original, ["self", "targets", "num_gpus", "storage_device"])

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - that is its name
        original(self, *args, **kwargs)
        if any(isinstance(handle.task(), MergeTensor) for handle in self.serial_schedule.tasks):
            self.done_event = _EndOnceEmpty(self.task_completion_queue)

    setattr(__init__, _WRAPPED, True)
    executor.__init__ = __init__
