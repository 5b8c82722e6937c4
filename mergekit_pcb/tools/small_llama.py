"""A small Llama that is trained on the spot, on text that every installation of mergekit has."""

from __future__ import annotations

import math
import pathlib
import random
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy
import torch

from mergekit_pcb.errors import PCBError

VOCABULARY = 512
CONTEXT = 128
BATCH = 16
WARM_UP_STEPS = 20
TEXT_PER_DOMAIN = 1 << 20
TEXT_PER_FILE = 20_000


def texts(domain: str, per_file: int = TEXT_PER_FILE, total: int = TEXT_PER_DOMAIN) -> list[str]:
    """Text of one domain from the files of this installation, in an order of its own.

    ``per_file`` and ``total`` are numbers of characters. Raises :class:`PCBError`.
    """
    stubs = pathlib.Path(numpy.__file__).parent
    sources: dict[str, Callable[[], Iterable[pathlib.Path]]] = {
        "python": lambda: pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"),
        "c++": lambda: _headers(pathlib.Path(torch.__file__).parent / "include"),
        "prose": _descriptions,
        "metadata": _descriptions,
        "stubs": lambda: stubs.glob("**/*.pyi"),
    }
    ordered = sorted(sources[domain]())
    random.Random(domain).shuffle(ordered)  # noqa: S311 - not for secrets
    written = (file.read_text(encoding="utf-8", errors="ignore") for file in ordered)
    if domain in ("prose", "metadata"):  # the description, or the fields before it
        written = (text.partition("\n\n")[2 * (domain == "prose")] for text in written)
    found = up_to(total, written, per_file)
    size = sum(map(len, found))
    if size < TEXT_PER_DOMAIN // 8:
        raise PCBError(
            f"find enough {domain} text to train a model",
            f"the installed packages hold only {size} characters of it",
            "install torch and mergekit from their wheels in this environment",
        )
    return found


def up_to(total: int, texts: Iterable[str], per_text: int) -> list[str]:
    """The beginnings of texts, of ``per_text`` characters, until there are ``total``."""
    found: list[str] = []
    size = 0
    for text in texts:
        found.append(text[:per_text])
        size += len(found[-1])
        if size >= total:
            break
    return found


def _descriptions() -> Iterator[pathlib.Path]:
    """Of the packages that can be imported, wherever they are."""
    # Resolved, for lib64 may be lib, and no text is to stand twice.
    places = {pathlib.Path(path).resolve() for path in sys.path if pathlib.Path(path).is_absolute()}
    for place in sorted(places):
        yield from place.glob("*.dist-info/METADATA")


def _headers(folder: pathlib.Path) -> list[pathlib.Path]:
    """All headers but thousands that are generated and much the same."""
    return [file for file in folder.glob("**/*.h") if file.parent != folder / "ATen" / "ops"]


def new_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level tokenizer of ``VOCABULARY`` tokens, trained on these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sequences(tokenizer: Any, files: Sequence[str]) -> torch.Tensor:
    """All tokens of the files one after another, as ``[any, CONTEXT]``."""
    ids = [token for encoding in tokenizer.encode_batch(files) for token in encoding.ids]
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)


def new_model() -> Any:
    """A small Llama of random weights, for ``VOCABULARY`` tokens and ``CONTEXT`` of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(
    model: Any, sequences: torch.Tensor, steps: int, rate: float, tick: Callable[[], Any]
) -> None:
    """Minimise the loss of random batches with AdamW; the rate falls along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    for step in range(steps):
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        batch = sequences[torch.randint(len(sequences), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tick()
