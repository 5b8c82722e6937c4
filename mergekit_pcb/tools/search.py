"""The paper's evolution strategy: per-task weights by CMA-ES against a score of your own.

The strategy itself, and the search for models in memory. Statistics are measured once. The
result is linear in the weights, so a trial is one weighted sum; where the spectrum is evened, a
step per matrix follows on it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from mergekit_pcb.errors import PCBError
from mergekit_pcb.state_dicts import Model, StateDict, combine, contributions

#: The paper's bounds for language models (0.8 to 1.3 for vision), and ours for the others.
BOUNDS = {"weight": (0.5, 3.0), "lambda": (0.5, 2.5), "density": (0.01, 0.6)}
#: Standard deviation of the first trials, of the width of the bounds.
STEP = 0.2
DIGITS = 4


class Trial(BaseModel):
    """One point that was tried; the score is missing where the evaluation failed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trial: int
    weights: list[float]
    #: ``lambda`` and ``density``, where they are searched.
    shared: dict[str, float] = {}
    score: float | None
    error: str | None = None
    seconds: float


@dataclass(frozen=True)
class Found:
    """The best trial and all of them; :attr:`best` is ``None`` where every one failed."""

    trials: list[Trial]
    minimize: bool

    @property
    def best(self) -> Trial | None:
        scored = [trial for trial in self.trials if trial.score is not None]
        sign = 1 if self.minimize else -1
        return min(scored, key=lambda trial: sign * (trial.score or 0.0), default=None)


@dataclass(frozen=True)
class Space:
    """What is searched: where it starts, and between which bounds; no weights: not those."""

    weights: tuple[float, ...]
    shared: tuple[tuple[str, float], ...] = ()
    bounds: tuple[float, float] = BOUNDS["weight"]

    def axes(self) -> list[tuple[str, float, float, float]]:
        """Name, start, lowest and highest value of every number that is searched."""
        found = [(f"weight of model {i + 1}", w, *self.bounds) for i, w in enumerate(self.weights)]
        found += [(name, value, *BOUNDS[name]) for name, value in self.shared]
        for name, start, low, high in found:
            if not low <= start <= high:
                raise PCBError(
                    f"search the {name}",
                    f"it starts at {start:g}, outside of {low:g} to {high:g}",
                    "start it within, or set other bounds",
                )
        return found


def search(
    evaluate: Callable[[Sequence[float], dict[str, float]], float],
    space: Space,
    budget: int,
    *,
    seed: int = 0,
    minimize: bool = False,
    past: Sequence[Trial] = (),
) -> Iterator[Trial]:
    """Yield trials as they end, the start first and those of ``past`` without evaluating them.

    ``evaluate`` takes weights and shared values and returns a score; what it raises as
    :class:`EvaluationError`, and scores that are no finite numbers, make a failing trial, which
    counts as worst. The global generators are not touched.
    """
    axes = space.axes()
    lows, highs = np.array([a[2] for a in axes]), np.array([a[3] for a in axes])
    begin = (np.array([a[1] for a in axes]) - lows) / (highs - lows)
    count = 0

    def attempt(place: Any) -> Trial:
        nonlocal count
        count += 1
        values = [round(float(v), DIGITS) for v in lows + np.array(place) * (highs - lows)]
        split = len(values) - len(space.shared)
        weights = values[:split]
        shared = {name: v for (name, _), v in zip(space.shared, values[split:], strict=True)}
        if count <= len(past):
            trial = past[count - 1]
            if (trial.weights, trial.shared) != (weights, shared):
                raise PCBError(
                    "resume the search",
                    f"its trial {count} tried {trial.weights} where now {weights} would be tried",
                    "use the versions it was begun with, or begin anew",
                )
            return trial
        started, score, error = time.monotonic(), None, None
        try:
            score = float(evaluate(weights, shared))
            if not math.isfinite(score):
                score, error = None, f"the score is {score}"
        except EvaluationError as failure:
            error = str(failure)
        return Trial(
            trial=count,
            weights=weights,
            shared=shared,
            score=score,
            error=error,
            seconds=round(time.monotonic() - started, 3),
        )

    yield attempt(begin)
    strategy = _strategy(begin, seed)
    while count < budget:
        places, losses = strategy.ask(), []
        for place in places:
            if count == budget:
                return
            trial = attempt(place[: len(axes)])
            yield trial
            sign = 1 if minimize else -1
            losses.append(math.inf if trial.score is None else sign * trial.score)
        strategy.tell(places, losses)


class EvaluationError(Exception):
    """An evaluation failed; the search goes on."""


def require_cma() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot draw plots
            import cma
    except ImportError:
        raise PCBError("search", "the package cma is missing", "pip install cma") from None
    return cma


def _strategy(begin: Any, seed: int) -> Any:
    random = np.random.RandomState(seed)
    # CMA-ES wants two dimensions; a second that nobody looks at does no harm.
    begin = begin if len(begin) > 1 else np.array([begin[0], 0.5])
    options = {
        "bounds": [0.0, 1.0],
        "verbose": -9,
        "seed": np.nan,  # leave numpy's global generator alone
        "randn": lambda *shape: random.randn(*shape),
    }
    return require_cma().CMAEvolutionStrategy(begin, STEP, options)


def search_weights(
    score: Callable[[StateDict], float],
    base: Model,
    experts: Sequence[Model],
    *,
    budget: int = 100,
    start: float | Sequence[float] = 1.0,
    bounds: tuple[float, float] = BOUNDS["weight"],
    scale: float = 1.0,
    minimize: bool = False,
    seed: int = 0,
    quiet: bool = True,
    **parameters: Any,
) -> Found:
    """Search per-task weights for models in memory.

    ``score`` takes a merged state dict and returns a number, better if higher (lower with
    ``minimize``). ``parameters`` are those of
    :func:`~mergekit_pcb.state_dicts.contributions`, which runs once; a trial is one weighted
    sum, and a step per matrix where the spectrum is evened. ``budget`` counts calls of ``score``;
    the first is at ``start``. An exception of ``score`` ends the search.
    """
    require_cma()  # complain before the work
    parts = contributions(base, experts, **parameters)
    begin = [start] * len(parts) if isinstance(start, (int, float)) else list(start)
    space = Space(tuple(map(float, begin)), bounds=bounds)

    def evaluate(weights: Sequence[float], _: dict[str, float]) -> float:
        return score(combine(base, parts, weights, scale))

    found = Found([], minimize)
    trials = search(evaluate, space, budget, seed=seed, minimize=minimize)
    for trial in tqdm(trials, total=budget, desc="Searching", disable=True if quiet else None):
        found.trials.append(trial)
    return found
