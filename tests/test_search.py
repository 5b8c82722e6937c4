"""`mergekit-pcb search` and `search_weights`: the paper's evolution strategy."""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import forked
import numpy as np
import pytest
import torch
import yaml
from checkpoints import configuration, log_of, merge, run, save_family, tensors, tiny_llama
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import save_file
from test_bad_input import SENTENCE

import mergekit_pcb
from mergekit_pcb import search_weights
from mergekit_pcb.tools.search import search
from mergekit_pcb.tools.search_job import Job, space_of
from mergekit_pcb.tools.search_space import EvaluationError, Space, sampler

# Scores a checkpoint by its distance to another, without torch, and counts how often.
SCORE = """
import pathlib, sys
import numpy as np
from safetensors.numpy import load_file
def numbers(folder):
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    state = {k: v for file in files for k, v in load_file(file).items()}
    return np.concatenate([state[k].ravel() for k in sorted(state)]).astype(float)
folder = pathlib.Path(__file__).parent
with (folder / "evaluations").open("a") as count:
    count.write("x")
model, target = numbers(sys.argv[1]), numbers(folder / "target")
print("trial of", len(model), "numbers")
print("score:", -float(np.abs(model - target).sum()))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models, a configuration, and a target made with other weights."""
    place = tmp_path_factory.mktemp("made")
    paths = save_family(place / "models", tiny_llama(layers=1), tasks=2, shard_size="30KB")
    config = configuration(paths, parameters={"density": 0.3, "lambda": 1.1}, dtype="float32")
    wanted = configuration(
        paths,
        parameters={"density": 0.3, "lambda": 1.1},
        per_model=[{"weight": 1.9}, {"weight": 0.7}],
        dtype="float32",
    )
    out, _ = merge(place / "wanted", wanted)
    out.rename(place / "target")
    (place / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    return place


@pytest.fixture
def place(tmp_path, made):
    """A folder of its own for a search, with a script that scores."""
    for name in ("models", "target"):
        (tmp_path / name).symlink_to(made / name)
    shutil.copy(made / "config.yml", tmp_path)
    (tmp_path / "score.py").write_text(SCORE)
    return tmp_path


def arguments(place, *more, budget=14):
    command = f"{sys.executable} {place / 'score.py'} {{model}}"
    best = place / "best.yml"
    return [place / "config.yml", "--evaluate", command, "--budget", budget, "-o", best, *more]


def trials(place):
    return log_of(place / "best.search")


def evaluations(place):
    return len((place / "evaluations").read_text())


def test_a_search_finds_weights_that_stock_mergekit_merges(place):
    result = run("mergekit-pcb", "search", *arguments(place, budget=24))
    log = trials(place)
    assert evaluations(place) == len(log) == 24
    assert [trial["trial"] for trial in log] == list(range(1, 25))
    assert log[0]["weights"] == [1.0, 1.0]
    best = max(log, key=lambda trial: trial["score"])
    assert best["score"] > 0.4 * log[0]["score"]  # both are negative: less than half as far
    said = re.search(r"best.yml: score (\S+) in trial (\d+) \(the start: (\S+)\)", result.stdout)
    assert int(said.group(2)) == best["trial"]
    document = yaml.safe_load((place / "best.yml").read_text())
    found = [entry["parameters"]["weight"] for entry in document["models"]]
    assert found == best["weights"]
    assert document["parameters"] == {"density": 0.3, "lambda": 1.1}
    out, _ = merge(place / "again", (place / "best.yml").read_text())
    score = run_score(place, out)
    assert score == pytest.approx(best["score"], rel=1e-4)
    assert left_in(place / "best.search") == {"study.journal"}


def left_in(folder):
    """What a search leaves beside its locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)) for path in paths} - {"lock", "appending", "measuring"}


def run_score(place, folder):
    command = [sys.executable, str(place / "score.py"), str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(said.split()[-1])


@pytest.mark.slow
def test_a_killed_search_resumes_and_repeats_nothing(place):
    script = pathlib.Path(sys.executable).with_name("mergekit-pcb")
    process = forked.started(script, ["search", *arguments(place)])
    journal, deadline = place / "best.search" / "study.journal", time.monotonic() + 120
    while not (place / "evaluations").exists() or evaluations(place) < 6:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = trials(place)
    assert 5 <= len(before) < 14
    with journal.open("a") as file:
        file.write('{"op_code": 6, "wei')  # killed in the middle of a line
    done = evaluations(place)
    run("mergekit-pcb", "search", *arguments(place))
    assert trials(place)[: len(before)] == before
    assert [trial["trial"] for trial in trials(place)] == list(range(1, 15))
    assert evaluations(place) - done == 14 - len(before)
    interrupted = [(trial["weights"], trial["score"]) for trial in trials(place)]
    # A larger budget goes on where it ended; a fresh search tries the same.
    run("mergekit-pcb", "search", *arguments(place, budget=16))
    assert evaluations(place) - done == 16 - len(before)
    fresh = arguments(place, "--work", place / "fresh")
    run("mergekit-pcb", "search", *fresh)
    again = log_of(place / "fresh")
    assert [(trial["weights"], trial["score"]) for trial in again] == interrupted
    other = run("mergekit-pcb", "search", *arguments(place, "--seed", 1), check=False)
    assert (
        "begun with other models, another configuration, command, options or version"
        in other.stderr
    )


def test_failing_trials_count_as_worst_and_say_why(place):
    count = place / "count"
    command = f"echo x >> {count}; test $(wc -l < {count}) -gt 2 || {{ echo no luck >&2; exit 3; }}"
    command += "; echo {model} 12.5e-1"
    options = [place / "config.yml", "--evaluate", command, "--budget", 4, "--minimize"]
    result = run("mergekit-pcb", "search", *options, "-o", place / "best.yml")
    log = trials(place)
    assert [trial["score"] for trial in log] == [None, None, 1.25, 1.25]
    assert log[0]["error"] == "the command exited with 3: no luck"
    assert "trial 1 failed: the command exited with 3: no luck" in result.stdout + result.stderr
    assert "score 1.25 in trial 3 (the start: failed)" in result.stdout


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("true {model}", "the command printed no number"),
        ("echo {model} nan", "the score is nan"),
        ("sleep 5; echo {model} 1", "took longer than 0.2 s"),
    ],
)
def test_when_every_trial_fails(place, command, why):
    options = [place / "config.yml", "--evaluate", command, "--budget", 2]
    options += ["--timeout", 0.2] if "took longer" in why else []
    result = run("mergekit-pcb", "search", *options, "-o", place / "best.yml", check=False)
    assert result.returncode == 1
    assert why in result.stderr
    assert SENTENCE.search(result.stderr)
    assert not (place / "best.yml").exists()


@pytest.mark.parametrize("raw", [False, True])
def test_lambda_and_density(place, raw):
    searched = ["--search", "lambda", "--search", "density"]
    if raw:
        files = []
        for name in ("base", "expert0", "expert1"):
            files.append(place / f"{name}.safetensors")
            save_file(tensors(place / "models" / name), files[-1])
        config = configuration(files, parameters={"density": 0.3}, dtype="float32")
        (place / "config.yml").write_text(yaml.safe_dump(config))
    run("mergekit-pcb", "search", *arguments(place, *searched, budget=4))
    log = trials(place)
    assert all(set(trial["shared"]) == {"lambda", "density"} for trial in log)
    assert log[0]["shared"] == {"lambda": 1.0 if raw else 1.1, "density": 0.3}
    assert len({trial["score"] for trial in log}) == 4
    document = yaml.safe_load((place / "best.yml").read_text())
    best = max(log, key=lambda trial: trial["score"])
    assert document["parameters"] == best["shared"]
    command = "mergekit-pytorch" if raw else "mergekit-yaml"
    out, _ = merge(place / "again", (place / "best.yml").read_text(), command=command)
    assert run_score(place, out) == pytest.approx(best["score"], rel=1e-4)


def test_trials_are_what_merges_give(place, family):
    """Sharded, whole-model, DARE, bfloat16, frozen weights: a sum of files against a merge."""
    from mergekit.options import MergeOptions

    from mergekit_pcb.tools.search_job import Job, configured
    from mergekit_pcb.tools.search_merges import Merges

    parameters = {"scope": "model", "dare_density": 0.6, "density": 0.2, "lambda": 1.3}
    config = configuration(family, parameters=parameters, dtype="float32", out_dtype="bfloat16")
    job = Job(config, "", place / "b.yml", place / "work", searched=("weight", "lambda"))
    job.folder.mkdir()
    merges = Merges(job, MergeOptions(copy_tokenizer=False))
    merges.prepare()
    for weights, shared in (([1.0, 2.0, 0.5], {"lambda": 0.9}), ([0.7, 0.7, 3.0], {})):
        made = tensors(merges.trial(weights, shared, job.folder / "trials" / "0001"))
        out, _ = merge(place / f"m{weights[0]}", configured(config, weights, shared))
        expected = tensors(out)
        assert set(made) == set(expected)
        for name, tensor in expected.items():
            assert made[name].dtype == tensor.dtype
            assert (made[name] != tensor).double().mean() < 2e-3, name
            assert torch.allclose(made[name].float(), tensor.float(), rtol=1e-2)
    assert (job.folder / "trials" / "0001" / "config.json").exists()


def test_weights_that_are_not_searched_stay_as_configured(place):
    """Gradients and numerals included: a sum of files against a merge."""
    from mergekit.options import MergeOptions

    from mergekit_pcb.tools.search_job import Job, configured
    from mergekit_pcb.tools.search_merges import Merges

    config = yaml.safe_load((place / "config.yml").read_text())
    config["models"][0]["parameters"] = {"weight": [0.5, 1.5]}
    config["parameters"]["weight"] = "5e-1"
    job = Job(config, "", place / "b.yml", place / "work", searched=("lambda",))
    job.folder.mkdir()
    merges = Merges(job, MergeOptions(copy_tokenizer=False))
    merges.prepare()
    made = tensors(merges.trial([], {"lambda": 0.9}, job.folder / "trials" / "0001"))
    out, _ = merge(place / "again", configured(config, [], {"lambda": 0.9}))
    for name, tensor in tensors(out).items():
        assert torch.allclose(made[name], tensor, rtol=1e-6, atol=1e-8), name


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        ({"merge_method": "ties"}, [], "it is no `merge_method: pcb`"),
        ({"models": None}, [], "it is no `merge_method: pcb`"),
        ({"parameters": {"weight": [1, 2]}}, [], "gives it filters or a gradient"),
        ({"parameters": {"weight": 7}}, [], "it starts at 7, outside of 0.5 to 3"),
        ({"parameters": {"density": 0.001}}, ["--search", "density"], "outside of 0.01 to 1"),
        (
            {"parameters": {"lambda": 0.4}},
            ["--search", "lambda", "--bounds", "lambda", "0.5", "1"],
            "outside of 0.5 to 1; start it within, or set other bounds of lambda",
        ),
        ({}, ["--bounds", "lambda", "0.2", "1"], "lambda is not searched; add --search lambda"),
        (
            {},
            ["--search", "density", "--bounds", "density", "0.1", "2"],
            "cannot use density: 2.0",
        ),
        ({"base_model": "./nowhere"}, [], "cannot merge"),
        ({"parameters": ["weight"]}, [], "its parameters are no mapping"),
        ({}, ["--bounds", "weight", "2", "1"], "2 and 1 bound nothing to search"),
        (
            {},
            ["--bounds", "weight", "0.5", "1", "--bounds", "weight", "0.5", "2"],
            "--bounds names one parameter twice",
        ),
        ({}, ["--bounds", "weight", "0.5", "inf"], "0.5 and inf bound nothing to search"),
        ({}, ["--evaluate", "score"], "the command does not name the model"),
        ({}, ["-o", "/nowhere/best.yml"], "/nowhere is no folder to write to"),
    ],
)
def test_mistakes_end_in_a_sentence(place, change, options, complaint):
    config = yaml.safe_load((place / "config.yml").read_text())
    config.update(change)
    (place / "config.yml").write_text(yaml.safe_dump(config))
    result = run("mergekit-pcb", "search", *arguments(place), *options, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    sentence = SENTENCE.search(result.stderr)
    assert sentence, result.stderr
    assert complaint in sentence.group()


def test_a_number_that_yaml_takes_for_text_is_a_start():
    config = {"merge_method": "pcb", "base_model": "b", "models": [{"model": "m"}]}
    config["parameters"] = {"density": "1e-1"}
    job = Job(config, "{model}", pathlib.Path("o"), pathlib.Path("f"), searched=("density",))
    assert space_of(job).shared == (("density", 0.1),)
    config["parameters"] = {"density": 0.1, "statistics": "s.json"}
    with pytest.raises(mergekit_pcb.PCBError, match="leave `statistics` out of it"):
        space_of(job)


@pytest.mark.parametrize("package", ["optuna", "cmaes"])
def test_without_optuna_nothing_is_written(place, monkeypatch, package):
    from click.testing import CliRunner

    from mergekit_pcb.tools import cli

    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(cli.main, ["search", *map(str, arguments(place))])
    assert f"the package {package} is missing; pip install optuna cmaes" in result.output
    assert not (place / "best.search").exists()
    assert not (place / "best.yml").exists()


# --- In memory --------------------------------------------------------------------------------


def states(n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (13, 7), "b": (7,), "scalar": ()}
    found = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}]
    for _ in range(n):
        found.append(
            {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in found[0].items()}
        )
    return [{n: t.to(dtype) for n, t in s.items()} | {"steps": torch.tensor(3)} for s in found]


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_contributions_combined_are_the_merge(scope, dtype):
    base, *experts = states(dtype=dtype)
    chosen = {"density": [0.3, 0.5, 0.2], "scope": scope, "dare_density": 0.7, "seed": 4}
    parts = mergekit_pcb.contributions(base, experts, **chosen)
    weights = [0.5, 2.0, -1.0]
    combined = mergekit_pcb.combine(base, parts, weights, 1.5)
    models = dict(enumerate([base, *experts]))
    parameters = {**chosen, "weight": weights, "lambda": 1.5}
    merged = merge_state_dicts(models, "pcb", base=0, parameters=parameters)
    assert set(combined) == set(merged)
    for name, tensor in merged.items():
        assert combined[name].dtype == tensor.dtype
        if not tensor.is_floating_point():
            assert torch.equal(combined[name], tensor)
            continue
        off = (combined[name].double() - tensor.double()).norm()
        assert off <= 2 * torch.finfo(dtype).eps * tensor.double().norm(), name


def test_contributions_take_modules_and_leave_them_alone():
    models = [torch.nn.Linear(5, 4) for _ in range(3)]
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    parts = mergekit_pcb.contributions(models[0], models[1:], density=1.0)
    merged = mergekit_pcb.combine(models[0], parts, [1.0, 1.0])
    merged["weight"] += 1
    for model, state in zip(models, before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])
            assert model.get_parameter(name).requires_grad


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"experts": []}, "there is no expert"),
        ({"density": [0.1]}, "there are 3 experts"),
        ({"density": 2}, "use density: 2"),
        ({"scope": "all"}, "write tensor or model"),
        ({"clip": 0.5}, "use clip: 0.5"),
        ({"seed": 0.5}, "use seed: 0.5"),
        ({"drop": "w"}, "expert 1 lacks it"),
        ({"shape": "w"}, "(13, 7) in the base but (2, 2) in expert 1"),
        ({"poison": "w"}, "expert 1 holds NaN or infinity"),
    ],
)
def test_contributions_refuse_in_sentences(change, complaint):
    base, *experts = states()
    if name := change.pop("drop", None):
        del experts[1][name]
    if name := change.pop("shape", None):
        experts[1][name] = torch.zeros(2, 2)
    if name := change.pop("poison", None):
        experts[1][name][0] = float("nan")
    experts = change.pop("experts", experts)
    with pytest.raises(mergekit_pcb.PCBError) as caught:
        mergekit_pcb.contributions(base, experts, **change)
    assert complaint in str(caught.value)


def test_combining_with_another_number_of_weights_is_refused():
    base, *experts = states()
    parts = mergekit_pcb.contributions(base, experts)
    with pytest.raises(mergekit_pcb.PCBError, match="3 contributions with 2 weights"):
        mergekit_pcb.combine(base, parts, [1.0, 2.0])
    with pytest.raises(
        mergekit_pcb.PCBError, match="cannot combine a list, because it does not say"
    ):
        mergekit_pcb.combine(base, list(parts), [1.0] * len(parts))
    own = mergekit_pcb.Contributions(list(parts))
    for name, tensor in mergekit_pcb.combine(base, own, [1.0] * len(parts)).items():
        assert torch.equal(tensor, mergekit_pcb.combine(base, parts, [1.0] * len(parts))[name])


@pytest.mark.parametrize("n", [1, 3])
def test_weights_found_in_memory(n):
    base, *experts = states(n)
    parts = mergekit_pcb.contributions(base, experts, density=0.5)
    wanted = [1.7, 0.9, 2.2][:n]
    target = mergekit_pcb.combine(base, parts, wanted)
    called = []

    def distance(state):
        called.append(state)
        return float(sum((state[n] - target[n]).abs().sum() for n in ("w", "b")))

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    found = search_weights(distance, base, experts, density=0.5, budget=120, minimize=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert len(called) == len(found.trials) == 120
    assert found.best.weights == pytest.approx(wanted, abs=0.2)
    again = search_weights(distance, base, experts, density=0.5, budget=120, minimize=True)
    assert [t.weights for t in again.trials] == [t.weights for t in found.trials]
    assert [t.score for t in again.trials] == [t.score for t in found.trials]


def test_small_values_keep_their_digits_and_bounds_hold_for_what_is_rounded():
    space = Space((0.33335,), (("anchor", 1e-5),), {"anchor": (1e-6, 4e-5), "weight": (0.33334, 1)})
    (weight,), shared = space.split({"weight 1": 0.33335, "anchor": 1.23456e-5})
    assert weight == 0.33334
    assert shared == {"anchor": 1.235e-5}
    assert space.split({"weight 1": 0.5, "anchor": 0.0})[1] == {"anchor": 1e-6}


def test_trials_stay_within_bounds_and_budget():
    tried = []

    def evaluate(weights, shared, _):
        tried.append([*weights, shared["lambda"]])
        if len(tried) % 3 == 0:
            raise EvaluationError("no")
        return sum(weights)

    space = Space((0.9, 1.1), (("lambda", 0.4),), {"weight": (0.8, 1.3), "lambda": (0.2, 0.9)})
    found = list(search(evaluate, space, 60))
    assert len(found) == len(tried) == 60
    assert all(0.8 <= w <= 1.3 for *weights, _ in tried for w in weights)
    assert all(0.2 <= scale <= 0.9 for *_, scale in tried)
    assert [trial.error for trial in found[:3]] == [None, None, "no"]
    assert max(t.score for t in found[30:] if t.score) > 2.4  # it climbs towards 2.6


@pytest.mark.parametrize(
    ("space", "scores", "kind"),
    [
        (Space((1.0, 1.0)), 1, "CmaEsSampler"),
        (Space((1.0,), (("lambda", 1.0),)), 1, "CmaEsSampler"),
        (Space((1.0,)), 1, "TPESampler"),
        (Space((), (("lambda", 1.0), ("refine", "none"))), 1, "TPESampler"),
        (Space((1.0, 1.0)), 2, "TPESampler"),
    ],
)
def test_cma_es_is_for_one_score_and_two_numbers_or_more(monkeypatch, space, scores, kind):
    """And these are the bounds, where no others are given."""
    optuna, made = pytest.importorskip("optuna"), []
    for name in ("CmaEsSampler", "TPESampler"):
        monkeypatch.setattr(optuna.samplers, name, lambda *_, kind=name, **__: made.append(kind))
    trial = type("Trial", (), {"number": 3})
    sampler(space, 0, scores).infer_relative_search_space(None, trial)
    assert made == [kind]
    ranges = {"weight 1": (0.5, 3), "weight 2": (0.5, 3), "lambda": (0.5, 2.5)}
    for name, axis in space.axes().items():
        assert name == "refine" or (axis.low, axis.high) == ranges[name]
