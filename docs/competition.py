"""Draw the README's figure: two task vectors that compete, what each keeps, and the merge.

python docs/competition.py
"""

from __future__ import annotations

import pathlib

import torch
from matplotlib.figure import Figure

from mergekit_pcb import combine, contributions

DENSITY = 0.2
ROWS, COLUMNS = 12, 18


def task_vectors() -> list[torch.Tensor]:
    """Noise, and a patch each: they overlap, with one sign above and with two below."""
    generator = torch.Generator().manual_seed(4)
    found = [0.25 * torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(2)]
    rows = torch.arange(ROWS)[:, None]
    columns = torch.arange(COLUMNS)[None]
    for number, (row, column, sign) in enumerate(
        ((3, 6, 1), (3, 10, 1), (8, 5, 1), (8, 9, -1), (8, 15, 1))
    ):
        bump = 1.2 * sign * torch.exp(-((rows - row) ** 2 / 3 + (columns - column) ** 2 / 6))
        found[number % 2] += bump
    return found


def main() -> None:
    vectors = task_vectors()
    base = {"w": torch.zeros(ROWS, COLUMNS)}
    parts = contributions(base, [{"w": vector} for vector in vectors], density=DENSITY)
    merged = combine(base, parts, [1.0, 1.0])["w"]
    panels = [
        ("task vector of model 1", vectors[0]),
        ("what model 1 wins", parts[0]["w"]),
        ("task vector of model 2", vectors[1]),
        ("what model 2 wins", parts[1]["w"]),
        ("merged: base + both", merged),
    ]
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    places = figure.subplot_mosaic("ABE;CDE")
    for place, (title, values) in zip("ABCDE", panels, strict=True):
        axis = places[place]
        axis.imshow(values.numpy(), cmap="RdBu_r", vmin=-1.3, vmax=1.3)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
