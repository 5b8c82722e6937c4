"""Checkpoint files that cannot be read: which one it is, where loaders only say that something is.

A loader's error names neither file nor remedy, and comes in any of a dozen types. So whatever is
raised while a checkpoint is read, its files are looked at one by one, and the first that is
damaged or missing is named.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import zipfile
from collections.abc import Iterable, Iterator

from safetensors import SafetensorError, safe_open

from mergekit_pcb.errors import PCBError, one_line

#: In the order in which mergekit looks for them.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")


@contextlib.contextmanager
def named(checkpoints: Iterable[str]) -> Iterator[None]:
    """Turn an error of reading these folders or files into one that names the damaged file.

    Errors that no damaged file explains pass through.
    """
    try:
        yield
    except PCBError:
        raise
    except Exception:  # whatever a loader raises
        for checkpoint in checkpoints:
            for file, reason in damaged(pathlib.Path(checkpoint)):
                raise PCBError(
                    f"read {file}", reason, "copy or download it again, or repair it"
                ) from None
        raise


def damaged(checkpoint: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """The files of a local checkpoint that are damaged or missing, and how."""
    if checkpoint.is_file():
        yield from _damage(checkpoint, set())
    for name in WEIGHTS if checkpoint.is_dir() else ():
        index = checkpoint / f"{name}.index.json"
        if index.exists():
            yield from _damaged_shards(index)
            return
        if (checkpoint / name).exists():
            yield from _damage(checkpoint / name, set())
            return


def _damaged_shards(index: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    shards: dict[str, set[str]] = {}
    try:
        for tensor, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            shards.setdefault(shard, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield index, f"it is no index of shards ({one_line(error)})"
        return
    for shard in sorted(shards):
        yield from _damage(index.parent / shard, shards[shard])


def _damage(file: pathlib.Path, tensors: set[str]) -> Iterator[tuple[pathlib.Path, str]]:
    """What is wrong with a file that should hold these tensors, if anything."""
    try:
        if not file.exists():
            yield file, "it is missing"
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as handle:
                missing = sorted(tensors - set(handle.keys()))
            if missing:
                yield file, f"it lacks {missing[0]}, which the index places in it"
        elif not zipfile.is_zipfile(file) and not _is_old_pickle(file):
            yield file, "it is damaged or no file of torch"
    except (OSError, SafetensorError) as error:
        yield file, f"it is damaged or no safetensors file ({one_line(error)})"


def _is_old_pickle(file: pathlib.Path) -> bool:
    """Whether it begins as torch's files before version 1.6 do."""
    with file.open("rb") as start:
        return start.read(1) == b"\x80"
