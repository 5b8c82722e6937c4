"""Suite 1, domains of language: a small Llama, and experts on Python, C++, prose and JSON.

The text is what Python, torch and transformers bring. The base learns mostly from the sources of
transformers, a corpus of its own although it is Python too, and a little from each domain: modules
of the standard library, torch's headers, the documentation in torch's modules, and JSON documents
made from the structure of modules that are not among the Python text. A file is in one part only,
and files that share more than a tenth of their lines with training text are not evaluated. CMake
files and torch's YAML, which nobody was trained on, show what a merge costs elsewhere.
"""

from __future__ import annotations

import ast
import json
import pathlib
import random
import sysconfig
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch

from benchmarks.quality.suite import (
    NEAR,
    SPLITS,
    Batch,
    Distance,
    Schedule,
    Sizes,
    Split,
    StateDict,
    Suite,
    snapshot,
    train,
)
from benchmarks.quality.work import NOTHING_KEPT, Work
from mergekit_pcb.errors import PCBError
from mergekit_pcb.tools import small_llama

TASKS = ("python", "c++", "prose", "json")
#: What the base learns from.
MIXTURE = {"general": 0.88, **dict.fromkeys(TASKS, 0.03)}
ELSEWHERE = {"cmake": "share/cmake/**/*.cmake", "yaml": "../torchgen/packaged/**/*.yaml"}
CHARACTERS = 3 << 20
GENERAL_CHARACTERS = 6 << 20
CHARACTERS_PER_FILE = 20_000
#: Shorter lines are alike in all files; of others, so much may be known from training.
TELLING_LINE = 20
KNOWN_SHARE = 0.1
SEQUENCES_IN_A_BATCH = 24
SCHEDULE = Schedule(
    base_steps=1100,
    base_rate=3e-3,
    expert_steps=100,
    expert_rate=3e-4,
    batch=16,
    looked_at=Sizes(train=64, validation=32, test=80),
)


class Predictor(torch.nn.Module):
    """A Llama that is asked for every next token: logits ``[sequences · 127, vocabulary]``."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = small_llama.new_model()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.llama(input_ids=tokens).logits[:, :-1]
        return logits.flatten(0, 1)


def build(
    seed: int,
    schedule: Schedule,
    distances: Sequence[Distance] = (NEAR,),
    work: Work = NOTHING_KEPT,
) -> Iterator[Suite]:
    """Train the base, and its experts at each distance; ``seed`` decides on weights and batches."""
    general = texts("general", GENERAL_CHARACTERS)
    files = {task: parts_of(texts(task), general) for task in TASKS}
    tokenizer = small_llama.new_tokenizer(
        [text for parts in files.values() for text in parts["train"]]
    )
    tokens = {
        split: {task: small_llama.sequences(tokenizer, files[task][split]) for task in TASKS}
        for split in SPLITS
    }
    trained_on = {**tokens["train"], "general": small_llama.sequences(tokenizer, general)}
    torch.manual_seed(seed)
    model = Predictor()

    def taught(mixture: dict[str, float], steps: int, rate: float) -> StateDict:
        shares = torch.tensor(list(mixture.values()))
        sources = [trained_on[kind] for kind in mixture]

        def batch() -> Batch:
            kinds = shares.multinomial(schedule.batch, replacement=True)
            rows = torch.stack(
                [sources[kind][torch.randint(len(sources[kind]), ())] for kind in kinds]
            )
            return (rows,), rows[:, 1:].flatten()

        train(model.parameters(), model, batch, steps, rate)
        return snapshot(model)

    base = taught(MIXTURE, schedule.base_steps, schedule.base_rate)
    after = torch.get_rng_state()
    data = {
        split: {
            task: _batches(spread(rows, getattr(schedule.looked_at, split)))
            for task, rows in part.items()
        }
        for split, part in tokens.items()
    }
    elsewhere = {
        kind: _batches(
            spread(small_llama.sequences(tokenizer, found(pattern)), schedule.looked_at.test)
        )
        for kind, pattern in ELSEWHERE.items()
    }
    for distance in distances:
        torch.set_rng_state(after)
        experts = []
        for task in TASKS:
            model.load_state_dict(base)
            experts.append(taught({task: 1.0}, *distance.of(schedule)))
        yield Suite(
            "language",
            "loss",
            seed,
            TASKS,
            model,
            base,
            experts,
            data,
            elsewhere,
            learned_from=list(trained_on.values()),
            work=work,
        )


def texts(kind: str, characters: int = CHARACTERS) -> list[str]:
    """The files of a domain, in an order of its own, up to about so many characters."""
    import transformers

    if kind in ("python", "c++"):
        return small_llama.texts(kind, CHARACTERS_PER_FILE, characters)
    folder, pattern, written = {
        "general": (pathlib.Path(transformers.__file__).parent, "**/*.py", _source),
        "prose": (pathlib.Path(torch.__file__).parent, "**/*.py", _documentation),
        "json": (pathlib.Path(sysconfig.get_path("stdlib")), "*/**/*.py", _structure),
    }[kind]
    # Tests, copies of other modules, and many that are much the same.
    left_out = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "encodings"}
    modules = [
        file
        for file in sorted(folder.glob(pattern))
        if not left_out & set(file.relative_to(folder).parts)
    ]
    random.Random(kind).shuffle(modules)  # noqa: S311 - not for secrets
    return small_llama.up_to(characters, map(written, modules), CHARACTERS_PER_FILE)


def _source(module: pathlib.Path) -> str:
    return module.read_text(encoding="utf-8")


def _documentation(module: pathlib.Path) -> str:
    """The documentation in a module."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = ast.walk(ast.parse(module.read_bytes()))
    found = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)


def _structure(module: pathlib.Path) -> str:
    """What a module defines, as JSON with a function in each line."""
    lines: list[str] = []

    def define(body: Sequence[ast.stmt], depth: int) -> None:
        for node in body:
            found: dict[str, Any] = {}
            if isinstance(node, ast.ClassDef):
                found = {"class": node.name, "bases": [ast.unparse(base) for base in node.bases]}
            elif isinstance(node, ast.FunctionDef):
                arguments = {
                    one.arg: ast.unparse(one.annotation) if one.annotation else None
                    for one in node.args.args
                }
                found = {"function": node.name, "arguments": arguments}
            if found:
                lines.append(" " * depth + json.dumps({**found, "line": node.lineno}))
            if isinstance(node, ast.ClassDef):
                define(node.body, depth + 1)

    define(ast.parse(module.read_bytes()).body, 1)
    name = json.dumps(f"{module.parent.name}.{module.stem}")
    return f'{{"module": {name}, "defines": [\n' + ",\n".join(lines) + "\n]}\n"


def parts_of(files: Sequence[str], also: Sequence[str] = ()) -> dict[Split, list[str]]:
    """Seven, one and two tenths of the text; of equal files the first, of similar ones none.

    ``also`` is other text that is trained on.
    """
    files = list(dict.fromkeys(files))
    reached, total = 0, sum(map(len, files))
    parts: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for file in files:
        share = reached / total
        split: Split = "train" if share < 0.7 else "validation" if share < 0.8 else "test"
        parts[split].append(file)
        reached += len(file)
    known = {line for file in (*parts["train"], *also) for line in telling_lines(file)}
    for split in ("validation", "test"):
        parts[split] = [file for file in parts[split] if known_share(file, known) <= KNOWN_SHARE]
    return parts


def telling_lines(file: str) -> list[str]:
    lines = (line.strip() for line in file.splitlines())
    return [line for line in lines if len(line) >= TELLING_LINE]


def known_share(file: str, known: Container[str]) -> float:
    """How much of a file's telling lines are known, by characters."""
    lines = telling_lines(file)
    total = sum(map(len, lines))
    return sum(len(line) for line in lines if line in known) / total if total else 0.0


def spread(sequences: torch.Tensor, count: int) -> torch.Tensor:
    """So many sequences, evenly over all of them; raises :class:`PCBError` if there are fewer."""
    if len(sequences) < count:
        raise PCBError(
            "build a suite of language",
            f"the installed packages hold {len(sequences)} sequences of a kind of text for one of "
            f"its parts, and it takes {count}",
            "install the versions that docs/quality.md names",
        )
    return sequences[torch.linspace(0, len(sequences) - 1, count).long()]


def found(pattern: str) -> list[str]:
    files = sorted(pathlib.Path(torch.__file__).parent.glob(pattern))
    random.Random(pattern).shuffle(files)  # noqa: S311 - not for secrets
    return [file.read_text(encoding="utf-8")[:CHARACTERS_PER_FILE] for file in files]


def _batches(sequences: torch.Tensor) -> list[Batch]:
    return [((rows,), rows[:, 1:].flatten()) for rows in sequences.split(SEQUENCES_IN_A_BATCH)]
