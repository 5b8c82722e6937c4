"""``python -m benchmarks.quality``: train, merge, measure, and print the tables.

A record per suite and seed is written as it ends; records that are there are not made again,
so a run that was stopped goes on.
"""

from __future__ import annotations

import multiprocessing
import pathlib
from concurrent.futures import ProcessPoolExecutor, as_completed

import click

from benchmarks.quality import experiments, tables
from mergekit_pcb.errors import PCBError

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
    seeds = experiments.TIERS[tier].seeds
    if not set(some) <= set(seeds):
        raise click.BadParameter(f"the seeds of tier {tier} are {seeds}", param_hint="--seed")
    out.mkdir(parents=True, exist_ok=True)
    files = {
        (suite, seed): out / f"{suite}-{seed}.json" for seed in seeds for suite in experiments.BUILD
    }
    there = {key for key, file in files.items() if _is_there(file, tier)}
    wanted = {key for key in files if key[1] in (some or seeds)}
    missing = [key for key in files if key in wanted - there]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = [pool.submit(experiments.record, *key, tier, files[key]) for key in missing]
        try:
            for done in as_completed(running):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    records = [_read(file) for key, file in files.items() if key in wanted | there]
    click.echo(tables.write(records, out))
    stored = [_read(file) for file in sorted(STORED.glob("*.json"))]
    if stored and records[0].tier == stored[0].tier and out.resolve() != STORED:
        farther = tables.outside(records, stored)
        click.echo("\n".join(farther) or "Every average is within the spread of the stored one.")


def _is_there(file: pathlib.Path, tier: str) -> bool:
    if not file.exists():
        return False
    try:
        record = _read(file)
    except ValueError:
        record = None
    if record is None or (record.tier, record.code) != (tier, experiments.code()):
        raise PCBError(
            f"go on in {file.parent}",
            f"{file.name} is of another tier or version, or damaged",
            "name another folder",
        )
    return True


def _read(file: pathlib.Path) -> experiments.Record:
    return experiments.Record.model_validate_json(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
