"""`refine: solve` and `spectrum` through the stock commands: which matrices, stored how."""

import json
import logging
import math
import pathlib
import re
import shutil
import threading

import mergekit.merge_methods
import pytest
import torch
import yaml
from checkpoints import configuration, merge, run, save_family, tensors, tiny_llama
from click.testing import CliRunner
from families import build, save
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from reference import dare_factors, refined
from reference import pcb as reference
from safetensors.torch import save_file
from test_bad_input import SENTENCE, refused, unreadable  # noqa: F401 - a fixture
from test_families import fused
from test_plan import run_in_process
from test_whole_model import whole_reference

from mergekit_pcb import PCBError, combine, contributions
from mergekit_pcb.host import architecture as host_architecture
from mergekit_pcb.host import refined as host_refined
from mergekit_pcb.host.architecture import Architecture
from mergekit_pcb.host.kinds import Kind, fitted, kinds_of
from mergekit_pcb.tools import cli

DENSITY = 0.2
#: For each family, by a pattern of what is solved: [out, in] or [in, out], or flattened to it.
PATTERNS = {
    "Llama": {r"(_proj|lm_head)\.weight$": "rows"},
    "Llama, tied head": {r"_proj\.weight$": "rows"},
    "Qwen3 MoE": {r"(_proj|lm_head)\.weight$|experts\.(down|gate_up)_proj$": "rows"},
    "Mixtral": {r"(_proj|lm_head)\.weight$|experts\.(down|gate_up)_proj$": "rows"},
    "gpt-oss": {
        r"(_proj|lm_head)\.weight$": "rows",
        r"experts\.(down|gate_up)_proj$": "columns",
    },
    "GPT-2": {r"\.(c_attn|c_proj|c_fc)\.weight$": "columns"},
    "BERT classifier": {r"(query|key|value|dense|classifier)\.weight$": "rows"},
    "T5": {r"\.(q|k|v|o|wi|wo)\.weight$": "rows"},
    "CLIP": {r"(_proj|fc1|fc2|projection)\.weight$": "rows", r"patch_embedding": "convolution"},
    "ViT classifier": {
        r"(query|key|value|dense|classifier|[qkvo]_proj|fc1|fc2)\.weight$": "rows",
        r"patch_embeddings\.projection\.weight": "convolution",
    },
    "Whisper": {r"(_proj|fc1|fc2)\.weight$|proj_out": "rows", r"conv[12]\.weight": "convolution"},
}
RAW = ("T5", "CLIP", "ViT classifier", "Whisper")


def kind_in(patterns, name):
    return next((kind for pattern, kind in patterns.items() if re.search(pattern, name)), None)


def expected(states, patterns, *, prior=None, factors=None, density=DENSITY, **chosen):
    """The reference for every tensor: refined where a pattern says so, else PCB's own."""
    wanted = {}
    for name, base in states[0].items():
        tasks = [state[name] for state in states[1:]]
        own = None if factors is None else factors[name]
        plain = reference(base, tasks, density=density, dare=own) if prior is None else prior[name]
        kind = kind_in(patterns, name)
        if kind is None or base.ndim < 2:
            wanted[name] = plain
            continue
        rows = [base, *tasks, plain]
        masks = [] if own is None else [row.view(base.shape) for row in own]
        rows, shape = [*rows, *masks], base.shape
        if kind == "convolution":
            rows = [row.flatten(1) for row in rows]
        if base.ndim == 2 or kind == "convolution":
            rows = [row[None] for row in rows]
        if kind == "columns":
            rows = [row.transpose(1, 2) for row in rows]
        found = []
        for base_row, *others in zip(*rows, strict=True):
            n = len(tasks)
            found.append(
                refined(
                    base_row,
                    others[:n],
                    others[n].double() - base_row.double(),
                    dare=others[n + 1 :] or None,
                    **chosen,
                )
            )
        made = torch.stack(found)
        wanted[name] = (made.transpose(1, 2) if kind == "columns" else made).reshape(shape)
    return wanted


def assert_close(merged, wanted, base, tolerance=4e-4):
    assert set(merged) == set(wanted)
    for name, tensor in merged.items():
        delta = (wanted[name].double() - base[name].double()).norm()
        rounding = torch.finfo(tensor.dtype).eps * wanted[name].double().norm()
        found = (tensor.double() - wanted[name].double()).norm()
        assert found <= tolerance * delta + rounding, name


def loaded(family, folder):
    """What mergekit makes of a checkpoint: mixtures as transformers holds them, fused."""
    if family in ("Mixtral", "gpt-oss"):
        return dict(type(build(family)).from_pretrained(folder).state_dict())
    return fused(tensors(folder))


@pytest.mark.parametrize("family", PATTERNS)
def test_family(tmp_path, family):
    folders = save(tmp_path / "models", family, ["base", "a", "b", "c"])
    parameters = {"density": DENSITY, "refine": "solve"}
    if family in RAW:
        files = [folder / "model.safetensors" for folder in folders]
        config = configuration(files, parameters=parameters)
        out, result = merge(tmp_path, config, command="mergekit-pytorch")
    else:
        config = configuration(folders, parameters=parameters)
        out, result = merge(tmp_path, config)
    states = [loaded(family, folder) for folder in folders]
    merged = tensors(out)
    wanted = expected(states, PATTERNS[family])
    assert_close(merged, wanted, states[0])
    assert "taken for" not in result.stderr
    assert "no configuration" not in result.stderr
    solved = [name for name in states[0] if kind_in(PATTERNS[family], name)]
    assert len(solved) >= 8


LLAMA = PATTERNS["Llama"]


@pytest.mark.parametrize("dare", [1.0, 0.5])
def test_the_whole_model_is_the_prior(tmp_path, family, dare):
    parameters = {"scope": "model", "density": DENSITY, "refine": "solve", "dare_density": dare}
    states = [tensors(path) for path in family]
    factors = {
        name: torch.stack([dare_factors(0, task, name, t.numel(), dare) for task in range(3)])
        for name, t in states[0].items()
    }
    thinned = [states[0]]
    for task, state in enumerate(states[1:]):
        thinned.append(
            {
                name: states[0][name].double()
                + (t.double() - states[0][name].double()) * factors[name][task].view(t.shape)
                for name, t in state.items()
            }
        )
    prior = whole_reference(thinned, density=DENSITY)
    out, _ = merge(tmp_path, configuration(family, parameters=parameters))
    assert_close(tensors(out), expected(thinned, LLAMA, prior=prior), states[0], 1e-3)


def test_filters_choose_what_is_refined_and_how(tmp_path, family):
    parameters = {
        "density": DENSITY,
        "refine": [{"filter": "lm_head", "value": "none"}, {"value": "solve"}],
        "anchor": [{"filter": "mlp", "value": 0.5}, {"value": 0.05}],
        "spectrum": [{"filter": "q_proj", "value": 0.5}, {"value": 1}],
    }
    out, _ = merge(tmp_path, configuration(family, parameters=parameters))
    states, merged = [tensors(path) for path in family], tensors(out)
    wanted = expected(states, {r"mlp.*_proj": "rows"}, anchor=0.5, spectrum=1.0)
    wanted |= {
        name: tensor
        for pattern, exponent in ((r"[kvo]_proj", 1.0), (r"q_proj", 0.5))
        for name, tensor in expected(
            states, {pattern: "rows"}, anchor=0.05, spectrum=exponent
        ).items()
        if re.search(pattern, name)
    }
    assert_close(merged, wanted, states[0])


def test_the_spectrum_alone(tmp_path, family):
    out, _ = merge(
        tmp_path, configuration(family, parameters={"density": DENSITY, "spectrum": "auto"})
    )
    states = [tensors(path) for path in family]
    assert_close(tensors(out), expected(states, LLAMA, anchor=None), states[0], 1e-3)


def test_none_leaves_every_bit(tmp_path, family):
    plain, _ = merge(tmp_path / "a", configuration(family, parameters={"density": DENSITY}))
    parameters = {"density": DENSITY, "refine": "none", "anchor": 3, "spectrum": 1}
    given, result = merge(tmp_path / "b", configuration(family, parameters=parameters))
    assert result.stderr.count("refine") == 0
    for name, tensor in tensors(plain).items():
        assert torch.equal(tensor, tensors(given)[name]), name


def test_slices_are_what_they_are_in_the_base(tmp_path, family):
    """Layers change their numbers; what a tensor is follows from where it comes from."""
    ranges = [[2, 4], [0, 2]]
    config = {
        "merge_method": "pcb",
        "base_model": str(family[0]),
        "parameters": {"density": DENSITY, "refine": "solve"},
        "slices": [
            {"sources": [{"model": str(path), "layer_range": r} for path in family]} for r in ranges
        ],
    }
    out, result = merge(tmp_path, config)
    assert "not known" not in result.stderr

    def moved(state):
        return {
            re.sub(r"layers\.(\d)", lambda m: f"layers.{(int(m[1]) + 2) % 4}", name): tensor
            for name, tensor in state.items()
        }

    states = [moved(tensors(path)) for path in family]
    assert_close(tensors(out), expected(states, LLAMA), states[0])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_adapters(tmp_path):
    import peft

    paths = save_family(tmp_path / "models", tiny_llama(), tasks=0)
    adapters = []
    for seed in range(2):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        torch.manual_seed(seed)
        adapters.append(tmp_path / f"lora{seed}")
        peft.get_peft_model(tiny_llama(), config).save_pretrained(adapters[-1])
    names = [paths[0], *(f"{paths[0]}+{adapter}" for adapter in adapters)]
    config = configuration(names, parameters={"density": DENSITY, "refine": "solve"})
    cache = tmp_path / "cache"
    merged = tensors(merge(tmp_path, config, "--lora-merge-cache", cache)[0])
    # The cache is named by hashes, so either order; tasks may be swapped without a difference.
    states = [tensors(paths[0]), *(tensors(path) for path in sorted(cache.iterdir()))]
    assert_close(merged, expected(states, LLAMA), states[0], 2e-3)
    for name, tensor in merged.items():
        if "q_proj" not in name and "up_proj" not in name:
            assert torch.equal(tensor, states[0][name]), name


# --- What is not known ------------------------------------------------------------------------


def test_files_without_a_configuration_are_assumed_and_that_is_said(tmp_path, family):
    files = []
    for path in family:
        state = {n: t for n, t in tensors(path).items() if "layers.0" in n or "embed" in n}
        files.append(tmp_path / f"{path.name}.safetensors")
        save_file(state, files[-1])
    parameters = {
        "density": DENSITY,
        "refine": [{"filter": "embed", "value": "none"}, {"value": "solve"}],
    }
    config = configuration(files, parameters=parameters)
    out, result = merge(tmp_path, config, command="mergekit-pytorch")
    assert result.stderr.count("so 7 matrices are refined as weights of linear layers") == 1
    assert "has no configuration that transformers knows" in result.stderr
    states = [tensors(file) for file in files]
    assert_close(tensors(out), expected(states, LLAMA), states[0])


def test_tensors_of_unknown_layout_are_left_to_pcb_and_named(tmp_path):
    folders = save(tmp_path / "models", "Qwen3 MoE", ["base", "a", "b"])
    config = configuration(folders, parameters={"density": DENSITY, "refine": "solve"})
    _, result = merge(tmp_path, config)
    said = [line for line in result.stderr.splitlines() if "unrefined" in line]
    assert len(said) == 1
    assert "2 tensors keep PCB's merge unrefined" in said[0]
    assert "model.layers.0.mlp.gate.weight, model.layers.1.mlp.gate.weight" in said[0]


def test_threads_that_read_architectures_leave_logging_as_it_was():
    entered, left = threading.Event(), threading.Event()

    def other():
        with host_architecture._quiet():
            entered.set()
            assert left.wait(10)

    with host_architecture._quiet():
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(0.2)
    left.set()
    thread.join()
    assert entered.is_set()
    assert logging.root.manager.disable == logging.NOTSET


def test_an_architecture_that_cannot_be_built_is_no_secret(tmp_path, family):
    paths = [shutil.copytree(path, tmp_path / path.name) for path in family]
    for path in paths:
        text = (path / "config.json").read_text()
        (path / "config.json").write_text(
            text.replace('"num_attention_heads": 4', '"hidden_act": "none such"')
        )
    config = configuration(paths, parameters={"refine": "solve"})
    _, result = merge(tmp_path, config)
    assert "30 matrices are refined as weights of linear layers, [out, in]" in result.stderr


def test_a_filter_that_leaves_nothing_is_remarked(tmp_path, family):
    parameters = {"refine": [{"filter": "norm", "value": "solve"}, {"value": "none"}]}
    _, result = merge(tmp_path, configuration(family, parameters=parameters))
    assert result.stderr.count("no tensor is refined") == 1


def test_remote_code_runs_only_where_mergekit_was_allowed_it(tmp_path, monkeypatch):
    from mergekit.common import ModelReference

    from mergekit_pcb.host.architecture import architecture_of

    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    own = '"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "own.Own"},'
    text = re.sub(r'"architectures": \[[^\]]*\],', own, file.read_text())
    file.write_text(text)
    mark = tmp_path / "was here"
    (tmp_path / "model" / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import LlamaForCausalLM\n\n"
        "class Own(LlamaForCausalLM):\n    pass\n"
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    reference_ = ModelReference.model_validate(str(tmp_path / "model"))
    architecture_of(reference_, trust_remote_code=False)
    assert not mark.exists()
    found = architecture_of(reference_, trust_remote_code=True)
    assert mark.exists()
    assert found is not None
    assert found.kind("model.layers.0.mlp.up_proj.weight") is Kind.ROWS


def test_kinds_are_those_of_modules():
    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 4)
            self.embedding = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5)
            self.head.weight = self.embedding.weight
            self.convolution = torch.nn.Conv2d(2, 4, 3)
            self.grouped = torch.nn.Conv1d(4, 4, 3, groups=4)
            self.attention = torch.nn.MultiheadAttention(4, 2)
            self.loose = torch.nn.Parameter(torch.zeros(2, 2))
            self.norm = torch.nn.LayerNorm(4)

    kinds = kinds_of(Parts())
    assert {name for name, kind in kinds.items() if kind is Kind.ROWS} == {
        "linear.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert kinds["convolution.weight"] is Kind.CONVOLUTION
    assert kinds["embedding.weight"] is kinds["head.weight"] is Kind.ELEMENTS
    assert {name for name, kind in kinds.items() if kind is Kind.UNKNOWN} == {
        "grouped.weight",
        "loose",
    }


# --- In memory ----------------------------------------------------------------------------------


def in_memory():
    model = build("GPT-2")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        experts.append(
            {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        )
    return model, base, experts


def test_a_module_says_what_its_tensors_are(caplog):
    model, base, experts = in_memory()
    patterns = PATTERNS["GPT-2"]
    for how in ({"base": model}, {"base": base, "architecture": model}):
        start = how.pop("base")
        parts = contributions(start, experts, density=DENSITY, refine="solve", **how)
        merged = combine(start, parts, [1.0] * 3)
        names = [name for name in base if name != "lm_head.weight"]
        states = [{n: s[n] for n in names} for s in (base, *experts)]
        assert_close({n: merged[n] for n in names}, expected(states, patterns), states[0])
    # transformers has something to say of so small a vocabulary; only the base ties its head.
    own = [record for record in caplog.records if record.name.startswith("mergekit_pcb")]
    assert all("are one tensor in the base" in record.getMessage() for record in own)


def test_what_a_module_does_not_tell_is_named(caplog):
    class Loose(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 5)
            self.loose = torch.nn.Parameter(torch.randn(4, 4))

    torch.manual_seed(0)
    module = Loose()
    base = module.state_dict()
    experts = [{n: t + 0.1 * torch.randn(t.shape) for n, t in base.items()} for _ in range(2)]
    parts = contributions(module, experts, density=DENSITY, refine="solve")
    (record,) = caplog.records
    assert "1 tensors keep PCB's merge unrefined" in record.getMessage()
    assert "(loose)" in record.getMessage()
    assert set(parts.spectra) == {"linear.weight"}
    caplog.clear()
    contributions(module, experts, density=DENSITY)
    assert not caplog.records


def test_state_dicts_are_assumed_and_that_is_said(caplog):
    _, base, experts = in_memory()
    names = [name for name in base if name.endswith("c_proj.weight") or "ln_" in name]
    states = [{n: s[n] for n in names} for s in (base, *experts)]
    wanted = expected(states, {"c_proj": "rows"})
    with caplog.at_level(logging.WARNING):
        merged = merge_state_dicts(
            states, "pcb", base=0, parameters={"density": DENSITY, "refine": "solve"}
        )
    assert_close(merged, wanted, states[0])
    (record,) = [one for one in caplog.records if one.name.startswith("mergekit_pcb")]
    assert "so 4 matrices are refined as weights of linear layers" in record.getMessage()
    one = merge_tensors(
        [state[names[1]] for state in states],
        "pcb",
        base_index=0,
        parameters={"density": DENSITY, "refine": "solve", "spectrum": 1},
    )
    assert one.shape == states[0][names[1]].shape


def test_a_merge_without_a_plan_is_refused():
    from mergekit.merge_methods.base import TensorGroup

    method = mergekit.merge_methods.get("pcb")
    group = TensorGroup.from_tensors([torch.ones(2, 2), torch.zeros(2, 2)], base_index=0, name="w")
    values = method._bind_parameters([group], {"refine": "solve"})
    del values[0]["known"]
    with pytest.raises(PCBError, match="refine or spectrum for tensor w, because this merge was"):
        method._execute_resolved([group], values)


# --- Bad input ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("refine", "yes"),
        ("refine", True),
        ("anchor", 0),
        ("anchor", -1),
        ("anchor", float("inf")),
        ("anchor", "strong"),
        ("spectrum", 1.5),
        ("spectrum", -0.1),
        ("spectrum", "some"),
        ("spectrum", True),
        ("spectrum", float("nan")),
        ("spectrum", [{"filter": "mlp", "value": 2}, {"value": "auto"}]),
    ],
)
def test_values_out_of_range(tmp_path, family, name, value):
    sentence = refused(tmp_path, configuration(family, parameters={name: value}))
    assert f"use {name}: " in sentence
    assert "write " in sentence


@pytest.mark.usefixtures("unreadable")
def test_a_matrix_that_is_too_large_is_refused_before_anything_is_read(
    tmp_path, family, monkeypatch
):
    monkeypatch.setattr(host_refined, "_memory_of", lambda _: 50_000)
    config = configuration(family, parameters={"refine": "solve"})
    sentence = refused(tmp_path, config)
    assert "refine tensor model.layers.0.mlp.up_proj.weight, because its 96 × 32 matrix" in sentence
    file = tmp_path / "config.yml"
    result = CliRunner().invoke(cli.main, ["check", str(file)])
    assert result.exit_code == 1
    assert "its 96 × 32 matrix takes" in result.output
    parameters = {"refine": [{"filter": "mlp", "value": "none"}, {"value": "solve"}]}
    file.write_text(yaml.safe_dump(configuration(family, parameters=parameters)))
    assert "matrix takes" not in CliRunner().invoke(cli.main, ["check", str(file)]).output


def test_nan_is_named_and_nothing_is_written(tmp_path, family):
    files = []
    for path in family[:3]:
        files.append(tmp_path / f"{path.name}.safetensors")
        save_file({"a.weight": tensors(path)["model.layers.0.mlp.up_proj.weight"]}, files[-1])
    state = tensors(files[1])
    state["a.weight"][3, 3] = float("nan")
    save_file(state, files[1])
    config = configuration(files, parameters={"refine": "solve"})
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(mergekit_pytorch, [str(file), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert SENTENCE.search(result.output)
    assert f"{files[1]} holds NaN or infinity" in result.output
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_integers_are_not_refined():
    tensors_ = [torch.full((4, 4), number) for number in range(3)]
    with pytest.raises(PCBError, match=r"it holds torch.int64, and task vectors need"):
        merge_tensors(tensors_, "pcb", base_index=0, name="w", parameters={"refine": "solve"})


# --- Tools --------------------------------------------------------------------------------------


def test_check_says_what_is_refined_and_how_long_it_takes(tmp_path, family):
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(configuration(family, parameters={"refine": "solve"})))
    result = run("mergekit-pcb", "check", file)
    assert re.search(r"^29 tensors are refined: [\d.e+]+ operations, about ", result.stdout, re.M)
    plain = tmp_path / "plain.yml"
    plain.write_text(yaml.safe_dump(configuration(family)))
    assert "refined" not in run("mergekit-pcb", "check", plain).stdout


def test_report_says_how_far_and_with_which_exponent(tmp_path, family):
    file, out = tmp_path / "config.yml", tmp_path / "report"
    parameters = {"density": DENSITY, "refine": "solve", "lambda": 1.5}
    file.write_text(yaml.safe_dump(configuration(family, parameters=parameters)))
    said = run("mergekit-pcb", "report", file, "-o", out).stdout
    assert "refine changes 29 tensors" in said
    assert "before refine" in said
    data = json.loads((out / "report.json").read_text())["tensors"]
    states = [tensors(path) for path in family]
    wanted = expected(states, LLAMA)
    for name, counts in data.items():
        base, tasks = states[0][name].double(), [state[name] for state in states[1:]]
        plain = reference(base, tasks, density=DENSITY)
        if not re.search(next(iter(LLAMA)), name):
            assert counts["refined"] == counts["matrices"] == 0
            continue
        moved = math.sqrt(counts["moved_sq"] / counts["pcb_sq"])
        away = (wanted[name] - plain).norm() / (plain - base).norm()
        assert moved == pytest.approx(float(away), rel=1e-3)
        assert math.sqrt(counts["merged_sq"]) == pytest.approx(
            1.5 * float((wanted[name] - base).norm()), rel=1e-3
        )
        taus = torch.stack([task.double() - base for task in tasks])
        agreement = taus.sum(0).norm() / (3 * taus.square().sum()).sqrt()
        assert counts["exponents"] == pytest.approx(float(agreement), rel=1e-5)
    page = (out / "report.html").read_text()
    assert "Where do the experts agree?" in page
    assert "Where do the experts agree?" not in _plain_page(tmp_path, family)


def _plain_page(tmp_path, family):
    file, out = tmp_path / "plain.yml", tmp_path / "plain"
    file.write_text(yaml.safe_dump(configuration(family)))
    run("mergekit-pcb", "report", file, "-o", out)
    return (out / "report.html").read_text()


def test_a_trial_of_a_search_is_the_merge(tmp_path, family):
    """The best of two trials, merged by the stock command, is what was scored."""
    file, best = tmp_path / "config.yml", tmp_path / "best.yml"
    parameters = {"density": DENSITY, "refine": "solve"}
    file.write_text(yaml.safe_dump(configuration(family, parameters=parameters)))
    kept = tmp_path / "kept"
    kept.mkdir()
    script = tmp_path / "score.py"
    script.write_text(
        "import pathlib, shutil, sys\n"
        f"kept = pathlib.Path({str(kept)!r})\n"
        "number = len(list(kept.iterdir()))\n"
        "shutil.copytree(sys.argv[1], kept / str(number))\n"
        "print(number)\n"
    )
    command = f"python {script} {{model}}"
    searched = run(
        "mergekit-pcb", "search", file, "--evaluate", command, "--budget", "2", "-o", best
    )
    said = searched.stdout + searched.stderr
    assert said.count("evens the singular values of 29 matrices") == 1
    config = yaml.safe_load(best.read_text())
    out, _ = merge(tmp_path, config)
    scored, merged, base = tensors(kept / "1"), tensors(out), tensors(family[0])
    assert set(scored) == set(merged)
    for name, tensor in merged.items():
        delta = (tensor - base[name]).norm() + 1e-12
        assert (scored[name] - tensor).norm() <= 1e-3 * delta + 1e-6 * base[name].norm(), name
    weights = [model["parameters"]["weight"] for model in config["models"]]
    assert weights != [1.0] * 3
    assert pathlib.Path(kept / "0").exists()


def test_tensors_that_lie_the_other_way_round_than_their_module(tmp_path, family, monkeypatch):
    """As the experts of released Qwen3-VL mixtures, of one name in both."""
    shape = Architecture.shape

    def turned(self, name):
        found = shape(self, name)
        return tuple(reversed(found)) if "up_proj" in name else found

    monkeypatch.setattr(Architecture, "shape", turned)
    parameters = {"density": DENSITY, "refine": "solve"}
    run_in_process(configuration(family, parameters=parameters), tmp_path / "out")
    merged, states = tensors(tmp_path / "out"), [tensors(path) for path in family]
    # Of modules that say nothing of their shape, as the file has them.
    monkeypatch.setattr(Architecture, "shape", lambda *_: None)
    run_in_process(configuration(family, parameters=parameters), tmp_path / "plain")
    plain = tensors(tmp_path / "plain")
    for name, tensor in merged.items():
        if "up_proj" not in name:
            assert torch.equal(tensor, plain[name])
            continue
        base, *experts = [{"w": state[name].T.contiguous()} for state in states]
        parts = contributions(base, experts, density=DENSITY, refine="solve")
        found = combine(base, parts, [1.0] * 3)["w"].T
        away = (plain[name] - found).norm() / (found - states[0][name]).norm()
        assert away > 0.1, "it matters"
        assert torch.allclose(tensor, found, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "known", "shape", "expected"),
    [
        (Kind.ROWS, (4, 24, 32), (4, 32, 24), Kind.COLUMNS),
        (Kind.COLUMNS, (4, 24, 32), (4, 32, 24), Kind.ROWS),
        (Kind.ROWS, (4, 24, 32), (4, 24, 32), Kind.ROWS),
        (Kind.ROWS, (64, 32), (70, 32), Kind.ROWS),  # a head of a larger vocabulary
        (Kind.ROWS, (32, 32), (32, 32), Kind.ROWS),
        (Kind.ROWS, None, (32, 24), Kind.ROWS),
        (Kind.UNKNOWN, (24, 32), (32, 24), Kind.UNKNOWN),
    ],
)
def test_which_way_a_tensor_lies(kind, known, shape, expected):
    assert fitted(kind, known, shape) is expected
