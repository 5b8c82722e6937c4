"""The benchmark commands still run; what they print on small sizes is not looked at closely."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    ("module", "options", "printed"),
    [
        pytest.param(
            "kernel",
            ["--rows", "64", "--columns", "64", "--runs", "1"],
            r"\| released algorithm \|",
            marks=pytest.mark.slow,
        ),
        (
            "refine",
            ["--shape", "64", "64", "--runs", "1"],
            r"\| pcb, refine: solve \|[\s\S]*Llama-2-7B",
        ),
        (
            "gpu",
            ["--device", "cpu", "--elements", "300000"],
            r"floor / pcb +\d+\.\d+[\s\S]*are the same",
        ),
    ],
)
def test_benchmark(module, options, printed):
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(printed, result.stdout), result.stdout
