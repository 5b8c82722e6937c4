"""The demo, shortened: real training, real commands, measured losses."""

import json
import math
import shutil

import forked
import pytest
import yaml
from checkpoints import configuration, tensors
from click.testing import CliRunner
from conftest import pieces  # noqa: F401 - puts tests/ on the path before torch starts threads
from reference import pcb as reference

from mergekit_pcb.tools import demo, demo_folder, demo_page, small_llama
from mergekit_pcb.tools.cli import main


@pytest.mark.slow
def test_what_is_printed_is_what_was_measured(small_demo):
    directory, printed = small_demo
    results = demo.Results.model_validate_json((directory / demo_folder.RESULTS).read_text())
    assert json.loads((directory / demo_folder.RESULTS).read_text())["lower_is_better"] is True
    assert results.seed == 3
    assert [(row.name, row.kind) for row in results.rows] == [
        ("base", "base"),
        *((f"expert on {task}", "expert") for task in demo.TASKS),
        *((merge, "merge") for merge in demo.MERGES),
    ]
    for row in results.rows:
        assert list(row.tasks) == list(demo.TASKS)
        assert row.mean == pytest.approx(sum(row.tasks.values()) / len(demo.TASKS))
        values = (*row.tasks.values(), row.mean, row.general)
        assert all(math.isfinite(value) and value > 0 for value in values)
        (line,) = (line for line in demo_page.table(results) if line.startswith(row.name + "  "))
        assert [float(cell.rstrip("*")) for cell in line[20:].split()] == [
            pytest.approx(value, abs=5.1e-4) for value in values
        ]
    expected = [*demo_page.table(results), *demo_page.sentences(results)]
    expected += (directory / "pcb.yml").read_text().splitlines()
    for line in expected:
        assert line in printed
    assert (directory / demo_folder.PICTURE).read_bytes()[1:4] == b"PNG"
    assert all((directory / name).exists() for name in demo.made())


@pytest.mark.slow
def test_training_is_real(small_demo):
    """The base has learned something, and each expert beats it on its own task."""
    results = demo.Results.model_validate_json((small_demo[0] / demo_folder.RESULTS).read_text())
    base = results.row("base")
    assert base.general < math.log(small_llama.VOCABULARY)  # better than guessing
    for task in demo.TASKS:
        assert results.row(f"expert on {task}").tasks[task] < base.tasks[task]


@pytest.mark.slow
def test_the_merge_is_a_model(small_demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, _ = small_demo
    model = AutoModelForCausalLM.from_pretrained(directory / "merged-pcb")
    ids = AutoTokenizer.from_pretrained(directory / "merged-pcb")("import", return_tensors="pt")
    assert model(input_ids=ids["input_ids"]).logits.isfinite().all()
    folders = ["base", *(demo.folder_of(task) for task in demo.TASKS)]
    base, *experts = [tensors(directory / folder) for folder in folders]
    merged = tensors(directory / "merged-pcb")
    for name, tensor in base.items():
        expected = reference(tensor, [expert[name] for expert in experts])
        # The demo's numbers are new on every machine, and an element whose score lies beside the
        # threshold may round to its other side in float32; then it is merged wholly or not at all.
        beyond = (merged[name] - expected).abs() > 1e-6 * expected.abs() + 1e-8
        assert beyond.sum() <= max(1, 3e-4 * tensor.numel()), name


@pytest.fixture
def untrained(monkeypatch):
    """A demo without its minutes: what it would do is told, or goes wrong as a test says."""

    def do(train=lambda *_: None, merge=lambda *_: None):
        monkeypatch.setattr(small_llama, "train", train)
        monkeypatch.setattr(demo, "_merge", merge)
        monkeypatch.setattr(demo, "HELD_OUT_SEQUENCES", 2)

    return do


def ask(*arguments):
    result = CliRunner().invoke(main, ["demo", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


@pytest.mark.slow
def test_a_folder_that_is_not_empty_is_refused_and_force_replaces_a_demo_alone(
    small_demo, tmp_path, untrained
):
    mine = tmp_path / "demo"
    shutil.copytree(small_demo[0], mine)
    (mine / "mine.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    result = ask(mine)
    assert result.exit_code == 1
    assert "--force" in result.output
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == before

    def merge(directory, method):
        shutil.copytree(directory / "base", directory / f"merged-{method}")

    untrained(merge=merge)
    result = ask(mine, "--force")
    assert result.exit_code == 0, result.output
    assert (mine / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in mine.iterdir()) == sorted([*demo.made(), "mine.txt"])
    (tmp_path / "file").write_text("mine")
    assert "it is a file" in ask(tmp_path / "file", "--force").output


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("where", ["training", "merging"])
def test_what_was_made_is_removed_when_it_is_stopped(tmp_path, untrained, where, keep):
    def stop(*_):
        raise KeyboardInterrupt

    untrained(**{"train" if where == "training" else "merge": stop})
    result = ask(tmp_path / "demo", *["--keep"] * keep)
    assert result.exit_code == 1
    assert "interrupted" in result.output
    assert (tmp_path / "demo").exists() == keep
    assert (tmp_path / "demo" / "base").exists() == (keep and where == "merging")


@pytest.mark.slow
def test_a_merge_that_fails_is_told_and_nothing_is_left(tmp_path, untrained, monkeypatch):
    untrained(merge=demo._merge)
    forked.inside(monkeypatch, demo)
    monkeypatch.setitem(demo.MERGES, "ties", ("ties", {"density": "much"}))
    (tmp_path / "demo").mkdir()
    result = ask(tmp_path / "demo")
    assert result.exit_code == 1
    assert "cannot merge ties.yml" in result.output
    assert list((tmp_path / "demo").iterdir()) == []


@pytest.mark.slow
def test_where_start_up_files_are_switched_off_the_demo_merges_by_its_own_command(
    tmp_path, family, monkeypatch
):
    monkeypatch.setenv("MERGEKIT_PCB_AUTOLOAD", "0")
    (tmp_path / "pcb.yml").write_text(yaml.safe_dump(configuration(family)))
    demo._merge(tmp_path, "pcb")
    assert tensors(tmp_path / "merged-pcb")


def test_force_replaces_nothing_but_a_demo(tmp_path):
    mine = ["pcb.yml", "results.json", "notes.txt"]
    for name in mine:
        (tmp_path / name).write_text("{}")
    result = ask(tmp_path, "--force")
    assert result.exit_code == 1
    assert "its pcb.yml is not an earlier demo's" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)


@pytest.mark.parametrize("name", ["jane@corp", "c++"])
def test_a_path_that_mergekit_would_read_otherwise_is_told_before_the_first_step(tmp_path, name):
    result = ask(tmp_path / name / "demo")
    assert result.exit_code == 1
    assert f"what follows {'@' if '@' in name else '+'} in the path" in result.output
    assert not (tmp_path / name).exists()


def test_no_room_and_no_permission_are_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_folder.os, "access", lambda *_: False)
    assert "may not be written" in ask(tmp_path / "a" / "demo").output
    monkeypatch.undo()
    monkeypatch.setattr(
        demo_folder.shutil,
        "disk_usage",
        lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20),
    )
    assert "1 MB are free" in ask(tmp_path / "a" / "demo").output
    assert not (tmp_path / "a").exists()


def results(**losses):
    rows = [
        demo.Row(
            name=name,
            kind={"base": "base", "expert on c++": "expert"}.get(name, "merge"),
            mean=sum(values) / 3,
            tasks=dict(zip(demo.TASKS, values, strict=True)),
            general=1.0,
            error=0.0 if name == "pcb" else 0.25,
        )
        for name, values in losses.items()
    ]
    return demo.Results(seed=0, schedule=demo.Schedule(), rows=rows)


BEHIND = results(
    base=(4.0, 4.0, 4.0), **{"expert on c++": (2.0, 5.0, 5.0)}, ties=(3, 3, 3), pcb=(3.5, 3.5, 3.5)
)


def test_the_table_marks_the_lowest_of_each_column():
    cells = [line[20:].split() for line in demo_page.table(BEHIND)[2:]]
    assert cells[1] == ["2.000*", "5.000", "5.000", "4.000", "1.000*"]
    assert cells[2] == ["3.000", "3.000*", "3.000*", "3.000*", "1.000*"]


def test_a_result_against_pcb_is_said_as_one_for_it():
    said = demo_page.sentences(BEHIND)
    assert "  0.500 ± 0.250 better than the base" in said
    assert "  0.500 ± 0.250 better than the best expert, that on c++" in said
    assert "  0.500 ± 0.250 worse than ties" in said
    assert not any("160" in sentence for sentence in said)


def test_other_lengths_of_training_are_said():
    short = BEHIND.model_copy(update={"schedule": demo.Schedule(base_steps=8, expert_steps=4)})
    (said,) = set(demo_page.sentences(short)) - set(demo_page.sentences(BEHIND))
    assert "8 and 4 steps here" in said
    assert f"took {demo.Schedule.base_steps} and {demo.Schedule.expert_steps}" in said
    told = CliRunner().invoke(main, ["demo", "--help"]).output
    for steps in (demo.Schedule.base_steps, demo.Schedule.expert_steps):
        assert f"[default: {steps}]" in told


def test_bars_have_colours_on_a_terminal_alone(monkeypatch):
    lines = list(demo_page.bars(BEHIND))
    assert len(lines) == 1 + 3
    assert lines[-1].endswith("+0.500")
    assert "\x1b[" in lines[-1]  # click takes it out where there is no terminal
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any("\x1b[" in line for line in demo_page.bars(BEHIND))


def test_text_is_found_wherever_packages_are(tmp_path, monkeypatch):
    """Packages of another environment below this one, or in a folder on the path."""
    place = tmp_path / "site" / "a-1.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text("Name: a\n\n" + "prose " * 40_000)
    (tmp_path / "link").symlink_to("site")  # as lib64 may be lib
    monkeypatch.setattr("sys.path", ["", str(tmp_path / "site"), str(tmp_path / "link")])
    monkeypatch.setattr("sysconfig.get_path", lambda name: pytest.fail(f"asked for {name}"))
    (found,) = small_llama.texts("prose", per_file=10**6)
    assert found == "prose " * 40_000
    assert len(small_llama.texts("stubs")) > 10


def test_commands_of_the_demo_can_be_copied(tmp_path):
    said = demo_page.next_commands(tmp_path / "my demo", can_draw=True)
    assert f"mergekit-pcb check '{tmp_path}/my demo/pcb.yml'" in said[1]
    assert f"'{tmp_path}/my demo/mine'" in said[3]
