"""Every example file runs under the stock command and merges what it says."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch
from checkpoints import run, save_family, tensors, tiny_llama
from conftest import ROOT
from reference import dare_factors
from reference import pcb as reference
from test_refine_host import expected as solved
from test_whole_model import whole_reference, with_tokenizer

EXAMPLES = sorted((ROOT / "examples" / "yaml").glob("*.yml"))
WEIGHTS = {
    "first-merge": lambda *_: {},
    "per-model": lambda *_: {"weight": [1.3, 0.8, 1.0], "density": [0.1, 0.2, 0.1], "lam": 1.2},
    "whole-model": None,
    "solve": None,
    "gradient-and-filter": lambda name, _: {
        "weight": gradient(name),
        "density": 0.2 if "mlp" in name else 0.1,
    },
    "dare": lambda name, count: {
        "density": 0.05,
        "dare": torch.stack(
            [dare_factors(0, task, name, count, kept) for task, kept in enumerate([0.2, 0.2, 0.4])]
        ),
    },
}

LLAMA = [example for example in EXAMPLES if example.stem in WEIGHTS]


def gradient(name):
    layer = int(name.split(".")[2]) if ".layers." in name else 0
    first = [1.2, 1.1, 1.0, 0.8, 0.6][layer]
    return [first, [0.6, 0.8, 1.0, 1.1, 1.2][layer]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the models that the examples name."""
    directory = tmp_path_factory.mktemp("examples")
    model = tiny_llama(layers=5, dtype=torch.bfloat16)
    paths = save_family(directory / "models", model, shard_size="60KB")
    for path, name in zip(paths[1:], ("code", "math", "chat"), strict=True):
        path.rename(path.with_name(name))
    return directory


@pytest.mark.parametrize("example", LLAMA, ids=lambda path: path.stem)
def test_example(workplace, example, monkeypatch):
    monkeypatch.chdir(workplace)
    out = pathlib.Path("merged") / example.stem
    result = run("mergekit-yaml", example, out, "--no-copy-tokenizer")
    # mergekit 0.1.5 sets the deprecated `torch_dtype`; where CI is set, transformers' word for it
    # is a line of the log as well.
    said = [line for line in result.stderr.lower().splitlines() if "torch_dtype" not in line]
    assert not [line for line in said if "warning" in line]
    text = example.read_text()
    names = [name for name in ("code", "math", "chat") if f"models/{name}" in text]
    base, *tasks = [tensors(workplace / "models" / name) for name in ("base", *names)]
    merged = tensors(out)
    assert set(merged) == set(base)
    if example.stem == "whole-model":
        states = [{n: t.float() for n, t in state.items()} for state in (base, *tasks)]
        expected = whole_reference(states)
        for name, tensor in merged.items():
            assert (tensor != expected[name].bfloat16()).double().mean() < 2e-3, name
        return
    if example.stem == "solve":
        states = [{n: t.float() for n, t in state.items()} for state in (base, *tasks)]
        expected = solved(states, {r"(_proj|lm_head)\.weight$": "rows"}, density=0.1)
        for name, tensor in merged.items():
            assert (tensor != expected[name].bfloat16()).double().mean() < 1e-2, name
        return
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        rows = [state[name].float() for state in (base, *tasks)]
        expected = reference(rows[0], rows[1:], **WEIGHTS[example.stem](name, tensor.numel()))
        assert (tensor != expected.bfloat16()).double().mean() < 2e-3, name


def test_every_example_is_checked_here_or_in_the_table_of_families():
    elsewhere = set(re.findall(r"`([\w-]+)\.yml`", (ROOT / "docs" / "models.md").read_text()))
    assert {example.stem for example in EXAMPLES} <= set(WEIGHTS) | elsewhere


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_says_in_two_lines_when_to_use_it(example):
    first, second, third = example.read_text().splitlines()[:3]
    assert first.startswith("# ")
    assert second.startswith("# ")
    assert not third.startswith("#")


@pytest.mark.slow
def test_adamerging_gains_over_the_coefficients_it_starts_from():
    """The example of one seed, with the documentation's command."""
    script = ROOT / "examples" / "python" / "adamerge.py"
    done = subprocess.run(
        [sys.executable, str(script), "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = {
        name: float(value)
        for name, value in re.findall(r"^(.+?) {2,}([\d.]+) ±", done.stdout, re.MULTILINE)
    }
    fixed = {name: value for name, value in found.items() if name.startswith("fixed")}
    assert len(fixed) == 6
    assert found["fixed at 0.3"] > found["base"]
    assert found["learned per task, from 0.3"] > found["fixed at 0.3"] + 3
    assert found["learned per layer, from 0.3"] > found["fixed at 0.3"]


def test_the_score_of_a_model_is_its_last_number(tmp_path):
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    with_tokenizer(model, ["<unk>", "import", "the", "of"])
    script = ROOT / "examples" / "python" / "score.py"
    done = subprocess.run(
        [sys.executable, str(script), str(model)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(number) for number in re.findall(r": ([\d.]+)", done.stdout)]
    assert len(losses) == 3
    assert float(done.stdout.split()[-1]) == pytest.approx(-sum(losses) / 3)
