"""The demo, shortened: real training, real commands, measured losses."""

import math
import re

import pytest
from checkpoints import run, tensors
from conftest import pieces  # noqa: F401 - puts tests/ on the path before torch starts threads
from reference import pcb as reference

from mergekit_pcb.tools import demo


def test_demo_trains_merges_measures(tmp_path):
    directory = tmp_path / "demo"
    result = run("mergekit-pcb", "demo", directory, "--base-steps", "80", "--expert-steps", "40")
    rows = [
        line.split()
        for line in result.stdout.splitlines()
        if re.match(r"(base|expert|merged)", line)
    ]
    assert [" ".join(row[:-5]) for row in rows] == [
        "base",
        *(f"expert on {name}" for name in demo.EXPERTS),
        *(f"merged by {name}" for name in demo.METHODS),
    ]
    losses = [[float(cell.rstrip("*")) for cell in row[-5:]] for row in rows]
    for row in losses:
        assert row[-1] == pytest.approx(sum(row[:-1]) / 4, abs=2e-3)
        assert all(math.isfinite(loss) and loss > 0 for loss in row)
    assert min(losses[0]) < math.log(demo.VOCABULARY)  # better than guessing, somewhere
    # Training was real: each expert beats the base on its own domain.
    for position in range(len(demo.EXPERTS)):
        assert losses[1 + position][position] < losses[0][position]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory / "merged-pcb")
    text = "import torch"
    ids = AutoTokenizer.from_pretrained(directory / "merged-pcb")(text, return_tensors="pt")
    assert model(input_ids=ids["input_ids"]).logits.isfinite().all()
    folders = ["base", *(demo._folder(name) for name in demo.EXPERTS)]
    base, *experts = [tensors(directory / folder) for folder in folders]
    merged = tensors(directory / "merged-pcb")
    for name, tensor in base.items():
        expected = reference(tensor, [expert[name] for expert in experts])
        # The demo's numbers are new on every machine, and an element whose score lies beside the
        # threshold may round to its other side in float32; then it is merged wholly or not at all.
        beyond = (merged[name] - expected).abs() > 1e-6 * expected.abs() + 1e-8
        assert beyond.sum() <= max(1, 3e-4 * tensor.numel()), name


def test_the_table_marks_the_lowest_of_each_column():
    rows = [demo.Row("a", (1.0, 2.0, 3.0, 4.0)), demo.Row("b", (2.0, 1.0, 3.5, 3.0))]
    lines = demo.table(rows).splitlines()
    assert lines[2].split()[1:] == ["1.000*", "2.000", "3.000*", "4.000", "2.500"]
    assert lines[3].split()[1:] == ["2.000", "1.000*", "3.500", "3.000*", "2.375*"]
