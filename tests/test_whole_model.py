"""`scope: model`: all tensors of a merge ranked together, through every command and in memory."""

import pathlib

import pytest
import torch
import yaml
from checkpoints import configuration, merge, run, save_family, tensors, tiny_llama
from conftest import pieces
from mergekit.merge_methods import merge_state_dicts
from reference import pcb as reference
from safetensors import safe_open
from safetensors.torch import save_file
from test_bad_input import refused, unreadable  # noqa: F401 - a fixture

GOLDEN = sorted((pathlib.Path(__file__).parent / "golden").glob("whole_model*.safetensors"))


def whole_reference(states, names=None, **parameters):
    """The reference on all tensors flattened into one vector, cut up again."""
    names = sorted(states[0]) if names is None else names
    flat = [torch.cat([state[name].double().reshape(-1) for name in names]) for state in states]
    merged = reference(flat[0], flat[1:], **parameters)
    sizes = [states[0][name].numel() for name in names]
    parts = zip(names, merged.split(sizes), strict=True)
    return {name: part.view(states[0][name].shape) for name, part in parts}


def assert_equal_states(merged, expected, base, tolerance=1e-5):
    """Compare in the norm of each tensor's delta, storage rounding allowed for."""
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        delta = (expected[name] - base[name].double()).norm()
        rounding = torch.finfo(tensor.dtype).eps * base[name].double().norm()
        assert (tensor.double() - expected[name]).norm() <= tolerance * delta + rounding, name


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("way", ["in memory", "in another order", "mergekit-pytorch"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_equals_the_released_algorithm_on_a_whole_model(tmp_path, path, way, chunk):
    with safe_open(path, "pt") as file:
        recorded, everything = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    models = ["base", *(f"task{i}" for i in range(int(recorded["n"])))]
    names = [name.removeprefix("base.") for name in everything if name.startswith("base.")]
    if way == "in another order":
        names.reverse()
    states = {m: {n: everything[f"{m}.{n}"].double() for n in names} for m in models}
    parameters = {"scope": "model", "density": float(recorded["density"])}
    parameters |= {"clip": float(recorded["clip"]), "lambda": float(recorded["lambda"])}
    with pieces(chunk):
        if way != "mergekit-pytorch":
            merged = merge_state_dicts(states, "pcb", base="base", parameters=parameters)
        else:
            if chunk:
                pytest.skip("a process of its own")
            files = [tmp_path / f"{model}.safetensors" for model in models]
            for file, state in zip(files, states.values(), strict=True):
                save_file(state, file)
            config = configuration(files, parameters=parameters)
            merged = tensors(merge(tmp_path, config, command="mergekit-pytorch")[0])
    difference = torch.cat([(merged[n] - everything[f"merged.{n}"]).reshape(-1) for n in names])
    delta = torch.cat([(everything[f"merged.{n}"] - states["base"][n]).reshape(-1) for n in names])
    assert difference.norm() <= 1e-12 * delta.norm()
    head = [n for n in names if torch.equal(states["base"][n], states["task0"][n])]
    assert all(torch.equal(merged[n], states["base"][n]) for n in head)


@pytest.mark.parametrize(("tied", "shard_size"), [(False, "60KB"), (True, "10GB")])
def test_mergekit_yaml_equals_the_whole_vector_reference(tmp_path, tied, shard_size):
    paths = save_family(tmp_path / "models", tiny_llama(tied=tied), shard_size=shard_size)
    parameters = {"scope": "model", "density": 0.15, "lambda": 1.3}
    per_model = [{"weight": [0.5, 1.5]}, {"density": 0.3}, {}]
    out, result = merge(
        tmp_path, configuration(paths, parameters={**parameters, "weight": 1.0}, per_model=None)
    )
    assert "Warning" not in result.stderr
    states = [tensors(path) for path in paths]
    expected = whole_reference(states, density=0.15, lam=1.3)
    assert_equal_states(tensors(out), expected, states[0])
    # Densities of their own, and gradients on weight, which needs no statistics, are fine.
    out, _ = merge(tmp_path, configuration(paths, parameters=parameters, per_model=per_model))
    for name, tensor in tensors(out).items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        weight = [0.5 + layer / 3, 1.0, 1.0]
        chosen = {"density": [0.15, 0.3, 0.15], "weight": weight, "lam": 1.3}
        whole = whole_reference(states, **chosen)[name]
        assert_equal_states({name: tensor}, {name: whole}, states[0])


def test_casts_are_measured_as_they_are_merged(tmp_path):
    paths = save_family(tmp_path / "models", tiny_llama())
    config = configuration(paths, parameters={"scope": "model"}, dtype="bfloat16")
    out, _ = merge(tmp_path, config)
    states = [{n: t.bfloat16() for n, t in tensors(path).items()} for path in paths]
    merged, expected = tensors(out), whole_reference(states)
    for name, tensor in merged.items():
        assert (tensor != expected[name].bfloat16()).double().mean() < 2e-3, name


def test_slices_measure_the_layers_they_use(tmp_path, family):
    sources = [
        {"model": str(family[0]), "layer_range": [0, 2]},
        {"model": str(family[1]), "layer_range": [2, 4]},
        {"model": str(family[2]), "layer_range": [1, 3]},
    ]
    config = {
        "merge_method": "pcb",
        "base_model": str(family[0]),
        "slices": [{"sources": sources}],
        "parameters": {"scope": "model", "density": 0.2},
    }
    out, _ = merge(tmp_path, config)
    states = []
    for path, first in zip(family[:3], (0, 2, 1), strict=True):
        state = tensors(path)
        kept = {n: t for n, t in state.items() if ".layers." not in n}
        for layer in range(2):
            here, there = f"model.layers.{layer}.", f"model.layers.{layer + first}."
            kept |= {n.replace(there, here): t for n, t in state.items() if there in n}
        states.append(kept)
    assert_equal_states(tensors(out), whole_reference(states, density=0.2), states[0])


def test_pickled_checkpoints(tmp_path, family):
    files = []
    for path in family[:3]:
        files.append(tmp_path / f"{pathlib.Path(path).name}.bin")
        torch.save(tensors(path), files[-1])
    config = configuration(files, parameters={"scope": "model"})
    out, _ = merge(tmp_path, config, command="mergekit-pytorch")
    states = [tensors(path) for path in family[:3]]
    assert_equal_states(tensors(out), whole_reference(states), states[0])


def test_stages_are_measured_one_by_one(tmp_path, family):
    parameters = {"scope": "model", "density": 0.3}
    first = {**configuration(family[:3], parameters=parameters), "name": "first"}
    second = configuration([family[0], "first", family[3]], parameters=parameters)
    file = tmp_path / "multi.yml"
    file.write_text(yaml.safe_dump_all([first, second]))
    out, stages = tmp_path / "out", tmp_path / "stages"
    run("mergekit-multi", file, "-I", stages, "--out-path", out, "--no-copy-tokenizer")
    for target, paths in (
        (stages / "first", family[:3]),
        (out, [family[0], stages / "first", family[3]]),
    ):
        states = [tensors(path) for path in paths]
        assert_equal_states(tensors(target), whole_reference(states, density=0.3), states[0])


def test_bits_do_not_depend_on_shards_order_chunks_or_threads(tmp_path, family):
    parameters = {"scope": "model", "density": 0.2}
    out, _ = merge(tmp_path, configuration(family, parameters=parameters), OMP_NUM_THREADS="1")
    expected = tensors(out)
    whole = save_family(tmp_path / "unsharded", tiny_llama())
    out, _ = merge(tmp_path, configuration(whole, parameters=parameters), OMP_NUM_THREADS="2")
    in_memory = {str(p): dict(reversed(tensors(p).items())) for p in family}
    with pieces(1000):
        merged = merge_state_dicts(in_memory, "pcb", base=str(family[0]), parameters=parameters)
    for name, tensor in expected.items():
        assert torch.equal(tensors(out)[name], tensor), name
        assert torch.equal(merged[name], tensor), name


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"density": [0.1, 0.2]}, "several values of density"),
        (
            {"density": [{"filter": "mlp", "value": 0.2}, {"value": 0.1}]},
            "several values of density",
        ),
        ({"clip": [{"filter": "mlp", "value": 0.2}, {"value": 0.1}]}, "several values of clip"),
        (
            {"scope": [{"filter": "mlp", "value": "model"}, {"value": "tensor"}]},
            "some tensors within the whole model",
        ),
        ({"scope": "modle"}, "use scope: 'modle'"),
    ],
)
def test_what_would_make_the_model_ambiguous_is_refused_before_reading(
    tmp_path, family, changes, complaint
):
    parameters = {"scope": "model", **changes}
    assert complaint in refused(tmp_path, configuration(family, parameters=parameters))


@pytest.mark.usefixtures("unreadable")
def test_slices_of_different_models_are_refused(tmp_path, family):
    slices = [
        {"sources": [{"model": str(p), "layer_range": [a, a + 2]} for p in (family[0], expert)]}
        for a, expert in ((0, family[1]), (2, family[2]))
    ]
    config = {"merge_method": "pcb", "base_model": str(family[0]), "slices": slices}
    config["parameters"] = {"scope": "model"}
    assert "slices merge different models" in refused(tmp_path, config)


def test_nan_names_model_and_tensor(tmp_path):
    paths = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2)
    state = tensors(paths[2])
    state["model.norm.weight"][3] = float("nan")
    save_file(state, paths[2] / "model.safetensors", metadata={"format": "pt"})
    sentence = refused(tmp_path, configuration(paths, parameters={"scope": "model"}))
    assert f"tensor model.norm.weight; because {paths[2]} holds NaN" in sentence


def test_a_tensor_some_inputs_lack_is_named_and_merged_all_the_same(tmp_path, family):
    states = [tensors(path) for path in family[:3]]
    extra = states[1].pop("lm_head.weight")
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")]
    for file, state in zip(files, states, strict=True):
        save_file(state, file)
    config = configuration(files, parameters={"scope": "model"})
    out, result = merge(tmp_path, config, "--tensor-union", command="mergekit-pytorch")
    assert result.stderr.count("tensor lm_head.weight takes no part in the statistics") == 1
    merged, head = tensors(out), "lm_head.weight"
    names = sorted(states[1])
    expected = whole_reference(states, names)
    assert_equal_states({n: merged[n] for n in names}, expected, states[0])
    # The head has one task left, merged with the model's numbers: nothing of the other in it.
    assert not torch.equal(merged[head], states[0][head])
    assert not torch.equal(merged[head], extra)
    changed = merged[head] != states[0][head]
    tau = states[2][head] - states[0][head]
    assert torch.allclose(merged[head][changed] - states[0][head][changed], tau[changed], atol=1e-6)
