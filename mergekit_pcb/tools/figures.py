"""The page of a report: pictures by matplotlib, all in one file that needs no network."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergekit_pcb.errors import PCBError, printable

if TYPE_CHECKING:
    from mergekit_pcb.tools.counts import Report, TensorCounts

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#555555")
SEQUENTIAL = "viridis"
# Stands before names: matplotlib leaves labels that begin with an underscore out of legends.
_LABEL = "label "
WIDTH = 9.0  # inches; the page scales pictures to its width
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #f6f7f9; margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 0 0 .4rem; }
p { margin: .3rem 0 .8rem; } .lead { color: #55606e; }
section { background: #fff; border: 1px solid #e3e6ea; border-radius: 10px;
          padding: 1.1rem 1.3rem; margin: 1.1rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; }
.cards div { background: #fff; border: 1px solid #e3e6ea; border-radius: 10px;
             padding: .8rem 1rem; }
.cards b { display: block; font-size: 1.5rem; } .cards span { color: #55606e; font-size: .9rem; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #e9ecef; }
th:first-child, td:first-child { text-align: left; } th { color: #55606e; font-weight: 600; }
pre { background: #f6f7f9; padding: .8rem; border-radius: 8px; overflow-x: auto;
      font-size: .85rem; }
.scroll { overflow-x: auto; }
"""


def require_matplotlib() -> None:
    """Refuse to begin where pictures could not be drawn in the end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PCBError(
            "draw a report", "the package matplotlib is missing", "pip install matplotlib"
        ) from None


def page(report: Report, table: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    """The whole page as HTML."""
    total, layers, kinds = report.total(), report.by_layer(), report.by_kind()
    cards = [
        (f"{len(report.tasks)}", "tasks"),
        (f"{total.tensors}", f"tensors, {total.unchanged} of them unchanged"),
        (_count(total.elements), "elements"),
        (_percent(1 - _part(total.kept_by[0], total.elements)), "of them change"),
        (_percent(_part(sum(total.kept_by[2:]), total.elements)), "merge several tasks"),
    ]
    pictures = [
        (
            "Who keeps how much, layer by layer",
            "Share of all elements that keep a weight above zero. With scope: tensor every tensor "
            "keeps density of its elements; with scope: model layers win or lose as a whole.",
            _kept(report, layers, "layer"),
        ),
        (
            "The same by kind of tensor",
            "Kinds are names without layer numbers.",
            _kept(report, kinds, "kind"),
        ),
        (
            "Whose merge is it?",
            "Effective share of each task: its part of the magnitudes that are added to the base, "
            "weight and lambda included.",
            _shares(report, layers),
        ),
        (
            "How far each task went",
            "Norm of the task vector relative to the norm of the base's tensors in the layer; "
            "dashed: the merged task vector.",
            _norms(report, layers),
        ),
        (
            "Sign conflicts before and after",
            "Of the elements that several tasks change (before) or keep (after), the share in "
            "which they pull in opposite directions.",
            _conflicts(layers),
        ),
        (
            "Do the tasks keep the same elements?",
            "Left: elements that both of two tasks keep, as a share of those that either keeps. "
            "Right: how many tasks keep an element.",
            _overlaps(report, total),
        ),
        (
            "How even is it?",
            "Tensors by the share of their elements that a task keeps.",
            _distribution(report),
        ),
    ]
    body = [
        f"<h1>PCB-Merging of {_list(report.tasks)}</h1>",
        f"<p class=lead>scope: {html.escape(report.scope)} · mergekit-pcb "
        f"{html.escape(report.version)}</p>",
        "<div class=cards>",
        *(f"<div><b>{html.escape(n)}</b><span>{html.escape(t)}</span></div>" for n, t in cards),
        "</div>",
        f"<section><h2>Tasks</h2><div class=scroll>{_table(table)}</div>",
        *(f"<p>{html.escape(remark[0].upper() + remark[1:])}.</p>" for remark in remarks),
        "</section>",
    ]
    for title, text, picture in pictures:
        body.append(
            f"<section><h2>{html.escape(title)}</h2><p class=lead>{html.escape(text)}</p>"
            f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{picture}"></section>'
        )
    body.append(
        f"<section><h2>Configuration</h2><pre>{html.escape(report.configuration.strip())}</pre>"
        "<p class=lead>The data are in report.json and tensors.csv beside this page.</p></section>"
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = f"<title>PCB-Merging of {_list(report.tasks)}</title>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}{title}<style>{STYLE}</style></head>\n'
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def _list(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{len(names)} models"
    *first, last = [html.escape(name) for name in names]
    return f"{', '.join(first)} and {last}" if first else last


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rest
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def _part(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# --- Pictures ---------------------------------------------------------------------------------


def _figure(height: float, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, **options)
    for axis in axes if columns > 1 else [axes]:
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


def _kept(report: Report, groups: dict[str, TensorCounts], what: str) -> str:
    shares = [[_part(t.kept, g.elements) for t in g.tasks] for g in groups.values()]
    figure, axis = _figure(max(2.2, 0.24 * len(groups) + 1.2))
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


def _shares(report: Report, layers: dict[str, TensorCounts]) -> str:
    figure, axis = _figure(3.4)
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


def _norms(report: Report, layers: dict[str, TensorCounts]) -> str:
    figure, axis = _figure(3.4)
    groups = list(layers.values())
    places = range(len(groups))
    bases = [math.sqrt(g.base_sq) for g in groups]
    for number, name in enumerate(report.tasks):
        norms = [math.sqrt(g.tasks[number].task_vector_sq) for g in groups]
        values = [_part(n, b) for n, b in zip(norms, bases, strict=True)]
        axis.plot(places, values, "o-", ms=4, color=_colour(number), label=_LABEL + name)
    merged = [_part(math.sqrt(g.merged_sq), b) for g, b in zip(groups, bases, strict=True)]
    axis.plot(places, merged, "k--", label="merged")
    _layers(axis, layers)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("norm / norm of the base")
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    _legend(figure, axis)
    return _svg(figure)


def _conflicts(layers: dict[str, TensorCounts]) -> str:
    figure, axis = _figure(3.2)
    groups = list(layers.values())
    before = [_part(g.conflicts_before, g.met_before) for g in groups]
    after = [_part(g.conflicts_after, g.met_after) for g in groups]
    places = range(len(groups))
    axis.bar([p - 0.21 for p in places], before, 0.4, color="#b8c0cc", label="before")
    axis.bar([p + 0.21 for p in places], after, 0.4, color=COLOURS[0], label="after")
    _layers(axis, layers)
    axis.set_ylabel("elements in conflict")
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    _legend(figure, axis)
    return _svg(figure)


def _overlaps(report: Report, total: TensorCounts) -> str:
    figure, (left, right) = _figure(3.6, 2)
    kept = [own.kept for own in total.tasks]
    shares = [
        [_part(both, kept[i] + kept[j] - both) for j, both in enumerate(row)]
        for i, row in enumerate(total.both)
    ]
    _heat(left, shares, report.tasks, report.tasks, highest=1.0)
    left.set_title("kept by both, in % of kept by either", fontsize=9)
    counts = [_part(count, total.elements) for count in total.kept_by]
    right.bar(range(len(counts)), counts, color=COLOURS[0])
    right.bar_label(right.containers[0], [_percent(count) for count in counts], fontsize=8)
    right.set_xticks(range(len(counts)))
    right.set_xlabel("tasks that keep an element")
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return _svg(figure)


def _distribution(report: Report) -> str:
    figure, axis = _figure(3.0)
    for number, name in enumerate(report.tasks):
        shares = [
            _part(counts.tasks[number].kept, counts.elements) for counts in report.tensors.values()
        ]
        colour = _colour(number)
        axis.hist(shares, bins=40, histtype="step", lw=1.8, color=colour, label=_LABEL + name)
    axis.set_xlabel("share kept of a tensor")
    axis.set_ylabel("tensors")
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    _legend(figure, axis)
    return _svg(figure)


def _layers(axis: Any, layers: dict[str, TensorCounts]) -> None:
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
