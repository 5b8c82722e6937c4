"""A trial's model: a weighted sum of what each task contributes, or a whole merge.

Contributions are computed once, by whoever comes first, and every trial reads them. They are
trusted only if their digests are those that were written down when they were complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from mergekit_pcb.core.dare import GENERATOR
from mergekit_pcb.core.matrices import Layout
from mergekit_pcb.core.measure import finite
from mergekit_pcb.core.refine import Spectrum, apply
from mergekit_pcb.core.vectors import promoted, working_dtype
from mergekit_pcb.errors import PCBError, one_line
from mergekit_pcb.files import size, write_text
from mergekit_pcb.host import planning
from mergekit_pcb.host.groups import beyond, explained, refuse_beyond
from mergekit_pcb.host.inputs import Inputs
from mergekit_pcb.host.plan import PlanOptions
from mergekit_pcb.host.prepared import Prepared
from mergekit_pcb.host.statistics_file import digest
from mergekit_pcb.tools.search_job import Job, configured
from mergekit_pcb.tools.search_space import EvaluationError, Shared
from mergekit_pcb.tools.search_storage import CONTRIBUTIONS, FORMAT, MERGED, held

#: So many merges may fail one after another; then it is not their values.
IN_A_ROW = 3


@contextlib.contextmanager
def written(place: pathlib.Path) -> Iterator[None]:
    """Turn a disk that is full, or refuses, into a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # the Hub's client, of a model that it cannot find
        raise PCBError(
            f"write to {place}",
            one_line(error),
            "make room there and continue the search by the same command",
        ) from None


class Merges:
    """Makes trials' models; who asks for one removes it, whole or not."""

    def __init__(self, job: Job, options: Any) -> None:
        self._job = job
        # A sum is written as safetensors, so what it is a sum of has to be.
        own = {"quiet": True, "write_model_card": False, "safe_serialization": True}
        self._options = options.model_copy(update=own)
        self._skeleton, self._parts = job.folder / MERGED, job.folder / CONTRIBUTIONS
        self._merging = threading.Lock()  # mergekit's commands merge one model at a time
        self._told = False  # what a trial takes
        self._failures = 0  # merges that failed since one did not

    def prepare(self) -> None:
        """Compute what each task contributes, unless another worker has; it is waited for."""
        if not self._job.linear:
            self._refuse_without_room(measured=True)
            return
        waiting = "another process computes the contributions; waiting for it"
        with held(self._job.folder / "measuring", waiting):
            whole = self._stored_whole()
            self._refuse_without_room(measured=whole)
            if not whole:
                with written(self._job.folder):
                    try:
                        self._measure()
                    except BaseException:
                        self.clean()
                        raise

    def trial(
        self, weights: Sequence[float], shared: Shared, folder: pathlib.Path, *, start: bool = False
    ) -> pathlib.Path:
        """Write the model of these values into a folder of its own.

        Raises :class:`EvaluationError` where there is no merge of these values, unless it is the
        ``start``: a configuration that cannot be merged as it stands is not searched.
        """
        with written(self._job.folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)
            if self._job.linear:
                scale = shared.get("lambda")
                with self._failing_alone(start):
                    self._sum(weights, None if scale is None else float(scale), folder)
            else:
                changed = configured(self._job.configuration, weights, shared)
                with self._merging, self._failing_alone(start):
                    planning.run(changed, folder, self._options)
        return folder

    @contextlib.contextmanager
    def _failing_alone(self, start: bool) -> Iterator[None]:
        """Let values that cannot be merged fail, and everything if several do one after another."""
        try:
            yield
        except (PCBError, RuntimeError, ValueError) as error:
            self._failures += 1
            if start or self._failures > IN_A_ROW:
                raise
            raise EvaluationError(f"the merge failed: {one_line(error)}") from None
        self._failures = 0

    def clean(self) -> None:
        """Remove the large files; the trials' scores stay."""
        for folder in (self._parts, self._skeleton):
            shutil.rmtree(folder, ignore_errors=True)

    def _refuse_without_room(self, *, measured: bool) -> None:
        """Say what the search takes on disk, and refuse where there is less."""
        plan = planning.plan_without_merging(self._job.configuration, self._options)
        parts = model = 0
        for _, tensors in Inputs(plan).shapes():
            present = [tensor for tensor in tensors.values() if tensor is not None]
            if not present:
                continue
            cast = plan.dtype or promoted(present)
            count = max(tensor.numel() for tensor in present)
            model += count * (plan.out_dtype or cast).itemsize
            parts += count * len(present) * working_dtype(cast).itemsize
        jobs, folder = self._job.jobs, self._job.folder
        need = jobs * model + (0 if measured else parts + model)
        free = shutil.disk_usage(folder).free
        each = f"{jobs} model{'s' if jobs > 1 else ''} of {size(model)} at a time"
        if not measured:
            each = f"contributions of {size(parts + model)}, and {each}"
        if need > free:
            raise PCBError(
                f"search in {folder}",
                f"it takes {each}, and {size(free)} are free there",
                "make room, name another folder with --work, or lower --jobs",
            )
        tqdm.write(f"on disk: {each}")

    def _measure(self) -> None:
        """Merge once, keeping what each task contributes."""
        from safetensors.torch import save_file

        self.clean()
        self._parts.mkdir()
        index: dict[str, Any] = {}
        numbers = itertools.count()  # with --multi-gpu several threads come here

        def keep(tensor: Prepared) -> None:
            aligned, statistics = tensor.aligned, tensor.statistics
            parts, step = tensor.contributions()
            named = zip(tensor.positions, parts, strict=True)
            state = {f"task {position}": part.cpu() for position, part in named}
            state["base"] = aligned.base.to(statistics.dtype).cpu()
            file = f"{next(numbers):06d}.safetensors"
            own = zip(map(str, tensor.positions), tensor.weights, strict=True)
            index[aligned.name] = {
                "file": file,
                "weights": dict(own),
                "lambda": tensor.scale,
                "spectrum": None if step is None else dataclasses.asdict(step),
            }
            save_file(state, self._parts / file)

        observed = PlanOptions.of(self._options, observe=keep)
        planning.run(self._job.configuration, self._skeleton, observed)
        stored = {
            "format": FORMAT,
            "generator": GENERATOR,
            "tensors": index,
            "digests": self._digests(),
        }
        write_text(self._parts / "index.json", json.dumps(stored))

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

    def _sum(self, weights: Sequence[float], scale: float | None, folder: pathlib.Path) -> None:
        """Write the sum for these values; for those that are not searched, as they were merged."""
        from safetensors.torch import load_file, save_file

        began, evened = time.monotonic(), 0
        stored = json.loads((self._parts / "index.json").read_text())
        index = stored["tensors"]
        folder.mkdir()
        for file in self._skeleton.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder)
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
                if not finite(value):
                    raise beyond(value.dtype, name)
                refuse_beyond(state[name].dtype, value, name)
                state[name] = value.to(state[name].dtype).view(state[name].shape)
            save_file(state, folder / file.name, metadata=metadata)
        if evened and not self._told:
            self._told = True
            tqdm.write(
                f"each trial is a weighted sum of files and evens the singular values of {evened} "
                f"matrices: {time.monotonic() - began:.1f} s before it is scored"
            )


def _spectrum(stored: dict[str, Any]) -> Spectrum:
    return Spectrum(Layout(**stored["layout"]), tuple(stored["exponents"]))
