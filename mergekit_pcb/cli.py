"""The command ``mergekit-pcb``: mergekit's own commands with ``pcb`` registered, and a demo."""

from __future__ import annotations

import importlib
import pathlib

import click

import mergekit_pcb

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
