"""What every table needs: the machine, alternating runs, medians, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import click
import torch

import mergekit_pcb


def machine() -> str:
    """One line on what ran this: processor, threads, versions."""
    from importlib.metadata import version

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        model = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model}, {os.cpu_count()} CPUs, {memory:.0f} GiB; torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, mergekit {version('mergekit')}, "
        f"mergekit-pcb {mergekit_pcb.__version__}, Python {platform.python_version()}"
    )


# A turn of an action lasts at least so long, or one disturbance would be most of it.
SECONDS_PER_TURN = 2.0


def alternate(actions: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each action, taken in turn A B C A B C …, after one turn not counted.

    A quick action runs several times in its turn, which counts with their mean.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    times = dict.fromkeys(actions, 1)
    for turn in range(runs + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            for _ in range(times[name]):
                result = action()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                del result
            taken = (time.perf_counter() - start) / times[name]
            if turn:
                seconds[name].append(taken)
            else:
                times[name] = min(20, math.ceil(SECONDS_PER_TURN / taken))
    return seconds


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """The median of these / those, taken turn by turn."""
    return statistics.median(one / other for one, other in zip(these, those, strict=True))


def row(name: str, values: Sequence[float], own: Sequence[float]) -> str:
    """A table row: median, range, and the median of own/this taken turn by turn."""
    spread = f"{min(values):.2f}–{max(values):.2f}"
    return f"| {name} | {statistics.median(values):.2f} | {spread} | {ratio(own, values):.3f} |"


def extra_memory(action: Callable[[], object]) -> int:
    """Bytes by which the process grew at its highest during an action (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what it has freed and kept would not count
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    result = action()
    peak = _status("VmHWM")
    del result
    return peak - before


def _status(field: str, process: int | str = "self") -> int:
    text = pathlib.Path(f"/proc/{process}/status").read_text()
    return 1024 * int(re.findall(rf"{field}:\s+(\d+)", text)[0])


class Taken(NamedTuple):
    """Wall seconds of a whole process, and the most bytes it held of its own.

    Pages of files that it had mapped are not its own: any other process may have their room.
    """

    seconds: float
    own_bytes: int


SECONDS_BETWEEN_LOOKS = 0.01


def run_command(command: Sequence[str]) -> Taken:
    """Run a whole process (Linux); raises if it fails."""
    with tempfile.TemporaryFile() as complaint, pathlib.Path(os.devnull).open("w") as nowhere:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=nowhere, stderr=complaint)
        most = 0
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):  # it may have just ended
                most = max(most, _status("RssAnon", process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_BETWEEN_LOOKS)
        wall = time.perf_counter() - start
        if process.returncode:
            complaint.seek(0)
            said = complaint.read().decode(errors="replace")
            raise RuntimeError(f"{' '.join(command)} failed:\n{said}")
    return Taken(wall, most)


def alternate_merges(
    configurations: Mapping[str, str],
    directory: pathlib.Path,
    runs: int,
    flags: Sequence[str] = (),
    forgotten: Sequence[pathlib.Path] = (),
) -> dict[str, list[Taken]]:
    """Whole merges of YAML by the stock command, written below a directory and removed again.

    ``forgotten`` are files that are not in the system's file cache when a merge begins.
    """
    script = shutil.which("mergekit-yaml", path=str(pathlib.Path(sys.executable).parent))
    if script is None:
        raise click.ClickException("cannot find mergekit-yaml beside this Python; install mergekit")
    out, commands = directory / "merged", dict[str, list[str]]()
    for number, (name, text) in enumerate(configurations.items()):
        config = directory / f"benchmark-{number}.yml"
        config.write_text(text)
        commands[name] = [script, str(config), str(out), "--no-copy-tokenizer", "--quiet", *flags]

    def before() -> None:
        shutil.rmtree(out, ignore_errors=True)
        for path in forgotten:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    try:
        return alternate_commands(commands, runs, before)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def alternate_commands(
    commands: Mapping[str, Sequence[str]], runs: int, before: Callable[[], object]
) -> dict[str, list[Taken]]:
    """Whole processes, taken in turn after one turn not counted, which warms the file cache.

    ``before`` is called ahead of each, and its time is not counted.
    """
    taken: dict[str, list[Taken]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            before()
            found = run_command(command)
            click.echo(f"turn {turn} of {runs}: {name}, {found.seconds:.1f} s", err=True)
            if turn:
                taken[name].append(found)
    return taken
