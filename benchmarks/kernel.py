"""One tensor, three tasks, in memory: time and extra memory against the rivals.

python -m benchmarks.kernel              # 4096 × 8192, five turns, about eight minutes
python -m benchmarks.kernel --rows 512   # a quick look
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable

import click
import torch
from mergekit.merge_methods import merge_tensors

from benchmarks.measuring import alternate, extra_memory, machine, row
from benchmarks.rivals import released_pcb
from mergekit_pcb.core import fused

DENSITY, DARE_DENSITY = 0.2, 0.5
OURS = "pcb"
DARE = "pcb, DARE"
RELEASED = "released algorithm"
PARAMETERS: dict[str, dict[str, float]] = {
    OURS: {"density": DENSITY},
    DARE: {"density": DENSITY, "dare_density": DARE_DENSITY},
    "task_arithmetic": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": DENSITY},
    "dare_ties": {"weight": 1.0, "density": DARE_DENSITY},
}


def models(shape: tuple[int, int], dtype: torch.dtype, tasks: int = 3) -> list[torch.Tensor]:
    """A base and its fine-tunes: N(0, 0.02) and steps of about 1e-3, rows differing in size."""
    torch.manual_seed(0)
    base = torch.randn(shape).mul_(0.02)
    tensors = [base.to(dtype)]
    for _ in range(tasks):
        step = torch.randn(shape).mul_(1e-3).mul_(torch.rand(shape[0], 1).add_(0.5))
        tensors.append(step.add_(base).to(dtype))
    return tensors


def actions(tensors: list[torch.Tensor], names: list[str]) -> dict[str, Callable[[], object]]:
    """What to time, by name; each merges the tensors anew."""
    found: dict[str, Callable[[], object]] = {}
    for name in names:
        if name == RELEASED:
            found[name] = lambda: _released(tensors)
        else:
            found[name] = lambda name=name: merge_tensors(
                tensors, name.partition(",")[0], base_index=0, parameters=PARAMETERS[name]
            )
    return found


def _released(tensors: list[torch.Tensor]) -> torch.Tensor:
    base = tensors[0].float().view(-1)
    tau = torch.stack([tensor.float().view(-1) for tensor in tensors[1:]]) - base
    return (base + released_pcb(tau, DENSITY)).view(tensors[0].shape)


@click.command()
@click.option("--rows", default=4096, show_default=True)
@click.option("--columns", default=8192, show_default=True)
@click.option("--runs", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    default=("float32", "bfloat16"),
    type=click.Choice(["float32", "bfloat16"]),
    help="Default: both.",
)
@click.option(
    "--methods",
    "chosen",
    multiple=True,
    type=click.Choice([*PARAMETERS, RELEASED]),
    help="Default: all.",
)
@click.option("--memory-of", nargs=2, hidden=True, help="Print one figure; used by itself.")
def main(
    rows: int,
    columns: int,
    runs: int,
    threads: int,
    dtypes: tuple[str, ...],
    chosen: tuple[str, ...],
    memory_of: tuple[str, str] | None,
) -> None:
    """Print the tables of the kernel."""
    torch.set_num_threads(threads)
    shape = (rows, columns)
    if memory_of:
        name, dtype_name = memory_of
        tensors = models(shape, getattr(torch, dtype_name))
        fused.compiled(tensors[0].dtype)  # code and constants that stay
        small = [tensor[:8] for tensor in tensors]
        actions(small, [name])[name]()
        print(extra_memory(actions(tensors, [name])[name]))
        return
    print(machine())
    print(f"one tensor {rows} × {columns}, three tasks, density {DENSITY}, median of {runs} turns")
    print(f"DARE with density {DARE_DENSITY}")
    for dtype_name in dtypes:
        dtype = getattr(torch, dtype_name)
        names = list(PARAMETERS)
        if dtype == torch.float32:
            names.append(RELEASED)
        names = [name for name in names if name in (chosen or names)]
        tensors = models(shape, dtype)
        seconds = alternate(actions(tensors, names), runs)
        size = tensors[0].nbytes
        del tensors
        print(f"\n| {dtype_name} | seconds | range | pcb / this | extra, S = {size >> 20} MiB |")
        print("|---|---|---|---|---|")
        for name in names:
            extra = _memory_in_own_process(name, dtype_name, rows, columns, threads)
            print(f"{row(name, seconds[name], seconds[OURS])} {extra / size:.2f} S |")
        for other in [n for n in (OURS, "dare_ties") if {DARE, n} <= set(names)]:
            cost = (a / b for a, b in zip(seconds[DARE], seconds[other], strict=True))
            print(f"\n{DARE} / {other}: {statistics.median(cost):.3f}")
        own = statistics.median(seconds[OURS])
        elements = rows * columns * 3
        print(f"\npcb: {own / elements * 1e9:.2f} ns per element and task")


def _memory_in_own_process(name: str, dtype: str, rows: int, columns: int, threads: int) -> int:
    command = [sys.executable, "-m", "benchmarks.kernel", "--memory-of", name, dtype]
    command += ["--rows", str(rows), "--columns", str(columns), "--threads", str(threads)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


if __name__ == "__main__":
    main()
