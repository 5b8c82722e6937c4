"""What is done with a suite, and the record it leaves.

Everything is chosen on validation data; test data are read at the end, for what was chosen.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import pathlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click
import torch
from pydantic import BaseModel, ConfigDict

import mergekit_pcb
from benchmarks.measuring import machine
from benchmarks.quality import baselines, decoder, encoder, glyphs, language, without_data
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
from benchmarks.quality.work import Work
from mergekit_pcb import Contributions, adamerge, combine, contributions
from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import write_text
from mergekit_pcb.tools import search
from mergekit_pcb.tools.search_space import Found, Space

PACKAGES = (
    "transformers", "tokenizers", "optuna", "cmaes", "scikit-learn", "matplotlib", "pillow",
    "numpy", "pydantic",
)  # fmt: skip
#: What further packages suites depend on, beside those of weights, whose digests are known.
OF_SUITES = {
    "encoder": ("networkx", "scipy", "sympy"),
    "decoder": ("gguf",),
}
SCOPES = ("tensor", "model")
#: Bounds of the searched weights: wide enough to leave an expert out.
WEIGHTS = (0.0, 3.0)
#: Adam's rate for AdaMerging's coefficients.
RATE = 1e-2
#: Where the released AdaMerging starts.
START = 0.3


@dataclass(frozen=True)
class Effort:
    """How much is done with a suite: its training, the trials of a search, the grids of sweeps."""

    schedule: Schedule
    #: Trials of a method.
    budget: int
    #: Trials of a part left out, of some of the tasks, and of weights; 0 leaves these out.
    ablation_budget: int
    some_budget: int
    weight_budget: int
    #: Passes of AdaMerging, or 0.
    epochs: int
    densities: tuple[float, ...]
    lambdas: tuple[float, ...]
    clips: tuple[float, ...]
    scopes_taken_apart: tuple[str, ...] = SCOPES
    #: Choices of so many of the tasks.
    ways: int = 2
    threads: int = 1
    #: Where they are others than the tier's.
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tier:
    """Seeds, other ones than those that schedules and rates were tried on; an effort a suite."""

    seeds: tuple[int, ...]
    efforts: dict[str, Effort]

    def seeds_of(self, suite: str) -> tuple[int, ...]:
        """A suite's own seeds, or the tier's."""
        return self.efforts[suite].seeds or self.seeds


_FULL = Effort(
    language.SCHEDULE,
    budget=12,
    ablation_budget=12,
    some_budget=6,
    weight_budget=40,
    epochs=5,
    densities=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    lambdas=(0.2, 0.35, 0.5, 0.7, 1.0, 1.5),
    clips=(0.0, 1e-4, 1e-3, 1e-2, 0.1),
)
#: Of models that take long to merge: each method, and little else.
_DECODER = replace(
    _FULL,
    schedule=decoder.SCHEDULE,
    budget=4,
    ablation_budget=0,
    some_budget=0,
    weight_budget=0,
    epochs=0,
    densities=(0.1, 0.3, 1.0),
    lambdas=(0.35, 0.7, 1.0),
    clips=(),
    scopes_taken_apart=(),
    threads=2,
)
_SMALL = replace(
    _FULL,
    budget=2,
    ablation_budget=1,
    some_budget=1,
    weight_budget=3,
    epochs=1,
    densities=(0.1,),
    lambdas=(1.0,),
    clips=(1e-4,),
)
TIERS = {
    "full": Tier(
        seeds=(10, 11, 12, 13),
        efforts={
            "encoder": replace(
                _FULL,
                schedule=encoder.SCHEDULE,
                budget=4,
                ablation_budget=3,
                some_budget=2,
                weight_budget=0,
                epochs=0,
                densities=(0.05, 0.1, 0.3, 1.0),
                lambdas=(0.35, 0.7, 1.0, 1.5),
                clips=(),
                scopes_taken_apart=("tensor",),
                ways=1,
                threads=2,
                # 12 is refused: one of its experts gains less than three points.
                seeds=(10, 11, 13, 14),
            ),
            "language": _FULL,
            "glyphs": replace(_FULL, schedule=glyphs.SCHEDULE),
        },
    ),
    "large": Tier(seeds=(10, 11), efforts={"decoder": _DECODER}),
    "small": Tier(
        seeds=(10,),
        efforts={
            "decoder": replace(
                _DECODER,
                schedule=replace(decoder.SCHEDULE, expert_steps=3, looked_at=Sizes(2, 2, 2)),
                budget=1,
                densities=(0.1,),
                lambdas=(1.0,),
                threads=1,
            ),
            "encoder": replace(
                _SMALL,
                schedule=replace(encoder.SCHEDULE, expert_steps=15, looked_at=Sizes(20, 60, 60)),
                budget=1,
                ablation_budget=1,
                some_budget=1,
                weight_budget=0,
                epochs=0,
                clips=(),
                scopes_taken_apart=("tensor",),
                ways=1,
            ),
            "language": replace(
                _SMALL,
                schedule=replace(
                    language.SCHEDULE, base_steps=10, expert_steps=3, looked_at=Sizes(1, 1, 1)
                ),
            ),
            "glyphs": replace(
                _SMALL,
                schedule=replace(
                    glyphs.SCHEDULE, base_steps=60, expert_steps=15, looked_at=Sizes(40, 40, 40)
                ),
            ),
        },
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
    #: The part of each task's questions that were answered rightly.
    answered: dict[str, float] = {}


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
    #: On test data, what a linear classifier that counts characters scores.
    characters: dict[str, float] = {}
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
BUILD = {
    "encoder": encoder.build,
    "decoder": decoder.build,
    "language": language.build,
    "glyphs": glyphs.build,
}
#: Those that are made of what is trained here, from nothing: they need no pretrained weights.
FROM_NOTHING = ("language", "glyphs")
#: The tiers that have these.
TIERS_FROM_NOTHING = [
    name for name, tier in TIERS.items() if set(FROM_NOTHING) <= set(tier.efforts)
]
#: What the suites must find before they begin.
READY: dict[str, Callable[[pathlib.Path], None]] = {
    "encoder": lambda _: encoder.refuse_unless_ready(),
    "decoder": decoder.refuse_unless_ready,
}


def methods_of(name: str) -> Sequence[Method]:
    """What is tried on a suite: those of models from nothing have a benchmark of their own."""
    if name in FROM_NOTHING:
        return METHODS
    return (*METHODS, *without_data.methods_of(name), without_data.MEAN_ELSEWHERE)


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


def _versions(suite: str) -> str:
    """Of all packages that a suite's numbers depend on and that are installed."""
    found = []
    for package in (*PACKAGES, *OF_SUITES.get(suite, ())):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def seeds_of(tier: str, some: tuple[int, ...], suites: Iterable[str] = ()) -> tuple[int, ...]:
    """Some of the seeds of a tier, or of suites of it, or all."""
    chosen = TIERS[tier]
    found = {seed for suite in suites for seed in chosen.seeds_of(suite)}
    seeds = tuple(sorted(found)) or chosen.seeds
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
    """Merges that wait for the test data: how each is made, and its score on validation data."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.rows: list[tuple[str, Knobs, float, Callable[[], StateDict]]] = []

    def add(self, method: str, knobs: Knobs, state: StateDict, score: float | None = None) -> None:
        score = self.suite.validation(state) if score is None else score
        self.rows.append((method, knobs, score, lambda: state))

    def add_tried(self, method: Method, trial: Trial) -> None:
        score, knobs = trial
        held = self.suite.holds(method.name, knobs)
        again = partial(method.merge, self.suite, knobs)
        make = again if held is None else lambda: held
        self.rows.append((method.name, knobs, score, make))

    def add_searched(self, method: Method, budget: int) -> None:
        self.add_tried(method, best_of(method.searched(self.suite, budget, self.suite.seed)))
        self.suite.held.clear()

    def tested(self, known: dict[str, Any] | None = None) -> list[Row]:
        """The rows; ``known`` has those of the same suite that were tested already."""
        known, found = {} if known is None else known, []
        for method, knobs, score, make in self.rows:

            def test(make: Callable[[], StateDict] = make) -> dict[str, Any]:
                state = make()
                return {
                    "test": self.suite.scores(state, "test"),
                    "elsewhere": self.suite.scores_elsewhere(state),
                    "answered": self.suite.answered(state),
                }

            key = ["test", method, knobs, self.suite.tasks]
            if str(key) not in known:
                known[str(key)] = self.suite.work.score(key, test)
            found.append(Row(method=method, knobs=knobs, validation=score, **known[str(key)]))
        return found


def record(name: str, seed: int, tier: str, file: pathlib.Path) -> None:
    """Do everything in so many threads, that no bit depends on what else runs, and write it."""
    torch.set_num_threads(TIERS[tier].efforts[name].threads)
    work = Work(file.with_suffix(".work"), code())
    with _quiet():
        made = run(name, seed, tier, work)
    write_text(file, made.model_dump_json(indent=1) + "\n")
    work.remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's warnings: a search asks for odd things, too."""
    log = logging.getLogger("mergekit_pcb")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def run(name: str, seed: int, tier_name: str, work: Work) -> Record:
    """Train one suite from one seed, and do all of it; or what is left of it to do."""
    began, code_at_start = time.monotonic(), code()
    effort = TIERS[tier_name].efforts[name]

    def told(what: str) -> None:
        click.echo(f"{name} {seed}: {what} after {time.monotonic() - began:.0f} s", err=True)

    (suite,) = BUILD[name](seed, effort.schedule, work=work)
    told("trained")
    first, searched = Chosen(suite), Chosen(suite)
    trials: dict[str, list[Trial]] = {}
    for method in methods_of(name):
        trials[method.name] = method.searched(suite, effort.budget, seed)
        first.add_tried(method, trials[method.name][0])
        searched.add_tried(method, best_of(trials[method.name]))
        suite.held.clear()
        # Ours stands twice in a row, once with the mean where no matrices are.
        without_data.forget(parts=method.name != without_data.OURS)
    told("merged by every method")
    best = {row[0]: row[1] for row in searched.rows}
    weighted = _weighted(suite, best, effort.weight_budget, seed)
    told("weights searched")
    adapted = _adapted(suite, best[PCB.name], effort.epochs)
    ablation = _ablation(suite, effort)
    told("parts left out")
    clip = _clip(suite, best, effort.clips)
    sweeps = [_sweep(suite, scope, effort) for scope in SCOPES]
    told("swept")
    some = _some_tasks(suite, effort.some_budget, trials, effort.ways)
    told("merged in part")
    # From here on test data are read, and nothing is chosen any more.
    base, known = Chosen(suite), dict[str, Any]()
    base.add("base", {}, suite.base)
    return Record(
        suite=name,
        metric=suite.metric,
        tier=tier_name,
        seed=seed,
        machine=machine(),
        versions=_versions(name),
        code=code_at_start,
        data=suite.digest(),
        tasks=suite.tasks,
        base=base.tested()[0],
        individual=suite.individual("test"),
        characters=suite.characters,
        first=first.tested(known),
        searched=searched.tested(known),
        trials=trials,
        weighted=weighted.tested(),
        adapted=adapted.tested(),
        ablation=ablation.tested(),
        clip=clip.tested(),
        tasks_merged={
            count: [chosen.tested() for chosen in choices] for count, choices in some.items()
        },
        sweeps=sweeps,
        seconds=round(time.monotonic() - began),
    )


def _weighted(suite: Suite, best: dict[str, Knobs], budget: int, seed: int) -> Chosen:
    """Weights by CMA-ES around the best setting: PCB's, task arithmetic's and Fisher's."""
    chosen = Chosen(suite)
    for method in (TASK_ARITHMETIC, PCB, PCB_MODEL, FISHER) if budget else ():
        knobs = best[method.name]
        merged = _by_weights(suite, method, knobs)
        space = Space((1.0,) * len(suite.experts), bounds={"weight": WEIGHTS})

        def score(
            weights: Sequence[float],
            _: Any,
            __: Any,
            merged: Callable[[Sequence[float]], StateDict] = merged,
        ) -> float:
            return suite.validation(merged(weights))

        trials = list(search.search(score, space, budget, seed=seed))
        trial = Found(trials, minimize=False).best
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
        return partial(baselines.fisher, suite, knobs["floor"])
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
    if suite.metric != "accuracy" or not epochs:
        return chosen
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


def _ablation(suite: Suite, effort: Effort) -> Chosen:
    """PCB without each of its parts; every variant is searched like PCB itself.

    Nothing is dropped at density 1, so the variant without the drop has lambda alone to search.
    """
    chosen = Chosen(suite)
    for scope in effort.scopes_taken_apart if effort.ablation_budget else ():
        for part in ("intra", "inter", "drop", "rescale"):

            def merge(suite: Suite, k: Knobs, part: Any = part, scope: str = scope) -> StateDict:
                return baselines.without(suite, part, k.get("density", 1.0), k["lambda"], scope)

            knobs = tuple(k for k in PCB.knobs if part != "drop" or k.name != "density")
            variant = Method(f"scope: {scope}, without {part}", knobs, merge)
            chosen.add_searched(variant, effort.ablation_budget)
    return chosen


def _some_tasks(
    suite: Suite, budget: int, trials: dict[str, list[Trial]], ways: int = 2
) -> dict[int, list[Chosen]]:
    """Some of the tasks, from two on: the first and the last ones of an order that the seed draws.

    Of all tasks the trials are there already; as many of them count as the others get.
    """
    methods = (LINEAR, TASK_ARITHMETIC, TIES, PCB, PCB_MODEL)
    order = list(suite.tasks)
    random.Random(suite.seed).shuffle(order)  # noqa: S311 - not for secrets
    chosen: dict[int, list[Chosen]] = {}
    if not budget:
        return chosen
    for count in range(2, len(order)):
        chosen[count] = [
            Chosen(suite.among(some)) for some in (order[:count], order[-count:])[:ways]
        ]
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


def _sweep(suite: Suite, scope: str, effort: Effort) -> Sweep:
    scores = []
    for density in effort.densities:
        parts = contributions(suite.base, suite.experts, density=density, scope=scope)
        ones = [1.0] * len(parts)
        scores.append(
            [suite.validation(combine(suite.base, parts, ones, scale)) for scale in effort.lambdas]
        )
    return Sweep(scope=scope, densities=effort.densities, lambdas=effort.lambdas, scores=scores)
