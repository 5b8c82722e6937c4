"""The page of a report, all in one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from mergekit_pcb.files import listed
from mergekit_pcb.tools import figures
from mergekit_pcb.tools.counts import Report, percent


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
    pages = Environment(
        loader=PackageLoader("mergekit_pcb", "tools"),
        autoescape=True,
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    models = report.tasks
    named = listed(models) if len(models) <= 4 else f"{len(models)} models"
    return pages.get_template("report.html.jinja").render(
        title=f"PCB-Merging of {named}",
        report=report,
        cards=cards,
        table=table,
        remarks=remarks,
        pictures=pictures,
    )


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
