"""The demo: train a small Llama and three experts of it, merge them, measure what came out.

Everything is made on the spot from text that every installation of mergekit already has.
It shows the way from checkpoints to a merged model; how good a method is, a model trained
for half a minute cannot show.
"""

from __future__ import annotations

import math
import pathlib
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from tqdm import tqdm

from mergekit_pcb.errors import PCBError

EXPERTS = ("python", "c++", "prose")
# Nobody specialises in the last one: it shows what a merge costs elsewhere.
DOMAINS = (*EXPERTS, "json")
# Each method as its authors publish it; what they leave open is left at its default.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 1.0},
    "ties": {"density": 0.2, "weight": 1.0},
    "pcb": {"density": 0.1, "weight": 1.0, "lambda": 1.0},
}

VOCABULARY = 512
CONTEXT = 128
BATCH = 16
WARM_UP_STEPS = 20
TEXT_PER_DOMAIN = 1 << 20
TEXT_PER_FILE = 20_000
HELD_OUT_SHARE = 0.1
HELD_OUT_SEQUENCES = 64


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; rates fall along a cosine."""

    base_steps: int = 320
    base_rate: float = 3e-3
    expert_steps: int = 60
    expert_rate: float = 3e-4


@dataclass(frozen=True)
class Row:
    """The loss of one model on every domain's held-out text, in nats per token."""

    model: str
    losses: tuple[float, ...]

    @property
    def average(self) -> float:
        return sum(self.losses) / len(self.losses)


@dataclass
class Domain:
    """Token sequences of shape [any, CONTEXT], to train on and to measure with."""

    train: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    held_out: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def run(directory: pathlib.Path, schedule: Schedule) -> list[Row]:
    """Train, merge and measure in ``directory``, which must be new or empty.

    Leaves there ``base`` and one folder per expert, and for each method a configuration
    and the merged checkpoint it makes. The global generators of ``torch`` are left as they
    were. Raises :class:`PCBError`.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PCBError(
            f"write the demo to {directory}",
            "something is there already",
            "name a directory that is new or empty",
        )
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        held_out = _train_all(directory, schedule)
    for method in METHODS:
        _merge(directory, method)
    return _measure_all(directory, held_out)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, the lowest loss of every column marked."""
    header = f"{'loss on held-out text':<22}" + "".join(f"{d:>10}" for d in (*DOMAINS, "average"))
    lines = [header, "-" * len(header)]
    columns = [(*row.losses, row.average) for row in rows]
    best = [min(column) for column in zip(*columns, strict=True)]
    for row, values in zip(rows, columns, strict=True):
        cells = (f"{v:>9.3f}{'*' if v == b else ' '}" for v, b in zip(values, best, strict=True))
        lines.append(f"{row.model:<22}" + "".join(cells))
    return "\n".join(lines)


def _train_all(directory: pathlib.Path, schedule: Schedule) -> dict[str, torch.Tensor]:
    tokenizer, domains = _tokenize({domain: texts(domain) for domain in DOMAINS})
    model = new_model()
    steps = schedule.base_steps + len(EXPERTS) * schedule.expert_steps
    with tqdm(total=steps, unit="step") as progress:

        def train(name: str, data: torch.Tensor, steps: int, rate: float) -> None:
            progress.set_description(f"training {name}")
            _train(model, data, steps, rate, progress.update)
            model.save_pretrained(directory / name)
            tokenizer.save_pretrained(directory / name)

        mixture = torch.cat([domain.train for domain in domains.values()])
        train("base", mixture, schedule.base_steps, schedule.base_rate)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name in EXPERTS:
            model.load_state_dict(start)
            train(_folder(name), domains[name].train, schedule.expert_steps, schedule.expert_rate)
    return {name: domain.held_out for name, domain in domains.items()}


def texts(domain: str, per_file: int = TEXT_PER_FILE, total: int = TEXT_PER_DOMAIN) -> list[str]:
    """Text of one domain from the files of this installation, in an order of its own.

    ``per_file`` and ``total`` are numbers of characters. Raises :class:`PCBError`.
    """
    packages = pathlib.Path(sysconfig.get_path("purelib"))
    sources: dict[str, Callable[[], Iterable[pathlib.Path]]] = {
        "python": lambda: pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"),
        "c++": lambda: _headers(pathlib.Path(torch.__file__).parent / "include"),
        "prose": lambda: packages.glob("*.dist-info/METADATA"),
        "json": lambda: packages.glob("*/**/*.json"),
    }
    ordered = sorted(sources[domain]())
    random.Random(domain).shuffle(ordered)  # noqa: S311 - not for secrets
    written = (file.read_text(encoding="utf-8", errors="ignore") for file in ordered)
    if domain == "prose":  # the description after the fields
        written = (text.partition("\n\n")[2] for text in written)
    found = up_to(total, written, per_file)
    size = sum(map(len, found))
    if size < TEXT_PER_DOMAIN // 8:
        raise PCBError(
            f"find enough {domain} text for the demo",
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


def _tokenize(texts: dict[str, list[str]]) -> tuple[Any, dict[str, Domain]]:
    from transformers import PreTrainedTokenizerFast

    split = {name: math.ceil(len(files) * (1 - HELD_OUT_SHARE)) for name, files in texts.items()}
    tokenizer = new_tokenizer(
        [text for name, files in texts.items() for text in files[: split[name]]]
    )
    domains = {
        name: Domain(
            sequences(tokenizer, files[: split[name]]),
            sequences(tokenizer, files[split[name] :])[:HELD_OUT_SEQUENCES],
        )
        for name, files in texts.items()
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"), domains  # noqa: S106 - no password


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


def _train(
    model: Any, sequences: torch.Tensor, steps: int, rate: float, tick: Callable[[], Any]
) -> None:
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


def _merge(directory: pathlib.Path, method: str) -> None:
    """Write the method's configuration and run the stock ``mergekit-yaml`` on it."""
    config = directory / f"{method}.yml"
    base = {} if method == "linear" else {"base_model": str(directory / "base")}
    document = {
        "merge_method": method,
        **base,
        "models": [{"model": str(directory / _folder(expert))} for expert in EXPERTS],
        "parameters": METHODS[method],
        "dtype": "float32",
    }
    config.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    stock = shutil.which("mergekit-yaml", path=str(pathlib.Path(sys.executable).parent))
    command = [stock] if stock else [sys.executable, "-m", "mergekit_pcb", "yaml"]
    command += [str(config), str(directory / f"merged-{method}")]
    tqdm.write(f"$ mergekit-yaml {config} {command[-1]}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        raise PCBError(
            f"merge with {method}",
            f"mergekit-yaml said: {result.stderr.strip().splitlines()[-1]}",
            f"run it again on {config} to see all of it",
        )


def _measure_all(directory: pathlib.Path, held_out: dict[str, torch.Tensor]) -> list[Row]:
    from transformers import LlamaForCausalLM

    models = {"base": "base", **{f"expert on {expert}": _folder(expert) for expert in EXPERTS}}
    models |= {f"merged by {method}": f"merged-{method}" for method in METHODS}
    rows = []
    for name, folder in tqdm(models.items(), desc="measuring", unit="model"):
        model = LlamaForCausalLM.from_pretrained(directory / folder)
        rows.append(Row(name, tuple(_loss(model, held_out[domain]) for domain in DOMAINS)))
    return rows


@torch.no_grad()
def _loss(model: Any, sequences: torch.Tensor) -> float:
    return float(model.eval()(input_ids=sequences, labels=sequences).loss)


def _folder(expert: str) -> str:
    return "expert-" + expert.replace("+", "p")
