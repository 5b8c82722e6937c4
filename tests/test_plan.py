"""The plan as nodes of mergekit's graph: whoever wraps, schedules or interleaves merges."""

import contextlib
import os
import pathlib
import threading
import time
import types

import pytest
import torch
import yaml
from checkpoints import configuration, merge, run, save_family, tensors, tiny_llama
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods import get
from mergekit.merge_methods.base import ParameterScope
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from reference import pcb as reference
from safetensors.torch import save_file
from test_whole_model import assert_equal_states, whole_reference, with_tokenizer

import mergekit_pcb
from mergekit_pcb.host import read_ahead

# Python imports this module by itself when a process starts.
WRAPPERS = """
import functools, sys
import mergekit.merge_methods
from mergekit.merge_methods.base import GroupMergeMethod, MergeMethod
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit_pcb import PCBMerge

def wrap(owner, name):
    original = getattr(owner, name)
    @functools.wraps(original)
    def traced(*args, **kwargs):
        return original(*args, **kwargs)
    setattr(owner, name, traced)

for owner, name in [{places}]:
    wrap(owner, name)
"""
PLACES = (
    "(MergeMethod, '_execute_resolved')",
    "(GroupMergeMethod, '_execute')",
    "(PCBMerge, '_execute')",
    "(ExecuteMergeMethodTask, 'execute')",
    "(PCBMerge, 'validate_inputs')",
)


def wrapped(tmp_path, *places):
    """The environment of processes in which these functions are called one level deeper."""
    folder = tmp_path / "wrappers"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WRAPPERS.format(places=", ".join(places)))
    return environment(folder)


def environment(folder):
    """Of processes that import ``sitecustomize`` from a folder."""
    rest = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *([rest] if rest else [])])}


def assert_whole_model(out, paths, **parameters):
    states = [tensors(path) for path in paths]
    expected = whole_reference(states, **parameters)
    assert_equal_states(tensors(out), expected, states[0], tolerance=1e-4)


@pytest.mark.parametrize(
    "places",
    [PLACES[1:4:2], *(pytest.param((place,), marks=pytest.mark.slow) for place in PLACES)],
    ids=str,
)
def test_a_further_call_level_changes_nothing(tmp_path, family, places):
    config = configuration(family, parameters={"scope": "model", "density": 0.2})
    out, result = merge(tmp_path / "m", config, **wrapped(tmp_path, *places))
    assert "Error in sitecustomize" not in result.stderr
    assert_whole_model(out, family, density=0.2)


@pytest.mark.slow
def test_stages_under_a_wrapper(tmp_path, family):
    parameters = {"scope": "model", "density": 0.3}
    first = {**configuration(family[:3], parameters=parameters), "name": "first"}
    second = configuration([family[0], "first", family[3]], parameters=parameters)
    file, stages, out = tmp_path / "multi.yml", tmp_path / "stages", tmp_path / "out"
    file.write_text(yaml.safe_dump_all([first, second]))
    options = ["-I", stages, "--out-path", out, "--no-copy-tokenizer"]
    result = run("mergekit-multi", file, *options, **wrapped(tmp_path, *PLACES))
    assert "Error in sitecustomize" not in result.stderr
    assert_whole_model(stages / "first", family[:3], density=0.3)
    assert_whole_model(out, [family[0], stages / "first", family[3]], density=0.3)


def test_single_files_under_a_wrapper(tmp_path, family):
    files = []
    for path in family:
        files.append(tmp_path / f"{path.name}.safetensors")
        save_file(tensors(path), files[-1])
    config = configuration(files, parameters={"scope": "model", "density": 0.2})
    out, result = merge(
        tmp_path / "m", config, command="mergekit-pytorch", **wrapped(tmp_path, *PLACES[2:])
    )
    assert "Error in sitecustomize" not in result.stderr
    assert_whole_model(out, files, density=0.2)


# --- Tasks that were not planned by us ------------------------------------------------------


def plain_task(name="w", **chosen):
    """A task of mergekit's own for two tasks, made by hand, optional as some weights are."""
    base, first, second = models = [ModelReference.parse(f"./{name}") for name in "bcm"]
    info = WeightInfo(name=name, optional=True)
    values = {spec.name: (spec.scope, spec.default) for spec in get("pcb").spec.parameters}
    values |= {n: (values[n][0], value) for n, value in chosen.items()}
    shared = {n: v for n, (scope, v) in values.items() if scope == ParameterScope.SHARED}
    own = {n: v for n, (scope, v) in values.items() if scope == ParameterScope.NON_BASE}
    task = ExecuteMergeMethodTask(
        method_name="pcb",
        gather_tensors=GatherTensors(weight_info=ImmutableMap(dict.fromkeys(models, info))),
        model_order=tuple(models),
        base_model=base,
        output_weight=info,
        parameters=ImmutableMap(shared),
        input_parameters=ImmutableMap({model: ImmutableMap(own) for model in models}),
    )
    return task, (base, first, second)


@pytest.mark.parametrize(
    ("chosen", "asked"),
    [
        ({"scope": "model"}, "scope: model"),
        ({"scope": "model", "statistics": "s.json"}, "scope: model"),
        ({"dare_density": 0.5}, "dare_density"),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_a_task_that_dodged_the_planning_is_refused_where_that_matters(chosen, asked, missing):
    task, models = plain_task(**chosen)
    given = {model: torch.randn(9, 7) for model in models}
    if missing:
        del given[models[1]]
    with pytest.raises(mergekit_pcb.PCBError, match=rf"cannot use {asked} for tensor w, because"):
        task.execute(given)


def test_a_task_that_dodged_the_planning_merges_where_it_does_not():
    task, models = plain_task(density=0.3)
    given = {model: torch.randn(9, 7).double() for model in models}
    rows = list(given.values())
    expected = reference(rows[0], rows[1:], density=0.3)
    assert torch.allclose(task.execute(given), expected, rtol=1e-12)


def test_a_node_that_is_not_given_what_was_measured_refuses():
    from mergekit_pcb.host.nodes import nodes_of
    from mergekit_pcb.host.plan import Plan

    plain, models = plain_task(scope="model")
    (node,) = nodes_of(Plan([plain], MergeOptions()))
    assert set(node.arguments()) == {"tensors", "measured"}
    with pytest.raises(mergekit_pcb.PCBError, match="cannot use scope: model for tensor w"):
        node.execute({model: torch.randn(9, 7) for model in models})


@pytest.mark.slow
def test_a_host_that_plans_otherwise_is_said_once_and_refused(tmp_path, family):
    """A later mergekit, played by one more parameter of its planner."""
    folder = tmp_path / "later"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder, SourceFileLoader\n"
        "class Later(SourceFileLoader):\n"
        "    def source_to_code(self, data, path, **options):\n"
        "        data = data.replace(b'def _plan(self):', b'def _plan(self, more=None):')\n"
        "        return super().source_to_code(data, path, **options)\n"
        "    def get_code(self, name):\n"
        "        path = self.get_filename(name)\n"
        "        return self.source_to_code(self.get_data(path), path)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'mergekit.plan':\n"
        "            spec = PathFinder.find_spec(name, path)\n"
        "            spec.loader = Later(name, spec.origin)\n"
        "            return spec\n"
        "sys.meta_path.insert(1, Finder())\n"
    )
    later = environment(folder)
    out, result = merge(tmp_path / "tensor", configuration(family), **later)
    assert result.stderr.count("cannot provide all of merge_method: pcb, because") == 1
    expected, _ = merge(tmp_path / "today", configuration(family))
    assert all(torch.equal(tensors(out)[n], t) for n, t in tensors(expected).items())
    config = configuration(family, parameters={"scope": "model"})
    out, result = merge(tmp_path / "model", config, check=False, **later)
    assert result.returncode == 1
    assert "Error: cannot use scope: model for tensor" in result.stderr
    assert not list(out.glob("*.safetensors"))


# --- Schedules ------------------------------------------------------------------------------


def planner(paths, options=None, **more):
    from mergekit.architecture import get_architecture_info
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.plan import MergePlanner

    options = options or MergeOptions(quiet=True)
    config = MergeConfiguration.model_validate(configuration(paths, **more))
    LoaderCache().setup(options)
    architecture = get_architecture_info(config, options)
    out = _model_out_config(config, architecture)
    return MergePlanner(config, architecture, options=options, out_model_config=out)


@pytest.mark.parametrize("way", ["one after the other", "interleaved"])
def test_merges_planned_together_stay_apart(tmp_path, way):
    families = [save_family(tmp_path / f"f{i}", tiny_llama(layers=1), tasks=2) for i in range(2)]
    densities = [0.1, 0.3]
    planners = [
        planner(paths, parameters={"scope": "model", "density": density})
        for paths, density in zip(families, densities, strict=True)
    ]
    outs = [tmp_path / f"out{i}" for i in range(2)]
    targets = [p.plan_to_disk(str(out)) for p, out in zip(planners, outs, strict=True)]
    runs = [Executor(t).run(quiet=True) for t in targets]
    if way == "interleaved":
        while any([next(steps, None) is not None for steps in runs]):  # noqa: C419 - both go on
            pass
    else:
        for steps in reversed(runs):
            list(steps)
    for paths, density, out in zip(families, densities, outs, strict=True):
        assert_whole_model(out, paths, density=density)


def test_seventy_merges_alive_at_once(tmp_path):
    paths = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2)
    scales = [1 + number / 70 for number in range(70)]
    plans = [
        planner(paths, parameters={"scope": "model", "lambda": scale}).plan_to_disk(
            str(tmp_path / f"out{number}")
        )
        for number, scale in enumerate(scales)
    ]
    for number in (0, 1, 69):
        for _ in Executor(plans[number]).run(quiet=True):
            pass
        assert_whole_model(tmp_path / f"out{number}", paths, lam=scales[number])


@pytest.fixture
def stand_in_devices(monkeypatch):
    """Two devices for mergekit's multi-GPU executor, both of them the CPU."""
    from mergekit import multigpu_executor

    from mergekit_pcb.host import plan

    nothing = types.SimpleNamespace(synchronize=lambda **_: None)
    for module in (multigpu_executor, plan):
        monkeypatch.setattr(module, "get_torch_accelerator_type", lambda: "cpu")
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_count", lambda: 2)
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_module", lambda _: nothing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())


@pytest.mark.usefixtures("stand_in_devices")
@pytest.mark.parametrize("union", [False, True], ids=["one vocabulary", "union"])
def test_on_several_devices_measuring_leads_and_merges_are_spread(tmp_path, monkeypatch, union):
    from mergekit.multigpu_executor import MultiGPUExecutor

    from mergekit_pcb.host import nodes

    paths = save_family(tmp_path / "models", tiny_llama(layers=2), tasks=1)
    paths += save_family(tmp_path / "wider", tiny_llama(layers=2, vocabulary=68), tasks=1)[1:]
    words = [f"w{i}" for i in range(64)]
    longer = [*words, "new", "more", "other", "last"]
    for path, vocabulary in zip(paths, (words, words, longer), strict=True):
        with_tokenizer(path, vocabulary)
    if not union:
        paths = paths[:2]
    more = {"tokenizer": {"source": "union"}} if union else {}
    options = MergeOptions(quiet=True, multi_gpu=True)
    parameters = {"scope": "model", "density": 0.2}
    out = tmp_path / "out"
    targets = planner(paths, options, parameters=parameters, **more).plan_to_disk(str(out))
    single = tmp_path / "single"
    run_in_process(configuration(paths, parameters=parameters, **more), single)
    seen, statistics_of = [], nodes.statistics_of

    def measured(inputs):
        assert not out.exists()
        seen.append(threading.current_thread())
        return statistics_of(inputs)

    monkeypatch.setattr(nodes, "statistics_of", measured)
    executor = MultiGPUExecutor(targets)
    leading = [type(handle.task()).__name__ for handle in executor.leading_main_handles]
    kinds = {"OrderedTokenizer", "SavedTokenizer"} if union else set()
    assert set(leading) == {*kinds, "MeasureModel", "TensorWriterTask"}
    merges = {
        device: sum(isinstance(handle.task(), nodes.MergeTensor) for handle in handles)
        for device, handles in executor.gpu_assignments.items()
    }
    assert len(merges) == 2
    assert min(merges.values()) >= 5
    found = [value for _, value in executor.run(quiet=True)]
    assert seen == [threading.main_thread()]
    assert all(torch.equal(tensors(out)[n], t) for n, t in tensors(single).items())
    assert sum(hasattr(value, "tokenizer") for value in found) == union


@pytest.mark.usefixtures("stand_in_devices")
def test_several_devices_lose_no_result_that_is_collected_late(tmp_path, monkeypatch):
    from mergekit.multigpu_executor import MultiGPUExecutor

    paths = save_family(tmp_path / "models", tiny_llama(layers=2), tasks=2)
    options = MergeOptions(quiet=True, multi_gpu=True)
    out, single = tmp_path / "out", tmp_path / "single"
    executor = MultiGPUExecutor(planner(paths, options).plan_to_disk(str(out)))
    collect = executor.task_completion_queue.get

    def late(**more):
        time.sleep(0.01)
        return collect(**more)

    monkeypatch.setattr(executor.task_completion_queue, "get", late)
    list(executor.run(quiet=True))
    run_in_process(configuration(paths), single)
    assert tensors(out).keys() == tensors(single).keys()
    assert all(torch.equal(tensors(out)[n], t) for n, t in tensors(single).items())


def run_in_process(config, out, **options):
    from mergekit.merge import run_merge

    chosen = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False, **options)
    run_merge(MergeConfiguration.model_validate(config), str(out), chosen)


def test_measuring_refuses_before_the_folder_exists(tmp_path):
    from mergekit.scripts.run_yaml import main
    from test_bad_input import refused

    paths = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2)
    state = tensors(paths[2])
    state["model.norm.weight"][3] = float("inf")
    save_file(state, paths[2] / "model.safetensors", metadata={"format": "pt"})
    for path in paths:
        with_tokenizer(path, ["a", "b"])
    for more in ({}, {"tokenizer": {"source": "union"}}):
        config = configuration(paths, parameters={"scope": "model"}, **more)
        assert "holds NaN or infinity" in refused(tmp_path, config, main)
        assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system that takes no advice")
@pytest.mark.parametrize("refused", [False, True])
def test_what_lies_behind_a_tensor_is_read_ahead(tmp_path, monkeypatch, refused):
    """And a system that refuses to is no reason not to merge."""
    from mergekit.merge import run_merge

    paths = save_family(tmp_path / "models", tiny_llama(layers=2), tasks=2, shard_size="60KB")
    asked = {}

    def advised(file, offset, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        shard = pathlib.Path(f"/proc/self/fd/{file}").readlink()
        asked.setdefault(shard, []).append((offset, length))
        if refused:
            raise OSError("no such advice")

    monkeypatch.setattr(os, "posix_fadvise", advised)
    monkeypatch.setattr(read_ahead, "FEWEST_BYTES", 1)
    config = MergeConfiguration.model_validate(configuration(paths))
    run_merge(config, str(tmp_path / "out"), MergeOptions(copy_tokenizer=False, quiet=True))
    shards = [shard for path in paths for shard in path.glob("*.safetensors")]
    assert len(shards) > len(paths)
    assert asked.keys() == set(shards)
    for shard in shards:
        places = read_ahead._places(shard)
        assert max(end for _, end in places.values()) == shard.stat().st_size
        assert sorted(asked[shard]) == sorted((e, e - b) for b, e in places.values())
        # What the table says is what the file holds.
        content, state = shard.read_bytes(), tensors(shard)
        for name, (begin, end) in places.items():
            assert content[begin:end] == state[name].numpy().tobytes()
    assert tensors(tmp_path / "out").keys() == tensors(paths[0]).keys()


def test_a_plan_in_memory_as_mergekit_evolve_makes_it(tmp_path):
    paths = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2)
    for scope in ("tensor", "model"):
        made = planner(paths, parameters={"scope": scope, "density": 0.2}).plan_in_memory()
        found = {t.weight_info.name: value for t, value in Executor(made).run(quiet=True)}
        states = [tensors(path) for path in paths]
        if scope == "model":
            expected = whole_reference(states, density=0.2)
        else:
            rest = states[1:]
            expected = {
                n: reference(t, [s[n] for s in rest], density=0.2) for n, t in states[0].items()
            }
        assert_equal_states(found, expected, states[0])


def test_a_foreign_method_of_the_name_is_planned_by_nobody(tmp_path, monkeypatch):
    import dataclasses

    from mergekit.merge_methods import registry

    linear = get("linear")
    foreign = type(linear)(dataclasses.replace(linear.spec, name="pcb"), linear.implementation)
    monkeypatch.setitem(registry._METHODS, "pcb", foreign)
    paths = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=2)
    targets = planner(paths, parameters={"weight": 1.0}).plan_to_disk(str(tmp_path / "out"))
    kinds = {type(task.tensor_task) for task in targets if hasattr(task, "tensor_task")}
    assert kinds == {ExecuteMergeMethodTask}


def test_wrapping_twice_is_wrapping_once():
    import mergekit.plan
    import mergekit.scripts.merge_raw_pytorch as raw

    from mergekit_pcb.host import planning

    before = mergekit.plan.MergePlanner._plan, raw.plan_flat_merge
    planning.wrap_planner(mergekit.plan)
    planning.wrap_raw_planner(raw)
    assert (mergekit.plan.MergePlanner._plan, raw.plan_flat_merge) == before
