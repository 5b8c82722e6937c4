"""The report of a merge: its counts as a table, a page, JSON and CSV.

Nothing is merged to disk. Every tensor is measured and taken apart as the merge would. What is
counted stands in ``counts.py``, pictures in ``figures.py``.
"""

from __future__ import annotations

import csv
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

import mergekit_pcb
from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import short_names, write_text, written_whole
from mergekit_pcb.host.plan import models_of
from mergekit_pcb.host.planning import execute, plan_without_merging
from mergekit_pcb.tools.counts import (
    Counter,
    Report,
    TensorCounts,
    kind_of,
    layer_of,
    percent,
)


def observe(text: str, document: Any, options: Any) -> Report:
    """Count over a configuration, given as text and as what that says.

    Shows a progress bar on a terminal, unless quiet.
    """
    plan = plan_without_merging(document, options)
    models = list(dict.fromkeys(model for task in plan.tasks for model in models_of(task)))
    places = {
        task.output_weight.name: [models.index(model) for model in models_of(task)]
        for task in plan.tasks
    }
    counter = Counter(len(models), places)
    with tqdm(
        total=len(plan.tasks),
        desc="Looking at the merge",
        unit="tensor",
        disable=True if options.quiet else None,
    ) as bar:
        for _ in execute(plan, counter):
            bar.update()
    if not counter.found:
        raise PCBError(
            "report on this merge", "no tensor of it is merged by pcb", "check the configuration"
        )
    return Report(
        version=mergekit_pcb.__version__,
        configuration=text,
        scope=plan.scope,
        tasks=short_names([str(model) for model in models]),
        thinned=plan.thins,
        tensors=counter.found,
    )


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
                percent(total.share(number)),
                f"{math.sqrt(own.task_vector_sq):.4g}",
                f"{math.sqrt(own.merged_sq):.4g}",
            ]
        )
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])


def remarks(report: Report) -> list[str]:
    """What there is to say of all tasks together."""
    total = report.total()
    alone, together = total.kept_by[1], sum(total.kept_by[2:])
    unchanged = total.elements - total.changed
    kept = f"{percent(unchanged, total.elements)} of all elements keep the base's value"
    by_tasks = (
        f"{percent(alone, total.elements)} come from one task, "
        f"{percent(together, total.elements)} from several"
    )
    if unchanged == total.kept_by[0]:
        several = [f"{kept}, {by_tasks}"]
    else:  # refined, or lambda or weights are 0
        several = [kept, f"of what the tasks keep, {by_tasks}"]
    return [
        *["what changes, norms and conflicts are those of what DARE leaves"] * report.thinned,
        *["what is kept, shares and conflicts are those of PCB's merge, before refine"]
        * bool(total.refined),
        *several,
        f"signs conflict in {percent(total.conflicts_before, total.met_before)} of the elements "
        "that several tasks change, and in "
        f"{percent(total.conflicts_after, total.met_after)} of those that several keep",
        *_refined(total),
        f"the merged task vector has norm {math.sqrt(total.merged_sq):.4g}, the base "
        f"{math.sqrt(total.base_sq):.4g}; {total.unchanged} of {total.tensors} tensors are "
        "unchanged",
    ]


def _refined(total: TensorCounts) -> Iterator[str]:
    if total.refined:
        how_far = ""
        if total.moved is not None:
            how_far = f", by {100 * total.moved:.0f} % of the norm of what PCB adds to them"
        yield (
            f"refine changes {total.refined} tensors{how_far}; singular values of their "
            f"{total.matrices} matrices are raised to the power {total.exponent:.2f} (mean)"
        )


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
            table_rows = ([_cell(value) for value in row] for row in csv_rows(report))
            csv.writer(rows).writerows(table_rows)
    except OSError as error:
        raise PCBError(f"write {folder}", str(error.strerror), "name another folder") from None
    return [html, data, table]


def _cell(value: Any) -> Any:
    """A value that no spreadsheet computes: OWASP's advice on CSV injection, a quote before it."""
    computed = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n")
    return f"'{value}" if computed else value


def csv_rows(report: Report) -> Iterable[list[Any]]:
    """A heading and a row per tensor and task; norms are Euclidean, shares from 0 to 1."""
    yield [
        "tensor", "layer", "kind", "elements", "task", "changed", "kept", "share_of_merge",
        "task_vector_norm", "merged_norm", "tensor_merged_norm", "tensor_base_norm",
        "conflicts_before", "met_before", "conflicts_after", "met_after",
        "refined", "exponent", "moved_from_pcb",
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
                counts.refined,
                counts.exponent,
                counts.moved,
            ]
