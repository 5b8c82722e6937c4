"""Where a search keeps what it knows: files of a folder that is its own, and Optuna's storage."""

from __future__ import annotations

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import write_text
from mergekit_pcb.tools.search_job import Job
from mergekit_pcb.tools.search_space import require_optuna

FORMAT = "mergekit-pcb search, version 7"
JOURNAL, CONTRIBUTIONS, MERGED, TRIALS, WORKERS, REFERENCE, SCORING, IDENTITY = (
    "study.journal", "contributions", "merged", "trials", "workers", "reference", "scoring",
    "identity",
)  # fmt: skip
_OWN = {JOURNAL, CONTRIBUTIONS, MERGED, TRIALS, WORKERS, REFERENCE}
_OWN |= {"lock", "appending", "measuring", SCORING, IDENTITY}


@contextlib.contextmanager
def held(file: pathlib.Path, waiting: str) -> Iterator[None]:
    """Hold a lock that another process may hold for long: then ``waiting`` is said."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tqdm.write(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def identity(folder: pathlib.Path) -> str:
    """What tells this folder from one of the same name on another machine."""
    file = folder / IDENTITY
    if not file.exists():
        write_text(file, uuid.uuid4().hex)
    return file.read_text(encoding="utf-8")


def opened(job: Job) -> Any:
    """Optuna's storage: a database, or a journal in the folder.

    Raises whatever the driver of a database raises.
    """
    storages = require_optuna().storages
    if job.storage is not None:
        # A connection that a server has dropped since it was used last is made anew.
        engine = {"pool_pre_ping": True}
        return storages.get_storage(storages.RDBStorage(job.storage, engine_kwargs=engine))
    file = job.folder / JOURNAL
    backend = storages.journal.JournalFileBackend(str(file), lock_obj=_Lock(file))
    return storages.journal.JournalStorage(backend)


class _Lock:
    """A journal's, that no killed process leaves behind; who gets it mends a half-written line.

    Optuna's own is a file beside the journal that a killed process does leave, so this one has
    another name. Who appends under Optuna's does so whole lines at a time, and is asked to wait
    while a line is mended.
    """

    def __init__(self, file: pathlib.Path) -> None:
        self._file, self._lock = file, FileLock(file.with_name("appending"))
        self._others = require_optuna().storages.journal.JournalFileOpenLock(str(file))

    def acquire(self) -> bool:
        self._lock.acquire()
        if not _ends_well(self._file):
            self._others.acquire()
            try:
                if not _ends_well(self._file):
                    with self._file.open("rb+") as log:
                        log.truncate(log.read().rfind(b"\n") + 1)
            finally:
                self._others.release()
        return True

    def release(self) -> None:
        self._lock.release()


def _ends_well(file: pathlib.Path) -> bool:
    """Whether the last line has an end, if there is any."""
    with file.open("rb") as lines:
        if not lines.seek(0, os.SEEK_END):
            return True
        lines.seek(-1, os.SEEK_END)
        return lines.read() == b"\n"


def refuse_other_folders(folder: pathlib.Path, storage: str | None) -> None:
    """A search removes what it left, so that its folder must hold nothing of anybody else's.

    A database of SQLite that is the search's own may lie in it.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names = {name for name in names if not name.startswith(".")}  # of file managers, and unfinished
    if storage is not None and storage.startswith("sqlite"):
        database = storage.partition("?")[0].rpartition("/")[2]
        names -= {database + end for end in ("", "-journal", "-wal", "-shm")}
    # Models are called "merged" elsewhere, too; these are a search's alone.
    own = _OWN if names & {WORKERS, JOURNAL, IDENTITY} else set()
    other = sorted(name for name in names if name.removesuffix(".lock") not in own)
    if other or (folder.exists() and not folder.is_dir()):
        raise PCBError(
            f"search in {folder}",
            f"it holds {other[0]}, which is no search's" if other else "it is no folder",
            "name another folder with --work",
        )


def without_password(job: Job) -> str:
    if job.storage is None:
        return str(job.folder)
    scheme, found, rest = job.storage.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if found else job.storage
