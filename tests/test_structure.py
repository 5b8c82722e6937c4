"""The borders between floors and rooms, read from their imports."""

import ast
import pathlib

import pytest

import mergekit_pcb

PACKAGE = pathlib.Path(mergekit_pcb.__file__).parent
# Each room and what it may import of this package; nothing else, and no cycles.
ARROWS = {
    # all but the first only for type checkers
    "__init__": {
        "_autoload",
        "errors",
        "host.method",
        "state_dicts",
        "tools.adamerge",
        "tools.search",
    },
    "__main__": {"tools.cli"},
    "_autoload": {"errors", "host.method", "host.multi_gpu", "host.planning"},
    "errors": set(),
    "files": {"errors"},
    "state_dicts": {
        "core.measure",
        "core.refine",
        "core.vectors",
        "errors",
        "host.groups",
        "host.in_memory",
        "host.kinds",
        "host.method",
        "host.prepared",
    },
    "core.__init__": set(),
    "core.pools": set(),
    "core.dare": {"core.pools"},
    "core.formulas": set(),
    "core.cells": set(),
    "core.ranks": {"core.cells"},
    "core.vectors": {"core.dare"},
    "core.intrinsics": {"core.vectors"},
    "core.kernels": {"core.formulas", "core.intrinsics", "core.vectors"},
    "core.walks": {"core.intrinsics", "core.kernels", "core.ranks", "core.vectors"},
    "core.philox": {"core.dare", "core.intrinsics", "core.vectors"},
    "core.gpu_kernels": {"core.cells", "core.formulas"},
    "core.gpu_masks": {"core.dare"},
    "core.gpu": {
        "core.cells",
        "core.formulas",
        "core.gpu_masks",
        "core.ranks",
        "core.tally",
        "core.vectors",
    },
    "core.tally": {"core.ranks", "core.vectors"},
    "core.rehearsal": {"core.dare", "core.formulas", "core.ranks", "core.vectors"},
    "core.fused": {
        "core.cells",
        "core.dare",
        "core.formulas",
        "core.gpu",
        "core.gpu_kernels",
        "core.philox",
        "core.pools",
        "core.ranks",
        "core.rehearsal",
        "core.tally",
        "core.vectors",
        "core.walks",
    },
    "core.measure": {
        "core.dare",
        "core.formulas",
        "core.fused",
        "core.ranks",
        "core.sample",
        "core.tally",
        "core.vectors",
    },
    "core.sample": {"core.cells", "core.pools", "core.ranks", "core.vectors"},
    "core.merge": {"core.formulas", "core.fused", "core.measure", "core.vectors"},
    "core.matrices": {"core.vectors"},
    "core.products": {"core.pools"},
    "core.spectrum": {"core.matrices", "core.products"},
    "core.solve": {"core.matrices", "core.measure", "core.merge", "core.products"},
    "core.refine": {
        "core.matrices",
        "core.measure",
        "core.merge",
        "core.solve",
        "core.spectrum",
        "core.vectors",
    },
    "host.__init__": set(),
    "host.parameters": {"core.dare", "core.matrices", "core.measure", "core.refine", "errors"},
    "host.groups": {"core.measure", "core.solve", "core.vectors", "errors"},
    "host.kinds": {"core.matrices"},
    "host.architecture": {"host.kinds"},
    "host.prepared": {
        "core.measure",
        "core.merge",
        "core.refine",
        "core.vectors",
        "errors",
        "host.groups",
        "host.kinds",
        "host.parameters",
    },
    "host.in_memory": {
        "core.measure",
        "core.vectors",
        "errors",
        "host.groups",
        "host.kinds",
        "host.parameters",
        "host.prepared",
    },
    "host.checkpoints": {"host.damage", "host.plan"},
    "host.configuration": {"errors", "files"},
    "host.method": {
        "_autoload",
        "errors",
        "host.groups",
        "host.in_memory",
        "host.parameters",
        "host.prepared",
    },
    "host.plan": {
        "core.measure",
        "errors",
        "host.architecture",
        "host.kinds",
        "host.parameters",
        "host.prepared",
    },
    "host.refined": {
        "core.refine",
        "core.solve",
        "core.spectrum",
        "errors",
        "host.inputs",
        "host.kinds",
        "host.parameters",
        "host.plan",
    },
    "host.damage": {"errors"},
    "host.inputs": {
        "core.vectors",
        "errors",
        "host.checkpoints",
        "host.damage",
        "host.groups",
        "host.method",
        "host.parameters",
        "host.plan",
    },
    "host.statistics_file": {"core.dare", "core.formulas", "core.measure", "errors", "files"},
    "host.whole_model": {
        "core.measure",
        "core.vectors",
        "errors",
        "host.groups",
        "host.inputs",
        "host.statistics_file",
    },
    "host.multi_gpu": {"host.nodes", "host.planning"},
    "host.nodes": {
        "host.checkpoints",
        "host.groups",
        "host.inputs",
        "host.kinds",
        "host.parameters",
        "host.plan",
        "host.prepared",
        "host.read_ahead",
        "host.whole_model",
    },
    "host.read_ahead": set(),
    "host.vocabulary": {"errors", "host.nodes"},
    "host.advice": {
        "errors",
        "host.checkpoints",
        "host.configuration",
        "host.kinds",
        "host.parameters",
        "host.plan",
        "host.refined",
    },
    "host.planning": {
        "errors",
        "files",
        "host.advice",
        "host.configuration",
        "host.damage",
        "host.method",
        "host.nodes",
        "host.plan",
        "host.prepared",
        "host.refined",
        "host.vocabulary",
    },
    "tools.__init__": set(),
    "tools.adamerge": {"errors", "host.groups", "state_dicts"},
    "tools.adapters": {"errors", "files"},
    "tools.check_text": {"errors", "files", "host.configuration", "host.parameters", "host.plan"},
    "tools.check_base": {"core.vectors", "files", "host.inputs", "host.plan"},
    "tools.check": {
        "core.cells",
        "core.vectors",
        "errors",
        "files",
        "host.advice",
        "host.configuration",
        "host.inputs",
        "host.parameters",
        "host.plan",
        "host.planning",
        "host.refined",
        "host.whole_model",
        "tools.check_base",
        "tools.check_text",
    },
    "tools.counts": {"core.merge", "core.refine", "core.vectors", "host.prepared"},
    "tools.small_llama": {"errors"},
    "tools.demo_folder": {"errors", "files"},
    "tools.demo": {"errors", "files", "tools.demo_folder", "tools.small_llama"},
    "tools.demo_page": {"tools.demo_folder", "tools.figures"},
    "tools.figures": {"errors", "tools.counts"},
    "tools.page": {"files", "tools.counts", "tools.figures"},
    "tools.report": {"errors", "files", "host.plan", "host.planning", "tools.counts"},
    "tools.search_space": {"errors"},
    "tools.search": {"state_dicts", "tools.search_space"},
    "tools.search_scores": {"errors", "tools.search_space"},
    "tools.search_job": {
        "errors",
        "files",
        "host.configuration",
        "host.parameters",
        "tools.search_scores",
        "tools.search_space",
    },
    "tools.search_storage": {"errors", "files", "tools.search_job", "tools.search_space"},
    "tools.search_study": {
        "core.dare",
        "errors",
        "tools.search_job",
        "tools.search_scores",
        "tools.search_space",
        "tools.search_storage",
    },
    "tools.search_merges": {
        "core.dare",
        "core.matrices",
        "core.measure",
        "core.refine",
        "core.vectors",
        "errors",
        "files",
        "host.groups",
        "host.inputs",
        "host.plan",
        "host.planning",
        "host.prepared",
        "host.statistics_file",
        "tools.search_job",
        "tools.search_space",
        "tools.search_storage",
    },
    "tools.search_figures": {"files", "tools.figures", "tools.search_space", "tools.search_study"},
    "tools.search_files": {
        "errors",
        "files",
        "host.configuration",
        "tools.search_figures",
        "tools.search_job",
        "tools.search_merges",
        "tools.search_scores",
        "tools.search_space",
        "tools.search_storage",
        "tools.search_study",
    },
    "tools.cli_options": {"errors", "files", "host.configuration", "host.plan"},
    "tools.cli_search": {
        "errors",
        "tools.cli_options",
        "tools.search_files",
        "tools.search_job",
        "tools.search_scores",
        "tools.search_space",
    },
    "tools.cli": {
        "errors",
        "files",
        "host.inputs",
        "host.planning",
        "host.whole_model",
        "tools.adapters",
        "tools.check",
        "tools.cli_options",
        "tools.cli_search",
        "tools.demo",
        "tools.demo_folder",
        "tools.demo_page",
        "tools.figures",
        "tools.page",
        "tools.report",
    },
}
FLOORS = ("core", "host", "tools")
# Longer than this, a module has more than one job.
LONGEST = 330
COMPILED = {"core.intrinsics", "core.kernels", "core.philox", "core.walks"}
FOR_GPUS = {"core.gpu_kernels", "core.gpu_masks"}


def path_of(room):
    return PACKAGE.joinpath(*room.split(".")).with_suffix(".py")


def imports(room):
    for node in ast.walk(ast.parse(path_of(room).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{room} imports by a relative name, which hides what it is"
            module = str(node.module)
            if (
                module.startswith("mergekit_pcb")
                and (PACKAGE.parent / module.replace(".", "/")).is_dir()
            ):
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def own_imports(room):
    own = {name.removeprefix("mergekit_pcb.") for name in imports(room) if "mergekit_pcb." in name}
    return own - {"__version__", "register"}


def test_every_room_has_its_border():
    files = {path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    assert {".".join(file.parts) for file in files} == set(ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_run_one_way(room):
    assert own_imports(room) <= ARROWS[room]


def test_arrows_run_downwards_and_in_no_circle():
    def floor(room):
        return FLOORS.index(room.split(".")[0]) if "." in room else None

    for room, below in ARROWS.items():
        for other in below:
            assert None in (floor(room), floor(other)) or floor(other) <= floor(room), (room, other)
    # _autoload is at both ends: it starts the host, whose method makes sure that it watches.
    left = {room: set(below) for room, below in ARROWS.items() if not room.startswith("_")}
    while left:
        ready = [room for room, below in left.items() if not below & left.keys()]
        assert ready, left
        for room in ready:
            del left[room]


def test_compiled_code_is_named_by_all_that_it_is_made_from():
    """Or an old compilation would outlive a change of what it came from."""
    from mergekit_pcb.core import intrinsics

    made_from = COMPILED.union(*(ARROWS[room] for room in COMPILED))
    assert {f"core.{name}" for name in intrinsics._SOURCES} == made_from


@pytest.mark.parametrize("room", sorted(room for room in ARROWS if room.startswith("core.")))
def test_the_mathematics_knows_torch_and_numpy_alone(room):
    import sys

    known = {*sys.stdlib_module_names, "torch", "numpy", "mergekit_pcb"}
    if room in COMPILED:  # whose import may fail
        known |= {"numba", "llvmlite"}
    if room in FOR_GPUS:
        known |= {"triton"}
    assert {name.split(".")[0] for name in imports(room)} <= known


def test_only_the_host_and_what_checks_texts_know_mergekit():
    knows = {r for r in ARROWS if any(n.split(".")[0] == "mergekit" for n in imports(r))}
    allowed = {"state_dicts", "_autoload", "tools.check", "tools.check_text", "tools.cli_options"}
    assert {room for room in knows if not room.startswith("host.")} <= allowed


def test_the_method_imports_only_what_the_half_initialised_host_has_loaded():
    rooms = ["host.method", *(r for r in ARROWS["host.method"] if r.startswith("host."))]
    host = {name for room in rooms for name in imports(room) if name.startswith("mergekit.")}
    assert host == {
        "mergekit.merge_methods",
        "mergekit.merge_methods.base",
        "mergekit.merge_methods.dtype",
    }


def test_no_caller_is_looked_at():
    words = ["currentframe", "_getframe", "f_locals", "f_back", "inspect.stack", "walk_stack"]
    words += ["tb_frame", "get_referrers"]
    for room in ARROWS:
        text = path_of(room).read_text()
        assert not [word for word in words if word in text], room


def test_every_room_is_short_and_says_where_its_border_runs():
    for room in ARROWS:
        text = path_of(room).read_text()
        assert ast.get_docstring(ast.parse(text)), room
        assert len(text.splitlines()) <= LONGEST, room
