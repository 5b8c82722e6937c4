"""The quality benchmark: its data, its baselines, its command, and what is stored of it."""

import dataclasses
import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

# Behind the installed package, so that it is the one that is benchmarked.
sys.path.append(str(ROOT))

from benchmarks.quality import (
    baselines,
    choices,
    experiments,
    glyphs,
    language,
    methods,
    refined,
    refined_tables,
    tables,
    without_data,
)
from benchmarks.quality.__main__ import main
from benchmarks.quality.suite import DISTANCES, SPLITS, Suite

STORED = ROOT / "benchmarks" / "quality" / "results"


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
    return Suite("test", "accuracy", 0, ("a", "b"), model, base, experts, data)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_complete_ablation_is_pcb(suite, scope):
    knobs = {"density": 0.3, "lambda": 0.7}
    method = methods.PCB if scope == "tensor" else methods.PCB_MODEL
    expected = method.merge(suite, knobs)
    found = baselines.without(suite, None, 0.3, 0.7, scope)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-7), name
    assert any(not torch.equal(expected[name], suite.base[name]) for name in expected)


def ablated(tau, part, density):
    """The paper's formulas for one element after the other, in Python's floats."""
    tasks, count = len(tau), len(tau[0])
    weights = []
    for row in tau:
        ordered = sorted(map(abs, row))
        low, high = ordered[int(count * 1e-4)], ordered[int(count * (1 - 1e-4) - 1)]
        scores = []
        for place, value in enumerate(row):
            x = (min(max(abs(value), low), high) - low) / (high - low)
            intra = math.exp(tasks * x * x)
            inter = math.tanh(value * sum(other[place] for other in tau))
            scores.append({"intra": inter, "inter": intra}.get(part, intra * inter))
        threshold = sorted(scores)[int(count * (1 - density))] if part != "drop" else min(scores)
        peak = max(scores)
        share = [max(score - threshold, 0.0) / (peak - threshold) for score in scores]
        if part == "rescale":
            share = [float(value > 0) for value in share]
        size = [math.copysign(min(max(abs(v), low), high), v) for v in row]
        weights.append(list(zip(share, size, strict=True)))
    return [
        sum(share * size for share, size in column) / max(sum(s for s, _ in column), 1e-12)
        for column in zip(*weights, strict=True)
    ]


@pytest.mark.parametrize("part", ["intra", "inter", "drop", "rescale"])
def test_an_ablation_leaves_out_what_it_says(suite, part):
    name = "out.weight"
    tau = [(expert[name] - suite.base[name]).flatten() for expert in suite.experts]
    expected = torch.tensor(ablated([row.tolist() for row in tau], part, 0.3))
    found = baselines.without(suite, part, 0.3, 1.0, "tensor")[name]
    complete = baselines.without(suite, None, 0.3, 1.0, "tensor")[name]
    assert torch.allclose((found - suite.base[name]).flatten(), expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found, complete)


def test_baselines_of_equal_experts_are_that_expert(suite):
    suite.experts[1].update(suite.experts[0])
    for merged in (baselines.fisher(suite, 1e-6), baselines.regmean(suite, 0.9)):
        for name, tensor in suite.experts[0].items():
            assert torch.allclose(merged[name], tensor, rtol=1e-3, atol=1e-4), name


def test_regmean_agrees_better_with_the_experts_than_their_mean(suite):
    """What it minimises: the distance of the last layer's outputs, on each expert's inputs."""
    regmean = baselines.regmean(suite, 1.0)
    average = methods.LINEAR.merge(suite, {})

    def distances(state):
        totals = torch.zeros(2)
        for task, expert in zip(suite.tasks, suite.experts, strict=True):
            (((images,), _),) = suite.data["train"][task]
            suite.model.load_state_dict(expert)
            with torch.no_grad():
                inputs = suite.model.hidden(images).relu().flatten(1)
            last = inputs @ (state["out.weight"] - expert["out.weight"]).T
            first = torch.nn.functional.conv2d(
                images, state["hidden.weight"] - expert["hidden.weight"], padding=1
            )
            totals += torch.stack([first.square().sum(), last.square().sum()])
        return totals

    found = distances(regmean)
    assert (found < distances(average)).all()
    # It is the least there is: any step away from it is worse.
    for name, layer in (("hidden.weight", 0), ("out.weight", 1)):
        step = 1e-2 * torch.randn_like(regmean[name])
        for sign in (1, -1):
            moved = {**regmean, name: regmean[name] + sign * step}
            assert distances(moved)[layer] > found[layer]


def test_fisher_with_coefficients(suite):
    """A coefficient of zero leaves an expert out; a common factor changes nothing."""
    alone = baselines.fisher(suite, 1e-6, [0.0, 2.0])
    for name, tensor in suite.experts[1].items():
        assert torch.allclose(alone[name], tensor, atol=1e-6), name
    ones, twos = (baselines.fisher(suite, 1e-6, given) for given in (None, [2.0, 2.0]))
    for name, tensor in ones.items():
        assert torch.allclose(twos[name], tensor, atol=1e-6), name


def test_fisher_leans_to_the_expert_that_cares(suite):
    """An expert whose loss does not depend on a weight has no say in it."""
    suite.experts[0]["out.weight"].zero_()
    suite.experts[0]["out.bias"].zero_()
    merged = baselines.fisher(suite, 1e-6)
    for name in ("hidden.weight", "hidden.bias"):
        assert torch.allclose(merged[name], suite.experts[1][name], atol=1e-4), name


class Coin(torch.nn.Module):
    """Logits 0 and weight · x."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        logit = (x * self.weight).sum(-1)
        return torch.stack([torch.zeros_like(logit), logit], -1)


def test_fisher_is_the_known_one_of_a_fair_coin():
    """At weight 0 either label's squared gradient is x² / 4, whichever is drawn."""
    model, zero = Coin(), {"weight": torch.zeros(2)}
    data = {"train": {"a": [((torch.tensor([[1.0, 3.0], [1.0, 3.0]]),), torch.zeros(2).long())]}}
    suite = Suite("coin", "loss", 0, ("a",), model, zero, [zero], data)
    found = baselines._fisher(suite, 0)["weight"]
    assert torch.allclose(found, torch.tensor([1.0, 9.0]) / 82**0.5)


def test_searches_are_equal_and_begin_at_the_first_setting():
    for method in methods.METHODS:
        trials = method.trials(8, seed=1)
        numbers = [knob for knob in method.knobs if isinstance(knob, methods.Knob)]
        few = math.prod(len(getattr(knob, "values", (0, 1))) for knob in method.knobs)
        assert len(trials) == (8 if numbers else few)
        assert trials[0] == {knob.name: knob.first for knob in method.knobs}
        assert len({tuple(knobs.items()) for knobs in trials}) == len(trials)
        for knobs, knob in itertools.product(trials, method.knobs):
            low, high = (
                (min(knob.values), max(knob.values))
                if isinstance(knob, methods.Choice)
                else (knob.low, knob.high)
            )
            assert low <= knobs[knob.name] <= high


def test_the_best_trial_is_the_highest_that_is_a_number():
    trials = [(math.nan, {}), (1.0, {"a": 0}), (2.0, {"a": 1}), (2.0, {"a": 2}), (-math.inf, {})]
    assert methods.best_of(trials) == (2.0, {"a": 1})


def test_some_tasks_are_merged_from_their_own_experts(suite):
    some = suite.among(["b"])
    assert some.tasks == ("b",)
    assert some.experts == [suite.experts[1]]
    assert set(some.scores(suite.base, "test")) == {"b"}


def test_trials_of_all_tasks_are_those_of_a_shorter_search(suite):
    """And a chosen model is the one that has the score it was chosen for."""
    some = (methods.LINEAR, methods.TASK_ARITHMETIC, methods.TIES, methods.PCB, methods.PCB_MODEL)
    trials = {method.name: method.searched(suite, 6, suite.seed) for method in some}
    (chosen,) = experiments._some_tasks(suite, 3, trials)[2]
    assert len(chosen.rows) == 5
    anew = experiments.Chosen(suite)
    for name, _, score, make in chosen.rows:
        (method,) = (method for method in some if method.name == name)
        anew.add_searched(method, 3)
        assert anew.rows[-1][:3] == chosen.rows[len(anew.rows) - 1][:3]
        assert suite.validation(make()) == score


@pytest.mark.slow
def test_near_experts_are_the_same_whatever_comes_after_them():
    """Each distance begins where the base ended: from its generators and its weights."""
    schedule = experiments.TIERS["small"].efforts["glyphs"].schedule
    schedule = dataclasses.replace(schedule, base_steps=3, expert_steps=2)
    (alone,) = glyphs.build(0, schedule)
    near, longer, faster = glyphs.build(0, schedule, DISTANCES)
    for one, other in zip(alone.experts, near.experts, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for far in (longer, faster):
        assert all(torch.equal(t, far.base[n]) for n, t in near.base.items())
        assert not torch.equal(
            far.experts[0]["projection.weight"], near.experts[0]["projection.weight"]
        )


def test_another_prior_is_the_package_but_for_the_prior(suite):
    """At density 1 with one expert, PCB's merge is nearly the task vector, and so is the prior."""
    one = dataclasses.replace(suite, experts=suite.experts[:1])
    matrices = without_data.matrices_of(one)
    assert matrices == ["hidden.weight", "out.weight"]
    found = baselines.solved(one, matrices, 0.1, 1.0)
    for name in matrices:
        tau = (one.experts[0][name] - one.base[name]).flatten(1).double()
        gram = tau.T @ tau / tau.square().sum()
        # With the task vector itself as prior the solution is the task vector.
        assert torch.allclose(found[name].flatten(1).double(), tau, atol=1e-6)
        assert torch.allclose(
            baselines.solution([tau], 0 * tau, 1e-9) @ gram, tau @ gram, atol=1e-6
        )
    pair = [torch.eye(2), torch.eye(2).flip(0)]
    assert baselines.agreement(pair) == pytest.approx(1 / math.sqrt(2))


def test_every_method_beside_refine_merges(suite, tmp_path, monkeypatch):
    """The whole of a record on a suite that needs no training, and the tables of two of them."""
    monkeypatch.setattr(refined, "BUILD", {"language": lambda *_: iter([suite] * 3)})
    seen = []
    for method in refined.METHODS_OF_THIS:
        state = method.merge(suite, method.trials(1, 0)[0])
        assert all(tensor.isfinite().all() for tensor in state.values()), method.name
        seen.append(torch.cat([tensor.flatten() for tensor in state.values()]))
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(seen, 2))
    for seed in (1, 2):
        refined.run("language", seed, "small", tmp_path)
    records = refined._read(tmp_path)
    assert len(records) == 6
    (own,) = (row for row in records[0].searched if row.method == without_data.OURS)
    assert own.validation == pytest.approx(max(t[0] for t in records[0].trials[without_data.OURS]))
    text = refined_tables.write(records, tmp_path)
    assert text.count("**") >= 2 * 6
    assert (tmp_path / "refined.png").exists()
    for row in records[0].first:
        assert text.count(f"| {row.method}") >= 2


def test_what_was_chosen_is_on_seeds_that_no_table_reports(tmp_path):
    result = CliRunner().invoke(choices.main, ["--seed", "10", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "tables report it" in result.output


def test_rules_for_lambda_of_experts_that_are_known(suite):
    """Orthogonal experts of one norm: nothing is shared, and the sum is as long as the experts."""
    case = choices.Case("known", suite)
    for name in case.matrices:
        first, second = (torch.zeros_like(tau) for tau in case.taus[name])
        first[0, 0], second[1, 1] = 1.0, 1.0
        case.taus[name] = [first, second]
        case.prior[name] = first + second
    merged = {name: case.merged(name) for name in case.matrices}
    assert choices._least_squares(case, merged) == pytest.approx(1.0)
    assert choices._explained(case, merged) == pytest.approx(1.0)
    assert choices._as_far_as_an_expert(case, merged) == pytest.approx(1 / math.sqrt(2))
    for rule in (choices._disagreement, choices._nuclear):
        assert all(value == pytest.approx(1.0) for value in rule(case, merged).values())


@pytest.mark.slow
def test_no_text_is_in_two_parts():
    general = language.texts("general", language.GENERAL_CHARACTERS)
    for task in language.TASKS:
        parts = language.parts_of(language.texts(task), general)
        for split in ("validation", "test"):
            sizes = [len(file) for file in parts[split]]
            assert sum(sizes) > 50_000
            assert max(sizes) < 0.2 * sum(sizes), "one file must not be the domain"
        trained_on = parts["train"] + general
        known = {line for file in trained_on for line in language.telling_lines(file)}
        for one, other in itertools.combinations(SPLITS, 2):
            assert not set(parts[one]) & set(parts[other]), task
        for file in parts["validation"] + parts["test"]:
            assert file not in general
            assert language.known_share(file, known) <= 0.1


def test_no_image_is_in_two_parts():
    digits = glyphs._Digits(seed=3)
    assert torch.equal(digits.part("test", 9)[0], glyphs._Digits(seed=4).part("test", 9)[0])
    sources = [digits, glyphs._Letters(range(ord("A"), ord("C")), seed=3)]
    for source in sources:
        parts = [source.part(split, 300)[0].flatten(1) for split in SPLITS]
        if source is not digits:
            labels = torch.arange(300) % source.classes
            parts.append(source.training(labels).flatten(1))
        rows = [tuple(image) for part in parts for image in part.tolist()]
        assert len(set(rows)) == len(rows)


def test_a_seed_of_another_tier_is_told(tmp_path):
    command = ["--tier", "small", "--seed", "3", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "the seeds of tier small are (10,)" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_tier_of_everything(tmp_path):
    command = [sys.executable, "-m", "benchmarks.quality", "--tier", "small", "--out"]

    def run():
        return subprocess.run(
            [*command, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
        )

    result = run()
    assert result.returncode == 0, result.stderr
    records = [
        experiments.Record.model_validate_json((tmp_path / f"{name}-10.json").read_text())
        for name in experiments.FROM_NOTHING
    ]
    for record in records:
        assert len(record.searched) == len(methods.METHODS)
        rows = [
            *record.first, *record.searched, *record.weighted, *record.adapted,
            *record.ablation, *record.clip,
            *itertools.chain(*itertools.chain(*record.tasks_merged.values())),
        ]  # fmt: skip
        assert all(math.isfinite(score) for row in rows for score in row.test.values())
        assert all(math.isfinite(row.validation) for row in rows)
        for chosen, tried in zip(record.searched, record.first, strict=True):
            trials = record.trials[chosen.method]
            assert (tried.validation, tried.knobs) == trials[0]
            assert (chosen.validation, chosen.knobs) == max(trials, key=lambda trial: trial[0])
        for count, ways in record.tasks_merged.items():
            assert {len(row.test) for choice in ways for row in choice} == {count}
            assert len(ways) == (1 if count == len(record.tasks) else 2)
        if record.metric == "loss":  # so few steps already help
            own = sum(record.individual.values())
            assert own > sum(record.base.test.values())
    for file in ("tables.md", "sweeps.png", "tasks.png"):
        assert (tmp_path / file).stat().st_size > 1000
    assert (tmp_path / "tables.md").read_text() in result.stdout

    # What is there is not made again: only the missing record is, with the same numbers.
    kept, remade = (tmp_path / f"{name}-10.json" for name in ("language", "glyphs"))
    before, text = kept.stat().st_mtime_ns, remade.read_text()
    remade.unlink()
    assert run().returncode == 0
    assert kept.stat().st_mtime_ns == before
    assert re.sub(r'"seconds".*', "", remade.read_text()) == re.sub(r'"seconds".*', "", text)


def test_stored_tables_are_those_of_the_stored_records(tmp_path):
    records = [
        experiments.Record.model_validate_json(file.read_text())
        for file in sorted(STORED.glob("*.json"))
    ]
    assert {record.tier for record in records} == {"full"}
    for name in experiments.FROM_NOTHING:
        assert sum(record.suite == name for record in records) >= 3
    assert tables.write(records, tmp_path) == (STORED / "tables.md").read_text()
    assert tables.outside(records, records) == []
    worse = {task: score - 1.0 for task, score in records[0].searched[0].test.items()}
    row = records[0].searched[0].model_copy(update={"test": worse})
    other = records[0].model_copy(update={"searched": [row, *records[0].searched[1:]]})
    for own in ([other, *records[1:]], [other]):  # all seeds, or this one alone
        (complaint,) = tables.outside(own, records)
        assert row.method in complaint
    lazy = []
    for record in records:
        rows = [row.model_copy(update={"test": record.base.test}) for row in record.searched]
        lazy.append(record.model_copy(update={"searched": rows}))
    found = tables.outside(lazy, records)
    assert len(found) == 2 * len(methods.METHODS), "a merge that does nothing is far away"
    (complaint,) = tables.outside([records[0]], [records[-1]])
    assert "there is no stored record" in complaint
    assert "\n".join(tables.summary(records)) in (ROOT / "docs" / "quality.md").read_text()


#: What the pages call suites and methods, where they do not call them as the tables do.
SHOWN = {
    "encoder": "MiniLM",
    "decoder": "SmolLM2",
    "task_arithmetic + solve + spectrum": "task_arithmetic, solved and evened",
    "RegMean": "RegMean, which sees data",
}


def row_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def table_on(page, title):
    """The head and the rows of the table whose first cell this is, a row by its own first cell."""
    lines = re.sub(r"\*\*|[`\\]", "", (ROOT / page).read_text()).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {title} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    (_, *head), _, *body = map(row_of, rows)
    return head, {name: cells for name, *cells in body}


def cells_of(lines):
    return {SHOWN.get(name, name): cells for name, *cells in map(row_of, [*lines][2:])}


def test_stored_tables_of_refine_are_those_of_the_stored_records(tmp_path):
    records = refined._read(STORED / "refined")
    for suite, distance in itertools.product(experiments.FROM_NOTHING, DISTANCES):
        some = [r for r in records if (r.suite, r.distance) == (suite, distance.name)]
        assert [r.seed for r in some] == list(experiments.TIERS["full"].seeds)
        assert {r.tier for r in some} == {"full"}
    assert refined_tables.write(records, tmp_path) == (STORED / "refined/refined.md").read_text()
    assert "\n".join(refined_tables.summary(records)) in (ROOT / "docs" / "quality.md").read_text()
    titles, *lines = (row_of(line.replace("**", "")) for line in refined_tables.summary(records))
    places = [titles.index("glyphs, near"), titles.index("language, near")]
    stored = {cells[0]: [cells[place] for place in places] for cells in lines}
    head, rows = table_on("README.md", "method")
    assert len(rows) == 6
    columns = head.index("glyphs"), head.index("language")
    for method, cells in rows.items():
        name = method.replace("RegMean, which sees data", "RegMean (sees data)")
        assert [cells[column] for column in columns] == stored[name], method
    methods_of_all = {tuple(row.method for row in r.first) for r in records}
    assert methods_of_all == {tuple(m.name for m in refined.METHODS_OF_THIS)}


def test_what_is_said_of_pretrained_models_is_in_their_records(tmp_path):
    files = sorted((STORED / "pretrained").glob("*.json"))
    records = [experiments.Record.model_validate_json(file.read_text()) for file in files]
    assert {(record.suite, record.tier) for record in records} == {
        ("encoder", "full"),
        ("decoder", "large"),
    }
    assert tables.write(records, tmp_path) == (STORED / "pretrained" / "tables.md").read_text()
    for suite, own in tables._suites(records):
        told = {
            method: [cell.split(" ")[0] for cell in cells]
            for method, cells in cells_of(tables.summary(own)).items()
        }
        head, rows = table_on("README.md", "method")
        column = head.index(SHOWN[suite])
        assert len(rows) == 6
        for method, cells in rows.items():
            assert cells[column].split(" / ") == told[method], (suite, method)
        head, rows = table_on("docs/quality.md", suite)
        assert head == ["first setting", "searched", "lead of pcb, first", "lead of pcb, searched"]
        leads = [
            {method: cells[2] for method, cells in cells_of(tables._table(own, scores)).items()}
            for scores in (lambda record: record.first, tables._searched)
        ]
        assert len(rows) == 10
        for method, (*shares, first, searched) in rows.items():
            assert shares == told[method], (suite, method)
            for lead, behind in zip((first, searched), leads, strict=True):
                expected = behind[method].translate(str.maketrans("+-", "−+"))
                assert lead == expected.removeprefix("+"), (suite, method)
    encoders = [record for record in records if record.suite == "encoder"]
    pairs = {}
    for line in [*tables._against_the_paper(encoders)][2:]:
        pair, _, _, verdict, *_ = row_of(line)
        pairs.setdefault(pair, []).append(verdict.removeprefix("yes, "))
    assert len(pairs) == 9
    page = (ROOT / "docs" / "quality.md").read_text().replace("`", "")
    for pair, verdicts in pairs.items():
        assert "| " + " | ".join((pair, *verdicts)) + " |" in page, pair


def test_the_benchmark_of_refine_trains_what_its_tables_show(tmp_path, monkeypatch):
    """Pretrained models have a benchmark of their own, and so has their tier."""
    asked = []
    monkeypatch.setattr(refined, "in_processes", lambda _, __, calls: asked.extend(calls))
    monkeypatch.setattr(refined_tables, "write", lambda *_: "")
    command = ["--seed", "10", "--out", str(tmp_path)]
    result = CliRunner().invoke(refined.main, command)
    assert result.exit_code == 0, result.output
    assert [call[0] for call in asked] == list(experiments.FROM_NOTHING)
    for other in (refined.main, choices.main):
        result = CliRunner().invoke(other, ["--tier", "large", "--out", str(tmp_path)])
        assert result.exit_code == 2
        assert "'large' is not one of" in result.output
