"""Small checkpoints with real architectures, and the stock commands run on them."""

import pathlib
import sys

import forked
import torch
import yaml
from safetensors import safe_open

#: Given to every merge by mergekit-yaml; see the option --device.
FLAGS = []


def tiny_llama(*, tied=False, hidden=32, layers=4, vocabulary=64, dtype=torch.float32):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def save_family(directory, model, *, tasks=3, shard_size="10GB", size=2e-3):
    """Write a base and its "fine-tuned" experts; return their paths, the base first."""
    directory = pathlib.Path(directory)
    paths = [directory / "base"]
    model.save_pretrained(paths[0], max_shard_size=shard_size)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for task in range(tasks):
        generator = torch.Generator().manual_seed(100 + task)
        state = {
            name: tensor + size * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            for name, tensor in start.items()
        }
        if "lm_head.weight" in state and model.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        paths.append(directory / f"expert{task}")
        model.save_pretrained(paths[-1], max_shard_size=shard_size)
    model.load_state_dict(start)
    return paths


def tensors(path):
    """All tensors of a checkpoint folder or safetensors file."""
    path = pathlib.Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    state = {}
    for file in files:
        with safe_open(file, "pt") as handle:
            state.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return state


def configuration(paths, *, method="pcb", parameters=None, per_model=None, **extra):
    """A mergekit configuration for a base and its experts."""
    models = []
    for index, path in enumerate(paths[1:]):
        models.append({"model": str(path)})
        if per_model:
            models[-1]["parameters"] = per_model[index]
    config = {"merge_method": method, "base_model": str(paths[0]), "models": models, **extra}
    if parameters is not None:
        config["parameters"] = parameters
    return config


def run(command, *arguments, check=True, **environment):
    """Run a console script of this environment, as a user would."""
    script = pathlib.Path(sys.executable).with_name(command)
    result = forked.run(script, arguments, environment)
    if check and result.returncode:
        raise AssertionError(f"{command} failed:\n{result.stdout}\n{result.stderr}")
    return result


def merge(tmp_path, config, *options, command="mergekit-yaml", check=True, **environment):
    """Write the configuration, run a stock command on it, return (output folder, result)."""
    tmp_path.mkdir(exist_ok=True)
    file, out = tmp_path / "config.yml", tmp_path / "merged"
    text = config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
    file.write_text(text)
    arguments = [file, out, *options]
    if command == "mergekit-yaml":
        arguments += ["--no-copy-tokenizer", *FLAGS]
    return out, run(command, *arguments, check=check, **environment)


def study_of(folder):
    """The study of a search's folder, as anybody opens it with Optuna."""
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name=folder.name, storage=storage)


def log_of(folder):
    """The trials of a study that are over."""
    from mergekit_pcb.tools.search_space import rounded

    found = []
    for trial in study_of(folder).get_trials():
        if not trial.state.is_finished():
            continue
        values = {name: v if name == "refine" else rounded(v) for name, v in trial.params.items()}
        weights = [values.pop(name) for name in sorted(values) if name.startswith("weight ")]
        found.append(
            {
                "trial": trial.number + 1,
                "weights": weights,
                "shared": values,
                "score": trial.values[0] if trial.values else None,
                "error": trial.user_attrs["outcome"]["error"],
            }
        )
    return found
