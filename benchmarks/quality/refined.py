"""``python -m benchmarks.quality.refined``: refine and spectrum beside other methods without data.

Each suite at three distances of its experts from their base, each method at one default and after
one search. A record per suite, seed and distance is written as it ends; records that are there
are not made again. Everything is chosen on validation data; test data are read at the end.
"""

from __future__ import annotations

import multiprocessing
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache, partial

import click
import torch
from pydantic import BaseModel, ConfigDict

from benchmarks.measuring import machine
from benchmarks.quality import baselines, datafree
from benchmarks.quality.experiments import BUILD, TIERS, Chosen, Row, code
from benchmarks.quality.methods import (
    LINEAR,
    METHODS,
    PCB,
    TASK_ARITHMETIC,
    TIES,
    Knob,
    Knobs,
    Method,
    Trial,
    best_of,
)
from benchmarks.quality.suite import DISTANCES, StateDict, Suite
from mergekit_pcb import combine, contributions
from mergekit_pcb.files import write_text
from mergekit_pcb.host.kinds import kinds_of, layout_of

STORED = pathlib.Path(__file__).resolve().parent / "results" / "refined"
OURS = "pcb, refine: solve"


class Record(BaseModel):
    """All that one suite, distance and seed gave; scores as in :class:`experiments.Record`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: str
    distance: str
    metric: str
    tier: str
    seed: int
    machine: str
    code: str
    data: str
    seconds: float
    base: Row
    individual: dict[str, float]
    first: list[Row]
    searched: list[Row]
    trials: dict[str, list[Trial]]
    #: Of every matrix, the exponent that its task vectors ask for.
    agreement: dict[str, float]


def matrices_of(suite: Suite) -> list[str]:
    """The weights of linear layers and convolutions, which refine and its rivals solve for."""
    kinds = kinds_of(suite.model)
    return [n for n, t in suite.base.items() if n in kinds and layout_of(kinds[n], t.shape)]


@lru_cache(maxsize=4)
def _parts(suite: Suite, density: float, refine: str, spectrum: float | None) -> object:
    return contributions(
        suite.base,
        suite.experts,
        density=density,
        refine=refine,
        spectrum=spectrum,
        architecture=suite.model,
    )


def _ours(name: str, refine: str, spectrum: float | str | None) -> Method:
    def merge(suite: Suite, knobs: Knobs) -> StateDict:
        parts = _parts(suite, knobs["density"], refine, spectrum)
        return combine(suite.base, parts, [1.0] * len(suite.experts), knobs["lambda"])

    return Method(name, PCB.knobs, merge)


@lru_cache(maxsize=16)
def _delta(suite: Suite, find: Callable[[Suite], StateDict]) -> StateDict:
    """A merged task vector, of which searches change the scale alone."""
    return find(suite)


def _scaled(name: str, first: float, find: Callable[[Suite], StateDict]) -> Method:
    """A method without data whose one knob is the scale of what it found."""

    def merge(suite: Suite, knobs: Knobs) -> StateDict:
        delta = _delta(suite, find)
        return {n: base + knobs["lambda"] * delta[n] for n, base in suite.base.items()}

    return Method(name, (Knob("lambda", first, 0.1, 3.0),), merge)


def _rival(method: str) -> Callable[[Suite], StateDict]:
    def find(suite: Suite) -> StateDict:
        merged = datafree.merge(method, suite.base, suite.experts, matrices_of(suite), **UNSCALED.get(method, {}))
        return {name: merged[name] - base for name, base in suite.base.items()}

    return find


def _other_prior(suite: Suite) -> StateDict:
    return baselines.solved(suite, matrices_of(suite), 0.1, 0.4)


#: The first scale of each rival is its paper's.
METHODS_OF_THIS: Sequence[Method] = (
    LINEAR,
    TASK_ARITHMETIC,
    TIES,
    PCB,
    *(method for method in METHODS if method.name == "RegMean"),
    *(_scaled(name, scale, _rival(name)) for name, scale in datafree.SCALES.items()),
    _ours("pcb, refine: solve, spectrum: 1", "solve", 1.0),
    _ours("pcb, spectrum: auto", "none", "auto"),
    _scaled("task_arithmetic + solve + spectrum", 1.0, _other_prior),
    _ours(OURS, "solve", None),
)


def run(name: str, seed: int, tier_name: str, folder: pathlib.Path) -> None:
    """Train a suite at every distance, try everything at each, and write a record of it."""
    torch.set_num_threads(1)
    tier, code_at_start = TIERS[tier_name], code()
    suites = BUILD[name](seed, getattr(tier, name), DISTANCES)
    for distance in DISTANCES:
        began = time.monotonic()
        suite = next(suites)
        first, searched = Chosen(suite), Chosen(suite)
        trials: dict[str, list[Trial]] = {}
        for method in METHODS_OF_THIS:
            trials[method.name] = method.searched(suite, tier.budget, seed)
            first.add_tried(method, trials[method.name][0])
            searched.add_tried(method, best_of(trials[method.name]))
        base = Chosen(suite)
        base.add("base", {}, suite.base)
        # From here on test data are read, and nothing is chosen any more.
        record = Record(
            suite=name,
            distance=distance.name,
            metric=suite.metric,
            tier=tier_name,
            seed=seed,
            machine=machine(),
            code=code_at_start,
            data=suite.digest(),
            base=base.tested()[0],
            individual={
                task: suite.score(expert, "test", task)
                for task, expert in zip(suite.tasks, suite.experts, strict=True)
            },
            first=first.tested(),
            searched=searched.tested(),
            trials=trials,
            agreement={
                tensor: baselines.agreement([e[tensor] - suite.base[tensor] for e in suite.experts])
                for tensor in matrices_of(suite)
            },
            seconds=round(time.monotonic() - began),
        )
        _delta.cache_clear()
        _parts.cache_clear()
        write_text(_file(folder, name, seed, distance.name), record.model_dump_json(indent=1))
        click.echo(f"{name} {seed}, {distance.name}: {record.seconds:.0f} s", err=True)


def _file(folder: pathlib.Path, suite: str, seed: int, distance: str) -> pathlib.Path:
    return folder / f"{suite}-{seed}-{distance.replace(' ', '-')}.json"
