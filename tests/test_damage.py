"""Damaged checkpoints, full disks, names that do things, foreign methods: sentences, no harm."""

import csv
import json
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import yaml
from checkpoints import configuration, merge, run, save_family, tensors, tiny_llama
from click.testing import CliRunner
from safetensors.torch import save_file
from test_bad_input import THREE_BEATS
from test_plan import environment

import mergekit_pcb
from mergekit_pcb.tools import cli, search_files


@pytest.fixture
def paths(tmp_path):
    return save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2, shard_size="30KB")


def truncate(folder):
    file = sorted(folder.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def remove(folder):
    file = sorted(folder.glob("model-*.safetensors"))[1]
    file.unlink()
    return file


def misname(folder):
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.norm.weight"] = "nowhere.safetensors"
    index.write_text(json.dumps(document))
    return folder / "nowhere.safetensors"


def misplace(folder):
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    shards = sorted(set(document["weight_map"].values()))
    right = document["weight_map"]["model.norm.weight"]
    wrong = next(shard for shard in shards if shard != right)
    document["weight_map"]["model.norm.weight"] = wrong
    index.write_text(json.dumps(document))
    return folder / wrong


def garble_index(folder):
    file = folder / "model.safetensors.index.json"
    file.write_text('{"weight_map": {')
    return file


def replace_by_text(folder):
    file = sorted(folder.glob("model-*.safetensors"))[0]
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    return file


def replace_by_page(folder):
    for file in folder.glob("model*"):
        file.unlink()
    file = folder / "model.safetensors"
    file.write_text("<html>")
    return file


DAMAGES = (truncate, remove, misname, misplace, garble_index, replace_by_text, replace_by_page)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("command", ["check", "report", "measure", "search"])
def test_tools_name_the_damaged_file(tmp_path, paths, damage, command):
    file = damage(paths[2])
    config = tmp_path / "c.yml"
    config.write_text(yaml.safe_dump(configuration(paths, parameters={"scope": "model"})))
    options = {
        "check": [],
        "report": ["-o", tmp_path / "out"],
        "measure": ["-o", tmp_path / "out.json"],
        "search": ["-o", tmp_path / "out.yml", "--evaluate", "echo {model} 1", "--budget", 1],
    }[command]
    before = {path for path in tmp_path.rglob("*") if path.suffix != ".jsonl"}
    result = CliRunner().invoke(cli.main, [command, str(config), *map(str, options)])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1, result.output
    assert result.output.count(f"cannot read {file}; because") == 1, result.output
    after = {path for path in tmp_path.rglob("*") if path.suffix != ".jsonl"}
    assert after - before <= {tmp_path / "out.search"}


@pytest.mark.parametrize("damage", [truncate, remove, misplace], ids=lambda damage: damage.__name__)
def test_a_merge_that_measures_names_it_too(tmp_path, paths, damage):
    file = damage(paths[2])
    config = configuration(paths, parameters={"scope": "model"})
    out, result = merge(tmp_path / "m", config, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"cannot read {file}; because" in result.stderr.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_single_files(tmp_path, paths, kind):
    files = []
    for path in paths:
        files.append(tmp_path / f"{path.name}.{kind}")
        save = save_file if kind == "safetensors" else torch.save
        save(tensors(path), files[-1])
    files[1].write_bytes(files[1].read_bytes()[:1000])
    config = tmp_path / "c.yml"
    config.write_text(yaml.safe_dump(configuration(files, parameters={"scope": "model"})))
    result = run("mergekit-pcb", "measure", config, "-o", tmp_path / "s.json", check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"cannot read {files[1]}; because" in result.stderr


# --- Names ----------------------------------------------------------------------------------

NAMES = (r"a$\frac{$", "_hidden", "=HYPERLINK(1)", "\x1b[31mred\x07", "two\nlines", "<b>bold</b>")


def test_names_are_shown_and_do_nothing(tmp_path):
    model = tiny_llama(layers=1)
    paths = save_family(tmp_path / "models", model, tasks=len(NAMES))
    for path, name in zip(paths[1:], NAMES, strict=True):
        path.rename(path.with_name(name.replace("/", "-")))
    named = [paths[0], *(paths[0].with_name(name.replace("/", "-")) for name in NAMES)]
    config, out = tmp_path / "c.yml", tmp_path / "report"
    config.write_text(yaml.safe_dump(configuration(named)))
    result = run("mergekit-pcb", "report", config, "-o", out)
    assert "Warning" not in result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    assert "\x07" not in result.stdout
    assert "\\x1b[31mred\\x07" in result.stdout
    assert "two\\nlines" in result.stdout
    stored = [name.replace("/", "-") for name in NAMES]
    assert json.loads((out / "report.json").read_text())["tasks"] == stored
    with (out / "tensors.csv").open(newline="", encoding="utf-8") as file:
        tasks = [row["task"] for row in csv.DictReader(file)]
    assert set(tasks) == {f"'{n}" if n.startswith("=") else n for n in stored}
    page = (out / "report.html").read_text()
    assert "<b>bold" not in page
    checked = run("mergekit-pcb", "check", config)
    assert "\x1b" not in checked.stdout


def test_legends_show_every_name(monkeypatch):
    """The words of a picture, before they are drawn as paths."""
    from matplotlib.figure import Figure

    from mergekit_pcb.tools import counts, figures

    texts, legends = [], []
    savefig = Figure.savefig

    def saved(figure, *args, **kwargs):
        savefig(figure, *args, **kwargs)
        legends.extend([t.get_text() for t in legend.get_texts()] for legend in figure.legends)
        texts.extend(text for text in figure.findobj(lambda one: hasattr(one, "get_parse_math")))

    monkeypatch.setattr(Figure, "savefig", saved)
    one = counts.TensorCounts.empty(len(NAMES))
    one.elements = one.tensors = 1
    report = counts.Report(
        version="0", configuration="", scope="tensor", tasks=list(NAMES), tensors={"a$b$": one}
    )
    figures.page(report, [["task"]], [])
    shown = [
        r"a$\frac{$",
        "_hidden",
        "=HYPERLINK(1)",
        r"\x1b[31mred\x07",
        r"two\nlines",
        "<b>bold</b>",
    ]
    assert [labels for labels in legends if labels[: len(shown)] == shown]
    assert not [text for text in texts if text.get_parse_math()]


def test_errors_show_names_too(tmp_path):
    config = tmp_path / "c.yml"
    config.write_text(yaml.safe_dump(configuration(["/no/\x1b[31mbase", "/no/\x1b[31mbases"])))
    result = run("mergekit-pcb", "measure", config, "-o", tmp_path / "s.json", check=False)
    assert result.returncode == 1
    assert "\x1b" not in result.stderr
    assert "\\x1b[31mbase" in result.stderr


# --- A disk that is full --------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [40, 100], ids=["while measuring", "while a trial is written"])
def test_a_search_on_a_full_disk(tmp_path, blocks):
    """A limit on the size of files stands in for the disk: contributions are small, models not."""
    paths = save_family(tmp_path / "models", tiny_llama(layers=2), tasks=2, shard_size="30KB")
    config, best = tmp_path / "c.yml", tmp_path / "best.yml"
    config.write_text(yaml.safe_dump(configuration(paths)))
    script = pathlib.Path(sys.executable).with_name("mergekit-pcb")
    command = [
        script,
        "search",
        config,
        "--evaluate",
        "echo {model} 1",
        "--budget",
        "2",
        "-o",
        best,
    ]
    words = " ".join(f"'{word}'" for word in command)
    limited = f"ulimit -f {blocks}; {words} --out-shard-size 1B"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(THREE_BEATS, result.stderr), result.stderr
    assert f"cannot write to {tmp_path / 'best.search'}; because" in result.stderr
    left = {path.name for path in (tmp_path / "best.search").iterdir()}
    assert "trial" not in left
    done = run("mergekit-pcb", *command[1:], "--resume")
    assert "best.yml: score 1 in trial 1" in done.stdout


def test_the_trials_before_the_disk_was_full_are_kept(tmp_path, monkeypatch):
    paths = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2)
    config = tmp_path / "c.yml"
    config.write_text(yaml.safe_dump(configuration(paths)))
    arguments = ["search", str(config), "--evaluate", "echo {model} 1", "--budget", "4"]
    arguments += ["-o", str(tmp_path / "best.yml")]
    made, real = [], search_files._Merges._sum

    def full(self, *args):
        made.append(args)
        real(self, *args)
        if len(made) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(search_files._Merges, "_sum", full)
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 1
    assert "No space left on device; make room there and continue" in result.output
    folder = tmp_path / "best.search"
    assert len((folder / "trials.jsonl").read_text().splitlines()) == 3
    assert not (folder / "trial").exists()
    result = CliRunner().invoke(cli.main, [*arguments, "--resume"])
    assert result.exit_code == 0, result.output
    assert len(made) == 3 + 2


# --- A foreign pcb --------------------------------------------------------------------------

FOREIGN = """
from importlib.machinery import PathFinder, SourceFileLoader
import sys
MORE = b'''
class ForeignMerge(GeneralizedTaskArithmeticMerge):
    pass
register(ForeignMerge(consensus_method=None, sparsification_method=None, default_normalize=False,
         default_rescale=False, method_name="pcb", method_pretty_name="Other",
         method_reference_url=""))
'''
class Loader(SourceFileLoader):
    def get_code(self, name):
        path = self.get_filename(name)
        return self.source_to_code(self.get_data(path) + MORE, path)
class Finder:
    def find_spec(self, name, path, target=None):
        if name == 'mergekit.merge_methods.registry':
            spec = PathFinder.find_spec(name, path)
            spec.loader = Loader(name, spec.origin)
            return spec
sys.meta_path.insert(1, Finder())
"""


@pytest.fixture
def foreign(tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FOREIGN)
    return environment(folder)


@pytest.mark.parametrize("command", ["check", "report", "measure", "search"])
def test_tools_refuse_beside_a_foreign_method(tmp_path, family, foreign, command):
    config = tmp_path / "c.yml"
    config.write_text(yaml.safe_dump(configuration(family, parameters={"scope": "model"})))
    options = {"check": [], "search": ["-o", tmp_path / "o", "--evaluate", "echo {model} 1"]}
    arguments = options.get(command, ["-o", tmp_path / "o"])
    result = run("mergekit-pcb", command, config, *arguments, check=False, **foreign)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "ForeignMerge in mergekit.merge_methods.registry; uninstall" in result.stderr
    assert "mergekit-pcb yaml" in result.stderr
    assert not (tmp_path / "o").exists()


def test_merges_with_a_foreign_method_go_on_and_ours_has_a_command(tmp_path, family, foreign):
    config = configuration(family, parameters={"weight": 1.0})
    theirs, result = merge(tmp_path / "theirs", config, **foreign)
    assert result.stderr.count("RuntimeWarning") == 1
    base, *experts = [tensors(path)["lm_head.weight"] for path in family]
    expected = base + sum(expert - base for expert in experts)
    assert torch.allclose(tensors(theirs)["lm_head.weight"], expected)
    ours, _ = merge(tmp_path / "today", config)
    out = tmp_path / "out"
    run(
        "mergekit-pcb",
        "yaml",
        tmp_path / "theirs" / "config.yml",
        out,
        "--no-copy-tokenizer",
        **foreign,
    )
    assert all(torch.equal(tensors(out)[n], t) for n, t in tensors(ours).items())


# --- Library calls --------------------------------------------------------------------------


def test_no_library_call_ends_the_interpreter():
    from mergekit.options import MergeOptions

    from mergekit_pcb.host import planning
    from mergekit_pcb.tools import check, report

    for call in (
        lambda: mergekit_pcb.contributions({}, []),
        lambda: mergekit_pcb.search_weights(len, {}, [], budget=1),
        lambda: mergekit_pcb.adamerge(torch.nn.Linear(1, 1), {}, [], []),
        lambda: report.observe("merge_method: pcb", MergeOptions()),
        lambda: planning.plan_without_merging("1", MergeOptions()),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"\w"):
            call()
    assert check.check("merge_method: pcb", MergeOptions()).errors
    for file in pathlib.Path(mergekit_pcb.__file__).parent.rglob("*.py"):
        text = file.read_text().replace("click.get_current_context().exit(", "")
        assert not re.search(r"SystemExit|sys\.exit|\bexit\(", text), file


# --- The import hook ------------------------------------------------------------------------


def python(code, *options, **more):
    command = [sys.executable, *options, "-c", code] if code else [sys.executable, *options]
    import os

    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **more}
    )


def test_looking_for_a_module_does_not_use_the_hook_up():
    result = python(
        "import importlib.util\n"
        "for name in ('mergekit.merge_methods.registry', 'mergekit.plan', 'mergekit.evo.genome',"
        " 'mergekit.scripts.merge_raw_pytorch'):\n"
        "    assert importlib.util.find_spec(name).loader.get_source(name)\n"
        "import mergekit.merge_methods as m, mergekit.plan as p, mergekit.evo.genome as g\n"
        "import mergekit.scripts.merge_raw_pytorch as r\n"
        "assert m.get('pcb') and g.METHOD_PARAM_MAPS['pcb']\n"
        "for f in (p.MergePlanner._plan, r.plan_flat_merge): assert f.planned_by_mergekit_pcb\n"
    )
    assert result.returncode == 0, result.stderr


def test_modules_the_hook_waits_for_run_as_scripts():
    for module in ("mergekit.evo.genome", "mergekit.scripts.merge_raw_pytorch"):
        result = python("", "-m", module)
        assert result.returncode == 0, result.stderr


def test_register_is_a_complete_installation_where_the_hook_is_switched_off(tmp_path, family):
    config, out = tmp_path / "c.yml", tmp_path / "out"
    config.write_text(yaml.safe_dump(configuration(family, parameters={"scope": "model"})))
    for order in ("import mergekit.merge", ""):
        result = python(
            f"{order}\nimport mergekit_pcb; mergekit_pcb.register()\n"
            "import mergekit.evo.genome as g; assert g.METHOD_PARAM_MAPS['pcb']\n"
            "import sys; from mergekit.scripts.run_yaml import main\n"
            f"main([{str(config)!r}, {str(out)!r}, '--no-copy-tokenizer'])\n",
            MERGEKIT_PCB_AUTOLOAD="0",
        )
        assert result.returncode == 0, result.stderr
    expected, _ = merge(tmp_path / "m", configuration(family, parameters={"scope": "model"}))
    assert all(torch.equal(tensors(out)[n], t) for n, t in tensors(expected).items())
