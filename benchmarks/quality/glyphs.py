"""Suite 2, tasks in conflict: one encoder of images, six kinds of writing.

As in the paper's vision tables: an encoder trained on a broad mixture, a head per task that
stays as it was, experts whose encoders were fine-tuned on one task, and a merge of the encoders.
The base has learned to tell the characters of five alphabets and scanned digits apart, written
plainly and now and then in some task's manner; its classifier's rows are the heads, as text
prompts are CLIP's. In the tasks each alphabet is written in a manner of its own (mirrored, turned,
noisy, …) and in colours of its own, and what helps to read one manner harms another. The letters
are those of the fonts that matplotlib brings, the digits scikit-learn's scans.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch

from benchmarks.quality.suite import (
    NEAR,
    SPLITS,
    Batch,
    Distance,
    Schedule,
    Sizes,
    Split,
    Suite,
    snapshot,
    train,
)
from benchmarks.quality.work import NOTHING_KEPT, Work

Colours = tuple[tuple[float, float, float], tuple[float, float, float]]
Manner = Callable[[torch.Tensor, torch.Generator], torch.Tensor]

SIDE = 16
FEATURES = 96
FONTS = [
    f"DejaVu{family}{style}.ttf"
    for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
]


def _upside_down(images: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    return images.flip(-2)


def _mirrored(images: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    return images.flip(-1)


def _noisy(images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    return images + 0.3 * torch.randn(images.shape, generator=draw)


def _hidden(images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Five of sixteen rows are grey."""
    first = torch.randint(SIDE - 4, (len(images), 1, 1, 1), generator=draw)
    row = torch.arange(SIDE).view(1, 1, -1, 1)
    return torch.where((row >= first) & (row < first + 5), 0.0, images)


def _turned(images: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    """By an eighth of a circle."""
    rows = math.sqrt(0.5) * torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0]])
    grid = torch.nn.functional.affine_grid(
        rows.expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _coarse(images: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(images, 3, 1, 1)


#: Each task: its characters, the manner in which it writes them, and the colours of its paper
#: and its ink.
ALPHABETS: dict[str, tuple[range, Manner, Colours]] = {
    "capitals": (range(ord("A"), ord("Z") + 1), _mirrored, ((1, 1, 0), (0, 0, 1))),
    "Greek": (range(ord("α"), ord("ω") + 1), _noisy, ((0, 0, 0), (1, 0, 0))),
    "Cyrillic": (range(ord("А"), ord("Я") + 1), _turned, ((0, 1, 1), (1, 0, 1))),
    "Armenian": (range(ord("Ա"), ord("Ֆ") + 1), _hidden, ((1, 1, 1), (0, 0.5, 0))),
    "Georgian": (range(ord("ა"), ord("ჰ") + 1), _coarse, ((0, 0, 0.5), (1, 0.5, 0))),
}
TASKS = ("digits", *ALPHABETS)
MANNERS = [_upside_down, *(manner for _, manner, _ in ALPHABETS.values())]
#: How much of what the base learns from is written in one of these manners.
MIXED_IN = 0.05
TEMPERATURE = 16.0
DIGITS = {"train": 800, "validation": 400, "test": 597}
SCHEDULE = Schedule(
    base_steps=3000,
    base_rate=3e-3,
    expert_steps=200,
    expert_rate=3e-4,
    batch=64,
    looked_at=Sizes(train=256, validation=400, test=600),
)


class Encoder(torch.nn.Module):
    """Five convolutions, and heads that the state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 48, 96, 96, 192, 192), (1, 2, 1, 2, 1)
        layers: list[torch.nn.Module] = []
        for before, width, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [
                torch.nn.Conv2d(before, width, 3, stride, 1, bias=False),
                torch.nn.GroupNorm(8, width),
                torch.nn.GELU(),
            ]
        self.encoder = torch.nn.Sequential(*layers)
        self.projection = torch.nn.Linear(widths[-1], FEATURES)
        self.heads: list[torch.Tensor] = []

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features ``[images, FEATURES]`` of length one."""
        pooled = self.encoder(images).mean((2, 3))
        return torch.nn.functional.normalize(self.projection(pooled), dim=-1)

    def forward(self, images: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        return TEMPERATURE * self.features(images) @ self.heads[int(task)].T


def build(
    seed: int,
    schedule: Schedule,
    distances: Sequence[Distance] = (NEAR,),
    work: Work = NOTHING_KEPT,
) -> Iterator[Suite]:
    """Train the base, and its experts at each distance, from numbers that ``seed`` decides on."""
    torch.manual_seed(seed)
    sources: dict[str, _Source] = {"digits": _Digits(seed, _upside_down)}
    for task, (points, manner, colours) in ALPHABETS.items():
        sources[task] = _Letters(points, seed, manner, colours)
    model = Encoder()
    plain = [_Letters(points, seed) for points, *_ in ALPHABETS.values()]
    model.heads = _train_base(model, [_Digits(seed), *plain], schedule)
    base = snapshot(model)
    after = torch.get_rng_state(), {task: s.draw.get_state() for task, s in sources.items()}
    data: dict[Split, dict[str, list[Batch]]] = {
        split: {
            task: _cut(*sources[task].part(split, getattr(schedule.looked_at, split)), number)
            for number, task in enumerate(TASKS)
        }
        for split in SPLITS
    }
    for distance in distances:
        torch.set_rng_state(after[0])
        experts = []
        for number, task in enumerate(TASKS):
            sources[task].draw.set_state(after[1][task])
            model.load_state_dict(base)
            batches = partial(_batch, sources[task], number, schedule.batch)
            train(model.parameters(), model, batches, *distance.of(schedule))
            experts.append(snapshot(model))
        yield Suite("glyphs", "accuracy", seed, TASKS, model, base, experts, data, work=work)


class _Source(Protocol):
    """Images ``[any, 3, SIDE, SIDE]`` of one task, and their classes."""

    classes: int
    draw: torch.Generator

    def training(self, labels: torch.Tensor) -> torch.Tensor:
        """Images of these classes to train on, other ones in every call."""

    def part(self, split: Split, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first images of a part, the same in every call."""


class _Letters:
    """Drawn letters: as many as one likes, each part from a generator of its own."""

    def __init__(
        self,
        points: Sequence[int],
        seed: int,
        manner: Manner | None = None,
        colours: Colours | None = None,
    ) -> None:
        self.glyphs = torch.stack([_glyph(point) for point in points])  # [class, font, 1, 32, 32]
        self.classes = len(points)
        self.manner = manner
        self.colours = colours
        self.seed = seed * 10_000_000 + points[0] * 10
        self.draw = torch.Generator().manual_seed(self.seed)

    def training(self, labels: torch.Tensor) -> torch.Tensor:
        return self._drawn(labels, self.draw)

    def part(self, split: Split, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(self.seed + 1 + SPLITS.index(split))
        labels = torch.arange(count) % self.classes
        return self._drawn(labels, draw), labels

    def _drawn(self, labels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        fonts = torch.randint(self.glyphs.shape[1], labels.shape, generator=draw)
        images = _written(self.glyphs[labels, fonts], self.colours, draw)
        return self.manner(images, draw) if self.manner else images


class _Digits:
    """scikit-learn's scanned digits; no image is in two parts."""

    def __init__(self, seed: int, manner: Manner | None = None) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        images = torch.nn.functional.interpolate(images, scale_factor=SIDE // 8, mode="bilinear")
        labels = torch.tensor(digits.target)
        if manner:
            images = manner(images, torch.Generator())
        self.classes = 10
        self.draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split(
            list(DIGITS.values())
        )
        self.parts = {
            split: (images[rows].expand(-1, 3, -1, -1) - 0.5, labels[rows])
            for split, rows in zip(DIGITS, order, strict=True)
        }

    def training(self, labels: torch.Tensor) -> torch.Tensor:
        images, classes = self.parts["train"]
        rows = [
            (classes == label).nonzero()[:, 0][
                torch.randint(int((classes == label).sum()), (), generator=self.draw)
            ]
            for label in labels
        ]
        return images[torch.stack(rows)]

    def part(self, split: Split, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self.parts[split]
        return images[:count], labels[:count]


def _glyph(point: int) -> torch.Tensor:
    """One character in every font that has it, again from the first on: ``[font, 1, 32, 32]``."""
    import matplotlib as mpl
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    drawn = []
    for font in FONTS:
        file = str(pathlib.Path(mpl.get_data_path()) / "fonts" / "ttf" / font)
        if not FT2Font(file).get_char_index(point):
            continue
        # The other engine depends on a library of the system, and draws differently.
        letters = ImageFont.truetype(file, 28, layout_engine=ImageFont.Layout.BASIC)
        image = Image.new("L", (32, 32))
        ImageDraw.Draw(image).text((16, 16), chr(point), fill=255, font=letters, anchor="mm")
        drawn.append(torch.tensor(np.asarray(image), dtype=torch.float32)[None])
    return torch.stack([drawn[number % len(drawn)] for number in range(len(FONTS))]) / 255


def _written(images: torch.Tensor, colours: Colours | None, draw: torch.Generator) -> torch.Tensor:
    """Turned, slanted, scaled, moved, halved in size, coloured, and a little noisy."""

    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(images), generator=draw)

    angle, slant, scale = between(-0.4, 0.4), between(-0.3, 0.3), between(0.7, 1.1)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack(
        [
            torch.stack([cosine, slant - sine, between(-0.15, 0.15)], -1),
            torch.stack([sine, cosine, between(-0.15, 0.15)], -1),
        ],
        1,
    )
    grid = torch.nn.functional.affine_grid(rows, list(images.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(images, grid, align_corners=False)
    small = torch.nn.functional.avg_pool2d(moved, 32 // SIDE)
    which = torch.zeros(len(images)).long()
    if colours is None:  # those of any task
        which = torch.randint(len(ALPHABETS), (len(images),), generator=draw)
    palette = torch.tensor([colours] if colours else [pair for *_, pair in ALPHABETS.values()])
    pairs = palette[which]
    pairs = pairs + 0.1 * torch.randn(pairs.shape, generator=draw)
    paper, ink = pairs[..., None, None].unbind(1)
    coloured = paper + (ink - paper) * small - 0.5
    return coloured + 0.1 * torch.randn(coloured.shape, generator=draw)


def _batch(source: _Source, number: int, size: int) -> Batch:
    labels = torch.randint(source.classes, (size,))
    return (source.training(labels), torch.tensor(number)), labels


def _cut(images: torch.Tensor, labels: torch.Tensor, number: int) -> list[Batch]:
    return [
        ((some, torch.tensor(number)), right)
        for some, right in zip(images.split(128), labels.split(128), strict=True)
    ]


def _train_base(
    model: Encoder, sources: Sequence[_Source], schedule: Schedule
) -> list[torch.Tensor]:
    """Train on all characters at once; return the classifier's rows, task by task."""
    counts = [source.classes for source in sources]
    ends = torch.tensor(counts).cumsum(0)
    head = torch.nn.Linear(FEATURES, sum(counts), bias=False)
    draw = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        labels = torch.randint(sum(counts), (schedule.batch,))
        owner = torch.bucketize(labels, ends, right=True)
        images = torch.empty(len(labels), 3, SIDE, SIDE)
        for number, source in enumerate(sources):
            mine = owner == number
            if mine.any():
                images[mine] = source.training(labels[mine] - ends[number] + counts[number])
        for manner in MANNERS:
            some = torch.rand(len(labels)) < MIXED_IN / len(MANNERS)
            if some.any():
                images[some] = manner(images[some], draw)
        return (images,), labels

    def logits(images: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.normalize(head.weight, dim=-1)
        return TEMPERATURE * model.features(images) @ rows.T

    learned = [*model.parameters(), *head.parameters()]
    train(learned, logits, batch, schedule.base_steps, schedule.base_rate)
    rows = torch.nn.functional.normalize(head.weight.detach(), dim=-1)
    return list(rows.split(counts))
