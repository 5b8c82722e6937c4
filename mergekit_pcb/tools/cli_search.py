"""The command ``mergekit-pcb search``."""

from __future__ import annotations

import pathlib
from typing import Any

import click

import mergekit_pcb
from mergekit_pcb.errors import PCBError
from mergekit_pcb.tools.cli_options import (
    HOST_OPTIONS,
    config_argument,
    document_for,
    explained,
    host_options,
    merge_options,
    output_option,
)
from mergekit_pcb.tools.search_space import BOUNDS, CHOICES


def _numbers(_: Any, __: Any, text: str | None) -> tuple[int, ...]:
    """Numbers between commas."""
    try:
        found = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter("write numbers between commas, as in 0,1") from None
    if any(number < 0 for number in found):
        raise click.BadParameter("cards are counted from 0")
    return found


@click.command(context_settings=HOST_OPTIONS)
@config_argument
@click.option(
    "--evaluate",
    "command",
    required=True,
    metavar="COMMAND",
    help="Shell command; {model} is the folder to score, the last number it prints the score.",
)
@click.option(
    "--score",
    "scores",
    multiple=True,
    metavar="NAME=FILE:KEY",
    help="Read the score from a JSON file that COMMAND writes; several make several goals.",
)
@click.option(
    "--lower",
    "lower",
    multiple=True,
    metavar="NAME=FILE:KEY",
    help="The same, of a score that is better if it is lower.",
)
@click.option("--budget", type=click.IntRange(1), default=100, show_default=True, help="Trials.")
@output_option("Where the best configuration goes.")
@click.option(
    "--search",
    "searched",
    multiple=True,
    type=click.Choice([*BOUNDS, *CHOICES]),
    default=("weight",),
    help="What to search, in place of weight; may be given several times.",
)
@click.option(
    "--bounds",
    multiple=True,
    type=(click.Choice(list(BOUNDS)), float, float),
    metavar="NAME LOW HIGH",
    help="Of what is searched, as in `lambda 0.2 1.5`. Default: "
    f"{', '.join(f'{name} {low:g} {high:g}' for name, (low, high) in BOUNDS.items())}.",
)
@click.option("--minimize", is_flag=True, help="Lower scores are better.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=1, help="Trials at a time. Default: 1.")
@click.option("--gpus", callback=_numbers, help="Cards, as in 0,1,2,3. Default: all, in turns.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    help="Seconds after which an evaluation has failed.",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="Folder for the study and models. Default: the output's name with .search.",
)
@click.option("--storage", help="Optuna storage URL, beside that folder. Default: a journal in it.")
@host_options
def search(
    config: pathlib.Path,
    command: str,
    scores: tuple[str, ...],
    lower: tuple[str, ...],
    budget: int,
    output: pathlib.Path,
    searched: tuple[str, ...],
    bounds: tuple[tuple[str, float, float], ...],
    minimize: bool,
    seed: int,
    jobs: int,
    gpus: tuple[int, ...],
    timeout: float | None,
    work: pathlib.Path | None,
    storage: str | None,
    options: tuple[str, ...],
) -> None:
    """Search per-task weights by CMA-ES, the paper's evolution strategy.

    CONFIG is for mergekit-yaml or mergekit-pytorch and where the search starts. Each trial's
    model is scored by COMMAND; use validation data, never the test set. Optuna keeps the trials:
    the same command goes on with a search that was stopped, or joins one that runs, also on
    another machine that shares the folder. Stock mergekit runs the best configuration. With several
    scores the result is the Pareto front: OUTPUT.front, a folder of configurations, not one file.
    A trial is one weighted sum and, under `refine: solve` or `spectrum`, one decomposition per
    matrix; searching density, anchor or refine merges anew. Needs (n + 1) float32 copies of the
    model on disk for n tasks, the model itself, and one more for each job. OPTIONS are mergekit's.

    Example: mergekit-pcb search pcb.yml --evaluate 'python score.py {model}' -o best.yml
    """
    mergekit_pcb.register()
    from mergekit_pcb.tools import search_files, search_job
    from mergekit_pcb.tools.search_scores import Score

    document = document_for(config, output)
    host = merge_options(options)
    job = search_job.Job(
        configuration=document if isinstance(document, dict) else {},
        command=command,
        output=output,
        folder=work or output.with_suffix(".search"),
        searched=tuple(dict.fromkeys(searched)),
        bounds={name: (low, high) for name, low, high in bounds},
        budget=budget,
        seed=seed,
        minimize=minimize,
        timeout=timeout,
        scores=(*map(Score.parse, scores), *(Score.parse(text, lower=True) for text in lower)),
        jobs=jobs,
        gpus=gpus,
        storage=storage,
        host={name: getattr(host, name) for name in search_job.HOST},
    )
    if len(job.bounds) < len(bounds):
        raise PCBError("search", "--bounds names one parameter twice", "name each once")
    job.check()
    with explained(f"merge {config}"):
        result = search_files.run(job, host)
    found, best = result.found, result.found.best
    if best is None and len(found.trials) < budget:
        click.echo(f"{output}: not written yet; other workers try the trials that are left")
        return
    if best is None:
        raise PCBError(
            "find a best configuration",
            f"all {len(found.trials)} trials failed, the last because {found.trials[-1].error}",
            f"try the command by hand; then remove {job.folder}, where the study is, to begin anew",
        )
    if result.front:
        click.echo((output.with_suffix(".front") / "front.md").read_text(encoding="utf-8"))
        said = f"{len(result.front)} configurations that none beats in every score"
        click.echo(f"{output.with_suffix('.front')}: {said}")
    else:
        first = next((trial.score for trial in found.trials if trial.trial == 1), None)
        began = "failed" if first is None else f"{first:g}"
        click.echo(f"{output}: score {best.score:g} in trial {best.trial} (the start: {began})")
    for file in result.written:
        if file.suffix == ".png":
            click.echo(f"picture: {file}")
