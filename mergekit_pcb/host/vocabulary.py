"""One order of new tokens: what mergekit's tokenizer task leaves to chance, settled.

For ``tokenizer: {source: union}`` mergekit gives tokens that the base lacks the next free ids in
the order of ``get_vocab()``, which differs from call to call. Rows of embeddings follow the
ids, so two runs would write different files, and masks that go by place would fall on other
tokens when measuring than when merging. Here the ids follow from the tokens alone.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo

from mergekit_pcb.errors import PCBError
from mergekit_pcb.host.nodes import FIRST


class OrderedTokenizer(BuildTokenizer):
    """mergekit's tokenizer task, whose new tokens are sorted by their text.

    It runs before everything else, and on the main thread: measuring depends on it, and so do
    all tensors with a vocabulary, which would otherwise have to share one accelerator.
    """

    def execute(self, **_kwargs: Any) -> TokenizerInfo:
        info = super().execute()
        if self.tokenizer_source != "union":
            return info  # a tokenizer of the inputs as it is
        # mergekit's own choice, where only slices name a base.
        return ordered(info, self.base_model or self.referenced_models[0])

    def priority(self) -> int:
        return FIRST + 1

    def main_thread_only(self) -> bool:
        return True


class SavedTokenizer(Task[TokenizerInfo]):
    """The same tokenizer as a target of the merge, which mergekit saves beside the model.

    mergekit's executors let targets wait until the output folder exists. Measuring, which must
    not wait, therefore depends on the task above and not on this one.
    """

    tokenizer_task: OrderedTokenizer

    def arguments(self) -> dict[str, Task[Any]]:
        return {"tokenizer": self.tokenizer_task}

    def execute(self, tokenizer: TokenizerInfo, **_kwargs: Any) -> TokenizerInfo:
        return tokenizer

    def main_thread_only(self) -> bool:
        return True


def planned(task: BuildTokenizer, configuration: MergeConfiguration) -> OrderedTokenizer:
    """The ordered task in place of mergekit's own, its models in the configuration's order.

    mergekit takes them from a set. Where models disagree on the settings of a token, the first
    one's are used.
    """
    parts = [configuration, *(configuration.modules or {}).values()]
    found = [configuration.base_model]
    for part in parts:
        found += [entry.model for entry in part.models or ()]
        for piece in part.slices or ():
            found += [piece.base_model, *(source.model for source in piece.sources)]
    known = dict.fromkeys(model for model in found if model in task.referenced_models)
    fields = {name: getattr(task, name) for name in BuildTokenizer.model_fields}
    return OrderedTokenizer(**{**fields, "referenced_models": tuple(known)})


def ordered(info: TokenizerInfo, base: Any) -> TokenizerInfo:
    """Give the ids of the tokens that the base lacks to the same tokens, sorted by their text."""
    vocabulary = info.tokenizer.get_vocab()
    new = sorted(vocabulary.keys() - info.original_vocabs[base].keys())
    places = dict(zip(new, sorted(vocabulary[token] for token in new), strict=True))
    moved = {vocabulary[token]: place for token, place in places.items()}
    if all(before == after for before, after in moved.items()):
        return info
    _renumber(info.tokenizer, places, base)
    permutations = {
        model: {moved.get(place, place): source for place, source in sources.items()}
        for model, sources in info.permutations.items()
    }
    return info.model_copy(update={"permutations": permutations})


def _renumber(tokenizer: Any, places: dict[str, int], base: Any) -> None:
    """Give added tokens other ids, in place."""
    if not tokenizer.is_fast:
        raise PCBError(
            "use tokenizer: {source: union}",
            f"the tokenizer of {base} is a slow one, in which new tokens get no order of their own",
            "save it as a fast tokenizer (tokenizer.json), or use tokenizer: {source: base}",
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["id"] = places.get(token["content"], token["id"])
    state["added_tokens"].sort(key=lambda token: token["id"])
    # As mergekit itself strips a tokenizer of unused tokens.
    tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    found = tokenizer.get_vocab()
    if any(found[token] != place for token, place in places.items()):
        raise PCBError(
            "use tokenizer: {source: union}",
            f"new tokens of the tokenizer of {base} cannot be given an order",
            "use tokenizer: {source: base}",
        )
