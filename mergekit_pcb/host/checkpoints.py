"""What lies in the files of a plan's models: loaders, tokenizers, tensors stored twice."""

from __future__ import annotations

import pathlib
import weakref
from typing import Any

import torch
from mergekit.io.tasks import LoaderCache

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
_TIED: weakref.WeakKeyDictionary[Plan, dict[str, str]] = weakref.WeakKeyDictionary()


def loaders(plan: Plan, model: Any) -> tuple[Any, Any]:
    """The cache of mergekit's loaders for a plan, and what it calls a model."""
    if plan.is_raw:
        from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache

        return SimpleLoaderCache(), model.model.path
    return LoaderCache(), model


def tokenizer_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


def tied(plan: Plan) -> dict[str, str]:
    """Planned tensors that are another one in every model, by its name: a head, its embedding.

    mergekit's architectures say which may be; values say which are. (Configurations do not:
    transformers takes T5's to tie what its files hold apart.) A file that lacks one of two names
    means the other by it.
    """
    if plan not in _TIED:
        found: dict[str, str] = {}
        tasks = {task.output_weight.name: task for task in plan.tasks}
        for name, task in tasks.items():
            for other in task.output_weight.tied_names or ():
                if other not in tasks or other in found or name in found.values():
                    continue
                if all(
                    _alike(plan, model, task, tasks[other]) for model in (plan.base, *plan.models)
                ):
                    found[name] = other
                    break
        _TIED[plan] = found
    return _TIED[plan]


def _alike(plan: Plan, model: Any, *tasks: Any) -> bool:
    cache, key = loaders(plan, model)
    loader = cache.get(key)
    sources = [dict((sources_of(task) or {}).items()) for task in tasks]
    names = [infos[model].name for infos in sources if model in infos]
    there = [name for name in names if name in loader.index.tensor_paths]
    if len(there) < len(tasks):
        return True
    one, two = (loader.get_tensor(name, device="cpu") for name in there)
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    pairs = one.reshape(-1), two.reshape(-1)
    return torch.equal(*(part[:FIRST] for part in pairs)) and torch.equal(*pairs)
