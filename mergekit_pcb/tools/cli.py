"""The command ``mergekit-pcb``: mergekit's commands with ``pcb`` registered, and its tools."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import click
import yaml

import mergekit_pcb
from mergekit_pcb.errors import HOST_ERRORS, PCBError, one_line, printable
from mergekit_pcb.files import check_target

# mergekit's own options pass through a command's, to be read by _merge_options.
_HOST_OPTIONS = {"ignore_unknown_options": True}
_PASS_ON = {**_HOST_OPTIONS, "help_option_names": []}
_config = click.argument(
    "config", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path)
)
_host_options = click.argument("options", nargs=-1, type=click.UNPROCESSED)


def _output(what: str, *, folder: bool = False) -> Callable[[Any], Any]:
    kind = click.Path(dir_okay=folder, file_okay=not folder, path_type=pathlib.Path)
    return click.option("-o", "--output", type=kind, required=True, help=what)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mergekit_pcb.__version__, prog_name="mergekit-pcb")
def main() -> None:
    """PCB-Merging for mergekit.

    After installation `merge_method: pcb` works in mergekit's own commands; `yaml`, `multi`
    and `pytorch` run the same commands where start-up files are not allowed to.
    """


def _host_command(name: str, module: str) -> None:
    @main.command(
        name,
        context_settings=_PASS_ON,
        add_help_option=False,
        help=f"mergekit-{name} with pcb registered; takes the same arguments.\n\n"
        f"Example: mergekit-pcb {name} pcb.yml merged",
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def run(arguments: tuple[str, ...]) -> None:
        mergekit_pcb.register(replace=True)
        command: click.Command = importlib.import_module(module).main
        status = command.main(
            list(arguments), prog_name=f"mergekit-pcb {name}", standalone_mode=False
        )
        click.get_current_context().exit(status or 0)


_host_command("yaml", "mergekit.scripts.run_yaml")
_host_command("multi", "mergekit.scripts.multimerge")
_host_command("pytorch", "mergekit.scripts.merge_raw_pytorch")


@main.command(context_settings=_HOST_OPTIONS)
@_config
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@_host_options
def check(config: pathlib.Path, as_json: bool, options: tuple[str, ...]) -> None:
    """Look for mistakes in a configuration and say what the merge would do.

    Finds unknown and misplaced parameters, values out of range, inputs that are missing or of
    different shapes, settings that lose precision, and a base that the models were not trained
    from; reads shapes and dtypes, and the values of a few tensors.
    CONFIG is for mergekit-yaml, mergekit-pytorch or mergekit-multi; OPTIONS are mergekit's own.
    Exits with 1 if there are errors; warnings alone exit with 0.

    Example: mergekit-pcb check pcb.yml
    """
    mergekit_pcb.register()
    from mergekit_pcb.tools import check

    report = check.check(_text_of(config), _merge_options(options))
    if as_json:
        click.echo(report.model_dump_json(indent=2))
    else:
        for line in check.sentences(report):
            click.echo(printable(line))
    if report.errors:
        click.get_current_context().exit(1)


@main.command(context_settings=_HOST_OPTIONS)
@_config
@_output("The folder to write; it may exist.", folder=True)
@_host_options
def report(config: pathlib.Path, output: pathlib.Path, options: tuple[str, ...]) -> None:
    """Show what the competition of a merge looks like, without merging to disk.

    Per layer, kind of tensor and task: what is kept, who keeps the same elements, where signs
    conflict before and after, and how much of the merge is whose. Prints a table and writes
    report.html (one file that needs no network), report.json and tensors.csv. CONFIG is for
    mergekit-yaml or mergekit-pytorch; OPTIONS are mergekit's own, such as --cuda.

    Example: mergekit-pcb report pcb.yml -o report
    """
    mergekit_pcb.register()
    from mergekit_pcb.tools import figures, page, report

    figures.require_matplotlib()
    merge_options = _merge_options(options)
    with _explained(f"merge {config}"):
        found = report.observe(_text_of(config), merge_options)
    rows, remarks = report.summary(found), report.remarks(found)
    files = report.write(found, page.page(found, rows, remarks), output)
    for line in [*report.aligned(rows), *remarks, ", ".join(map(str, files))]:
        click.echo(printable(line))


@contextlib.contextmanager
def _explained(what: str, remedy: str = "see `mergekit-pcb check`") -> Iterator[None]:
    """Turn what mergekit, pydantic and the Hub's client say of a configuration into a sentence."""
    try:
        yield
    except click.ClickException:
        raise
    except (*HOST_ERRORS, yaml.YAMLError) as error:
        raise PCBError(what, one_line(error), remedy) from None


@main.command(context_settings=_HOST_OPTIONS)
@_config
@click.option(
    "--evaluate",
    "command",
    required=True,
    metavar="COMMAND",
    help="Shell command; {model} is the folder to score, the last number it prints the score.",
)
@click.option("--budget", type=click.IntRange(1), default=100, show_default=True, help="Trials.")
@_output("Where the best configuration goes.")
@click.option(
    "--search",
    "searched",
    multiple=True,
    type=click.Choice(["weight", "lambda", "density"]),
    default=("weight",),
    help="What to search; may be given several times. Default: weight.",
)
@click.option("--bounds", type=float, nargs=2, default=(0.5, 3.0), help="Of weights: 0.5 3.0.")
@click.option("--minimize", is_flag=True, help="Lower scores are better.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    help="Seconds after which an evaluation has failed.",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="Folder for log and trials. Default: the output's name with .search.",
)
@click.option("--resume", is_flag=True, help="Continue a search that was stopped.")
@_host_options
def search(
    config: pathlib.Path,
    command: str,
    budget: int,
    output: pathlib.Path,
    searched: tuple[str, ...],
    bounds: tuple[float, float],
    minimize: bool,
    seed: int,
    timeout: float | None,
    work: pathlib.Path | None,
    resume: bool,
    options: tuple[str, ...],
) -> None:
    """Search per-task weights by CMA-ES, the paper's evolution strategy.

    CONFIG is for mergekit-yaml or mergekit-pytorch and where the search starts. Each trial's
    model is scored by COMMAND; use validation data, never the test set. Trials are logged
    as JSON lines, --resume continues a search that was stopped, and stock mergekit runs the best
    configuration. Searching density merges anew for each trial; weights and lambda do not.
    A trial is one weighted sum and, under `refine: solve` or `spectrum`, one decomposition per
    matrix. Needs (n + 2) float32 copies of the model on disk for n tasks. OPTIONS are mergekit's.

    Example: mergekit-pcb search pcb.yml --evaluate 'python score.py {model}' -o best.yml
    """
    mergekit_pcb.register()
    from mergekit_pcb.tools import search_files, search_job

    document = _document_for(config, output)
    job = search_job.Job(
        document if isinstance(document, dict) else {},
        command,
        output,
        work or output.with_suffix(".search"),
        tuple(dict.fromkeys(searched)),
        bounds,
        budget,
        seed,
        minimize,
        timeout,
    )
    job.check()
    merge_options = _merge_options(options)
    with _explained(f"merge {config}"):
        found = search_files.run(job, merge_options, resume=resume)
    best = found.best
    if best is None:
        raise PCBError(
            "find a best configuration",
            f"all {len(found.trials)} trials failed, the last because {found.trials[-1].error}",
            f"try the command by hand (the log is {job.log})",
        )
    first = found.trials[0].score
    began = "failed" if first is None else f"{first:g}"
    click.echo(f"{output}: score {best.score:g} in trial {best.trial} (the start: {began})")


def _document_for(config: pathlib.Path, output: pathlib.Path) -> Any:
    """What a configuration says, once it is sure that the output may be written beside it."""
    from mergekit_pcb.host import planning

    check_target(output)
    try:
        document = yaml.safe_load(_text_of(config))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        why = f"it is not YAML ({one_line(error)})"
        raise PCBError(f"read {config}", why, "correct it") from None
    planning.refuse_to_overwrite(output, config, document)
    return document


def _text_of(config: pathlib.Path) -> str:
    try:
        return config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PCBError(f"read {config}", one_line(error), "name a YAML file in UTF-8") from None


@main.command(context_settings=_HOST_OPTIONS)
@_config
@_output("The document to write.")
@_host_options
def measure(config: pathlib.Path, output: pathlib.Path, options: tuple[str, ...]) -> None:
    """Measure the statistics that a merge with `scope: model` needs, without merging.

    CONFIG is a configuration for mergekit-yaml or mergekit-pytorch. With `statistics: FILE` in
    it, merges take the measured document instead of reading the checkpoints twice more, so
    lambda and weight can be swept cheaply. OPTIONS are mergekit's own, such as --cuda,
    --lora-merge-cache DIR or --quiet.

    Example: mergekit-pcb measure pcb.yml -o statistics.json
    """
    mergekit_pcb.register()
    from mergekit_pcb.host import planning, whole_model
    from mergekit_pcb.host.inputs import Inputs

    _document_for(config, output)
    merge_options = _merge_options(options)
    with _explained(f"measure {config}", "correct it, or the options"):
        plan = planning.plan_without_merging(_text_of(config), merge_options)
        document = whole_model.measure_to_document(Inputs(plan))
    document.write(output)
    click.echo(
        f"{output}: {document.tensors} tensors, {document.elements} elements, "
        f"{document.reads} reads of each checkpoint"
    )


def _merge_options(arguments: tuple[str, ...]) -> Any:
    from mergekit.options import add_merge_options

    @click.command()
    @add_merge_options  # type: ignore[untyped-decorator]
    def parse(merge_options: Any) -> Any:
        merge_options.apply_global_options()
        return merge_options

    name = click.get_current_context().command_path
    return parse.main(list(arguments), prog_name=name, standalone_mode=False)


@main.command()
@click.argument("adapter", type=click.Path(exists=True, path_type=pathlib.Path))
@_output("The safetensors file to write.")
def identity_adapter(adapter: pathlib.Path, output: pathlib.Path) -> None:
    """Write the (IA)³ adapter that changes nothing, to merge others against.

    ADAPTER is the folder or the file of weights of any adapter to be merged; the identity
    has the same tensors, all ones. It is the `base_model` of a merge of adapter files with
    mergekit-pytorch.

    Example: mergekit-pcb identity-adapter adapters/a -o identity.safetensors
    """
    from mergekit_pcb.tools import adapters

    state = adapters.write_identity(adapter, output)
    click.echo(f"{output}: {len(state)} tensors, all ones")


@main.command()
@click.argument("directory", type=click.Path(path_type=pathlib.Path))
@click.option("--base-steps", type=click.IntRange(1), help="Training steps of the base model.")
@click.option("--expert-steps", type=click.IntRange(1), help="Training steps of each expert.")
def demo(directory: pathlib.Path, base_steps: int | None, expert_steps: int | None) -> None:
    """Train a small Llama and three experts, merge them, print what came out.

    Needs no network and no GPU, about two minutes on two cores, and writes 30 MB to
    DIRECTORY, which must be new or empty.

    Example: mergekit-pcb demo demo
    """
    from mergekit_pcb.tools import demo

    given = {"base_steps": base_steps, "expert_steps": expert_steps}
    schedule = demo.Schedule(**{name: steps for name, steps in given.items() if steps})
    try:
        rows = demo.run(directory, schedule)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PCBError(f"write the demo to {directory}", reason, "name another") from None
    click.echo(demo.table(rows))
    click.echo("* lowest of its column. Measured just now; a demonstration, not a benchmark.")
    click.echo(
        f"The merged checkpoint is {directory / 'merged-pcb'}, made from {directory / 'pcb.yml'}."
    )
