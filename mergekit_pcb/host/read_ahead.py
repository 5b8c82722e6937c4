"""What is merged next is read from disk while this is merged.

mergekit takes tensors by name, and safetensors files hold them by name, so what follows a tensor in
its file is most often what is merged next. The system is asked to bring it into its file cache,
which takes no memory from anybody; being wrong costs some reading.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache, LoadTensor

# As much as the tensor itself has, within these bounds.
FEWEST_BYTES, MOST_BYTES = 1 << 24, 1 << 28


def what_follows(task: Task[Any]) -> None:
    """Ask for what lies behind each tensor that a task loads, where it can be asked for."""
    if not hasattr(os, "posix_fadvise"):  # neither macOS nor Windows has it
        return
    for load in _loads(task):
        loader = LoaderCache.loaders.get(load.model)
        if loader is None:  # it was not read from files
            continue
        name = load.group_label()  # the one it is found under
        if name is None or not loader.index.is_safetensors:
            continue
        path = pathlib.Path(loader.index.base_path, loader.index.tensor_paths[name])
        with contextlib.suppress(OSError, KeyError):  # advice alone; reading says what is wrong
            begin, end = _places(path)[name]
            length = min(max(end - begin, FEWEST_BYTES), MOST_BYTES)
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), end, length, os.POSIX_FADV_WILLNEED)


def _loads(task: Task[Any]) -> Iterator[LoadTensor]:
    if isinstance(task, LoadTensor):
        yield task
    for argument in task.arguments().values():
        yield from _loads(argument)


@functools.lru_cache(maxsize=256)
def _places(path: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Where the tensors of a safetensors file begin and end, by name, in bytes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: (8 + size + entry["data_offsets"][0], 8 + size + entry["data_offsets"][1])
        for name, entry in header.items()
    }
