"""The demo: a base that has read prose alone, three experts that learn a format each, and merges.

Everything is trained on the spot, from text that every installation of mergekit already has, and
merged by the stock ``mergekit-yaml``. One small model: it shows what merging is for, and which
method is best it cannot show.
"""

from __future__ import annotations

import math
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
import yaml
from tqdm import tqdm

from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import write_text
from mergekit_pcb.tools import small_llama
from mergekit_pcb.tools.demo_folder import (
    GENERAL,
    MERGES,
    TASKS,
    Results,
    Row,
    Schedule,
    file_of,
    folder_of,
    made,
    refuse_unless_ready,
    remove,
    removed_on_failure,
    write,
)

HELD_OUT_SHARE = 0.1
HELD_OUT_SEQUENCES = 64


@dataclass(frozen=True)
class Text:
    """Token sequences ``[any, context]`` to train on and to measure with."""

    train: torch.Tensor
    held_out: torch.Tensor


def run(
    directory: pathlib.Path,
    schedule: Schedule,
    seed: int = 0,
    *,
    force: bool = False,
    keep: bool = False,
) -> Results:
    """Train, merge and measure in ``directory``.

    Leaves there ``base`` and one folder per expert, for each method a configuration and the
    checkpoint it makes, and ``results.json``. ``force`` replaces what an earlier demo left, and
    nothing else. If it is stopped or fails, what it made is removed, unless ``keep``. The global
    generators of ``torch`` are left as they were. Raises :class:`PCBError`.
    """
    refuse_unless_ready(directory, force)
    with removed_on_failure(directory, keep):
        for name in made():
            remove(directory / name)
        directory.mkdir(parents=True, exist_ok=True)
        write(directory, Results(seed=seed, schedule=schedule, rows=[]))  # whose folder it is
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        with torch.random.fork_rng(devices=[]):
            texts = _train_all(directory, schedule, seed)
        _merge_all(directory)
        results = Results(seed=seed, schedule=schedule, rows=_measure_all(directory, texts))
        write(directory, results)
    return results


def _train_all(directory: pathlib.Path, schedule: Schedule, seed: int) -> dict[str, Text]:
    tokenizer, texts = _tokenized()
    torch.manual_seed(seed * (len(TASKS) + 1))
    model = small_llama.new_model()
    steps = schedule.base_steps + len(TASKS) * schedule.expert_steps
    with tqdm(total=steps, unit="step") as progress:

        def train(name: str, text: str, steps: int, rate: float) -> None:
            progress.set_description(f"training {name}")
            small_llama.train(model, texts[text].train, steps, rate, progress.update)
            model.save_pretrained(directory / name)
            tokenizer.save_pretrained(directory / name)

        train("base", GENERAL, schedule.base_steps, schedule.base_rate)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for number, task in enumerate(TASKS, 1):
            torch.manual_seed(seed * (len(TASKS) + 1) + number)
            model.load_state_dict(start)
            train(folder_of(task), task, schedule.expert_steps, schedule.expert_rate)
    return texts


def _tokenized() -> tuple[Any, dict[str, Text]]:
    """The tokenizer, and the texts of each kind; no file is both trained on and held out."""
    from transformers import PreTrainedTokenizerFast

    files = {kind: small_llama.texts(kind) for kind in (GENERAL, *TASKS)}
    split = {kind: math.ceil(len(some) * (1 - HELD_OUT_SHARE)) for kind, some in files.items()}
    tokenizer = small_llama.new_tokenizer(
        [text for kind, some in files.items() for text in some[: split[kind]]]
    )
    texts = {
        kind: Text(
            small_llama.sequences(tokenizer, some[: split[kind]]),
            _spread(small_llama.sequences(tokenizer, some[split[kind] :])),
        )
        for kind, some in files.items()
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"), texts  # noqa: S106 - no password


def _spread(sequences: torch.Tensor) -> torch.Tensor:
    """Of all held-out files, not of the first ones alone."""
    return sequences[:: max(1, len(sequences) // HELD_OUT_SEQUENCES)][:HELD_OUT_SEQUENCES]


def _merge_all(directory: pathlib.Path) -> None:
    """Write each method's configuration, and run the stock ``mergekit-yaml`` on it, two at once."""
    for merge, (method, parameters) in MERGES.items():
        _configure(directory, f"{file_of(merge)}.yml", method, parameters)
    with ThreadPoolExecutor(2) as pool, tqdm(total=len(MERGES), unit="merge") as progress:
        progress.set_description("merging with mergekit-yaml")
        for _ in pool.map(lambda merge: _merge(directory, file_of(merge)), MERGES):
            progress.update()


def _configure(directory: pathlib.Path, file: str, method: str, parameters: dict[str, Any]) -> None:
    base = {} if method == "linear" else {"base_model": str(directory.resolve() / "base")}
    document = {
        "merge_method": method,
        **base,
        "models": [{"model": str(directory.resolve() / folder_of(task))} for task in TASKS],
        "parameters": parameters,
        "dtype": "float32",
    }
    write_text(directory / file, yaml.safe_dump(document, sort_keys=False))


def _merge(directory: pathlib.Path, name: str) -> None:
    stock = shutil.which("mergekit-yaml", path=str(pathlib.Path(sys.executable).parent))
    command = [stock] if stock else [sys.executable, "-m", "mergekit_pcb", "yaml"]
    command += [str(directory / f"{name}.yml"), str(directory / f"merged-{name}")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode and stock and "Unimplemented merge method pcb" in done.stderr:
        # Where start-up files are switched off, mergekit's own command knows no pcb.
        command = [sys.executable, "-m", "mergekit_pcb", "yaml", *command[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise PCBError(
            f"merge {name}.yml",
            f"mergekit-yaml said: {said[-1]}",
            f"run it again with --keep, and {' '.join(command)} to see all of it",
        )


def _measure_all(directory: pathlib.Path, texts: dict[str, Text]) -> list[Row]:
    from transformers import LlamaForCausalLM

    names: dict[str, tuple[Literal["base", "expert", "merge"], str]] = {
        "base": ("base", "base"),
        **{f"expert on {task}": ("expert", folder_of(task)) for task in TASKS},
        **{merge: ("merge", f"merged-{file_of(merge)}") for merge in MERGES},
    }
    losses = {}
    for name, (_, folder) in tqdm(names.items(), desc="measuring", unit="model"):
        model = LlamaForCausalLM.from_pretrained(directory / folder)
        losses[name] = {kind: _losses(model, text.held_out) for kind, text in texts.items()}
    return [_row(name, names[name][0], losses[name], losses["pcb"]) for name in names]


def _row(
    name: str,
    kind: Literal["base", "expert", "merge"],
    losses: dict[str, torch.Tensor],
    of_pcb: dict[str, torch.Tensor],
) -> Row:
    tasks = {task: float(losses[task].mean()) for task in TASKS}
    variances = [float((losses[t] - of_pcb[t]).var() / len(losses[t])) for t in TASKS]
    return Row(
        name=name,
        kind=kind,
        mean=sum(tasks.values()) / len(TASKS),
        tasks=tasks,
        general=float(losses[GENERAL].mean()),
        error=math.sqrt(sum(variances)) / len(TASKS),
    )


@torch.no_grad()
def _losses(model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """Of each sequence, per token: ``[sequences]``, in float64."""
    logits = model.eval()(input_ids=sequences).logits[:, :-1].transpose(1, 2)
    found = torch.nn.functional.cross_entropy(logits, sequences[:, 1:], reduction="none")
    return found.double().mean(1)
