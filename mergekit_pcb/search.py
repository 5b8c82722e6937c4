"""The paper's evolution strategy: per-task weights by CMA-ES against a score of your own.

Statistics are measured once. The result is linear in the weights, so what each task
contributes is computed once, too, and a trial is one weighted sum of files. Every trial is
on disk before the next begins, and the same seed tries the same weights, so a search that was
killed goes on by replaying its log.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from mergekit_pcb import checkpoints
from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import write_text
from mergekit_pcb.merging import contributions as contributions_of
from mergekit_pcb.method import observed
from mergekit_pcb.state_dicts import Model, StateDict, combine, contributions
from mergekit_pcb.statistics import Statistics
from mergekit_pcb.task_vectors import Aligned

FORMAT = "mergekit-pcb search, version 1"
#: The paper's bounds for language models (0.8 to 1.3 for vision), and ours for the others.
BOUNDS = {"weight": (0.5, 3.0), "lambda": (0.5, 2.5), "density": (0.01, 0.6)}
#: Standard deviation of the first trials, of the width of the bounds.
STEP = 0.2
DIGITS = 4
NUMBER = re.compile(
    r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\bnan\b|[-+]?\binf\b", re.IGNORECASE
)


class Trial(BaseModel):
    """One point that was tried; the score is missing where the evaluation failed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trial: int
    weights: list[float]
    #: ``lambda`` and ``density``, where they are searched.
    shared: dict[str, float] = {}
    score: float | None
    error: str | None = None
    seconds: float


@dataclass(frozen=True)
class Found:
    """The best trial and all of them; :attr:`best` is ``None`` where every one failed."""

    trials: list[Trial]
    minimize: bool

    @property
    def best(self) -> Trial | None:
        scored = [trial for trial in self.trials if trial.score is not None]
        sign = 1 if self.minimize else -1
        return min(scored, key=lambda trial: sign * (trial.score or 0.0), default=None)


@dataclass(frozen=True)
class Space:
    """What is searched: where it starts, and between which bounds; no weights: not those."""

    weights: tuple[float, ...]
    shared: tuple[tuple[str, float], ...] = ()
    bounds: tuple[float, float] = BOUNDS["weight"]

    def axes(self) -> list[tuple[str, float, float, float]]:
        """Name, start, lowest and highest value of every number that is searched."""
        found = [(f"weight of model {i + 1}", w, *self.bounds) for i, w in enumerate(self.weights)]
        found += [(name, value, *BOUNDS[name]) for name, value in self.shared]
        for name, start, low, high in found:
            if not low <= start <= high:
                raise PCBError(
                    f"search the {name}",
                    f"it starts at {start:g}, outside of {low:g} to {high:g}",
                    "start it within, or set other bounds",
                )
        return found


def search(
    evaluate: Callable[[Sequence[float], dict[str, float]], float],
    space: Space,
    budget: int,
    *,
    seed: int = 0,
    minimize: bool = False,
    past: Sequence[Trial] = (),
) -> Iterator[Trial]:
    """Yield trials as they end, the start first and those of ``past`` without evaluating them.

    ``evaluate`` takes weights and shared values and returns a score; what it raises as
    :class:`EvaluationError`, and scores that are no finite numbers, make a failing trial, which
    counts as worst. The global generators are not touched.
    """
    axes = space.axes()
    lows, highs = np.array([a[2] for a in axes]), np.array([a[3] for a in axes])
    begin = (np.array([a[1] for a in axes]) - lows) / (highs - lows)
    count = 0

    def attempt(place: Any) -> Trial:
        nonlocal count
        count += 1
        values = [round(float(v), DIGITS) for v in lows + np.array(place) * (highs - lows)]
        split = len(values) - len(space.shared)
        weights = values[:split]
        shared = {name: v for (name, _), v in zip(space.shared, values[split:], strict=True)}
        if count <= len(past):
            trial = past[count - 1]
            if (trial.weights, trial.shared) != (weights, shared):
                raise PCBError(
                    "resume the search",
                    f"its trial {count} tried {trial.weights} where now {weights} would be tried",
                    "use the versions it was begun with, or begin anew",
                )
            return trial
        started, score, error = time.monotonic(), None, None
        try:
            score = float(evaluate(weights, shared))
            if not math.isfinite(score):
                score, error = None, f"the score is {score}"
        except EvaluationError as failure:
            error = str(failure)
        return Trial(
            trial=count,
            weights=weights,
            shared=shared,
            score=score,
            error=error,
            seconds=round(time.monotonic() - started, 3),
        )

    yield attempt(begin)
    strategy = _strategy(begin, seed)
    while count < budget:
        places, losses = strategy.ask(), []
        for place in places:
            if count == budget:
                return
            trial = attempt(place[: len(axes)])
            yield trial
            sign = 1 if minimize else -1
            losses.append(math.inf if trial.score is None else sign * trial.score)
        strategy.tell(places, losses)


class EvaluationError(Exception):
    """An evaluation failed; the search goes on."""


def _cma() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot draw plots
            import cma
    except ImportError:
        raise PCBError("search", "the package cma is missing", "pip install cma") from None
    return cma


def _strategy(begin: Any, seed: int) -> Any:
    random = np.random.RandomState(seed)
    # CMA-ES wants two dimensions; a second that nobody looks at does no harm.
    begin = begin if len(begin) > 1 else np.array([begin[0], 0.5])
    options = {
        "bounds": [0.0, 1.0],
        "verbose": -9,
        "seed": np.nan,  # leave numpy's global generator alone
        "randn": lambda *shape: random.randn(*shape),
    }
    return _cma().CMAEvolutionStrategy(begin, STEP, options)


# --- In memory --------------------------------------------------------------------------------


def search_weights(
    score: Callable[[StateDict], float],
    base: Model,
    experts: Sequence[Model],
    *,
    budget: int = 100,
    start: float | Sequence[float] = 1.0,
    bounds: tuple[float, float] = BOUNDS["weight"],
    scale: float = 1.0,
    minimize: bool = False,
    seed: int = 0,
    quiet: bool = True,
    **parameters: Any,
) -> Found:
    """Search per-task weights for models in memory.

    ``score`` takes a merged state dict and returns a number, better if higher (lower with
    ``minimize``). ``parameters`` are those of
    :func:`~mergekit_pcb.state_dicts.contributions`, which runs once; a trial is one weighted
    sum. ``budget`` counts calls of ``score``; the first is at ``start``. An exception of
    ``score`` ends the search.
    """
    _cma()  # complain before the work
    parts = contributions(base, experts, **parameters)
    begin = [start] * len(parts) if isinstance(start, (int, float)) else list(start)
    space = Space(tuple(map(float, begin)), bounds=bounds)

    def evaluate(weights: Sequence[float], _: dict[str, float]) -> float:
        return score(combine(base, parts, weights, scale))

    found = Found([], minimize)
    trials = search(evaluate, space, budget, seed=seed, minimize=minimize)
    for trial in tqdm(trials, total=budget, desc="Searching", disable=True if quiet else None):
        found.trials.append(trial)
    return found


# --- Files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A search over a configuration for mergekit-yaml or mergekit-pytorch."""

    configuration: dict[str, Any]
    command: str
    output: pathlib.Path
    folder: pathlib.Path
    searched: tuple[str, ...] = ("weight",)
    bounds: tuple[float, float] = BOUNDS["weight"]
    budget: int = 100
    seed: int = 0
    minimize: bool = False
    timeout: float | None = None

    def digest(self) -> str:
        """Of everything that a log belongs to; a larger budget goes on with the same."""
        told = [self.configuration, self.command, self.searched, self.bounds, self.seed]
        text = json.dumps([*told, self.minimize], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def log(self) -> pathlib.Path:
        return self.folder / "trials.jsonl"


def tasks_of(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    """The models of a configuration that are not its base."""
    models = configuration.get("models")
    if configuration.get("merge_method") != "pcb" or not isinstance(models, list):
        raise PCBError(
            "search this configuration",
            "it is no `merge_method: pcb` with a list of `models:`",
            "search weights of whole models; slices have no one weight",
        )
    base = configuration.get("base_model")
    return [entry for entry in models if isinstance(entry, dict) and entry.get("model") != base]


def space_of(job: Job) -> Space:
    """Where the search starts: the configuration's own values."""
    common, *own = (
        entry.get("parameters") or {} for entry in (job.configuration, *tasks_of(job.configuration))
    )
    if not all(isinstance(values, dict) for values in (common, *own)):
        raise PCBError(
            "search this configuration", "its parameters are no mapping", "write `name: value`"
        )

    def number(name: str, values: dict[str, Any], default: float) -> float:
        value = values.get(name, common.get(name, default))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise PCBError(
                f"search {name}",
                f"the configuration gives it filters or a gradient ({value!r})",
                f"give {name} one number to start from",
            )
        return float(value)

    shared = []
    for name, default in (("lambda", 1.0), ("density", 0.1)):
        if name in job.searched:
            if any(name in values for values in own):
                raise PCBError(
                    f"search {name}",
                    "models have values of their own",
                    "write one at the top level to start from",
                )
            shared.append((name, number(name, {}, default)))
    weights = [number("weight", values, 1.0) for values in own if "weight" in job.searched]
    return Space(tuple(weights), tuple(shared), job.bounds)


def configured(
    configuration: dict[str, Any], weights: Sequence[float], shared: dict[str, float]
) -> dict[str, Any]:
    """The configuration with these values in it."""
    made = copy.deepcopy(configuration)
    if weights:
        for entry, weight in zip(tasks_of(made), weights, strict=True):
            entry["parameters"] = {**(entry.get("parameters") or {}), "weight": weight}
    if shared:
        made["parameters"] = {**(made.get("parameters") or {}), **shared}
    return made


def run(job: Job, options: Any, *, resume: bool) -> Found:
    """Search, keeping a log in the job's folder and the best configuration in its output."""
    _cma()  # complain before anything is written
    space = space_of(job)
    space.axes()
    past = _past(job, resume=resume)
    merge = _Merges(job, options)

    def evaluate(weights: Sequence[float], shared: dict[str, float]) -> float:
        return _score(job, merge.trial(weights, shared))

    found = Found([], job.minimize)
    trials = search(evaluate, space, job.budget, seed=job.seed, minimize=job.minimize, past=past)
    with tqdm(
        total=job.budget, desc="Searching", unit="trial", disable=True if options.quiet else None
    ) as bar:
        for trial in trials:
            before = found.best
            found.trials.append(trial)
            if trial.trial > len(past):
                _append(job.log, trial.model_dump_json())
            best = found.best
            if best is not None and (best is not before or not job.output.exists()):
                _write_best(job, best)
            if trial.error is not None and trial.trial > len(past):
                bar.write(f"trial {trial.trial} failed: {trial.error}")
            bar.set_postfix_str("none succeeded" if best is None else f"best {best.score:g}")
            bar.update()
    merge.clean()
    return found


def _past(job: Job, *, resume: bool) -> list[Trial]:
    """The trials of an earlier run, or a new log."""
    header = json.dumps({"format": FORMAT, "digest": job.digest()})
    if not job.log.exists():
        job.folder.mkdir(parents=True, exist_ok=True)
        _append(job.log, header)
        return []
    if not resume:
        raise PCBError(
            f"search in {job.folder}",
            "there is a search already",
            "continue it with --resume, or remove that folder",
        )
    text = job.log.read_text(encoding="utf-8")
    first, *lines = text.splitlines(keepends=True) or [""]
    if first.strip() != header:
        raise PCBError(
            f"resume the search in {job.folder}",
            "it was begun with another configuration, command or options",
            "use the same, or remove that folder",
        )
    trials = []
    whole = first
    for line in lines:
        try:
            if not line.endswith("\n"):
                raise ValueError("the rest was not written")
            trials.append(Trial.model_validate_json(line))
        except (ValidationError, ValueError):
            if line is not lines[-1]:
                raise PCBError(
                    f"resume the search in {job.folder}",
                    f"line {len(trials) + 2} of {job.log.name} is damaged",
                    "remove that line and those after it",
                ) from None
            break
        whole += line
    if whole != text:  # killed while it wrote the last line
        write_text(job.log, whole)
    return trials


def _append(file: pathlib.Path, line: str) -> None:
    with file.open("a", encoding="utf-8") as log:
        log.write(line + "\n")
        log.flush()
        os.fsync(log.fileno())


def _write_best(job: Job, best: Trial) -> None:
    made = configured(job.configuration, best.weights, best.shared)
    text = f"# score {best.score:g} in trial {best.trial} of mergekit-pcb search\n"
    write_text(job.output, text + yaml.safe_dump(made, sort_keys=False, allow_unicode=True))


def _score(job: Job, model: pathlib.Path) -> float:
    """Run the command on a model; the last number that it prints is the score."""
    command = job.command.replace("{model}", shlex.quote(str(model)))
    try:
        done = subprocess.run(  # noqa: S602 - the user's own command line, pipes and all
            command,
            shell=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=job.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EvaluationError(f"the command took longer than {job.timeout:g} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        why = f": {said[-1][:200]}" if said else ""
        raise EvaluationError(f"the command exited with {done.returncode}{why}")
    numbers = NUMBER.findall(done.stdout)
    if not numbers:
        raise EvaluationError("the command printed no number")
    return float(numbers[-1])


class _Merges:
    """Makes a trial's model: a weighted sum, or a whole merge where densities change."""

    def __init__(self, job: Job, options: Any) -> None:
        self._job = job
        self._options = options.model_copy(update={"quiet": True, "write_model_card": False})
        self._linear = "density" not in job.searched
        self._skeleton, self._parts = job.folder / "merged", job.folder / "contributions"
        self._trial = job.folder / "trial"

    def trial(self, weights: Sequence[float], shared: dict[str, float]) -> pathlib.Path:
        shutil.rmtree(self._trial, ignore_errors=True)
        if not self._linear:
            self._merge(configured(self._job.configuration, weights, shared), self._trial)
            return self._trial
        if not (self._parts / "index.json").exists():
            self._measure()
        self._sum(weights, shared.get("lambda"))
        return self._trial

    def clean(self) -> None:
        """Remove the large files; the log stays."""
        for folder in (self._trial, self._parts, self._skeleton):
            shutil.rmtree(folder, ignore_errors=True)

    def _merge(self, configuration: dict[str, Any], out: pathlib.Path) -> None:
        checkpoints.run(yaml.safe_dump(configuration, sort_keys=False), out, self._options)

    def _measure(self) -> None:
        """Merge once, keeping what each task contributes."""
        from safetensors.torch import save_file

        self.clean()
        self._parts.mkdir()
        index: dict[str, Any] = {}

        def keep(
            aligned: Aligned,
            statistics: Statistics,
            positions: Sequence[int],
            weights: Sequence[float],
            scale: float,
        ) -> None:
            parts = contributions_of(aligned, statistics)
            state = {f"task {p}": part.cpu() for p, part in zip(positions, parts, strict=True)}
            state["base"] = aligned.base.to(statistics.dtype).cpu()
            file = f"{len(index):06d}.safetensors"
            own = {
                str(position): weight for position, weight in zip(positions, weights, strict=True)
            }
            index[aligned.name] = {"file": file, "weights": own, "lambda": scale}
            save_file(state, self._parts / file)

        with observed(keep):
            self._merge(self._job.configuration, self._skeleton)
        write_text(self._parts / "index.json", json.dumps(index))

    def _sum(self, weights: Sequence[float], scale: float | None) -> None:
        """Write the sum for these values; for those that are not searched, as they were merged."""
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        index = json.loads((self._parts / "index.json").read_text())
        self._trial.mkdir()
        for file in self._skeleton.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, self._trial)
                continue
            state: dict[str, torch.Tensor] = {}
            with safe_open(file, "pt") as handle:
                metadata = handle.metadata()
                for name in handle.keys():  # noqa: SIM118 - no mapping
                    state[name] = handle.get_tensor(name)
            for name in index.keys() & state.keys():
                merged = index[name]
                parts = load_file(self._parts / merged["file"])
                value = parts.pop("base")
                factor = merged["lambda"] if scale is None else scale
                for position, weight in merged["weights"].items():
                    chosen = weights[int(position)] if weights else weight
                    value.add_(parts[f"task {position}"], alpha=factor * chosen)
                state[name] = value.to(state[name].dtype).view(state[name].shape)
            save_file(state, self._trial / file.name, metadata=metadata)
