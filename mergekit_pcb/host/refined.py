"""What ``refine`` and ``spectrum`` mean for a plan: which tensors, by what right, what memory.

Matrices and their shapes are told by the base's architecture (``architecture.py``), so nothing is
read; where there is none, by the inputs.
"""

from __future__ import annotations

import functools

import psutil
import torch

from mergekit_pcb.core import solve, spectrum
from mergekit_pcb.core.refine import Refinement
from mergekit_pcb.errors import PCBError
from mergekit_pcb.host.inputs import Inputs
from mergekit_pcb.host.kinds import Kind, assumed, layout_of, unrefined
from mergekit_pcb.host.parameters import refinement_of
from mergekit_pcb.host.plan import Plan, values_of


@functools.lru_cache(maxsize=1)  # of a plan it is asked several times in a row
def refinements(plan: Plan) -> dict[str, Refinement]:
    """What is done to the matrices of every tensor that has any, by its name in the output.

    Tensors whose shapes the architecture does not tell, such as experts that lie apart, lack.
    """
    found: dict[str, Refinement] = {}
    shapes = _shapes(plan)
    for task in plan.tasks:
        name = task.output_weight.name
        if name in shapes and name in plan.kinds:
            layout = layout_of(plan.kinds[name], shapes[name])
            if (own := refinement_of(values_of(task), layout)) is not None:
                found[name] = own
    return found


def _shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    if not plan.kinds:
        return {}
    if Kind.ASSUMED not in plan.kinds.values():
        return plan.known_shapes
    return {
        task.output_weight.name: tuple(tensor.shape)
        for task, tensors in Inputs(plan).shapes()
        for tensor in tensors.values()
        if tensor is not None
    }


def working_bytes(refinement: Refinement, itemsize: int) -> int:
    """Memory of refining a tensor beyond its inputs and its result, if float32 suffices."""
    layout = refinement.layout
    solving = solve.working_elements(layout) if refinement.anchor is not None else 0
    evening = spectrum.working_elements(layout.rows, layout.columns)
    if refinement.exponent == 1:
        evening = 0
    return (layout.elements + max(solving, evening)) * itemsize


def flops(refinement: Refinement, tasks: int) -> int:
    """Floating-point operations of refining a tensor."""
    layout = refinement.layout
    found = solve.flops(layout, tasks) if refinement.anchor is not None else 0
    if refinement.exponent != 1:
        found += layout.count * spectrum.flops(layout.rows, layout.columns)
    return found


def remarks(plan: Plan) -> dict[str, str]:
    """What there is to say of the tensors that are refined and of those that are not, by topic."""
    kinds = plan.kinds
    if not kinds:
        return {}
    found: dict[str, str] = {}
    if Kind.ASSUMED in kinds.values():
        names = list(refinements(plan))
        found["refine"] = assumed(names, "the base has no configuration that transformers knows")
    else:
        names = [name for name, kind in kinds.items() if kind not in (Kind.ELEMENTS, Kind.UNKNOWN)]
    if not names:
        found["refine"] = "no tensor is refined: none that the filters choose is known as a matrix"
    if unknown := [name for name, kind in kinds.items() if kind is Kind.UNKNOWN]:
        found["unknown"] = unrefined(unknown)
    return found


def refuse_too_large(plan: Plan) -> None:
    """Refuse matrices that the merge's device has not the memory to refine."""
    refined = refinements(plan)
    if not refined or not plan.device_is_there:
        return
    total = _memory_of(plan.device)
    itemsize = 8 if plan.dtype == torch.float64 else 4
    for name, refinement in refined.items():
        need = working_bytes(refinement, itemsize)
        if need > total:
            layout = refinement.layout
            raise PCBError(
                f"refine tensor {name}",
                f"its {layout.rows} × {layout.columns} matrix takes {need / 2**30:.1f} GiB beside "
                f"the models, and {plan.device} has {total / 2**30:.1f}",
                f"leave it to PCB by a filter, `refine: [{{filter: {name}, value: none}}, {{value: "
                "solve}]` and the same for spectrum, or merge where there is more memory",
            )


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
