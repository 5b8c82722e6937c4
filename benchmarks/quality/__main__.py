"""``python -m benchmarks.quality``: train, merge, measure, and print the tables.

A record per suite and seed is written as it ends; records that are there are not made again,
so a run that was stopped goes on.
"""

from __future__ import annotations

import pathlib

import click

from benchmarks.quality import experiments, tables
from benchmarks.quality.experiments import Record, is_there

STORED = pathlib.Path(__file__).resolve().parent / "results"


@click.command()
@click.option(
    "--tier", type=click.Choice(list(experiments.TIERS)), default="full", show_default=True
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    default=pathlib.Path("quality-results"),
    show_default=True,
    help="Where records, tables and figures go.",
)
@click.option(
    "--seed", "some", type=int, multiple=True, help="This seed of the tier only; may be repeated."
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Processes, of one thread each.",
)
def main(tier: str, out: pathlib.Path, some: tuple[int, ...], jobs: int) -> None:
    """Run the quality benchmark; the full tier takes some 50 minutes on two cores."""
    seeds, chosen = experiments.TIERS[tier].seeds, experiments.seeds_of(tier, some)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        (suite, seed): out / f"{suite}-{seed}.json" for seed in seeds for suite in experiments.BUILD
    }
    there = {key for key, file in files.items() if is_there(file, tier, Record)}
    wanted = {key for key in files if key[1] in chosen}
    missing = [(*key, tier, file) for key, file in files.items() if key in wanted - there]
    experiments.in_processes(jobs, experiments.record, missing)
    records = [_read(file) for key, file in files.items() if key in wanted | there]
    click.echo(tables.write(records, out))
    stored = [_read(file) for file in sorted(STORED.glob("*.json"))]
    if stored and records[0].tier == stored[0].tier and out.resolve() != STORED:
        farther = tables.outside(records, stored)
        click.echo("\n".join(farther) or "Every average is within the spread of the stored one.")


def _read(file: pathlib.Path) -> Record:
    return Record.model_validate_json(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
