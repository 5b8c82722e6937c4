"""`mergekit-pcb report`: what is counted, and the page it is shown on."""

import csv
import html.parser
import json
import math

import pytest
import torch
import yaml
from checkpoints import configuration, run, tensors
from click.testing import CliRunner
from test_bad_input import SENTENCE
from test_dare import dare_factors

from mergekit_pcb.tools import cli
from mergekit_pcb.tools.counts import kind_of, layer_of


def report(tmp_path, config, *options):
    file, out = tmp_path / "config.yml", tmp_path / "report"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    result = CliRunner().invoke(cli.main, ["report", str(file), "-o", str(out), *options])
    assert result.exit_code == 0, result.output
    return result.stdout, out, json.loads((out / "report.json").read_text())


def parts(base, tasks, *, density, factors=None):
    """Task vectors and contributions, whole and in float64, by the formulas of docs."""
    n, d = len(tasks), base.numel()
    tau = torch.stack([task.double().view(-1) for task in tasks]) - base.double().view(-1)
    tau = tau if factors is None else tau * factors
    total, shares, clamped = tau.sum(0), [], []
    for row in tau:
        ordered = row.abs().sort().values
        low, high = ordered[int(d * 1e-4)], ordered[int(d * (1 - 1e-4) - 1)]
        magnitude = row.abs().clamp(low, high)
        score = torch.exp(n * ((magnitude - low) / (high - low)) ** 2) * torch.tanh(row * total)
        threshold = score.sort().values[int(d * (1 - density))]
        shares.append((score.clamp(min=threshold) - threshold) / (score.max() - threshold))
        clamped.append(magnitude * row.sign())
    shares = torch.stack(shares)
    return tau, shares * torch.stack(clamped) / shares.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("dare", [1.0, 0.5])
def test_what_is_counted(tmp_path, family, dare):
    weights = [1.0, 0.5, 2.0]
    parameters = {"density": 0.2, "lambda": 1.5, "dare_density": dare}
    config = configuration(
        family, parameters=parameters, per_model=[{"weight": w} for w in weights]
    )
    said, _, data = report(tmp_path, config)
    states = [tensors(path) for path in family]
    assert data["tasks"] == [path.name for path in family[1:]]
    assert set(data["tensors"]) == set(states[0])
    for name, found in data["tensors"].items():
        rows = [state[name] for state in states]
        count = rows[0].numel()
        factors = [dare_factors(0, t, name, count, dare) for t in range(3)]
        tau, own = parts(rows[0], rows[1:], density=0.2, factors=torch.stack(factors))
        merged = 1.5 * torch.tensor(weights)[:, None] * own
        kept = own != 0
        assert found["elements"] == count
        for task, numbers in enumerate(found["tasks"]):
            assert numbers["changed"] == int((tau[task] != 0).sum())
            assert numbers["kept"] == pytest.approx(int(kept[task].sum()), abs=1)
            norm = math.sqrt(numbers["task_vector_sq"])
            assert norm == pytest.approx(float(tau[task].norm()), rel=1e-5)
            norm = math.sqrt(numbers["merged_sq"])
            assert norm == pytest.approx(float(merged[task].norm()), rel=1e-4)
        assert math.sqrt(found["merged_sq"]) == pytest.approx(float(merged.sum(0).norm()), rel=1e-4)
        assert found["kept_by"] == pytest.approx(
            torch.bincount(kept.sum(0), minlength=4).tolist(), abs=3
        )
        for i in range(3):
            for j in range(3):
                both = int((kept[i] & kept[j]).sum())
                assert found["both"][i][j] == pytest.approx(both, abs=2)
        for signs, met, conflicts in (
            (tau.sign(), "met_before", "conflicts_before"),
            (own.sign(), "met_after", "conflicts_after"),
        ):
            up, down = (signs > 0).sum(0), (signs < 0).sum(0)
            assert found[met] == pytest.approx(int((up + down >= 2).sum()), abs=2)
            assert found[conflicts] == pytest.approx(int(((up > 0) & (down > 0)).sum()), abs=2)
    for path in family[1:]:
        assert path.name in said
    assert ("those of what DARE leaves" in said) == (dare < 1)


def test_the_tables_agree(tmp_path, family):
    _, out, data = report(tmp_path, configuration(family, parameters={"scope": "model"}))
    with (out / "tensors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(data["tensors"])
    for row in rows:
        counts = data["tensors"][row["tensor"]]
        own = counts["tasks"][data["tasks"].index(row["task"])]
        assert int(row["kept"]) == own["kept"]
        assert float(row["merged_norm"]) == pytest.approx(math.sqrt(own["merged_sq"]))
    elements = sum(counts["elements"] for counts in data["tensors"].values())
    for task in range(3):
        kept = sum(counts["tasks"][task]["kept"] for counts in data["tensors"].values())
        assert kept == pytest.approx(0.1 * elements, abs=2)  # of the whole model
    shares = {}
    for row in rows:
        shares[row["tensor"]] = shares.get(row["tensor"], 0) + float(row["share_of_merge"])
    assert all(share == pytest.approx(1) or share == 0 for share in shares.values())


def test_frozen_tensors_and_tensors_some_models_lack(tmp_path, family):
    from safetensors.torch import save_file

    states = [tensors(path) for path in family[:3]]
    for state in states[1:]:
        state["model.norm.weight"] = states[0]["model.norm.weight"]
    del states[1]["lm_head.weight"]
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")]
    for file, state in zip(files, states, strict=True):
        save_file(state, file)
    _, _, data = report(tmp_path, configuration(files))
    norm, head = (data["tensors"][name] for name in ("model.norm.weight", "lm_head.weight"))
    assert norm["unchanged"] == 1
    assert norm["kept_by"][0] == norm["elements"]
    assert head["tasks"][0] == dict.fromkeys(head["tasks"][0], 0)
    assert head["tasks"][1]["kept"] > 0


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, and that its tags close."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_stands_alone(tmp_path, family):
    config = configuration(family, parameters={"density": 0.1})
    config["models"][0]["model"] = str(family[1]) + "/"  # told apart all the same
    said, out, _ = report(tmp_path, config)
    text = (out / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.links) == 7
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "http" not in "".join(page.texts)
    assert "density: 0.1" in "".join(page.texts)
    assert "10.0 %" in said
    first = text
    report(tmp_path, config)
    assert (out / "report.html").read_text() == first  # the same merge is the same page


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.12.mlp.up_proj.weight", "12", "mlp.up_proj"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "3", "mlp.experts.N.up_proj"),
        ("lm_head.weight", "other", "lm_head"),
        ("transformer.h.0.attn.c_attn.bias", "0", "attn.c_attn.bias"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "encoder 2", "layer.N.SelfAttention.q"),
        ("vision_model.encoder.layers.1.mlp.fc1.bias", "vision 1", "mlp.fc1.bias"),
    ],
)
def test_layers_and_kinds(name, layer, kind):
    assert (layer_of(name), kind_of(name)) == (layer, kind)


def test_mistakes_end_in_a_sentence(tmp_path, family, monkeypatch):
    file = tmp_path / "config.yml"
    cases = [
        (configuration(family, method="linear"), tmp_path / "out", "it does not use pcb"),
        (configuration(family, parameters={"density": 3}), tmp_path / "out", "use density: 3"),
        (configuration([family[0], "./nowhere"]), tmp_path / "out", "cannot merge"),
        (configuration(family), file / "out", "name another folder"),
    ]
    for config, out, complaint in cases:
        file.write_text(yaml.safe_dump(config))
        result = run("mergekit-pcb", "report", file, "-o", out, check=False)
        assert result.returncode in (1, 2)
        assert "Traceback" not in result.stderr
        assert SENTENCE.search(result.stderr), result.stderr
        assert complaint in result.stderr
    file.write_text("merge_method: pcb\n---\nmerge_method: pcb\n")
    for command in ("report", "measure"):
        result = CliRunner().invoke(cli.main, [command, str(file), "-o", str(tmp_path / "out")])
        assert "it holds 2 stages, as mergekit-multi reads them" in result.output
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = CliRunner().invoke(cli.main, ["report", str(file), "-o", str(tmp_path / "out")])
    assert "pip install matplotlib" in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_counted(
    tmp_path, family, monkeypatch
):
    from mergekit_pcb.tools import report as reports

    monkeypatch.setattr(reports, "observe", lambda *_: pytest.fail("it was counted"))
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(configuration(family)))
    result = CliRunner().invoke(cli.main, ["report", str(file), "-o", str(file / "a" / "b")])
    assert f"{file} is no folder to write to" in result.output
    circle = tmp_path / "circle"
    circle.symlink_to("circle")
    result = CliRunner().invoke(cli.main, ["report", str(file), "-o", str(circle / "b")])
    assert isinstance(result.exception, SystemExit)
    assert f"cannot write {circle}/b, because" in result.output


# --- Where PCB's own merge is not all there is ---------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "share"),
    [
        ({}, None),
        ({"lambda": 0.0}, 0.0),
        ({"weight": 0.0}, 0.0),
        ({"refine": "solve"}, 1.0),
        ({"refine": "solve", "density": 0.0}, 1.0),
    ],
)
def test_what_changes_is_what_the_whole_merge_changes(tmp_path, family, parameters, share):
    """Not what the tasks keep: in matrices, the most of a model."""
    said, out, data = report(tmp_path, configuration(family, parameters=parameters))
    for name, counts in data["tensors"].items():
        kept = counts["elements"] - counts["kept_by"][0]
        if share is None:
            assert counts["changed"] == kept
        elif "proj" in name:
            assert counts["changed"] == pytest.approx(share * counts["elements"], rel=1e-2)
    counted = data["tensors"].values()
    total = sum(counts["elements"] for counts in counted)
    left = total - sum(counts["changed"] for counts in counted)
    assert f"{100 * left / total:.1f} % of all elements keep the base's value" in said
    assert ("of what the tasks keep, " in said) == (share is not None)
    page = (out / "report.html").read_text()
    assert ("Of PCB&#39;s merge, before refine." in page) == ("refine" in parameters)
    if parameters.get("density") == 0:
        assert "% of the norm of what PCB adds" not in said
        with (out / "tensors.csv").open(newline="") as rows:
            moved = {row["tensor"]: row["moved_from_pcb"] for row in csv.DictReader(rows)}
        assert moved["model.layers.0.mlp.up_proj.weight"] == ""


@pytest.mark.parametrize("spectrum", ["auto", 1, 0.2])
def test_agreement_is_the_experts_whatever_exponent_is_chosen(tmp_path, family, spectrum):
    parameters = {"refine": "solve", "spectrum": spectrum}
    _, _, data = report(tmp_path, configuration(family, parameters=parameters))
    counts = data["tensors"]["model.layers.1.mlp.up_proj.weight"]
    assert counts["agreements"] == pytest.approx(3**-0.5, abs=0.05), "they are independent"
    if spectrum == "auto":
        assert counts["exponents"] == counts["agreements"]
    else:
        assert counts["exponents"] == spectrum


def test_slices_with_models_of_their_own(tmp_path, family):
    base, *models = map(str, family)

    def piece(start, *names):
        sources = [{"model": name, "layer_range": [start, start + 2]} for name in names]
        return {"sources": sources}

    slices = [piece(0, base, models[0], models[2]), piece(2, base, models[2], models[1])]
    config = {"merge_method": "pcb", "base_model": base, "slices": slices}
    _, _, data = report(tmp_path, config)
    assert data["tasks"] == [family[number].name for number in (1, 3, 2)]
    start, *experts = [tensors(family[number]) for number in (0, 1, 3, 2)]
    for layer, there in ((0, [True, True, False]), (3, [False, True, True])):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        found = [task["task_vector_sq"] for task in data["tensors"][name]["tasks"]]
        due = [
            float((expert[name] - start[name]).double().square().sum()) * own
            for expert, own in zip(experts, there, strict=True)
        ]
        assert found == pytest.approx(due, rel=1e-5)
