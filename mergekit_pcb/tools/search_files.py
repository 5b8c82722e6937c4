"""A search over a configuration: a folder with a log, trials on disk, the best one as YAML.

What each task contributes is computed once, and a trial is one weighted sum of files (and, where
the spectrum is evened, one step per matrix on it). Every trial is on disk before the next begins,
and the same seed tries the same weights, so a search that was killed goes on by replaying its log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from mergekit_pcb.core.dare import GENERATOR
from mergekit_pcb.core.matrices import Layout
from mergekit_pcb.core.refine import Spectrum, apply
from mergekit_pcb.errors import PCBError, one_line
from mergekit_pcb.files import write_text
from mergekit_pcb.host import planning
from mergekit_pcb.host.groups import explained
from mergekit_pcb.host.method import Prepared
from mergekit_pcb.host.plan import PlanOptions
from mergekit_pcb.host.statistics_file import digest
from mergekit_pcb.tools.search import (
    EvaluationError,
    Found,
    Trial,
    require_cma,
    search,
)
from mergekit_pcb.tools.search_job import Job, configured, space_of

FORMAT = "mergekit-pcb search, version 3"
NUMBER = re.compile(
    r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\bnan\b|[-+]?\binf\b", re.IGNORECASE
)


def run(job: Job, options: Any, *, resume: bool) -> Found:
    """Search, keeping a log in the job's folder and the best configuration in its output."""
    require_cma()  # complain before anything is written
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
            best = found.best
            with _written(job.folder):
                if trial.trial > len(past):
                    _append(job.log, trial.model_dump_json())
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
    header = json.dumps({"format": FORMAT, "generator": GENERATOR, "digest": job.digest()})
    if not job.log.exists():
        with _written(job.folder):
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
            "it was begun with other models, another configuration, command, options or version",
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


@contextlib.contextmanager
def _written(place: pathlib.Path) -> Iterator[None]:
    """Turn a disk that is full, or refuses, into a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # the Hub's client, of a model that it cannot find
        raise PCBError(
            f"write to {place}",
            one_line(error),
            "make room there and continue the search with --resume",
        ) from None


class _Merges:
    """Makes a trial's model: a weighted sum, or a whole merge where densities change."""

    def __init__(self, job: Job, options: Any) -> None:
        self._job = job
        self._options = options.model_copy(update={"quiet": True, "write_model_card": False})
        self._linear = "density" not in job.searched
        self._skeleton, self._parts = job.folder / "merged", job.folder / "contributions"
        self._trial = job.folder / "trial"
        self._intact = self._linear and self._stored_whole()
        self._told = False  # what a trial takes

    def trial(self, weights: Sequence[float], shared: dict[str, float]) -> pathlib.Path:
        """The folder of a trial's model; what cannot be written whole is removed."""
        with _written(self._job.folder):
            try:
                return self._made(weights, shared)
            except BaseException:
                shutil.rmtree(self._trial, ignore_errors=True)
                if not self._intact:
                    self.clean()
                raise

    def _made(self, weights: Sequence[float], shared: dict[str, float]) -> pathlib.Path:
        shutil.rmtree(self._trial, ignore_errors=True)
        if not self._linear:
            changed = configured(self._job.configuration, weights, shared)
            self._merge(changed, self._trial, self._options)
            return self._trial
        if not self._intact:
            self._measure()
        self._sum(weights, shared.get("lambda"))
        return self._trial

    def clean(self) -> None:
        """Remove the large files; the log stays."""
        for folder in (self._trial, self._parts, self._skeleton):
            shutil.rmtree(folder, ignore_errors=True)

    def _merge(self, configuration: dict[str, Any], out: pathlib.Path, options: Any) -> None:
        planning.run(yaml.safe_dump(configuration, sort_keys=False), out, options)

    def _measure(self) -> None:
        """Merge once, keeping what each task contributes."""
        from safetensors.torch import save_file

        self.clean()
        self._parts.mkdir()
        index: dict[str, Any] = {}

        def keep(tensor: Prepared) -> None:
            aligned, statistics = tensor.aligned, tensor.statistics
            parts, step = tensor.contributions()
            named = zip(tensor.positions, parts, strict=True)
            state = {f"task {position}": part.cpu() for position, part in named}
            state["base"] = aligned.base.to(statistics.dtype).cpu()
            file = f"{len(index):06d}.safetensors"
            own = zip(map(str, tensor.positions), tensor.weights, strict=True)
            index[aligned.name] = {
                "file": file,
                "weights": dict(own),
                "lambda": tensor.scale,
                "spectrum": None if step is None else dataclasses.asdict(step),
            }
            save_file(state, self._parts / file)

        observed = PlanOptions.of(self._options, observe=keep)
        self._merge(self._job.configuration, self._skeleton, observed)
        stored = {
            "format": FORMAT,
            "generator": GENERATOR,
            "tensors": index,
            "digests": self._digests(),
        }
        write_text(self._parts / "index.json", json.dumps(stored))
        self._intact = True

    def _digests(self) -> dict[str, str]:
        """Of everything a trial is made from, by its path in the job's folder."""
        files = [*self._parts.iterdir(), *self._skeleton.iterdir()]
        return {
            str(file.relative_to(self._job.folder)): digest(file)
            for file in sorted(files)
            if file.name != "index.json"
        }

    def _stored_whole(self) -> bool:
        """Whether an earlier run left contributions that can be used as they are."""
        try:
            stored = json.loads((self._parts / "index.json").read_text(encoding="utf-8"))
            told = stored["format"], stored["generator"], stored["digests"]
            return told == (FORMAT, GENERATOR, self._digests()) and bool(stored["tensors"])
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def _sum(self, weights: Sequence[float], scale: float | None) -> None:
        """Write the sum for these values; for those that are not searched, as they were merged."""
        from safetensors.torch import load_file, save_file

        began, evened = time.monotonic(), 0
        stored = json.loads((self._parts / "index.json").read_text())
        index = stored["tensors"]
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
                summed = torch.zeros_like(value)
                for position, weight in merged["weights"].items():
                    chosen = weights[int(position)] if weights else weight
                    summed.add_(parts[f"task {position}"], alpha=chosen)
                if merged["spectrum"] is not None:
                    step = _spectrum(merged["spectrum"])
                    with explained(None, "the base", []):
                        summed, evened = apply(step, summed, name), evened + step.layout.count
                value.add_(summed, alpha=factor)
                state[name] = value.to(state[name].dtype).view(state[name].shape)
            save_file(state, self._trial / file.name, metadata=metadata)
        if evened and not self._told:
            self._told = True
            tqdm.write(
                f"each trial is a weighted sum of files and evens the singular values of {evened} "
                f"matrices: {time.monotonic() - began:.1f} s before it is scored"
            )


def _spectrum(stored: dict[str, Any]) -> Spectrum:
    return Spectrum(Layout(**stored["layout"]), tuple(stored["exponents"]))
