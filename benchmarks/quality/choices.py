"""``python -m benchmarks.quality.choices``: what was decided on seeds that no table reports.

On validation data, of one seed: whether convolutions are solved for, whether fused matrices are
evened part by part, whether AdaMerging learns through the spectrum, and rules for lambda.
"""

from __future__ import annotations

import math
import pathlib
import re
import statistics
from collections.abc import Callable, Iterator, Sequence

import click
import torch

from benchmarks.quality.baselines import agreement, evened, solution
from benchmarks.quality.experiments import (
    BUILD,
    FROM_NOTHING,
    RATE,
    START,
    TIERS,
    TIERS_FROM_NOTHING,
)
from benchmarks.quality.suite import DISTANCES, StateDict, Suite, share
from benchmarks.quality.tables import _line
from benchmarks.quality.without_data import matrices_of
from mergekit_pcb import adamerge, combine, contributions
from mergekit_pcb.files import write_text
from mergekit_pcb.tools import adamerge as adamerging

ANCHOR = 0.1
LAMBDAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.5)
FUSED = re.compile(r"(.*layers\.\d+)\..*?(q|k|v|gate|up)_proj")


class Case:
    """A suite, taken apart: task vectors and PCB's merge as ``[out, in]``, in float64."""

    def __init__(self, name: str, suite: Suite) -> None:
        self.name, self.suite, self.matrices = name, suite, matrices_of(suite)
        parts = contributions(suite.base, suite.experts)
        self.prior = {n: sum(p[n] for p in parts).double().flatten(1) for n in self.matrices}
        self.rest = {n: sum(p[n] for p in parts) for n in parts[0]}
        self.taus = {
            n: [(e[n] - suite.base[n]).double().flatten(1) for e in suite.experts]
            for n in self.matrices
        }
        self.base = suite.scores(suite.base, "validation")
        self.own = suite.individual("validation")

    def solved(self, name: str) -> torch.Tensor:
        return solution(self.taus[name], self.prior[name], ANCHOR)

    def merged(self, name: str) -> torch.Tensor:
        return evened(self.solved(name), agreement(self.taus[name]))

    def state(self, matrices: StateDict, scale: float | dict[str, float] = 1.0) -> StateDict:
        """A model whose other tensors are PCB's; ``scale`` is one, or one for each matrix."""
        scales = scale if isinstance(scale, dict) else {}
        common = statistics.mean(scales.values()) if isinstance(scale, dict) else scale
        found = {}
        for name, base in self.suite.base.items():
            delta = matrices.get(name, self.rest[name]).reshape(base.shape).float()
            found[name] = base + scales.get(name, common) * delta
        return found

    def share(self, state: StateDict) -> float:
        """Of what the experts reach, in percent."""
        scores = self.suite.scores(state, "validation")
        return 100 * share(self.suite.name, scores, self.base, self.own)


def convolutions(cases: Sequence[Case]) -> Iterator[str]:
    yield "\n## Convolutions, by their flattened input\n"
    yield _line(["", "solved and evened", "solved", "left to PCB"])
    yield _line(["---", "---:", "---:", "---:"])
    for case in cases:
        flat = [n for n in case.matrices if case.suite.base[n].ndim > 2]
        if not flat:
            continue
        merged = {n: case.merged(n) for n in case.matrices}
        ways = ({}, {n: case.solved(n) for n in flat}, {n: case.prior[n] for n in flat})
        yield _line([case.name, *(f"{case.share(case.state({**merged, **w})):.1f}" for w in ways)])


def fused(cases: Sequence[Case]) -> Iterator[str]:
    yield "\n## Query, key and value in one matrix, gate and up in one\n"
    yield "As some models store them; here put together, from models that do not.\n"
    yield _line(["", "apart", "fused", "fused, each part's spectrum by itself"])
    yield _line(["---", "---:", "---:", "---:"])
    for case in cases:
        groups: dict[tuple[str, bool], list[str]] = {}
        for name in case.matrices:
            if found := FUSED.match(name):
                groups.setdefault((found[1], found[2] in "qkv"), []).append(name)
        if not groups:
            continue
        apart = {n: case.merged(n) for n in case.matrices}
        whole, by_part = dict(apart), dict(apart)
        for names in groups.values():
            sizes = [len(case.prior[n]) for n in names]
            taus = [torch.cat(t) for t in zip(*(case.taus[n] for n in names), strict=True)]
            found_ = solution(taus, torch.cat([case.prior[n] for n in names]), ANCHOR)
            even = evened(found_, agreement(taus))
            for name, part, own in zip(
                names, torch.split(even, sizes), torch.split(found_, sizes), strict=True
            ):
                whole[name] = part
                by_part[name] = evened(own, agreement(case.taus[name]))
        cells = [f"{case.share(case.state(way)):.1f}" for way in (apart, whole, by_part)]
        yield _line([case.name, *cells])


def adapted(cases: Sequence[Case], epochs: int) -> Iterator[str]:
    yield "\n## AdaMerging: coefficients learned through the spectrum, or before it\n"
    yield "On validation images without their labels; shares of the same images."
    yield ""
    yield _line(["", "start", "fixed", "per", "through", "before"])
    yield _line(["---", "---:", "---:", "---", "---:", "---:"])
    for case in cases:
        suite = case.suite
        if suite.metric != "accuracy":
            continue
        parts = contributions(suite.base, suite.experts, refine="solve", architecture=suite.model)
        for start in (1.0, START):
            fixed = case.share(combine(suite.base, parts, [start] * len(suite.experts)))
            for granularity in ("task", "layer"):
                shares = []
                for known in (parts, type(parts)(parts.experts)):  # with the spectra, and without
                    adamerging.contributions = lambda *_, known=known, **__: known
                    found = adamerge(
                        suite.model,
                        suite.base,
                        suite.experts,
                        suite.unlabelled(),
                        granularity,  # type: ignore[arg-type]
                        epochs=epochs,
                        learning_rate=RATE,
                        start=start,
                    )
                    state = combine(suite.base, parts, found.coefficients)
                    shares.append(f"{case.share(state):.1f}")
                yield _line([case.name, f"{start:g}", f"{fixed:.1f}", granularity, *shares])
        adamerging.contributions = contributions


def rules(cases: Sequence[Case]) -> Iterator[str]:
    yield "\n## Rules for lambda that need no data\n"
    yield "The share at each rule's lambda (in brackets; the mean, where every matrix has its own),"
    yield "and the best of a grid. A rule worth a parameter is within a point of it everywhere.\n"
    names = list(_RULES)
    yield _line(["", "lambda 1", *names, "best"])
    yield _line(["---", *["---:"] * (len(names) + 2)])
    worst = dict.fromkeys(["lambda 1", *names], 0.0)
    for case in cases:
        merged = {n: case.merged(n) for n in case.matrices}
        grid = {x: case.share(case.state(merged, x)) for x in LAMBDAS}
        best = max(grid, key=lambda x: grid[x])
        cells = []
        for name in worst:
            scale = 1.0 if name == "lambda 1" else _RULES[name](case, merged)
            reached = case.share(case.state(merged, scale))
            mean = statistics.mean(scale.values()) if isinstance(scale, dict) else scale
            worst[name] = max(worst[name], grid[best] - reached)
            cells.append(f"{reached:.1f} ({mean:.2f})")
        yield _line([case.name, *cells, f"{grid[best]:.1f} ({best:g})"])
    yield _line(["at worst behind", *(f"{value:.1f}" for value in worst.values()), ""])


def _least_squares(case: Case, merged: StateDict) -> float:
    """The scale that acts most like the experts, on the inputs that their task vectors tell."""
    above = below = 0.0
    for name, matrix in merged.items():
        for tau in case.taus[name]:
            gram = tau.T @ tau / tau.square().sum()
            above += float((matrix @ gram * tau).sum())
            below += float((matrix @ gram * matrix).sum())
    return above / below


def _explained(case: Case, merged: StateDict) -> float:
    """The part of the experts' actions that the merge reaches: one minus the relative residual."""
    left = whole = 0.0
    for name, matrix in merged.items():
        for tau in case.taus[name]:
            gram = tau.T @ tau / tau.square().sum()
            left += float(((matrix - tau) @ gram * (matrix - tau)).sum())
            whole += float((tau @ gram * tau).sum())
    return 1 - left / whole


def _as_far_as_an_expert(case: Case, merged: StateDict) -> float:
    """The merge goes as far from the base as the experts do, in norm."""
    ours = sum(float(matrix.square().sum()) for matrix in merged.values())
    theirs = sum(float(t.square().sum()) for n in merged for t in case.taus[n])
    return math.sqrt(theirs / len(case.suite.experts) / ours)


def _disagreement(case: Case, merged: StateDict) -> dict[str, float]:
    """``Σ‖τ‖² / ‖Σ τ‖²``, of each matrix: what the tasks share is not counted again."""
    count = len(case.suite.experts)
    return {name: 1 / (count * agreement(case.taus[name]) ** 2) for name in merged}


def _nuclear(case: Case, merged: StateDict) -> dict[str, float]:
    """The sum of the singular values stays, not of their squares, of each matrix."""
    return {
        name: float(
            torch.linalg.matrix_norm(case.solved(name), "nuc")
            / torch.linalg.matrix_norm(matrix, "nuc")
        )
        for name, matrix in merged.items()
    }


_RULES: dict[str, Callable[[Case, StateDict], float | dict[str, float]]] = {
    "least squares": _least_squares,
    "explained": _explained,
    "as far as an expert": _as_far_as_an_expert,
    "Σ‖τ‖² / ‖Στ‖²": _disagreement,
    "nuclear norm kept": _nuclear,
}


@click.command()
@click.option("--seed", default=0, show_default=True, help="One that no table reports.")
@click.option("--tier", type=click.Choice(TIERS_FROM_NOTHING), default="full", show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    default=pathlib.Path("choices"),
    show_default=True,
    help="Where the text goes, and the trained models, which are not trained again.",
)
def main(seed: int, tier: str, out: pathlib.Path) -> None:
    """Train both suites at every distance, and print what speaks for each choice."""
    if seed in TIERS["full"].seeds:
        raise click.BadParameter("tables report it", param_hint="--seed")
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    cases = [case for name in FROM_NOTHING for case in _cases(name, seed, tier, out)]
    lines = ["# What was chosen without the reported seeds", "", f"Tier {tier}, seed {seed}."]
    for part in (
        convolutions(cases),
        fused(cases),
        rules(cases),
        adapted(cases, TIERS[tier].efforts["glyphs"].epochs),
    ):
        for line in part:
            click.echo(line)
            lines.append(line)
    write_text(out / "choices.md", "\n".join(lines) + "\n")


def _cases(name: str, seed: int, tier: str, out: pathlib.Path) -> Iterator[Case]:
    files = [out / f"{name}-{seed}-{d.name.replace(' ', '_')}-{tier}.pt" for d in DISTANCES]
    suites: Iterator[Suite] | None = None
    if not all(file.exists() for file in files):
        suites = BUILD[name](seed, TIERS[tier].efforts[name].schedule, DISTANCES)
    for distance, file in zip(DISTANCES, files, strict=True):
        if suites is not None:
            torch.save(next(suites), file)
        yield Case(f"{name}, {distance.name}", torch.load(file, weights_only=False))


if __name__ == "__main__":
    main()
