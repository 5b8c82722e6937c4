"""The table and the figure of ``benchmarks.quality.refined``."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from benchmarks.quality.suite import DISTANCES, share
from benchmarks.quality.tables import _lead, _line, _percent
from benchmarks.quality.without_data import OURS
from mergekit_pcb.files import write_text

if TYPE_CHECKING:
    from benchmarks.quality.experiments import Row
    from benchmarks.quality.refined import Record

#: What sees the experts' data.
WITH_DATA = ("RegMean",)
SETTINGS = ("first", "searched")
SHOWN = {"first": "default", "searched": "searched"}


def write(records: Sequence[Record], folder: pathlib.Path) -> str:
    """Write ``refined.md`` and ``refined.png``; return the tables."""
    text = "\n".join(_tables(records))
    write_text(folder / "refined.md", text)
    _draw(records, folder / "refined.png")
    return text


def _tables(records: Sequence[Record]) -> Iterable[str]:
    yield "# refine and spectrum, beside methods that need no data"
    yield ""
    for machine in dict.fromkeys(record.machine for record in records):
        yield f"{machine}.  "
    minutes = sum(record.seconds for record in records) / 60
    seeds = sorted({record.seed for record in records})
    yield f"Tier {records[0].tier}, seeds {seeds}, {minutes:.0f} minutes of one thread in all.  "
    yield "Share of the experts' gain in loss over the base, or of their accuracy, on test data;"
    yield "± is the standard deviation between seeds. Bold: first among methods without data. A *"
    yield "stands where Student's t puts a lead beyond the scatter of the seeds (p < 0.05, each)."
    yield "\n## At a glance: default / searched, in %\n"
    yield from summary(records)
    for suite in dict.fromkeys(record.suite for record in records):
        own = [record for record in records if record.suite == suite]
        yield f"\n## {suite}\n"
        yield from _shares(own)
        yield f"\n### How far {OURS} is ahead, seed by seed\n"
        yield from _leads(own)
        yield "\n### What the searches chose\n"
        yield from _choices(own)
        yield "\n### How far the experts agree: the exponents of `spectrum: auto`, mean and range\n"
        for distance, some in _by_distance(own):
            values = [statistics.mean(record.agreement.values()) for record in some]
            least = min(min(record.agreement.values()) for record in some)
            most = max(max(record.agreement.values()) for record in some)
            yield f"- {distance}: {statistics.mean(values):.3f} ({least:.3f} to {most:.3f})"
    yield ""


def summary(records: Sequence[Record]) -> Iterable[str]:
    """Means over the seeds, of every method, suite and distance."""
    columns = [
        (f"{suite}, {distance}", some)
        for suite in dict.fromkeys(record.suite for record in records)
        for distance, some in _by_distance([r for r in records if r.suite == suite])
    ]
    yield _line(["method", *(name for name, _ in columns)])
    yield _line(["---", *["---:"] * len(columns)])
    bases = [statistics.mean(_normalised(r, r.base) for r in some) for _, some in columns]
    yield _line(["base", *(f"{100 * base:.1f}" for base in bases)])
    methods = [row.method for row in records[0].first]
    first = {(name, s): _first_without_data(some, s) for name, some in columns for s in SETTINGS}
    for method in methods:
        cells = []
        for name, some in columns:
            shown = []
            for s in SETTINGS:
                mean = f"{100 * statistics.mean(_values(some, s, method)):.1f}"
                shown.append(f"**{mean}**" if first[name, s] == method else mean)
            cells.append(" / ".join(shown))
        yield _line([_told(method), *cells])


def _told(method: str) -> str:
    return method + (" (sees data)" if method in WITH_DATA else "")


def _first_without_data(records: Sequence[Record], setting: str) -> str:
    methods = (row.method for row in records[0].first)
    return max(
        (method for method in methods if method not in WITH_DATA),
        key=lambda method: statistics.mean(_values(records, setting, method)),
    )


def _by_distance(records: Sequence[Record]) -> Iterable[tuple[str, list[Record]]]:
    for distance in _distances(records):
        some = [record for record in records if record.distance == distance]
        yield distance, sorted(some, key=lambda record: record.seed)


def _distances(records: Sequence[Record]) -> list[str]:
    there = {record.distance for record in records}
    return [distance.name for distance in DISTANCES if distance.name in there]


def _rows(record: Record, setting: str) -> dict[str, Row]:
    return {row.method: row for row in getattr(record, setting)}


def _values(records: Sequence[Record], setting: str, method: str) -> list[float]:
    return [_normalised(record, _rows(record, setting)[method]) for record in records]


def _normalised(record: Record, row: Row) -> float:
    return share(record.suite, row.test, record.base.test, record.individual)


def _shares(records: Sequence[Record]) -> Iterable[str]:
    columns = [(d, some, s) for d, some in _by_distance(records) for s in SETTINGS]
    yield _line(["method", *(f"{d}, {SHOWN[s]}" for d, _, s in columns)])
    yield _line(["---", *["---:"] * len(columns)])
    base = [_percent([_normalised(r, r.base) for r in some]) for _, some, _ in columns]
    yield _line(["base", *base])
    methods = [row.method for row in records[0].first]
    best = [_first_without_data(some, s) for _, some, s in columns]
    for method in methods:
        cells = [
            f"**{cell}**" if method == first else cell
            for first, cell in zip(
                best, (_percent(_values(some, s, method)) for _, some, s in columns), strict=True
            )
        ]
        yield _line([_told(method), *cells])


def _leads(records: Sequence[Record]) -> Iterable[str]:
    columns = [(d, some, s) for d, some in _by_distance(records) for s in SETTINGS]
    yield _line(["over", *(f"{d}, {SHOWN[s]}, points" for d, _, s in columns)])
    yield _line(["---", *["---:"] * len(columns)])
    for row in records[0].first:
        if row.method == OURS:
            continue
        cells = []
        for _, some, setting in columns:
            mine, other = (_values(some, setting, method) for method in (OURS, row.method))
            # as points of the share, shown the way leads in accuracy are
            cells.append(_lead("accuracy", [a - b for a, b in zip(mine, other, strict=True)]))
        yield _line([row.method, *cells])


def _choices(records: Sequence[Record]) -> Iterable[str]:
    distances = list(_by_distance(records))
    yield _line(["method", *(distance for distance, _ in distances)])
    yield _line(["---"] * (len(distances) + 1))
    for row in records[0].searched:
        cells = []
        for _, some in distances:
            knobs = [_rows(record, "searched")[row.method].knobs for record in some]
            cells.append(
                "; ".join(
                    f"{name} {', '.join(f'{own[name]:.2g}' for own in knobs)}" for name in knobs[0]
                )
            )
        if any(cells):
            yield _line([row.method, *cells])


def _draw(records: Sequence[Record], file: pathlib.Path) -> None:
    """A panel for each suite and distance: every method at its default and searched."""
    from matplotlib.figure import Figure

    suites = list(dict.fromkeys(record.suite for record in records))
    distances = _distances(records)
    methods = [row.method for row in records[0].first][::-1]
    height = 0.27 * len(methods) + 0.8
    figure = Figure(figsize=(4 * len(distances) + 2, height * len(suites)), layout="constrained")
    axes = figure.subplots(len(suites), len(distances), squeeze=False, sharey=True)
    for line, suite in zip(axes, suites, strict=True):
        for axis, distance in zip(line, distances, strict=True):
            some = [r for r in records if (r.suite, r.distance) == (suite, distance)]
            if not some:
                continue
            for setting, mark, colour in (("first", "o", "#0072B2"), ("searched", "D", "#E69F00")):
                means = [100 * statistics.mean(_values(some, setting, m)) for m in methods]
                spread = [
                    100 * statistics.stdev(_values(some, setting, m)) if len(some) > 1 else 0
                    for m in methods
                ]
                shift = 0.13 if setting == "first" else -0.13
                axis.errorbar(
                    means,
                    [place + shift for place in range(len(methods))],
                    xerr=spread,
                    fmt=mark,
                    ms=4,
                    color=colour,
                    lw=1,
                    label=SHOWN[setting],
                )
            left = min(0, *(v for v in axis.get_xlim()))
            axis.set_xlim(left=max(left, -20) if suite == "language" else None)
            axis.set_yticks(range(len(methods)), methods, fontsize=8)
            for label in axis.get_yticklabels():
                if label.get_text() == OURS:
                    label.set_fontweight("bold")
            axis.grid(axis="x", alpha=0.3)
            axis.set_title(f"{suite}, {distance}", fontsize=9)
            axis.set_xlabel("share of what the experts reach, %", fontsize=8)
    marks, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(marks, labels, loc="outside upper right", ncols=2, fontsize=8)
    figure.savefig(file, dpi=110)
