"""What the competition of a merge looked like: counted tensor by tensor, written as a page.

Nothing is merged to disk. Every tensor is measured and taken apart as the merge would, chunk by
chunk; what is kept of it are a few numbers. Counts, sums and norms here, pictures in
``figures.py``.
"""

from __future__ import annotations

import csv
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel
from tqdm import tqdm

import mergekit_pcb
from mergekit_pcb import checkpoints, merging
from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import write_text, written_whole
from mergekit_pcb.method import observed
from mergekit_pcb.statistics import Statistics
from mergekit_pcb.task_vectors import Aligned, Scratch

#: The row of tensors that belong to no layer.
NO_LAYER = "other"


class _Counts(BaseModel):
    """Numbers that can be added up."""

    def add_numbers(self, other: _Counts) -> None:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, (int, float)):
                setattr(self, name, value + getattr(other, name))


class TaskCounts(_Counts):
    """One task in one tensor (or in several, added up)."""

    #: Elements that the task changed, and those that keep a weight above zero.
    changed: int = 0
    kept: int = 0
    #: Squared Euclidean norms of its task vector (after DARE) and of what is merged of it.
    task_vector_sq: float = 0.0
    merged_sq: float = 0.0
    #: Sum of the magnitudes that are merged of it, weight and lambda included.
    merged_abs: float = 0.0


class TensorCounts(_Counts):
    """One tensor, or several added up."""

    elements: int = 0
    tensors: int = 1
    unchanged: int = 0
    #: Elements that two tasks or more change, and keep, and those of them with both signs.
    met_before: int = 0
    conflicts_before: int = 0
    met_after: int = 0
    conflicts_after: int = 0
    base_sq: float = 0.0
    merged_sq: float = 0.0
    #: Elements kept by so many tasks: none, one, two, …
    kept_by: list[int] = []
    #: Elements kept by both of two tasks.
    both: list[list[int]] = []
    tasks: list[TaskCounts] = []

    def add(self, other: TensorCounts) -> None:
        self.add_numbers(other)
        self.kept_by = [a + b for a, b in zip(self.kept_by, other.kept_by, strict=True)]
        self.both = [
            [a + b for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(self.both, other.both, strict=True)
        ]
        for mine, theirs in zip(self.tasks, other.tasks, strict=True):
            mine.add_numbers(theirs)

    @classmethod
    def empty(cls, tasks: int) -> TensorCounts:
        return cls(
            tensors=0,
            kept_by=[0] * (tasks + 1),
            both=[[0] * tasks for _ in range(tasks)],
            tasks=[TaskCounts() for _ in range(tasks)],
        )

    def share(self, task: int) -> float:
        """The effective share of a task in the merge, from 0 to 1: its part of the magnitudes."""
        total = sum(counts.merged_abs for counts in self.tasks)
        return self.tasks[task].merged_abs / total if total else 0.0


class Report(BaseModel):
    """Everything counted; the data of the page."""

    version: str
    configuration: str
    scope: str
    tasks: list[str]
    #: By tensor name, in the order of merging.
    tensors: dict[str, TensorCounts]

    def total(self) -> TensorCounts:
        return self.grouped(lambda _: "all").get("all", TensorCounts.empty(len(self.tasks)))

    def by_layer(self) -> dict[str, TensorCounts]:
        """By layer number in ascending order, the tensors of no layer last."""
        found = self.grouped(layer_of)
        return dict(sorted(found.items(), key=lambda item: _layer_order(item[0])))

    def by_kind(self) -> dict[str, TensorCounts]:
        return self.grouped(kind_of)

    def grouped(self, key: Callable[[str], str]) -> dict[str, TensorCounts]:
        groups: dict[str, TensorCounts] = {}
        for name, counts in self.tensors.items():
            empty = TensorCounts.empty(len(self.tasks))
            groups.setdefault(key(name), empty).add(counts)
        return groups


def layer_of(name: str) -> str:
    """The layer a tensor belongs to, with the name of its stack where a model has several."""
    found = re.match(r"(.*?)\.(\d+)\.", name)
    if found is None:
        return NO_LAYER
    stack = re.search(r"(encoder|decoder|vision|text)", found.group(1))
    return f"{stack.group(1)} {found.group(2)}" if stack else found.group(2)


def kind_of(name: str) -> str:
    """What kind of tensor it is: its name without layer numbers and what stands before them."""
    short = re.sub(r"^.*?\.\d+\.", "", name)
    return re.sub(r"\.\d+\.", ".N.", short).removesuffix(".weight")


def _layer_order(layer: str) -> tuple[bool, str, int]:
    stack, _, number = layer.rpartition(" ")
    return (layer == NO_LAYER, stack, int(number) if number.isdigit() else 0)


@dataclass
class _Counter:
    """Counts tensors as they are merged."""

    tasks: int
    found: dict[str, TensorCounts] = field(default_factory=dict)

    def __call__(
        self,
        aligned: Aligned,
        statistics: Statistics,
        positions: Sequence[int],
        weights: Sequence[float],
        scale: float,
    ) -> None:
        counts = TensorCounts.empty(self.tasks)
        counts.tensors, counts.elements = 1, len(aligned)
        thinned = aligned.under(statistics.dare)
        for chunk in thinned.chunks(Scratch.of_thread(statistics.dtype)):
            taus = [chunk.task_vector(i).clone() for i in range(len(positions))]
            rows = chunk.base.new_empty((len(positions), len(chunk.base)))
            parts = merging.parts_of(chunk, statistics, out=rows)
            kept = torch.stack([part != 0 for part in parts])
            changed = torch.stack([tau != 0 for tau in taus])
            counts.base_sq += _squares(chunk.base)
            merged = torch.zeros_like(chunk.base)
            for row, position in enumerate(positions):
                own, part = counts.tasks[position], parts[row] * scale * weights[row]
                merged += part
                own.add_numbers(
                    TaskCounts(
                        changed=int(changed[row].sum()),
                        kept=int(kept[row].sum()),
                        task_vector_sq=_squares(taus[row]),
                        merged_sq=_squares(part),
                        merged_abs=float(part.abs().sum(dtype=torch.float64)),
                    )
                )
            counts.merged_sq += _squares(merged)
            before = _conflicts([torch.sign(tau) for tau in taus])
            after = _conflicts([torch.sign(part) for part in parts])
            counts.met_before += before[0]
            counts.conflicts_before += before[1]
            counts.met_after += after[0]
            counts.conflicts_after += after[1]
            by = torch.bincount(kept.sum(0), minlength=self.tasks + 1).tolist()
            counts.kept_by = [a + b for a, b in zip(counts.kept_by, by, strict=True)]
            flags = kept.to(torch.float32)
            pairs = torch.stack([(flags * row).sum(1, dtype=torch.float64) for row in flags])
            for i, first in enumerate(positions):
                for j, second in enumerate(positions):
                    counts.both[first][second] += int(pairs[i, j])
        counts.unchanged = int(counts.merged_sq == 0)
        self.found[aligned.name] = counts


def _squares(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def _conflicts(signs: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Elements with two signs or more that are not zero, and those with both kinds."""
    up = torch.stack([sign > 0 for sign in signs]).sum(0)
    down = torch.stack([sign < 0 for sign in signs]).sum(0)
    return int((up + down >= 2).sum()), int(((up > 0) & (down > 0)).sum())


def observe(configuration: str, options: Any) -> Report:
    """Count over a whole configuration; shows a progress bar on a terminal, unless quiet."""
    plan = checkpoints.plan_without_merging(configuration, options)
    counter = _Counter(len(plan.models))
    with (
        observed(counter),
        tqdm(
            total=len(plan.tasks),
            desc="Looking at the merge",
            unit="tensor",
            disable=True if options.quiet else None,
        ) as bar,
    ):
        for _ in plan.execute(options.device):
            bar.update()
    if not counter.found:
        raise PCBError(
            "report on this merge", "no tensor of it is merged by pcb", "check the configuration"
        )
    return Report(
        version=mergekit_pcb.__version__,
        configuration=configuration,
        scope=plan.tasks[0].parameters["scope"],
        tasks=_short([str(model) for model in plan.models]),
        tensors=counter.found,
    )


def _short(models: Sequence[str]) -> list[str]:
    """The last parts of paths, where they tell the models apart."""
    for depth in (1, 2):
        names = ["/".join(pathlib.PurePath(m.split("+")[-1]).parts[-depth:]) for m in models]
        if len(set(names)) == len(names):
            return names
    return list(models)


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def summary(report: Report) -> list[list[str]]:
    """The table for a terminal: a heading, and a row per task."""
    total = report.total()
    rows = [
        ["task", "changed", "kept", "share of merge", "norm of task vector", "of what is merged"]
    ]
    for number, (name, own) in enumerate(zip(report.tasks, total.tasks, strict=True)):
        rows.append(
            [
                name,
                percent(own.changed, total.elements),
                percent(own.kept, total.elements),
                percent(total.share(number), 1),
                f"{math.sqrt(own.task_vector_sq):.4g}",
                f"{math.sqrt(own.merged_sq):.4g}",
            ]
        )
    return rows


def remarks(report: Report) -> list[str]:
    """What there is to say of all tasks together."""
    total = report.total()
    alone, together = total.kept_by[1], sum(total.kept_by[2:])
    return [
        f"{percent(total.kept_by[0], total.elements)} of all elements keep the base's value, "
        f"{percent(alone, total.elements)} come from one task, "
        f"{percent(together, total.elements)} from several",
        f"signs conflict in {percent(total.conflicts_before, total.met_before)} of the elements "
        "that several tasks change, and in "
        f"{percent(total.conflicts_after, total.met_after)} of those that several keep",
        f"the merged task vector has norm {math.sqrt(total.merged_sq):.4g}, the base "
        f"{math.sqrt(total.base_sq):.4g}; {total.unchanged} of {total.tensors} tensors are "
        "unchanged",
    ]


def write(report: Report, page: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Write report.html, report.json and tensors.csv into a folder, each whole or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        html, data, table = (folder / n for n in ("report.html", "report.json", "tensors.csv"))
        write_text(html, page)
        write_text(data, report.model_dump_json(indent=1) + "\n")
        with (
            written_whole(table) as unfinished,
            unfinished.open("w", encoding="utf-8", newline="") as rows,
        ):
            csv.writer(rows).writerows(csv_rows(report))
    except OSError as error:
        raise PCBError(f"write {folder}", str(error.strerror), "name another folder") from None
    return [html, data, table]


def csv_rows(report: Report) -> Iterable[list[Any]]:
    """A heading and a row per tensor and task; norms are Euclidean, shares from 0 to 1."""
    yield [
        "tensor", "layer", "kind", "elements", "task", "changed", "kept", "share_of_merge",
        "task_vector_norm", "merged_norm", "tensor_merged_norm", "tensor_base_norm",
        "conflicts_before", "met_before", "conflicts_after", "met_after",
    ]  # fmt: skip
    for name, counts in report.tensors.items():
        for number, (task, own) in enumerate(zip(report.tasks, counts.tasks, strict=True)):
            yield [
                name,
                layer_of(name),
                kind_of(name),
                counts.elements,
                task,
                own.changed,
                own.kept,
                counts.share(number),
                math.sqrt(own.task_vector_sq),
                math.sqrt(own.merged_sq),
                math.sqrt(counts.merged_sq),
                math.sqrt(counts.base_sq),
                counts.conflicts_before,
                counts.met_before,
                counts.conflicts_after,
                counts.met_after,
            ]
