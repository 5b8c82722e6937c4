"""What a configuration says: names, levels and ranges of everything in its text.

mergekit ignores what it does not know. Nothing is read here but the text.
"""

from __future__ import annotations

import difflib
import importlib.resources
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import yaml
from mergekit import merge_methods
from mergekit._data import chat_templates
from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from mergekit.tokenizer.config import TokenEmbeddingConfig, TokenizerConfig
from pydantic import BaseModel

from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import seen
from mergekit_pcb.host.configuration import is_raw, named_models, scalars
from mergekit_pcb.host.parameters import SPECS, ignored, suggestion
from mergekit_pcb.host.plan import dtype_named

#: mergekit takes no shorter text for a chat template.
SHORTEST_TEMPLATE = 20


class UniqueKeys(yaml.SafeLoader):
    """YAML in which no key stands twice; elsewhere the last one silently wins."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a node as it is written: merged keys, which others may replace, come later."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands twice, and the first is lost", key.start_mark
                )
            seen.add(str(key.value))
        return node


class Finding(BaseModel):
    """One thing that is wrong or suspicious, and where."""

    level: Literal["error", "warning"]
    where: str
    what: str


class Findings(BaseModel):
    """Everything found."""

    findings: list[Finding] = []

    @property
    def errors(self) -> int:
        return sum(finding.level == "error" for finding in self.findings)

    def error(self, where: str, what: str) -> None:
        self.findings.append(Finding(level="error", where=where, what=what))

    def warn(self, where: str, what: str) -> None:
        self.findings.append(Finding(level="warning", where=where, what=what))


def check_document(report: Findings, document: Any, prefix: str, *, several: bool) -> None:
    if not isinstance(document, dict):
        report.error(f"{prefix}file", "it is no mapping of names to values")
        return
    method = document.get("merge_method")
    if method != "pcb":
        here = f"{prefix}merge_method"
        if several:  # stages may use what they like
            known = {one.spec.name for one in merge_methods.registered_methods()}
            if method not in known:
                near = suggestion(str(method), known)
                report.error(here, f"mergekit knows no {method}{near}")
            return
        report.error(
            here,
            "there is none: write `merge_method: pcb`"
            if method is None
            else f"{method} is not what this command checks: it knows pcb",
        )
        return
    raw = is_raw(document)
    kind = RawPyTorchMergeConfig if raw else MergeConfiguration
    # Names that begin with x- are for anchors, as elsewhere in YAML.
    told = {name: value for name, value in document.items() if not str(name).startswith("x-")}
    _check_fields(report, told, f"{prefix}top level", {*kind.model_fields, "name"})
    _check_parameters(report, document, f"{prefix}parameters", per_model=False)
    for name in ("dtype", "out_dtype"):
        if complaint := _complaint(dtype_named, name, document.get(name) or None):
            report.error(prefix + name, complaint)
    template = document.get("chat_template")
    if isinstance(template, str) and not raw and not _is_template(template):
        names = [name.removesuffix(".jinja") for name in _templates()]
        report.error(
            f"{prefix}chat_template",
            f"mergekit has no {template}{suggestion(template, names)}; it has auto, "
            f"{', '.join(names)}, and takes templates themselves",
        )
    base = document.get("base_model")
    for where, entry, fields in entries(document):
        where = prefix + where
        if not isinstance(entry, dict):
            report.error(where, "it is no mapping: write `- model: PATH`")
            continue
        _check_fields(report, entry, where, fields)
        if entry.get("sources") == []:
            report.error(where, "it has no sources: write `- model: PATH` and a layer_range there")
        model = entry.get("model")
        per_model = model is not None
        if per_model and model == base and entry.get("parameters"):
            report.warn(where, "parameters of the base model do nothing")
        _check_parameters(report, entry, f"{where}.parameters", per_model=per_model)


def check_names(report: Findings, documents: Sequence[Any]) -> None:
    """Look for models that are no folders, and for names that nearly are a stage's."""
    stages = [part for part in documents if isinstance(part, dict)]
    names = [str(part["name"]) for part in stages if part.get("name")]
    if not any(part.get("merge_method") == "pcb" for part in stages):
        report.warn("file", "no stage of it uses pcb")
    for number, part in enumerate(stages, 1):
        prefix = f"stage {part.get('name') or number}: "
        check_paths(report, part, prefix)
        for model in named_models(part):
            if model in names or "/" in model or pathlib.Path(model).exists():
                continue
            for near in difflib.get_close_matches(model, names, n=1, cutoff=0.8):
                if not (near.startswith(model) or model.startswith(near)):  # named after its base
                    report.warn(f"{prefix}models", f"{model} is no stage; did you mean {near}?")


def check_paths(report: Findings, document: dict[str, Any], prefix: str = "") -> None:
    """Look for models that are named as paths and are not there."""
    places = [("base_model", {"base_model": document.get("base_model")})]
    for where, entry in [*places, *((where, entry) for where, entry, _ in entries(document))]:
        named = entry if isinstance(entry, dict) else {}
        for path in named_models({k: v for k, v in named.items() if k in ("model", "base_model")}):
            told = prefix + where.split(" (")[0]
            if path.startswith("~"):
                report.error(told, f"mergekit does not know ~; write the whole path of {path}")
            elif path.startswith((".", "/")) and not seen(path):
                report.error(told, f"there is no {path}")


def entries(document: dict[str, Any]) -> Iterator[tuple[str, Any, Iterable[str]]]:
    """Every model, slice, source, module and token, with the fields that mergekit reads there."""
    if isinstance(tokenizer := document.get("tokenizer"), dict):
        yield "tokenizer", tokenizer, TokenizerConfig.model_fields
        tokens = tokenizer.get("tokens")
        for token, how in tokens.items() if isinstance(tokens, dict) else ():
            yield f"tokenizer.tokens.{token}", how, TokenEmbeddingConfig.model_fields
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
    report: Findings, mapping: dict[str, Any], where: str, fields: Iterable[str]
) -> None:
    for name in mapping:
        if name in fields:
            continue
        if name in SPECS:
            report.error(where, f"{name} stands beside `parameters:` and is ignored; move it there")
        else:
            report.error(where, f"mergekit ignores {name}{suggestion(name, [*fields, *SPECS])}")


def _check_parameters(
    report: Findings, owner: dict[str, Any], where: str, *, per_model: bool
) -> None:
    parameters = owner.get("parameters")
    if parameters is None:
        return
    if not isinstance(parameters, dict):
        report.error(where, "it is no mapping of names to values")
        return
    for name, setting in parameters.items():
        if wrong := ignored(name, per_model=per_model):
            report.error(where, wrong)
        else:
            spec = SPECS[name]
            for complaint in filter(None, (_complaint(spec.validate, v) for v in scalars(setting))):
                report.error(f"{where}.{name}", complaint)


def _templates() -> list[str]:
    there = importlib.resources.files(chat_templates).iterdir()
    return sorted(file.name for file in there if file.name.endswith(".jinja"))


def _is_template(told: str) -> bool:
    """Whether mergekit takes it for one; an empty text is none that anybody asked for."""
    if told in ("", "auto") or f"{told}.jinja" in _templates():
        return True
    return len(told) >= SHORTEST_TEMPLATE and "{" in told


def _complaint(look: Callable[..., Any], *given: Any) -> str | None:
    try:
        look(*given)
    except PCBError as error:
        return error.format_message()
    return None
