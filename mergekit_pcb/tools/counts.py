"""What the competition of a merge is, counted tensor by tensor and chunk by chunk.

What is kept of a tensor are a few numbers that can be added up: by layer, kind and task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel

from mergekit_pcb.core.merge import delta, parts_of
from mergekit_pcb.core.refine import Refinement, refined
from mergekit_pcb.core.vectors import Scratch
from mergekit_pcb.host.prepared import Prepared

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
    #: Elements to which anything is added, by the whole merge.
    changed: int = 0
    #: Elements that two tasks or more change, and keep, and those of them with both signs.
    met_before: int = 0
    conflicts_before: int = 0
    met_after: int = 0
    conflicts_after: int = 0
    base_sq: float = 0.0
    merged_sq: float = 0.0
    #: Of tensors whose matrices are refined: how many, their matrices, the sum of the exponents of
    #: those and of the agreements of the experts in them (what ``spectrum: auto`` takes for the
    #: exponent), and the squared norms of PCB's own merge and of how far the refined one is from
    #: it. All other counts but ``merged_sq`` and ``changed`` are of PCB's own.
    refined: int = 0
    matrices: int = 0
    exponents: float = 0.0
    agreements: float = 0.0
    pcb_sq: float = 0.0
    moved_sq: float = 0.0
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

    @property
    def exponent(self) -> float:
        """The mean exponent of the matrices' singular values; 1 where nothing is evened."""
        return self.exponents / self.matrices if self.matrices else 1.0

    @property
    def agreement(self) -> float:
        """The mean agreement of the experts' matrices: 1 where their task vectors are one."""
        return self.agreements / self.matrices if self.matrices else 1.0

    @property
    def moved(self) -> float | None:
        """How far refining went from PCB's merge, in parts of its norm; none where that is 0."""
        if self.pcb_sq:
            return math.sqrt(self.moved_sq / self.pcb_sq)
        return None if self.moved_sq else 0.0


class Report(BaseModel):
    """Everything counted; the data of the page."""

    version: str
    configuration: str
    scope: str
    tasks: list[str]
    #: Whether DARE thinned the task vectors that are counted.
    thinned: bool = False
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
class Counter:
    """Counts tensors as they are merged.

    ``places`` are the numbers of a tensor's own tasks among all: slices may have other models.
    """

    tasks: int
    places: Mapping[str, Sequence[int]] = field(default_factory=dict)
    found: dict[str, TensorCounts] = field(default_factory=dict)

    def __call__(self, tensor: Prepared) -> None:
        aligned, statistics = tensor.aligned, tensor.statistics
        places = self.places.get(aligned.name, range(self.tasks))
        positions = [places[position] for position in tensor.positions]
        counts = TensorCounts.empty(self.tasks)
        counts.tensors, counts.elements = 1, len(aligned)
        thinned = aligned.under(statistics.dare)
        for chunk in thinned.chunks(Scratch.of_thread(statistics.dtype)):
            taus = [chunk.task_vector(i).clone() for i in range(len(positions))]
            rows = chunk.base.new_empty((len(positions), len(chunk.base)))
            parts = parts_of(chunk, statistics, out=rows)
            kept = torch.stack([part != 0 for part in parts])
            changed = torch.stack([tau != 0 for tau in taus])
            counts.base_sq += _squares(chunk.base)
            merged = torch.zeros_like(chunk.base)
            for row, position in enumerate(positions):
                own, part = counts.tasks[position], parts[row] * tensor.scale * tensor.weights[row]
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
            counts.changed += int((merged != 0).sum())
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
        if tensor.refinement is not None:
            _count_refined(counts, tensor, tensor.refinement)
        counts.unchanged = int(counts.merged_sq == 0)
        self.found[aligned.name] = counts


def _count_refined(counts: TensorCounts, tensor: Prepared, refinement: Refinement) -> None:
    """Count what refining makes of a tensor of which all else is counted."""
    aligned, statistics = tensor.aligned, tensor.statistics
    counts.refined, counts.pcb_sq, counts.merged_sq = 1, counts.merged_sq, 0.0
    counts.changed = 0
    for found in refined(aligned, statistics, tensor.weights, refinement):
        counts.matrices += 1
        counts.exponents += found.exponent
        counts.agreements += found.agreement
        merged = found.merged.mul_(tensor.scale)
        counts.merged_sq += _squares(merged)
        counts.changed += int((merged != 0).sum())
        for chunk, own in found.matrix.chunks(merged):
            pcb = delta(chunk, statistics, tensor.weights)
            counts.moved_sq += _squares(own - tensor.scale * pcb)


def percent(part: float, whole: float = 1.0) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _squares(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def _conflicts(signs: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Elements with two signs or more that are not zero, and those with both kinds."""
    up = torch.stack([sign > 0 for sign in signs]).sum(0)
    down = torch.stack([sign < 0 for sign in signs]).sum(0)
    return int((up + down >= 2).sum()), int(((up > 0) & (down > 0)).sum())
