"""What a command of the user's says of a model: the last number it prints, or values in a file."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from filelock import FileLock, Timeout
from tqdm import tqdm

from mergekit_pcb.errors import PCBError
from mergekit_pcb.tools.search_space import EvaluationError, finite

NUMBER = re.compile(
    r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\bnan\b|[-+]?\binf\b", re.IGNORECASE
)
#: A key may hold colons, and so may a path; where one ends in .json, the key begins behind it.
FILE_AND_KEY = re.compile(r"(.+?\.json|.+):(.+)", re.DOTALL)
#: What a terminal would take for a colour.
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
#: Seconds after which it is asked again whether to wait.
WAIT = 1.0
#: Of a file without the key that was asked for, so many that it has are named.
NAMED = 8


@dataclass(frozen=True)
class Score:
    """A name, a JSON file that the command writes, and the key of a number in it.

    ``file`` may hold ``{model}`` and wildcards, of which the newest file counts. ``key`` joins
    the names on the way by dots; ``*`` stands for any text, and of several numbers the mean
    counts.
    """

    name: str
    file: str
    key: str
    lower: bool = False

    @classmethod
    def parse(cls, text: str, *, lower: bool = False) -> Score:
        """Read ``NAME=FILE:KEY``."""
        name, _, rest = text.partition("=")
        parts = FILE_AND_KEY.fullmatch(rest)
        if not name.strip() or parts is None:
            raise PCBError(
                f"read the score {text!r}",
                "it is not NAME=FILE:KEY",
                "write, say, arc={model}/results*.json:results.arc_easy.acc,none",
            )
        return cls(name.strip(), parts[1], parts[2], lower)

    def read(self, model: pathlib.Path, since: float) -> float:
        """The number, from a file that was written after this time."""
        pattern = self.file.replace("{model}", glob.escape(str(model)))
        times = {}
        for path in glob.glob(pattern, recursive=True):  # noqa: PTH207 - absolute ones, too
            with contextlib.suppress(OSError):
                times[path] = pathlib.Path(path).stat().st_mtime
        # Clocks of file systems are coarse.
        written = [path for path, when in times.items() if when >= since - 2]
        if not written:
            old = " anew" if times else ""
            raise EvaluationError(f"the command did not write {pattern}{old}")
        newest = max(written, key=lambda path: (times[path], path))
        try:
            document = json.loads(pathlib.Path(newest).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise EvaluationError(f"{newest} is no JSON ({error})") from None
        wanted = re.compile(".*".join(map(re.escape, self.key.split("*"))))
        numbers = dict(_numbers(document))
        found = [value for path, value in numbers.items() if wanted.fullmatch(path)]
        if not found:
            there = ", ".join(sorted(numbers)[:NAMED]) or "none"
            more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
            raise EvaluationError(
                f"{newest} holds no number {self.key}; those it holds: {there}{more}"
            )
        return sum(found) / len(found)


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a document, and the names that lead to it, joined by dots."""
    if isinstance(value, (dict, list)):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in inner:
            yield from _numbers(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, float(value)


class Scorer:
    """Runs the command on models, several at a time if it is asked to.

    Where the command writes a score to a file of one name for all models, it has that file to
    itself: ``turns`` is a lock's, which every worker of the search takes in turn.
    """

    def __init__(
        self,
        command: str,
        scores: Sequence[Score],
        timeout: float | None,
        turns: pathlib.Path,
    ) -> None:
        self._command, self._scores, self._timeout = command, scores, timeout
        shared = any("{model}" not in score.file for score in scores)
        self._turns = turns if shared else None
        self._running: set[subprocess.Popen[Any]] = set()
        self._lock = threading.Lock()
        self._stopped = self._told = False

    @property
    def names(self) -> list[str]:
        return [score.name for score in self._scores] or ["score"]

    def __call__(self, model: pathlib.Path, environment: dict[str, str]) -> list[float]:
        """The scores of a model, or :class:`EvaluationError` with the reason why there are none."""
        model = model.absolute()  # the command may go elsewhere
        with self._turn():
            began = time.time()
            said = self._run(model, environment)
            found = [score.read(model, began) for score in self._scores]
        if not self._scores:
            # Trials' folders are numbers, which are no scores.
            numbers = NUMBER.findall(COLOUR.sub("", said).replace(str(model), ""))
            if not numbers:
                raise EvaluationError("the command printed no number")
            found = [float(numbers[-1])]
        named = [f"the score {score.name}" for score in self._scores] or ["the score"]
        return [finite(value, name) for value, name in zip(found, named, strict=True)]

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Keep other workers from the file, and stop waiting for it when the search is stopped."""
        if self._turns is None:
            yield
            return
        lock = FileLock(self._turns)
        while True:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=WAIT)
                break
            if not self._told:
                self._told = True
                tqdm.write("another worker writes a score to the same file; waiting for it")
            if self._stopped:
                raise EvaluationError("the search was stopped")
        try:
            yield
        finally:
            lock.release()

    def stop(self) -> None:
        """Kill what runs, and start nothing more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _kill(process.pid)

    def _run(self, model: pathlib.Path, environment: dict[str, str]) -> str:
        """What the command printed. Files take it: a pipe waits for every child in background."""
        command, quoted = self._command, shlex.quote(str(model))
        # Quotes of the user's own are in the way of these alone.
        own = ('"{model}"', "'{model}'") if quoted != str(model) else ()
        for name in (*own, "{model}"):
            command = command.replace(name, quoted)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with self._lock:
                if self._stopped:
                    raise EvaluationError("the search was stopped")
                process = subprocess.Popen(  # noqa: S602 - the user's own command, pipes and all
                    command,
                    shell=True,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env={**os.environ, **environment},
                    start_new_session=True,
                )
                self._running.add(process)
            try:
                _remember(process.pid, model)
                code = process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                raise EvaluationError(f"the command took longer than {self._timeout:g} s") from None
            finally:
                # What it left running in background would keep its card, model after model.
                _kill(process.pid)
                process.wait()
                with self._lock:
                    self._running.discard(process)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        if code:
            told = (texts[1].strip() or texts[0].strip()).splitlines()
            why = f": {told[-1][:200]}" if told else ""
            raise EvaluationError(f"the command exited with {code}{why}")
        return texts[0]


def _remember(pid: int, model: pathlib.Path) -> None:
    """Write down beside the model who scores it: a search that is killed cannot stop it."""
    with contextlib.suppress(psutil.Error, OSError):
        told = [pid, psutil.Process(pid).create_time()]
        model.with_suffix(".pid").write_text(json.dumps(told), encoding="utf-8")


def remove_model(model: pathlib.Path) -> None:
    """Remove a model that nobody scores, and kill a command that outlived its search here."""
    file = model.with_suffix(".pid")
    with contextlib.suppress(OSError, ValueError, TypeError, psutil.Error):
        pid, created = json.loads(file.read_text(encoding="utf-8"))
        if psutil.Process(pid).create_time() == created:
            _kill(pid)
    file.unlink(missing_ok=True)
    shutil.rmtree(model, ignore_errors=True)


def _kill(pid: int) -> None:
    """Kill a process with all that it started."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGTERM)
