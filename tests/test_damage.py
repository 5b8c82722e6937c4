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
from checkpoints import configuration, log_of, merge, run, save_family, tensors, tiny_llama
from click.testing import CliRunner
from safetensors.torch import save_file
from test_bad_input import SENTENCE
from test_plan import environment

import mergekit_pcb
from mergekit_pcb.files import write_text, written_whole
from mergekit_pcb.tools import cli
from mergekit_pcb.tools.search_merges import Merges


@pytest.fixture
def paths(tmp_path):
    return save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2, shard_size="30KB")


def truncate(folder):
    file = sorted(folder.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def truncate_head(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["lm_head.weight"]
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
    before = set(tmp_path.rglob("*"))
    result = CliRunner().invoke(cli.main, [command, str(config), *map(str, options)])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1, result.output
    assert result.output.count(f"cannot read {file}, because") == 1, result.output
    work = tmp_path / "out.search"
    assert {path for path in set(tmp_path.rglob("*")) - before if work not in path.parents} <= {
        work
    }
    assert not (work / "contributions").exists()
    assert not list((work / "trials").glob("*"))


@pytest.mark.parametrize(
    "damage", [truncate, truncate_head, remove, misplace], ids=lambda damage: damage.__name__
)
def test_a_merge_that_measures_names_it_too(tmp_path, paths, damage):
    file = damage(paths[0 if damage is truncate_head else 2])
    config = configuration(paths, parameters={"scope": "model"})
    out, result = merge(tmp_path / "m", config, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"cannot read {file}, because" in result.stderr.splitlines()[-1]
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
    assert f"cannot read {files[1]}, because" in result.stderr


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
    assert "warning" not in result.stderr.lower()
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

    from mergekit_pcb.tools import counts, page

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
    page.page(report, [["task"]], [])
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(40, id="while measuring"),
        pytest.param(100, id="while a trial is written"),
    ],
)
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
    assert re.search(SENTENCE, result.stderr), result.stderr
    assert f"cannot write to {tmp_path / 'best.search'}, because" in result.stderr
    assert not list((tmp_path / "best.search" / "trials").glob("*"))
    done = run("mergekit-pcb", *command[1:])
    assert "best.yml: score 1 in trial 1" in done.stdout


def test_the_trials_before_the_disk_was_full_are_kept(tmp_path, monkeypatch):
    paths = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2)
    config = tmp_path / "c.yml"
    config.write_text(yaml.safe_dump(configuration(paths)))
    arguments = ["search", str(config), "--evaluate", "echo {model} 1", "--budget", "4"]
    arguments += ["-o", str(tmp_path / "best.yml")]
    made, real = [], Merges._sum

    def full(self, *args):
        made.append(args)
        real(self, *args)
        if len(made) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Merges, "_sum", full)
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 1
    assert "No space left on device; make room there and continue" in result.output
    folder = tmp_path / "best.search"
    assert len(log_of(folder)) == 2
    assert not list((folder / "trials").glob("*"))
    result = CliRunner().invoke(cli.main, arguments)
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


@pytest.mark.slow
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
        lambda: report.observe("", {"merge_method": "pcb"}, MergeOptions()),
        lambda: planning.plan_without_merging(1, MergeOptions()),
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
        " 'mergekit.multigpu_executor', 'mergekit.scripts.merge_raw_pytorch'):\n"
        "    assert importlib.util.find_spec(name).loader.get_source(name)\n"
        "import mergekit.merge_methods as m, mergekit.plan as p, mergekit.evo.genome as g\n"
        "import mergekit.scripts.merge_raw_pytorch as r\n"
        "assert m.get('pcb') and g.METHOD_PARAM_MAPS['pcb']\n"
        "for f in (p.MergePlanner._plan, r.plan_flat_merge): assert f.planned_by_mergekit_pcb\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_modules_the_hook_waits_for_run_as_scripts():
    for module in ("mergekit.evo.genome", "mergekit.scripts.merge_raw_pytorch"):
        result = python("", "-m", module)
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
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


# --- What an attack by hand found -----------------------------------------------------------


def invoked(*arguments):
    result = CliRunner().invoke(cli.main, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def small(tmp_path):
    """Single files of a base and two experts, and their configuration."""
    files = []
    for number, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(number)
        state = {"w": torch.randn(9, 7, generator=generator), "empty": torch.zeros(0, 5)}
        files.append(tmp_path / f"{name}.safetensors")
        save_file(state, files[-1])
    config = tmp_path / "c.yml"
    config.write_text(yaml.safe_dump(configuration(files, parameters={"scope": "model"})))
    return config, files


@pytest.mark.parametrize("target", ["fifo", "configuration", "model", "link to a model"])
@pytest.mark.parametrize("command", ["measure", "search"])
def test_outputs_replace_neither_inputs_nor_what_is_no_file(tmp_path, small, command, target):
    import os

    config, files = small
    (tmp_path / "link").symlink_to(files[1])
    os.mkfifo(tmp_path / "fifo")
    places = {"fifo": tmp_path / "fifo", "configuration": config, "model": files[1]}
    output = places.get(target, tmp_path / "link")
    before = {file: file.read_bytes() for file in (config, *files)}
    more = ["--evaluate", "echo {model} 1"] if command == "search" else []
    result = invoked(command, config, "-o", output, *more)
    assert result.exit_code == 1
    assert f"cannot write {output}, because it " in result.output
    assert {file: file.read_bytes() for file in before} == before
    assert (tmp_path / "fifo").is_fifo()


def test_empty_tensors_in_a_whole_model(tmp_path, small):
    config, files = small
    run("mergekit-pytorch", config, tmp_path / "out")
    merged, base = tensors(tmp_path / "out"), tensors(files[0])
    assert merged["empty"].shape == (0, 5)
    assert not torch.equal(merged["w"], base["w"])


@pytest.mark.parametrize("damage", ["nothing", "values", "index", "missing"])
def test_a_resumed_search_does_not_trust_what_it_finds(tmp_path, small, monkeypatch, damage):
    config, _ = small
    made, real, measured = [], Merges._sum, []
    measure = Merges._measure

    def stopped(self, *args):
        made.append(args)
        real(self, *args)
        if len(made) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Merges, "_sum", stopped)
    monkeypatch.setattr(Merges, "_measure", lambda self: measured.append(1) or measure(self))
    score = "sha256sum {model}/model.safetensors | tr -d a-f | cut -c1-7"
    command = ["search", config, "--evaluate", score, "--budget", 5, "-o", tmp_path / "best.yml"]
    invoked(*command)
    folder = tmp_path / "best.search"
    parts = folder / "contributions"
    if damage == "values":
        file = sorted(parts.glob("*.safetensors"))[-1]
        content = bytearray(file.read_bytes())
        content[-1] ^= 64
        file.write_bytes(content)
    elif damage == "index":
        (parts / "index.json").write_text("[]")
    elif damage == "missing":
        sorted(parts.glob("*.safetensors"))[0].unlink()
    assert invoked(*command).exit_code == 0
    assert len(measured) == (1 if damage == "nothing" else 2)
    resumed = log_of(folder)
    invoked(*command, "--work", tmp_path / "fresh")
    fresh = log_of(tmp_path / "fresh")
    assert [t["score"] for t in resumed] == [t["score"] for t in fresh]


def test_a_search_does_not_go_on_with_other_models(tmp_path, small):
    config, files = small
    command = ["search", config, "--evaluate", "echo {model} 1", "--budget", 2]
    command += ["-o", tmp_path / "best.yml"]
    assert invoked(*command).exit_code == 0
    state = tensors(files[1])
    save_file({**state, "w": state["w"] + 1}, files[1])
    result = invoked(*command)
    assert result.exit_code == 1
    assert "begun with other models" in result.output


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--bounds", "weight", "-1e308", "1e308"], "bound nothing to search"),
        (["--seed", "-1"], "--seed"),
        (["--timeout", "0"], "--timeout"),
    ],
)
def test_searches_of_nothing(tmp_path, small, options, complaint):
    command = ["search", small[0], "--evaluate", "echo {model} 1", "-o", tmp_path / "o.yml"]
    result = invoked(*command, *options)
    assert result.exit_code in (1, 2)
    assert complaint in result.output
    assert not (tmp_path / "o.search").exists()


def test_statistics_that_are_no_file(tmp_path, small):
    import os

    config, files = small
    os.mkfifo(tmp_path / "fifo")
    parameters = {"scope": "model", "statistics": str(tmp_path / "fifo")}
    config.write_text(yaml.safe_dump(configuration(files, parameters=parameters)))
    result = invoked("check", config)
    assert "it is no ordinary file" in result.output


@pytest.mark.parametrize("name", ["./" + "x" * 300, "./a\0b"])
@pytest.mark.parametrize("command", ["check", "measure", "search"])
def test_models_whose_name_no_file_can_have(tmp_path, small, name, command):
    config, files = small
    config.write_text(yaml.safe_dump(configuration([name, *files[1:]])))
    more = {"check": [], "measure": ["-o", tmp_path / "s.json"]}
    more["search"] = ["--evaluate", "echo {model} 1", "-o", tmp_path / "b.yml"]
    result = invoked(command, config, *more[command])
    assert result.exit_code == 1
    assert "rror: " in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("path", ["x" * 300, "a\0b"])
def test_statistics_whose_name_no_file_can_have(small, path):
    config, files = small
    parameters = {"scope": "model", "statistics": path}
    config.write_text(yaml.safe_dump(configuration(files, parameters=parameters)))
    result = invoked("check", config)
    assert result.exit_code == 1
    assert "it cannot be read" in result.output


@pytest.mark.parametrize("role", ["expert", "base"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_one_model_under_two_names(tmp_path, small, role, scope):
    config, files = small
    (tmp_path / "link.safetensors").symlink_to(files[0 if role == "base" else 1])
    names = [*files, tmp_path / "link.safetensors"]
    config.write_text(yaml.safe_dump(configuration(names, parameters={"scope": scope})))
    result = run("mergekit-pytorch", config, tmp_path / "out", check=False)
    assert result.returncode == 1
    assert "they are one model under two names" in result.stderr.splitlines()[-1]


def half_written(path):
    with written_whole(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt


def test_files_are_written_whole_or_not_at_all(tmp_path):
    target, link = tmp_path / "s.json", tmp_path / "link"
    target.write_text("older")
    link.symlink_to(target)
    for path in (target, link):
        with pytest.raises(KeyboardInterrupt):
            half_written(path)
        assert target.read_text() == "older"
    write_text(link, "newer")
    assert link.is_symlink()
    assert target.read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "s.json"]


def test_a_dtype_that_mergekit_does_not_know(tmp_path, small):
    config, files = small
    made = configuration(files, parameters={"scope": "model"}, dtype="bf16")
    config.write_text(yaml.safe_dump(made))
    result = invoked("measure", config, "-o", tmp_path / "s.json")
    assert "cannot use dtype: bf16, because mergekit knows no such dtype" in result.output


def test_check_knows_the_dtypes_that_mergekit_knows(small):
    config, files = small
    for name in ("half", "float", "float8_e4m3fn"):
        config.write_text(yaml.safe_dump(configuration(files, out_dtype=name)))
        assert (
            f"error: out_dtype: cannot use out_dtype: {name}, because"
            in invoked("check", config).output
        )


BOMB = "a: &a [1]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in ("ab", "bc", "cd", "de", "ef", "fg")
)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("merge_method: pcb\n---\n", "a document in it is empty"),
        ("merge_method: pcb\nparameters:\n  density: 1\n  density: 0.5\n", "density stands twice"),
        ("density: " + "[" * 3000, "it is not YAML"),
        ("density: " + "9" * 5000, "it is not YAML"),
        (BOMB + "merge_method: pcb\nparameters: {density: *g}\n", "mergekit ignores"),
        ("name: x\nmerge_method: pcb\n---\nname: x\nmerge_method: pcb\n", "stages"),
    ],
    ids=["empty document", "twice", "deep", "long", "bomb", "one name twice"],
)
def test_yaml_that_hands_get_wrong(tmp_path, text, complaint):
    config = tmp_path / "c.yml"
    config.write_text(text)
    result = invoked("check", config)
    assert result.exit_code == 1
    assert complaint in result.output
    assert len(result.output) < 20_000


def test_tensors_in_memory_of_unusual_kinds():
    from mergekit.merge_methods import merge_state_dicts

    states = [{"w": torch.randn(4, 4)} for _ in range(3)]
    found = merge_state_dicts(states, "pcb", base=0, out_dtype=torch.float8_e4m3fn)
    assert found["w"].dtype == torch.float8_e4m3fn
    sparse = [{"w": torch.eye(3).to_sparse()} for _ in range(3)]
    with pytest.raises(mergekit_pcb.PCBError, match="it is sparse"):
        merge_state_dicts(sparse, "pcb", base=0)
