"""Whole merges by `mergekit-yaml` over model size, number of experts and density: time and memory.

    python -m benchmarks.scaling --runs 1     # 0.1 to 3 B parameters in --directory, 22 minutes
    python -m benchmarks.scaling --sizes 0.1 --experts 2 --densities 0.2 --runs 1

Makes checkpoints of a Llama's shapes in bfloat16 (up to 25 GB) and removes them however it ends.
Peak memory is the process's own: the pages of its input files, which any other process may have
back, are not counted. How far time is from a straight line through the sizes is printed, too.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import click
import torch
import yaml

from benchmarks.measuring import alternate_merges, machine

METHODS: dict[str, dict[str, Any]] = {
    "pcb": {"density": 0.2},
    "task_arithmetic": {"weight": 1.0},
}
#: Parameters in billions: hidden size, width of the MLP, layers.
SHAPES = {
    0.1: (768, 2048, 8),
    0.4: (1536, 4096, 12),
    1.0: (2048, 5632, 18),
    3.0: (3072, 8192, 26),
}
VOCABULARY = 32000
TASKS = 3
DENSITY = 0.2
SHARD_BYTES = 4_000_000_000


class Row(NamedTuple):
    """One merge: how it was made and what it took."""

    parameters: int
    experts: int
    density: float
    method: str
    flags: str
    seconds: float
    own_bytes: int


def shapes(size: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's tensors."""
    hidden, mlp, layers = SHAPES[size]
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(layers):
        place = f"model.layers.{layer}"
        for name in "qkvo":
            yield f"{place}.self_attn.{name}_proj.weight", (hidden, hidden)
        yield f"{place}.mlp.gate_proj.weight", (mlp, hidden)
        yield f"{place}.mlp.up_proj.weight", (mlp, hidden)
        yield f"{place}.mlp.down_proj.weight", (hidden, mlp)
        yield f"{place}.input_layernorm.weight", (hidden,)
        yield f"{place}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def checkpoint(path: pathlib.Path, size: float, expert: int | None) -> None:
    """Write a base N(0, 0.02), or an expert whose steps from it are N(0, 1e-3), shard by shard."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    hidden, mlp, layers = SHAPES[size]
    path.mkdir(parents=True)
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    ).save_pretrained(path)
    shard: dict[str, torch.Tensor] = {}
    places, number, held = dict[str, str](), 1, 0
    for index, (name, shape) in enumerate(shapes(size)):
        steps = torch.Generator().manual_seed(1 + (0 if expert is None else expert))
        values = torch.empty(shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(index))
        if expert is not None:
            values.add_(torch.empty(shape).normal_(0, 1e-3, generator=steps))
        shard[name] = values.bfloat16()
        places[name] = f"model-{number:05d}.safetensors"
        held += shard[name].nbytes
        if held > SHARD_BYTES:
            save_file(shard, path / places[name], {"format": "pt"})
            shard, number, held = {}, number + 1, 0
    if shard:
        save_file(shard, path / places[name], {"format": "pt"})
    index_file = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index_file))


def measured(
    directory: pathlib.Path,
    size: float,
    experts: int,
    density: float,
    runs: int,
    flags: tuple[str, ...] = (),
) -> Iterator[Row]:
    """Merge by each method in turn; one row each."""
    models = [str(directory / f"{size}" / f"expert-{expert}") for expert in range(experts)]
    configurations = {
        method: yaml.safe_dump(
            {
                "merge_method": method,
                "base_model": str(directory / f"{size}" / "base"),
                "models": [{"model": model} for model in models],
                "parameters": parameters
                | ({"density": density} if "density" in parameters else {}),
                "dtype": "bfloat16",
            }
        )
        for method, parameters in METHODS.items()
    }
    taken = alternate_merges(configurations, directory, runs, flags)
    parameters_in_all = sum(torch.Size(shape).numel() for _, shape in shapes(size))
    for method, turns in taken.items():
        seconds, own = (statistics.median(values) for values in zip(*turns, strict=True))
        yield Row(parameters_in_all, experts, density, method, " ".join(flags), seconds, int(own))


def table(rows: list[Row]) -> str:
    """Two methods side by side, a line for each way of merging."""
    lines = [
        "| parameters | experts | density | flags | pcb, s | task_arithmetic, s | ratio "
        "| pcb, own memory | task_arithmetic |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for own in (row for row in rows if row.method == "pcb"):
        (other,) = (r for r in rows if r[:3] == own[:3] and r.flags == own.flags and r != own)
        lines.append(
            f"| {own.parameters / 1e9:.2f} B | {own.experts} | {own.density} | {own.flags} "
            f"| {own.seconds:.1f} | {other.seconds:.1f} | {own.seconds / other.seconds:.2f} "
            f"| {own.own_bytes / 2**30:.2f} GiB | {other.own_bytes / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def linear(rows: list[Row]) -> str:
    """How far time at three experts is from a straight line through the sizes."""
    own = [row for row in rows if (row.method, row.experts) == ("pcb", TASKS) and not row.flags]
    own = [row for row in own if row.density == DENSITY]
    if len(own) < 3:
        return ""
    sizes = torch.tensor([[row.parameters / 1e9, 1.0] for row in own], dtype=torch.float64)
    seconds = torch.tensor([[row.seconds] for row in own], dtype=torch.float64)
    # Relative errors count, or the largest size would be all that does.
    line = torch.linalg.lstsq(sizes / seconds, torch.ones_like(seconds)).solution
    worst = float(((sizes @ line - seconds) / seconds).abs().max())
    slope, start = line.squeeze(1).tolist()
    return f"pcb takes {start:.1f} s and {slope:.1f} s a billion parameters, within {worst:.0%}"


def figure(rows: list[Row], path: pathlib.Path) -> None:
    """Time and memory over size, experts and density, from the rows without flags."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plain = [row for row in rows if not row.flags]
    axes_of = {
        "parameters, billions": lambda row: row.parameters / 1e9,
        "experts": lambda row: row.experts,
        "density": lambda row: row.density,
    }
    size = statistics.mode(row.parameters for row in plain)
    kept = {
        "parameters, billions": lambda row: (row.experts, row.density) == (TASKS, DENSITY),
        "experts": lambda row: (row.parameters, row.density) == (size, DENSITY),
        "density": lambda row: (row.parameters, row.experts) == (size, TASKS),
    }
    drawing, axes = plt.subplots(2, 3, figsize=(10, 5.2), sharey="row")
    for column, (name, of) in enumerate(axes_of.items()):
        for method, colour in zip(METHODS, ("#0b6e4f", "#8a8a8a"), strict=True):
            own = sorted((r for r in plain if r.method == method and kept[name](r)), key=of)
            x = [of(row) for row in own]
            seconds, own_bytes = [r.seconds for r in own], [r.own_bytes / 2**30 for r in own]
            axes[0, column].plot(x, seconds, "o-", color=colour, label=method)
            axes[1, column].plot(x, own_bytes, "o-", color=colour)
        axes[1, column].set_xlabel(name)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("own memory, GiB")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    drawing.tight_layout()
    drawing.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(drawing)


@click.command()
@click.option("--directory", type=click.Path(path_type=pathlib.Path), default="benchmark-data")
@click.option("--sizes", multiple=True, type=float, default=tuple(SHAPES), show_default=True)
@click.option("--experts", multiple=True, type=int, default=(2, 4, 8, 16), show_default=True)
@click.option(
    "--densities", multiple=True, type=float, default=(0.05, 0.2, 0.5, 1.0), show_default=True
)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--figure", "drawn", type=click.Path(path_type=pathlib.Path), help="Draw it here.")
def main(
    directory: pathlib.Path,
    sizes: tuple[float, ...],
    experts: tuple[int, ...],
    densities: tuple[float, ...],
    runs: int,
    drawn: pathlib.Path | None,
) -> None:
    """Print the table of scaling; experts and densities vary at the second of the sizes."""
    if unknown := set(sizes) - set(SHAPES):
        raise click.ClickException(f"no size {min(unknown)}; there are {list(SHAPES)}")
    sizes = tuple(sorted(sizes))
    varied, rows = sizes[min(1, len(sizes) - 1)], list[Row]()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scaling-", dir=directory) as own:
        directory = pathlib.Path(own)
        for size in sizes:
            most = max(*experts, TASKS) if size == varied else TASKS
            need = (most + 2) * 2 * sum(torch.Size(shape).numel() for _, shape in shapes(size))
            if (free := shutil.disk_usage(directory).free) < need:
                raise click.ClickException(
                    f"cannot make {size} B × {most} in {directory}, because it takes "
                    f"{need / 1e9:.0f} GB and {free / 1e9:.0f} are free; choose another --directory"
                )
            for expert in (None, *range(most)):
                name = "base" if expert is None else f"expert-{expert}"
                checkpoint(directory / f"{size}" / name, size, expert)
            cases = [(TASKS, DENSITY, ())]
            if size == varied:
                cases += [(count, DENSITY, ()) for count in experts if count != TASKS]
                cases += [(TASKS, density, ()) for density in densities if density != DENSITY]
            if size == sizes[-1]:
                cases.append((TASKS, DENSITY, ("--lazy-unpickle",)))
            for count, density, flags in cases:
                rows += measured(directory, size, count, density, runs, flags)
                click.echo(f"{rows[-2]}\n{rows[-1]}", err=True)
            shutil.rmtree(directory / f"{size}")
    print(machine())
    print(f"mergekit-yaml, bfloat16, median of {runs} alternating runs of the whole command\n")
    print(table(rows))
    print(f"\n{linear(rows)}")
    if drawn is not None:
        figure(rows, drawn)


if __name__ == "__main__":
    main()
