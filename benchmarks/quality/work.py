"""What a run that was stopped goes on with: scores and trained models, until there is a record."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import write_text

StateDict = dict[str, torch.Tensor]


class Work:
    """A folder of one run; without one, everything is made and nothing is kept.

    ``code`` is the digest of what makes it; what other code has left is refused.
    """

    def __init__(self, folder: pathlib.Path | None = None, code: str = "") -> None:
        self.folder = folder
        self.scores: dict[str, Any] = {}
        if folder is None:
            return
        mark = folder / "code"
        if folder.exists() and not (mark.exists() and mark.read_text(encoding="utf-8") == code):
            raise PCBError(
                f"go on in {folder}",
                "another version of the code has begun there",
                "remove it, or name another folder for --out",
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(mark, code)
        if self._lines.exists():
            for line in self._lines.read_text(encoding="utf-8").splitlines():
                try:
                    key, score = json.loads(line)
                except ValueError:  # the line that it was stopped in
                    continue
                self.scores[key] = score

    @property
    def _lines(self) -> pathlib.Path:
        return pathlib.Path(str(self.folder)) / "scores.jsonl"

    def score(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned for this key, a number or anything that JSON holds."""
        if self.folder is None:
            return make()
        key = json.dumps(key, sort_keys=True)
        if key not in self.scores:
            self.scores[key] = make()
            with self._lines.open("a", encoding="utf-8") as lines:
                lines.write("\n" * self._broken() + json.dumps([key, self.scores[key]]) + "\n")
        return self.scores[key]

    def _broken(self) -> bool:
        """Whether the last line has no end."""
        return self._lines.exists() and self._lines.read_bytes()[-1:] not in (b"\n", b"")

    def state(self, name: str, make: Callable[[], StateDict]) -> StateDict:
        """A model that ``make`` trained, in full precision."""
        if self.folder is None:
            return make()
        file = self.folder / f"{name}.safetensors"
        if file.exists():
            try:
                return load_file(file)
            except (OSError, SafetensorError):  # half-written by a machine that went down
                file.unlink()
        state = make()
        partial = file.with_suffix(".partial")
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, partial)
        partial.rename(file)
        return state

    def remove(self) -> None:
        """Once the record is there."""
        if self.folder is not None:
            shutil.rmtree(self.folder)


#: Where there is no folder.
NOTHING_KEPT = Work()
