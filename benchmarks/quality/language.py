"""Suite 1, domains of language: a small Llama, and experts on Python, C++, prose and JSON.

The text is what every installation of mergekit and torch brings, as in the demo. A file is in
one part only, and files of equal text count once. CMake files and Cython, which nobody was
trained on, show what a merge costs elsewhere.
"""

from __future__ import annotations

import pathlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.quality.suite import SPLITS, Batch, Sizes, Split, StateDict, Suite, snapshot, train
from mergekit_pcb import demo

#: What the base learns from: mostly prose, so that the experts have something to learn.
MIXTURE = {"python": 0.1, "c++": 0.1, "prose": 0.7, "json": 0.1}
TASKS = ("python", "c++", "prose", "json")
ELSEWHERE = {"cmake": "share/cmake/**/*.cmake", "yaml": "../torchgen/packaged/**/*.yaml"}
CHARACTERS = 3 << 20
CHARACTERS_PER_FILE = 60_000
SEQUENCES_IN_A_BATCH = 24


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train, and how many sequences of each domain to look at then."""

    base_steps: int = 700
    base_rate: float = 3e-3
    expert_steps: int = 150
    expert_rate: float = 3e-4
    batch: int = 16
    looked_at: Sizes = Sizes(train=64, validation=12, test=48)  # noqa: RUF009 - a tuple


class Predictor(torch.nn.Module):
    """A Llama that is asked for every next token: logits ``[sequences · 127, vocabulary]``."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = demo.new_model()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.llama(input_ids=tokens).logits[:, :-1]
        return logits.flatten(0, 1)


def build(seed: int, schedule: Schedule) -> Suite:
    """Train the base and its experts; ``seed`` decides on first weights and batches."""
    files = {task: _parts(demo.texts(task, CHARACTERS_PER_FILE, CHARACTERS)) for task in TASKS}
    tokenizer = demo.new_tokenizer([text for parts in files.values() for text in parts["train"]])
    tokens = {
        split: {task: demo.sequences(tokenizer, files[task][split]) for task in TASKS}
        for split in SPLITS
    }
    torch.manual_seed(seed)
    model = Predictor()

    def taught(mixture: dict[str, float], steps: int, rate: float) -> StateDict:
        shares = torch.tensor(list(mixture.values()))
        sources = [tokens["train"][task] for task in mixture]

        def batch() -> Batch:
            kinds = shares.multinomial(schedule.batch, replacement=True)
            rows = torch.stack(
                [sources[kind][torch.randint(len(sources[kind]), ())] for kind in kinds]
            )
            return (rows,), rows[:, 1:].flatten()

        train(model.parameters(), model, batch, steps, rate)
        return snapshot(model)

    base = taught(MIXTURE, schedule.base_steps, schedule.base_rate)
    experts = []
    for task in TASKS:
        model.load_state_dict(base)
        experts.append(taught({task: 1.0}, schedule.expert_steps, schedule.expert_rate))
    data = {
        split: {
            task: _batches(rows[: getattr(schedule.looked_at, split)])
            for task, rows in part.items()
        }
        for split, part in tokens.items()
    }
    elsewhere = {
        kind: _batches(demo.sequences(tokenizer, _found(pattern))[: schedule.looked_at.test])
        for kind, pattern in ELSEWHERE.items()
    }
    return Suite("language", "loss", TASKS, model, base, experts, data, elsewhere)


def _parts(files: Sequence[str]) -> dict[Split, list[str]]:
    """Seven, one and two tenths of the text; of equal files the first."""
    files = list(dict.fromkeys(files))
    reached, total = 0, sum(map(len, files))
    parts: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for file in files:
        share = reached / total
        split: Split = "train" if share < 0.7 else "validation" if share < 0.8 else "test"
        parts[split].append(file)
        reached += len(file)
    return parts


def _found(pattern: str) -> list[str]:
    files = sorted(pathlib.Path(torch.__file__).parent.glob(pattern))
    random.Random(pattern).shuffle(files)  # noqa: S311 - not for secrets
    return [file.read_text(encoding="utf-8")[:CHARACTERS_PER_FILE] for file in files]


def _batches(sequences: torch.Tensor) -> list[Batch]:
    return [((rows,), rows[:, 1:].flatten()) for rows in sequences.split(SEQUENCES_IN_A_BATCH)]
