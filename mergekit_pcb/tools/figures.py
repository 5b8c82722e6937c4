"""The pictures of a report, by matplotlib."""

from __future__ import annotations

import base64
import importlib.util
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergekit_pcb.errors import PCBError, printable
from mergekit_pcb.tools.counts import Report, TensorCounts, kind_of, layer_of, percent

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#555555")
SEQUENTIAL = "viridis"
# Stands before names: matplotlib leaves labels that begin with an underscore out of legends.
_LABEL = "label "
WIDTH = 9.0  # inches; the page scales pictures to its width
MARKERS = "os^Dv*"


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Refuse to begin where pictures could not be drawn in the end."""
    if not can_draw():
        raise PCBError(
            "draw a report", "the package matplotlib is missing", "pip install matplotlib"
        )


def part(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def blank(height: float, columns: int = 1, *, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, of which one alone is no array."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for axis in axes.flat if rows * columns > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    file = io.BytesIO()
    # A fixed salt and no date: the same report is the same file.
    with matplotlib.rc_context({"svg.hashsalt": "mergekit-pcb", "svg.fonttype": "path"}):
        for text in figure.findobj(matplotlib.text.Text):
            text.set_parse_math(False)  # a dollar in a name is a dollar
        figure.savefig(file, format="svg", metadata={"Date": None})
    return base64.b64encode(file.getvalue()).decode()


def kept(report: Report, groups: dict[str, TensorCounts], what: str) -> str:
    shares = [[part(t.kept, g.elements) for t in g.tasks] for g in groups.values()]
    figure, axis = blank(max(2.2, 0.24 * len(groups) + 1.2))
    image = _heat(axis, shares, report.tasks, list(groups), highest=None)
    axis.set_ylabel(what)
    bar = figure.colorbar(image, ax=axis, shrink=0.9, pad=0.01)
    bar.set_label("share kept", fontsize=9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    return _svg(figure)


def _heat(
    axis: Any,
    values: Sequence[Sequence[float]],
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    highest: float | None,
) -> Any:
    top = highest or max((v for row in values for v in row), default=0.0) or 1.0
    image = axis.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=top, aspect="auto")
    axis.set_xticks(range(len(columns)), list(map(printable, columns)))
    step = max(1, len(rows) // 40)
    axis.set_yticks(range(0, len(rows), step), list(map(printable, rows[::step])))
    axis.spines[:].set_visible(False)
    if len(rows) <= 40 and len(columns) <= 12:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "white" if value < 0.6 * top else "black"
                text = f"{100 * value:.1f}"
                axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    return image


def shares(report: Report, layers: dict[str, TensorCounts]) -> str:
    figure, axis = blank(3.4)
    places, bottom = range(len(layers)), [0.0] * len(layers)
    for number, name in enumerate(report.tasks):
        shares = [counts.share(number) for counts in layers.values()]
        axis.bar(places, shares, 0.85, bottom=bottom, color=_colour(number), label=_LABEL + name)
        bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
    _layers(axis, layers)
    axis.set_ylim(0, 1)
    axis.set_ylabel("share of the merge")
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    _legend(figure, axis)
    return _svg(figure)


def norms(report: Report, layers: dict[str, TensorCounts]) -> str:
    figure, axis = blank(3.4)
    groups = list(layers.values())
    places = range(len(groups))
    bases = [math.sqrt(g.base_sq) for g in groups]
    for number, name in enumerate(report.tasks):
        norms = [math.sqrt(g.tasks[number].task_vector_sq) for g in groups]
        values = [part(n, b) for n, b in zip(norms, bases, strict=True)]
        axis.plot(places, values, "o-", ms=4, color=_colour(number), label=_LABEL + name)
    merged = [part(math.sqrt(g.merged_sq), b) for g, b in zip(groups, bases, strict=True)]
    axis.plot(places, merged, "k--", label="merged")
    _layers(axis, layers)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("norm / norm of the base")
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    _legend(figure, axis)
    return _svg(figure)


def conflicts(layers: dict[str, TensorCounts]) -> str:
    figure, axis = blank(3.2)
    groups = list(layers.values())
    before = [part(g.conflicts_before, g.met_before) for g in groups]
    after = [part(g.conflicts_after, g.met_after) for g in groups]
    places = range(len(groups))
    axis.bar([p - 0.21 for p in places], before, 0.4, color="#b8c0cc", label="before")
    axis.bar([p + 0.21 for p in places], after, 0.4, color=COLOURS[0], label="after")
    _layers(axis, layers)
    axis.set_ylabel("elements in conflict")
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    _legend(figure, axis)
    return _svg(figure)


def overlaps(report: Report, total: TensorCounts) -> str:
    figure, (left, right) = blank(3.6, 2)
    kept = [own.kept for own in total.tasks]
    shares = [
        [part(both, kept[i] + kept[j] - both) for j, both in enumerate(row)]
        for i, row in enumerate(total.both)
    ]
    _heat(left, shares, report.tasks, report.tasks, highest=1.0)
    left.set_title("kept by both, in % of kept by either", fontsize=9)
    counts = [part(count, total.elements) for count in total.kept_by]
    right.bar(range(len(counts)), counts, color=COLOURS[0])
    right.bar_label(right.containers[0], [percent(count) for count in counts], fontsize=8)
    right.set_xticks(range(len(counts)))
    right.set_xlabel("tasks that keep an element")
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return _svg(figure)


def distribution(report: Report) -> str:
    figure, axis = blank(3.0)
    for number, name in enumerate(report.tasks):
        shares = [
            part(counts.tasks[number].kept, counts.elements) for counts in report.tensors.values()
        ]
        colour = _colour(number)
        axis.hist(shares, bins=40, histtype="step", lw=1.8, color=colour, label=_LABEL + name)
    axis.set_xlabel("share kept of a tensor")
    axis.set_ylabel("tensors")
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    _legend(figure, axis)
    return _svg(figure)


def _layers(axis: Any, layers: Mapping[str, Any]) -> None:
    step = max(1, len(layers) // 24)
    names = list(layers)
    axis.set_xticks(range(0, len(names), step), list(map(printable, names[::step])))
    if max(map(len, names)) > 5:
        axis.tick_params(axis="x", rotation=90)
    axis.set_xlabel("layer")


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside upper right", ncols=min(6, len(labels)), frameon=False,
        fontsize=9,
    )  # fmt: skip
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(printable(label.removeprefix(_LABEL)))


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def agreements(report: Report) -> str:
    """Over depth, a line for each kind of tensor."""
    return _by_depth(report, lambda counts: counts.agreement, "agreement of the experts")


def moved(report: Report) -> str:
    return _by_depth(report, lambda counts: counts.moved, "distance / norm of PCB's merge")


def _by_depth(report: Report, value: Callable[[TensorCounts], float | None], what: str) -> str:
    """A picture of a number of every refined tensor: layers to the right, a line for each kind."""
    found = [(layer_of(n), kind_of(n), value(c)) for n, c in report.tensors.items() if c.refined]
    rows = [(layer, kind, number) for layer, kind, number in found if number is not None]
    layers = [layer for layer in report.by_layer() if layer in {row[0] for row in rows}]
    figure, axis = blank(3.6)
    for number, kind in enumerate(dict.fromkeys(row[1] for row in rows)):
        own = [(layers.index(layer), v) for layer, k, v in rows if k == kind]
        mark = MARKERS[number // len(COLOURS) % len(MARKERS)]
        axis.plot(
            *zip(*sorted(own), strict=True),
            mark + "-",
            ms=4,
            color=_colour(number),
            label=_LABEL + kind,
        )
    _layers(axis, dict.fromkeys(layers))
    axis.set_ylim(bottom=0)
    axis.set_ylabel(what)
    _legend(figure, axis)
    return _svg(figure)
