"""One large group on an accelerator: time against the bytes that have to move, and agreement.

    python -m benchmarks.gpu                       # 10^9 elements in bfloat16, three tasks, CUDA
    python -m benchmarks.gpu --device cpu --elements 1000000    # a check that it runs at all

The floor is what a copy at the measured bandwidth would take for the bytes of the algorithm:
every input once per walk (two measuring, one merging), the output once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from mergekit.merge_methods import merge_tensors
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import machine

TASKS = 3
WALKS = 3
DENSITY = 0.2


def models(elements: int, device: torch.device) -> list[torch.Tensor]:
    """A base N(0, 0.02) and its fine-tunes, steps N(0, 1e-3), in bfloat16."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(size: float) -> torch.Tensor:
        out = torch.empty(elements, dtype=torch.bfloat16, device=device)
        return out.normal_(0, size, generator=generator)

    base = normal(0.02)
    return [base, *(base + normal(1e-3) for _ in range(TASKS))]


def seconds(action: Callable[[], object], device: torch.device, runs: int = 7) -> float:
    """Median time of an action, the device idle before and after."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    times = []
    for run in range(runs + 2):
        wait()
        start = time.perf_counter()
        result = action()
        wait()
        if run >= 2:
            times.append(time.perf_counter() - start)
        del result
    return statistics.median(times)


def merge(tensors: list[torch.Tensor], method: str = "pcb", **more: float) -> torch.Tensor:
    """Return the merge that is timed and compared."""
    density = {} if method == "task_arithmetic" else {"density": DENSITY}
    parameters = {"weight": 1.0, **density, **more}
    return merge_tensors(tensors, method, base_index=0, name="tensor", parameters=parameters)


def kernels(action: Callable[[], object]) -> str:
    """How long the card is busy with an action, and with which of our own kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        action()
        torch.cuda.synchronize()
    found = {event.key: event.self_device_time_total / 1e3 for event in seen.key_averages()}
    own = ", ".join(f"{name} {ms:.2f}" for name, ms in found.items() if name.startswith("walk_"))
    return f"the card is busy for {sum(found.values()):.2f} ms: {own}, and small ones"


@click.command()
@click.option("--device", "device_name", default="cuda", show_default=True)
@click.option("--elements", default=10**9, show_default=True)
def main(device_name: str, elements: int) -> None:
    """Print bandwidth, floor, time and agreement."""
    device = torch.device(device_name)
    print(machine())
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    tensors = models(elements, device)
    target = torch.empty_like(tensors[0])
    copied = 2 * target.nbytes / seconds(lambda: target.copy_(tensors[0]), device)
    moved = (WALKS * len(tensors) + 1) * tensors[0].nbytes
    floor, taken = moved / copied, seconds(lambda: merge(tensors), device)
    print(f"{elements:.0e} elements in bfloat16, {TASKS} tasks, density {DENSITY}")
    print(f"copy bandwidth, read and write   {copied / 1e9:10.1f} GB/s")
    print(f"bytes the algorithm must move    {moved / 1e9:10.2f} GB in {WALKS} walks")
    print(f"floor at that bandwidth          {floor * 1e3:10.2f} ms")
    print(f"pcb                              {taken * 1e3:10.2f} ms")
    print(f"floor / pcb                      {floor / taken:10.3f}")
    thinned = seconds(lambda: merge(tensors, dare_density=0.5), device)
    print(
        f"pcb, dare_density 0.5            {thinned * 1e3:10.2f} ms, {thinned / taken:.3f} of pcb"
    )
    share = [tensor[: elements // 4] for tensor in tensors]
    ours = seconds(lambda: merge(share), device)
    print(f"a quarter of the elements, pcb   {ours * 1e3:10.2f} ms, {ours / taken:.3f} of all")
    for method in ("task_arithmetic", "ties"):
        other = seconds(lambda method=method: merge(share, method), device, runs=3)
        print(f"    {method:29s}{other * 1e3:10.2f} ms, pcb is {ours / other:.3f} of it")
    if device.type == "cuda":  # last of what is timed, for a profile slows what comes after it
        print(f"of a quarter, {kernels(lambda: merge(share))}")
    few = [tensor[: 1 << 24].float() for tensor in tensors]
    own = [tensor.cpu() for tensor in few]
    for what, more in (("", {}), (", dare_density 0.5", {"dare_density": 0.5})):
        here, there = merge(own, **more), merge(few, **more).cpu()
        off = (there - here).norm() / (here - own[0]).norm()
        differing = int((there.view(torch.int32) != here.view(torch.int32)).sum())
        print(f"CPU against {device.type}{what}: {differing} of {len(here)} elements differ,")
        print(f"by {off:.1e} of the delta's norm")


if __name__ == "__main__":
    main()
