"""`refine: solve` and `spectrum` on one matrix, step by step, against mergekit's ties.

python -m benchmarks.refine                        # two matrices, three turns, about ten minutes
python -m benchmarks.refine --shape 512 512        # a quick look
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable

import click
import torch
from mergekit.merge_methods import merge_tensors

from benchmarks.kernel import models
from benchmarks.measuring import alternate, extra_memory, machine
from mergekit_pcb.core import matrices, refine, solve, spectrum
from mergekit_pcb.core.matrices import Layout, Matrix
from mergekit_pcb.core.measure import Recipe, measure_tensor
from mergekit_pcb.core.vectors import Aligned

TASKS, DENSITY, ANCHOR = 3, 0.1, 0.1
WHOLE = "pcb, refine: solve"
#: Of Llama-2-7B: how often a matrix [out, in] occurs.
LLAMA_7B = {
    (4096, 4096): 4 * 32,
    (11008, 4096): 2 * 32,
    (4096, 11008): 32,
    (32000, 4096): 1,
}


def actions(shape: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """What to time, by name: whole merges, and the steps of one."""
    tensors, layout = models(shape, torch.float32, TASKS), Layout(1, *shape)
    aligned = Aligned.of("matrix", tensors[0], tensors[1:])
    recipe = Recipe.of([DENSITY] * TASKS, 1e-4, [1.0] * TASKS, 0, range(TASKS))
    known = measure_tensor(aligned, recipe)
    (matrix,) = Matrix.all_of(aligned, layout, torch.float32)
    own = matrices.norms(matrix)
    weights = [1.0] * TASKS
    (merged,) = solve.solve(matrix, known, [weights], ANCHOR, own)
    rows = merged.view(shape)

    def whole(anchor: float | None, exponent: float | None) -> torch.Tensor:
        measured = measure_tensor(aligned, recipe)
        chosen = refine.Refinement(layout, anchor, exponent)
        return refine.merge(aligned, measured, weights, 1.0, chosen)

    def in_float64() -> object:
        kept, solve.LARGEST_CONDITION = solve.LARGEST_CONDITION, 0
        try:
            return solve.solve(matrix, known, [weights], ANCHOR, own)
        finally:
            solve.LARGEST_CONDITION = kept

    return {
        "ties": lambda: merge_tensors(
            tensors, "ties", base_index=0, parameters={"weight": 1.0, "density": 0.2}
        ),
        "task_arithmetic": lambda: merge_tensors(
            tensors, "task_arithmetic", base_index=0, parameters={"weight": 0.4}
        ),
        "pcb": lambda: merge_tensors(tensors, "pcb", base_index=0, parameters={"density": DENSITY}),
        "pcb, refine: solve, spectrum: 1": lambda: whole(ANCHOR, 1.0),
        "pcb, spectrum: auto": lambda: whole(None, None),
        WHOLE: lambda: whole(ANCHOR, None),
        "step: norms and agreement": lambda: matrices.norms(matrix),
        "step: solve in float32": lambda: solve.solve(matrix, known, [weights], ANCHOR, own),
        "step: solve in float64": in_float64,
        "step: spectrum": lambda: spectrum.even(rows, own.agreement),
    }


@click.command()
@click.option(
    "--shape",
    "shapes",
    type=int,
    nargs=2,
    multiple=True,
    default=((4096, 4096), (4096, 11008)),
    help="Rows and columns, [out, in]; may be repeated.",
)
@click.option("--runs", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--memory-of", nargs=2, type=int, hidden=True, help="Used by itself.")
def main(
    shapes: tuple[tuple[int, int], ...],
    runs: int,
    threads: int,
    memory_of: tuple[int, int] | None,
) -> None:
    """Print a table of seconds for each shape, and what a whole model takes."""
    torch.set_num_threads(threads)
    if memory_of:
        action = actions(memory_of)[WHOLE]
        action()  # libraries keep what they have allocated once
        print(extra_memory(action))
        return
    print(machine())
    print(f"{TASKS} tasks in float32, median of {runs} turns")
    reached = 0.0
    for shape in shapes:
        seconds = alternate(actions(shape), runs)
        print(f"\n| {shape[0]} × {shape[1]} | seconds | range | this / ties |")
        print("|---|---|---|---|")
        for name, taken in seconds.items():
            ratio = statistics.median(
                one / other for one, other in zip(taken, seconds["ties"], strict=True)
            )
            spread = f"{min(taken):.2f}–{max(taken):.2f}"
            print(f"| {name} | {statistics.median(taken):.2f} | {spread} | {ratio:.2f} |")
        layout = Layout(1, *shape)
        operations = solve.flops(layout, TASKS)
        reached = operations / statistics.median(seconds["step: solve in float32"])
        size = 4 * layout.elements
        promised = 4 * (2 * layout.columns**2 + layout.elements)
        extra = _memory(shape, threads)
        print(
            f"\n{WHOLE}: {extra / 2**20:.0f} MiB beyond the inputs, of which {size / 2**20:.0f} "
            f"are the result; 2 · in² + out · in numbers are {promised / 2**20:.0f} MiB"
        )
        print(f"the solve does {operations:.2g} operations, {reached / 1e9:.0f} in a nanosecond")
    layouts = [(Layout(1, *shape), count) for shape, count in LLAMA_7B.items()]
    solving = sum(count * solve.flops(layout, TASKS) for layout, count in layouts)
    evening = sum(count * spectrum.flops(layout.rows, layout.columns) for layout, count in layouts)
    hours, seconds_there = (solving + evening) / reached / 3600, (solving + evening) / 4e13
    print(
        f"\nLlama-2-7B, {TASKS} tasks: {solving:.2g} operations to solve, {evening:.2g} to even "
        f"spectra; {hours:.1f} hours at the {reached / 1e9:.0f} GFLOP/s reached here, "
        f"{seconds_there:.0f} seconds at 40 TFLOP/s (float32 on an accelerator, by its maker)"
    )


def _memory(shape: tuple[int, int], threads: int) -> int:
    command = [sys.executable, "-m", "benchmarks.refine", "--memory-of", *map(str, shape)]
    command += ["--threads", str(threads)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


if __name__ == "__main__":
    main()
