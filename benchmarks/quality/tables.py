"""Tables and figures of the records, as Markdown and PNG.

Every number is a mean over the seeds, with the standard deviation between them if there are
several. Leads are taken seed by seed before they are averaged, because seeds differ more than
methods do.
"""

from __future__ import annotations

import itertools
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from benchmarks.quality.experiments import BUILD, FROM_NOTHING, TIERS, Record, Row
from benchmarks.quality.methods import PCB, PCB_MODEL
from benchmarks.quality.suite import share
from mergekit_pcb.files import write_text

#: The two-sided 5 % points of Student's t for means of so many values.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
#: What a suite's data from elsewhere are.
ELSEWHERE = {
    "language": "text that nobody was trained on",
    "decoder": "text that nobody was trained on",
    "encoder": "finding the function, one of 128, that a docstring belongs to; accuracy in %",
}
#: Methods on pretrained models, the best first, as the paper of PCB-Merging found them; it ranks
#: all parameters of a model together.
PAPER_ORDER = "pcb", "ties", "task_arithmetic", "linear"
PAPER_SCOPE = "pcb, scope: model"
Rows = Callable[[Record], Sequence[Row]]


def write(records: Sequence[Record], folder: pathlib.Path) -> str:
    """Write ``tables.md`` and the figures; return the tables."""
    text = "\n".join(_tables(records))
    write_text(folder / "tables.md", text)
    _draw_sweeps(records, folder / "sweeps.png")
    _draw_counts(records, folder / "tasks.png")
    return text


def outside(records: Sequence[Record], stored: Sequence[Record]) -> list[str]:
    """Which averages are farther from the stored ones than training scatters.

    Compared are gains of searched methods over the base, averaged over the seeds at hand that are
    stored, too; the scatter is the standard deviation of such gains between all stored seeds.
    """
    found = []
    everyone = dict(_suites(stored))
    for suite, own in _suites(records):
        theirs = {record.seed: record for record in everyone.get(suite, ())}
        mine = {record.seed: record for record in own if record.seed in theirs}
        if not mine:
            found.append(f"{suite}: there is no stored record of these seeds")
            continue
        if any(record.data != theirs[seed].data for seed, record in mine.items()):
            found.append(f"{suite}: trained or evaluated on other data than the stored tables")
        gains = {seed: _gains(record) for seed, record in theirs.items()}
        for method in gains[next(iter(mine))]:
            spread = _deviation([gain[method] for gain in gains.values()])
            distance = statistics.mean(
                _gains(record)[method] - gains[seed][method] for seed, record in mine.items()
            )
            if abs(distance) > spread:
                found.append(f"{suite}, {method}: {distance:+.4f} away, spread {spread:.4f}")
    return found


def _gains(record: Record) -> dict[str, float]:
    """Of every searched method over the base, on test data."""
    base = _average(record.base)
    return {row.method: _average(row) - base for row in _searched(record)}


def summary(records: Sequence[Record]) -> Iterable[str]:
    """The normalised scores of every method and suite, at the first setting and searched."""
    suites = list(_suites(records))
    yield _line(
        [
            "model",
            *(f"{name}, {how}" for name, _ in suites for how in ("first setting", "searched")),
        ]
    )
    yield _line(["---", *["---:"] * (2 * len(suites))])
    first = [dict(_by_method(own, lambda record: record.first)) for _, own in suites]
    searched = [dict(_by_method(own, _searched)) for _, own in suites]
    for method in dict.fromkeys(name for found in searched for name in found):
        cells = [method]
        for number, (_, own) in enumerate(suites):
            for found in (first[number], searched[number]):
                rows = zip(own, found.get(method, ()), strict=False)
                values = [_normalised(record, row) for record, row in rows]
                cells.append(_percent(values) if values else "")
        yield _line(cells)


def _suites(records: Sequence[Record]) -> Iterable[tuple[str, list[Record]]]:
    for name in BUILD:
        own = [record for record in records if record.suite == name]
        if own:
            yield name, sorted(own, key=lambda record: record.seed)


def _tables(records: Sequence[Record]) -> Iterable[str]:
    yield "# Quality benchmark"
    yield ""
    for machine in dict.fromkeys(f"{record.machine}; {record.versions}" for record in records):
        yield f"{machine}.  "
    seeds = sorted({record.seed for record in records})
    minutes = sum(record.seconds for record in records) / 60
    tiers = ", ".join(dict.fromkeys(record.tier for record in records))
    yield f"Tier {tiers}, seeds {seeds}, {minutes:.0f} minutes in all; a stopped run's last part.  "
    yield "± is the standard deviation between seeds. Each trains anew, and draws new letters and"
    yield "other files for the encoder; the language's text and the digits are the same. Leads are"
    yield "taken seed by seed, + is better; a * stands where Student's t puts them beyond this"
    yield "scatter (p < 0.05, each)."
    yield "\n## Share of what the experts reach\n"
    bases = [
        f"{name} {_percent([_normalised(record, record.base) for record in own])}"
        for name, own in _suites(records)
    ]
    yield "Of their gain over the base, in loss or accuracy; of glyphs of their accuracy itself."
    yield f"The base: {', '.join(bases)}.\n"
    yield from summary(records)
    for name, own in _suites(records):
        first = own[0]
        what = "accuracy in %" if first.metric == "accuracy" else "loss in nats per token"
        yield f"\n## {name}: {what} on test data\n"
        yield "### Every method after the same search on validation data\n"
        effort = TIERS[first.tier].efforts[name]
        yield "One trial: a method that has nothing to set."
        if effort.weight_budget:
            yield f"Weights are searched afterwards (CMA-ES), in {effort.weight_budget} trials."
        if first.characters:
            yield "Characters: a linear classifier that counts them."
        yield ""
        yield from _table(own, _searched, with_tasks=True)
        yield "\n### The same, each task's share of its own expert\n"
        yield from _shares(own)
        if name not in FROM_NOTHING:
            yield "\n### Against the paper\n"
            yield "On pretrained models it finds each of these ahead of those after it. Density and"
            yield "lambda are those of both, over the seeds.\n"
            yield from _against_the_paper(own)
        if first.weighted:
            yield "\n### What the weights add, each to its own method\n"
            yield from _added(own)
        yield "\n### At the first setting, without any search\n"
        yield from _table(own, lambda record: record.first)
        for scope in effort.scopes_taken_apart:
            complete = {"tensor": PCB.name, "model": PCB_MODEL.name}[scope]
            yield f"\n### Parts of PCB left out, scope: {scope}\n"
            if effort.ablation_budget != effort.budget:
                yield f"PCB is the best of {effort.budget} trials, each variant of"
                yield f"{effort.ablation_budget}.\n"
            yield from _table(own, partial(_ablated, scope, complete), reference=complete)
        yield "\n### Density and lambda: the best cells of the sweep, on validation data\n"
        yield from _best_cells(own)
        for method in (PCB, PCB_MODEL) if first.clip else ():
            yield f"\n### clip, at the best density and lambda of {method.name}\n"
            yield from _table(own, partial(_clipped, method.name), reference="clip: 0.0001")
        for start in ("usual start", "best start") if first.adapted else ():
            yield f"\n### AdaMerging: coefficients without labels, {start}\n"
            yield from _table(own, partial(_adapted, start), reference=f"fixed, {start}")
        if first.tasks_merged:
            yield f"\n### Some of the tasks, {effort.some_budget} trials\n"
            of = "The first and the last ones" if effort.ways == 2 else "The first ones"
            yield f"{of} of an order that each seed draws. What was chosen is the median"
            yield "over seeds and choices of tasks, with the least and the greatest.\n"
            yield from _counts(own)
            yield ""
            yield from _choices_by_count(own)
        if first.base.answered:
            yield "\n### The right one of four continuations: accuracy in %\n"
            yield from _beside(own, "accuracy", lambda row: row.answered)
        if first.base.elsewhere:
            yield f"\n### Elsewhere: {ELSEWHERE[name]}\n"
            yield from _beside(own, first.metric, lambda row: row.elsewhere)
        yield "\n### What the searches chose\n"
        yield from _gains_of_searches(own)
        yield from _choices(own)
    yield ""


def _searched(record: Record) -> list[Row]:
    return [*record.searched, *record.weighted]


def _by_method(records: Sequence[Record], rows: Rows) -> Iterable[tuple[str, list[Row]]]:
    """A method's name and its row of every seed; those that some record lacks are left out."""
    found = [{row.method: row for row in rows(record)} for record in records]
    for method in found[0]:
        if all(method in own for own in found):
            yield method, [own[method] for own in found]


def _table(
    records: Sequence[Record],
    rows: Rows,
    reference: str = "pcb",
    *,
    with_tasks: bool = False,
) -> Iterable[str]:
    first = records[0]
    heading = ["model", "average", "normalised", f"against {reference}"]
    heading += ["trials", *first.tasks] if with_tasks else []
    yield _line(heading)
    yield _line(["---", *["---:"] * (len(heading) - 1)])
    methods = list(_by_method(records, rows))
    if with_tasks:
        individual = [_plain(record.individual) for record in records]
        methods = [
            ("base", [record.base for record in records]),
            ("each task's own expert", individual),
            *methods,
        ]
        if first.characters:
            counted = [_plain(record.characters) for record in records]
            methods.insert(0, ("characters", counted))
    against = dict(methods)[reference]
    for name, found in methods:
        cells = [
            name,
            _shown(first.metric, [_average(row) for row in found]),
            _percent(
                [_normalised(record, row) for record, row in zip(records, found, strict=True)]
            ),
            "" if name == reference else _lead(first.metric, _leads(found, against)),
        ]
        if with_tasks:
            cells.append(str(len(first.trials[name])) if name in first.trials else "")
            cells += [
                _shown(first.metric, [row.test[task] for row in found], spread=False)
                for task in first.tasks
            ]
        yield _line(cells)


def _plain(scores: dict[str, float]) -> Row:
    """Test scores of what is no merge."""
    return Row(method="", knobs={}, validation=0.0, test=scores)


def _ablated(scope: str, complete: str, record: Record) -> list[Row]:
    whole = [row for row in record.searched if row.method == complete]
    return whole + [row for row in record.ablation if row.method.startswith(f"scope: {scope}")]


def _clipped(method: str, record: Record) -> list[Row]:
    return [
        row.model_copy(update={"method": f"clip: {row.knobs['clip']:g}"})
        for row in record.clip
        if row.method == method
    ]


def _adapted(start: str, record: Record) -> list[Row]:
    return [row for row in record.adapted if row.method.endswith(start)]


def _best_cells(records: Sequence[Record], most: int = 3) -> Iterable[str]:
    """The highest cells of the sweeps, on average, and their leads over the default's cell."""
    first = records[0]
    default = tuple(knob.first for knob in PCB.knobs)
    yield _line(["cell", "gain over the base", "against the default"])
    yield _line(["---", "---:", "---:"])
    for number, sweep in enumerate(first.sweeps):
        gains = {
            (density, scale): _gained(records, number, row, column)
            for row, density in enumerate(sweep.densities)
            for column, scale in enumerate(sweep.lambdas)
        }
        ordered = sorted(gains, key=lambda cell: -statistics.mean(gains[cell]))
        for cell in dict.fromkeys([*ordered[:most], default]):
            leads = [a - b for a, b in zip(gains[cell], gains[default], strict=True)]
            name = f"scope: {sweep.scope}, density {cell[0]:g}, lambda {cell[1]:g}"
            lead = "" if cell == default else _lead(first.metric, leads)
            yield _line([name, _lead(first.metric, gains[cell]), lead])


def _gained(records: Sequence[Record], sweep: int, row: int, column: int) -> list[float]:
    """Of every seed what a cell of a sweep gains over the base on validation data."""
    return [record.sweeps[sweep].scores[row][column] - record.base.validation for record in records]


def _shares(records: Sequence[Record]) -> Iterable[str]:
    """The normalised score of each task by itself."""
    tasks = records[0].tasks
    yield _line(["model", *tasks])
    yield _line(["---", *["---:"] * len(tasks)])
    for name, found in _by_method(records, _searched):
        cells = [
            _percent(
                [
                    share(
                        record.suite,
                        {task: row.test[task]},
                        record.base.test,
                        record.individual,
                    )
                    for record, row in zip(records, found, strict=True)
                ]
            )
            for task in tasks
        ]
        yield _line([name, *cells])


def _added(records: Sequence[Record]) -> Iterable[str]:
    """The lead of searched weights over the same method with all weights 1."""
    yield _line(["model", "lead"])
    yield _line(["---", "---:"])
    fixed = dict(_by_method(records, lambda record: record.searched))
    for name, found in _by_method(records, lambda record: record.weighted):
        leads = _leads(found, fixed[name.removesuffix(" + weights")])
        yield _line([name, _lead(records[0].metric, leads)])


def _against_the_paper(records: Sequence[Record]) -> Iterable[str]:
    """Whether each pair of methods is in the order of Du et al., tables 2 and 3."""
    yield _line(["pair", "setting", "lead", "found", "density", "lambda"])
    yield _line(["---", "---", "---:", "---", "---", "---"])
    ways: dict[str, Rows] = {"first": lambda record: record.first, "searched": _searched}
    pairs = [(PAPER_SCOPE, behind) for behind in PAPER_ORDER[1:]]
    for ahead, behind in (*itertools.combinations(PAPER_ORDER, 2), *pairs):
        for setting, rows in ways.items():
            found = dict(_by_method(records, rows))
            if not {ahead, behind} <= found.keys():
                continue
            leads = _leads(found[ahead], found[behind])
            right, lead = sum(own > 0 for own in leads), _lead(records[0].metric, leads)
            if lead.endswith("*") and statistics.mean(leads) > 0:
                verdict = "yes, beyond scatter"
            else:
                verdict = f"in {right} of {len(leads)} seed{'s' * (len(leads) > 1)}"
            chosen = [_range(found, (ahead, behind), knob) for knob in ("density", "lambda")]
            yield _line([f"{ahead} > {behind}", setting, lead, verdict, *chosen])


def _range(found: dict[str, list[Row]], methods: Iterable[str], knob: str) -> str:
    """The values of a knob over the seeds, a method after the other."""
    cells = []
    for method in methods:
        values = {row.knobs[knob] for row in found[method] if knob in row.knobs}
        ends = sorted({min(values), max(values)}) if values else ()
        cells.append("–".join(f"{end:g}" for end in ends) or "none")
    return ", ".join(cells)


def _counts(records: Sequence[Record]) -> Iterable[str]:
    counts = list(records[0].tasks_merged)
    yield _line(["normalised", *(f"{count} tasks" for count in counts)])
    yield _line(["---", *["---:"] * len(counts)])
    for number, name in _names_of_some(records):
        yield _line([name, *(_percent(_of_some(records, count, number)) for count in counts)])


def _names_of_some(records: Sequence[Record]) -> list[tuple[int, str]]:
    (choice, *_), *_ = records[0].tasks_merged.values()
    return [(number, row.method) for number, row in enumerate(choice)]


def _of_some(records: Sequence[Record], count: int, number: int) -> list[float]:
    """Normalised scores with so many tasks: of every seed the mean over its choices of tasks."""
    return [
        statistics.mean(
            _normalised(record, choice[number]) for choice in record.tasks_merged[count]
        )
        for record in records
    ]


def _choices_by_count(records: Sequence[Record]) -> Iterable[str]:
    counts = list(records[0].tasks_merged)
    yield _line(["chosen", *(f"{count} tasks" for count in counts)])
    yield _line(["---"] * (len(counts) + 1))
    for number, name in _names_of_some(records):
        if name not in (PCB.name, PCB_MODEL.name):
            continue
        for knob in ("density", "lambda"):
            cells = []
            for count in counts:
                values = [
                    choice[number].knobs[knob]
                    for record in records
                    for choice in record.tasks_merged[count]
                ]
                middle = statistics.median(values)
                cells.append(f"{middle:.2g} ({min(values):.2g}–{max(values):.2g})")
            yield _line([f"{name}, {knob}", *cells])


def _beside(
    records: Sequence[Record], metric: str, scores: Callable[[Row], dict[str, float]]
) -> Iterable[str]:
    """What is measured beside the scores on test data."""
    kinds = list(scores(records[0].base))
    yield _line(["model", *kinds])
    yield _line(["---", *["---:"] * len(kinds)])
    rows: Iterable[tuple[str, list[Row]]] = [
        ("base", [record.base for record in records]),
        *_by_method(records, _searched),
    ]
    for name, found in rows:
        cells = [_shown(metric, [scores(row)[kind] for row in found]) for kind in kinds]
        yield _line([name, *cells])


def _choices(records: Sequence[Record]) -> Iterable[str]:
    yield _line(["method", *(f"seed {record.seed}" for record in records)])
    yield _line(["---"] * (len(records) + 1))
    for name, found in _by_method(records, _searched):
        if found[0].knobs:
            yield _line(
                [name, *(", ".join(f"{k} {v:g}" for k, v in row.knobs.items()) for row in found)]
            )


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _gains_of_searches(records: Sequence[Record]) -> Iterable[str]:
    """What settings gained that searches put in the place of the first."""
    both = [pair for one in records for pair in zip(one.first, one.searched, strict=True)]
    gains = [
        (found.validation - first.validation, _average(found) - _average(first))
        for first, found in both
        if found.knobs != first.knobs
    ]
    if gains:
        scale, unit = (100, "points") if records[0].metric == "accuracy" else (1, "nats")
        chosen, tested = (scale * statistics.median(own) for own in zip(*gains, strict=True))
        better = sum(gain > 0 for _, gain in gains)
        yield f"{len(gains)} of {len(both)} searches left the first setting. At the median that"
        yield f"gained {chosen:.3f} {unit} on validation data and {tested:.3f} on test data, where"
        yield f"{better} of them gained anything.\n"


def _average(row: Row) -> float:
    return statistics.mean(row.test.values())


def _leads(rows: Sequence[Row], others: Sequence[Row]) -> list[float]:
    """Seed by seed, of averages on test data."""
    return [_average(row) - _average(other) for row, other in zip(rows, others, strict=True)]


def _normalised(record: Record, row: Row) -> float:
    return share(record.suite, row.test, record.base.test, record.individual)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _shown(metric: str, values: Sequence[float], *, spread: bool = True) -> str:
    scale, digits = (100, 1) if metric == "accuracy" else (-1, 3)
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean + _scatter(values, abs(scale), digits) if spread else mean


def _scatter(values: Sequence[float], scale: float, digits: int) -> str:
    return f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""


def _lead(metric: str, values: Sequence[float]) -> str:
    scale, digits = (100, 1) if metric == "accuracy" else (1, 3)
    mean, count = statistics.mean(values), len(values)
    beyond = count in STUDENT and abs(mean) > STUDENT[count] * _deviation(values) / count**0.5
    shown = f"{scale * mean:+.{digits}f}{_scatter(values, scale, digits)}"
    return f"{shown} *" if beyond else shown


def _percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.mean(values):.1f}{_scatter(values, 100, 1)} %"


def _draw_sweeps(records: Sequence[Record], file: pathlib.Path) -> None:
    """Heat maps of the gain over the base on validation data: suites down, scopes across."""
    from matplotlib.figure import Figure

    suites = list(_suites(records))
    scopes = [sweep.scope for sweep in records[0].sweeps]
    figure = Figure(figsize=(4.6 * len(scopes), 3.6 * len(suites)), layout="constrained")
    axes = figure.subplots(len(suites), len(scopes), squeeze=False)
    for line, (name, own) in zip(axes, suites, strict=True):
        unit, scale = ("points", 100) if own[0].metric == "accuracy" else ("nats per token", 1)
        gains = [
            [
                [
                    scale * statistics.mean(_gained(own, number, row, column))
                    for column in range(len(own[0].sweeps[number].lambdas))
                ]
                for row in range(len(own[0].sweeps[number].densities))
            ]
            for number in range(len(scopes))
        ]
        # The colours tell gains apart; losses may leave the scale.
        most = max(1e-3 * scale, *(value for gain in gains for values in gain for value in values))
        for number, (axis, gain) in enumerate(zip(line, gains, strict=True)):
            sweep = own[0].sweeps[number]
            picture = axis.imshow(gain, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
            axis.set_xticks(range(len(sweep.lambdas)), [f"{x:g}" for x in sweep.lambdas])
            axis.set_yticks(range(len(sweep.densities)), [f"{x:g}" for x in sweep.densities])
            axis.set(xlabel="lambda", ylabel="density", title=f"{name}, scope: {sweep.scope}")
            for y, values in enumerate(gain):
                for x, value in enumerate(values):
                    dark = abs(value) > 0.6 * most
                    axis.text(
                        x,
                        y,
                        f"{value:.{1 if scale > 1 else 2}f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if dark else "black",
                    )
        figure.colorbar(
            picture, ax=line, label=f"gain over the base on validation data, {unit}", extend="min"
        )
    figure.savefig(file, dpi=110)


def _draw_counts(records: Sequence[Record], file: pathlib.Path) -> None:
    """The normalised score by the number of tasks, a panel per suite."""
    from matplotlib.figure import Figure

    suites = [(suite, own) for suite, own in _suites(records) if own[0].tasks_merged]
    if not suites:
        return
    figure = Figure(figsize=(4.6 * len(suites), 3.6), layout="constrained")
    axes = figure.subplots(1, len(suites), squeeze=False)[0]
    for axis, (suite, own) in zip(axes, suites, strict=True):
        counts = list(own[0].tasks_merged)
        for number, name in _names_of_some(own):
            values = [_of_some(own, count, number) for count in counts]
            axis.errorbar(
                counts,
                [100 * statistics.mean(value) for value in values],
                [100 * _deviation(value) for value in values],
                label=name,
                marker="o",
                markersize=3,
                capsize=2,
            )
        axis.set_xticks(counts)
        axis.set(xlabel="tasks merged", ylabel="normalised score, %", title=suite)
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110)
