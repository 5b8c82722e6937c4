"""`mergekit-pcb check`: mistakes found before anything is read at length."""

import json
import re
import shutil

import pytest
import torch
import yaml
from checkpoints import configuration, run, save_family, tensors, tiny_llama
from click.testing import CliRunner
from conftest import ROOT
from families import save
from mergekit.options import MergeOptions
from safetensors.torch import save_file

from mergekit_pcb.host.configuration import named_models
from mergekit_pcb.tools import check as checking
from mergekit_pcb.tools import check_base, cli


def check(tmp_path, config, *options):
    """Exit status and findings, as (level, where, what), and the outlook."""
    file = tmp_path / "config.yml"
    file.write_text(config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False))
    result = CliRunner().invoke(cli.main, ["check", str(file), "--json", *options])
    assert result.exit_code in (0, 1), result.output
    report = json.loads(result.stdout)
    found = [(f["level"], f["where"], f["what"]) for f in report["findings"]]
    assert (result.exit_code == 1) == any(level == "error" for level, _, _ in found)
    assert (report["outlook"] is None) <= (result.exit_code == 1 or "---" in file.read_text())
    return found, report["outlook"]


def errors(tmp_path, config):
    found, outlook = check(tmp_path, config)
    assert outlook is None
    return [f"{where}: {what}" for level, where, what in found if level == "error"]


def test_a_sound_configuration(tmp_path, family):
    config = configuration(family, parameters={"density": 0.2}, dtype="float32")
    found, outlook = check(tmp_path, {**config, "out_dtype": "bfloat16"})
    states = [tensors(path) for path in family]
    size = sum(tensor.nbytes for tensor in states[0].values())
    assert found == []
    largest = max(states[0], key=lambda name: (states[0][name].numel(), name == outlook["largest"]))
    assert outlook.pop("peak_bytes") > 5 * states[0][largest].nbytes
    assert outlook == {
        "scope": "tensor",
        "tasks": 3,
        "kept": {
            str(path): {"density": [0.2, 0.2], "dare_density": [1.0, 1.0]} for path in family[1:]
        },
        "tensors": len(states[0]),
        "elements": size // 4,
        "input_bytes": 4 * size,
        "reads": 1,
        "output_bytes": size // 2,
        "largest": largest,
        "refined": 0,
        "refined_flops": 0,
        "refined_seconds": 0.0,
    }


def test_the_masks_of_dare_are_part_of_the_peak(tmp_path, family):
    peaks = [
        check(tmp_path, configuration(family, parameters={"dare_density": share}))[1]["peak_bytes"]
        for share in (1.0, 0.5)
    ]
    largest = max(tensor.numel() for tensor in tensors(family[0]).values())
    assert peaks[1] - peaks[0] == 3 * -(-largest // 8)


def test_in_words(tmp_path, family):
    file = tmp_path / "config.yml"
    config = configuration(family, parameters={"scope": "model"})
    file.write_text(yaml.safe_dump(config))
    result = run("mergekit-pcb", "check", file)
    first, second, kept, third, fourth = result.stdout.splitlines()
    assert first == "no mistakes found"
    assert "3 tasks, scope: model" in second
    assert kept == "each task keeps 10 % of its elements"
    assert "of checkpoints 3 times, 2 of them to measure; writes " in third
    there = CliRunner().invoke(cli.main, ["check", str(file), "--device", "cuda"]).output
    assert "of checkpoints up to 5 times, 4 of them to measure; writes " in there
    assert re.fullmatch(
        r"the largest tensor, model\.layers\.\d\.mlp.*, takes \d+kB to merge", fourth
    )


def test_what_is_kept_is_told_of_each_task_where_they_differ(tmp_path, family):
    file = tmp_path / "config.yml"
    per_model = [{"dare_density": 0.4}, {}, {"density": [0.1, 0.3]}]
    file.write_text(yaml.safe_dump(configuration(family, per_model=per_model)))
    said = run("mergekit-pcb", "check", file).stdout.splitlines()
    assert said[2:5] == [
        f"{family[1]} keeps 10 % of its elements, chosen among the 40 % that DARE leaves at random",
        f"{family[2]} keeps 10 % of its elements",
        f"{family[3]} keeps 10 to 30 % of its elements",
    ]


@pytest.mark.parametrize(
    ("place", "change", "complaint"),
    [
        ("parameters", {"desnity": 0.1}, "parameters: unknown parameter desnity; did you mean den"),
        ("parameters", {"lamda": 1}, "parameters: unknown parameter lamda; did you mean lambda?"),
        ("parameters", {"Density": 1}, "unknown parameter Density; did you mean density?"),
        ("parameters", {"normalize": True}, "unknown parameter normalize; pcb knows density, "),
        ("parameters", {"density": 1.2}, "parameters.density: cannot use density: 1.2"),
        ("parameters", {"clip": [{"filter": "mlp", "value": 0.7}]}, "cannot use clip: 0.7"),
        ("parameters", {"scope": "whole"}, "write tensor or model"),
        ("model", {"parameters": {"lambda": 2}}, "lambda is ignored here; write it at the top"),
        ("model", {"parameters": {"seed": 2}}, "seed is ignored here"),
        ("model", {"parameters": {"weight": [1, "x"]}}, "cannot use weight: 'x'"),
        ("model", {"weight": 2}, "weight stands beside `parameters:` and is ignored"),
        ("model", {"paramters": {}}, "mergekit ignores paramters; did you mean parameters?"),
        ("model", {"parameters": [1]}, "parameters: it is no mapping"),
        ("top", {"density": 0.2}, "top level: density stands beside `parameters:`"),
        ("top", {"dtyp": "float32"}, "top level: mergekit ignores dtyp; did you mean dtype?"),
        ("top", {"merge_method": "ties"}, "ties is not what this command checks"),
        ("top", {"base_model": "./nowhere"}, "base_model: there is no ./nowhere"),
        ("top", {"base_model": "~/m"}, "base_model: mergekit does not know ~; write the whole"),
        ("top", {"base_model": {"model": {"path": "./a"}}}, "base_model: there is no ./a"),
        ("top", {"chat_template": "llama-3"}, "mergekit has no llama-3; did you mean llama3?"),
        ("top", {"chat_template": "{{ short }}"}, "mergekit has no {{ short }}"),
        ("model", {"model": "./nowhere"}, "models[1]: there is no ./nowhere"),
        (
            "top",
            {"base_model": None},
            "because task vectors are differences from a base model, and none",
        ),
        ("top", {"dtype": "float31"}, "dtype: float31, because mergekit knows no such dtype"),
        (
            "top",
            {"out_dtype": "int8"},
            "cannot use out_dtype: int8, because mergekit knows no such dtype",
        ),
        ("top", {"dtype": 16}, "cannot use dtype: 16, because mergekit knows no such dtype"),
    ],
)
def test_mistakes(tmp_path, family, place, change, complaint):
    config = configuration(family, parameters={})
    target = {"top": config, "model": config["models"][1], "parameters": config["parameters"]}
    target[place].update(change)
    (found,) = errors(tmp_path, config)
    assert complaint in found
    if place == "model" and "model" not in change:
        assert f"models[1] ({family[2]})" in found


@pytest.mark.parametrize(
    "text", ["a: [", "", "- 1\n- 2", "merge_method: pcb\nmodels: 3", "- 1\n---\n- 2"]
)
def test_what_is_no_configuration(tmp_path, text):
    assert errors(tmp_path, text)


def test_an_unknown_option_names_the_command(tmp_path, family):
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(configuration(family)))
    result = run("mergekit-pcb", "check", file, "--bogus", check=False)
    assert result.returncode == 2
    assert "mergekit-pcb check" in result.stderr
    assert "mergekit-pcb measure" not in result.stderr


def test_every_mistake_is_found_at_once(tmp_path, family):
    config = configuration(family, parameters={"densty": 1, "lambda": "x"}, dtyp="float32")
    config["models"][0]["wieght"] = 1
    assert len(errors(tmp_path, config)) == 4


def test_slices_are_looked_into(tmp_path, family):
    sources = [{"model": str(p), "layer_range": [0, 2]} for p in family[:2]]
    sources[1]["parameters"] = {"wheight": 1}
    slices = [{"sources": sources, "paramters": {}}]
    config = {"merge_method": "pcb", "base_model": str(family[0]), "slices": slices}
    first, second = errors(tmp_path, config)
    assert first.startswith("slices[0]: mergekit ignores paramters")
    assert f"slices[0].sources[1] ({family[1]}).parameters: unknown parameter wheight" in second


def test_shapes_and_missing_tensors(tmp_path, family):
    wider = save_family(tmp_path / "wider", tiny_llama(vocabulary=70), tasks=0)[0]
    found = errors(tmp_path, configuration([*family[:2], wider]))
    assert len(found) == 2
    assert f"(64, 32) in {family[0]} but (70, 32) in {wider}" in found[0]
    shallow = save_family(tmp_path / "shallow", tiny_llama(layers=2), tasks=0)[0]
    (sentence,) = errors(tmp_path, configuration([*family[:2], shallow]))
    assert "model.layers.3" in sentence or "layers" in sentence


def test_warnings(tmp_path, family):
    density = [{"filter": "mlp", "value": 0.3}, {"filter": "mlpp", "value": 0.2}, {"value": 0.1}]
    parameters = {"density": density, "dare_density": 0.2}
    config = configuration(family, parameters=parameters, dtype="bfloat16")
    config["models"].append({"model": str(family[0]), "parameters": {"weight": 2}})
    found, outlook = check(tmp_path, config)
    assert outlook
    assert {level for level, _, _ in found} == {"warning"}
    said = "\n".join(f"{where}: {what}" for _, where, what in found)
    assert "parameters of the base model do nothing" in said
    assert "parameters.density: the filter 'mlpp' matches no tensor" in said
    assert said.count("keeps no more of") == 3
    assert said.count("bfloat16 rounds the float32 values of") == 1
    assert "and 3 more before they are subtracted" in said


def test_bfloat16_checkpoints_are_not_rounded_by_bfloat16(tmp_path):
    paths = save_family(tmp_path / "models", tiny_llama(layers=1, dtype=torch.bfloat16), tasks=1)
    assert check(tmp_path, configuration(paths, dtype="bfloat16"))[0] == []


def test_statistics_that_do_not_fit(tmp_path, family):
    config = configuration(family, parameters={"scope": "model"})
    file, statistics = tmp_path / "c.yml", tmp_path / "statistics.json"
    file.write_text(yaml.safe_dump(config))
    run("mergekit-pcb", "measure", file, "-o", statistics)
    config["parameters"]["statistics"] = str(statistics)
    found, outlook = check(tmp_path, config)
    assert found == []
    assert outlook["reads"] == 1
    config["parameters"]["density"] = 0.3
    (sentence,) = errors(tmp_path, config)
    assert "was measured with density 0.1" in sentence


def test_what_mergekit_leaves_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("models", "ViT classifier", ["base", "code", "math"])
    text = (ROOT / "examples" / "yaml" / "classifiers.yml").read_text()
    found, outlook = check(tmp_path, text)
    assert outlook["tensors"] == 8
    assert any("leaves 32 tensors of ./models/base out" in what for _, _, what in found)


def test_files_for_mergekit_pytorch(tmp_path, family):
    states = [tensors(path) for path in family[:3]]
    for state in states:
        state["steps"] = torch.tensor([1, 2])
    files = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for file, state in zip(files, states, strict=True):
        save_file(state, file)
    found, outlook = check(tmp_path, configuration(files))
    assert found == []
    assert outlook["tensors"] == len(states[0])
    states[2]["steps"] = torch.tensor([1, 3])
    del states[2]["lm_head.weight"]
    save_file(states[2], files[2])
    file = tmp_path / "fresh.yml"
    file.write_text(yaml.safe_dump(configuration(files)))
    result = run("mergekit-pcb", "check", file, check=False)
    assert result.returncode == 1
    assert (
        "error: steps: cannot merge tensor steps, because it holds other numbers" in result.stdout
    )
    assert f"warning: tensors: not every model has lm_head.weight ({files[2]})" in result.stdout


@pytest.mark.parametrize("example", ["stages", "first-merge", "dare", "whole-model", "ia3"])
def test_the_examples_texts_are_sound(tmp_path, monkeypatch, example):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "examples" / "yaml" / f"{example}.yml").read_text()
    found, outlook = check(tmp_path, text)
    assert outlook is None
    assert found
    assert all(what.startswith("there is no ./") for _, _, what in found)


@pytest.mark.usefixtures("as_given")
def test_the_peak_is_about_what_a_merge_takes(monkeypatch):
    from test_determinism import peak_bytes
    from test_properties import merge, models

    from mergekit_pcb.core import fused, vectors
    from mergekit_pcb.core.vectors import chunk_elements, scratch_chunks

    scratch = 4 * scratch_chunks(3) * chunk_elements(torch.device("cpu"))
    given = models(3, (1024, 2048), dtype=torch.float32)
    peak_bytes(lambda: merge(given))
    needed = peak_bytes(lambda: merge(given)) - given[0].nbytes
    # The scratch of this thread is warm, so what is left is what ranks hold.
    assert needed <= scratch
    vectors._thread.__dict__.clear()
    monkeypatch.setenv(fused.SWITCH, "0")
    needed = peak_bytes(lambda: merge(given)) - given[0].nbytes
    # By torch's operations, it is mostly that.
    assert 0.5 <= needed / scratch <= 1.4


# --- A base that is not the base --------------------------------------------------------------


def trained(model, kind, steps, *, rate=3e-3):
    """Train on sequences of one kind: each token follows from the one before it."""
    generator = torch.Generator().manual_seed(kind)
    successor = torch.randperm(64, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        tokens = [torch.randint(64, (16,), generator=generator)]
        while len(tokens) < 12:
            tokens.append(successor[tokens[-1]])
        batch = torch.stack(tokens, 1)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def lineage(tmp_path_factory):
    """A pretrained model, its instruct version, and two experts of each."""
    import copy

    directory = tmp_path_factory.mktemp("lineage")
    pretrained = trained(tiny_llama(layers=2), 0, 60)
    instruct = trained(copy.deepcopy(pretrained), 1, 60)
    models = {"pretrained": pretrained, "instruct": instruct}
    for parent in ("pretrained", "instruct"):
        for kind in (2, 3):
            made = trained(copy.deepcopy(models[parent]), kind, 10, rate=5e-4)
            models[f"expert-{kind}-of-{parent}"] = made
    for name, model in models.items():
        model.save_pretrained(directory / name)
    return directory


@pytest.mark.parametrize(
    ("base", "experts", "warned"),
    [
        ("pretrained", "pretrained", False),
        ("instruct", "instruct", False),
        ("pretrained", "instruct", True),
        ("instruct", "pretrained", True),
    ],
)
def test_experts_of_another_model_than_the_base(tmp_path, lineage, base, experts, warned):
    names = [base, f"expert-2-of-{experts}", f"expert-3-of-{experts}"]
    found, _ = check(tmp_path, configuration([lineage / name for name in names]))
    said = [what for _, where, what in found if where == "base_model"]
    assert bool(said) == warned, said
    if warned:
        assert all(f"{lineage / name}" in said[0] for name in names)
        assert "point the same way (cosines from 0.9" in said[0]


def test_one_expert_of_another_model_is_not_hidden_by_the_others(tmp_path, lineage):
    names = ["pretrained", "expert-2-of-pretrained", "expert-2-of-instruct", "expert-3-of-instruct"]
    found, _ = check(tmp_path, configuration([lineage / name for name in names]))
    (said,) = [what for _, _, what in found if "point the same way" in what]
    changes = said.split(" point")[0]
    assert "expert-2-of-pretrained" not in changes
    assert "expert-2-of-instruct" in changes
    assert "expert-3-of-instruct" in changes


def test_a_model_of_another_kind_lies_far(tmp_path, lineage):
    torch.manual_seed(9)
    stranger = tiny_llama(layers=2)
    state = {name: torch.randn_like(t) * t.std() for name, t in stranger.state_dict().items()}
    stranger.load_state_dict(state)
    stranger.save_pretrained(tmp_path / "stranger")
    models = [lineage / "pretrained", lineage / "expert-2-of-pretrained", tmp_path / "stranger"]
    found, _ = check(tmp_path, configuration(models))
    (said,) = [what for _, where, what in found if where == "base_model"]
    assert said.startswith(f"{tmp_path / 'stranger'} lies as far from {lineage / 'pretrained'}")


def test_the_look_at_values_is_bounded(tmp_path, family, monkeypatch):
    from mergekit_pcb.tools import check_base

    looked_at = []
    products = check_base._products

    def counted(tensors):
        def seen():
            for tensor in tensors:
                looked_at.append(sum(t.nbytes for t in (tensor.base, *tensor.tasks)))
                yield tensor

        return products(seen())

    monkeypatch.setattr(check_base, "_products", counted)
    check(tmp_path, configuration(family))
    assert len(looked_at) == check_base.TENSORS
    monkeypatch.setattr(check_base, "BUDGET", 8 * max(looked_at) - 8)
    largest = max(looked_at)
    looked_at.clear()
    check(tmp_path, configuration(family))
    assert looked_at
    assert max(looked_at) < largest


# --- What real configurations hold --------------------------------------------------------------


def said_of(tmp_path, document, *options):
    """What check prints of a document, a text or a mapping."""
    file = tmp_path / "c.yml"
    file.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    result = CliRunner().invoke(cli.main, ["check", str(file), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def test_a_base_of_large_matrices_is_looked_at(tmp_path, monkeypatch):
    """As of a model of seven billion: none as small as an eighth of what may be read."""
    other = save_family(tmp_path / "other", tiny_llama(layers=2), tasks=0)[0]
    model = tiny_llama(layers=2)
    for tensor in model.state_dict().values():
        tensor.normal_(0, 0.1)
    paths = save_family(tmp_path / "models", model, tasks=2)
    config = configuration([other, *paths[1:]])
    for budget, expected in ((60_000, "point the same way"), (5_000, "was not looked at")):
        monkeypatch.setattr(check_base, "BUDGET", budget)
        assert expected in said_of(tmp_path, config)


@pytest.mark.parametrize(
    ("own", "dtype", "wide"),
    [
        (torch.float16, "bfloat16", "float32"),
        (torch.float32, "float16", "float32"),
        (torch.float64, "float32", "float64"),
        (torch.bfloat16, "float16", None),
        (torch.float16, "float32", None),
    ],
)
def test_precision_is_counted_in_digits_and_not_in_bytes(tmp_path, own, dtype, wide):
    paths = save_family(tmp_path / "models", tiny_llama(layers=1, dtype=own), tasks=2)
    said = said_of(tmp_path, configuration(paths, dtype=dtype))
    if wide is None:
        assert "rounds" not in said
    else:
        assert f"{dtype} rounds the {str(own).removeprefix('torch.')} values of" in said
        assert f"set dtype: {wide} and out_dtype: {dtype}" in said


def test_what_the_host_raises_of_its_own_kinds_is_a_sentence(tmp_path, family, monkeypatch):
    models = [{"model": str(path)} for path in family[1:]]
    module = {"modules": {"decoder": {"models": models}}, "base_model": str(family[0])}
    said = said_of(tmp_path, {"merge_method": "pcb", **module})
    assert "error: plan: cannot plan this merge, because mergekit finds no 'decoder' in" in said
    bad = tmp_path / "bad"
    shutil.copytree(family[0], bad)
    document = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**document, "num_hidden_layers": None}))
    said = said_of(tmp_path, configuration([bad, *family[1:]]))
    assert "error: plan: mergekit cannot plan it: " in said
    # A defect of this package's own is no user's mistake, and keeps its traceback.
    monkeypatch.setattr(check_base, "remarks", lambda *_: {}["ours"])
    with pytest.raises(KeyError):
        checking.check(yaml.safe_dump(configuration(family)), MergeOptions())


STAGES = """
name: technical
merge_method: pcb
base_model: BASE
models:
  - model: ONE
---
name: last
merge_method: METHOD
base_model: BASE
models:
  - model: OTHER
"""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"OTHER": "technical"}, "no mistakes found"),
        ({"OTHER": "tehcnical"}, "tehcnical is no stage; did you mean technical?"),
        ({"OTHER": "technica-l"}, "warning: stage last: models: technica-l is no stage; did you"),
        ({"OTHER": "tech", "technical": "technical-tech"}, "no mistakes found"),
        ({"OTHER": "./nowhere"}, "error: stage last: models[0]: there is no ./nowhere"),
        ({"OTHER": "technical", "METHOD": "tise"}, "mergekit knows no tise; did you mean ties?"),
        ({"OTHER": "technical", "pcb": "linear", "METHOD": "ties"}, "no stage of it uses pcb"),
    ],
)
def test_mistakes_in_stages(tmp_path, family, changes, expected):
    text = STAGES
    for old, new in {"METHOD": "pcb", "BASE": family[0], "ONE": family[1], **changes}.items():
        text = text.replace(old, str(new))
    assert expected in said_of(tmp_path, text)


def test_one_stage_may_have_a_name(tmp_path, family):
    assert "no mistakes found" in said_of(tmp_path, {"name": "one", **configuration(family)})


def test_anchors_are_no_mistakes(tmp_path, family):
    text = f"""
x-common: &common {{density: 0.1, weight: 1.0}}
merge_method: pcb
base_model: {family[0]}
models:
  - model: {family[1]}
    parameters: &own
      <<: *common
      density: 0.2
  - model: {family[2]}
parameters:
  <<: *own
"""
    assert "no mistakes found" in said_of(tmp_path, text)
    twice = text.replace("density: 0.2", "density: 0.2\n      density: 0.3")
    assert "density stands twice" in said_of(tmp_path, twice)


def test_misspelt_names_of_the_tokenizer(tmp_path, family):
    tokenizer = {"sorce": "base", "tokens": {"w1": {"sourc": "base", "force": True}}}
    said = said_of(tmp_path, configuration(family, tokenizer=tokenizer))
    assert "error: tokenizer: mergekit ignores sorce; did you mean source?" in said
    assert "error: tokenizer.tokens.w1: mergekit ignores sourc; did you mean source?" in said


@pytest.fixture
def unlike_files(tmp_path, family):
    """A base and two models as single files; the last one lacks the head."""
    files = [tmp_path / f"{path.name}.safetensors" for path in family[:3]]
    for path, file in zip(family, files, strict=False):
        state = tensors(path)
        if file is files[2]:
            del state["lm_head.weight"]
        save_file(state, file)
    return files


def test_a_tensor_that_one_file_lacks(tmp_path, unlike_files):
    said = said_of(tmp_path, configuration(unlike_files))
    assert "not every model has lm_head.weight" in said
    assert "mergekit-pytorch refuses that without --tensor-union or --tensor-intersection" in said


def test_options_before_the_file_are_told(tmp_path):
    result = CliRunner().invoke(cli.main, ["check", "--cuda", str(tmp_path / "c.yml")])
    assert result.exit_code == 2
    assert "write the file before mergekit's options, --cuda among them" in result.output


def test_paths_as_mergekit_reads_them(tmp_path, family):
    """Revisions and mappings for folders; names of files as they stand."""
    base, *models = map(str, family)
    config = configuration(family)
    config["base_model"] = {"model": {"path": base, "revision": None}}
    config["models"][1]["model"] = f"{models[1]}@main"
    found, outlook = check(tmp_path, {**config, "chat_template": "chatml"})
    assert found == []
    assert outlook["tasks"] == 3
    assert named_models(config) == [base, *models]
    for sign in "+@":
        folder = tmp_path / f"a{sign}b"
        folder.mkdir()
        files = [folder / f"{number}.safetensors" for number in range(3)]
        for path, file in zip(family, files, strict=False):
            save_file(tensors(path), file)
        (said,) = errors(tmp_path, configuration(files))
        assert "mergekit-pytorch 0.1.5 loses files with @ or + in their paths" in said


def test_options_of_mergekit_pytorch(tmp_path, family, unlike_files):
    config, whole = configuration(unlike_files), len(tensors(family[0]))
    found, outlook = check(tmp_path, config, "--tensor-union")
    assert "--tensor-union" not in found[0][2]
    assert outlook["tensors"] == whole
    found, outlook = check(tmp_path, config, "--tensor-intersection")
    assert "mergekit leaves 1 tensors" in found[0][2]
    assert len(found) == 1
    assert outlook["tensors"] == whole - 1
    found, _ = check(tmp_path, configuration(family), "--tensor-union")
    assert "cannot take --tensor-union, because it is mergekit-pytorch's" in found[0][2]


def test_adapters_are_named_after_their_base(tmp_path, family):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (said,) = errors(tmp_path, configuration([*family[:2], adapter]))
    assert "because it is an adapter and no model; name it after its base: BASE+ADAPTER" in said
    (said,) = errors(tmp_path, configuration([*family[:2], f"{family[0]}+{adapter}"]))
    assert "give --lora-merge-cache DIR" in said


def test_slices_without_sources(tmp_path, family):
    config = {"merge_method": "pcb", "base_model": str(family[0]), "slices": [{"sources": []}]}
    (said,) = errors(tmp_path, config)
    assert "slices[0]: it has no sources" in said


@pytest.mark.parametrize(
    "options", [["--out-shard-size", "5GB"], ["--random-seed", "-1"], ["-j", "0"]]
)
def test_values_of_options_that_mergekit_refuses(tmp_path, family, options):
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(configuration(family)))
    result = CliRunner().invoke(cli.main, ["check", str(file), *options])
    assert result.exit_code == 1
    assert "cannot take mergekit's options, because" in result.output
