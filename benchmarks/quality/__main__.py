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
    "--suite",
    "suites",
    type=click.Choice(list(experiments.BUILD)),
    multiple=True,
    help="May be repeated; encoder and decoder need pip install '.[bench-pretrained]'. "
    "Default: those that need nothing, or all of a tier that has none of these.",
)
@click.option(
    "--seed", "some", type=int, multiple=True, help="This seed of the tier only; may be repeated."
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Threads in all: processes of one each, for pretrained models of two.",
)
def main(
    tier: str, out: pathlib.Path, suites: tuple[str, ...], some: tuple[int, ...], jobs: int
) -> None:
    """Run the quality benchmark; a suite takes from half an hour to half a day of two cores."""
    chosen_tier = experiments.TIERS[tier]
    efforts = chosen_tier.efforts
    suites = suites or tuple(s for s in efforts if s in experiments.FROM_NOTHING) or tuple(efforts)
    if unknown := set(suites) - set(efforts):
        raise click.BadParameter(
            f"tier {tier} has {', '.join(efforts)}, not {', '.join(unknown)}", param_hint="--suite"
        )
    chosen = experiments.seeds_of(tier, some, suites)
    for suite in suites:
        experiments.READY.get(suite, lambda _: None)(out)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        (suite, seed): out / f"{suite}-{seed}.json"
        for seed in experiments.seeds_of(tier, (), efforts)
        for suite in efforts
        if seed in chosen_tier.seeds_of(suite)
    }
    there = {key for key, file in files.items() if is_there(file, tier, Record)}
    wanted = {key for key in files if key[0] in suites and key[1] in chosen}
    for threads in (1, 2):
        missing = [
            (*key, tier, file)
            for key, file in files.items()
            if key in wanted - there and efforts[key[0]].threads == threads
        ]
        experiments.in_processes(max(1, jobs // threads), experiments.record, missing)
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
