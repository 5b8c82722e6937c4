"""The rules that parameters obey: what a value may be, why, and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mergekit_pcb.core.dare import SMALLEST_DENSITY


@dataclass(frozen=True)
class Rule:
    """What one parameter may be.

    ``read`` turns what a user gave into the value; it raises ``ValueError`` or ``TypeError``
    for what the parameter cannot be. ``because`` and ``remedy`` are the two halves of the
    sentence that refuses it.
    """

    read: Callable[[Any], Any]
    default: Any
    because: str
    remedy: str


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


_between_0_and_1 = _number(lambda value: 0 <= value <= 1)

DENSITY = Rule(
    _between_0_and_1,
    0.1,
    "density is the fraction of a task vector's elements that keep weight",
    "write a number from 0 (nothing is kept) to 1; small ones such as 0.1 work best",
)
WEIGHT = Rule(
    _number(math.isfinite),
    1.0,
    "weight is a task's coefficient and has to be a finite number",
    "write a number such as 1.0, or leave it out",
)
LAMBDA = Rule(
    _number(math.isfinite),
    1.0,
    "lambda scales the merged task vector and has to be a finite number",
    "write one number such as 1.0 under the top-level `parameters:`",
)
CLIP = Rule(
    _number(lambda value: 0 <= value < 0.5),
    1e-4,
    "clip is the fraction of a task vector's magnitudes clamped at each end",
    "write a number from 0 to less than 0.5, such as 0.0001",
)
DARE_DENSITY = Rule(
    _number(lambda value: SMALLEST_DENSITY <= value <= 1),
    1.0,
    "dare_density is the probability that an element of a task vector is kept",
    "write a number above 0 (and not below 2e-9) up to 1, which switches DARE off",
)
SEED = Rule(
    _whole_number,
    0,
    "seed chooses the elements that DARE keeps and is a whole number of 64 bits",
    "write a whole number such as 0",
)
#: A matrix keeps PCB's merge, or is solved for.
NONE, SOLVE = "none", "solve"
REFINE = Rule(
    _word(NONE, SOLVE),
    NONE,
    "matrices keep PCB's merge or are solved for, held to it",
    "write none or solve",
)
ANCHOR = Rule(
    _number(lambda value: 0 < value < math.inf),
    0.1,
    "anchor is how strongly the solved matrices are held to PCB's merge",
    "write a number above 0, such as 0.1",
)
#: The exponent of singular values follows from the task vectors.
AUTO = "auto"
SPECTRUM = Rule(
    _exponent,
    None,
    "spectrum is the exponent of a merged matrix's singular values, from 0 (all alike) to 1 "
    "(untouched), or auto",
    "write auto or a number from 0 to 1",
)
#: Elements compete within their tensor, or within the whole model.
TENSOR, MODEL = "tensor", "model"
SCOPE = Rule(
    _word(TENSOR, MODEL),
    TENSOR,
    "elements are ranked within their tensor or within the whole model",
    "write tensor or model",
)
