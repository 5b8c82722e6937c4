"""What the demo measured, as people see it: a table, bars, a picture, and what to do next."""

from __future__ import annotations

import os
import pathlib
import shlex
import sys
from collections.abc import Iterator

import click

from mergekit_pcb.tools.demo_folder import (
    GENERAL,
    PICTURE,
    RESULTS,
    TASKS,
    Results,
    Row,
    Schedule,
)
from mergekit_pcb.tools.figures import COLOURS, blank, can_draw

_BAR, _NAME = 40, 20  # characters


def page(results: Results, directory: pathlib.Path, picture: pathlib.Path | None) -> Iterator[str]:
    """All that is printed once the demo has ended."""
    config = directory / "pcb.yml"
    merge = shlex.join(["mergekit-yaml", str(config), str(directory / "merged-pcb")])
    yield f"$ {merge}   # with this configuration:"
    yield from ("    " + line for line in config.read_text(encoding="utf-8").splitlines())
    for block in (table(results), sentences(results), bars(results)):
        yield ""
        yield from block
    yield ""
    files = f", {RESULTS} and {PICTURE}" if picture is not None else f" and {RESULTS}"
    yield f"The models{files} are in {directory}"
    if picture is None:
        yield "(no picture: pip install matplotlib)"
    yield from next_commands(directory, can_draw=picture is not None)


def table(results: Results) -> list[str]:
    """The rows as aligned text, the lowest loss of every column marked."""
    header = f"{'loss per token':<{_NAME}}" + "".join(f"{name:>10}" for name in (*TASKS, "mean"))
    header += f"{GENERAL:>12}"
    lines = [header, "-" * len(header)]
    columns = [(*row.tasks.values(), row.mean, row.general) for row in results.rows]
    best = [min(column) for column in zip(*columns, strict=True)]
    for row, values in zip(results.rows, columns, strict=True):
        cells = [f"{v:.3f}{'*' if v == b else ' '}" for v, b in zip(values, best, strict=True)]
        line = f"{row.name:<{_NAME}}" + "".join(f"{cell:>10}" for cell in cells[:-1])
        lines.append(f"{line}{cells[-1]:>12}")
    return lines


def sentences(results: Results) -> list[str]:
    """How the mean of ``pcb`` stands to the base, the best expert, and the other merges."""
    pcb = results.row("pcb")
    experts = [row for row in results.rows if row.kind == "expert"]
    others = [row for row in results.rows if row.kind == "merge" and row is not pcb]
    told = [results.row("base"), min(experts, key=lambda row: row.mean), *others]
    return [
        "* lowest, so best, of its column. Over the three tasks, the mean loss of pcb is",
        *(f"  {_apart(pcb, row)} {_called(row)}" for row in told),
        f"(one standard error over held-out texts). {GENERAL.capitalize()} is what the base has "
        "read;",
        "seed and texts move these figures: a demonstration, not a benchmark.",
        *_shortened(results.schedule),
    ]


def _shortened(schedule: Schedule) -> list[str]:
    usual = Schedule()
    steps, wanted = (f"{s.base_steps} and {s.expert_steps}" for s in (schedule, usual))
    told = f"Base and experts took {steps} steps here; what the documentation shows took {wanted}."
    return [] if schedule == usual else [told]


def _apart(pcb: Row, row: Row) -> str:
    side = "better than" if pcb.mean < row.mean else "worse than"
    return f"{abs(pcb.mean - row.mean):.3f} \u00b1 {row.error:.3f} {side}"


def _called(row: Row) -> str:
    names = {"base": "the base", "expert": f"the best expert, the {row.name}"}
    return names.get(row.kind, row.name).replace("the expert", "that")


def bars(results: Results) -> Iterator[str]:
    """Nats that each model gains over the base, as bars of characters."""
    base = results.row("base").mean
    most = max(base - row.mean for row in results.rows) or 1.0
    block = "\u2588" if _writes("\u2588") else "#"
    yield "what each gains over the base, in nats per token"
    for row in results.rows[1:]:
        gain = base - row.mean
        bar = block * round(_BAR * max(gain, 0.0) / most)
        colour = {"expert": "blue"}.get(row.kind, "yellow" if row.name == "pcb" else "green")
        yield f"{row.name:<{_NAME}}{coloured(bar, colour)} {gain:+.3f}"


def coloured(text: str, colour: str) -> str:
    """In colour on a terminal, unless NO_COLOR is set; click takes it out elsewhere."""
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=colour)


def _writes(character: str) -> bool:
    try:
        character.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def draw(results: Results, directory: pathlib.Path) -> pathlib.Path | None:
    """The same as a picture beside the results; none where matplotlib is not installed."""
    if not can_draw():
        return None
    figure, axis = blank(0.36 * len(results.rows) + 1.2)
    kinds = {"base": COLOURS[-1], "expert": COLOURS[0], "merge": COLOURS[2]}
    names = [row.name for row in results.rows]
    colours = [COLOURS[1] if row.name == "pcb" else kinds[row.kind] for row in results.rows]
    axis.barh(names, [row.mean for row in results.rows], color=colours, height=0.62, alpha=0.85)
    for task, marker in zip(TASKS, "os^", strict=True):
        values = [row.tasks[task] for row in results.rows]
        axis.plot(values, names, marker, color="black", markersize=4, alpha=0.55, label=task)
    axis.invert_yaxis()
    axis.set_xlim(left=0.9 * min(min(row.tasks.values()) for row in results.rows))
    axis.set_xlabel("loss on held-out text, nats per token (bar: mean over the tasks)")
    axis.legend(fontsize=9, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    file = directory / PICTURE
    figure.savefig(file, dpi=150, metadata={"Software": None})
    return file


def next_commands(directory: pathlib.Path, *, can_draw: bool) -> list[str]:
    config, mine = (shlex.quote(str(directory / name)) for name in ("pcb.yml", "mine"))
    needs = "" if can_draw else " (needs pip install matplotlib)"
    told = [
        (f"mergekit-pcb check {config}", "what a merge reads, writes and takes"),
        (f"mergekit-pcb report {config} -o report", f"who won what, in figures{needs}"),
        (f"mergekit-yaml {config} {mine}", "with density or lambda changed in it"),
    ]
    width = max(len(command) for command, _ in told)
    return ["Next, try", *(f"  {command:<{width}}  # {why}" for command, why in told)]
