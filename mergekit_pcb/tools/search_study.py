"""Who tries what, and what came of it: Optuna's study, shared by threads, processes and machines.

Every step that reads and writes is taken alone, under a lock in the search's folder. A process
holds a lock of its own as long as it lives, and the system lets go of it when the process dies.
So a running trial whose process is gone is known at once, and taken over as it stands: the same
number, the same values. That is why a search that was killed repeats what it would have tried.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from mergekit_pcb.core.dare import GENERATOR
from mergekit_pcb.errors import PCBError, one_line
from mergekit_pcb.tools.search_job import Job
from mergekit_pcb.tools.search_scores import remove_model
from mergekit_pcb.tools.search_space import (
    Shared,
    Space,
    Trial,
    require_optuna,
    sampler,
    suggested,
    without_remarks,
)
from mergekit_pcb.tools.search_storage import (
    FORMAT,
    TRIALS,
    WORKERS,
    identity,
    opened,
    refuse_other_folders,
    without_password,
)

#: Of a trial that somebody ended by Optuna's own commands.
_ELSEWHERE = {"error": "it was ended by another program", "seconds": 0.0}


@dataclass(frozen=True)
class Claim:
    """A trial that one worker tries: what, and the folder for its model."""

    trial: Any
    weights: list[float]
    shared: Shared
    folder: pathlib.Path


class Study:
    """The trials of a job; :meth:`close` it in the end."""

    def __init__(self, job: Job, space: Space, scores: list[str]) -> None:
        self._optuna = require_optuna()
        from sqlalchemy.exc import SQLAlchemyError  # comes with Optuna

        self._job, self._space = job, space
        self._states = self._optuna.trial.TrialState
        #: What Optuna and the databases' layer raise of a storage that is locked or gone.
        self._unreachable = (
            self._optuna.exceptions.OptunaError,
            SQLAlchemyError,
        )
        self._lock = FileLock(job.folder / "lock")
        self._name = uuid.uuid4().hex
        refuse_other_folders(job.folder, job.storage)
        (job.folder / WORKERS).mkdir(parents=True, exist_ok=True)
        self._here = FileLock(self._lock_of(self._name), thread_local=False)
        with self._lock:  # nobody asks whether it is held before it is
            self._here.acquire()
        try:
            with self.alone():
                self._study = self._opened(scores)
        except BaseException:
            self._leave()
            raise

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other worker of this search waiting."""
        with self._lock:
            try:
                yield
            except self._unreachable as error:
                raise PCBError(
                    f"reach the study in {without_password(self._job)}",
                    one_line(error),
                    "continue the search by the same command when it can be reached",
                ) from None

    def claim(self) -> Claim | None:
        """The next trial: one whose process died, or a new one; none when all are tried."""
        with self.alone():
            trials = self._trials()
            running = [t for t in trials if t.state is self._states.RUNNING]
            alive = [t for t in running if self._alive(t)]
            self._remove_leftovers({t.number for t in alive})
            left = [t for t in running if t not in alive]
            if left:
                trial = self._optuna.trial.Trial(self._study, left[0]._trial_id)
            elif len(_finished(trials)) + len(running) >= self._job.budget:
                return None
            else:
                trial = self._study.ask()
            trial.set_user_attr("worker", self._name)
            weights, shared = suggested(trial, self._space)
            return Claim(trial, weights, shared, self._folder(trial.number))

    def tell(
        self, claim: Claim, scores: list[float] | None, error: str | None, seconds: float
    ) -> None:
        """Write down what came of a trial, unless somebody else has ended it meanwhile."""
        outcome = {"error": error, "seconds": round(seconds, 3)}
        state = self._states.FAIL if scores is None else None
        ended = self._optuna.exceptions.UpdateFinishedTrialError
        with self.alone(), contextlib.suppress(ended, ValueError):
            claim.trial.set_user_attr("outcome", outcome)
            self._study.tell(claim.trial, scores, state=state)

    def ended(self) -> list[Trial]:
        """The trials that are over, by their number."""
        return [
            Trial(
                trial=trial.number + 1,
                weights=weights,
                shared=shared,
                scores=list(trial.values) if trial.state is self._states.COMPLETE else None,
                **trial.user_attrs.get("outcome", _ELSEWHERE),
            )
            for trial in _finished(self._trials())
            for weights, shared in [self._space.split(trial.params)]
        ]

    def best_trials(self) -> list[int]:
        """Numbers of the trials that no other one beats in every score."""
        return sorted(trial.number + 1 for trial in self._study.best_trials)

    @property
    def optuna_study(self) -> Any:
        return self._study

    def close(self, clean: Callable[[], None]) -> None:
        """Leave the search; who is the last to leave one that is over cleans up behind all."""
        with self.alone():
            self._leave()
            trials, workers = self._trials(), self._job.folder / WORKERS
            running = [t for t in trials if t.state is self._states.RUNNING]
            self._remove_leftovers({t.number for t in running if self._alive(t)})
            others = [file for file in workers.iterdir() if self._lives(file.name)]
            if len(_finished(trials)) >= self._job.budget and not others:
                clean()
                with contextlib.suppress(OSError):
                    (self._job.folder / TRIALS).rmdir()

    def _leave(self) -> None:
        self._here.release()
        self._lock_of(self._name).unlink(missing_ok=True)

    def _opened(self, scores: list[str]) -> Any:
        """The study of this job, begun if there is none; another job's is refused."""
        lower = self._job.minimized
        told = {"format": FORMAT, "generator": GENERATOR, "digest": self._job.digest()}
        if self._job.storage is not None:
            told["folder"] = identity(self._job.folder)
        try:
            with without_remarks():
                storage = opened(self._job)
                study = self._optuna.create_study(
                    study_name=self._study_name(storage),
                    storage=storage,
                    sampler=sampler(self._space, self._job.seed, len(lower)),
                    directions=["minimize" if low else "maximize" for low in lower],
                    load_if_exists=True,
                )
                begun = study.get_trials(deepcopy=False)
                waiting = all(t.state is self._states.WAITING for t in begun)
                if "mergekit-pcb" not in study.user_attrs and waiting:
                    if not begun:
                        study.enqueue_trial(self._space.start())
                    study.set_metric_names(scores)
                    study.set_user_attr("mergekit-pcb", told)
        except (PCBError, OSError):
            raise
        except Exception as error:  # whatever a database's driver raises
            raise PCBError(
                f"open the study in {without_password(self._job)}",
                one_line(error),
                "check the storage, or leave --storage out",
            ) from None
        stored = study.user_attrs.get("mergekit-pcb")
        if isinstance(stored, dict) and {**stored, "folder": told.get("folder")} == told != stored:
            raise PCBError(
                f"join the study in {without_password(self._job)}",
                f"it was begun in another folder than {self._job.folder}, by whose files workers "
                "know of one another",
                "share that folder, or name another one with --work for a study of its own",
            )
        if stored != told:
            raise PCBError(
                f"go on with the search in {self._job.folder}",
                "it was begun with other models, another configuration, command, options or "
                "version",
                "use the same, or name another folder with --work",
            )
        return study

    def _study_name(self, storage: Any) -> str:
        """The folder's; a journal has one study, and the folder may have been renamed since."""
        name = self._job.folder.resolve().name
        there = self._optuna.get_all_study_names(storage) if self._job.storage is None else []
        return there[0] if len(there) == 1 else name

    def _trials(self) -> list[Any]:
        with self.alone():
            return list(self._study.get_trials(deepcopy=False))

    def _folder(self, number: int) -> pathlib.Path:
        return self._job.folder / TRIALS / f"{number + 1:04d}"

    def _lock_of(self, worker: str) -> pathlib.Path:
        return self._job.folder / WORKERS / worker

    def _alive(self, trial: Any) -> bool:
        """Whether the process that runs a trial still does."""
        return self._lives(str(trial.user_attrs.get("worker")))

    def _lives(self, worker: str) -> bool:
        """Whether a worker holds its lock; that of a dead one is removed."""
        file = self._lock_of(worker)
        if worker == self._name and self._here.is_locked:
            return True
        if not file.exists():
            return False
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        with contextlib.suppress(OSError):  # not all systems remove an open file
            file.unlink(missing_ok=True)
        lock.release()
        file.unlink(missing_ok=True)
        return False

    def _remove_leftovers(self, alive: set[int]) -> None:
        """Of trials that nobody tries any more: their models, and the commands that score them.

        What a command writes beside the model, under a name that begins with it, goes with it.
        """
        kept = {self._folder(number).name for number in alive}
        with contextlib.suppress(FileNotFoundError):
            for path in (self._job.folder / TRIALS).iterdir():
                number = re.match(r"\d+", path.name)
                if number is None or number[0] in kept:
                    continue
                remove_model(path)
                if not path.is_dir():
                    with contextlib.suppress(OSError):  # of a network's file system, still open
                        path.unlink(missing_ok=True)


def _finished(trials: list[Any]) -> list[Any]:
    return [trial for trial in trials if trial.state.is_finished()]
