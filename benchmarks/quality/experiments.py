"""What is done with a suite, and the record it leaves.

Everything is chosen on validation data; test data are read at the end, for what was chosen.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import pathlib
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import click
import torch
from pydantic import BaseModel, ConfigDict

import mergekit_pcb
from benchmarks.measuring import machine
from benchmarks.quality import baselines, glyphs, language
from benchmarks.quality.methods import (
    FISHER,
    LINEAR,
    METHODS,
    PCB,
    PCB_MODEL,
    TASK_ARITHMETIC,
    TIES,
    Knobs,
    Method,
    Trial,
    best_of,
)
from benchmarks.quality.suite import Schedule, Sizes, StateDict, Suite
from mergekit_pcb import Contributions, adamerge, combine, contributions
from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import write_text
from mergekit_pcb.tools import search

PACKAGES = (
    "transformers", "tokenizers", "cma", "scikit-learn", "matplotlib", "pillow", "numpy", "pydantic"
)  # fmt: skip
SCOPES = ("tensor", "model")
#: Bounds of the searched weights: wide enough to leave an expert out.
WEIGHTS = (0.0, 3.0)
#: Adam's rate for AdaMerging's coefficients.
RATE = 1e-2
#: Where the released AdaMerging starts.
START = 0.3


@dataclass(frozen=True)
class Tier:
    """How much is done: schedules of training, trials of a search, grids of the sweeps."""

    language: Schedule
    glyphs: Schedule
    budget: int
    weight_budget: int
    densities: tuple[float, ...]
    lambdas: tuple[float, ...]
    clips: tuple[float, ...]
    epochs: int
    #: Other seeds than those that schedules and rates were tried on.
    seeds: tuple[int, ...]


TIERS = {
    "full": Tier(
        language.SCHEDULE,
        glyphs.SCHEDULE,
        budget=12,
        weight_budget=40,
        densities=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
        lambdas=(0.2, 0.35, 0.5, 0.7, 1.0, 1.5),
        clips=(0.0, 1e-4, 1e-3, 1e-2, 0.1),
        epochs=5,
        seeds=(10, 11, 12, 13),
    ),
    "small": Tier(
        replace(language.SCHEDULE, base_steps=10, expert_steps=3, looked_at=Sizes(1, 1, 1)),
        replace(glyphs.SCHEDULE, base_steps=60, expert_steps=15, looked_at=Sizes(40, 40, 40)),
        budget=2,
        weight_budget=3,
        densities=(0.1,),
        lambdas=(1.0,),
        clips=(1e-4,),
        epochs=1,
        seeds=(10,),
    ),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Strict):
    """A merged model: its knobs, its mean score on validation data, its scores on test data."""

    method: str
    knobs: Knobs
    validation: float
    test: dict[str, float]
    elsewhere: dict[str, float] = {}


class Sweep(_Strict):
    """Mean scores on validation data, ``[density][lambda]``."""

    scope: str
    densities: tuple[float, ...]
    lambdas: tuple[float, ...]
    scores: list[list[float]]


class Record(_Strict):
    """All that one suite and seed gave. Scores are accuracies or negative nats per token."""

    suite: str
    metric: str
    tier: str
    seed: int
    machine: str
    versions: str
    #: Digests of the code that made the record, and of the data that were evaluated.
    code: str
    data: str
    seconds: float
    tasks: tuple[str, ...]
    base: Row
    individual: dict[str, float]
    first: list[Row]
    searched: list[Row]
    #: Of every method: the scores on validation data and knobs of its trials, as they were tried.
    trials: dict[str, list[Trial]]
    weighted: list[Row]
    adapted: list[Row]
    ablation: list[Row]
    clip: list[Row]
    #: By their number, some of the tasks alone: one list of methods for each choice of tasks.
    tasks_merged: dict[int, list[list[Row]]]
    sweeps: list[Sweep]


#: The suites, in the order of the tables.
BUILD = {"language": language.build, "glyphs": glyphs.build}


def code() -> str:
    """Of the package's files and this benchmark's, but for those that only show the numbers."""
    digest = hashlib.blake2b(digest_size=8)
    here = pathlib.Path(__file__).parent
    package = pathlib.Path(mergekit_pcb.__file__).parent
    for file in (*sorted(here.glob("*.py")), *sorted(package.rglob("*.py"))):
        if file.name not in ("__main__.py", "tables.py", "refined_tables.py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def in_processes(
    jobs: int, function: Callable[..., None], calls: Sequence[tuple[Any, ...]]
) -> None:
    """Call a function with each of these arguments, in so many processes; an error ends it."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(function, *call) for call in calls]
        try:
            for done in as_completed(running):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def seeds_of(tier: str, some: tuple[int, ...]) -> tuple[int, ...]:
    """Some of a tier's seeds, or all."""
    seeds = TIERS[tier].seeds
    if not set(some) <= set(seeds):
        raise click.BadParameter(f"the seeds of tier {tier} are {seeds}", param_hint="--seed")
    return some or seeds


def is_there(file: pathlib.Path, tier: str, kind: type[BaseModel]) -> bool:
    """Whether a record is there already; one of another tier or version is refused."""
    if not file.exists():
        return False
    try:
        record: Any = kind.model_validate_json(file.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if record is None or (record.tier, record.code) != (tier, code()):
        raise PCBError(
            f"go on in {file.parent}",
            f"{file.name} is of another tier or version, or damaged",
            "name another folder",
        )
    return True


class Chosen:
    """Merged models that wait for the test data."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.rows: list[tuple[str, Knobs, float, StateDict]] = []

    def add(self, method: str, knobs: Knobs, state: StateDict, score: float | None = None) -> None:
        score = self.suite.validation(state) if score is None else score
        self.rows.append((method, knobs, score, state))

    def add_tried(self, method: Method, trial: Trial) -> None:
        score, knobs = trial
        self.add(method.name, knobs, method.merge(self.suite, knobs), score)

    def add_searched(self, method: Method, budget: int) -> None:
        self.add_tried(method, best_of(method.searched(self.suite, budget, self.suite.seed)))

    def tested(self) -> list[Row]:
        return [
            Row(
                method=method,
                knobs=knobs,
                validation=score,
                test=self.suite.scores(state, "test"),
                elsewhere=self.suite.scores_elsewhere(state),
            )
            for method, knobs, score, state in self.rows
        ]


def record(name: str, seed: int, tier: str, file: pathlib.Path) -> None:
    """Do everything in one thread, so that no bit depends on what else runs, and write it."""
    torch.set_num_threads(1)
    logging.getLogger("mergekit_pcb").setLevel(logging.ERROR)  # a search asks for odd things, too
    write_text(file, run(name, seed, tier).model_dump_json(indent=1) + "\n")


def run(name: str, seed: int, tier_name: str) -> Record:
    """Train one suite from one seed, and do all of it."""
    began, code_at_start = time.monotonic(), code()
    tier = TIERS[tier_name]

    def told(what: str) -> None:
        click.echo(f"{name} {seed}: {what} after {time.monotonic() - began:.0f} s", err=True)

    (suite,) = BUILD[name](seed, getattr(tier, name))
    told("trained")
    first, searched = Chosen(suite), Chosen(suite)
    trials: dict[str, list[Trial]] = {}
    for method in METHODS:
        trials[method.name] = method.searched(suite, tier.budget, seed)
        first.add_tried(method, trials[method.name][0])
        searched.add_tried(method, best_of(trials[method.name]))
    told("merged by every method")
    best = {row[0]: row[1] for row in searched.rows}
    weighted = _weighted(suite, best, tier.weight_budget, seed)
    told("weights searched")
    adapted = _adapted(suite, best[PCB.name], tier.epochs) if suite.metric == "accuracy" else None
    ablation = _ablation(suite, tier.budget)
    told("parts left out")
    clip = _clip(suite, best, tier.clips)
    sweeps = [_sweep(suite, scope, tier) for scope in SCOPES]
    told("swept")
    some = _some_tasks(suite, max(2, tier.budget // 2), trials)
    told("merged in part")
    # From here on test data are read, and nothing is chosen any more.
    base = Chosen(suite)
    base.add("base", {}, suite.base)
    return Record(
        suite=name,
        metric=suite.metric,
        tier=tier_name,
        seed=seed,
        machine=machine(),
        versions=", ".join(f"{package} {version(package)}" for package in PACKAGES),
        code=code_at_start,
        data=suite.digest(),
        tasks=suite.tasks,
        base=base.tested()[0],
        individual=suite.individual("test"),
        first=first.tested(),
        searched=searched.tested(),
        trials=trials,
        weighted=weighted.tested(),
        adapted=adapted.tested() if adapted else [],
        ablation=ablation.tested(),
        clip=clip.tested(),
        tasks_merged={
            count: [chosen.tested() for chosen in choices] for count, choices in some.items()
        },
        sweeps=sweeps,
        seconds=round(time.monotonic() - began),
    )


def _weighted(suite: Suite, best: dict[str, Knobs], budget: int, seed: int) -> Chosen:
    """Per-task weights by CMA-ES, around the best setting: PCB's, task arithmetic's and Fisher's.

    Fisher merging has no other published knobs than these.
    """
    chosen = Chosen(suite)
    for method in (TASK_ARITHMETIC, PCB, PCB_MODEL, FISHER):
        knobs = best[method.name]
        merged = _by_weights(suite, method, knobs)
        space = search.Space((1.0,) * len(suite.experts), bounds=WEIGHTS)

        def score(
            weights: Sequence[float],
            _: float | None,
            merged: Callable[[Sequence[float]], StateDict] = merged,
        ) -> float:
            return suite.validation(merged(weights))

        trials = list(search.search(score, space, budget, seed=seed))
        trial = search.Found(trials, minimize=False).best
        assert trial is not None  # noqa: S101 - a mean of finite losses is one
        found = {f"weight {task}": w for task, w in zip(suite.tasks, trial.weights, strict=True)}
        chosen.add(
            f"{method.name} + weights", {**knobs, **found}, merged(trial.weights), trial.score
        )
    return chosen


def _by_weights(
    suite: Suite, method: Method, knobs: Knobs
) -> Callable[[Sequence[float]], StateDict]:
    """A method's merge as a function of its weights: of importances, contributions, or vectors."""
    if method is FISHER:
        return partial(baselines.fisher, suite)
    if method is TASK_ARITHMETIC:
        parts = Contributions(
            [
                {name: expert[name] - base for name, base in suite.base.items()}
                for expert in suite.experts
            ]
        )
    else:
        scope = "model" if method is PCB_MODEL else "tensor"
        parts = contributions(suite.base, suite.experts, density=knobs["density"], scope=scope)
    return partial(combine, suite.base, parts, scale=knobs["lambda"])


def _adapted(suite: Suite, best: Knobs, epochs: int) -> Chosen:
    """AdaMerging of PCB's contributions, on the validation images without their labels.

    Once from the start of the released AdaMerging, for which nobody needs labels, and once from
    PCB's best setting; beside the same coefficients left as they are.
    """
    chosen = Chosen(suite)
    starts = {
        "usual start": {"density": PCB.knobs[0].first, "lambda": START},
        "best start": best,
    }
    for name, knobs in starts.items():
        chosen.add(f"fixed, {name}", knobs, PCB.merge(suite, knobs))
        for granularity in ("task", "layer"):
            found = adamerge(
                suite.model,
                suite.base,
                suite.experts,
                suite.unlabelled(),
                granularity,  # type: ignore[arg-type]
                epochs=epochs,
                learning_rate=RATE,
                start=knobs["lambda"],
                density=knobs["density"],
            )
            chosen.add(f"AdaMerging per {granularity}, {name}", knobs, found.state_dict)
    return chosen


def _ablation(suite: Suite, budget: int) -> Chosen:
    """PCB without each of its parts; every variant is searched like PCB itself.

    Nothing is dropped at density 1, so the variant without the drop has lambda alone to search.
    """
    chosen = Chosen(suite)
    for scope in SCOPES:
        for part in ("intra", "inter", "drop", "rescale"):

            def merge(suite: Suite, k: Knobs, part: Any = part, scope: str = scope) -> StateDict:
                return baselines.without(suite, part, k.get("density", 1.0), k["lambda"], scope)

            knobs = tuple(k for k in PCB.knobs if part != "drop" or k.name != "density")
            chosen.add_searched(Method(f"scope: {scope}, without {part}", knobs, merge), budget)
    return chosen


def _some_tasks(
    suite: Suite, budget: int, trials: dict[str, list[Trial]]
) -> dict[int, list[Chosen]]:
    """Some of the tasks, from two on: the first and the last ones of an order that the seed draws.

    Of all tasks the trials are there already; as many of them count as the others get.
    """
    methods = (LINEAR, TASK_ARITHMETIC, TIES, PCB, PCB_MODEL)
    order = list(suite.tasks)
    random.Random(suite.seed).shuffle(order)  # noqa: S311 - not for secrets
    chosen: dict[int, list[Chosen]] = {}
    for count in range(2, len(order)):
        chosen[count] = [Chosen(suite.among(some)) for some in (order[:count], order[-count:])]
        for one in chosen[count]:
            for method in methods:
                one.add_searched(method, budget)
    chosen[len(order)] = [Chosen(suite)]
    for method in methods:
        chosen[len(order)][0].add_tried(method, best_of(trials[method.name][:budget]))
    return chosen


def _clip(suite: Suite, best: dict[str, Knobs], clips: Sequence[float]) -> Chosen:
    chosen = Chosen(suite)
    for method in (PCB, PCB_MODEL):
        for clip in clips:
            knobs = {**best[method.name], "clip": clip}
            chosen.add(method.name, knobs, method.merge(suite, knobs))
    return chosen


def _sweep(suite: Suite, scope: str, tier: Tier) -> Sweep:
    scores = []
    for density in tier.densities:
        parts = contributions(suite.base, suite.experts, density=density, scope=scope)
        ones = [1.0] * len(parts)
        scores.append(
            [suite.validation(combine(suite.base, parts, ones, scale)) for scale in tier.lambdas]
        )
    return Sweep(scope=scope, densities=tier.densities, lambdas=tier.lambdas, scores=scores)
