"""The methods, their knobs, and the one search that each of them gets.

All but Fisher merging and RegMean run through mergekit itself. The first trial of a search is one
usual setting: what the authors use where they say so, else a value that is often seen. The other
trials fill the box of the knobs evenly, and validation data choose.

Sources of the first settings: task arithmetic, arXiv 2212.04089 (0.4); TIES, arXiv 2306.01708 (0.2
and 1); DELLA's released command (drop rate 0.3, window 0.14, scale 1.1); RegMean, arXiv 2212.09849
(0.9); Model Breadcrumbs, arXiv 2312.06795 (a seventh kept, the largest 0.7 % left out, 0.3); SCE,
arXiv 2408.07990 (a tenth). DARE's authors merge with a drop rate of 0.2 and with the scale of task
arithmetic. For pcb it is the default of this package.
"""

from __future__ import annotations

import math
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file

import mergekit_pcb  # noqa: F401 - makes mergekit know the method
from benchmarks.quality import baselines
from benchmarks.quality.suite import StateDict, Suite
from mergekit_pcb.errors import PCBError

Knobs = dict[str, float]
#: Seconds of a merge from which on it is kept in memory until its test, and not made once more.
WORTH_HOLDING = 3.0
#: A setting that was tried, behind its mean score on validation data.
Trial = tuple[float, Knobs]


@dataclass(frozen=True)
class Knob:
    """A number that is searched from ``low`` to ``high``, evenly in its logarithm."""

    name: str
    first: float
    low: float
    high: float = 1.0

    def at(self, place: float) -> float:
        return round(math.exp(math.log(self.low) + place * math.log(self.high / self.low)), 4)


@dataclass(frozen=True)
class Switch:
    """What is on (1) or off (0); off first."""

    name: str
    first: float = 0.0
    low: float = 0.0
    high: float = 1.0

    def at(self, place: float) -> float:
        return float(place >= 0.5)


@dataclass(frozen=True)
class Choice:
    """One of a few values, the first setting among them."""

    name: str
    first: float
    values: tuple[float, ...]

    def at(self, place: float) -> float:
        return self.values[min(int(place * len(self.values)), len(self.values) - 1)]


@dataclass(frozen=True)
class Method:
    """A way to merge a suite's experts into one state dict."""

    name: str
    knobs: tuple[Knob | Switch | Choice, ...]
    merge: Callable[[Suite, Knobs], StateDict]

    def trials(self, budget: int, seed: int) -> list[Knobs]:
        """The settings to try, the first one first; a method without knobs has one."""
        tried = [{knob.name: knob.first for knob in self.knobs}]
        if self.knobs and budget > 1:
            engine = torch.quasirandom.SobolEngine(len(self.knobs), scramble=True, seed=seed)
            tried += [
                {knob.name: knob.at(x) for knob, x in zip(self.knobs, row, strict=True)}
                for row in engine.draw(budget - 1).tolist()
            ]
        return [knobs for number, knobs in enumerate(tried) if knobs not in tried[:number]]

    def searched(self, suite: Suite, budget: int, seed: int) -> list[Trial]:
        """Every trial, in the order of ``trials``."""

        def score(knobs: Knobs) -> float:
            def validate() -> float:
                began = time.monotonic()
                state = self.merge(suite, knobs)
                if time.monotonic() - began >= WORTH_HOLDING:
                    suite.hold(self.name, knobs, state)
                return suite.validation(state)

            key = ["validation", self.name, knobs, suite.tasks]
            found: float = suite.work.score(key, validate)
            return found

        return [(score(knobs), knobs) for knobs in self.trials(budget, seed)]


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest score, of equal ones the first."""
    return max(trials, key=lambda trial: trial[0] if math.isfinite(trial[0]) else -math.inf)


def by_mergekit(
    suite: Suite, method: str, parameters: dict[str, Any], *, with_base: bool = True
) -> StateDict:
    """Merge in memory, as mergekit-yaml would from files; or by mergekit-yaml, if there are any."""
    if suite.folders:
        return _by_command(suite, method, parameters, with_base=with_base)
    models = {f"expert {number}": expert for number, expert in enumerate(suite.experts)}
    torch.manual_seed(suite.seed)  # mergekit's own random methods draw from the global generator
    with torch.no_grad():
        if not with_base:
            return merge_state_dicts(models, method, parameters=parameters)
        models = {"base": suite.base, **models}
        return merge_state_dicts(models, method, base="base", parameters=parameters)


def _by_command(
    suite: Suite, method: str, parameters: dict[str, Any], *, with_base: bool
) -> StateDict:
    base, *experts = map(str, suite.folders)
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": expert} for expert in experts],
        "parameters": parameters,
        "dtype": "float32",
    }
    if with_base:
        config["base_model"] = base
    with tempfile.TemporaryDirectory(dir=suite.folders[0].parent) as folder:
        file, out = pathlib.Path(folder) / "config.yml", pathlib.Path(folder) / "merged"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        stock = str(pathlib.Path(sys.executable).parent / "mergekit-yaml")
        command = [stock, str(file), str(out), "--random-seed", str(suite.seed), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise PCBError(
                f"merge by {method}",
                f"mergekit-yaml said: {said[-1]}",
                "report this as a defect of the benchmark",
            )
        merged: StateDict = {}
        for shard in sorted(out.glob("*.safetensors")):
            merged.update(load_file(shard))
    return merged


def _density(first: float) -> Knob:
    return Knob("density", first, 0.02)


def _lambda(first: float) -> Knob:
    return Knob("lambda", first, 0.1, 3.0)


def _task_vectors(name: str, *knobs: Knob) -> Method:
    """One of mergekit's methods that weigh task vectors; every weight is 1."""
    return Method(name, knobs, lambda suite, k: by_mergekit(suite, name, {"weight": 1.0, **k}))


def _della(suite: Suite, knobs: Knobs) -> StateDict:
    """``spread`` is how much of its room epsilon takes: densities must stay within 0 and 1."""
    density = knobs["density"]
    epsilon = knobs["spread"] * 2 * min(density, 1 - density)
    parameters = {"weight": 1.0, "density": density, "epsilon": epsilon, "lambda": knobs["lambda"]}
    return by_mergekit(suite, "della", parameters)


def _pcb(name: str, scope: str, *knobs: Knob) -> Method:
    return Method(
        name,
        knobs,
        lambda suite, k: by_mergekit(suite, "pcb", {"scope": scope, "seed": suite.seed, **k}),
    )


PCB = _pcb("pcb", "tensor", _density(0.1), _lambda(1.0))
PCB_MODEL = _pcb("pcb, scope: model", "model", _density(0.1), _lambda(1.0))
LINEAR = Method(
    "linear", (), lambda suite, _: by_mergekit(suite, "linear", {"weight": 1.0}, with_base=False)
)
TASK_ARITHMETIC = _task_vectors("task_arithmetic", _lambda(0.4))
TIES = _task_vectors("ties", _density(0.2), _lambda(1.0))
FISHER = Method(
    "Fisher",
    (Choice("floor", 1e-6, (1e-10, 1e-8, 1e-6)),),
    lambda suite, k: baselines.fisher(suite, k["floor"]),
)
METHODS: Sequence[Method] = (
    LINEAR,
    Method(
        "model_stock",
        (Switch("filter_wise"),),
        lambda suite, k: by_mergekit(suite, "model_stock", {"filter_wise": bool(k["filter_wise"])}),
    ),
    TASK_ARITHMETIC,
    TIES,
    _task_vectors("dare_linear", _density(0.8), _lambda(0.4)),
    _task_vectors("dare_ties", _density(0.8), _lambda(0.4)),
    Method(
        "della",
        (Knob("density", 0.7, 0.02, 0.98), Knob("spread", 0.117, 0.02, 0.49), _lambda(1.1)),
        _della,
    ),
    _task_vectors("breadcrumbs", _density(0.14), Knob("gamma", 0.007, 0.001, 0.05), _lambda(0.3)),
    Method(
        "sce",
        (Knob("select_topk", 0.1, 0.02),),
        lambda suite, k: by_mergekit(suite, "sce", dict(k)),
    ),
    FISHER,
    Method(
        "RegMean",
        (Knob("off_diagonal", 0.9, 0.1),),
        lambda suite, k: baselines.regmean(suite, k["off_diagonal"]),
    ),
    PCB,
    PCB_MODEL,
    _pcb(
        "pcb + DARE",
        "tensor",
        _density(0.1),
        _lambda(1.0),
        Knob("dare_density", 0.5, 0.1),
    ),
)
