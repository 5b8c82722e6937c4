"""The paper's evolution strategy, for models in memory: weights by CMA-ES against a score.

Statistics are measured once. The result is linear in the weights, so a trial is one weighted
sum; where the spectrum is evened, a step per matrix follows on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, signature
from typing import Any

from tqdm import tqdm

from mergekit_pcb.state_dicts import Model, combine, contributions
from mergekit_pcb.tools.search_space import (
    BOUNDS,
    EvaluationError,
    Found,
    Shared,
    Space,
    Trial,
    finite,
    require_optuna,
    sampler,
    suggested,
)


def search(
    evaluate: Callable[..., float],
    space: Space,
    budget: int,
    *,
    seed: int = 0,
    minimize: bool = False,
    study: Any = None,
) -> Iterator[Trial]:
    """Yield trials as they end, the start first.

    ``evaluate`` takes weights, the other values and Optuna's trial, and returns a score. What it
    raises as :class:`EvaluationError` or as Optuna's ``TrialPruned``, and scores that are no
    finite numbers, make a failing trial. The global generators are not touched. A ``study`` of
    the caller's own brings its sampler, its pruner and its direction.
    """
    optuna = require_optuna()
    space.axes()
    if study is None:
        direction = "minimize" if minimize else "maximize"
        study = optuna.create_study(sampler=sampler(space, seed), direction=direction)
    study.enqueue_trial(space.start())
    for number in range(1, budget + 1):
        trial = study.ask()
        weights, shared = suggested(trial, space)
        began, score, error, state = time.monotonic(), None, None, optuna.trial.TrialState.FAIL
        try:
            score = finite(float(evaluate(weights, shared, trial)))
        except EvaluationError as failure:
            error = str(failure)
        except optuna.TrialPruned as pruned:
            error, state = f"pruned {pruned}".strip(), optuna.trial.TrialState.PRUNED
        study.tell(trial, score, state=state if score is None else None)
        yield Trial(
            trial=number,
            weights=weights,
            shared=shared,
            scores=None if score is None else [score],
            error=error,
            seconds=round(time.monotonic() - began, 3),
        )


def search_weights(
    score: Callable[..., float],
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
    study: Any = None,
    **parameters: Any,
) -> Found:
    """Search per-task weights for models in memory.

    ``score`` takes a merged state dict and returns a number, better if higher (lower with
    ``minimize``). ``parameters`` are those of
    :func:`~mergekit_pcb.state_dicts.contributions`, which runs once; a trial is one weighted
    sum, and a step per matrix where the spectrum is evened. ``budget`` counts calls of ``score``;
    the first is at ``start``. An exception of ``score`` ends the search.

    ``study`` is an Optuna study with a sampler or pruner of your own, whose direction counts in
    place of ``minimize``. A ``score`` of two arguments is called with Optuna's trial as the
    second, to report to it and to ask whether to prune.
    """
    require_optuna()  # complain before the work
    parts = contributions(base, experts, **parameters)
    begin = [start] * len(parts) if isinstance(start, (int, float)) else list(start)
    space = Space(tuple(map(float, begin)), bounds={"weight": bounds})
    places = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    asked = [p for p in signature(score).parameters.values() if p.kind in places]
    takes_trial = len([p for p in asked if p.default is Parameter.empty]) > 1

    def evaluate(weights: Sequence[float], _: Shared, trial: Any) -> float:
        merged = combine(base, parts, weights, scale)
        return score(merged, trial) if takes_trial else score(merged)

    if study is not None:
        minimize = study.direction.name == "MINIMIZE"
    found = Found([], minimize)
    trials = search(evaluate, space, budget, seed=seed, minimize=minimize, study=study)
    for trial in tqdm(trials, total=budget, desc="Searching", disable=True if quiet else None):
        found.trials.append(trial)
    return found
