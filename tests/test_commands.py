"""mergekit's stock commands on real checkpoints, as users run them."""

import pathlib

import pytest
import torch
import yaml
from checkpoints import configuration, merge, run, save_family, tensors, tiny_llama
from reference import pcb as reference
from safetensors.torch import save_file


def assert_equals_reference(out, paths, dtype=None, *, per_tensor=None, **parameters):
    """Every tensor of the output equals the reference; ``per_tensor(name)`` adds parameters.

    The stored result is base plus delta in its own dtype, so that rounding is allowed for.
    """
    base, *experts = [tensors(path) for path in paths]
    merged = tensors(out)
    assert set(merged) == set(base)
    for name, tensor in base.items():
        cast = [state[name].to(dtype or tensor.dtype) for state in (base, *experts)]
        chosen = {**parameters, **(per_tensor(name) if per_tensor else {})}
        expected = reference(cast[0], cast[1:], **chosen)
        rounding = torch.finfo(merged[name].dtype).eps * cast[0].double().norm()
        error = (merged[name].double() - expected).norm()
        assert error <= 1e-5 * (expected - cast[0].double()).norm() + rounding, name


@pytest.mark.parametrize(("tied", "shard_size"), [(False, "10GB"), (False, "60KB"), (True, "60KB")])
def test_mergekit_yaml_equals_the_reference_on_every_tensor(tmp_path, tied, shard_size):
    paths = save_family(tmp_path / "models", tiny_llama(tied=tied), shard_size=shard_size)
    shards = len(list(paths[0].glob("*.safetensors")))
    assert (shards > 1) == (shard_size == "60KB")
    parameters = {"density": 0.2, "lambda": 1.2, "clip": 0.01}
    out, result = merge(tmp_path, configuration(paths, parameters=parameters))
    assert "warning" not in result.stderr.lower()
    assert_equals_reference(out, paths, density=0.2, lam=1.2, clip=0.01)
    card = (out / "README.md").read_text()
    assert "[PCB-Merging](https://arxiv.org/abs/2410.02396)" in card
    loaded = load(out)
    assert loaded(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def test_defaults_need_no_parameters_at_all(tmp_path, family):
    out, _ = merge(tmp_path, configuration(family), command="mergekit-yaml")
    assert_equals_reference(out, family, density=0.1)


def test_weights_densities_filters_and_gradients_per_model(tmp_path, family):
    per_model = [
        {"weight": [2.0, 0.5]},
        {"density": [{"filter": "mlp", "value": 0.4}, {"value": 0.05}]},
        {},
    ]
    config = configuration(
        family,
        per_model=per_model,
        parameters={
            "clip": [0.0, 0.1],
            "density": 0.3,
            "weight": 0.9,
            "lambda": [{"filter": "mlp", "value": 2.0}, {"value": [1.0, 0.5]}],
        },
    )
    out, _ = merge(tmp_path, config, "--out-shard-size", "20000")

    def per_tensor(name):
        layer = int(name.split(".")[2]) if ".layers." in name else None
        # mergekit resolves gradients outside the layers at their start.
        position = 0 if layer is None else layer / 3
        second = 0.4 if "mlp" in name else 0.05
        return {
            "weight": [2.0 + position * (0.5 - 2.0), 0.9, 0.9],
            "density": [0.3, second, 0.3],
            "clip": 0.1 * position,
            "lam": 2.0 if "mlp" in name else 1.0 - 0.5 * position,
        }

    assert_equals_reference(out, family, per_tensor=per_tensor)
    assert len(list(out.glob("*.safetensors"))) > 1


def test_bfloat16_checkpoints_and_dtypes(tmp_path):
    paths = save_family(tmp_path / "models", tiny_llama(dtype=torch.bfloat16))
    out, _ = merge(tmp_path, configuration(paths, dtype="float32", out_dtype="float16"))
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.float16}
    assert_equals_reference(out, paths, torch.float32)


def test_mergekit_multi_feeds_one_pcb_merge_into_another(tmp_path, family):
    first = {**configuration(family[:3], parameters={"density": 0.3}), "name": "first"}
    second = configuration([family[0], "first", family[3]], parameters={"density": 0.5})
    file = tmp_path / "multi.yml"
    file.write_text(yaml.safe_dump_all([first, second]))
    stages = tmp_path / "stages"
    run("mergekit-multi", file, "-I", stages, "--out-path", tmp_path / "out", "--no-copy-tokenizer")
    assert_equals_reference(stages / "first", family[:3], density=0.3)
    assert_equals_reference(tmp_path / "out", [family[0], stages / "first", family[3]], density=0.5)


def test_mergekit_pytorch_on_plain_safetensors(tmp_path, family):
    files = []
    for path in family:
        files.append(tmp_path / f"{pathlib.Path(path).name}.safetensors")
        save_file({**tensors(path), "ids": torch.arange(5)}, files[-1])
    out, _ = merge(
        tmp_path, configuration(files, parameters={"density": 0.2}), command="mergekit-pytorch"
    )
    assert torch.equal(tensors(out)["ids"], torch.arange(5))
    merged = tensors(out)
    del merged["ids"]
    save_file(merged, tmp_path / "merged.safetensors")
    assert_equals_reference(tmp_path / "merged.safetensors", family, density=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["yaml", "pytorch"])
def test_own_commands_work_with_start_up_files_switched_off(tmp_path, family, command):
    paths = family
    if command == "pytorch":
        paths = [tmp_path / f"{pathlib.Path(path).name}.safetensors" for path in family]
        for source, target in zip(family, paths, strict=True):
            save_file(tensors(source), target)
    file, out = tmp_path / "config.yml", tmp_path / "merged"
    file.write_text(yaml.safe_dump(configuration(paths)))
    off = {"MERGEKIT_PCB_AUTOLOAD": "0"}
    refused = run(f"mergekit-{command}", file, out, check=False, **off)
    assert refused.returncode
    assert "Unimplemented merge method pcb" in refused.stderr
    run("mergekit-pcb", command, file, out, **off)
    assert_equals_reference(out, paths, density=0.1)


def test_a_stock_method_is_left_as_it_is(tmp_path, family):
    config = {"merge_method": "linear", "models": [{"model": str(p)} for p in family[1:]]}
    config["parameters"] = {"weight": 1.0}
    out, _ = merge(tmp_path, config)
    expected = torch.stack([tensors(path)["lm_head.weight"] for path in family[1:]]).mean(0)
    assert torch.allclose(tensors(out)["lm_head.weight"], expected)


def test_the_help_fits_on_a_screen_and_leaves_nothing_out():
    from click.testing import CliRunner

    from mergekit_pcb.tools import cli

    shown = CliRunner().invoke(cli.main, ["--help"], terminal_width=80).output
    lines = shown.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert "..." not in shown.replace("[ARGS]...", "")
    named = [name for commands in cli.GROUPS.values() for name in commands]
    assert sorted(named) == sorted(cli.main.commands)
    for name, command in cli.main.commands.items():
        if name not in ("yaml", "multi", "pytorch"):  # whose help is mergekit's
            assert "Example: mergekit-pcb" in command.help, name


def test_the_model_card_says_what_the_merge_was(tmp_path, family):
    parameters = {"density": 0.3, "dare_density": 0.5, "seed": 7, "refine": "solve", "anchor": 0.2}
    out, _ = merge(tmp_path, configuration(family, parameters=parameters), command="mergekit-yaml")
    card = (out / "README.md").read_text()
    assert "[PCB-Merging](https://arxiv.org/abs/2410.02396)" in card
    written = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert written["parameters"] == parameters


def test_commands_and_options_complete_in_a_shell():
    """What docs/tools.md puts into ~/.bashrc."""
    script = run("mergekit-pcb", _MERGEKIT_PCB_COMPLETE="bash_source").stdout
    assert "complete -o nosort -F _mergekit_pcb_completion mergekit-pcb" in script
    given = {"COMP_WORDS": "mergekit-pcb se", "COMP_CWORD": "1"}
    assert (
        "plain,search"
        in run("mergekit-pcb", _MERGEKIT_PCB_COMPLETE="bash_complete", **given).stdout
    )
