"""A suite: a base, experts fine-tuned from it, and data in three parts that never mix.

Training data make the models (and what Fisher merging and RegMean ask for), validation data
choose among merges, test data are read once, for what was chosen.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from benchmarks.quality.work import StateDict, Work

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
#: What a model is called with, and the class that is right for each row of its logits.
Batch = tuple[tuple[torch.Tensor, ...], torch.Tensor]


class Sizes(NamedTuple):
    """How many examples of each task are looked at once the models are trained."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train, and how much of each task to look at then."""

    base_steps: int
    base_rate: float
    expert_steps: int
    expert_rate: float
    batch: int
    looked_at: Sizes


class Question(NamedTuple):
    """Sequences ``[choices, length]`` that differ after ``read`` tokens; the first one is right."""

    choices: torch.Tensor
    read: int


@dataclass(frozen=True)
class Distance:
    """How far experts are trained from their base, in multiples of a schedule's steps and rate."""

    name: str
    steps: int = 1
    rate: int = 1

    def of(self, schedule: Schedule) -> tuple[int, float]:
        return self.steps * schedule.expert_steps, self.rate * schedule.expert_rate


#: A merged model of so many bytes at most is kept from its search to its test.
HELD_BYTES = 64 << 20
#: The suites that speak of shares of scores, as the paper's tables of images do.
OF_SCORES = ("glyphs",)
NEAR = Distance("near")
DISTANCES = (
    NEAR,
    Distance("four times the steps", steps=4),
    Distance("five times the rate", rate=5),
)


@dataclass(frozen=True, eq=False)
class Suite:
    """Models and data of one seed.

    ``model`` returns logits ``[rows, classes]`` and lends its modules to any state dict.
    Scores are accuracies, or negative losses in nats per token: higher is better.
    ``elsewhere`` are data of tasks that no model was trained on, ``learned_from`` what models
    were trained on beside ``data``, ``characters`` what counting characters scores on test data.
    """

    name: str
    metric: Literal["accuracy", "loss"]
    seed: int
    tasks: tuple[str, ...]
    model: torch.nn.Module
    base: StateDict
    experts: Sequence[StateDict]
    data: dict[Split, dict[str, list[Batch]]]
    elsewhere: dict[str, list[Batch]] = field(default_factory=dict)
    learned_from: Sequence[torch.Tensor] = ()
    characters: dict[str, float] = field(default_factory=dict)
    questions: dict[str, list[Question]] = field(default_factory=dict)
    #: A copy of the model, in a lower precision, that scores are computed with; else the model.
    scorer: torch.nn.Module | None = None
    #: Checkpoints of the base and the experts, which mergekit's own command then merges.
    folders: Sequence[pathlib.Path] = ()
    work: Work = field(default_factory=Work)
    #: Merged models that are scored once more, by their method and setting; see :meth:`hold`.
    held: dict[str, StateDict] = field(default_factory=dict, init=False)

    def hold(self, method: str, knobs: dict[str, float], state: StateDict) -> None:
        """Keep what is scored of a merged model in memory, unless it is large."""
        scored = self.model if self.scorer is None else self.scorer
        dtype = next(scored.parameters()).dtype
        if sum(tensor.numel() for tensor in state.values()) * dtype.itemsize <= HELD_BYTES:
            self.held[str((method, knobs))] = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in state.items()
            }

    def holds(self, method: str, knobs: dict[str, float]) -> StateDict | None:
        """What :meth:`hold` kept."""
        return self.held.get(str((method, knobs)))

    def scores(self, state: StateDict, split: Split) -> dict[str, float]:
        """The score of a model on every task."""
        return self._scores(state, {task: self.data[split][task] for task in self.tasks})

    def score(self, state: StateDict, split: Split, task: str) -> float:
        return self._scores(state, {task: self.data[split][task]})[task]

    def individual(self, split: Split) -> dict[str, float]:
        """The score of each task's own expert."""
        return {
            task: self.score(expert, split, task)
            for task, expert in zip(self.tasks, self.experts, strict=True)
        }

    def unlabelled(self) -> list[tuple[torch.Tensor, ...]]:
        """The validation inputs of all tasks, in one order that is drawn once for all."""
        batches = [inputs for task in self.tasks for inputs, _ in self.data["validation"][task]]
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))
        return [batches[number] for number in order]

    def scores_elsewhere(self, state: StateDict) -> dict[str, float]:
        return self._scores(state, self.elsewhere)

    @torch.no_grad()
    def answered(self, state: StateDict) -> dict[str, float]:
        """The part of each task's questions in which the right choice is the likeliest."""
        if not self.questions:
            return {}
        model, found = self._loaded(state), {}
        for task, questions in self.questions.items():
            right = 0
            for rows, read in questions:
                logits = model(rows).view(*rows[:, 1:].shape, -1).float().log_softmax(-1)
                of_tokens = logits.gather(-1, rows[:, 1:, None])[..., 0]
                right += int(of_tokens[:, read - 1 :].sum(-1).argmax()) == 0
            found[task] = right / len(questions)
        return found

    def validation(self, state: StateDict) -> float:
        """What a search maximises: the mean over the tasks."""
        scores = self.scores(state, "validation")
        return sum(scores.values()) / len(scores)

    def among(self, tasks: Sequence[str]) -> Suite:
        """The suite of some tasks and their experts, without data from elsewhere."""
        experts = [self.experts[self.tasks.index(task)] for task in tasks]
        folders = self.folders and [
            self.folders[0],
            *(self.folders[1 + self.tasks.index(task)] for task in tasks),
        ]
        return replace(
            self, tasks=tuple(tasks), experts=experts, elsewhere={}, questions={}, folders=folders
        )

    def digest(self) -> str:
        """Of all data: the same on two machines if their data are."""
        tensors = list(self.learned_from)
        for part in (*self.data.values(), self.elsewhere):
            for batches in part.values():
                for inputs, labels in batches:
                    tensors += [*inputs, labels]
        digest = hashlib.blake2b(digest_size=8)
        for tensor in tensors:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _scores(self, state: StateDict, data: dict[str, list[Batch]]) -> dict[str, float]:
        if not data:
            return {}
        model = self._loaded(state)
        # A scorer is never trained, and so may forget that it could be.
        with torch.no_grad() if self.scorer is None else torch.inference_mode():
            return {task: self._score(model, batches) for task, batches in data.items()}

    def _score(self, model: torch.nn.Module, batches: Sequence[Batch]) -> float:
        total, rows = 0.0, 0
        for inputs, labels in batches:
            logits = model(*inputs).float()
            if self.metric == "accuracy":
                total += float((logits.argmax(-1) == labels).sum())
            else:
                total -= float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            rows += len(labels)
        return total / rows

    def _loaded(self, state: StateDict) -> torch.nn.Module:
        model = self.model if self.scorer is None else self.scorer
        model.load_state_dict(state)
        return model.eval()


def share(
    suite: str, scores: dict[str, float], base: dict[str, float], individual: dict[str, float]
) -> float:
    """Of the experts' mean gain over the base; in some suites of their scores, averaged.

    Of the tasks that ``scores`` has. Zero where the experts gained nothing.
    """
    if suite in OF_SCORES:
        return statistics.mean(scores[task] / individual[task] for task in scores)
    start = statistics.mean(base[task] for task in scores)
    reached = statistics.mean(individual[task] for task in scores)
    gain = statistics.mean(scores.values()) - start
    return gain / (reached - start) if reached != start else 0.0


def train(
    parameters: Iterable[torch.nn.Parameter],
    logits: Callable[..., torch.Tensor],
    batch: Callable[[], Batch],
    steps: int,
    rate: float,
) -> None:
    """Minimise the cross-entropy with AdamW; rates rise for a twentieth and fall along a cosine."""
    learned = list(parameters)
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / (0.05 * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        ),
    )
    for _ in range(steps):
        inputs, labels = batch()
        torch.nn.functional.cross_entropy(logits(*inputs), labels).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def snapshot(model: torch.nn.Module) -> StateDict:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
