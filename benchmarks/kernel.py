"""One tensor and its tasks, in memory: time and extra memory against the rivals.

python -m benchmarks.kernel              # 4096 × 8192, three tasks, five turns, about eight minutes
python -m benchmarks.kernel --rows 512   # a quick look
python -m benchmarks.kernel --others     # other shapes, sixteen tasks, inputs that are hard to rank
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable

import click
import torch
from mergekit.merge_methods import merge_tensors

from benchmarks.measuring import alternate, extra_memory, machine, ratio, row
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


Step = Callable[[tuple[int, int]], torch.Tensor]


def usual(shape: tuple[int, int]) -> torch.Tensor:
    """Steps of about 1e-3, rows differing in size."""
    return torch.randn(shape).mul_(1e-3).mul_(torch.rand(shape[0], 1).add_(0.5))


def outlier(shape: tuple[int, int]) -> torch.Tensor:
    """No step but at one element."""
    step = torch.zeros(shape)
    step[shape[0] // 2, shape[1] // 2] = 5.0
    return step


#: Steps that are hard to rank, by name; on the grid of their base, so that equal ones stay equal.
GRID = 2.0**-12
HARD: dict[str, Step] = {
    "all steps equal": lambda shape: torch.full(shape, 2.0**-7),
    "two magnitudes": lambda shape: torch.rand(shape).lt(0.5).float().add_(1).mul_(2.0**-7),
    "heavy ties": lambda shape: torch.randn(shape).mul_(4).round_().mul_(2.0**-9),
    "half zeros": lambda shape: usual(shape).mul_(torch.rand(shape).lt(0.5)),
    "sorted": lambda shape: torch.linspace(-0.01, 0.01, shape[0] * shape[1]).view(shape),
    "one outlier": outlier,
    "large steps": lambda shape: torch.randn(shape),
}


def models(
    shape: tuple[int, int], dtype: torch.dtype, tasks: int = 3, step: Step = usual
) -> list[torch.Tensor]:
    """A base N(0, 0.02) and its fine-tunes."""
    torch.manual_seed(0)
    base = torch.randn(shape).mul_(0.02)
    if step is not usual:
        base = base.div_(GRID).round_().mul_(GRID)
    return [base.to(dtype), *(step(shape).add_(base).to(dtype) for _ in range(tasks))]


def actions(tensors: list[torch.Tensor], names: list[str]) -> dict[str, Callable[[], object]]:
    """What to time, by name; each merges the tensors anew."""
    found: dict[str, Callable[[], object]] = {}
    for name in names:
        if name == RELEASED:
            found[name] = lambda: _released(tensors)
        else:
            found[name] = lambda name=name: merge_tensors(
                tensors,
                name.partition(",")[0],
                parameters=PARAMETERS[name],
                base_index=0,
                name="tensor",
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
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    help="Default: the first two.",
)
@click.option(
    "--methods",
    "chosen",
    multiple=True,
    type=click.Choice([*PARAMETERS, RELEASED]),
    help="Default: all.",
)
@click.option("--tasks", default=3, show_default=True)
@click.option("--others", is_flag=True, help="Other shapes and inputs instead, no memory.")
@click.option("--largest", default=128256, show_default=True, help="Rows of the largest of them.")
@click.option("--memory-of", nargs=2, hidden=True, help="Print one figure; used by itself.")
def main(
    rows: int,
    columns: int,
    runs: int,
    threads: int,
    dtypes: tuple[str, ...],
    chosen: tuple[str, ...],
    tasks: int,
    others: bool,
    largest: int,
    memory_of: tuple[str, str] | None,
) -> None:
    """Print the tables of the kernel."""
    torch.set_num_threads(threads)
    shape = (rows, columns)
    if memory_of:
        name, dtype_name = memory_of
        tensors = models(shape, getattr(torch, dtype_name), tasks)
        fused.compiled("cpu", tensors[0].dtype)  # code and constants that stay
        small = [tensor[:8] for tensor in tensors]
        actions(small, [name])[name]()
        print(extra_memory(actions(tensors, [name])[name]))
        return
    print(machine())
    if others:
        _others(rows, columns, largest, runs, dtypes)
        return
    print(f"one tensor {rows} × {columns}, {tasks} tasks, density {DENSITY}")
    print(f"median of {runs} turns; DARE with density {DARE_DENSITY}")
    for dtype_name in dtypes:
        dtype = getattr(torch, dtype_name)
        names = list(PARAMETERS)
        if dtype == torch.float32:
            names.append(RELEASED)
        names = [name for name in names if name in (chosen or names)]
        tensors = models(shape, dtype, tasks)
        seconds = alternate(actions(tensors, names), runs)
        size = tensors[0].nbytes
        del tensors
        print(f"\n| {dtype_name} | seconds | range | pcb / this | extra, S = {size >> 20} MiB |")
        print("|---|---|---|---|---|")
        for name in names:
            extra = _memory_in_own_process(name, dtype_name, rows, columns, threads, tasks)
            print(f"{row(name, seconds[name], seconds[OURS])} {extra / size:.2f} S |")
        for other in [n for n in (OURS, "dare_ties") if {DARE, n} <= set(names)]:
            print(f"\n{DARE} / {other}: {ratio(seconds[DARE], seconds[other]):.3f}")
        own = statistics.median(seconds[OURS])
        print(f"\npcb: {own / (rows * columns * tasks) * 1e9:.2f} ns per element and task")


def _others(rows: int, columns: int, largest: int, runs: int, dtypes: tuple[str, ...]) -> None:
    """Print a row for each of several shapes, numbers of tasks, threads and kinds of steps."""
    plain, quarter = (rows, columns), (rows // 4, columns)
    cases: list[tuple[str, tuple[int, int], int, Step]] = [
        ("256 × 256", (256, 256), 3, usual),
        (f"{rows} × {columns}", plain, 3, usual),
        (f"{largest} × 4096", (largest, 4096), 3, usual),
        (f"{rows // 4} × {columns}, 16 tasks", quarter, 16, usual),
        *((f"{rows} × {columns}, {name}", plain, 3, step) for name, step in HARD.items()),
    ]
    print(f"density {DENSITY}, median of {runs} turns; milliseconds\n")
    print("| | | pcb | one thread / all | task_arithmetic | pcb / task_arithmetic |")
    print("|---|---|---|---|---|---|")
    threads = torch.get_num_threads()
    for name, shape, tasks, step in cases:
        for dtype_name in dtypes:
            tensors = models(shape, getattr(torch, dtype_name), tasks, step)
            timed = actions(tensors, [OURS, "task_arithmetic"])
            seconds = alternate(timed, runs)
            own, other = seconds[OURS], seconds["task_arithmetic"]
            one, all_ = (_alone(timed[OURS], runs, number) for number in (1, threads))
            mine, theirs = (statistics.median(values) * 1e3 for values in (own, other))
            print(
                f"| {name} | {dtype_name} | {mine:.2f} | {one / all_:.2f} | {theirs:.2f} "
                f"| {ratio(own, other):.2f} |",
                flush=True,
            )


def _alone(action: Callable[[], object], runs: int, threads: int) -> float:
    """Median time on so many threads, with nothing between turns that takes memory."""
    torch.set_num_threads(threads)
    return statistics.median(alternate({OURS: action}, runs)[OURS])


def _memory_in_own_process(
    name: str, dtype: str, rows: int, columns: int, threads: int, tasks: int
) -> int:
    command = [sys.executable, "-m", "benchmarks.kernel", "--memory-of", name, dtype]
    command += ["--rows", str(rows), "--columns", str(columns), "--threads", str(threads)]
    command += ["--tasks", str(tasks)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


if __name__ == "__main__":
    main()
