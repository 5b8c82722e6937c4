"""What a search tries: the space, what samples it, and what a trial came to."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_pcb.errors import PCBError

Bounds = Mapping[str, tuple[float, float]]
#: The paper's bounds for language models (0.8 to 1.3 for vision), and ours for the others.
BOUNDS: Bounds = {
    "weight": (0.5, 3.0),
    "lambda": (0.5, 2.5),
    "density": (0.01, 1.0),
    "anchor": (0.01, 1.0),
}
CHOICES = {"refine": ("none", "solve")}
#: Standard deviation of the first trials, of the width of the bounds.
STEP = 0.2
DIGITS = 4
Shared = dict[str, float | str]


class EvaluationError(Exception):
    """An evaluation failed; the search goes on."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point that was tried; the scores are missing where the evaluation failed."""

    trial: int
    weights: list[float]
    #: What else is searched: ``lambda``, ``density``, ``anchor``, ``refine``.
    shared: Shared = field(default_factory=dict)
    scores: list[float] | None
    error: str | None = None
    seconds: float

    @property
    def score(self) -> float | None:
        return None if self.scores is None else self.scores[0]


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
    """What is searched: where it starts, and between which bounds.

    ``weights`` are empty where they are not searched.
    """

    weights: tuple[float, ...]
    shared: tuple[tuple[str, float | str], ...] = ()
    #: Those that are not :data:`BOUNDS`.
    bounds: Bounds = field(default_factory=dict)

    def start(self) -> Shared:
        """Every name that is searched, and the value of the first trial."""
        return {**{f"weight {i}": w for i, w in enumerate(self.weights, 1)}, **dict(self.shared)}

    def axes(self) -> dict[str, Any]:
        """Every name that is searched, and its distribution; starts outside of it are refused."""
        optuna, found = require_optuna(), {}
        for name, start in self.start().items():
            if name in CHOICES:
                found[name] = optuna.distributions.CategoricalDistribution(CHOICES[name])
                continue
            low, high = self._bounds_of(name)
            if not low <= float(start) <= high:
                what = name.replace("weight", "weight of model")
                raise PCBError(
                    f"search the {what}",
                    f"it starts at {float(start):g}, outside of {low:g} to {high:g}",
                    f"start it within, or set other bounds of {name.split()[0]}",
                )
            found[name] = optuna.distributions.FloatDistribution(low, high)
        return found

    def _rounded(self, name: str, value: float) -> float:
        low, high = self._bounds_of(name)
        return min(max(rounded(value), low), high)

    def _bounds_of(self, name: str) -> tuple[float, float]:
        return {**BOUNDS, **self.bounds}[name.split()[0]]

    def split(self, values: Mapping[str, Any]) -> tuple[list[float], Shared]:
        """A trial's weights and its other values, rounded to what a configuration shows."""
        told = {n: v if n in CHOICES else self._rounded(n, float(v)) for n, v in values.items()}
        weights = [float(told.pop(f"weight {i + 1}")) for i in range(len(self.weights))]
        return weights, told


def rounded(value: float) -> float:
    """To four decimals, or to as many digits where it is small."""
    places = -math.floor(math.log10(abs(value))) if value else 1
    return round(value, DIGITS - 1 + max(places, 1))


def finite(score: float, name: str = "the score") -> float:
    """The score, or :class:`EvaluationError` if it is no finite number."""
    if not math.isfinite(score):
        raise EvaluationError(f"{name} is {score}")
    return score


def require_optuna() -> Any:
    """Optuna, without its remarks."""
    try:
        import cmaes  # noqa: F401
        import optuna
    except ImportError as error:
        why = f"the package {error.name} is missing"
        raise PCBError("search", why, "pip install optuna cmaes") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """Without what Optuna calls experimental or will rename: its version is pinned."""
    remarks = require_optuna().exceptions.ExperimentalWarning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", remarks)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def sampler(space: Space, seed: int, scores: int = 1) -> Any:
    """CMA-ES from the start; TPE for one number alone, for a choice, and for several scores.

    A trial depends on the seed, its number and what was scored before it, and on nothing that a
    process remembers: a search that was stopped goes on as if it had not been.
    """
    optuna, axes, start = require_optuna(), space.axes(), space.start()
    evolves = scores == 1 and len(axes) > 1 and not CHOICES.keys() & axes.keys()

    def fresh(number: int) -> Any:
        with without_remarks():
            if evolves:
                # Its own generator adds the trial's number to the seed.
                return optuna.samplers.CmaEsSampler(
                    x0=start, sigma0=STEP, seed=seed, n_startup_trials=0
                )
            import numpy as np  # not for --help

            own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            return optuna.samplers.TPESampler(
                multivariate=True, constant_liar=True, n_startup_trials=len(axes) + 3, seed=own
            )

    class EachTrialAnew(optuna.samplers.BaseSampler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._of: dict[int, Any] = {}

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:  # noqa: ARG002
            self._of[trial.number] = fresh(trial.number)
            return axes

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            with without_remarks():
                found = self._of[trial.number].sample_relative(study, trial, search_space)
            return dict(found)

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return self._of[trial.number].sample_independent(study, trial, name, distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:  # noqa: ARG002
            self._of.pop(trial.number, None)

    return EachTrialAnew()


def suggested(trial: Any, space: Space) -> tuple[list[float], Shared]:
    """What an Optuna trial tries."""
    for name, axis in space.axes().items():
        if name in CHOICES:
            trial.suggest_categorical(name, CHOICES[name])
        else:
            trial.suggest_float(name, axis.low, axis.high)
    return space.split(trial.params)
