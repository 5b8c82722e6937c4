"""Searches by several workers: threads, processes, faults, storages, and scores from files."""

import contextlib
import itertools
import json
import os
import pathlib
import random
import signal
import sqlite3
import sys
import threading
import time

import forked
import optuna
import psutil
import pytest
import torch
import yaml
from checkpoints import configuration, log_of, run, save_family, study_of, tiny_llama
from click.testing import CliRunner
from test_bad_input import SENTENCE

from mergekit_pcb import PCBError, search_weights
from mergekit_pcb.tools import cli
from mergekit_pcb.tools.search_scores import EvaluationError, Score, Scorer

SCRIPT = pathlib.Path(sys.executable).with_name("mergekit-pcb")
# Scores a checkpoint by the first byte of its digest; writes what it saw.
COMMAND = "echo {model} $CUDA_VISIBLE_DEVICES >> seen; sha256sum {model}/model.safetensors"
COMMAND += " | tr -d a-f | cut -c1-7"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    paths = save_family(place / "models", tiny_llama(layers=1), tasks=2)
    config = configuration(paths, parameters={"density": 0.3}, dtype="float32")
    (place / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    return place


@pytest.fixture
def place(tmp_path, made, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yml").write_text((made / "config.yml").read_text())
    return tmp_path


def arguments(*more, command=COMMAND, budget=6):
    return ["search", "config.yml", "--evaluate", command, "--budget", str(budget), *more]


def invoked(*words):
    result = CliRunner().invoke(cli.main, [*map(str, words), "-o", "best.yml"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*words):
    result = invoked(*words)
    assert result.exit_code == 1, result.output
    return " ".join(SENTENCE.search(result.output).group().split())


def test_several_at_a_time_share_contributions_and_cards(place, monkeypatch):
    """Two commands run at once, or they would wait for one another in vain."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    meet = "echo x >> met; for i in $(seq 600); do "
    meet += "test $(wc -l < met) -gt 1 && break; sleep 0.1; done; test $(wc -l < met) -gt 1 && "
    words = arguments("--jobs", 2, "--gpus", "1,3", command=meet + COMMAND)
    result = invoked(*words)
    assert result.exit_code == 0, result.output
    assert "2 models of" in result.output
    trials = log_of(place / "best.search")
    assert [trial["trial"] for trial in trials] == list(range(1, 7))
    assert all(trial["error"] is None for trial in trials), trials
    seen = [line.split() for line in (place / "seen").read_text().splitlines()]
    assert len({folder for folder, _ in seen}) == 6, "every trial has a folder of its own"
    assert {card for _, card in seen} == {"5", "7"}
    assert not list((place / "best.search" / "trials").glob("*"))
    assert not (place / "best.search" / "contributions").exists()


def is_gone(pid):
    """Whether a process has ended, be it that nobody has asked how."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def started(*words):
    return forked.started(SCRIPT, [*words, "-o", "best.yml"])


def wait_for(file, search):
    """Until a command of the search has written something there."""
    deadline = time.monotonic() + 120
    while not file.exists() or not file.read_text().strip():
        assert search.poll() is None, search.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "storage", [None, pytest.param("sqlite:///trials.db", marks=pytest.mark.slow)]
)
def test_processes_join_one_study(place, storage):
    """Both try trials at the same time: each waits, in its first, for the other's."""
    meet = "echo $PPID >> met; for i in $(seq 600); do "
    meet += "test $(sort -u met | wc -l) -gt 1 && break; sleep 0.1; done; "
    meet += "test $(sort -u met | wc -l) -gt 1 && "
    words = arguments(*(["--storage", storage] if storage else []), command=meet + COMMAND)
    both = [started(*words), started(*words)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    folder = place / "best.search"
    if storage:
        study = optuna.load_study(study_name="best.search", storage=storage)
        assert len(study.trials) == 6
        assert not (folder / "study.journal").exists()
    else:
        assert len(log_of(folder)) == 6
    seen = (place / "seen").read_text().split()
    assert len(seen) == len(set(seen)) == 6
    assert sum("contributions of" in text for text in said) == 1, "one computes, the other waits"
    assert not (folder / "contributions").exists()


def killed_often(times, budget):
    """Two workers, one of which dies at random; what is left in the end."""
    draw = random.Random(0)
    words = arguments(command=COMMAND.replace("echo", "sleep 0.4; echo"), budget=budget)
    workers = [started(*words), started(*words)]
    for _ in range(times):
        time.sleep(draw.uniform(0.1, 1.2))
        victim = draw.randrange(2)
        assert workers[victim].poll() is None, workers[victim].communicate()
        os.killpg(workers[victim].pid, signal.SIGKILL)
        workers[victim].communicate()
        workers[victim] = started(*words)
    said = [worker.communicate(timeout=600)[0] for worker in workers]
    last = run("mergekit-pcb", *words, "-o", "best.yml")
    return said, last.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("times", "budget"), [(2, 12), (10, 40)])
def test_whatever_is_killed_the_budget_is_scored(place, times, budget):
    said, last = killed_often(times, budget)
    trials = log_of(place / "best.search")
    assert [trial["trial"] for trial in trials] == list(range(1, budget + 1)), said
    assert all(trial["score"] is not None for trial in trials), trials
    assert "score" in last
    folder = place / "best.search"
    assert not list((folder / "trials").glob("*"))
    assert not list((folder / "workers").glob("*"))
    assert not (folder / "contributions").exists()
    best = max(trials, key=lambda trial: trial["score"])
    document = yaml.safe_load((place / "best.yml").read_text())
    assert [m["parameters"]["weight"] for m in document["models"]] == best["weights"]


def test_a_command_that_outlives_its_search_is_killed(place):
    words = arguments(command="echo $$ > pid; sleep 300; echo {model} 1", budget=1)
    search = started(*words)
    wait_for(place / "pid", search)
    os.kill(search.pid, signal.SIGKILL)
    search.communicate()
    pid = int((place / "pid").read_text())
    assert not is_gone(pid)
    refused(*arguments("--timeout", 0.2, command=words[3], budget=1))
    for _ in range(100):
        if is_gone(pid):
            break
        time.sleep(0.1)
    assert is_gone(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end_it_ends_its_commands(place, number):
    search = started(*arguments(command="echo $$ > pid; sleep 300; echo {model} 1", budget=1))
    wait_for(place / "pid", search)
    os.kill(search.pid, number)
    said = search.communicate(timeout=60)[0]
    assert search.returncode == 128 + number, said
    assert is_gone(int((place / "pid").read_text()))
    assert not list((place / "best.search" / "trials").glob("*"))


def test_a_hanging_child_dies_with_its_command(place):
    command = "bash -c '(echo $BASHPID > child; sleep 300) & sleep 300; echo {model} 1'"
    assert "took longer than 2 s" in refused(*arguments("--timeout", 2, command=command, budget=1))
    assert is_gone(int((place / "child").read_text()))


def test_what_a_command_leaves_in_background_keeps_nobody_waiting_and_ends(place):
    began = time.monotonic()
    result = invoked(*arguments(command="sleep 60 & echo $! >> left; echo {model} 1", budget=2))
    assert result.exit_code == 0, result.output
    assert time.monotonic() - began < 60
    assert len(log_of(place / "best.search")) == 2
    left = (place / "left").read_text().split()
    assert len(left) == 2
    assert all(is_gone(int(pid)) for pid in left)


def test_a_command_may_go_elsewhere_and_print_in_colours(place):
    command = "cd / && test -d {model} && printf 'score \\033[32m0.25\\033[0m\\n'"
    result = invoked(*arguments(command=command, budget=1))
    assert result.exit_code == 0, result.output
    assert log_of(place / "best.search")[0]["score"] == 0.25


def test_a_trial_that_somebody_else_ends_is_left_to_them(place):
    """By Optuna's own commands, while it is scored here."""
    tell = "import optuna; s = optuna.storages.journal; "
    tell += "s = optuna.storages.JournalStorage(s.JournalFileBackend('best.search/study.journal'));"
    tell += "optuna.load_study(study_name='best.search', storage=s).tell(1, state=2)"
    tell = tell.replace("state=2", "state=optuna.trial.TrialState.FAIL")
    command = f'case {{model}} in *0002) {sys.executable} -c "{tell}";; esac; echo 5'
    result = invoked(*arguments(command=command, budget=3))
    assert result.exit_code == 0, result.output
    assert [trial.state.name for trial in study_of(place / "best.search").trials] == [
        "COMPLETE", "FAIL", "COMPLETE",
    ]  # fmt: skip
    assert "mergekit-pcb search" in (place / "best.yml").read_text()


def test_what_is_written_beside_a_model_stays_while_it_is_scored_and_no_longer(place):
    """Two commands run at once; each finds, at its end, what it wrote at its beginning."""
    command = "mkdir {model}_eval && echo '{\"a\": 1}' > {model}_eval/r.json; echo > {model}.log; "
    command += "sleep 0.$((RANDOM % 5 + 1)); test -e {model}_eval/r.json && test -e {model}.log"
    words = arguments("--score", "a={model}_eval/r.json:a", "--jobs", 2, command=command)
    result = invoked(*words)
    assert result.exit_code == 0, result.output
    assert [trial["error"] for trial in log_of(place / "best.search")] == [None] * 6
    assert not list((place / "best.search" / "trials").glob("*"))


def test_processes_take_turns_where_a_score_has_one_file_for_all(place):
    command = "n=$(basename {model}); echo '{\"a\": '${n#000}'}' > r.json; sleep 0.3"
    words = arguments("--score", "a=r.json:a", command=command)
    both = [started(*words), started(*words)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    trials = log_of(place / "best.search")
    assert [trial["score"] for trial in trials] == [trial["trial"] for trial in trials]
    assert len(trials) == 6


def test_values_that_cannot_be_merged_are_trials_that_failed(place, monkeypatch):
    from mergekit_pcb.host import planning

    real, asked = planning.run, []

    def sometimes(*given):
        asked.append(1)
        if len(asked) in failing:
            raise failing[len(asked)]
        real(*given)

    monkeypatch.setattr(planning, "run", sometimes)
    words = ["--search", "density"]
    failing = {
        2: PCBError("solve", "the matrix is large", "use another card"),
        3: torch.OutOfMemoryError("CUDA out of memory"),
    }
    result = invoked(*arguments(*words, budget=4))
    assert result.exit_code == 0, result.output
    errors = [trial["error"] for trial in log_of(place / "best.search")]
    assert errors[1].startswith("the merge failed: cannot solve, because the matrix is large")
    assert errors == [None, errors[1], "the merge failed: CUDA out of memory", None]
    # What lasts is no matter of values: the rest of the budget is kept for later.
    asked.clear()
    failing = {number: PCBError("read", "the disk is away", "mount it") for number in range(2, 9)}
    assert "the disk is away; mount it" in refused(*arguments(*words, "--work", "third"))
    assert len(log_of(place / "third")) == 4
    failing = {}
    assert invoked(*arguments(*words, "--work", "third")).exit_code == 0
    assert len(log_of(place / "third")) == 6
    # Where the configuration itself cannot be merged, nothing is searched.
    asked.clear()
    failing = {1: PCBError("merge", "it is damaged", "repair it")}
    assert "it is damaged; repair it" in refused(*arguments(*words, "--work", "other"))


def test_a_folder_that_was_renamed_goes_on(place):
    assert invoked(*arguments(budget=3)).exit_code == 0
    (place / "best.search").rename(place / "kept.search")
    assert invoked(*arguments("--work", "kept.search", budget=4)).exit_code == 0
    assert len((place / "seen").read_text().split()) == 4


def test_a_database_may_lie_in_the_folder_and_belongs_to_it(place, tmp_path_factory, monkeypatch):
    words = ["--storage", f"sqlite:///{place}/best.search/trials.db"]
    assert invoked(*arguments(*words, budget=2)).exit_code == 0
    assert invoked(*arguments(*words, budget=3)).exit_code == 0
    assert len((place / "seen").read_text().split()) == 3
    # A folder of the same name on another machine does not know who lives.
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "config.yml").write_text((place / "config.yml").read_text())
    monkeypatch.chdir(elsewhere)
    said = refused(*arguments(*words, budget=4))
    assert "it was begun in another folder than best.search, by whose files workers" in said


# --- Scores from files ------------------------------------------------------------------------

RESULTS = {
    "results": {
        "arc_easy": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "a.b": {"acc,none": 0.9},
    },
    "n": [1, 2],
    "done": True,
}


def test_values_of_a_results_file(tmp_path):
    def read(key, file="{model}/out/*/results*.json"):
        return Score.parse(f"x={file}:{key}").read(tmp_path, time.time())

    folder = tmp_path / "out" / "some__model"
    folder.mkdir(parents=True)
    with pytest.raises(EvaluationError, match="did not write"):
        read("n")
    (folder / "results_2.json").write_text(json.dumps(RESULTS))
    assert read("results.arc_easy.acc,none") == 0.5
    assert read("results.*.acc,none") == pytest.approx(0.7)
    assert read("n.*") == 1.5
    with pytest.raises(
        EvaluationError, match=r"no number done; those it holds: n\.0, n\.1, results"
    ):
        read("done")
    old = folder / "results_9.json"
    old.write_text("{}")
    os.utime(old, (1, 1))
    assert read("n.0") == 1
    os.utime(folder / "results_2.json", (1, 1))
    with pytest.raises(EvaluationError, match="anew"):
        read("n.0")
    (folder / "results_3.json").write_text("{")
    with pytest.raises(EvaluationError, match="is no JSON"):
        read("n.0")


@pytest.mark.parametrize(
    ("text", "file", "key"),
    [
        (
            "a={model}/r.json:results.a|arc:challenge|25.acc",
            "{model}/r.json",
            "results.a|arc:challenge|25.acc",
        ),
        ("a={model}/r*.json:x.acc,none", "{model}/r*.json", "x.acc,none"),
        ("a=C:/r.txt:k", "C:/r.txt", "k"),
    ],
)
def test_keys_and_paths_may_hold_colons(text, file, key):
    assert Score.parse(text) == Score("a", file, key)


@pytest.mark.parametrize(
    ("command", "score"),
    [
        ("echo 0.5 for {model}", 0.5),
        ('test -d "{model}" && echo 2', 2.0),
        ("test -d '{model}' && echo 3", 3.0),
        ("test -d {model}/inner && echo 4", 4.0),
    ],
)
def test_a_models_name_is_no_score_and_quoted_as_it_stands(tmp_path, command, score):
    model = tmp_path / "my trials" / "0007"
    (model / "inner").mkdir(parents=True)
    assert Scorer(command, (), None, tmp_path / "turns")(model, {}) == [score]


def test_quotes_that_are_another_languages_stay(tmp_path):
    script = 'import os; print(len(os.listdir("{model}")))'
    (tmp_path / "0007" / "inner").mkdir(parents=True)
    scorer = Scorer(f"{sys.executable} -c '{script}'", (), None, tmp_path / "turns")
    assert scorer(tmp_path / "0007", {}) == [1]


@pytest.mark.parametrize("text", ["", "x", "x=y", "=f:k", "x=:k", "x=f:"])
def test_scores_that_cannot_be_read(text):
    with pytest.raises(PCBError, match="it is not NAME=FILE:KEY"):
        Score.parse(text)


TWO = """
import json, pathlib, sys
import numpy as np
from safetensors.numpy import load_file
folder = pathlib.Path(sys.argv[1])
state = load_file(folder / "model.safetensors")
name = "model.layers.0.mlp.up_proj.weight"
def far(i):
    other = load_file(pathlib.Path(sys.argv[2]) / f"expert{i}" / "model.safetensors")
    return float(np.abs(state[name] - other[name]).sum())
(folder / "r.json").write_text(json.dumps({"far": {"0": far(0), "1": far(1)}}))
"""


def test_several_scores_make_a_front(place, made):
    (place / "two.py").write_text(TWO)
    models = made / "models"
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    scores = [w for i in (0, 1) for w in ("--lower", f"far {i}={{model}}/r.json:far.{i}")]
    command = f"{sys.executable} two.py {{model}} {models}"
    result = invoked(*arguments(*scores, command=command, budget=14))
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before
    study = study_of(place / "best.search")
    values = [trial.values for trial in study.trials]
    assert len({tuple(v) for v in values}) > 10, "random starts differ"
    beaten = {
        i
        for i, (a, b) in enumerate(values)
        if any(c <= a and d <= b and (c, d) != (a, b) for c, d in values)
    }
    front = place / "best.front"
    names = {f"trial-{i + 1:04d}.yml" for i in range(14) if i not in beaten}
    assert {path.name for path in front.iterdir()} == names | {"front.md", "front.png"}
    assert (front / "front.png").read_bytes().startswith(b"\x89PNG")
    table = (front / "front.md").read_text()
    for model in ("base", "expert0", "expert1"):
        assert f"| {model} |" in table
    (row,) = [line.split("|") for line in table.splitlines() if "expert0" in line]
    assert float(row[2]) == 0, "an expert is not far from itself"
    assert table in result.output
    assert not (place / "best.yml").exists()
    for name in names:
        document = yaml.safe_load((front / name).read_text())
        trial = study.trials[int(name[6:10]) - 1]
        for i, model in enumerate(document["models"], 1):
            assert model["parameters"]["weight"] == round(trial.params[f"weight {i}"], 4)


def test_what_stands_beside_a_model_is_neither_overwritten_nor_taken_for_its_score(
    place, tmp_path_factory, monkeypatch
):
    """Results of an earlier evaluation, in a file and in a folder; on the card that was named."""
    models = tmp_path_factory.mktemp("models")
    paths = save_family(models, tiny_llama(layers=1), tasks=2)
    for path in paths:
        (path / "results").mkdir()
        for name in ("r.json", "results/r.json"):
            (path / name).write_text('{"a": 99}')
            os.utime(path / name, (1, 1))
    config = configuration(paths, parameters={"density": 0.3}, dtype="float32")
    (place / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    command = "echo $CUDA_VISIBLE_DEVICES >> cards; case {model} in */reference/*) "
    command += "test -e fails && exit 3;; esac; mkdir -p {model}/results; "
    command += "for f in r.json results/r.json; do echo '{\"a\": 1}' > {model}/$f; done"
    words = ["--score", "a={model}/r.json:a", "--score", "b={model}/results/r.json:a"]
    words += ["--gpus", "3"]
    result = invoked(*arguments(*words, command=command, budget=1))
    assert result.exit_code == 0, result.output
    for path in paths:
        assert json.loads((path / "r.json").read_text()) == {"a": 99}
        assert json.loads((path / "results" / "r.json").read_text()) == {"a": 99}
        (path / "r.json").write_text("it changes as long as nobody searches")
    assert set((place / "cards").read_text().split()) == {"3"}
    table = (place / "best.front" / "front.md").read_text()
    assert "| expert0 | 1 | 1 |" in table
    assert invoked(*arguments(*words, command=command, budget=2)).exit_code == 0
    # What cannot be scored is not tried again, and not shown.
    (place / "fails").touch()
    words += ["--work", "other"]
    said = [invoked(*arguments(*words, command=command, budget=n)).output for n in (1, 2)]
    assert "expert0 could not be scored, and is not tried again: the command" in said[0]
    assert "could not be scored" not in said[1]
    assert "expert0" not in (place / "best.front" / "front.md").read_text()


def test_killed_while_the_base_was_scored_it_goes_on(place):
    command = 'echo \'{"a": 1, "b": 2}\' > {model}/r.json; echo x >> seen; '
    command += "for i in $(seq 600); do test -e go && break; sleep 0.1; done"
    scores = ["--score", "a={model}/r.json:a", "--score", "b={model}/r.json:b"]
    words = arguments(*scores, command=command, budget=1)
    search = started(*words)
    wait_for(place / "seen", search)
    os.kill(search.pid, signal.SIGKILL)
    search.communicate()
    assert (place / "best.search" / "reference").exists()
    (place / "go").touch()
    result = invoked(*words)
    assert result.exit_code == 0, result.output
    assert "| base |" in result.output
    assert not (place / "best.search" / "reference").exists()


QUESTIONS = """
task: questions
dataset_path: json
dataset_kwargs: {data_files: {validation: questions.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_the_evaluation_harness_scores_the_models_of_the_demo(place, small_demo, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(place / "cache"))
    (place / "questions.yaml").write_text(QUESTIONS)
    lines = [line for line in json.__doc__.splitlines() if len(line) > 30]
    rows = [
        {"text": line[:20], "choices": [line[20:], other[20:]], "label": 0}
        for line, other in itertools.pairwise(lines)
    ]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    harness = pathlib.Path(sys.executable).with_name("lm_eval")
    command = f"{harness} --model hf --model_args pretrained={{model}},dtype=float32 --device cpu"
    command += " --include_path . --tasks questions --output_path {model}/results"
    score = "acc={model}/results/*/results*.json:results.questions.acc,none"
    (place / "config.yml").write_text((small_demo[0] / "pcb.yml").read_text())
    result = invoked(*arguments("--score", score, command=command, budget=3))
    assert result.exit_code == 0, result.output
    trials = log_of(place / "best.search")
    assert len(trials) == 3
    assert all(trial["error"] is None for trial in trials)
    part = {trial["score"] * (len(lines) - 1) for trial in trials}
    assert all(count == pytest.approx(round(count)) and count > 0 for count in part)
    assert (place / "best.png").exists()
    best = max(trials, key=lambda trial: trial["score"])
    assert (place / "best.yml").read_text().startswith(f"# score {best['score']:g} in trial")


def test_what_needs_a_merge_of_its_own_is_searched(place):
    words = ["--search", "refine", "--search", "anchor", "--search", "lambda"]
    result = invoked(*arguments(*words))
    assert result.exit_code == 0, result.output
    trials = log_of(place / "best.search")
    assert trials[0]["shared"] == {"refine": "none", "anchor": 0.1, "lambda": 1.0}
    assert {trial["shared"]["refine"] for trial in trials} == {"none", "solve"}
    best = max(trials, key=lambda trial: trial["score"])
    document = yaml.safe_load((place / "best.yml").read_text())
    assert document["parameters"] == {"density": 0.3, **best["shared"]}
    assert (place / "best.png").read_bytes().startswith(b"\x89PNG")
    again = invoked(*arguments(*words, "--work", "again"))
    assert again.exit_code == 0
    assert log_of(place / "again") == trials


# --- Mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--gpus", "0"], "cannot use --gpus 0, because there is no 0: torch sees 0 here"),
        (["--search", "anchor"], "cannot search anchor, because it holds `refine: solve`"),
        (["--score", "a=r.json"], "it is not NAME=FILE:KEY"),
        (["--score", "a={model}/r:k", "--lower", "a={model}/r:l"], "two scores have one name"),
        (["--score", "a={model}/r:k", "--minimize"], "each has a direction of its own"),
        (["--score", "a=r:k", "--jobs", "2"], "all would write the score a to r"),
        (["--storage", "postgresql://me:secret@nowhere/db"], "cannot open the study in"),
        (["--storage", "nonsense"], "cannot open the study in nonsense"),
    ],
)
def test_mistakes_are_told_before_work_starts(place, monkeypatch, words, complaint):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    said = refused(*arguments(*words))
    assert complaint in said
    assert "secret" not in said
    assert not (place / "seen").exists()
    assert not (place / "best.search" / "contributions").exists()


@pytest.mark.parametrize("suffix", [".png", ".search", ".front"])
def test_the_output_is_not_named_like_what_stands_beside_it(place, suffix):
    result = CliRunner().invoke(cli.main, [*arguments(), "-o", f"best{suffix}"])
    assert result.exit_code == 1
    assert f"names that end in {suffix} are those of what a search leaves" in result.output
    assert {path.name for path in place.iterdir()} == {"config.yml"}


def test_a_storage_that_goes_away_is_told(place, monkeypatch):
    from sqlalchemy.exc import OperationalError

    from mergekit_pcb.tools import search_files

    monkeypatch.setattr(search_files, "PAUSES", (0, 0, 0))
    asked, real = [], optuna.Study.get_trials

    def away(self, *args, **options):
        asked.append(1)
        if len(asked) > 5:
            raise OperationalError("SELECT", {}, Exception("the server is gone"))
        return real(self, *args, **options)

    monkeypatch.setattr(optuna.Study, "get_trials", away)
    assert "the server is gone" in refused(*arguments())
    assert place.joinpath("best.search").exists()


@pytest.mark.parametrize("text", ["0,,1", "x", "-1"])
def test_cards_are_numbers(place, text):  # noqa: ARG001
    result = invoked(*arguments("--gpus", text))
    assert result.exit_code == 2
    assert "--gpus" in result.output


def test_folders_of_others_are_left_alone(place):
    folder = place / "best.search"
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    assert "it holds thesis.tex, which is no search's" in refused(*arguments())
    assert {path.name for path in folder.iterdir()} == {"thesis.tex"}


def test_a_folder_with_a_model_of_the_name_of_ours_is_left_alone(place):
    model = place / "run" / "merged"
    model.mkdir(parents=True)
    (model / "notes.txt").write_text("mine")
    assert "it holds merged, which is no search's" in refused(*arguments("--work", "run"))
    assert [path.name for path in (place / "run").rglob("*")] == ["merged", "notes.txt"]


def test_a_search_goes_on_where_empty_folders_were_lost(place):
    """As version control and object stores do."""
    assert invoked(*arguments(budget=1)).exit_code == 0
    (place / "best.search" / "workers").rmdir()
    assert invoked(*arguments(budget=2)).exit_code == 0


def test_what_file_managers_leave_stops_no_search(place):
    assert invoked(*arguments(budget=1)).exit_code == 0
    (place / "best.search" / ".DS_Store").write_text("")
    assert invoked(*arguments(budget=2)).exit_code == 0
    assert len(log_of(place / "best.search")) == 2


def test_the_output_does_not_lie_in_the_folder_of_the_search(place):
    (place / "run").mkdir()
    command = arguments("--work", "run")
    result = CliRunner().invoke(cli.main, [*command, "-o", "run/best.yml"])
    assert "run holds what the search itself keeps" in " ".join(result.output.split())
    assert not list((place / "run").iterdir())


def test_what_was_made_of_a_front_stays(place):
    """Only the configurations of the search before are replaced."""
    front, words = place / "best.front", []
    for name in "ab":
        words += ["--score", f"{name}={{model}}.json:{name}"]
    front.write_text("")
    command = """echo '{"a": 1, "b": 2}' > {model}.json"""
    assert "because it is no folder; move it away" in refused(*arguments(*words, command=command))
    front.unlink()
    assert invoked(*arguments(*words, command=command, budget=1)).exit_code == 0
    (front / "merged").mkdir()
    (front / "merged" / "model.safetensors").write_text("of an hour's work")
    (front / "trial-0009.yml").write_text("# of another search")
    (front / "trial-0001-tuned.yml").write_text("# mine")
    # What is written beside the base and the experts is gone, too; else this would be refused.
    result = invoked(*arguments(*words, command=command, budget=2))
    assert result.exit_code == 0, result.output
    assert (front / "merged" / "model.safetensors").exists()
    assert (front / "trial-0001-tuned.yml").exists()
    assert not (front / "trial-0009.yml").exists()
    assert not list((place / "best.search").glob("reference*.json"))


def test_checkpoints_of_one_name_are_told_apart_in_the_front(place):
    models = [place / "runs" / name / "checkpoint-500" for name in ("base", "code", "math")]
    for new, path in zip(models, save_family(place / "m", tiny_llama(layers=1)), strict=False):
        new.parent.mkdir(parents=True)
        path.rename(new)
    config = configuration(models, parameters={"density": 0.3}, dtype="float32")
    (place / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    words = [w for name in "ab" for w in ("--score", f"{name}={{model}}/r.json:{name}")]
    command = """echo '{"a": 1, "b": 2}' > {model}/r.json"""
    assert invoked(*arguments(*words, command=command, budget=1)).exit_code == 0
    table = (place / "best.front" / "front.md").read_text()
    for name in ("code", "math"):
        assert f"| {name}/checkpoint-500 | 1 | 2 |" in table


def test_weights_count_whatever_the_output_is_written_as(place):
    result = invoked(*arguments("--no-safe-serialization", budget=3))
    assert result.exit_code == 0, result.output
    assert len({trial["score"] for trial in log_of(place / "best.search")}) == 3
    said = refused(*arguments("--no-safe-serialization", "--no-copy-tokenizer", budget=4))
    assert "it was begun with other models, another configuration, command, options" in said


def test_a_worker_that_finds_nothing_left_blames_nobody(place, monkeypatch):  # noqa: ARG001
    """Another process still tries the second of two trials."""
    from mergekit_pcb.tools import search_files
    from mergekit_pcb.tools.search_space import Found, Trial

    failed = Trial(trial=1, weights=[1.0], shared={}, scores=None, error="it ended", seconds=1.0)
    monkeypatch.setattr(
        search_files, "run", lambda *_: search_files.Searched(Found([failed], minimize=False))
    )
    result = invoked(*arguments(budget=2))
    assert result.exit_code == 0
    assert "not written yet; other workers try the trials that are left" in result.output
    assert "all 1 trials failed" in refused(*arguments(budget=1))


def test_a_search_that_cannot_fit_is_refused_before_it_measures(place, monkeypatch):
    from mergekit_pcb.tools import search_merges

    usage = search_merges.shutil.disk_usage(place)._replace(free=10_000)
    monkeypatch.setattr(search_merges.shutil, "disk_usage", lambda _: usage)
    assert "10.0kB are free there; make room" in refused(*arguments())
    assert not (place / "best.search" / "contributions").exists()


def test_without_matplotlib_a_search_says_so_and_ends_well(place, monkeypatch):  # noqa: ARG001
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoked(*arguments(budget=2))
    assert result.exit_code == 0, result.output
    assert not pathlib.Path("best.png").exists()


def test_a_line_that_another_program_is_writing_is_not_cut_off(place, monkeypatch):
    from mergekit_pcb.tools import search_storage

    assert invoked(*arguments(budget=1)).exit_code == 0
    journal = place / "best.search" / "study.journal"
    copy = place / "copy" / "best.search" / "study.journal"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(journal.read_bytes())
    study_of(copy.parent).set_user_attr("mine", 1)
    line = copy.read_bytes()[journal.stat().st_size :]
    lock = optuna.storages.journal.JournalFileSymlinkLock(str(journal))
    lock.acquire()
    with journal.open("ab", buffering=0) as log:
        log.write(line[:20])

        def end():
            log.write(line[20:])
            lock.release()

        timer = threading.Timer(0.3, end)
        acquire = search_storage._Lock.acquire

        def waited(self):  # it ends while the search already waits
            if not timer.is_alive() and not timer.finished.is_set():
                timer.start()
            return acquire(self)

        monkeypatch.setattr(search_storage._Lock, "acquire", waited)
        result = invoked(*arguments(budget=2))
        timer.join()
    assert result.exit_code == 0, result.output
    assert study_of(journal.parent).user_attrs["mine"] == 1
    assert len(log_of(journal.parent)) == 2


@pytest.mark.slow
def test_who_leaves_first_leaves_what_others_need(place):
    """A search of a smaller budget ends while one of a larger budget goes on."""
    meet = "echo x >> begun; for i in $(seq 600); do test -e go && break; sleep 0.1; done; "
    larger = started(*arguments(command=meet + COMMAND, budget=4))
    wait_for(place / "begun", larger)
    smaller = started(*arguments(command=meet + COMMAND, budget=1))
    said = smaller.communicate(timeout=120)[0]
    assert smaller.returncode == 0, said
    assert "not written yet; other workers try the trials that are left" in said
    assert (place / "best.search" / "contributions" / "index.json").exists()
    (place / "go").touch()
    said = larger.communicate(timeout=120)[0]
    assert larger.returncode == 0, said
    assert len(log_of(place / "best.search")) == 4
    assert not (place / "best.search" / "contributions").exists()
    assert not list((place / "best.search" / "workers").glob("*"))


def test_a_locked_database_is_told(place):
    with contextlib.closing(sqlite3.connect(place / "trials.db", isolation_level=None)) as other:
        other.execute("CREATE TABLE mine (x)")
        other.execute("BEGIN EXCLUSIVE")
        said = refused(*arguments("--storage", "sqlite:///trials.db"))
    assert "cannot open the study in sqlite:///trials.db, because" in said
    assert "locked" in said


@pytest.mark.parametrize("step", ["tell", "claim"])
@pytest.mark.parametrize("error", [PCBError("reach", "it is away", "go on"), OSError(5, "away")])
def test_a_short_outage_ends_nothing(place, monkeypatch, step, error):
    from mergekit_pcb.tools import search_files, search_study

    real, asked = getattr(search_study.Study, step), []

    def away(self, *given):
        asked.append(1)
        if len(asked) in (2, 3):
            raise error
        return real(self, *given)

    monkeypatch.setattr(search_study.Study, step, away)
    monkeypatch.setattr(search_files, "PAUSES", (0, 0, 0))
    result = invoked(*arguments(command="echo {model} 7; echo x >> scored", budget=3))
    assert result.exit_code == 0, result.output
    assert (place / "scored").read_text().split() == ["x"] * 3


@pytest.mark.parametrize("times", [2, 9])
def test_a_score_waits_for_a_storage_that_is_away(place, monkeypatch, times):
    from mergekit_pcb.tools import search_files, search_study

    real, failures = search_study.Study.tell, []

    def away(self, *told):
        if told[0].trial.number == 1 and len(failures) < times:
            failures.append(told)
            raise PCBError("reach the study", "its disk is away", "continue later")
        real(self, *told)

    monkeypatch.setattr(search_study.Study, "tell", away)
    monkeypatch.setattr(search_files, "PAUSES", (0, 0, 0))
    words = arguments(command="echo {model} 7; echo x >> scored", budget=3)
    if times == 2:
        assert invoked(*words).exit_code == 0
        assert (place / "scored").read_text().split() == ["x"] * 3
    else:
        said = refused(*words)
        assert "cannot write down that trial 2 scored [7.0], because its disk is away" in said
        monkeypatch.undo()
        monkeypatch.chdir(place)
        assert invoked(*words).exit_code == 0
    assert [trial["score"] for trial in log_of(place / "best.search")] == [7.0] * 3


# --- In memory --------------------------------------------------------------------------------


def test_a_study_of_ones_own_brings_its_sampler_and_pruner():
    torch.manual_seed(0)
    base = {"w": torch.randn(9, 5)}
    experts = [{"w": base["w"] + 0.1 * torch.randn(9, 5)} for _ in range(2)]
    study = optuna.create_study(
        direction="minimize",
        sampler=optuna.samplers.RandomSampler(seed=3),
        pruner=optuna.pruners.ThresholdPruner(upper=1.0),
    )
    seen = []

    def score(state, trial):
        seen.append(trial.number)
        far = float((state["w"] - experts[0]["w"]).norm())
        trial.report(2.0 if trial.number % 2 else 0.5, step=0)
        if trial.should_prune():
            raise optuna.TrialPruned
        return far

    found = search_weights(score, base, experts, budget=6, study=study, density=0.5)
    assert seen == list(range(6))
    assert [trial.error for trial in found.trials] == [None, "pruned"] * 3
    assert found.minimize
    assert found.best.score == study.best_value
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED"] * 3


def test_a_trial_whose_worker_is_gone_is_taken_over(place):
    """With the values that it had got; who writes with Optuna's own lock waits for nobody."""
    job_folder = place / "best.search"
    assert invoked(*arguments(budget=2)).exit_code == 0
    began = time.monotonic()
    study = study_of(job_folder)
    lost = study.ask()
    lost.suggest_float("weight 1", 0.5, 3.0)
    lost.set_user_attr("worker", "gone")
    assert time.monotonic() - began < 20, "an abandoned lock is waited for as long as 30 s"
    assert invoked(*arguments(budget=4)).exit_code == 0
    trials = log_of(job_folder)
    assert [trial["trial"] for trial in trials] == [1, 2, 3, 4]
    assert trials[2]["weights"][0] == round(lost.params["weight 1"], 4)
