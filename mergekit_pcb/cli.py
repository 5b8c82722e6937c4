"""The command ``mergekit-pcb``: mergekit's commands with ``pcb`` registered, and its tools."""

from __future__ import annotations

import importlib
import os
import pathlib
from typing import Any

import click

import mergekit_pcb
from mergekit_pcb.errors import PCBError

_PASS_ON = {"ignore_unknown_options": True, "help_option_names": []}


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
        mergekit_pcb.register()
        command: click.Command = importlib.import_module(module).main
        command.main(list(arguments), prog_name=f"mergekit-pcb {name}")


_host_command("yaml", "mergekit.scripts.run_yaml")
_host_command("multi", "mergekit.scripts.multimerge")
_host_command("pytorch", "mergekit.scripts.merge_raw_pytorch")


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path))
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def check(config: pathlib.Path, as_json: bool, options: tuple[str, ...]) -> None:
    """Look for mistakes in a configuration and say what the merge would do.

    Finds unknown and misplaced parameters, values out of range, inputs that are missing or of
    different shapes, and settings that lose precision; reads shapes and dtypes, not values.
    CONFIG is for mergekit-yaml, mergekit-pytorch or mergekit-multi; OPTIONS are mergekit's own.
    Exits with 1 if there are errors; warnings alone exit with 0.

    Example: mergekit-pcb check pcb.yml
    """
    mergekit_pcb.register()
    from mergekit_pcb import check

    report = check.check(_text_of(config), _merge_options(options))
    if as_json:
        click.echo(report.model_dump_json(indent=2))
    else:
        for line in check.sentences(report):
            click.echo(line)
    if report.errors:
        raise SystemExit(1)


def _text_of(config: pathlib.Path) -> str:
    try:
        return config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise PCBError(f"read {config}", reason, "name a YAML file in UTF-8") from None


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    required=True,
    help="The document to write.",
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def measure(config: pathlib.Path, output: pathlib.Path, options: tuple[str, ...]) -> None:
    """Measure the statistics that a merge with `scope: model` needs, without merging.

    CONFIG is a configuration for mergekit-yaml or mergekit-pytorch. With `statistics: FILE` in
    it, merges take the measured document instead of walking over the checkpoints again, so
    lambda and weight can be swept cheaply. OPTIONS are mergekit's own, such as --cuda,
    --lora-merge-cache DIR or --quiet.

    Example: mergekit-pcb measure pcb.yml -o statistics.json
    """
    mergekit_pcb.register()
    import torch
    import yaml

    from mergekit_pcb import checkpoints, whole_model

    target = output.resolve()
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise PCBError(
            f"write {output}", f"{target.parent} is no folder to write to", "name another file"
        )
    if target.exists() and not target.is_file():
        raise PCBError(f"write {output}", "it is no ordinary file", "name another")
    merge_options = _merge_options(options)
    try:
        device = torch.device(merge_options.device)
        plan = checkpoints.plan_without_merging(config.read_text(encoding="utf-8"), merge_options)
    except click.ClickException:
        raise
    except (OSError, RuntimeError, ValueError, yaml.YAMLError) as error:
        # What mergekit, pydantic and the Hub's client say of a configuration they cannot use.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PCBError(f"measure {config}", reason, "correct it, or the options") from None
    document = whole_model.measure_to_document(plan, device, quiet=merge_options.quiet)
    try:
        document.write(output)
    except OSError as error:
        raise PCBError(f"write {output}", str(error.strerror), "name another file") from None
    click.echo(
        f"{output}: {document.tensors} tensors, {document.elements} elements, "
        f"{document.walks} reads of each checkpoint"
    )


def _merge_options(arguments: tuple[str, ...]) -> Any:
    from mergekit.options import add_merge_options

    @click.command("mergekit-pcb measure")
    @add_merge_options  # type: ignore[untyped-decorator]
    def parse(merge_options: Any) -> Any:
        merge_options.apply_global_options()
        return merge_options

    return parse.main(list(arguments), standalone_mode=False)


@main.command()
@click.argument("adapter", type=click.Path(exists=True, path_type=pathlib.Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    required=True,
    help="The safetensors file to write.",
)
def identity_adapter(adapter: pathlib.Path, output: pathlib.Path) -> None:
    """Write the (IA)³ adapter that changes nothing, to merge others against.

    ADAPTER is the folder or the file of weights of any adapter to be merged; the identity
    has the same tensors, all ones. It is the `base_model` of a merge of adapter files with
    mergekit-pytorch.

    Example: mergekit-pcb identity-adapter adapters/a -o identity.safetensors
    """
    from mergekit_pcb import adapters

    if output.suffix != ".safetensors":
        raise PCBError(
            f"write {output}",
            "mergekit-pytorch tells safetensors files by their name",
            "let it end in .safetensors",
        )
    if output.exists() and output.resolve().parent == _folder(adapter):
        raise PCBError(f"write {output}", "it may be the adapter itself", "name another file")
    state = adapters.identity(adapter)
    adapters.write(state, output)
    click.echo(f"{output}: {len(state)} tensors, all ones")


def _folder(path: pathlib.Path) -> pathlib.Path:
    return path.resolve() if path.is_dir() else path.resolve().parent


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
    from mergekit_pcb import demo

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
