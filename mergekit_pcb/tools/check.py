"""What a merge would do, found before anything is read at length.

The text of a configuration is checked in ``check_text.py``. Here its merge is planned, and
shapes and dtypes of the inputs are looked at, and values of a few tensors (``check_base.py``).
"""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
import torch
import yaml
from mergekit.scripts import multimerge
from pydantic import BaseModel

from mergekit_pcb.core.cells import BYTES_THERE
from mergekit_pcb.core.vectors import chunk_elements, promoted, scratch_chunks, working_dtype
from mergekit_pcb.errors import PCBError, is_hosts, one_line
from mergekit_pcb.files import size
from mergekit_pcb.host import advice, refined, whole_model
from mergekit_pcb.host.configuration import filters
from mergekit_pcb.host.inputs import Inputs, group_of, refuse_unmergeable
from mergekit_pcb.host.parameters import MODEL
from mergekit_pcb.host.plan import Plan, PlanOptions, values_of
from mergekit_pcb.host.planning import plan_without_merging
from mergekit_pcb.tools import check_base
from mergekit_pcb.tools.check_text import (
    Findings,
    UniqueKeys,
    check_document,
    check_names,
    check_paths,
    entries,
)

#: How often measuring reads the checkpoints, and how often at most where it runs on a GPU.
READS, READS_THERE = 2, 4


class Kept(BaseModel):
    """Fractions of a task vector's elements, the least and the most of any tensor."""

    density: tuple[float, float]
    dare_density: tuple[float, float]


class Outlook(BaseModel):
    """What the merge would do; sizes are in bytes."""

    scope: str
    tasks: int
    #: What is kept of the task vector of each model.
    kept: dict[str, Kept]
    tensors: int
    elements: int
    #: Of all checkpoints together, once.
    input_bytes: int
    #: How often each checkpoint is read, at most: by measuring (``scope: model``) and by the merge.
    reads: int
    output_bytes: int
    #: Inputs, result and working memory of the tensor that needs most, and its name.
    peak_bytes: int
    largest: str
    #: Tensors whose matrices are refined, the floating-point operations of that, and the seconds
    #: that they take at the speed of a product of matrices here, just now, in float32.
    refined: int = 0
    refined_flops: int = 0
    refined_seconds: float = 0.0


class Report(Findings):
    """Everything found; there is an outlook unless errors stand in its way."""

    outlook: Outlook | None = None


def check(text: str, options: Any) -> Report:
    """Check a configuration of mergekit-yaml, mergekit-pytorch or mergekit-multi.

    ``options`` are mergekit's ``MergeOptions``. Stages of mergekit-multi are checked
    as texts only, because the models that earlier stages make do not exist yet.
    """
    report = Report()
    try:
        parts = list(yaml.load_all(text, UniqueKeys))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        report.error("file", f"it is not YAML: {one_line(error)}")
        return report
    documents = [part for part in parts if part is not None]
    if not documents:
        report.error("file", "it is empty")
    elif len(documents) < len(parts):
        report.error(
            "file", "a document in it is empty, which mergekit cannot read; remove a `---`"
        )
    several = len(documents) > 1
    for number, document in enumerate(documents):
        name = document.get("name") if isinstance(document, dict) else None
        prefix = f"stage {name or number + 1}: " if several else ""
        check_document(report, document, prefix, several=several)
    if several:
        check_names(report, documents)
    if several and not report.errors:
        _check_stages(report, text, options)
    elif not report.errors:
        _look(report, documents[0], options)
    return report


def _check_stages(report: Report, text: str, options: Any) -> None:
    """Let mergekit-multi find out which stage feeds which."""
    try:
        stages, dependencies = multimerge.load_config(text, "")
        multimerge.make_tasks(stages, dependencies, options, "", "merged", lazy=True)
    except Exception as error:
        if not is_hosts(error):
            raise
        report.error("stages", f"mergekit-multi cannot run them: {one_line(error)}")


def _look(report: Report, document: dict[str, Any], options: Any) -> None:
    """Plan the merge and look at the shapes and dtypes of its inputs."""
    check_paths(report, document)
    if report.errors > 0:
        return
    try:
        plan = plan_without_merging(document, PlanOptions.of(options, advise=False, runs=False))
        report.outlook = _outlook(report, plan, document)
    except click.ClickException as error:
        report.error("plan", error.format_message())
    except Exception as error:
        if not is_hosts(error):
            raise
        report.error("plan", f"mergekit cannot plan it: {one_line(error)}")
    if report.errors:
        report.outlook = None


def _outlook(report: Report, plan: Plan, document: dict[str, Any]) -> Outlook:
    for topic, remark in advice.remarks(plan, document).items():
        report.warn(topic, remark)
    names = [task.output_weight.name for task in plan.tasks]
    for where, part in _all_filters(document):
        if not any(part in name for name in names):
            report.warn(where, f"the filter {part!r} matches no tensor")
    inputs = Inputs(plan)
    if path := plan.statistics_file:
        try:
            whole_model.reuse(inputs, pathlib.Path(path))
        except PCBError as error:
            report.error("statistics", error.format_message())
    for remark in check_base.remarks(inputs, [str(model) for model in (plan.base, *plan.models)]):
        report.warn("base_model", remark)
    measuring = READS if plan.device.type == "cpu" else READS_THERE
    reads = 1 + (measuring if plan.scope == MODEL and not path else 0)
    return _sizes(report, inputs, document, reads)


def _sizes(report: Report, inputs: Inputs, document: dict[str, Any], reads: int) -> Outlook:
    plan = inputs.plan
    refinements = refined.refinements(plan)
    operations = sum(refined.flops(own, len(plan.models)) for own in refinements.values())
    rounded: dict[str, str] = {}
    partly: list[str] = []
    elements = read = written = peak = 0
    largest = ""
    for task, tensors in inputs.shapes():
        name, group = task.output_weight.name, group_of(task, tensors)
        present = {entry.id: entry.tensor for entry in group.entries}
        if missing := [str(model) for model in plan.models if model not in present]:
            partly.append(f"{name} ({missing[0]})")
        try:
            refuse_unmergeable(task, group)
        except PCBError as error:
            report.error(name, error.format_message())
            continue
        tensor = group.entries[0].tensor
        if not tensor.is_floating_point():
            continue
        cast = plan.dtype or promoted(present.values())
        for model, own in present.items():
            if plan.dtype is not None and _precision(own.dtype) < _precision(plan.dtype):
                rounded.setdefault(str(model), str(own.dtype).removeprefix("torch."))
        read += sum(own.nbytes for own in present.values())
        elements += tensor.numel()
        out = plan.out_dtype or cast
        written += tensor.numel() * out.itemsize
        chunk = min(tensor.numel(), chunk_elements(plan.device))
        scratch = scratch_chunks(len(present) - 1) * chunk
        need = tensor.numel() * cast.itemsize * (len(present) + 1)
        need += scratch * working_dtype(cast).itemsize
        thinned = sum(density < 1 for density in values_of(task)["dare_density"].values())
        need += thinned * -(-tensor.numel() // 8)  # a bit an element
        if plan.device.type != "cpu":  # counts of one rank a task, or of both ends of a whole model
            need += BYTES_THERE * (len(present) - 1) * (2 if plan.scope == MODEL else 1)
        if own_refinement := refinements.get(name):
            need += refined.working_bytes(own_refinement, working_dtype(cast).itemsize)
        if need > peak:
            peak, largest = need, name
    if rounded:
        report.warn("dtype", _rounding(rounded, document["dtype"]))
    if partly:
        refused = plan.is_raw and not plan.options.tensor_union
        report.warn("tensors", _partly_there(partly, refused=refused))
    device = plan.device if plan.device_is_there else torch.device("cpu")
    return Outlook(
        scope=plan.scope,
        tasks=len(plan.models),
        kept=_kept(plan),
        tensors=len(plan.tasks),
        elements=elements,
        input_bytes=read,
        reads=reads,
        output_bytes=written,
        peak_bytes=peak,
        largest=largest,
        refined=len(refinements),
        refined_flops=operations,
        refined_seconds=operations / _flops_per_second(device) if operations else 0.0,
    )


def _rounding(models: dict[str, str], asked: str) -> str:
    """``models`` are those that the dtype ``asked`` for rounds, with their own."""
    model, dtype = next(iter(models.items()))
    others = f" and {len(models) - 1} more" if len(models) > 1 else ""
    wide = "float64" if "float64" in models.values() else "float32"
    return (
        f"{asked} rounds the {dtype} values of {model}{others} before they are subtracted, and "
        f"task vectors are small differences; set dtype: {wide} and out_dtype: {asked}"
    )


def _partly_there(tensors: Sequence[str], *, refused: bool) -> str:
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    remedy = "; mergekit-pytorch refuses that without --tensor-union or --tensor-intersection"
    return f"not every model has {tensors[0]}{more}{remedy if refused else ''}"


def _kept(plan: Plan) -> dict[str, Kept]:
    found: dict[str, dict[str, list[float]]] = {}
    for values in plan.values():
        for name in Kept.model_fields:
            for model, fraction in values[name].items():
                found.setdefault(str(model), {}).setdefault(name, []).append(fraction)
    return {
        model: Kept(**{name: (min(each), max(each)) for name, each in own.items()})
        for model, own in found.items()
    }


def _precision(dtype: torch.dtype) -> float:
    """The distance of neighbouring numbers at 1; none for integers, which are not rounded."""
    return torch.finfo(dtype).eps if dtype.is_floating_point else math.inf


def _flops_per_second(device: torch.device) -> float:
    """What a product of two matrices reaches here; the best of three."""
    side, best = 1024, math.inf
    one = torch.ones(side, side, device=device)
    for _ in range(4):  # the first also loads what computes it
        began = time.perf_counter()
        float((one @ one)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _all_filters(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    places = [("parameters", document)]
    places += [(f"{where}.parameters", entry) for where, entry, _ in entries(document)]
    for where, owner in places:
        for name, setting in (owner.get("parameters") or {}).items():
            for part in filters(setting):
                yield f"{where}.{name}", part


def sentences(report: Report) -> Sequence[str]:
    """The report as lines for a terminal."""
    lines = [f"{f.level}: {f.where}: {f.what}" for f in report.findings]
    if not lines:
        lines.append("no mistakes found")
    outlook = report.outlook
    if outlook is not None:
        measuring = outlook.reads - 1
        reads = f"{outlook.reads} times, {measuring} of them to measure" if measuring else "once"
        if measuring > READS:
            reads = f"up to {reads}"
        lines += [
            f"{outlook.tensors} tensors of {outlook.elements:,} elements, "
            f"{outlook.tasks} tasks, scope: {outlook.scope}",
            *_kept_sentences(outlook.kept),
            f"reads {size(outlook.input_bytes)} of checkpoints {reads}; "
            f"writes {size(outlook.output_bytes)}",
            f"the largest tensor, {outlook.largest}, takes {size(outlook.peak_bytes)} to merge",
        ]
        if outlook.refined:
            lines.append(
                f"{outlook.refined} tensors are refined: {outlook.refined_flops:.2g} operations, "
                f"about {outlook.refined_seconds:.2g} s at this machine's speed in float32, and "
                "twice that where float64 is needed"
            )
    return lines


def _kept_sentences(kept: dict[str, Kept]) -> Iterator[str]:
    """What is kept of every task, or of each where they differ."""
    owners: dict[str, list[str]] = {}
    for model, own in kept.items():
        said = f"keeps {_share(own.density)} of its elements"
        if own.dare_density[0] < 1:
            said += f", chosen among the {_share(own.dare_density)} that DARE leaves at random"
        owners.setdefault(said, []).append(model)
    for said, models in owners.items():
        yield f"{'each task' if len(owners) == 1 else ' and '.join(models)} {said}"


def _share(between: tuple[float, float]) -> str:
    low, high = (f"{100 * value:.4g}" for value in between)
    return f"{low} %" if low == high else f"{low} to {high} %"
