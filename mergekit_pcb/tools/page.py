"""The page of a report, all in one file that needs no network."""

from __future__ import annotations

import html
from collections.abc import Sequence

from mergekit_pcb.tools import figures
from mergekit_pcb.tools.counts import Report, percent

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


def page(report: Report, table: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    """The whole page as HTML."""
    total, layers, kinds = report.total(), report.by_layer(), report.by_kind()
    cards = [
        (f"{len(report.tasks)}", "tasks"),
        (f"{total.tensors}", f"tensors, {total.unchanged} of them unchanged"),
        (_count(total.elements), "elements"),
        (percent(total.changed, total.elements), "of them change"),
        (percent(sum(total.kept_by[2:]), total.elements), "merge several tasks"),
    ]
    own = " Of PCB's merge, before refine." if total.refined else ""
    pictures = [
        (
            "Who keeps how much, layer by layer",
            "Share of all elements that keep a weight above zero. With scope: tensor every tensor "
            f"keeps density of its elements; with scope: model layers win or lose as a whole.{own}",
            figures.kept(report, layers, "layer"),
        ),
        (
            "The same by kind of tensor",
            f"Kinds are names without layer numbers.{own}",
            figures.kept(report, kinds, "kind"),
        ),
        (
            "Whose merge is it?",
            "Effective share of each task: its part of the magnitudes that are added to the base, "
            f"weight and lambda included.{own}",
            figures.shares(report, layers),
        ),
        (
            "How far each task went",
            "Norm of the task vector relative to the norm of the base's tensors in the layer; "
            "dashed: the merged task vector.",
            figures.norms(report, layers),
        ),
        (
            "Sign conflicts before and after",
            "Of the elements that several tasks change (before) or keep (after), the share in "
            f"which they pull in opposite directions.{own}",
            figures.conflicts(layers),
        ),
        (
            "Do the tasks keep the same elements?",
            "Left: elements that both of two tasks keep, as a share of those that either keeps. "
            f"Right: how many tasks keep an element.{own}",
            figures.overlaps(report, total),
        ),
        (
            "How even is it?",
            f"Tensors by the share of their elements that a task keeps.{own}",
            figures.distribution(report),
        ),
    ]
    if total.refined:
        pictures.append(
            (
                "Where do the experts agree?",
                "1 where the experts' task vectors are one, 0.58 where three of them have nothing "
                "in common; spectrum: auto raises the singular values of a merged matrix to this "
                "power.",
                figures.agreements(report),
            )
        )
    if total.refined and any(counts.moved for counts in report.tensors.values()):
        pictures.append(
            (
                "How far is it from PCB's merge?",
                "Distance of the refined merge from PCB's own, in parts of the norm of that; "
                "tensors to which PCB adds nothing are left out.",
                figures.moved(report),
            )
        )
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
