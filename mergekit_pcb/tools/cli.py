"""The command ``mergekit-pcb``: mergekit's commands with ``pcb`` registered, and its tools."""

from __future__ import annotations

import importlib
import pathlib

import click

import mergekit_pcb
from mergekit_pcb.errors import PCBError, printable
from mergekit_pcb.files import check_folder
from mergekit_pcb.tools.cli_options import (
    HOST_OPTIONS,
    config_argument,
    document_for,
    document_in,
    explained,
    host_options,
    merge_options,
    output_option,
    text_of,
)
from mergekit_pcb.tools.cli_search import search

_PASS_ON = {**HOST_OPTIONS, "help_option_names": []}


#: The commands by what they are for, as the help shows them.
GROUPS = {
    "Around a merge": {
        "check": "find mistakes; say what a merge reads, writes and takes",
        "report": "show who wins what, in tables and figures",
        "measure": "measure ahead of merges with `scope: model`",
        "search": "choose weights by scores of your own",
    },
    "mergekit's commands, where start-up files are not allowed": {
        "yaml": "mergekit-yaml with pcb",
        "multi": "mergekit-multi with pcb",
        "pytorch": "mergekit-pytorch with pcb",
    },
    "To begin with": {
        "demo": "train a small Llama and experts, merge, compare",
        "identity-adapter": "the base that (IA)³ adapters are merged against",
    },
}


class _ByPurpose(click.Group):
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for purpose, commands in GROUPS.items():
            with formatter.section(purpose):
                formatter.write_dl(list(commands.items()))


@click.group(cls=_ByPurpose, context_settings={"help_option_names": ["-h", "--help"]})
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
        add_help_option=False,  # mergekit's own is shown
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
main.add_command(search)


@main.command(context_settings=HOST_OPTIONS)
@config_argument
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@host_options
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

    report = check.check(text_of(config), merge_options(options))
    if as_json:
        click.echo(report.model_dump_json(indent=2))
    else:
        for line in check.sentences(report):
            click.echo(printable(line))
    if report.errors:
        click.get_current_context().exit(1)


@main.command(context_settings=HOST_OPTIONS)
@config_argument
@output_option("The folder to write; it may exist.", folder=True)
@host_options
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
    check_folder(output)
    host, text = merge_options(options), text_of(config)
    document = document_in(text, config)
    with explained(f"merge {config}"):
        found = report.observe(text, document, host)
    rows, remarks = report.summary(found), report.remarks(found)
    files = report.write(found, page.page(found, rows, remarks), output)
    for line in [*report.aligned(rows), *remarks, ", ".join(map(str, files))]:
        click.echo(printable(line))


@main.command(context_settings=HOST_OPTIONS)
@config_argument
@output_option("The document to write.")
@host_options
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

    configuration = document_for(config, output)
    host = merge_options(options)
    with explained(f"measure {config}", "correct it, or the options"):
        plan = planning.plan_without_merging(configuration, host)
        document = whole_model.measure_to_document(Inputs(plan))
    document.write(output)
    click.echo(
        f"{output}: {document.tensors} tensors, {document.elements} elements, "
        f"{document.reads} reads of each checkpoint"
    )


@main.command()
@click.argument("adapter", type=click.Path(exists=True, path_type=pathlib.Path))
@output_option("The safetensors file to write.")
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
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace what an earlier demo left, and nothing else.")
@click.option("--keep", is_flag=True, help="Keep what was made if it is stopped or fails.")
@click.option(
    "--base-steps", type=click.IntRange(1), help="Training steps of the base.  [default: 160]"
)
@click.option(
    "--expert-steps", type=click.IntRange(1), help="Training steps of each expert.  [default: 50]"
)
def demo(
    directory: pathlib.Path,
    seed: int,
    force: bool,
    keep: bool,
    base_steps: int | None,
    expert_steps: int | None,
) -> None:
    """Train a small Llama and three experts, merge them, show what came out.

    Needs no network and no GPU, about 75 seconds on two cores, and writes 40 MB to DIRECTORY,
    which must be new or empty: models, configurations, results.json, and results.png where
    matplotlib is installed.

    Example: mergekit-pcb demo demo
    """
    from mergekit_pcb.tools import demo, demo_page
    from mergekit_pcb.tools.demo_folder import Schedule

    given = {"base_steps": base_steps, "expert_steps": expert_steps}
    schedule = Schedule(**{name: steps for name, steps in given.items() if steps})
    try:
        results = demo.run(directory, schedule, seed, force=force, keep=keep)
        picture = demo_page.draw(results, directory)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PCBError(f"write the demo to {directory}", reason, "name another") from None
    for line in demo_page.page(results, directory, picture):
        click.echo(line)
