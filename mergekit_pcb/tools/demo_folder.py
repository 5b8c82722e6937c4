"""The demo's folder: what lies there, and when it may be written."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import write_text

#: What the base learns, and what each expert does.
GENERAL = "prose"
TASKS = ("c++", "stubs", "metadata")
_PCB = {"weight": 1.0, "density": 0.1, "lambda": 1.0}
REFINED = "pcb, refine: solve"
#: Method and parameters of each merge: those its authors publish, what they leave open at its
#: default.
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {"weight": 1.0}),
    "task_arithmetic": ("task_arithmetic", {"weight": 1.0, "lambda": 0.4}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}),
    "pcb": ("pcb", _PCB),
    REFINED: ("pcb", {**_PCB, "refine": "solve"}),
}
#: Bytes that the models take, with some to spare.
LEAST_DISK = 100 << 20
RESULTS, PICTURE = "results.json", "results.png"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    base_steps: int = 160
    base_rate: float = 3e-3
    expert_steps: int = 50
    expert_rate: float = 2e-3


class Row(BaseModel):
    """The loss of one model: per task, their mean, and on what the base was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["base", "expert", "merge"]
    mean: float
    tasks: dict[str, float]
    general: float
    #: Of the mean's difference to that of ``pcb``: one standard error over held-out texts.
    error: float


class Results(BaseModel):
    """What the demo measured, as ``results.json`` holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str = "loss on held-out text, in nats per token"
    lower_is_better: bool = True
    seed: int
    schedule: Schedule
    rows: list[Row]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def made() -> list[str]:
    """The names of all that a demo leaves in its folder."""
    experts = [folder_of(task) for task in TASKS]
    names = [file_of(merge) for merge in MERGES]
    merges, files = [f"merged-{name}" for name in names], [f"{name}.yml" for name in names]
    return ["base", *experts, *merges, *files, RESULTS, PICTURE]


def folder_of(task: str) -> str:
    return "expert-" + task.replace("+", "p")


def file_of(merge: str) -> str:
    """What the configuration of a merge is called, without its ending."""
    return "refined" if merge == REFINED else merge


def write(directory: pathlib.Path, results: Results) -> None:
    write_text(directory / RESULTS, results.model_dump_json(indent=2) + "\n")


def refuse_unless_ready(directory: pathlib.Path, force: bool) -> None:
    """Raise :class:`PCBError` unless the folder may be written, and there is room for it."""
    what = f"write the demo to {directory}"
    if directory.exists() and not directory.is_dir():
        raise PCBError(what, "it is a file", "name a directory")
    if directory.exists() and any(directory.iterdir()) and not force:
        raise PCBError(
            what,
            "something is there already",
            "name a directory that is new or empty, or let an earlier demo be replaced by --force",
        )
    taken = [name for name in made() if os.path.lexists(directory / name)]
    if taken and not _is_of_a_demo(directory / RESULTS):
        raise PCBError(
            what,
            f"its {taken[0]} is not an earlier demo's, which says so in {RESULTS}",
            "name another directory",
        )
    if mark := next((mark for mark in "@+" if mark in str(directory.resolve())), None):
        raise PCBError(
            what,
            f"mergekit takes what follows {mark} in the path of a model for no part of the path",
            "name a directory without it",
        )
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise PCBError(what, f"{there} may not be written", "name another directory")
    free = shutil.disk_usage(there).free
    if free < LEAST_DISK:
        raise PCBError(
            what,
            f"it takes {LEAST_DISK >> 20} MB, and {free >> 20} MB are free below {there}",
            "make room, or name another directory",
        )


def _is_of_a_demo(file: pathlib.Path) -> bool:
    try:
        Results.model_validate_json(file.read_bytes())
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def removed_on_failure(directory: pathlib.Path, keep: bool) -> Iterator[None]:
    """What a demo made, if it is stopped or fails, unless it is to be kept."""
    was_there = directory.exists()
    try:
        yield
    except BaseException as error:
        if not keep:
            for name in made():
                remove(directory / name)
            if not was_there and directory.exists() and not any(directory.iterdir()):
                directory.rmdir()
        if isinstance(error, KeyboardInterrupt):
            left = f"{directory} keeps what was made" if keep else "what was made is removed"
            raise PCBError(
                "finish the demo", f"it was interrupted; {left}", "run it again"
            ) from None
        raise


def remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
