"""The parameters of ``merge_method: pcb``, and the one recipe that follows from them."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.merge_methods.base import ParameterScope, ParameterSpec

from mergekit_pcb.core import rules
from mergekit_pcb.core.matrices import Layout
from mergekit_pcb.core.measure import Recipe
from mergekit_pcb.core.refine import Refinement
from mergekit_pcb.core.rules import AUTO, MODEL, SOLVE, TENSOR, Rule
from mergekit_pcb.errors import PCBError

_SHORT = reprlib.Repr()  # what a user gave may be long
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


@dataclass(frozen=True)
class Parameter(ParameterSpec):
    """A parameter whose error names it and a remedy; pydantic's own names neither."""

    rule: Rule | None = None

    def validate(self, value: Any) -> Any:
        assert self.rule is not None  # noqa: S101 - every parameter below has one
        try:
            return self.rule.read(value)
        except (TypeError, ValueError, OverflowError):
            raise PCBError(
                f"use {self.name}: {_SHORT.repr(value)}", self.rule.because, self.rule.remedy
            ) from None


def _path(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(value)
    return os.fspath(value)


#: Without a rule of the mathematics: a merge in memory has no files.
STATISTICS = Rule(_path, "", "it has to be the path of a file", "write a path")


_SHARED, _TASK = ParameterScope.SHARED, ParameterScope.NON_BASE
PARAMETERS = tuple(
    Parameter(name, kind, scope, rule.default, description, rule=rule)
    for name, kind, scope, rule, description in (
        ("density", float, _TASK, rules.DENSITY, "fraction of a task's elements that keep weight"),
        ("weight", float, _TASK, rules.WEIGHT, "coefficient of a task"),
        ("lambda", float, _SHARED, rules.LAMBDA, "scale of the merged task vector"),
        ("clip", float, _SHARED, rules.CLIP, "fraction of the magnitudes clamped at each end"),
        ("dare_density", float, _TASK, rules.DARE_DENSITY, "fraction that DARE keeps before PCB"),
        ("seed", int, _SHARED, rules.SEED, "which elements DARE keeps"),
        ("refine", str, _SHARED, rules.REFINE, "whether matrices are solved for, held to PCB"),
        ("anchor", float, _SHARED, rules.ANCHOR, "how strongly they are held to PCB"),
        ("spectrum", Any, _SHARED, rules.SPECTRUM, "exponent of a merged matrix's singular values"),
        ("scope", str, _SHARED, rules.SCOPE, "how far elements compete: a tensor or the model"),
        ("statistics", str, _SHARED, STATISTICS, "statistics of a whole model measured before"),
    )
)
SPECS = {spec.name: spec for spec in PARAMETERS}

_OF_A_MODEL = {spec.name for spec in PARAMETERS if spec.scope == _TASK}

#: Values of one tensor: shared ones by name, those of the tasks by name and task.
Values = Mapping[str, Any]


def ignored(name: Any, *, per_model: bool) -> str | None:
    """What is wrong with a parameter of this name, under a model or not; mergekit is silent."""
    if name not in SPECS:
        return f"unknown parameter {name}{suggestion(name, SPECS)}"
    if per_model and name not in _OF_A_MODEL:
        return f"{name} is ignored here; write it at the top level"
    return None


def suggestion(name: Any, known: Iterable[str]) -> str:
    """How a sentence on an unknown name goes on: with what may be meant, or with what there is."""
    known = list(known)
    close = difflib.get_close_matches(str(name).lower(), known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return "; pcb knows " + ", ".join(SPECS) if set(known) == set(SPECS) else ""


def recipe_of(
    values: Values, tasks: Sequence[Hashable], positions: Sequence[int] | None = None
) -> Recipe:
    """What determines the statistics of these tasks, at these positions of the configuration.

    ``positions`` are 0, 1, 2, … unless some of the configuration's tasks are missing.
    """
    return Recipe.of(
        [values["density"][task] for task in tasks],
        values["clip"],
        [values["dare_density"][task] for task in tasks],
        values["seed"],
        range(len(tasks)) if positions is None else positions,
    )


def refines(values: Values) -> bool:
    """Whether anything is done to a tensor's matrices after PCB."""
    return values["refine"] == SOLVE or values["spectrum"] not in (None, 1)


def refinement_of(values: Values, layout: Layout | None) -> Refinement | None:
    """What is done to a tensor's matrices; ``layout`` is ``None`` for what is no matrix."""
    if layout is None or not refines(values):
        return None
    solved, spectrum = values["refine"] == SOLVE, values["spectrum"]
    exponent = None if spectrum in (None, AUTO) else spectrum
    return Refinement(layout, values["anchor"] if solved else None, exponent)


def scope_of(tensors: Sequence[tuple[str, Values]]) -> str:
    """The one scope of a merge; refuses several, and statistics of another scope.

    ``tensors`` are names and values of all tensors.
    """
    first_name, first = tensors[0]
    for name, values in tensors:
        if values["statistics"] and values["scope"] == TENSOR:
            raise PCBError(
                f"use statistics {values['statistics']}",
                "they are of a whole model and the scope is tensor",
                "write `scope: model` beside them, or leave `statistics` out",
            )
        if values["scope"] != first["scope"]:
            raise PCBError(
                "rank some tensors within the whole model and others within themselves",
                f"scope is {first['scope']} for {first_name} and {values['scope']} for {name}",
                "write one scope, without a filter, under the top-level `parameters:`",
            )
        if values["statistics"] != first["statistics"]:
            raise PCBError(
                f"use several statistics, {first['statistics']!r} and {values['statistics']!r}",
                f"all tensors are ranked together, but {name} names others than {first_name}",
                "write one path, without a filter, under the top-level `parameters:`",
            )
    return str(first["scope"])


def one_recipe(tensors: Sequence[tuple[str, Recipe]]) -> Recipe:
    """The one recipe of a whole model, in which all tensors are ranked together.

    ``tensors`` are names and recipes of all tensors.
    """
    first, recipe = tensors[0]
    for name, other in tensors:
        if other == recipe:
            continue
        what = "density" if other.densities != recipe.densities else "clip"
        if other.dare != recipe.dare:
            what = "dare_density or seed"
        raise PCBError(
            f"use scope: {MODEL} with several values of {what}",
            f"all tensors are ranked together, but {name} asks for another value than {first}",
            f"give {what} one value per model, without filter or gradient (weight may have "
            "them), or use scope: tensor",
        )
    return recipe


def density_remarks(tensors: Iterable[Values]) -> dict[str, str]:
    """Remarks, by topic, on densities that cannot mean what they seem to say; once a model."""
    remarks: dict[str, str] = {}
    for values in tensors:
        for model, density in values["density"].items():
            kept = values["dare_density"][model]
            if kept < 1 and density > kept:
                remarks.setdefault(
                    f"density of {model}",
                    f"density {density:g} keeps no more of {model} than its dare_density {kept:g} "
                    "does: it is a fraction of all elements, those that DARE dropped included; "
                    f"choose one below {kept:g} for PCB to drop any more",
                )
    return remarks
