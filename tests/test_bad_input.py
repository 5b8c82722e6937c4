"""A user's mistake ends in one sentence of three beats: no traceback, nothing half-believed."""

import re

import pytest
import torch
import yaml
from checkpoints import configuration, merge, save_family, tensors, tiny_llama
from click.testing import CliRunner
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import save_file

import mergekit_pcb

SENTENCE = re.compile(r"^Error: cannot [^;]+, because [^;]+; .+\.$", re.MULTILINE)


def refused(tmp_path, config, command=mergekit_yaml, options=()):
    """Run mergekit's own command on the configuration; its one-line complaint."""
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(command, [str(file), str(tmp_path / "out"), *options])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert SENTENCE.search(result.output), result.output
    return SENTENCE.search(result.output).group()


@pytest.fixture
def unreadable(monkeypatch):
    """Fail if any tensor is read: configuration errors have to come before that."""
    from mergekit.io import LazyTensorLoader

    def get_tensor(*_args, **_options):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(LazyTensorLoader, "get_tensor", get_tensor)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("density", 1.2),
        ("density", -0.1),
        ("density", True),
        ("density", [0.1, 7]),
        ("density", [{"filter": "mlp", "value": 2}, {"value": 0.1}]),
        ("clip", 0.7),
        ("clip", 0.5),
        ("weight", "heavy"),
        ("weight", float("nan")),
        ("weight", float("inf")),
        ("lambda", "1,5"),
        ("lambda", float("nan")),
    ],
)
@pytest.mark.parametrize("per_model", [False, True])
def test_values_out_of_range(tmp_path, family, name, value, per_model):
    if per_model and name in ("clip", "lambda"):
        pytest.skip("a parameter of the whole merge")
    own = [{name: value}, {}, {}] if per_model else None
    config = configuration(family, parameters=None if per_model else {name: value}, per_model=own)
    sentence = refused(tmp_path, config)
    assert f"use {name}: " in sentence
    assert "write " in sentence


@pytest.mark.usefixtures("unreadable")
def test_no_base(tmp_path, family):
    config = configuration(family)
    del config["base_model"]
    assert "add `base_model:` to the configuration" in refused(tmp_path, config)


@pytest.mark.usefixtures("unreadable")
def test_only_the_base(tmp_path, family):
    sentence = refused(tmp_path, configuration([family[0], family[0]]))
    assert f"only the base model {family[0]} is given" in sentence


@pytest.mark.usefixtures("unreadable")
def test_a_model_twice(tmp_path, family):
    sentence = refused(tmp_path, configuration([*family, family[1]]))
    assert f"merge {family[1]} twice" in sentence


@pytest.mark.usefixtures("unreadable")
def test_the_raw_command_refuses_the_same(tmp_path, family):
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, file in zip(family, files, strict=False):
        save_file(tensors(path), file)
    twice = configuration([*files, files[1]])
    assert f"merge {files[1]} twice" in refused(tmp_path, twice, mergekit_pytorch)
    steep = configuration(files, parameters={"density": 1.2})
    assert "use density: 1.2" in refused(tmp_path, steep, mergekit_pytorch)
    no_base = configuration(files)
    del no_base["base_model"]
    assert "add `base_model:`" in refused(tmp_path, no_base, mergekit_pytorch)


def test_shapes_that_differ_name_both_models(tmp_path, family):
    other = save_family(tmp_path / "other", tiny_llama(vocabulary=70), tasks=0)[0]
    sentence = refused(tmp_path, configuration([*family[:2], other]))
    assert f"(64, 32) in {family[0]} but (70, 32) in {other}" in sentence
    assert "tokenizer: {source: base}" in sentence


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 2])
def test_nan_and_infinity_name_model_and_tensor(tmp_path, poison, where):
    model = tiny_llama(layers=1)
    paths = save_family(tmp_path / "models", model, tasks=2)
    state = tensors(paths[where])
    state["model.layers.0.mlp.up_proj.weight"][3, 4] = poison
    save_file(state, paths[where] / "model.safetensors", metadata={"format": "pt"})
    sentence = refused(tmp_path, configuration(paths))
    assert f"{paths[where]} holds NaN or infinity" in sentence
    assert "model.layers.0.mlp.up_proj.weight" in sentence
    assert not list((tmp_path / "out").glob("*.safetensors"))


def in_memory(**changes):
    torch.manual_seed(0)
    given = {"base_index": 0, "name": "w", "ids": ["base", "a", "b"], **changes}
    return merge_tensors(list(torch.randn(3, 4, 4)), "pcb", **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_index": None}, r"no.* base model, and none is given|none is given"),
        ({"parameters": {"density": [0.1, 1.5]}}, r"use density: 1.5, because"),
        ({"parameters": {"weight": {"a": 1.0, "b": None}}}, r"use weight: None, because"),
    ],
)
def test_in_memory_mistakes_are_value_errors(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        in_memory(**changes)
    assert isinstance(raised.value, mergekit_pcb.PCBError)


def test_in_memory_shapes_and_integers():
    with pytest.raises(
        mergekit_pcb.PCBError, match=r"w, because it has shape \(2,\) in 0 but \(3,\)"
    ):
        merge_tensors([torch.ones(2), torch.ones(3)], "pcb", base_index=0, name="w")
    with pytest.raises(mergekit_pcb.PCBError, match=r"it holds torch.int64, and task vectors need"):
        merge_tensors([torch.arange(2), torch.arange(2)], "pcb", base_index=0, name="w")
    with pytest.raises(mergekit_pcb.PCBError, match="only the base model 0 is given"):
        merge_state_dicts([{"w": torch.ones(2)}], "pcb", base=0)


def test_an_error_survives_the_way_between_processes():
    import pickle

    error = mergekit_pcb.PCBError("a", "b", "c")
    assert str(pickle.loads(pickle.dumps(error))) == "cannot a, because b; c."


def test_own_command_refuses_a_directory_in_use(tmp_path):
    from mergekit_pcb.tools.cli import main

    (tmp_path / "mine.txt").write_text("mine")
    result = CliRunner().invoke(main, ["demo", str(tmp_path)])
    assert result.exit_code == 1
    assert SENTENCE.search(result.output)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-pytorch"])
def test_parameters_that_mergekit_would_ignore_in_silence_are_warned_of(tmp_path, family, command):
    per_model = [{"wieght": 1.0}, {"lambda": 2.0}, {}]
    paths = family
    if command == "mergekit-pytorch":
        paths = [tmp_path / f"{path.name}.safetensors" for path in family]
        for path, source in zip(paths, family, strict=True):
            save_file(tensors(source), path)
    config = configuration(paths, parameters={"desnity": 0.3}, per_model=per_model)
    _, result = merge(tmp_path, config, command=command)
    for said in (
        f"{paths[1]}: unknown parameter wieght; did you mean weight?",
        f"{paths[2]}: lambda is ignored here; write it at the top level",
        "unknown parameter desnity; did you mean density?",
    ):
        assert result.stderr.count(said) == 1, result.stderr
    _, result = merge(tmp_path / "sound", configuration(paths), command=command)
    assert "ignored" not in result.stderr
    assert "unknown parameter" not in result.stderr
