"""The borders between the rooms, read from their imports."""

import ast
import pathlib

import pytest

import mergekit_pcb

PACKAGE = pathlib.Path(mergekit_pcb.__file__).parent
# Each room and what it may import of this package; nothing else, and no cycles.
ARROWS = {
    # all but the first only for type checkers
    "__init__": {"_autoload", "adaptive", "errors", "method", "search", "state_dicts"},
    "__main__": {"cli"},
    "_autoload": {"method"},
    "errors": set(),
    "files": set(),
    "balance": set(),
    "ranks": set(),
    "dare": set(),
    "task_vectors": {"dare"},
    "statistics": {"balance", "dare", "ranks", "task_vectors"},
    "merging": {"balance", "statistics", "task_vectors"},
    "checkpoints": {"errors", "task_vectors"},
    "document": {"balance", "dare", "errors", "files", "statistics"},
    "whole_model": {
        "balance",
        "checkpoints",
        "dare",
        "document",
        "errors",
        "statistics",
        "task_vectors",
    },
    "method": {
        "checkpoints",
        "merging",
        "dare",
        "errors",
        "statistics",
        "task_vectors",
        "whole_model",
    },
    "demo": {"errors"},
    "adapters": {"errors", "files"},
    "check": {"checkpoints", "errors", "method", "task_vectors", "whole_model"},
    "state_dicts": {
        "merging",
        "dare",
        "errors",
        "method",
        "statistics",
        "task_vectors",
        "whole_model",
    },
    "adaptive": {"errors", "state_dicts"},
    "search": {
        "checkpoints",
        "merging",
        "errors",
        "files",
        "method",
        "state_dicts",
        "statistics",
        "task_vectors",
    },
    "report": {
        "checkpoints",
        "errors",
        "files",
        "merging",
        "method",
        "statistics",
        "task_vectors",
    },
    "figures": {"errors", "report"},  # the last only for type checkers
    "cli": {
        "adapters",
        "check",
        "checkpoints",
        "figures",
        "report",
        "search",
        "demo",
        "errors",
        "whole_model",
    },
}
# Rooms that must not know the host, and the one that must import hardly anything at all.
WITHOUT_MERGEKIT = {
    "balance",
    "ranks",
    "dare",
    "task_vectors",
    "statistics",
    "merging",
    "errors",
    "files",
    "demo",
}


def imports(room):
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "mergekit_pcb":
                yield from (f"mergekit_pcb.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def test_every_room_has_its_border():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_run_one_way(room):
    own = {name.split(".")[1] for name in imports(room) if name.startswith("mergekit_pcb.")}
    assert own - {"__version__", "register"} <= ARROWS[room]


@pytest.mark.parametrize("room", sorted(WITHOUT_MERGEKIT))
def test_the_mathematics_does_not_know_the_host(room):
    assert not [name for name in imports(room) if name.split(".")[0] == "mergekit"]


def test_the_method_imports_only_what_the_half_initialised_host_has_loaded():
    host = {name for name in imports("method") if name.startswith("mergekit.")}
    host -= {"mergekit.merge_methods.task_adapter"}  # for type checkers only
    assert host == {
        "mergekit.merge_methods",
        "mergekit.merge_methods.base",
        "mergekit.merge_methods.dtype",
    }


def test_every_room_says_where_its_border_runs():
    for room in ARROWS:
        assert ast.get_docstring(ast.parse((PACKAGE / f"{room}.py").read_text())), room
