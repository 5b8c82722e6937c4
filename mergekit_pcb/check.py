"""What a configuration says and would do, found before anything is read at length.

mergekit ignores what it does not know; this room knows the names, levels and ranges of
everything a ``pcb`` configuration can hold, and looks at shapes and dtypes, never at values.
"""

from __future__ import annotations

import difflib
import logging
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import click
import torch
import yaml
from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge_methods.base import (
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from pydantic import BaseModel

from mergekit_pcb import checkpoints, whole_model
from mergekit_pcb.errors import HOST_ERRORS, PCBError, one_line
from mergekit_pcb.method import PARAMETERS, check_shapes, left_out
from mergekit_pcb.task_vectors import chunk_elements, promoted, scratch_chunks, working_dtype

ERROR: Literal["error"] = "error"
WARNING: Literal["warning"] = "warning"
SPECS = {spec.name: spec for spec in PARAMETERS}
PER_MODEL = sorted(s.name for s in PARAMETERS if s.scope == ParameterScope.NON_BASE)


class Finding(BaseModel):
    """One thing that is wrong or suspicious, and where."""

    level: Literal["error", "warning"]
    where: str
    what: str


class Outlook(BaseModel):
    """What the merge would do; sizes are in bytes."""

    scope: str
    tasks: int
    tensors: int
    elements: int
    #: Of all checkpoints together, once.
    input_bytes: int
    #: How often each checkpoint is read: by measuring walks (``scope: model``) and by the merge.
    reads: int
    output_bytes: int
    #: Inputs, result and working memory of the tensor that needs most, and its name.
    peak_bytes: int
    largest: str


class Report(BaseModel):
    """Everything found; there is an outlook unless errors stand in its way."""

    findings: list[Finding] = []
    outlook: Outlook | None = None

    @property
    def errors(self) -> int:
        return sum(finding.level == ERROR for finding in self.findings)

    def error(self, where: str, what: str) -> None:
        self.findings.append(Finding(level=ERROR, where=where, what=what))

    def warn(self, where: str, what: str) -> None:
        self.findings.append(Finding(level=WARNING, where=where, what=what))


def check(text: str, options: Any) -> Report:
    """Check a configuration of mergekit-yaml, mergekit-pytorch or mergekit-multi.

    ``options`` are mergekit's ``MergeOptions``. Stages of mergekit-multi are checked
    as texts only, because the models that earlier stages make do not exist yet.
    """
    report = Report()
    try:
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except yaml.YAMLError as error:
        report.error("file", f"it is not YAML: {one_line(error)}")
        return report
    if not documents:
        report.error("file", "it is empty")
    several = len(documents) > 1
    for number, document in enumerate(documents):
        name = document.get("name") if isinstance(document, dict) else None
        prefix = f"stage {name or number + 1}: " if several else ""
        _check_document(report, document, prefix, {"name"} if several else set())
    if not several and not report.errors:
        _look(report, text, documents[0], options)
    return report


# --- The text ---------------------------------------------------------------------------------


def _check_document(report: Report, document: Any, prefix: str, extra: set[str]) -> None:
    if not isinstance(document, dict):
        report.error(f"{prefix}file", "it is no mapping of names to values")
        return
    method = document.get("merge_method")
    if method != "pcb":
        here = f"{prefix}merge_method"
        if extra:  # other stages may use what they like
            return
        report.error(
            here,
            "there is none: write `merge_method: pcb`"
            if method is None
            else f"{method} is not what this command checks: it knows pcb",
        )
        return
    raw = checkpoints.is_raw(document)
    kind = RawPyTorchMergeConfig if raw else MergeConfiguration
    _check_fields(report, document, f"{prefix}top level", {*kind.model_fields, *extra})
    _check_parameters(report, document, f"{prefix}parameters", per_model=False)
    for name in ("dtype", "out_dtype"):
        chosen = _dtype(document.get(name))
        if document.get(name) is not None and (chosen is None or not chosen.is_floating_point):
            report.error(prefix + name, f"{document[name]} is none; write float32 or bfloat16")
    base = document.get("base_model")
    for where, entry, fields in _entries(document):
        where = prefix + where
        if not isinstance(entry, dict):
            report.error(where, "it is no mapping: write `- model: PATH`")
            continue
        _check_fields(report, entry, where, fields)
        model = entry.get("model")
        per_model = model is not None
        if per_model and model == base and entry.get("parameters"):
            report.warn(where, "parameters of the base model do nothing")
        _check_parameters(report, entry, f"{where}.parameters", per_model=per_model)


def _entries(document: dict[str, Any]) -> Iterator[tuple[str, Any, Iterable[str]]]:
    """Every model, slice, source and module, with the fields that mergekit reads there."""
    yield from _listed(document, "models", "", InputModelDefinition)
    modules = document.get("modules")
    owners = {"": document}
    for name, module in modules.items() if isinstance(modules, dict) else ():
        owners[f"modules.{name}."] = module if isinstance(module, dict) else {}
        yield f"modules.{name}", module, OutputModuleDefinition.model_fields
        yield from _listed(
            owners[f"modules.{name}."], "models", f"modules.{name}.", InputModelDefinition
        )
    for prefix, owner in owners.items():
        for where, part, fields in _listed(owner, "slices", prefix, OutputSliceDefinition):
            yield where, part, fields
            if isinstance(part, dict):
                yield from _listed(part, "sources", f"{where}.", InputSliceDefinition)


def _listed(
    owner: dict[str, Any], key: str, prefix: str, kind: type[BaseModel]
) -> Iterator[tuple[str, Any, Iterable[str]]]:
    entries = owner.get(key)
    for number, entry in enumerate(entries if isinstance(entries, list) else ()):
        name = f" ({entry['model']})" if isinstance(entry, dict) and "model" in entry else ""
        yield f"{prefix}{key}[{number}]{name}", entry, kind.model_fields


def _check_fields(
    report: Report, mapping: dict[str, Any], where: str, fields: Iterable[str]
) -> None:
    for name in mapping:
        if name in fields:
            continue
        if name in SPECS:
            report.error(where, f"{name} stands beside `parameters:` and is ignored; move it there")
        else:
            report.error(where, f"mergekit ignores {name}{_suggestion(name, [*fields, *SPECS])}")


def _check_parameters(
    report: Report, owner: dict[str, Any], where: str, *, per_model: bool
) -> None:
    parameters = owner.get("parameters")
    if parameters is None:
        return
    if not isinstance(parameters, dict):
        report.error(where, "it is no mapping of names to values")
        return
    for name, setting in parameters.items():
        spec = SPECS.get(name)
        if spec is None:
            report.error(where, f"unknown parameter {name}{_suggestion(name, SPECS)}")
        elif per_model and name not in PER_MODEL:
            report.error(where, f"{name} is ignored here; write it at the top level")
        else:
            for complaint in filter(None, (_complaint(spec, v) for v in _scalars(setting))):
                report.error(f"{where}.{name}", complaint)


def _complaint(spec: ParameterSpec, value: Any) -> str | None:
    try:
        spec.validate(value)
    except PCBError as error:
        return error.format_message()
    return None


def _suggestion(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return "; pcb knows " + ", ".join(SPECS) if set(known) == set(SPECS) else ""


def _scalars(setting: Any) -> Iterator[Any]:
    """The values of a setting: one, a gradient, or filters of either."""
    if isinstance(setting, dict):
        yield from _scalars(setting.get("value"))
    elif isinstance(setting, list):
        for part in setting:
            yield from _scalars(part)
    else:
        yield setting


def _filters(setting: Any) -> Iterator[str]:
    for part in setting if isinstance(setting, list) else [setting]:
        if isinstance(part, dict) and part.get("filter") not in (None, "*"):
            yield str(part["filter"])


# --- The checkpoints --------------------------------------------------------------------------


def _look(report: Report, text: str, document: dict[str, Any], options: Any) -> None:
    """Plan the merge and look at the shapes and dtypes of its inputs."""
    for path in _paths(document):
        if path.startswith((".", "/", "~")) and not pathlib.Path(path).expanduser().exists():
            report.error("plan", f"there is no {path}")
    if report.errors:
        return
    logger = logging.getLogger("mergekit_pcb")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it would say is said by the report
    try:
        plan = checkpoints.plan_without_merging(text, options)
        report.outlook = _outlook(report, plan, document)
    except click.ClickException as error:
        report.error("plan", error.format_message())
    except HOST_ERRORS as error:
        report.error("plan", f"mergekit cannot plan it: {one_line(error)}")
    finally:
        logger.setLevel(level)
    if report.errors:
        report.outlook = None


def _outlook(report: Report, plan: checkpoints.Plan, document: dict[str, Any]) -> Outlook:
    for topic, remark in plan.remarks.items():
        if remark:
            report.warn(topic, remark)
    names = [task.output_weight.name for task in plan.tasks]
    for where, part in _all_filters(document):
        if not any(part in name for name in names):
            report.warn(where, f"the filter {part!r} matches no tensor")
    if remark := left_out(plan):
        report.warn("plan", remark)
    scope = plan.tasks[0].parameters["scope"]
    path = plan.tasks[0].parameters["statistics"]
    if path:
        try:
            whole_model.reuse(plan, pathlib.Path(path))
        except PCBError as error:
            report.error("statistics", error.format_message())
    reads = 3 if scope == whole_model.MODEL and not path else 1
    return _sizes(report, plan, document, scope, reads)


def _sizes(
    report: Report, plan: checkpoints.Plan, document: dict[str, Any], scope: str, reads: int
) -> Outlook:
    rounded: dict[str, str] = {}
    partly: list[str] = []
    elements = read = written = peak = 0
    largest = ""
    for task, tensors in plan.look():
        name = task.output_weight.name
        held = {model: tensor for model, tensor in tensors.items() if tensor is not None}
        base = held.get(task.base_model)
        if base is None:
            report.error(name, f"the base model {task.base_model} lacks it")
            continue
        if missing := [str(model) for model in plan.models if model not in held]:
            partly.append(f"{name} ({missing[0]})")
        entries = [
            TensorEntry(id=m, tensor=t, is_base=m == task.base_model) for m, t in held.items()
        ]
        metadata = TensorMetadata.from_weight_info(task.output_weight)
        try:
            check_shapes(TensorGroup(entries=tuple(entries), metadata=metadata))
        except PCBError as error:
            report.error(name, error.format_message())
            continue
        if not base.is_floating_point():
            if any(t.dtype != base.dtype or not torch.equal(t, base) for t in held.values()):
                report.error(name, "it holds integers that differ, which mergekit refuses")
            continue
        cast = plan.dtype or promoted(held.values())
        for model, tensor in held.items():
            if plan.dtype is not None and tensor.dtype.itemsize > plan.dtype.itemsize:
                rounded.setdefault(str(model), str(tensor.dtype).removeprefix("torch."))
        read += sum(tensor.nbytes for tensor in held.values())
        elements += base.numel()
        out = _dtype(document.get("out_dtype")) or cast
        written += base.numel() * out.itemsize
        scratch = scratch_chunks(len(held) - 1) * min(base.numel(), chunk_elements(base.device))
        need = base.numel() * cast.itemsize * (len(held) + 1)
        need += scratch * working_dtype(cast).itemsize
        if need > peak:
            peak, largest = need, name
    if rounded:
        model, dtype = next(iter(rounded.items()))
        others = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
        asked = document["dtype"]
        report.warn(
            "dtype",
            f"{asked} rounds the {dtype} values of {model}{others} before they are subtracted, and "
            f"task vectors are small differences; set dtype: float32 and out_dtype: {asked}",
        )
    if partly:
        more = f" and {len(partly) - 1} more" if len(partly) > 1 else ""
        report.warn("tensors", f"not every model has {partly[0]}{more}")
    return Outlook(
        scope=scope,
        tasks=len(plan.models),
        tensors=len(plan.tasks),
        elements=elements,
        input_bytes=read,
        reads=reads,
        output_bytes=written,
        peak_bytes=peak,
        largest=largest,
    )


def _all_filters(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    places = [("parameters", document)]
    places += [(f"{where}.parameters", entry) for where, entry, _ in _entries(document)]
    for where, owner in places:
        for name, setting in (owner.get("parameters") or {}).items():
            for part in _filters(setting):
                yield f"{where}.{name}", part


def _paths(document: dict[str, Any]) -> Iterator[str]:
    """What a configuration names as models and adapters, each once."""
    named = [document.get("base_model"), *(e.get("model") for _, e, _ in _entries(document))]
    texts = [name for name in named if isinstance(name, str)]
    yield from dict.fromkeys(part for text in texts for part in text.split("+"))


def _dtype(name: Any) -> torch.dtype | None:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else None


def sentences(report: Report) -> Sequence[str]:
    """The report as lines for a terminal."""
    lines = [f"{f.level}: {f.where}: {f.what}" for f in report.findings]
    if not lines:
        lines.append("no mistakes found")
    outlook = report.outlook
    if outlook is not None:
        reads = {1: "once"}.get(outlook.reads, f"{outlook.reads} times")
        walks = ", twice of it to measure" if outlook.reads > 1 else ""
        lines += [
            f"{outlook.tensors} tensors of {outlook.elements:,} elements, "
            f"{outlook.tasks} tasks, scope: {outlook.scope}",
            f"reads {_size(outlook.input_bytes)} of checkpoints {reads}{walks}; "
            f"writes {_size(outlook.output_bytes)}",
            f"the largest tensor, {outlook.largest}, takes {_size(outlook.peak_bytes)} to merge",
        ]
    return lines


def _size(count: int) -> str:
    from tqdm import tqdm

    return f"{tqdm.format_sizeof(count, suffix='B', divisor=1000)}"
