"""The document that `mergekit-pcb measure` leaves: statistics of a whole model, as plain JSON.

It is validated, never executed, and says enough about what was measured that a merge it does
not fit can refuse it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, ValidationError

from mergekit_pcb.balance import Balance
from mergekit_pcb.errors import PCBError
from mergekit_pcb.statistics import Recipe, Statistics

# A file's fingerprint is its size and the digest of so many evenly spaced blocks: all of a
# small file, 16 MiB of a large one. Reading more would cost what reusing statistics saves.
BLOCKS = 4096
BLOCK_BYTES = 4096


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Checkpoint(_Strict):
    """A model as the configuration names it, and the fingerprint of each of its files."""

    model: str
    files: dict[str, str]


class Task(Checkpoint):
    """A task's part of the recipe and the four numbers measured for it."""

    density: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    threshold: FiniteFloat
    peak: FiniteFloat


class Document(_Strict):
    """Everything that determines the statistics, and the statistics."""

    format: Literal["mergekit-pcb statistics, version 1"]
    versions: dict[str, str]
    clip: FiniteFloat
    arithmetic: Literal["float32", "float64"]
    #: The dtype that inputs were cast to before measuring, if any.
    dtype: str | None
    base: Checkpoint
    tasks: list[Task]
    tensors: NonNegativeInt
    elements: NonNegativeInt
    #: How often each checkpoint was read for this.
    walks: NonNegativeInt
    #: Digest of the names and sizes of the tensors, and of where in each input they come from.
    layout: str
    #: Digest of everything above.
    checksum: str

    def statistics(self) -> Statistics:
        balances = [Balance(t.low, t.high, t.threshold, t.peak) for t in self.tasks]
        return Statistics(tuple(balances), getattr(torch, self.arithmetic), len(balances))

    def recipe(self) -> Recipe:
        return Recipe(tuple(task.density for task in self.tasks), self.clip)

    def write(self, path: pathlib.Path) -> None:
        """Write all of the document or none of it."""
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            unfinished.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def compose(
    statistics: Statistics,
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    *,
    dtype: torch.dtype | None,
    tensors: int,
    elements: int,
    walks: int,
    layout: str,
) -> Document:
    """Compose the document of what was measured; ``checkpoints`` begins with the base."""
    base, *tasks = checkpoints
    document = Document(
        format="mergekit-pcb statistics, version 1",
        versions=_versions(),
        clip=recipe.clip,
        arithmetic="float64" if statistics.dtype == torch.float64 else "float32",
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        base=base,
        tasks=[
            Task(
                **task.model_dump(),
                density=density,
                low=balance.low,
                high=balance.high,
                threshold=balance.threshold,
                peak=balance.peak,
            )
            for task, density, balance in zip(
                tasks, recipe.densities, statistics.balances, strict=True
            )
        ],
        tensors=tensors,
        elements=elements,
        walks=walks,
        layout=layout,
        checksum="",
    )
    return document.model_copy(update={"checksum": _checksum(document)})


def read(path: pathlib.Path) -> Document:
    """Read a document; refuses one that is missing, damaged or edited by hand."""
    remedy = "measure again with `mergekit-pcb measure`"
    try:
        document = Document.model_validate_json(path.read_bytes())
    except OSError as error:
        reason = f"it cannot be read ({error.strerror})"
        raise PCBError(f"use statistics {path}", reason, remedy) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise PCBError(
            f"use statistics {path}", f"it is damaged ({where}: {first['msg']})", remedy
        ) from None
    if document.checksum != _checksum(document):
        reason = "it was changed after it was measured (its checksum does not fit)"
        raise PCBError(f"use statistics {path}", reason, remedy)
    return document


def differences(measured: Document, wanted: Document) -> str | None:
    """Say what keeps measured statistics from fitting a merge; ``None`` if nothing does.

    Of ``wanted`` only what determines statistics is looked at. Models are compared by their
    files, so a folder may move.
    """
    pairs = list(zip(measured.tasks, wanted.tasks, strict=False))
    if len(measured.tasks) != len(wanted.tasks):
        return f"it holds {len(measured.tasks)} tasks and the merge has {len(wanted.tasks)}"
    if measured.clip != wanted.clip:
        return f"it was measured with clip {measured.clip} and the merge asks for {wanted.clip}"
    for ours, theirs in pairs:
        if ours.density != theirs.density:
            return (
                f"it was measured with density {ours.density} for {ours.model} and the merge "
                f"asks for {theirs.density}"
            )
    if measured.dtype != wanted.dtype:
        return f"it was measured in dtype {measured.dtype} and the merge casts to {wanted.dtype}"
    measured_files = [_ordered(task.files) for task in measured.tasks]
    wanted_files = [_ordered(task.files) for task in wanted.tasks]
    if measured_files != wanted_files and sorted(measured_files) == sorted(wanted_files):
        return "it lists the models in another order"
    for ours_, theirs_ in ((measured.base, wanted.base), *pairs):
        if ours_.files != theirs_.files:
            return f"the files of {theirs_.model} are not those measured as {ours_.model}"
    if measured.layout != wanted.layout:
        return "the merge puts other tensors together (slices, vocabulary or names differ)"
    return None


def fingerprint(file: pathlib.Path) -> str:
    """Size and digest of evenly spaced blocks of a file."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    step = max(BLOCK_BYTES, size // BLOCKS // BLOCK_BYTES * BLOCK_BYTES)
    with file.open("rb") as handle:
        for start in range(0, size, step):
            handle.seek(start)
            digest.update(handle.read(BLOCK_BYTES))
    return f"{size}:{digest.hexdigest()}"


def digest_of(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _ordered(files: dict[str, str]) -> list[tuple[str, str]]:
    return sorted(files.items())


def _checksum(document: Document) -> str:
    content = document.model_dump(exclude={"checksum"})
    return digest_of([json.dumps(content, sort_keys=True)])


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("mergekit-pcb", "mergekit", "torch")}
