"""The quality benchmark: its data, its baselines, its command, and what is stored of it."""

import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

# Behind the installed package, so that it is the one that is benchmarked.
sys.path.append(str(ROOT))

from benchmarks.quality import baselines, experiments, glyphs, language, methods
from benchmarks.quality.suite import SPLITS, Suite
from mergekit_pcb import demo


class Classifier(torch.nn.Module):
    """A convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.out = torch.nn.Linear(4 * 16, 3)

    def forward(self, images):
        return self.out(self.hidden(images).relu().flatten(1))


@pytest.fixture
def suite():
    """Two experts that differ from a base everywhere, and data they have never seen."""
    torch.manual_seed(0)
    model = Classifier()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = [
        {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in base.items()}
        for _ in range(2)
    ]
    data = {
        split: {
            task: [((torch.randn(40, 1, 4, 4),), torch.randint(3, (40,)))] for task in ("a", "b")
        }
        for split in SPLITS
    }
    return Suite("test", "accuracy", ("a", "b"), model, base, experts, data)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_complete_ablation_is_pcb(suite, scope):
    knobs = {"density": 0.3, "lambda": 0.7}
    method = methods.PCB if scope == "tensor" else methods.PCB_MODEL
    expected = method.merge(suite, knobs)
    found = baselines.without(suite, None, 0.3, 0.7, scope)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-7), name
    assert any(not torch.equal(expected[name], suite.base[name]) for name in expected)


@pytest.mark.parametrize("part", ["intra", "inter", "drop", "rescale"])
def test_an_ablation_is_something_else(suite, part):
    complete = baselines.without(suite, None, 0.3, 1.0, "tensor")
    found = baselines.without(suite, part, 0.3, 1.0, "tensor")
    assert any(not torch.allclose(found[name], complete[name]) for name in complete)


def test_baselines_of_equal_experts_are_that_expert(suite):
    suite.experts[1].update(suite.experts[0])
    for merged in (baselines.fisher(suite), baselines.regmean(suite, 0.9)):
        for name, tensor in suite.experts[0].items():
            assert torch.allclose(merged[name], tensor, rtol=1e-3, atol=1e-4), name


def test_regmean_agrees_better_with_the_experts_than_their_mean(suite):
    """What it minimises: the distance of the last layer's outputs, on each expert's inputs."""
    regmean = baselines.regmean(suite, 1.0)
    average = methods.LINEAR.merge(suite, {})

    def distance(state):
        total = 0.0
        for task, expert in zip(suite.tasks, suite.experts, strict=True):
            (((images,), _),) = suite.data["train"][task]
            suite.model.load_state_dict(expert)
            with torch.no_grad():
                inputs = suite.model.hidden(images).relu().flatten(1)
            total += (inputs @ (state["out.weight"] - expert["out.weight"]).T).square().sum()
        return float(total)

    assert distance(regmean) < 0.99 * distance(average)


def test_fisher_leans_to_the_expert_that_cares(suite):
    """An expert whose loss does not depend on a weight has no say in it."""
    suite.experts[0]["out.weight"].zero_()
    suite.experts[0]["out.bias"].zero_()
    merged = baselines.fisher(suite)
    for name in ("hidden.weight", "hidden.bias"):
        assert torch.allclose(merged[name], suite.experts[1][name], atol=1e-4), name


def test_searches_are_equal_and_begin_as_published():
    for method in methods.METHODS:
        trials = method.trials(8, seed=1)
        assert len(trials) == (8 if method.knobs else 1)
        assert trials[0] == {knob.name: knob.published for knob in method.knobs}
        assert len({tuple(knobs.items()) for knobs in trials}) == len(trials)
        for knobs, knob in itertools.product(trials, method.knobs):
            assert knob.low <= knobs[knob.name] <= knob.high


def test_no_text_is_in_two_parts():
    for task in language.TASKS:
        parts = language._parts(demo.texts(task))
        for one, other in itertools.combinations(SPLITS, 2):
            assert parts[one]
            assert not set(parts[one]) & set(parts[other]), task


def test_no_image_is_in_two_parts():
    digits = glyphs._Digits(seed=3)
    assert torch.equal(digits.part("test", 9)[0], glyphs._Digits(seed=4).part("test", 9)[0])
    sources = [digits, glyphs._Letters(range(ord("A"), ord("C")), seed=3)]
    for source in sources:
        parts = [source.part(split, 300)[0].flatten(1) for split in SPLITS]
        rows = [tuple(image) for part in parts for image in part.tolist()]
        assert len(set(rows)) == len(rows)


def test_a_small_tier_of_everything(tmp_path):
    command = [sys.executable, "-m", "benchmarks.quality", "--tier", "small", "--out"]

    def run():
        return subprocess.run(
            [*command, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
        )

    result = run()
    assert result.returncode == 0, result.stderr
    records = [
        experiments.Record.model_validate_json((tmp_path / f"{name}-0.json").read_text())
        for name in experiments.BUILD
    ]
    for record in records:
        assert len(record.searched) == len(methods.METHODS)
        rows = [
            *record.published, *record.searched, *record.weighted, *record.adapted,
            *record.ablation, *record.clip, *itertools.chain(*record.tasks_merged.values()),
        ]  # fmt: skip
        assert all(math.isfinite(score) for row in rows for score in row.test.values())
        assert all(math.isfinite(row.validation) for row in rows)
        for chosen, tried in zip(record.searched, record.published, strict=True):
            assert chosen.validation >= tried.validation, "the first trial is the published one"
        if record.metric == "loss":  # so few steps already help
            own = sum(record.individual.values())
            assert own > sum(record.base.test.values())
    for file in ("tables.md", "sweeps.png", "tasks.png"):
        assert (tmp_path / file).stat().st_size > 1000
    assert (tmp_path / "tables.md").read_text() in result.stdout

    # What is there is not made again: only the missing record is, with the same numbers.
    kept, remade = (tmp_path / f"{name}-0.json" for name in ("language", "glyphs"))
    before, text = kept.stat().st_mtime_ns, remade.read_text()
    remade.unlink()
    assert run().returncode == 0
    assert kept.stat().st_mtime_ns == before
    assert re.sub(r'"seconds".*', "", remade.read_text()) == re.sub(r'"seconds".*', "", text)
