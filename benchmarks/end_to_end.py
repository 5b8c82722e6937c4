"""Whole merges by the stock `mergekit-yaml` command: wall time and peak memory.

    python -m benchmarks.end_to_end            # 440 M parameters, three tasks, about 20 minutes
    python -m benchmarks.end_to_end --layers 24 --runs 1 --methods "pcb, scope: model"

Makes its checkpoints (3.5 GB) in --directory once and leaves them there.
"""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

import click
import torch
import yaml

from benchmarks.measuring import alternate_merges, machine, row

OURS = "pcb"
PARAMETERS: dict[str, dict[str, Any]] = {
    OURS: {"density": 0.2},
    "pcb, scope: model": {"density": 0.2, "scope": "model"},
    "pcb, DARE": {"density": 0.2, "dare_density": 0.5},
    "task_arithmetic": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.2},
    "dare_ties": {"weight": 1.0, "density": 0.5},
}
TASKS = 3


def checkpoints(directory: pathlib.Path, layers: int) -> list[pathlib.Path]:
    """Make or find a Llama-shaped base and its experts in bfloat16, the base first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    paths = [directory / f"llama-{layers}" / name for name in ("base", "e0", "e1", "e2")]
    if all((path / "config.json").exists() for path in paths):
        return paths
    config = LlamaConfig(
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=32000,
        torch_dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(paths[0])
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path in paths[1:]:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(base[name].float() + 1e-3 * torch.randn(tensor.shape))
        model.save_pretrained(path)
    return paths


def configuration(method: str, paths: list[pathlib.Path]) -> str:
    """Return the YAML of a merge."""
    return yaml.safe_dump(
        {
            "merge_method": method.partition(",")[0],
            "base_model": str(paths[0]),
            "models": [{"model": str(path)} for path in paths[1:]],
            "parameters": PARAMETERS[method],
            "dtype": "bfloat16",
        }
    )


@click.command()
@click.option("--directory", type=click.Path(path_type=pathlib.Path), default="benchmark-data")
@click.option("--layers", default=12, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--methods", "names", multiple=True, type=click.Choice(list(PARAMETERS)), help="Default: all."
)
@click.option("--flag", "flags", multiple=True, help="Given to mergekit-yaml, such as --cuda.")
@click.option("--cold", is_flag=True, help="Inputs are read from disk, not from the file cache.")
def main(
    directory: pathlib.Path,
    layers: int,
    runs: int,
    names: tuple[str, ...],
    flags: tuple[str, ...],
    cold: bool,
) -> None:
    """Print the table of whole merges."""
    names = names or tuple(PARAMETERS)
    paths = checkpoints(directory, layers)
    parameters = sum(f.stat().st_size for f in paths[0].glob("*.safetensors")) / 2e6
    configurations = {name: configuration(name, paths) for name in names}
    forgotten = [file for path in paths for file in path.glob("*.safetensors")] if cold else []
    taken = alternate_merges(configurations, directory, runs, flags, forgotten)
    print(machine())
    print(
        f"mergekit-yaml, {parameters:.0f} M parameters in {layers} layers, {TASKS} tasks, "
        f"bfloat16, median of {runs} alternating runs of the whole command\n"
    )
    print("| method | wall seconds | range | pcb / this | own memory |")
    print("|---|---|---|---|---|")
    wall = {name: [turn.seconds for turn in taken[name]] for name in names}
    for name in names:
        memory = statistics.median(turn.own_bytes for turn in taken[name]) / 2**20
        print(f"{row(name, wall[name], wall[names[0]])} {memory:.0f} MiB |")


if __name__ == "__main__":
    main()
