"""Files that are written whole or not at all, and their names and sizes in words."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

from mergekit_pcb.errors import PCBError, one_line


@contextlib.contextmanager
def written_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a name to write to beside ``path``; its contents take that place if all goes well."""
    path = path.resolve()  # a link stays a link
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):  # the folder may be none
            unfinished.unlink(missing_ok=True)


def check_target(path: pathlib.Path) -> None:
    """Refuse a path that no file could be written to, before the work that fills it."""
    try:
        target = path.resolve()
        if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
            reason = f"{target.parent} is no folder to write to"
            raise PCBError(f"write {path}", reason, "name another file")
        if target.exists() and not target.is_file():
            raise PCBError(f"write {path}", "it is no ordinary file", "name another")
    except (OSError, RuntimeError) as error:  # links in a circle are either, by Python's version
        raise PCBError(f"write {path}", one_line(error), "name another file") from None


def check_folder(path: pathlib.Path) -> None:
    """Refuse a folder that could not be made, or written to, before the work that fills it."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise PCBError(f"write {path}", one_line(error), "name another folder") from None
    there = next(place for place in (target, *target.parents) if seen(str(place)))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PCBError(f"write {path}", f"{there} is no folder to write to", "name another folder")


def seen(path: str, look: Callable[[pathlib.Path], bool] = pathlib.Path.exists) -> bool:
    """Whether something is there, of the kind that ``look`` says; not under a name no file has."""
    try:
        return look(pathlib.Path(path))
    except (OSError, ValueError):  # too long, a zero byte
        return False


def short_names(models: Sequence[str]) -> list[str]:
    """The last parts of models' paths, where they tell the models apart."""
    for depth in (1, 2):
        names = ["/".join(pathlib.PurePath(m.split("+")[-1]).parts[-depth:]) for m in models]
        if len(set(names)) == len(names):
            return names
    return list(models)


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def size(count: float) -> str:
    """Bytes as people read them, in powers of 1000."""
    from tqdm import tqdm

    return tqdm.format_sizeof(count, suffix="B")


def write_text(path: pathlib.Path, text: str) -> None:
    """Write all of a text in UTF-8, or nothing."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
