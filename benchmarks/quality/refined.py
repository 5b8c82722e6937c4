"""``python -m benchmarks.quality.refined``: refine and spectrum beside other methods without data.

Each suite at three distances of its experts from their base, each method at one default and after
one search. A record per suite, seed and distance is written as it ends; records that are there
are not made again. Everything is chosen on validation data; test data are read at the end.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Sequence

import click
import torch
from pydantic import BaseModel, ConfigDict

from benchmarks.measuring import machine
from benchmarks.quality import baselines, refined_tables, without_data
from benchmarks.quality.experiments import (
    BUILD,
    FROM_NOTHING,
    TIERS,
    TIERS_FROM_NOTHING,
    Chosen,
    Row,
    code,
    in_processes,
    is_there,
    seeds_of,
)
from benchmarks.quality.methods import (
    LINEAR,
    METHODS,
    PCB,
    TASK_ARITHMETIC,
    TIES,
    Method,
    Trial,
    best_of,
)
from benchmarks.quality.suite import DISTANCES, Distance
from benchmarks.quality.without_data import matrices_of
from mergekit_pcb.files import write_text


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


#: What is tried: a few of the other benchmark's methods, and all that need no data.
METHODS_OF_THIS: Sequence[Method] = (
    LINEAR,
    TASK_ARITHMETIC,
    TIES,
    PCB,
    *(method for method in METHODS if method.name == "RegMean"),
    *without_data.methods_of("glyphs"),
)


def run(
    name: str,
    seed: int,
    tier_name: str,
    folder: pathlib.Path,
    distances: Sequence[Distance] = DISTANCES,
) -> None:
    """Train a suite at every distance, try everything at each, and write a record of it."""
    torch.set_num_threads(TIERS[tier_name].efforts[name].threads)
    effort, code_at_start = TIERS[tier_name].efforts[name], code()
    suites = BUILD[name](seed, effort.schedule, distances)
    for distance in distances:
        began = time.monotonic()
        suite = next(suites)
        first, searched = Chosen(suite), Chosen(suite)
        trials: dict[str, list[Trial]] = {}
        for method in METHODS_OF_THIS:
            trials[method.name] = method.searched(suite, effort.budget, seed)
            first.add_tried(method, trials[method.name][0])
            searched.add_tried(method, best_of(trials[method.name]))
            suite.held.clear()
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
            individual=suite.individual("test"),
            first=first.tested(),
            searched=searched.tested(),
            trials=trials,
            agreement={
                tensor: baselines.agreement([e[tensor] - suite.base[tensor] for e in suite.experts])
                for tensor in matrices_of(suite)
            },
            seconds=round(time.monotonic() - began),
        )
        without_data.forget()
        write_text(_file(folder, name, seed, distance), record.model_dump_json(indent=1))
        click.echo(f"{name} {seed}, {distance.name}: {record.seconds:.0f} s", err=True)


def _file(folder: pathlib.Path, suite: str, seed: int, distance: Distance) -> pathlib.Path:
    return folder / f"{suite}-{seed}-{distance.name.replace(' ', '-')}.json"


def _read(folder: pathlib.Path) -> list[Record]:
    files = sorted(folder.glob("*.json"))
    return [Record.model_validate_json(file.read_text(encoding="utf-8")) for file in files]


@click.command()
@click.option("--tier", type=click.Choice(TIERS_FROM_NOTHING), default="full", show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    default=pathlib.Path("refined-results"),
    show_default=True,
    help="Where records, the table and the figure go.",
)
@click.option("--seed", "some", type=int, multiple=True, help="Of the tier; may be repeated.")
@click.option(
    "--distance",
    "far",
    type=click.Choice([distance.name for distance in DISTANCES]),
    multiple=True,
    help="Of the experts; may be repeated. Default: all.",
)
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True)
def main(
    tier: str, out: pathlib.Path, some: tuple[int, ...], far: tuple[str, ...], jobs: int
) -> None:
    """Run it; --seed 10 makes a quarter of the records, --distance near the quickest third."""
    distances = [distance for distance in DISTANCES if not far or distance.name in far]
    seeds = seeds_of(tier, some)
    out.mkdir(parents=True, exist_ok=True)
    calls = []
    for seed in seeds:
        for suite in FROM_NOTHING:
            missing = [
                d for d in distances if not is_there(_file(out, suite, seed, d), tier, Record)
            ]
            if missing:
                calls.append((suite, seed, tier, out, missing))
    in_processes(jobs, run, calls)
    click.echo(refined_tables.write(_read(out), out))


if __name__ == "__main__":
    main()
