"""The file that `mergekit-pcb measure` leaves: statistics of a whole model, as plain JSON.

It is validated, never executed, and says enough about what was measured that a merge it does
not fit can refuse it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, ValidationError

from mergekit_pcb.core.dare import GENERATOR, Dare
from mergekit_pcb.core.formulas import Balance
from mergekit_pcb.core.measure import Recipe, Statistics
from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import write_text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class File(_Strict):
    """What a file was when it was measured."""

    size: NonNegativeInt
    #: What the system knows it by; a file of which all of it is the same is not read again to
    #: compare. Times alone would not do: archives and stores give all files the same.
    inode: int
    modified_ns: int
    changed_ns: int
    #: Digest of all of its contents.
    digest: str

    @classmethod
    def of(cls, path: pathlib.Path) -> File:
        return cls(**mark(path), digest=digest(path))

    def is_still(self, path: pathlib.Path) -> bool:
        found = mark(path)
        if found["size"] != self.size:
            return False
        return found == self.model_dump(exclude={"digest"}) or digest(path) == self.digest


class Checkpoint(_Strict):
    """A model as the configuration names it, and the files that were read of it."""

    model: str
    files: dict[str, File]

    @classmethod
    def of(cls, model: str, files: Sequence[pathlib.Path]) -> Checkpoint:
        with ThreadPoolExecutor() as pool:  # hashlib lets other threads run meanwhile
            marks = list(pool.map(File.of, files))
        return cls(model=model, files=dict(zip(_names(files), marks, strict=True)))

    def is_still(self, files: Sequence[pathlib.Path]) -> bool:
        names = _names(files)
        if set(names) != set(self.files):
            return False
        with ThreadPoolExecutor() as pool:
            return all(pool.map(lambda n, path: self.files[n].is_still(path), names, files))


class Task(Checkpoint):
    """A task's part of the recipe and the four numbers measured for it."""

    density: FiniteFloat
    dare_density: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    threshold: FiniteFloat
    peak: FiniteFloat


class Document(_Strict):
    """Everything that determines the statistics, and the statistics."""

    format: Literal["mergekit-pcb statistics, version 7"]
    versions: dict[str, str]
    clip: FiniteFloat
    #: Which elements DARE kept, and by which generator; null where it was off for all tasks.
    seed: int | None
    generator: Literal["Philox4x64-10 keyed by BLAKE2b"] | None
    arithmetic: Literal["float32", "float64"]
    #: The dtype that inputs were cast to before measuring, if any.
    dtype: str | None
    base: Checkpoint
    tasks: list[Task]
    #: A further model that gave the tokenizer, if one did.
    tokenizer: Checkpoint | None
    tensors: NonNegativeInt
    elements: NonNegativeInt
    #: How often each checkpoint was read for this.
    reads: NonNegativeInt
    #: Digest of the names and sizes of the tensors, and of where in each input they come from.
    layout: str
    #: Digest of everything above.
    checksum: str

    def statistics(self) -> Statistics:
        balances = [Balance(t.low, t.high, t.threshold, t.peak) for t in self.tasks]
        dtype = getattr(torch, self.arithmetic)
        return Statistics(tuple(balances), self.recipe().dare, dtype, len(balances))

    def recipe(self) -> Recipe:
        return Recipe.of(
            [task.density for task in self.tasks],
            self.clip,
            [task.dare_density for task in self.tasks],
            self.seed or 0,
            range(len(self.tasks)),
        )

    def write(self, path: pathlib.Path) -> None:
        """Write all of the document or none of it."""
        try:
            write_text(path, self.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise PCBError(f"write {path}", str(error.strerror), "name another file") from None


@dataclass(frozen=True)
class Wanted:
    """What determines the statistics of a merge; models and their files begin with the base."""

    recipe: Recipe
    dtype: torch.dtype | None
    layout: str
    models: Sequence[tuple[str, Sequence[pathlib.Path]]]
    #: A model that gives the tokenizer alone.
    tokenizer: tuple[str, Sequence[pathlib.Path]] | None = None

    def marks(self) -> dict[pathlib.Path, dict[str, int]]:
        """What every file is known by now."""
        models = [*self.models, *([self.tokenizer] if self.tokenizer else [])]
        return {path: mark(path) for _, files in models for path in files}


def compose(
    statistics: Statistics, wanted: Wanted, *, tensors: int, elements: int, reads: int
) -> Document:
    """Compose the document of what was measured."""
    base, *tasks = [Checkpoint.of(model, files) for model, files in wanted.models]
    recipe = wanted.recipe
    seeds = [mask.seed for mask in recipe.dare if mask is not None]
    document = Document(
        format="mergekit-pcb statistics, version 7",
        versions=_versions(),
        clip=recipe.clip,
        seed=seeds[0] if seeds else None,
        generator=GENERATOR if seeds else None,
        arithmetic="float64" if statistics.dtype == torch.float64 else "float32",
        dtype=_name(wanted.dtype),
        base=base,
        tasks=[
            Task(
                **dict(task),
                density=density,
                dare_density=mask.density if mask is not None else 1.0,
                **dataclasses.asdict(balance),
            )
            for task, density, mask, balance in zip(
                tasks, recipe.densities, recipe.dare, statistics.balances, strict=True
            )
        ],
        tokenizer=Checkpoint.of(*wanted.tokenizer) if wanted.tokenizer else None,
        tensors=tensors,
        elements=elements,
        reads=reads,
        layout=wanted.layout,
        checksum="",
    )
    return document.model_copy(update={"checksum": _checksum(document)})


def read(path: pathlib.Path) -> Document:
    """Read a document; refuses one that is missing, damaged or edited by hand."""
    remedy = "measure again with `mergekit-pcb measure`"
    try:
        ordinary = path.is_file() or not path.exists()
        text = path.read_bytes() if ordinary else b""
    except (OSError, ValueError) as error:  # a zero byte in its name is no OSError
        reason = f"it cannot be read ({getattr(error, 'strerror', error)})"
        raise PCBError(f"use statistics {path}", reason, remedy) from None
    if not ordinary:
        raise PCBError(f"use statistics {path}", "it is no ordinary file", remedy)
    try:
        document = Document.model_validate_json(text)
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


def difference(measured: Document, wanted: Wanted) -> str | None:
    """Say what keeps measured statistics from fitting a merge; ``None`` if nothing does.

    Models are compared by their files, so a folder may move.
    """
    (base, base_files), *tasks = wanted.models
    if len(measured.tasks) != len(tasks):
        return f"it holds {len(measured.tasks)} tasks and the merge has {len(tasks)}"
    if measured.clip != wanted.recipe.clip:
        asked = wanted.recipe.clip
        return f"it was measured with clip {measured.clip} and the merge asks for {asked}"
    for task, density in zip(measured.tasks, wanted.recipe.densities, strict=True):
        if task.density != density:
            return (
                f"it was measured with density {task.density} for {task.model} and the merge "
                f"asks for {density}"
            )
    for task, then, now in zip(
        measured.tasks, measured.recipe().dare, wanted.recipe.dare, strict=True
    ):
        if then != now:
            return (
                f"it was measured with {_described(then)} for {task.model} and the merge asks for "
                f"{_described(now)}"
            )
    if measured.dtype != (asked_dtype := _name(wanted.dtype)):
        return f"it was measured in dtype {measured.dtype} and the merge casts to {asked_dtype}"
    if not measured.base.is_still(base_files):
        return f"the files of {base} are not those measured as {measured.base.model}"
    for task, (model, files) in zip(measured.tasks, tasks, strict=True):
        if not task.is_still(files):
            if any(other.is_still(files) for other in measured.tasks):
                return "it lists the models in another order"
            return f"the files of {model} are not those measured as {task.model}"
    if wanted.tokenizer is not None and (
        measured.tokenizer is None or not measured.tokenizer.is_still(wanted.tokenizer[1])
    ):
        return f"the tokenizer of {wanted.tokenizer[0]} is not the one that it was measured with"
    if measured.layout != wanted.layout:
        return "the merge puts other tensors together (slices, vocabulary or names differ)"
    return None


def _names(files: Sequence[pathlib.Path]) -> list[str]:
    """What files are called within the folder that holds them all."""
    folder = os.path.commonpath([path.parent for path in files]) if files else ""
    return [str(path.relative_to(folder)) for path in files]


def digest_of(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def mark(path: pathlib.Path) -> dict[str, int]:
    """What the system knows a file by; all of it stays as long as nobody writes to it."""
    status = path.stat()
    return {
        "size": status.st_size,
        "inode": status.st_ino,
        "modified_ns": status.st_mtime_ns,
        "changed_ns": status.st_ctime_ns,
    }


def digest(path: pathlib.Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def _described(mask: Dare | None) -> str:
    return "no DARE" if mask is None else f"dare_density {mask.density}, seed {mask.seed}"


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _checksum(document: Document) -> str:
    content = document.model_dump(exclude={"checksum"})
    return digest_of([json.dumps(content, sort_keys=True)])


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("mergekit-pcb", "mergekit", "torch")}
