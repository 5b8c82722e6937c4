"""The benchmark commands still run; what they print on small sizes is not looked at closely."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT
from transformers import LlamaForCausalLM

# Behind the installed package, so that it is the one that is benchmarked.
sys.path.append(str(ROOT))

from benchmarks import scaling
from benchmarks.measuring import alternate_commands, run_command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "options", "printed"),
    [
        (
            "kernel",
            ["--rows", "64", "--columns", "64", "--runs", "1", "--dtype", "float32"],
            r"\| released algorithm \|",
        ),
        (
            "kernel",
            ["--rows", "64", "--columns", "64", "--runs", "1", "--others", "--largest", "64"],
            r"\| 64 × 64, one outlier \| bfloat16 \|",
        ),
        (
            "refine",
            ["--shape", "64", "64", "--runs", "1"],
            r"\| pcb, refine: solve \|[\s\S]*Llama-2-7B",
        ),
        (
            "gpu",
            ["--device", "cpu", "--elements", "300000"],
            r"floor / pcb +\d+\.\d+[\s\S]*dare_density 0\.5: 0 of \d+ elements differ",
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


def test_scaling_makes_checkpoints_and_tells_lines_from_curves(tmp_path, monkeypatch):
    """All but the merges, which take minutes."""
    monkeypatch.setattr(scaling, "VOCABULARY", 64)
    monkeypatch.setitem(scaling.SHAPES, 0.1, (128, 256, 2))
    monkeypatch.setattr(scaling, "SHARD_BYTES", 300_000)
    for expert in (None, 0):
        scaling.checkpoint(tmp_path / str(expert), 0.1, expert)
    base, expert = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("None", "0"))
    assert len(list((tmp_path / "0").glob("model-*.safetensors"))) > 1
    steps = expert.lm_head.weight.detach().float() - base.lm_head.weight.detach().float()
    assert 5e-4 < float(steps.std()) < 2e-3
    rows = [
        scaling.Row(size * 10**8, 3, 0.2, method, "", seconds, size << 28)
        for size in (1, 4, 10)
        for method, seconds in (("pcb", 2.0 + size), ("task_arithmetic", 2.0))
    ]
    assert "| 0.40 B | 3 | 0.2 |  | 6.0 | 2.0 | 3.00 | 1.00 GiB | 1.00 GiB |" in scaling.table(rows)
    assert scaling.linear(rows) == "pcb takes 2.0 s and 10.0 s a billion parameters, within 0%"
    curved = [row._replace(seconds=(row.parameters / 1e8) ** 2) for row in rows]
    assert "within 0%" not in scaling.linear(curved)
    scaling.figure(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_whole_processes_are_measured():
    program = (
        "b = bytearray(200 << 20); b[::4096] = b'x' * len(b[::4096]); import time; time.sleep(.2)"
    )
    taken = alternate_commands({"one": [sys.executable, "-c", program]}, 1, before=list)["one"]
    assert len(taken) == 1
    assert taken[0].seconds >= 0.2
    assert 200 << 20 <= taken[0].own_bytes < 260 << 20
    with pytest.raises(RuntimeError, match="no such thing"):
        run_command([sys.executable, "-c", "raise SystemExit('no such thing')"])
