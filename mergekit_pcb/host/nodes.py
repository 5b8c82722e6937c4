"""Our nodes of mergekit's graph: one per tensor that ``pcb`` merges, one that measures.

They stand where the planner put its own. What a tensor's merge has to know beyond the tensor
reaches it as an argument, so mergekit's executors decide when, where and in which thread.
"""

from __future__ import annotations

from typing import Any

import torch
from mergekit.common import ImmutableMap
from mergekit.graph import Task
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo
from pydantic import ConfigDict

from mergekit_pcb.host.checkpoints import tied
from mergekit_pcb.host.groups import check_shapes, is_constant, refuse_beyond, refuse_other_buffers
from mergekit_pcb.host.inputs import Inputs, Tensors, group_of
from mergekit_pcb.host.kinds import Kind
from mergekit_pcb.host.parameters import MODEL
from mergekit_pcb.host.plan import Plan, models_of
from mergekit_pcb.host.prepared import KNOWN, Known
from mergekit_pcb.host.read_ahead import what_follows
from mergekit_pcb.host.whole_model import Measured, statistics_of

#: Above the 10,000 of the node that creates the output folder: measuring may yet refuse.
FIRST = 20_000
_OF_A_PLAN = ConfigDict(frozen=True, arbitrary_types_allowed=True)


class MeasureModel(Task[Measured]):
    """The statistics of a whole model, measured once, before anything is written.

    It has no tensors for arguments, or the graph would keep the whole model: it reads the
    inputs by itself, as often as measuring takes.
    """

    model_config = _OF_A_PLAN
    plan: Plan
    tokenizer: BuildTokenizer | None

    def arguments(self) -> dict[str, Task[Any]]:
        return {} if self.tokenizer is None else {"tokenizer": self.tokenizer}

    def execute(self, tokenizer: TokenizerInfo | None = None, **_kwargs: Any) -> Measured:
        return statistics_of(Inputs(self.plan, tokenizer))

    def priority(self) -> int:
        return FIRST

    def main_thread_only(self) -> bool:
        """Before the accelerators start; else all tensors would wait on one of them."""
        return True


# The second base is what mergekit-evolve's in-memory plans ask for.
class MergeTensor(ExecuteMergeMethodTask, Task[torch.Tensor]):
    """One planned tensor, together with the plan it belongs to."""

    model_config = _OF_A_PLAN
    plan: Plan
    measuring: MeasureModel | None
    kind: Kind
    #: That of the base's module, where its architecture tells.
    shape: tuple[int, ...] | None
    #: The tensor that it is in every model.
    tied_to: str | None

    def arguments(self) -> dict[str, Task[Any]]:
        more = {} if self.measuring is None else {"measured": self.measuring}
        return {**super().arguments(), **more}

    def execute(
        self, tensors: Tensors, measured: Measured | None = None, **_kwargs: Any
    ) -> torch.Tensor | None:
        group = group_of(self, tensors)
        check_shapes(group)
        refuse_other_buffers(group)
        what_follows(self.gather_tensors)
        known = Known(
            models_of(self),
            measured.statistics if measured else None,
            self.output_weight.name in measured.names if measured else False,
            self.plan.options.observe,
            self.kind,
            self.shape,
            self.tied_to,
        )
        parameters = ImmutableMap({**dict(self.parameters.items()), KNOWN: known})
        planned = self.model_copy(update={"parameters": parameters})
        merged: torch.Tensor | None = super(MergeTensor, planned).execute(tensors)
        if merged is not None and not is_constant(group):
            refuse_beyond(self.plan.out_dtype, merged, self.output_weight.name)
        return merged


def nodes_of(plan: Plan) -> list[MergeTensor]:
    """A node for every tensor of a plan, in its order."""
    shapes = plan.known_shapes if plan.kinds else {}
    ties = tied(plan) if plan.thins or plan.scope == MODEL else {}
    measuring = MeasureModel(plan=plan, tokenizer=plan.tokenizer) if plan.scope == MODEL else None
    return [
        MergeTensor.model_construct(
            **{name: getattr(task, name) for name in ExecuteMergeMethodTask.model_fields},
            plan=plan,
            measuring=measuring,
            kind=plan.kinds.get(task.output_weight.name, Kind.ELEMENTS),
            shape=shapes.get(task.output_weight.name),
            tied_to=ties.get(task.output_weight.name),
        )
        for task in plan.tasks
    ]
