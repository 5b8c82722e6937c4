"""`scope: model`: all tensors of a merge ranked together, through every command and in memory."""

import json
import os
import pathlib
import re
import threading

import pytest
import torch
import yaml
from checkpoints import configuration, merge, run, save_family, tensors, tiny_llama
from click.testing import CliRunner
from conftest import pieces
from mergekit.merge_methods import merge_state_dicts
from reference import pcb as reference
from safetensors import safe_open
from safetensors.torch import save_file
from test_bad_input import refused, unreadable  # noqa: F401 - a fixture

from mergekit_pcb.tools import cli

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
        rounding = torch.finfo(tensor.dtype).eps * expected[name].double().norm()
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
    assert "warning" not in result.stderr.lower()
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


def test_a_configuration_may_come_through_a_pipe(tmp_path, family):
    """As `<(envsubst < pcb.yml)`: it can be read once."""
    pipe, out = tmp_path / "pipe", tmp_path / "s.json"
    os.mkfifo(pipe)
    text = yaml.safe_dump(configuration(family, parameters={"scope": "model"}))
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    result = CliRunner().invoke(cli.main, ["measure", str(pipe), "-o", str(out), "--quiet"])
    writer.join(10)
    assert result.exit_code == 0, result.output
    assert out.exists()


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


def test_bits_do_not_depend_on_shards_order_chunks_or_threads(tmp_path):
    parameters = {"scope": "model", "density": 0.2}
    # Large enough for a second thread.
    model = tiny_llama(hidden=128, vocabulary=1024, layers=1)
    family = save_family(tmp_path / "sharded", model, shard_size="200KB")
    out, _ = merge(tmp_path, configuration(family, parameters=parameters), OMP_NUM_THREADS="1")
    expected = tensors(out)
    whole = save_family(tmp_path / "unsharded", model)
    out, _ = merge(tmp_path, configuration(whole, parameters=parameters), OMP_NUM_THREADS="2")
    in_memory = {str(p): dict(reversed(tensors(p).items())) for p in family}
    with pieces(1000):
        merged = merge_state_dicts(in_memory, "pcb", base=str(family[0]), parameters=parameters)
    for name, tensor in expected.items():
        assert torch.equal(tensors(out)[name], tensor), name
        assert torch.equal(merged[name], tensor), name


def with_tokenizer(path, words):
    """Give a checkpoint a tokenizer that knows these words, in this order."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0]).save_pretrained(path)


@pytest.mark.parametrize("source", ["union", "base"])
def test_vocabularies_are_aligned_before_measuring(tmp_path, source):
    words = [f"w{i}" for i in range(64)]
    other = [*words[:40], "new", *words[41:], "more"]
    paths = save_family(tmp_path / "models", tiny_llama(), tasks=1)
    paths += save_family(tmp_path / "wider", tiny_llama(vocabulary=65), tasks=1)[1:]
    for path, vocabulary in zip(paths, (words, words, other), strict=True):
        with_tokenizer(path, vocabulary)
    config = configuration(paths, parameters={"scope": "model"}, tokenizer={"source": source})
    merged = tensors(merge(tmp_path, config)[0])
    states = [tensors(path) for path in paths]
    order = sorted(set(words + other)) if source == "union" else words
    embedding = "model.embed_tokens.weight"
    if source == "union":  # mergekit's own order of tokens: read off what it wrote
        from transformers import AutoTokenizer

        vocabulary = AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
        order = sorted(vocabulary, key=vocabulary.get)
    for name in (embedding, "lm_head.weight"):
        by_word = [
            dict(zip(v, s[name], strict=True))
            for v, s in zip((words, words, other), states, strict=True)
        ]
        for state, rows in zip(states, by_word, strict=True):
            # A token that a model lacks gets the base's row, or that of the one model with it.
            donors = [rows, by_word[0], by_word[2]]
            picked = [next(d[word] for d in donors if word in d) for word in order]
            state[name] = torch.stack(picked)
    assert_equal_states(merged, whole_reference(states), states[0])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_adapters_are_merged_into_their_base_before_measuring(tmp_path):
    import peft

    paths = save_family(tmp_path / "models", tiny_llama(), tasks=0)
    adapters = []
    for seed in range(2):
        model = tiny_llama()
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        torch.manual_seed(seed)
        adapters.append(tmp_path / f"lora{seed}")
        peft.get_peft_model(model, config).save_pretrained(adapters[-1])
    names = [paths[0], *(f"{paths[0]}+{adapter}" for adapter in adapters)]
    parameters = {"scope": "model", "density": 0.3}
    cache = tmp_path / "cache"
    config = configuration(names, parameters=parameters)
    merged = tensors(merge(tmp_path, config, "--lora-merge-cache", cache)[0])
    base = tensors(paths[0])
    states = [base, *(tensors(path) for path in sorted(cache.iterdir()))]
    assert len(states) == 3
    # The cache is named by hashes, so either order; tasks may be swapped without a difference.
    assert_equal_states(merged, whole_reference(states, density=0.3), base)
    untouched = [name for name in base if "q_proj" not in name and "up_proj" not in name]
    assert all(torch.equal(merged[name], base[name]) for name in untouched)


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
        ({"statistics": [{"filter": "mlp", "value": "a.json"}]}, "use several statistics"),
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
    assert f"tensor model.norm.weight, because {paths[2]} holds NaN" in sentence


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
    delta, tau = merged[head] - states[0][head], states[2][head] - states[0][head]
    assert (delta * tau >= 0).all()
    assert (delta.abs() <= tau.abs() + 1e-6).all()


@pytest.fixture
def measured(tmp_path, family):
    """A measured document and the configuration it was measured for."""
    config = configuration(family, parameters={"scope": "model", "density": 0.2})
    file, statistics = tmp_path / "measured.yml", tmp_path / "statistics.json"
    file.write_text(yaml.safe_dump(config))
    result = run("mergekit-pcb", "measure", file, "-o", statistics)
    assert "2 reads of each checkpoint" in result.stdout
    assert "Measuring" not in result.stderr  # no bar in a pipe
    return statistics, config


@pytest.mark.slow
def test_a_sweep_over_measured_statistics_gives_the_bits_of_merges_that_measure(
    tmp_path, family, measured
):
    statistics, config = measured
    document = json.loads(statistics.read_text())
    states = [tensors(path) for path in family]
    assert document["tensors"] == len(states[0])
    assert document["elements"] == sum(tensor.numel() for tensor in states[0].values())
    assert [task["model"] for task in document["tasks"]] == [str(path) for path in family[1:]]
    for scale in (0.5, 1.5):
        parameters = {**config["parameters"], "lambda": scale, "weight": [0.5, 1.5]}
        own, _ = merge(tmp_path / "own", {**config, "parameters": parameters})
        reused = {**parameters, "statistics": str(statistics)}
        out, result = merge(tmp_path / "reused", {**config, "parameters": reused}, "-v")
        assert "measured" not in result.stderr
        expected = tensors(own)
        assert all(torch.equal(tensors(out)[name], expected[name]) for name in expected)


def test_measuring_for_mergekit_pytorch(tmp_path, family):
    files = []
    for path in family[:3]:
        files.append(tmp_path / f"{path.name}.safetensors")
        save_file(tensors(path), files[-1])
    config = configuration(files, parameters={"scope": "model"})
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    run("mergekit-pcb", "measure", tmp_path / "c.yml", "-o", tmp_path / "s.json")
    own, _ = merge(tmp_path / "own", config, command="mergekit-pytorch")
    config["parameters"]["statistics"] = str(tmp_path / "s.json")
    out, _ = merge(tmp_path / "reused", config, command="mergekit-pytorch")
    assert all(torch.equal(tensors(out)[n], t) for n, t in tensors(own).items())


def changed(document, **changes):
    """A document with changed fields and, unlike one edited by hand, a checksum that fits."""
    from mergekit_pcb.host.statistics_file import Document, _checksum

    edited = Document.model_validate_json(json.dumps({**document, **changes}))
    return edited.model_copy(update={"checksum": _checksum(edited)}).model_dump_json()


def test_documents_that_do_not_fit_are_refused(tmp_path, measured):
    statistics, config = measured
    good = statistics.read_text()
    document = json.loads(good)
    config["parameters"]["statistics"] = str(statistics)

    def complaint(text, **parameters):
        statistics.write_text(text)
        wanted = {**config, "parameters": {**config["parameters"], **parameters}}
        sentence = refused(tmp_path, wanted)
        assert f"use statistics {statistics}, because" in sentence
        return sentence

    assert "measured with density 0.2 for" in complaint(good, density=0.3)
    assert "measured with clip 0.0001 and the merge asks for 0.001" in complaint(good, clip=1e-3)
    assert "the scope is tensor" in complaint(good, scope="tensor")
    assert "it is damaged" in complaint(good[: len(good) // 2])
    assert "it is damaged (reads" in complaint(good.replace('"reads": 2', '"reads": "two"'))
    assert "it is damaged (extra" in complaint(good.replace('"clip"', '"extra": 1,\n  "clip"'))
    edited = good.replace('"peak": ', '"peak": 1')
    assert "changed after it was measured" in complaint(edited)
    fewer = changed(document, tasks=document["tasks"][:2])
    assert "holds 2 tasks and the merge has 3" in complaint(fewer)
    turned = changed(document, tasks=document["tasks"][::-1])
    assert "models in another order" in complaint(turned)
    assert "puts other tensors together" in complaint(changed(document, layout="0"))
    assert "measured in dtype bfloat16" in complaint(changed(document, dtype="bfloat16"))
    statistics.unlink()
    assert "cannot be read (No such file" in refused(tmp_path, config)


def test_a_checkpoint_changed_after_measuring_is_noticed(tmp_path):
    paths = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2)
    config = configuration(paths, parameters={"scope": "model"})
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    statistics = tmp_path / "s.json"
    run("mergekit-pcb", "measure", tmp_path / "c.yml", "-o", statistics)
    state = tensors(paths[1])
    state["model.norm.weight"][0] += 1e-3
    save_file(state, paths[1] / "model.safetensors", metadata={"format": "pt"})
    config["parameters"]["statistics"] = str(statistics)
    assert f"the files of {paths[1]} are not those measured" in refused(tmp_path, config)


def test_statistics_of_files_mean_nothing_in_memory():
    states = [{"w": torch.randn(4, 4)} for _ in range(3)]
    parameters = {"scope": "model", "statistics": "s.json"}
    with pytest.raises(ValueError, match=r"use statistics s\.json in memory"):
        merge_state_dicts(states, "pcb", base=0, parameters=parameters)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"parameters": {"scope": "tensor"}}, "its scope is tensor"),
        ({"merge_method": "linear", "parameters": {"weight": 1.0}}, "it does not use pcb"),
        ({"models": []}, "Exactly one of 'models', 'slices', or 'modules'"),
        ({"parameters": {"scope": "model", "density": [0.1, 0.2]}}, "several values of density"),
    ],
)
def test_what_cannot_be_measured_leaves_no_document(tmp_path, family, change, complaint):
    file, statistics = tmp_path / "c.yml", tmp_path / "s.json"
    file.write_text(yaml.safe_dump({**configuration(family), **change}))
    result = run("mergekit-pcb", "measure", file, "-o", statistics, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert complaint in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yml"]


def test_an_interrupted_pass_leaves_no_document(tmp_path, family, monkeypatch):
    from click.testing import CliRunner

    from mergekit_pcb.host import whole_model
    from mergekit_pcb.tools.cli import main

    (tmp_path / "s.json").write_text("older")
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(configuration(family, parameters={"scope": "model"})))

    def interrupted(start_pass, *_):
        next(iter(start_pass()))
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_model, "measure", interrupted)
    result = CliRunner().invoke(main, ["measure", str(file), "-o", str(tmp_path / "s.json")])
    assert result.exit_code == 1
    assert (tmp_path / "s.json").read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yml", "s.json"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("merge_method: [", "while parsing"),
        (
            "merge_method: pcbb\nbase_model: {0}\nmodels: [{{model: {1}}}]",
            "it does not use pcb",
        ),
        ("merge_method: pcb\nbase_model: {0}\nmodels: [{{model: /no/where}}]", "/no/where"),
        ("just words", "it does not use pcb"),
    ],
)
def test_configurations_nobody_can_use_end_in_a_sentence(tmp_path, family, text, complaint):
    from click.testing import CliRunner

    from mergekit_pcb.tools.cli import main

    file = tmp_path / "c.yml"
    file.write_text(text.format(*family))
    result = CliRunner().invoke(main, ["measure", str(file), "-o", str(tmp_path / "s.json")])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert complaint in result.output
    assert re.search(r"^Error: cannot .*, because .*; .*\.$", result.output, re.MULTILINE)


def test_outputs_that_cannot_be_written_are_refused_before_measuring(tmp_path, family, monkeypatch):
    from click.testing import CliRunner

    from mergekit_pcb.host import whole_model
    from mergekit_pcb.tools.cli import main

    monkeypatch.delattr(whole_model, "measure_to_document")
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(configuration(family, parameters={"scope": "model"})))
    for output in (tmp_path / "missing" / "s.json", "/dev/null"):
        result = CliRunner().invoke(main, ["measure", str(file), "-o", str(output)])
        assert result.exit_code == 1
        assert f"cannot write {output}, because" in result.output


def test_vocabulary_settings_are_part_of_what_was_measured(tmp_path):
    words = [f"w{i}" for i in range(64)]
    paths = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2)
    for path in paths:
        with_tokenizer(path, words)
    parameters = {"scope": "model"}
    file, statistics = tmp_path / "c.yml", tmp_path / "s.json"
    config = configuration(paths, parameters=parameters, tokenizer={"source": "base"})
    file.write_text(yaml.safe_dump(config))
    run("mergekit-pcb", "measure", file, "-o", statistics)
    config["parameters"]["statistics"] = str(statistics)
    merge(tmp_path, config)
    config["tokenizer"]["tokens"] = {"w3": {"source": {"kind": "zero"}, "force": True}}
    assert "puts other tensors together" in refused(tmp_path, config)
    config["tokenizer"] = {"source": str(paths[2])}
    assert "puts other tensors together" in refused(tmp_path, config)


def test_a_moved_copy_is_the_same_model_and_a_touched_one_too(tmp_path, family, measured):
    import os
    import shutil

    statistics, config = measured
    for path in family:
        shutil.copytree(path, tmp_path / "moved" / path.name, copy_function=shutil.copy)
        for file in (tmp_path / "moved" / path.name).iterdir():
            os.utime(file)
    moved = [tmp_path / "moved" / path.name for path in family]
    parameters = {**config["parameters"], "statistics": str(statistics)}
    merge(tmp_path, configuration(moved, parameters=parameters))


@pytest.mark.parametrize("where", ["base", "a"])
@pytest.mark.parametrize("chosen", [{}, {"lambda": 0.0}, {"density": 0.0}])
def test_nan_is_found_in_tensors_that_take_no_part_in_measuring(tmp_path, family, where, chosen):
    from click.testing import CliRunner
    from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch

    states = dict(zip(("base", "a", "b"), map(tensors, family), strict=False))
    del states["b"]["lm_head.weight"]
    states[where]["lm_head.weight"][0, 0] = float("nan")
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in states]
    config = tmp_path / "c.yml"
    parameters = {"scope": "model", **chosen}
    config.write_text(yaml.safe_dump(configuration(files, parameters=parameters)))
    result = CliRunner().invoke(mergekit_pytorch, [str(config), str(tmp_path / "out"), "-u"])
    assert result.exit_code == 1
    assert f"because {tmp_path / where}.safetensors holds NaN or infinity" in result.output


def test_merges_planned_in_two_threads_do_not_mix(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    families = [save_family(tmp_path / f"f{i}", tiny_llama(layers=1), tasks=2) for i in range(2)]
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)

    def merged(index):
        parameters = {"scope": "model", "density": 0.1 + 0.2 * index}
        config = configuration(families[index], parameters=parameters)
        out = tmp_path / f"out{index}"
        run_merge(MergeConfiguration.model_validate(config), str(out), options)
        return tensors(out)

    with ThreadPoolExecutor(2) as pool:
        for index, result in enumerate(pool.map(merged, range(2))):
            states = [tensors(path) for path in families[index]]
            expected = whole_reference(states, density=0.1 + 0.2 * index)
            assert_equal_states(result, expected, states[0])
