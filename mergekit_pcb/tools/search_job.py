"""What a search over a configuration is: its start, its bounds, and the best one as YAML."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import seen
from mergekit_pcb.host.configuration import named_models, tokenizer_source
from mergekit_pcb.host.parameters import SPECS
from mergekit_pcb.tools.search_scores import Score
from mergekit_pcb.tools.search_space import BOUNDS, CHOICES, Bounds, Shared, Space

#: What can be searched beside the weights.
SHARED = tuple(name for name in (*BOUNDS, *CHOICES) if name != "weight")
#: Beside the best configuration: the work, a front, a picture.
TAKEN = (".search", ".front", ".png")
#: Files of a model that mergekit and transformers read.
READ = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|index\.json|model)|(adapter_)?config\.json"
    r"|(tokenizer|vocab|merges|special_tokens|added_tokens).*"
)
#: Options of mergekit's that a model depends on, beside its configuration.
HOST = (
    "allow_crimes", "unsafe_truncate_embeddings", "lora_merge_dtype", "trust_remote_code",
    "copy_tokenizer", "tensor_union", "tensor_intersection",
)  # fmt: skip
#: What a trial needs no merge for, but a weighted sum of files.
LINEAR = {"weight", "lambda"}


@dataclass(frozen=True)
class Job:
    """A search over a configuration for mergekit-yaml or mergekit-pytorch."""

    configuration: dict[str, Any]
    command: str
    output: pathlib.Path
    folder: pathlib.Path
    searched: tuple[str, ...] = ("weight",)
    #: Of what is searched; those of the others are the space's own.
    bounds: Bounds = field(default_factory=dict)
    budget: int = 100
    seed: int = 0
    minimize: bool = False
    timeout: float | None = None
    #: Where scores are read; without any, the last number that the command prints is the score.
    scores: tuple[Score, ...] = ()
    #: Trials at a time, and the graphics cards that they take in turns.
    jobs: int = 1
    gpus: tuple[int, ...] = ()
    #: Optuna's storage; without one, a journal in the folder.
    storage: str | None = None
    #: Those of mergekit's options that a model depends on.
    host: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what no search can be made of, before anything is written."""
        if "{model}" not in self.command:
            raise PCBError(
                "evaluate",
                "the command does not name the model",
                "write {model} where its path goes",
            )
        for name, (low, high) in self.bounds.items():
            if name not in self.searched:
                what = f"search {name} from {low:g} to {high:g}"
                raise PCBError(what, f"{name} is not searched", f"add --search {name}")
            if not (low < high and math.isfinite(high - low)):
                what = f"{low:g} and {high:g} bound nothing to search"
                raise PCBError(f"search {name}", what, "give NAME LOW HIGH, as in weight 0.5 3")
            for end in (low, high):
                SPECS[name].validate(end)
        if self.output.suffix in TAKEN:
            raise PCBError(
                f"write the best configuration to {self.output}",
                f"names that end in {self.output.suffix} are those of what a search leaves beside",
                "name it .yml",
            )
        if self.output.resolve().is_relative_to(self.folder.resolve()):
            raise PCBError(
                f"write the best configuration to {self.output}",
                f"{self.folder} holds what the search itself keeps, and nothing else",
                "write it elsewhere, or name another folder with --work",
            )
        front = self.output.with_suffix(".front")
        if len(self.scores) > 1 and front.exists() and not front.is_dir():
            raise PCBError(
                f"write the best configurations to {front}", "it is no folder", "move it away"
            )
        names = [score.name for score in self.scores]
        if len(set(names)) < len(names):
            raise PCBError("score", "two scores have one name", "name them apart")
        if self.minimize and self.scores:
            raise PCBError(
                "minimize all of several scores",
                "each has a direction of its own",
                "write --lower NAME=FILE:KEY where lower is better",
            )
        for score in self.scores:
            if self.jobs > 1 and "{model}" not in score.file:
                raise PCBError(
                    f"run {self.jobs} trials at a time",
                    f"all would write the score {score.name} to {score.file}",
                    "let the command write into {model}",
                )

    def digest(self) -> str:
        """Of everything that a study belongs to; a larger budget goes on with the same."""
        bounds = {**BOUNDS, **self.bounds}
        told = [self.configuration, self.command, self.searched, self.seed]
        told += [{name: bounds[name] for name in self.searched if name in bounds}]
        read = named_models(self.configuration) + tokenizer_source(self.configuration)
        told += [_files_of(name) for name in read]
        told += [self.minimize, [str(score) for score in self.scores], self.host]
        text = json.dumps(told, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def minimized(self) -> list[bool]:
        """Of every score, whether lower is better."""
        return [score.lower for score in self.scores] or [self.minimize]

    @property
    def linear(self) -> bool:
        return set(self.searched) <= LINEAR


def _files_of(name: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of change of the files that a local model is read from.

    Others may come and go beside them: results of an evaluation, logs, a card.
    """
    if not seen(name):
        return []
    place = pathlib.Path(name)
    files = sorted(place.iterdir()) if place.is_dir() else []
    files = [file for file in files if READ.fullmatch(file.name) and file.is_file()]
    if place.is_file():
        files = [place]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def tasks_of(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    """The models of a configuration that are not its base."""
    models = configuration.get("models")
    if configuration.get("merge_method") != "pcb" or not isinstance(models, list):
        raise PCBError(
            "search this configuration",
            "it is no `merge_method: pcb` with a list of `models:`",
            "search weights of whole models; slices have no one weight",
        )
    base = configuration.get("base_model")
    return [entry for entry in models if isinstance(entry, dict) and entry.get("model") != base]


def space_of(job: Job) -> Space:
    """Where the search starts: the configuration's own values."""
    common, *own = (
        entry.get("parameters") or {} for entry in (job.configuration, *tasks_of(job.configuration))
    )
    if not all(isinstance(values, dict) for values in (common, *own)):
        raise PCBError(
            "search this configuration", "its parameters are no mapping", "write `name: value`"
        )

    def number(name: str, values: dict[str, Any]) -> float | str:
        value = values.get(name, common.get(name, SPECS[name].default))
        if isinstance(value, (list, dict)):
            raise PCBError(
                f"search {name}",
                f"the configuration gives it filters or a gradient ({value!r})",
                f"give {name} one value to start from",
            )
        found: float | str = SPECS[name].validate(value)
        return found

    shared = []
    if "density" in job.searched and common.get("statistics"):
        raise PCBError(
            "search density",
            "the statistics of the configuration's document were measured with one",
            "leave `statistics` out of it",
        )
    for name in [name for name in SHARED if name in job.searched]:
        if any(name in values for values in own):
            raise PCBError(
                f"search {name}",
                "models have values of their own",
                "write one at the top level to start from",
            )
        shared.append((name, number(name, {})))
    refined = common.get("refine", "none") != "none" or "refine" in job.searched
    if "anchor" in job.searched and not refined:
        raise PCBError(
            "search anchor", "it holds `refine: solve` to PCB", "write refine: solve, or search it"
        )
    weights = [float(number("weight", v)) for v in own if "weight" in job.searched]
    return Space(tuple(weights), tuple(shared), job.bounds)


def configured(
    configuration: dict[str, Any], weights: Sequence[float], shared: Shared
) -> dict[str, Any]:
    """The configuration with these values in it."""
    made = copy.deepcopy(configuration)
    if weights:
        for entry, weight in zip(tasks_of(made), weights, strict=True):
            entry["parameters"] = {**(entry.get("parameters") or {}), "weight": weight}
    if shared:
        made["parameters"] = {**(made.get("parameters") or {}), **shared}
    return made
