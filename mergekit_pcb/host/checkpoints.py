"""What lies in the files of a plan's models: loaders, tokenizers, tensors stored twice."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import torch
from mergekit.io.tasks import LoaderCache

from mergekit_pcb.host import damage
from mergekit_pcb.host.plan import Plan, sources_of

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
#: Elements that tell most tensors apart, so that the rest is not read.
FIRST = 1 << 16


def loaders(plan: Plan, model: Any) -> tuple[Any, Any]:
    """The cache of mergekit's loaders for a plan, and what it calls a model."""
    if plan.is_raw:
        from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache

        return SimpleLoaderCache(), model.model.path
    return LoaderCache(), model


def tokenizer_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


@functools.lru_cache(maxsize=1)
def tied(plan: Plan) -> dict[str, str]:
    """Planned tensors that are another one in every model, by its name: a head, its embedding.

    mergekit's architectures say which may be; values say which are. (Configurations do not:
    transformers takes T5's to tie what its files hold apart.) A file that lacks one of two names
    means the other by it.
    """
    found: dict[str, str] = {}
    tasks = {task.output_weight.name: task for task in plan.tasks}
    models = (plan.base, *plan.models)
    for name, task in tasks.items():
        for other in task.output_weight.tied_names or ():
            if other not in tasks or other in found or name in found.values():
                continue
            with damage.named(plan.checkpoints):
                alike = all(_alike(plan, model, task, tasks[other]) for model in models)
            if alike:
                found[name] = other
                break
    return found


def _alike(plan: Plan, model: Any, *tasks: Any) -> bool:
    cache, key = loaders(plan, model)
    loader = cache.get(key)
    there = []
    for task in tasks:
        weight = dict((sources_of(task) or {}).items()).get(model)
        names = [] if weight is None else [weight.name, *(weight.aliases or ())]
        there += [name for name in names if name in loader.index.tensor_paths][:1]
    if len(there) < len(tasks):
        return True
    one, two = (loader.get_tensor(name, device="cpu") for name in there)
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    pairs = one.reshape(-1), two.reshape(-1)
    return torch.equal(*(part[:FIRST] for part in pairs)) and torch.equal(*pairs)
