"""The pictures of a search, in the report's style, where matplotlib is installed."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mergekit_pcb.files import written_whole
from mergekit_pcb.tools.figures import COLOURS, blank, can_draw
from mergekit_pcb.tools.search_space import Found, Trial, require_optuna, without_remarks

if TYPE_CHECKING:
    from mergekit_pcb.tools.search_study import Study

#: Fewer scored trials say nothing of what matters.
FEWEST = 8
#: Colours of models, apart from those of trials and the front.
_APART = (7, 1, 2, 3, 5, 6)
#: Panels of one figure.
MOST = 6


def history(study: Study, found: Found, file: pathlib.Path) -> bool:
    """Scores over trials and over each value, the values that matter most first."""
    scored = [trial for trial in found.trials if trial.score is not None]
    if not scored or not _can_draw():
        return False
    weight = importance(study)
    names = sorted(weight, key=lambda name: (-weight[name], name))[: MOST - 1]
    rows = -(-(1 + len(names)) // 3)
    figure, axes = blank(2.6 * rows, 3, rows=rows)
    places = list(axes.flat)
    numbers, scores = [t.trial for t in scored], [t.score or 0.0 for t in scored]
    best = list(itertools.accumulate(scores, min if found.minimize else max))
    places[0].plot(numbers, scores, "o", color=COLOURS[4], markersize=4, label="trial")
    places[0].step(numbers, best, where="post", color=COLOURS[0], label="best so far")
    places[0].set_xlabel("trial", fontsize=9)
    places[0].set_ylabel("score", fontsize=9)
    places[0].legend(fontsize=8, frameon=False)
    start = min(trial.trial for trial in scored)
    for axis, name in zip(places[1:], names, strict=False):
        values = [_value(trial, name) for trial in scored]
        axis.scatter(values, scores, c=numbers, cmap="viridis", s=16)
        marked = [(v, s) for v, s, n in zip(values, scores, numbers, strict=True) if n == start]
        axis.plot(*marked[0], "x", color=COLOURS[5], markersize=8)
        told = "" if len(scored) < FEWEST else f" (importance {weight[name]:.2f})"
        axis.set_xlabel(f"{name}{told}", fontsize=9)
    places[1].set_title("dark: early trials; ✕: the start", fontsize=8)
    for axis in places[1 + len(names) :]:
        axis.set_visible(False)
    _save(figure, file)
    return True


def importance(study: Study) -> dict[str, float]:
    """How much of the score each value decides, by PED-ANOVA; alike where trials are few."""
    optuna = require_optuna()
    trials = [t for t in study.optuna_study.get_trials(deepcopy=False) if t.values]
    names = sorted(trials[0].params)
    if len(trials) < FEWEST or len({trial.value for trial in trials}) == 1 or len(names) == 1:
        return dict.fromkeys(names, 1 / len(names))
    with without_remarks():
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study.optuna_study, evaluator=evaluator)
    return {name: float(found.get(name, 0.0)) for name in names}


def front(
    names: Sequence[str],
    found: Found,
    best: Sequence[Trial],
    others: Mapping[str, Sequence[float]],
    file: pathlib.Path,
) -> bool:
    """Each two scores: the trials, those that none beats, and the models they were made of."""
    if not _can_draw():
        return False
    pairs = list(itertools.combinations(range(len(names)), 2))[:MOST]
    columns = min(len(pairs), 3)
    rows = -(-len(pairs) // columns)
    figure, axes = blank(4.2 * rows, columns, rows=rows)
    places = list(axes.flat) if len(pairs) > 1 else [axes]
    for axis, (i, j) in zip(places, pairs, strict=False):
        tried = [trial.scores for trial in found.trials if trial.scores]
        axis.plot(*_columns(tried, i, j), "o", color=COLOURS[4], markersize=4, label="trial")
        line = sorted(trial.scores for trial in best if trial.scores)
        axis.plot(*_columns(line, i, j), "o-", color=COLOURS[0], label="Pareto front")
        for number, (model, scores) in enumerate(others.items()):
            colour = COLOURS[_APART[number % len(_APART)]]
            axis.plot(scores[i], scores[j], "s", color=colour, label=model)
        axis.set_xlabel(names[i], fontsize=9)
        axis.set_ylabel(names[j], fontsize=9)
    for axis in places[len(pairs) :]:
        axis.set_visible(False)
    places[0].legend(fontsize=8, frameon=False)
    _save(figure, file)
    return True


def table(
    names: Sequence[str], best: Sequence[Trial], others: Mapping[str, Sequence[float]]
) -> str:
    """The front and the models it was made of, in Markdown."""
    rows = [[f"trial {trial.trial}", *(trial.scores or [])] for trial in best]
    rows += [[model, *scores] for model, scores in others.items()]
    lines = [["model", *names], ["---", *["---:"] * len(names)]]
    lines += [[str(row[0]), *(f"{value:.5g}" for value in row[1:])] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _value(trial: Trial, name: str) -> Any:
    if name.startswith("weight "):
        return trial.weights[int(name.removeprefix("weight ")) - 1]
    return trial.shared[name]


def _columns(scores: Sequence[Sequence[float]], i: int, j: int) -> tuple[list[float], list[float]]:
    return [row[i] for row in scores], [row[j] for row in scores]


def _can_draw() -> bool:
    found = can_draw()
    if not found:
        tqdm.write("no pictures: pip install matplotlib")
    return found


def _save(figure: Any, file: pathlib.Path) -> None:
    with written_whole(file) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120, metadata={"Software": None})
