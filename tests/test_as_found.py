"""Checkpoints and commands as they are found: old buffers, narrow dtypes, equal times of change."""

import json
import os
import shutil
import weakref

import pytest
import torch
import yaml
from checkpoints import configuration, merge, run, save_family, tensors, tiny_llama
from click.testing import CliRunner
from mergekit.common import ImmutableMap, ModelReference
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.merge_methods.base import TensorGroup
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from safetensors.torch import save_file
from test_bad_input import refused
from test_plan import run_in_process
from test_vocabulary import NEW, WORDS, paths  # noqa: F401 - a fixture
from test_whole_model import assert_equal_states, whole_reference

from mergekit_pcb import PCBError, combine, contributions
from mergekit_pcb.core import fused, ranks, vectors
from mergekit_pcb.core.measure import Recipe, measure
from mergekit_pcb.core.vectors import Aligned
from mergekit_pcb.host import advice, inputs, planning, whole_model
from mergekit_pcb.host.method import PCBMerge
from mergekit_pcb.host.plan import Plan
from mergekit_pcb.tools import check
from mergekit_pcb.tools.cli import main


def old_neox(place, masked):
    """A GPT-NeoX with what transformers stored of its masks once, and mergekit asks for."""
    import transformers

    config = transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    made = save_family(place, transformers.GPTNeoXForCausalLM(config), tasks=2)
    for path in made:
        state = tensors(path)
        for layer in range(2):
            attention = f"gpt_neox.layers.{layer}.attention."
            state[attention + "bias"] = torch.ones(1, 1, 16, 16).tril().bool()
            state[attention + "masked_bias"] = masked.clone()
            state[attention + "rotary_emb.inv_freq"] = torch.linspace(1, 0.1, 4)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.mark.parametrize(
    "more", [{}, {"dtype": "float32"}, {"dtype": "float32", "out_dtype": "float16"}], ids=str
)
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("masked", [torch.tensor(-1e9), torch.tensor(-1e9).half()])
def test_masks_of_old_models_are_no_obstacle(tmp_path, scope, more, masked):
    """Booleans, which a dtype turns into numbers, and -1e9, which is infinite in float16."""
    made = old_neox(tmp_path / "models", masked)
    out, result = merge(tmp_path, configuration(made, parameters={"scope": scope}, **more))
    assert "takes no part" not in result.stderr
    base, *experts = map(tensors, made)
    merged = tensors(out)
    constants = {name: t for name, t in base.items() if name.endswith(("n.bias", ".masked_bias"))}
    for name, tensor in constants.items():
        stored = tensor.half() if "out_dtype" in more else tensor
        assert torch.equal(merged.pop(name).double(), stored.double()), name
    assert len(constants) == 4
    if scope == "model" and "out_dtype" not in more:
        states = [{n: t for n, t in s.items() if n not in constants} for s in (base, *experts)]
        assert_equal_states(merged, whole_reference(states), base)


def test_masks_of_old_files_are_no_obstacle_to_another_dtype(tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    name = "a.attention.masked_bias"
    for number, file in enumerate(files):
        state = {"w": torch.randn(8, 8).half(), name: torch.tensor([-torch.inf]).half()}
        save_file({**state, "n": torch.full((3,), float(number))}, file)
    config = configuration(files, out_dtype="bfloat16")
    out, _ = merge(tmp_path, config, command="mergekit-pytorch")
    assert tensors(out)[name].tolist() == [-torch.inf]


def test_finite_constants_take_part_in_memory_as_they_do_in_files(tmp_path):
    torch.manual_seed(0)
    names = [f"{number}.attn.masked_bias" for number in range(6)]
    constants = {name: torch.tensor([-1e4]) for name in names}
    states = [{"w": torch.randn(8, 8), **constants} for _ in range(3)]
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for state, file in zip(states, files, strict=True):
        save_file({name: tensor.clone() for name, tensor in state.items()}, file)
    given = {"density": 0.5, "scope": "model"}
    config = configuration(files, parameters=given)
    out, _ = merge(tmp_path, config, command="mergekit-pytorch")
    found = merge_state_dicts(
        dict(zip("abc", states, strict=True)), "pcb", base="a", parameters=given
    )
    for name, tensor in tensors(out).items():
        assert torch.equal(found[name], tensor), name
    parts = contributions(states[0], states[1:], **given)  # one tensor under six names
    assert torch.equal(combine(states[0], parts, [1.0, 1.0])[names[5]], constants[names[5]])
    alone = merge_tensors([torch.full((2,), -torch.inf)] * 3, "pcb", base_index=0, name=names[0],
                          parameters=given)  # fmt: skip
    assert torch.equal(alone, torch.full((2,), -torch.inf))


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_masks_of_old_models_are_no_obstacle_in_memory(scope):
    torch.manual_seed(0)
    name = "a.attention.masked_bias"
    base, *experts = (
        {"w": torch.randn(8, 8), name: torch.tensor([-torch.inf]).half()} for _ in range(3)
    )
    parts = contributions(base, experts, density=0.5, scope=scope)
    assert set(parts[0]) == {"w"}
    merged = combine(base, parts, [1.0, 1.0])
    assert torch.equal(merged[name], base[name])
    groups = [
        TensorGroup.from_tensors(
            [state[own] for state in (base, *experts)], ids="abc", base_index=0, name=own
        )
        for own in base
    ]
    found = PCBMerge()(groups, parameters={"density": 0.5, "scope": scope})
    torch.testing.assert_close(found[0], merged["w"])
    assert torch.equal(found[1], base[name])


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_infinity_anywhere_else_is_an_error_also_if_all_models_hold_it(tmp_path, scope):
    made = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2)
    for path in made:
        state = tensors(path)
        state["model.norm.weight"][3] = torch.inf
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = configuration(made, parameters={"scope": scope})
    assert "holds NaN or infinity in it" in refused(tmp_path, config)


def test_a_vocabulary_that_differs_is_refused_before_measuring(tmp_path, family, monkeypatch):
    other = save_family(tmp_path / "other", tiny_llama(vocabulary=70), tasks=0)[0]
    config = configuration([*family[:2], other], parameters={"scope": "model"})
    monkeypatch.delattr(whole_model, "measure")
    sentence = refused(tmp_path, config)
    assert f"(64, 32) in {family[0]} but (70, 32) in {other}" in sentence
    assert not (tmp_path / "out").exists()
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    command = ["measure", str(tmp_path / "c.yml"), "-o", str(tmp_path / "s.json")]
    assert f"(64, 32) in {family[0]}" in CliRunner().invoke(main, command).output


def test_measuring_holds_one_tensor_of_each_model(tmp_path, monkeypatch):
    """Cast, so that a tensor takes memory of its own."""
    from mergekit.io.tasks import LoadTensor

    made = save_family(tmp_path / "models", tiny_llama(layers=2, dtype=torch.bfloat16))
    loaded, most, execute = [], [], LoadTensor.execute

    def counted(self):
        found = execute(self)
        if self.dtype is not None:  # not for its shape alone
            loaded.append(weakref.ref(found))
            alive = [one() for one in loaded]
            most.append(len({tuple(one.shape) for one in alive if one is not None}))
            most.append(sum(one is not None for one in alive) / len(made))
        return found

    monkeypatch.setattr(LoadTensor, "execute", counted)
    config = configuration(made, parameters={"scope": "model"}, dtype="float32")
    run_in_process(config, tmp_path / "out")
    assert len(loaded) == 3 * len(made) * len(tensors(made[0])), "two passes, and the merge"
    assert max(most) == 1


def in_equal_times(models):
    for path in models:
        for file in path.iterdir():
            os.utime(file, (1e9, 1e9))


def test_equal_sizes_and_times_are_not_taken_for_equal_files(tmp_path):
    made = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2)
    in_equal_times(made)
    parameters = {"scope": "model"}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(configuration(made, parameters=parameters)))
    run("mergekit-pcb", "measure", tmp_path / "c.yml", "-o", tmp_path / "s.json")
    parameters["statistics"] = str(tmp_path / "s.json")
    merge(tmp_path / "fits", configuration(made, parameters=parameters))
    base, one, other = made
    config = configuration([base, other, one], parameters=parameters)
    assert "it lists the models in another order" in refused(tmp_path, config)
    third = save_family(tmp_path / "more", tiny_llama(layers=1), tasks=3)[3]
    in_equal_times([third])
    config = configuration([base, one, third], parameters=parameters)
    assert f"the files of {third} are not those measured" in refused(tmp_path, config)


def test_a_model_that_changes_while_it_is_measured_has_no_document(tmp_path, family, monkeypatch):
    measure = whole_model._measure

    def changing(found):
        os.utime(family[1] / "config.json")
        (shard, *_) = sorted(family[1].glob("*.safetensors"))
        os.utime(shard)
        return measure(found)

    monkeypatch.setattr(whole_model, "_measure", changing)
    config = configuration(family, parameters={"scope": "model"})
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    command = ["measure", str(tmp_path / "c.yml"), "-o", str(tmp_path / "s.json")]
    said = CliRunner().invoke(main, command).output
    assert "was changed meanwhile; measure again" in said
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_union_of_vocabularies_where_only_slices_name_a_base(tmp_path, paths, scope):  # noqa: F811
    base, *experts = map(str, paths)
    sources = [{"model": model, "layer_range": [0, 1]} for model in (base, *experts)]
    config = {
        "merge_method": "pcb",
        "slices": [{"base_model": base, "sources": sources}],
        "parameters": {"scope": scope},
        "tokenizer": {"source": "union"},
    }
    out, _ = merge(tmp_path / "m", config)
    added = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    assert [ids[word] for word in sorted(NEW)] == list(range(len(WORDS), len(WORDS) + len(NEW)))


def test_layer_gradients_of_single_files_are_said_to_be_none(tmp_path, family):
    files = [tmp_path / f"{path.name}.safetensors" for path in family[:2]]
    for path, file in zip(family, files, strict=False):
        save_file(tensors(path), file)
    config = configuration(files, parameters={"weight": [0.2, 1.5], "density": 0.2})
    _, result = merge(tmp_path, config, command="mergekit-pytorch")
    said = "weight: of a layer gradient mergekit-pytorch takes the first value for every tensor"
    assert said in " ".join(result.stderr.split())
    checked = CliRunner().invoke(main, ["check", str(tmp_path / "config.yml")]).output
    assert said in " ".join(checked.split())
    config = configuration(family[:2], parameters={"weight": [0.2, 1.5]})
    _, result = merge(tmp_path / "yaml", config)
    assert "layer gradient" not in result.stderr


@pytest.mark.parametrize("name", ["fp16", "float"])
def test_an_unknown_out_dtype_is_refused_before_anything_is_read(tmp_path, family, name):
    config = configuration(family, parameters={"scope": "model"}, out_dtype=name)
    assert f"cannot use out_dtype: {name}, because" in refused(tmp_path, config)
    assert not (tmp_path / "out").exists()


def test_an_out_dtype_too_narrow_for_a_value_is_refused(tmp_path, family):
    parameters = {"lambda": 1e8}
    config = configuration(family, parameters=parameters, dtype="float32", out_dtype="float16")
    sentence = refused(tmp_path, config)
    assert "its values do not fit into torch.float16" in sentence
    assert "choose a wider dtype (`out_dtype`)" in sentence
    config = configuration(family, parameters=parameters, dtype="float32", out_dtype="bfloat16")
    merge(tmp_path / "wide", config)


def test_a_value_between_the_ends_of_bfloat16_and_float32_is_refused(tmp_path):
    made = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=1)
    states = [tensors(path) for path in made]
    for path, state, value in zip(made, states, (3.4e38, 3.3999e38), strict=True):
        state["model.norm.weight"].fill_(value)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    said = "model.norm.weight, because its values do not fit into torch.bfloat16"
    assert said in refused(tmp_path, configuration(made, dtype="float32", out_dtype="bfloat16"))
    with pytest.raises(PCBError, match=said):
        merge_state_dicts(states, "pcb", base=0, out_dtype=torch.bfloat16)


def test_shapes_are_looked_up_where_files_are_mapped(family):
    """Not on the GPU that tensors are to be read to."""
    from mergekit.options import MergeOptions

    config = configuration(family, dtype="float32")
    plan = planning.plan_without_merging(config, MergeOptions())
    for task in plan.tasks:
        load = task.gather_tensors.model_copy(update={"device": "cuda"})
        for one in inputs._without_cast(load).arguments().values():
            assert one.device is None
            assert one.dtype is None


def test_what_mergekit_ignores_is_said_once_in_a_process(tmp_path, family, caplog):
    """mergekit-evolve writes such parameters into every candidate."""
    advice._said.clear()
    for number in range(2):
        config = configuration(family[:2], parameters={"normalize": False, "int8_mask": True})
        run_in_process(config, tmp_path / f"out{number}")
    said = [record.getMessage() for record in caplog.records]
    assert sum("unknown parameter normalize" in text for text in said) == 1


@pytest.mark.usefixtures("as_given")
@pytest.mark.parametrize("clip", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize(("host", "most"), [("cpu", check.READS), ("none", check.READS_THERE)])
def test_measuring_reads_as_often_as_check_says(monkeypatch, host, most, clip):
    """Where values are counted as on accelerators, and where they are not."""
    monkeypatch.setattr(ranks, "HOST", host)
    monkeypatch.setenv(fused.SWITCH, "0")
    torch.manual_seed(0)
    base = torch.randn(12, 1 << 15)
    spread = 1e-2 * torch.arange(1, 13).view(-1, 1)
    models = [base + spread * torch.randn(base.shape) for _ in range(2)]
    passes = []

    def start():
        passes.append(1)
        for name, row in enumerate(base):
            yield Aligned.of(f"w{name}", row, [model[name] for model in models])

    measure(start, base.numel(), Recipe.of([0.1, 0.3], clip, [1.0, 1.0], 0, range(2)), base.dtype)
    assert len(passes) <= most


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("refine", ["none", "solve"])
def test_a_gpu_that_is_not_there_is_told_and_a_merge_on_one_can_be_checked(
    tmp_path, family, refine
):
    config = configuration(family, parameters={"refine": refine})
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    for flag in ("--cuda", "--multi-gpu"):
        sentence = refused(tmp_path, config, options=[flag])
        assert sentence.startswith("Error: cannot merge on cuda")
        assert not (tmp_path / "out").exists()
    checked = CliRunner().invoke(main, ["check", str(tmp_path / "c.yml"), "--cuda"])
    assert checked.exit_code == 0, checked.output
    assert "no mistakes found" in checked.output


def test_what_a_merge_on_a_gpu_takes_is_counted_by_the_chunks_of_one(tmp_path, family, monkeypatch):
    (tmp_path / "c.yml").write_text(yaml.safe_dump(configuration(family)))
    monkeypatch.setattr(vectors, "CPU_CHUNK_ELEMENTS", 1)
    needs = [
        json.loads(
            CliRunner().invoke(main, ["check", "--json", str(tmp_path / "c.yml"), *more]).output
        )["outlook"]["peak_bytes"]
        for more in ([], ["--cuda"])
    ]
    assert needs[1] > 2 * needs[0]


def test_a_last_slice_of_more_models_than_the_first(tmp_path, family):
    """The host would load the head of as many as the first has."""
    base, *models = map(str, family)

    def piece(start, *names):
        sources = [{"model": name, "layer_range": [start, start + 2]} for name in names]
        return {"sources": sources}

    pieces = (base, models[0]), (base, models[2], models[1])
    config = {"merge_method": "pcb", "base_model": base}
    config["slices"] = [piece(0, *pieces[0]), piece(2, *pieces[1])]
    sentence = refused(tmp_path, config)
    assert f"of {models[1]}, because mergekit 0.1.5 loads it of as many models as" in sentence
    config["slices"] = [piece(0, *pieces[1]), piece(2, *pieces[0])]
    merge(tmp_path / "fits", config)
    # The model that is left out may be the base.
    config["slices"] = [piece(0, models[0], base), piece(2, models[0], models[1], base)]
    assert f"of {base}, because mergekit 0.1.5 loads it of as many" in refused(tmp_path, config)


def test_whole_numbers_are_no_dtype_of_weights(tmp_path, family):
    for field in ("dtype", "out_dtype"):
        said = refused(tmp_path, configuration(family, **{field: "int64"}))
        assert f"use {field}: int64, because weights are no whole numbers" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["gpu", "cpu:x"])
def test_devices_that_torch_does_not_know_are_told(tmp_path, family, device):
    said = refused(tmp_path, configuration(family), options=["--device", device])
    assert f"merge on {device}" in said


def test_slices_have_to_list_the_base(tmp_path, family):
    base, *models = map(str, family)
    sources = [{"model": name, "layer_range": [0, 4]} for name in models]
    config = {"merge_method": "pcb", "base_model": base, "slices": [{"sources": sources}]}
    assert f"base model {base} is none of the slice's sources" in refused(tmp_path, config)


def test_one_adapter_under_two_names_is_told(tmp_path, family):
    def named(adapter):
        return ModelReference.model_validate(f"{family[0]}+{tmp_path}/{adapter}")

    adapters = [named("a"), named("./a"), named("b")]
    plan = planning.plan_without_merging(configuration(family), MergeOptions())
    task = plan.tasks[0].model_copy(update={"model_order": tuple(adapters)})
    values = dict.fromkeys(adapters, plan.tasks[0].input_parameters[plan.models[0]])
    task = task.model_copy(update={"input_parameters": ImmutableMap(values)})
    with pytest.raises(PCBError, match="they are one model under two names"):
        Plan([task], MergeOptions())


def test_counters_that_differ_are_told(tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, file in enumerate(files):
        save_file({"w": torch.randn(8, 8), "count": torch.tensor([number])}, file)
    said = refused(tmp_path, configuration(files), mergekit_pytorch)
    assert f"other numbers or another dtype in {files[2]} (torch.int64) than in" in said


def test_shards_of_mergekit_pytorch_are_the_same_in_every_process(tmp_path):
    """Mergekit takes the names of tensors from a set, in an order of that process."""
    from mergekit.scripts import merge_raw_pytorch as raw

    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for file in files:
        save_file({f"w{number}": torch.randn(8, 8) for number in range(40)}, file)
    config = raw.RawPyTorchMergeConfig.model_validate(configuration(files))
    *saves, last = raw.plan_flat_merge(config, str(tmp_path / "out"), False, False, MergeOptions())
    names = [save.tensor_name for save in saves]
    assert names == sorted(f"w{number}" for number in range(40))
    assert last.tensor_save_tasks == tuple(saves)


def test_dtype_decides_what_is_computed_in(tmp_path):
    """A few numbers in float64 do not widen a merge that is cast to float32."""
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    torch.manual_seed(0)
    for file in files:
        save_file({"w": torch.randn(8, 8), "few": torch.randn(3).double()}, file)
    config = configuration(files, parameters={"scope": "model"}, dtype="float32")
    plan = planning.plan_without_merging(config, MergeOptions(quiet=True))
    assert whole_model.measure_to_document(inputs.Inputs(plan)).arithmetic == "float32"


def test_the_tokenizer_of_a_further_model_belongs_to_the_statistics(tmp_path, paths):  # noqa: F811
    """It decides which rows there are; nor is it overwritten."""
    other = tmp_path / "other"
    shutil.copytree(paths[2], other)
    config = configuration(
        paths[:2], parameters={"scope": "model"}, tokenizer={"source": str(other)}
    )
    file, statistics = tmp_path / "c.yml", tmp_path / "s.json"
    file.write_text(yaml.safe_dump(config))
    words = ["measure", str(file), "--quiet", "-o"]
    result = CliRunner().invoke(main, [*words, str(other / "tokenizer.json")])
    assert f"it belongs to the model {other}" in result.output
    assert CliRunner().invoke(main, [*words, str(statistics)]).exit_code == 0
    config["parameters"]["statistics"] = str(statistics)
    merge(tmp_path / "same", config)
    text = (other / "tokenizer.json").read_text()
    assert NEW[0] in text
    (other / "tokenizer.json").write_text(text.replace(NEW[0], NEW[0][::-1]))
    assert f"the tokenizer of {other} is not the one" in refused(tmp_path / "same", config)


def test_a_report_refuses_what_the_merge_refuses(tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, file in enumerate(files):
        save_file({"w": torch.full((8, 8), 6e4) + number * torch.arange(64.0).view(8, 8)}, file)
    config = configuration(files, parameters={"lambda": 200.0, "density": 0.5}, out_dtype="float16")
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(main, ["report", str(file), "-o", str(tmp_path / "r"), "--quiet"])
    assert "its values do not fit into torch.float16" in result.output


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_files_that_hold_a_tied_head_once_more_are_merged_like_those_that_do_not(tmp_path, scope):
    """As `pytorch_model.bin` does, and what tools of others write."""
    made = save_family(tmp_path / "models", tiny_llama(layers=1, tied=True), tasks=2)
    parameters = {"scope": scope, "density": 0.3, "dare_density": 0.5}
    run_in_process(configuration(made, parameters=parameters), tmp_path / "once")
    once = tensors(tmp_path / "once")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    assert head not in once
    shutil.copytree(tmp_path / "models", tmp_path / "more")
    made = [tmp_path / "more" / path.name for path in made]
    for path in made[:2]:
        state = tensors(path)
        state[head] = state[embedding].clone()
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    run_in_process(configuration(made, parameters=parameters), tmp_path / "twice")
    twice = tensors(tmp_path / "twice")
    assert torch.equal(twice.pop(head), twice[embedding])
    for name, tensor in once.items():
        assert torch.equal(twice[name], tensor), name


def test_a_head_that_is_not_the_embedding_is_ranked_whatever_the_configuration_says(tmp_path):
    made = save_family(tmp_path / "models", tiny_llama(layers=1, tied=True), tasks=2)
    states = [tensors(path) for path in made]
    for number, (path, state) in enumerate(zip(made, states, strict=True)):
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + 0.01 * number
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = configuration(made, parameters={"scope": "model", "density": 0.3})
    run_in_process(config, tmp_path / "out")
    assert_equal_states(tensors(tmp_path / "out"), whole_reference(states, density=0.3), states[0])


def test_an_untied_head_is_ranked_whatever_the_embedding_is_called(tmp_path):
    """GPT-2's files have names with `transformer.` before them, or without."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    made, found = save_family(tmp_path / "long", GPT2LMHeadModel(config), tasks=2), []
    shutil.copytree(tmp_path / "long", tmp_path / "short")
    for kind in ("long", "short"):
        folders = [tmp_path / kind / path.name for path in made]
        for path in folders if kind == "short" else ():
            state = {n.removeprefix("transformer."): t for n, t in tensors(path).items()}
            save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        parameters = {"scope": "model", "density": 0.3}
        run_in_process(configuration(folders, parameters=parameters), tmp_path / kind / "out")
        found.append(tensors(tmp_path / kind / "out"))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name
    assert not torch.equal(found[0]["lm_head.weight"], tensors(made[0])["lm_head.weight"])


def test_four_names_of_one_tensor_have_one_mask(tmp_path):
    """A T5 whose files hold its embedding under every name."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_ff=24, d_kv=4, num_heads=4, num_layers=1, vocab_size=64,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    shared, names = "shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    made, model = (
        [tmp_path / name for name in ("base", "a", "b")],
        T5ForConditionalGeneration(config),
    )
    for number, path in enumerate(made):
        model.save_pretrained(path)
        state = {
            name: tensor + number * 0.01 * torch.randn(tensor.shape)
            for name, tensor in tensors(path).items()
        }
        state |= {name: state[shared].clone() for name in (*names, "lm_head.weight")}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    parameters = {"dare_density": 0.5, "density": 0.3}
    run_in_process(configuration(made, parameters=parameters), tmp_path / "out")
    merged = tensors(tmp_path / "out")
    assert not torch.equal(merged[shared], tensors(made[0])[shared])
    for name in (*names, "lm_head.weight"):
        assert torch.equal(merged[name], merged[shared]), name
