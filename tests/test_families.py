"""Every row of the documentation's table of families: its example, its command, its own library."""

import json
import pathlib
import re
import shutil

import pytest
import torch
import yaml
from checkpoints import run, save_family, tensors, tiny_llama
from conftest import ROOT
from families import FAMILIES, build, forward, save, text
from reference import dare_factors
from reference import pcb as reference
from safetensors.torch import save_file
from test_bad_input import SENTENCE
from test_whole_model import assert_equal_states, whole_reference, with_tokenizer

EXAMPLES = ROOT / "examples" / "yaml"
YAML, RAW = "mergekit-yaml", "mergekit-pytorch"
CASES = {
    "Llama": ("first-merge", YAML),
    "Llama, tied head": ("first-merge", YAML),
    "Mistral": ("first-merge", YAML),
    "Qwen3": ("first-merge", YAML),
    "Qwen3 MoE": ("first-merge", YAML),
    "GPT-2": ("first-merge", YAML),
    "RoBERTa classifier": ("classifiers", YAML),
    "BERT classifier": ("classifiers", YAML),
    "CLIP vision tower": ("clip-vision-tower", YAML),
    "T5": ("one-file", RAW),
    "T5 v1.1, gated": ("one-file", RAW),
    "CLIP": ("one-file", RAW),
    "ViT classifier": ("one-file", RAW),
    "Whisper": ("one-file", RAW),
}


def expected_of(states, parameters):
    """The reference for every tensor of the base, by the parameters of an example."""
    chosen = {"density": parameters["density"], "lam": parameters.get("lambda", 1.0)}
    states = [{name: t.float() for name, t in state.items()} for state in states]
    if parameters.get("scope") == "model":
        return whole_reference(states, **chosen)
    return {n: reference(t, [s[n] for s in states[1:]], **chosen) for n, t in states[0].items()}


def fused(state):
    """Experts of a mixture as mergekit writes them (and transformers 5 holds them): stacked."""
    rest = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    experts = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name):
            prefix, expert, kind = match.groups()
            experts.setdefault(prefix, {}).setdefault(int(expert), {})[kind] = tensor
    for prefix, parts in experts.items():
        ordered = [parts[expert] for expert in sorted(parts)]
        rest[f"{prefix}.down_proj"] = torch.stack([part["down"] for part in ordered])
        both = [torch.cat([part["gate"], part["up"]]) for part in ordered]
        rest[f"{prefix}.gate_up_proj"] = torch.stack(both)
    return rest


def load(family, folder):
    """The merged model in its own library, every one of its tensors loaded."""
    model, report = type(build(family)).from_pretrained(folder, output_loading_info=True)
    for complaint, names in report.items():
        assert not names, (complaint, names)
    return model


def assert_alive(model, family, base):
    found = forward(model, family)
    assert found.isfinite().all()
    assert not torch.equal(found.float(), forward(base, family).float())


@pytest.mark.parametrize("shards", ["one file", "many files"])
@pytest.mark.parametrize("family", CASES)
def test_family(tmp_path, monkeypatch, family, shards):
    example, command = CASES[family]
    if shards == "many files" and command == RAW:
        pytest.skip("mergekit-pytorch merges single files")
    file = EXAMPLES / f"{example}.yml"
    names = [n for n in ("base", "code", "math", "chat") if f"models/{n}" in file.read_text()]
    size = "20KB" if shards == "many files" else "10GB"
    folders = save(tmp_path / "models", family, names, shard_size=size)
    assert len(list(folders[0].glob("*.safetensors"))) > 1 or shards == "one file"
    monkeypatch.chdir(tmp_path)
    options = ["--no-copy-tokenizer"] if command == YAML else []
    result = run(command, file, "merged", *options)
    assert "Warning" not in result.stderr
    assert "WARNING:mergekit_pcb" not in result.stderr
    assert "leaves" not in result.stderr
    out = tmp_path / "merged"
    if command == RAW:
        shutil.copy(folders[0] / "config.json", out)
        for extra in folders[0].glob("*_config.json"):
            shutil.copy(extra, out)
    states, merged = [fused(tensors(folder)) for folder in folders], tensors(out)
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in states[0].items()}
    parameters = yaml.safe_load(file.read_text())["parameters"]
    assert_equal_states(merged, expected_of(states, parameters), states[0])
    assert_alive(load(family, out), family, build(family))


@pytest.mark.parametrize("family", ["Qwen3 MoE", "GPT-2"])
def test_the_whole_model_is_ranked_as_it_is_merged(tmp_path, monkeypatch, family):
    """Experts fused, heads tied: measured in a process of its own and merged from that."""
    monkeypatch.chdir(tmp_path)
    folders = save("models", family, ["base", "code", "math"], shard_size="20KB")
    config = yaml.safe_load((EXAMPLES / "classifiers.yml").read_text())
    config["parameters"] = {"scope": "model", "density": 0.1}
    pathlib.Path("c.yml").write_text(yaml.safe_dump(config))
    run("mergekit-pcb", "measure", "c.yml", "-o", "statistics.json")
    config["parameters"]["statistics"] = "statistics.json"
    pathlib.Path("c.yml").write_text(yaml.safe_dump(config))
    run("mergekit-yaml", "c.yml", "merged", "--no-copy-tokenizer")
    states = [fused(tensors(folder)) for folder in folders]
    expected = expected_of(states, config["parameters"])
    assert_equal_states(tensors("merged"), expected, states[0])


def test_what_mergekit_leaves_out_is_said(tmp_path, monkeypatch):
    """mergekit-yaml 0.1.5 writes 8 of the 40 tensors of a ViT, and says nothing."""
    monkeypatch.chdir(tmp_path)
    save("models", "ViT classifier", ["base", "code", "math"])
    result = run("mergekit-yaml", EXAMPLES / "classifiers.yml", "merged", "--no-copy-tokenizer")
    assert len(tensors("merged")) == 8
    assert result.stderr.count("leaves 32 tensors of ./models/base out of the result (vit.en") == 1
    assert "see which command merges it in docs/models.md" in result.stderr


def test_buffers_of_old_checkpoints_are_not_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in save("models", "GPT-2", ["base", "code", "math"]):
        state = tensors(folder)
        for layer in range(2):
            state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
            state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    result = run("mergekit-yaml", EXAMPLES / "classifiers.yml", "merged", "--no-copy-tokenizer")
    assert "leaves" not in result.stderr
    assert_alive(load("GPT-2", "merged"), "GPT-2", build("GPT-2"))


def test_what_only_the_base_has_is_said_under_mergekit_pytorch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = save("models", "ViT classifier", ["base", "code", "math"])
    extra = {**tensors(folders[0]), "pooler.weight": torch.ones(3)}
    save_file(extra, folders[0] / "model.safetensors")
    result = run("mergekit-pytorch", EXAMPLES / "one-file.yml", "merged")
    assert result.stderr.count("leaves 1 tensors of ./models/base/model.safetensors out") == 1
    assert "(pooler.weight)" in result.stderr


def test_layers_left_out_on_purpose_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("models", "Llama", ["base", "code"])
    names = [f"./models/{name}" for name in ("base", "code")]
    sources = [{"model": name, "layer_range": [0, 1]} for name in names]
    config = {"merge_method": "pcb", "base_model": names[0], "slices": [{"sources": sources}]}
    pathlib.Path("c.yml").write_text(yaml.safe_dump(config))
    result = run("mergekit-yaml", "c.yml", "merged", "--no-copy-tokenizer")
    assert "leaves" not in result.stderr


def test_every_family_is_tried():
    assert set(CASES) == set(FAMILIES)


def readme_table():
    """File and command of each row of the table of families."""
    section = (ROOT / "docs" / "models.md").read_text()
    return re.findall(r"^\| .* \| (`.*`) \| `(.*)` \|$", section, re.MULTILINE)


def test_every_row_of_the_table_is_tried():
    rows = readme_table()
    files = {file for cell, _ in rows for file in re.findall(r"`([\w-]+)\.yml`", cell)}
    tried = {example for example, _ in CASES.values()}
    named = set(re.findall(r'EXAMPLES / "([\w-]+)\.yml"', pathlib.Path(__file__).read_text()))
    assert files <= tried | named | {"vocabulary-union", "vocabulary-base"}
    for cell, command in rows:
        assert command.split()[1].removesuffix(".yml") in cell
    commands = {command.split()[1]: command.split()[0] for _, command in rows}
    for example, used in CASES.values():
        assert commands[f"{example}.yml"] == used
    assert {"Llama", "Mistral", "Qwen3", "GPT-2"} <= {name.split(",")[0] for name in CASES}


# --- Classifiers whose heads differ ---------------------------------------------------------


def python_of(heading):
    """The Python block under a heading of the page of models."""
    section = (ROOT / "docs" / "models.md").read_text().split(f"\n{heading}\n")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


@pytest.mark.parametrize("family", ["RoBERTa classifier", "BERT classifier"])
def test_heads_that_differ_stay_with_their_tasks(tmp_path, monkeypatch, family):
    """The way the documentation shows: encoders merged, heads kept."""
    import transformers

    monkeypatch.chdir(tmp_path)
    for name, labels, seed in (("base", 2, 0), ("code", 3, 1), ("math", 5, 2)):
        torch.manual_seed(0)
        config = build(family).config
        config.num_labels = labels
        torch.manual_seed(0)
        model = type(build(family))(config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters() if seed else ():
                parameter.add_(2e-3 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "experts" / name)
    block = python_of("## Classifiers with heads of their own")
    before, after = block.split("# mergekit-pytorch one-file.yml merged\n")
    namespace = {}
    exec(before, namespace)
    file = EXAMPLES / "one-file.yml"
    run("mergekit-pytorch", file, "merged")
    names = ("base", "code", "math")
    states = [tensors(tmp_path / "models" / name) for name in names]
    assert not [name for name in states[0] if name.startswith("classifier")]
    parameters = yaml.safe_load(file.read_text())["parameters"]
    assert_equal_states(tensors("merged"), expected_of(states, parameters), states[0])
    exec(after, namespace)
    for name, labels in (("code", 3), ("math", 5)):
        model = namespace["classifiers"][name]
        expert = transformers.AutoModelForSequenceClassification.from_pretrained(f"experts/{name}")
        logits = model(**text()).logits
        assert logits.shape == (2, labels)
        assert logits.isfinite().all()
        assert not torch.equal(logits, expert(**text()).logits)
        merged = dict(model.base_model.named_parameters())
        for key, tensor in tensors("merged").items():
            assert torch.equal(merged[key], tensor), key
        for key, tensor in expert.state_dict().items():
            if key.startswith("classifier"):
                assert torch.equal(model.state_dict()[key], tensor)


# --- Adapters -------------------------------------------------------------------------------


def adapter_folders(directory, config, names=("code", "math")):
    """Adapters of one tiny T5 with random values, as peft writes them."""
    import peft

    folders = []
    for number, name in enumerate(names):
        model = peft.get_peft_model(build("T5"), config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "ia3" in key or "lora" in key:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        folders.append(pathlib.Path(directory) / name)
        model.save_pretrained(folders[-1])
    return folders


def ia3_config(**changes):
    import peft

    return peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"], **changes)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_ia3_adapters(tmp_path, monkeypatch):
    import peft

    monkeypatch.chdir(tmp_path)
    folders = adapter_folders("adapters", ia3_config())
    made = run("mergekit-pcb", "identity-adapter", "adapters/code", "-o", "identity.safetensors")
    assert re.fullmatch(r"identity.safetensors: \d+ tensors, all ones\n", made.stdout)
    run("mergekit-pytorch", EXAMPLES / "ia3.yml", "merged")
    shutil.move("merged/model.safetensors", "merged/adapter_model.safetensors")
    shutil.copy("adapters/code/adapter_config.json", "merged")
    states = [tensors("identity.safetensors"), *(tensors(folder) for folder in folders)]
    assert all((tensor == 1).all() for tensor in states[0].values())
    merged = tensors("merged")
    parameters = yaml.safe_load((EXAMPLES / "ia3.yml").read_text())["parameters"]
    assert_equal_states(merged, expected_of(states, parameters), states[0])
    base = forward(build("T5"), "T5")
    same = peft.PeftModel.from_pretrained(build("T5"), folders[0])
    loaded = peft.PeftModel.from_pretrained(build("T5"), "merged")
    for key, tensor in peft.get_peft_model_state_dict(loaded).items():
        assert torch.equal(tensor, merged[key]), key
    assert forward(loaded, "T5").isfinite().all()
    assert not torch.equal(forward(loaded, "T5"), base)
    assert not torch.equal(forward(loaded, "T5"), forward(same, "T5"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("form", ["folder", "file", "pickle"])
def test_the_identity_adapter_changes_nothing(tmp_path, form):
    import peft

    (folder,) = adapter_folders(tmp_path, ia3_config(), names=("code",))
    given = folder / "adapter_model.safetensors"
    if form == "pickle":
        torch.save(tensors(folder), folder / "adapter_model.bin")
        given.unlink()
    given = folder if form != "file" else given
    out = tmp_path / "identity" / "adapter_model.safetensors"
    out.parent.mkdir()
    run("mergekit-pcb", "identity-adapter", given, "-o", out)
    shutil.copy(folder / "adapter_config.json", out.parent)
    identity = peft.PeftModel.from_pretrained(build("T5"), out.parent)
    assert torch.equal(forward(identity, "T5"), forward(build("T5"), "T5"))


def refused_identity(adapter, out):
    result = run("mergekit-pcb", "identity-adapter", adapter, "-o", out, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (sentence,) = result.stderr.strip().splitlines()
    assert re.search(SENTENCE, sentence), sentence
    return sentence


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_what_has_no_identity_adapter_is_refused(tmp_path):
    import peft

    out = tmp_path / "out.safetensors"
    lora = peft.LoraConfig(r=2, target_modules=["q"])
    (folder,) = adapter_folders(tmp_path / "lora", lora, names=("code",))
    sentence = refused_identity(folder, out)
    assert "product of two factors" in sentence
    assert "--lora-merge-cache" in sentence
    more = ia3_config(modules_to_save=["lm_head"])
    (folder,) = adapter_folders(tmp_path / "more", more, names=("code",))
    assert "lm_head" in refused_identity(folder, out)
    (folder,) = adapter_folders(tmp_path / "ia3", ia3_config(), names=("code",))
    weights = folder / "adapter_model.safetensors"
    assert "take the adapter's place" in refused_identity(folder, weights)
    renamed = folder / "weights.safetensors"
    shutil.copy(weights, renamed)
    assert "it is the adapter itself" in refused_identity(renamed, renamed)
    assert "end in .safetensors" in refused_identity(folder, tmp_path / "out.bin")
    assert "name another file" in refused_identity(folder, tmp_path / "no" / "out.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "VERA"}))
    assert "it is a VERA adapter" in refused_identity(folder, out)
    (folder / "adapter_config.json").unlink()
    weights.write_bytes(b"nonsense")
    assert "cannot read" in refused_identity(folder, out)
    pickled = folder / "adapter_model.bin"
    pickled.write_bytes(b"nonsense")
    assert "cannot read" in refused_identity(pickled, out)
    for content in ({"a.ia3_l": 3}, torch.ones(2, 2)):
        torch.save(content, pickled)
        assert "something else than tensors by name" in refused_identity(pickled, out)
    torch.save({1: torch.ones(2)}, pickled)
    assert "1 in it is no vector of (IA)³" in refused_identity(pickled, out)
    assert "there is no adapter_model.safetensors" in refused_identity(tmp_path, out)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_adapters(tmp_path, monkeypatch):
    import peft

    monkeypatch.chdir(tmp_path)
    (base,) = save("models", "Llama", ["base"])
    for seed, name in enumerate(("code", "math")):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        torch.manual_seed(seed)
        peft.get_peft_model(build("Llama"), config).save_pretrained(f"adapters/{name}")
    arguments = ["merged", "--lora-merge-cache", "cache", "--no-copy-tokenizer"]
    run("mergekit-yaml", EXAMPLES / "lora.yml", *arguments)
    states = [tensors(base)]
    for name in ("code", "math"):
        model = peft.PeftModel.from_pretrained(build("Llama"), f"adapters/{name}")
        states.append(dict(model.merge_and_unload().state_dict()))
    merged = tensors("merged")
    parameters = yaml.safe_load((EXAMPLES / "lora.yml").read_text())["parameters"]
    assert_equal_states(merged, expected_of(states, parameters), states[0])
    for name, tensor in merged.items():
        if "q_proj" not in name and "up_proj" not in name:
            assert torch.equal(tensor, states[0][name].bfloat16()), name
    assert_alive(load("Llama", "merged"), "Llama", build("Llama"))


# --- Vocabularies, stages, evolution --------------------------------------------------------


@pytest.mark.parametrize("example", ["vocabulary-union", "vocabulary-base"])
def test_vocabularies(tmp_path, monkeypatch, example):
    import transformers

    monkeypatch.chdir(tmp_path)
    words = [f"w{i}" for i in range(64)]
    longer = [*words, "new", "more"]
    folders = save_family("models", tiny_llama(), tasks=1)
    folders += save_family("wider", tiny_llama(vocabulary=66), tasks=1)[1:]
    vocabularies = (words, words, longer)
    for folder, name, vocabulary in zip(
        folders, ("base", "code", "math"), vocabularies, strict=True
    ):
        with_tokenizer(folder, vocabulary)
        folder.rename(pathlib.Path("models") / name)
    run("mergekit-yaml", EXAMPLES / f"{example}.yml", "merged")
    merged = tensors("merged")
    model = transformers.AutoModelForCausalLM.from_pretrained("merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained("merged")
    order = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert set(order) == set(longer if example == "vocabulary-union" else words)
    rows = {"vocabulary-union": 80, "vocabulary-base": 64}[example]
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert merged[embedding].shape == merged[head].shape == (rows, 32)
    assert model.config.vocab_size == rows
    states = [tensors(f"models/{name}") for name in ("base", "code", "math")]
    tables = [{n: s.pop(n) for n in (embedding, head)} for s in states]
    rest = {name: merged[name] for name in states[0]}
    parameters = {"density": 0.1}
    assert_equal_states(rest, expected_of(states, parameters), states[0])
    for name in (embedding, head):
        aligned = []
        for vocabulary, table in zip(vocabularies, tables, strict=True):
            found = dict(zip(vocabulary, table[name], strict=True))
            base = dict(zip(words, tables[0][name], strict=True))
            donor = dict(zip(longer, tables[2][name], strict=True))
            picked = [found.get(w, base.get(w, donor[w])) for w in order]
            picked += [torch.stack(picked).mean(0)] * (rows - len(order))  # mergekit's padding
            aligned.append({name: torch.stack(picked)})
        expected = expected_of(aligned, parameters)
        assert_equal_states({name: merged[name]}, expected, aligned[0])
    assert model(input_ids=torch.arange(12).reshape(2, 6)).logits.isfinite().all()


def test_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("models", "Llama", ["base", "code", "math", "chat"])
    text_of = (EXAMPLES / "stages.yml").read_text()
    (command,) = re.findall(r"`(mergekit-multi [^`]*)`", text_of)
    arguments = command.replace("stages.yml", str(EXAMPLES / "stages.yml"), 1).split()
    run(*arguments, "--no-copy-tokenizer")
    first, second = yaml.safe_load_all(text_of)
    states = {n: tensors(f"models/{n}") for n in ("base", "code", "math", "chat")}
    states["technical"] = tensors("stages/technical")
    inputs = [states["base"], states["code"], states["math"]]
    expected = expected_of(inputs, first["parameters"])
    assert_equal_states(states["technical"], expected, inputs[0])
    inputs = [states["base"], states["technical"], states["chat"]]
    expected = expected_of(inputs, second["parameters"])
    assert_equal_states(tensors("merged"), expected, inputs[0])
    assert_alive(load("Llama", "merged"), "Llama", build("Llama"))


def test_evolution(tmp_path, monkeypatch):
    """The genome takes the method, and what it makes of a genotype merges as it says."""
    from mergekit.evo.config import EvolMergeConfiguration
    from mergekit.evo.genome import ModelGenome

    monkeypatch.chdir(tmp_path)
    save("models", "Llama", ["base", "code", "math"])
    document = yaml.safe_load((EXAMPLES / "evolution.yml").read_text())
    config = EvolMergeConfiguration.model_validate(document)
    assert config.random_init
    genome = ModelGenome(config.genome)
    genotype = genome.initial_genotype(random=True)
    assert genotype.shape == (1, 2, 1, 2)  # groups of layers, models, filters, weight and density
    genotype[0, :, 0] = torch.tensor([[0.75, 0.25], [1.25, 0.0]])
    pathlib.Path("evolved.yml").write_text(genome.genotype_merge_config(genotype).to_yaml())
    run("mergekit-yaml", "evolved.yml", "merged", "--no-copy-tokenizer")
    states = [tensors(f"models/{name}") for name in ("base", "code", "math")]
    states = [{n: t.bfloat16() for n, t in state.items()} for state in states]
    for name, tensor in tensors("merged").items():
        rows = [state[name] for state in states]
        expected = reference(rows[0], rows[1:], density=[0.25, 0.0], weight=[0.75, 1.25])
        assert_equal_states({name: tensor}, {name: expected}, {name: rows[0]})
    assert_alive(load("Llama", "merged"), "Llama", build("Llama"))


# --- Tensors that are not matrices of weights -----------------------------------------------


def test_buffers_scalars_and_empty_tensors_survive(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = []
    for number, name in enumerate(("base", "code", "math")):
        generator = torch.Generator().manual_seed(number)
        state = {
            "logit_scale": torch.tensor(4.6 + number),
            "position_ids": torch.arange(7)[None],
            "mask": torch.tensor([True, False]),
            "empty": torch.empty(0, 5),
            "one": torch.ones(1) + number,
            "weight": torch.randn(9, 5, generator=generator),
        }
        states.append(state)
        pathlib.Path("models", name).mkdir(parents=True)
        save_file(state, f"models/{name}/model.safetensors")
    run("mergekit-pytorch", EXAMPLES / "one-file.yml", "merged")
    merged = tensors("merged")
    assert set(merged) == set(states[0])
    for name in set(states[0]) - {"weight"}:
        assert merged[name].dtype == states[0][name].dtype
        assert torch.equal(merged[name], states[0][name]), name
    parameters = yaml.safe_load((EXAMPLES / "one-file.yml").read_text())["parameters"]
    weights = [{"weight": state["weight"]} for state in states]
    found = {"weight": merged["weight"]}
    assert_equal_states(found, expected_of(weights, parameters), weights[0])


def test_optional_tensors_that_some_models_lack():
    """Of one holder: its tensor, untouched. Of base and some: merged. Without the base: refused."""
    from mergekit.options import MergeOptions
    from test_plan import plain_task

    from mergekit_pcb import PCBError
    from mergekit_pcb.host.nodes import nodes_of
    from mergekit_pcb.host.plan import Plan

    plain, models = plain_task(dare_density=0.5)
    base, first, second = models
    (task,) = nodes_of(Plan([plain], MergeOptions()))
    tensors_of = {m: torch.randn(9, 7).double() for m in models}
    for holder in (base, first):
        assert torch.equal(task.execute({holder: tensors_of[holder]}), tensors_of[holder])
    found = task.execute({m: tensors_of[m] for m in (base, second)})
    factors = dare_factors(0, 1, "w", 63, 0.5)[None]
    expected = reference(tensors_of[base], [tensors_of[second]], dare=factors)
    assert torch.allclose(found, expected, rtol=1e-12)
    with pytest.raises(PCBError, match=r"the base model \./b lacks it"):
        task.execute({m: tensors_of[m] for m in (first, second)})
