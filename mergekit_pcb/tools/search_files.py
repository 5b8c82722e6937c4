"""A search over a configuration: workers that claim trials, merge, score, and tell the study.

A worker is a thread. Several run in one process with ``--jobs``, and any number of processes, on
machines that share the search's folder, work on one study.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click
import torch
import yaml
from tqdm import tqdm

from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import short_names, write_text
from mergekit_pcb.host.configuration import named_models
from mergekit_pcb.tools import search_figures
from mergekit_pcb.tools.search_job import Job, configured, space_of
from mergekit_pcb.tools.search_merges import Merges, written
from mergekit_pcb.tools.search_scores import Scorer, remove_model
from mergekit_pcb.tools.search_space import EvaluationError, Found, Trial, require_optuna
from mergekit_pcb.tools.search_storage import REFERENCE, SCORING, held
from mergekit_pcb.tools.search_study import Claim, Study

Result = TypeVar("Result")
#: Seconds between attempts to reach the study.
PAUSES = (1, 4, 15)
#: Ends of names of files with weights, and the largest other one, in bytes, that is copied.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
LARGEST_COPY = 64 << 20
#: The name of the models' own scores in the study.
REFERENCES = "scores of the base and the experts"


@dataclass(frozen=True)
class Searched:
    """What a search found, and the files that tell of it."""

    found: Found
    #: With several scores: the trials that none beats in all of them, each a configuration.
    front: list[Trial] = field(default_factory=list)
    written: list[pathlib.Path] = field(default_factory=list)


def run(job: Job, options: Any) -> Searched:
    """Search until the budget is spent; what an earlier run tried counts."""
    require_optuna()  # complain before anything is written
    space = space_of(job)
    space.axes()
    scorer = Scorer(job.command, job.scores, job.timeout, job.folder / SCORING)
    cards = _cards(job)
    with written(job.folder):
        study = Study(job, space, scorer.names)
    merges = Merges(job, options)
    try:
        with _ending_when_asked():
            if len(study.ended()) < job.budget:
                merges.prepare()
                if len(scorer.names) > 1:
                    _score_references(job, study, scorer, cards[0])
                _Workers(job, options, study, merges, scorer).run(cards)
        with written(job.output.parent), study.alone():
            return _told(job, study, scorer.names)
    finally:
        study.close(merges.clean)


class _Workers:
    """Threads that try one trial after another, and a bar that shows them."""

    def __init__(
        self, job: Job, options: Any, study: Study, merges: Merges, scorer: Scorer
    ) -> None:
        self._job, self._study, self._merges, self._scorer = job, study, merges, scorer
        self._stop = threading.Event()
        self._shown = threading.Lock()
        self._reasons: set[str] = set()  # why trials failed, as far as it was said
        self._bar = tqdm(
            total=job.budget,
            initial=len(study.ended()),
            desc="Searching",
            unit="trial",
            disable=True if options.quiet else None,
        )

    def run(self, cards: list[dict[str, str]]) -> None:
        """Work until nothing is left to claim; what ends one worker ends all."""
        with self._bar, ThreadPoolExecutor(self._job.jobs) as pool:
            running = [pool.submit(self._work, card) for card in cards]
            try:
                wait(running, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                if any(not task.done() or task.exception() for task in running):
                    self._scorer.stop()
        for task in running:
            task.result()

    def _work(self, environment: dict[str, str]) -> None:
        while not self._stop.is_set() and (claim := self._claim()):
            began, scores, error = time.monotonic(), None, None
            start = claim.trial.number == 0
            try:
                model = self._merges.trial(claim.weights, claim.shared, claim.folder, start=start)
                scores = self._scorer(model, environment)
            except EvaluationError as failure:
                error = str(failure)
            finally:
                # Before the score is written down, so that a full disk has room for it.
                remove_model(claim.folder)
            if self._stop.is_set() and scores is None:
                return  # it was stopped, and is tried again
            with written(self._job.folder):
                self._tell(claim, scores, error, time.monotonic() - began)
            best = self._patiently(self._write_best)
            with self._shown:
                if error is not None:
                    why = " as another did" if error in self._reasons else f": {error}"
                    self._reasons.add(error)
                    self._bar.write(f"trial {claim.trial.number + 1} failed{why}")
                self._bar.set_postfix_str(best)
                self._bar.update()

    def _tell(
        self, claim: Claim, scores: list[float] | None, error: str | None, seconds: float
    ) -> None:
        """Write a trial's scores down."""
        try:
            self._patiently(lambda: self._study.tell(claim, scores, error, seconds))
        except PCBError as failure:
            number, (_, because, remedy) = claim.trial.number + 1, failure.parts
            what = f"write down that trial {number} scored {scores}"
            raise PCBError(what, because, remedy) from None

    def _claim(self) -> Claim | None:
        with written(self._job.folder):
            return self._patiently(self._study.claim)

    def _write_best(self) -> str:
        with written(self._job.output.parent), self._study.alone():
            return write_best(self._job, self._study)

    def _patiently(self, step: Callable[[], Result]) -> Result:
        """Take a step in several attempts: what would be lost may have taken hours."""
        for pause in PAUSES:
            with contextlib.suppress(PCBError, OSError):
                return step()
            self._stop.wait(pause)
        return step()


def write_best(job: Job, study: Study) -> str:
    """Write the best configuration, where there is one score; say how good it is."""
    found = Found(study.ended(), job.minimized[0])
    best = found.best
    if best is None:
        return "none succeeded"
    if len(job.minimized) > 1:
        return f"{len(study.best_trials())} that none beats"
    write_text(job.output, _yaml(job, best, f"score {best.score:g}"))
    return f"best {best.score:g}"


def _yaml(job: Job, trial: Trial, scores: str) -> str:
    made = configured(job.configuration, trial.weights, trial.shared)
    text = f"# {scores} in trial {trial.trial} of mergekit-pcb search\n"
    return text + yaml.safe_dump(made, sort_keys=False, allow_unicode=True)


def _told(job: Job, study: Study, names: list[str]) -> Searched:
    """What was found, as configurations and pictures beside the output."""
    found = Found(study.ended(), job.minimized[0])
    if found.best is None:
        return Searched(found)
    if len(names) == 1:
        write_best(job, study)
        picture = job.output.with_suffix(".png")
        drawn = search_figures.history(study, found, picture)
        return Searched(found, [], [picture] if drawn else [])
    numbers = study.best_trials()
    front = [trial for trial in found.trials if trial.trial in numbers]
    folder = job.output.with_suffix(".front")
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():  # and nothing that was made of them
        if re.fullmatch(r"trial-\d+\.yml", old.name):
            old.unlink()
    for trial in front:
        said = ", ".join(f"{n} {s:g}" for n, s in zip(names, trial.scores or [], strict=True))
        write_text(folder / f"trial-{trial.trial:04d}.yml", _yaml(job, trial, said))
    known = study.optuna_study.user_attrs.get(REFERENCES, {})
    others = {name: scores for name, scores in known.items() if scores is not None}
    others = dict(zip(short_names(list(others)), others.values(), strict=True))
    write_text(folder / "front.md", search_figures.table(names, front, others))
    files = [folder / "front.md"]
    if search_figures.front(names, found, front, others, folder / "front.png"):
        files.append(folder / "front.png")
    return Searched(found, front, files)


def _score_references(job: Job, study: Study, scorer: Scorer, card: dict[str, str]) -> None:
    """Score the base and the experts themselves, once, so that the front can be seen beside.

    One that cannot be scored is not tried again.
    """
    # What a command writes beside the model lies in the same folder, and goes with it.
    place, names = job.folder / REFERENCE, named_models(job.configuration)
    folder = place / "model"
    waiting = "another process scores the base and the experts; waiting for it"
    with held(place.with_suffix(".lock"), waiting):
        with study.alone():
            known: dict[str, Any] = dict(study.optuna_study.user_attrs.get(REFERENCES, {}))
        for number, name in enumerate(names, 1):
            if name in known:
                continue
            if not pathlib.Path(name).is_dir():
                tqdm.write(f"{name} is not scored beside the trials: it is no local folder")
                continue
            tqdm.write(f"scoring {name}, {number} of {len(names)} beside the trials")
            _remove_reference(place)  # what a search that was killed has left
            try:
                with written(job.folder):
                    place.mkdir(exist_ok=True)
                    _copy(pathlib.Path(name), folder)
                known[name] = scorer(folder, card)
            except EvaluationError as error:
                tqdm.write(f"{name} could not be scored, and is not tried again: {error}")
                known[name] = None
            finally:
                _remove_reference(place)
            with study.alone():
                study.optuna_study.set_user_attr(REFERENCES, known)


def _remove_reference(place: pathlib.Path) -> None:
    remove_model(place / "model")
    shutil.rmtree(place, ignore_errors=True)


def _copy(model: pathlib.Path, folder: pathlib.Path) -> None:
    """A copy of a model with links to its weights: what a command writes stays out of the user's.

    Times of change are kept, so that no old result looks new.
    """
    folder.mkdir()
    for file in sorted(model.resolve().iterdir()):
        link = folder / file.name
        small = file.is_file() and file.suffix not in WEIGHTS
        if file.is_dir() and not file.is_symlink() and os.access(file, os.R_OK | os.X_OK):
            if not folder.resolve().is_relative_to(file):  # the search's own, in a model
                _copy(file, link)
        elif small and file.stat().st_size <= LARGEST_COPY and os.access(file, os.R_OK):
            shutil.copy2(file, folder)
        else:
            link.symlink_to(file)


def _cards(job: Job) -> list[dict[str, str]]:
    """Of every worker, what its commands find in their environment."""
    there = torch.cuda.device_count()
    if absent := [card for card in job.gpus if card >= there]:
        raise PCBError(
            f"use --gpus {','.join(map(str, job.gpus))}",
            f"there is no {absent[0]}: torch sees {there} here",
            "name those that there are, counted from 0, or leave --gpus out",
        )
    cards = job.gpus or tuple(range(there))
    if not cards:
        return [{}] * job.jobs
    # A card's number counts among those that this process may see.
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = [visible[card] if visible else str(card) for card in cards]
    return [{"CUDA_VISIBLE_DEVICES": names[i % len(names)]} for i in range(job.jobs)]


@contextlib.contextmanager
def _ending_when_asked() -> Iterator[None]:
    """End as at an interrupt when this process is asked to: commands and models are removed."""

    def end(number: int, _: Any) -> None:
        raise click.exceptions.Exit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # asked, and left by its terminal
            number = getattr(signal, name, None)
            # Under nohup the terminal's end is ignored, and stays so.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, end) or signal.SIG_DFL
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
