"""The parameters of ``merge_method: pcb``, and the one recipe that follows from them."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.merge_methods.base import ParameterScope, ParameterSpec

from mergekit_pcb.core.dare import SMALLEST_DENSITY
from mergekit_pcb.core.matrices import Layout
from mergekit_pcb.core.measure import Recipe
from mergekit_pcb.core.refine import Refinement
from mergekit_pcb.errors import PCBError

_SHORT = reprlib.Repr()  # what a user gave may be long
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


#: A matrix keeps PCB's merge, or is solved for.
NONE, SOLVE = "none", "solve"
#: The exponent of singular values follows from the task vectors.
AUTO = "auto"
#: Elements compete within their tensor, or within the whole model.
TENSOR, MODEL = "tensor", "model"


@dataclass(frozen=True, kw_only=True)
class Parameter(ParameterSpec):
    """A parameter whose error names it and a remedy; pydantic's own names neither.

    ``read`` turns what a user gave into the value; it raises ``ValueError``, ``TypeError`` or
    ``OverflowError`` for what the parameter cannot be. ``because`` and ``remedy`` are the halves of
    the sentence that refuses it.
    """

    read: Callable[[Any], Any]
    because: str
    remedy: str

    def validate(self, value: Any) -> Any:
        try:
            return self.read(value)
        except (TypeError, ValueError, OverflowError):
            raise PCBError(
                f"use {self.name}: {_SHORT.repr(value)}", self.because, self.remedy
            ) from None


def _number(accepts: Callable[[float], bool]) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        """Accept numbers and, because YAML reads ``1e-4`` as text, numerals."""
        number = math.nan if isinstance(value, bool) else float(value)
        if not accepts(number):
            raise ValueError(value)
        return number

    return read


def _whole_number(value: Any) -> int:
    number = int(value)
    exact = isinstance(value, str) or number == value
    if isinstance(value, bool) or not exact or not -(2**63) <= number < 2**63:
        raise ValueError(value)
    return number


def _exponent(value: Any) -> float | str | None:
    if value is None or value == AUTO:
        return value  # type: ignore[no-any-return]
    return _between_0_and_1(value)


def _word(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in words:
            raise ValueError(value)
        return str(value)

    return read


def _path(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(value)
    return os.fspath(value)


_between_0_and_1 = _number(lambda value: 0 <= value <= 1)
_SHARED, _TASK = ParameterScope.SHARED, ParameterScope.NON_BASE
PARAMETERS = (
    Parameter(
        "density",
        float,
        _TASK,
        0.1,
        "fraction of a task's elements that keep weight",
        read=_between_0_and_1,
        because="density is the fraction of a task vector's elements that keep weight",
        remedy="write a number from 0 (nothing is kept) to 1; small ones such as 0.1 work best",
    ),
    Parameter(
        "weight",
        float,
        _TASK,
        1.0,
        "coefficient of a task",
        read=_number(math.isfinite),
        because="weight is a task's coefficient and has to be a finite number",
        remedy="write a number such as 1.0, or leave it out",
    ),
    Parameter(
        "lambda",
        float,
        _SHARED,
        1.0,
        "scale of the merged task vector",
        read=_number(math.isfinite),
        because="lambda scales the merged task vector and has to be a finite number",
        remedy="write one number such as 1.0 under the top-level `parameters:`",
    ),
    Parameter(
        "clip",
        float,
        _SHARED,
        1e-4,
        "fraction of the magnitudes clamped at each end",
        read=_number(lambda value: 0 <= value < 0.5),
        because="clip is the fraction of a task vector's magnitudes clamped at each end",
        remedy="write a number from 0 to less than 0.5, such as 0.0001",
    ),
    Parameter(
        "dare_density",
        float,
        _TASK,
        1.0,
        "fraction that DARE keeps before PCB",
        read=_number(lambda value: SMALLEST_DENSITY <= value <= 1),
        because="dare_density is the probability that an element of a task vector is kept",
        remedy="write a number above 0 (and not below 2e-9) up to 1, which switches DARE off",
    ),
    Parameter(
        "seed",
        int,
        _SHARED,
        0,
        "which elements DARE keeps",
        read=_whole_number,
        because="seed chooses the elements that DARE keeps and is a whole number of 64 bits",
        remedy="write a whole number such as 0",
    ),
    Parameter(
        "refine",
        str,
        _SHARED,
        NONE,
        "whether matrices are solved for, held to PCB",
        read=_word(NONE, SOLVE),
        because="matrices keep PCB's merge or are solved for, held to it",
        remedy="write none or solve",
    ),
    Parameter(
        "anchor",
        float,
        _SHARED,
        0.1,
        "how strongly they are held to PCB",
        read=_number(lambda value: 0 < value < math.inf),
        because="anchor is how strongly the solved matrices are held to PCB's merge",
        remedy="write a number above 0, such as 0.1",
    ),
    Parameter(
        "spectrum",
        Any,
        _SHARED,
        None,
        "exponent of a merged matrix's singular values",
        read=_exponent,
        because=(
            "spectrum is the exponent of a merged matrix's singular values, from 0 (all alike) to "
            "1 (untouched), or auto"
        ),
        remedy="write auto or a number from 0 to 1",
    ),
    Parameter(
        "scope",
        str,
        _SHARED,
        TENSOR,
        "how far elements compete: a tensor or the model",
        read=_word(TENSOR, MODEL),
        because="elements are ranked within their tensor or within the whole model",
        remedy="write tensor or model",
    ),
    Parameter(
        "statistics",
        str,
        _SHARED,
        "",
        "statistics of a whole model measured before",
        read=_path,
        because="it has to be the path of a file",
        remedy="write a path",
    ),
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
