"""What the commands have in common: arguments, mergekit's own options, and what goes wrong."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import click
import yaml

from mergekit_pcb.errors import PCBError, is_hosts, one_line
from mergekit_pcb.files import check_target

# mergekit's own options pass through a command's, to be read by merge_options.
HOST_OPTIONS = {"ignore_unknown_options": True}


class _Configuration(click.Path):
    """A file that is there; an option of mergekit's before it is told."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if str(value).startswith("-"):
            self.fail(f"write the file before mergekit's options, {value} among them", param, ctx)
        return super().convert(value, param, ctx)


config_argument = click.argument(
    "config", type=_Configuration(exists=True, dir_okay=False, path_type=pathlib.Path)
)
host_options = click.argument("options", nargs=-1, type=click.UNPROCESSED)


def output_option(what: str, *, folder: bool = False) -> Callable[[Any], Any]:
    kind = click.Path(dir_okay=folder, file_okay=not folder, path_type=pathlib.Path)
    return click.option("-o", "--output", type=kind, required=True, help=what)


@contextlib.contextmanager
def explained(what: str, remedy: str = "see `mergekit-pcb check`") -> Iterator[None]:
    """Turn what mergekit, pydantic and the Hub's client say of a configuration into a sentence."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        if not is_hosts(error):
            raise
        raise PCBError(what, one_line(error), remedy) from None


def document_for(config: pathlib.Path, output: pathlib.Path) -> Any:
    """What a configuration says, if the output may be written beside it."""
    from mergekit_pcb.host.configuration import refuse_to_overwrite

    check_target(output)
    document = document_in(text_of(config), config)
    refuse_to_overwrite(output, config, document)
    return document


def document_in(text: str, config: pathlib.Path) -> Any:
    """What the text of a configuration says; one of several stages is refused."""
    try:
        documents = list(yaml.safe_load_all(text))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        why = f"it is not YAML ({one_line(error)})"
        raise PCBError(f"read {config}", why, "correct it") from None
    if len(documents) > 1:
        what, remedy = f"take {config} for one merge", "name a file that holds one of them"
        if None in documents:
            raise PCBError(what, "a document in it is empty", "remove a `---`")
        why = f"it holds {len(documents)} stages, as mergekit-multi reads them"
        raise PCBError(what, why, remedy)
    return documents[0] if documents else None


def text_of(config: pathlib.Path) -> str:
    try:
        return config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PCBError(f"read {config}", one_line(error), "name a YAML file in UTF-8") from None


def merge_options(arguments: tuple[str, ...]) -> Any:
    """Read options of mergekit, and the two that mergekit-pytorch has beside them."""
    from mergekit.options import add_merge_options

    from mergekit_pcb.host.plan import PlanOptions

    @click.command()
    @click.option("--tensor-intersection", "-i", is_flag=True)
    @click.option("--tensor-union", "-u", is_flag=True)
    @add_merge_options  # type: ignore[untyped-decorator]
    def parse(merge_options: Any, **raw: bool) -> Any:
        merge_options.apply_global_options()
        return PlanOptions.of(merge_options, **raw)

    name = click.get_current_context().command_path
    with explained("take mergekit's options", "correct them"):
        return parse.main(list(arguments), prog_name=name, standalone_mode=False)
