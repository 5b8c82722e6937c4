"""Texts about code with classes, from the sources of what this benchmark depends on anyway.

Five tasks, of which each file gives some examples:

- *package*: the first paragraph of a docstring; which package is it from?
- *exception*: the message of an exception; of which type?
- *type*: a parameter's description; what is passed for it?
- *section*: a paragraph of a docstring; from which of its sections?
- *part*: a paragraph of a C++ header; to which part of torch does it belong?

A text stands once in a task, and not at all if it stands there with two classes.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.util
import pathlib
import random
import re
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from mergekit_pcb.errors import PCBError

PACKAGES = (
    "matplotlib", "networkx", "numpy", "scipy", "sklearn", "sympy", "torch", "transformers"
)  # fmt: skip
STANDARD_LIBRARY = "python"
LEFT_OUT = {"site-packages", "_vendor", "test", "tests", "testing", "idlelib", "lib2to3"}
#: So many files of a package, drawn once for all: the large ones would outweigh the others.
FILES = 1500
#: Longer texts are cut; what tells classes apart stands at the beginning.
CHARACTERS = 400
SHORTEST = 12

TYPES = {
    "int": "int", "integer": "int", "float": "float", "bool": "bool", "boolean": "bool",
    "str": "str", "string": "str", "ndarray": "array", "array": "array", "array_like": "array",
    "array-like": "array", "np.ndarray": "array", "list": "sequence", "tuple": "sequence",
    "sequence": "sequence", "iterable": "sequence", "callable": "function", "function": "function",
}  # fmt: skip
SECTIONS = (
    "attributes", "examples", "notes", "parameters", "raises", "references", "returns", "see also",
)  # fmt: skip
PARTS = (
    "ATen/core", "ATen/cpu", "ATen/native", "c10/core", "c10/util", "google/protobuf",
    "torch/csrc/api", "torch/csrc/autograd", "torch/csrc/distributed", "torch/csrc/jit",
    "torch/csrc/lazy", "torch/csrc/utils",
)  # fmt: skip
#: Lines of a header that look alike everywhere, or name the part.
TELLTALE = ("#", "namespace", "}", "//===", "using namespace")
EXCEPTIONS = (
    "AssertionError", "NotImplementedError", "RuntimeError", "TypeError", "ValueError"
)  # fmt: skip

#: Of each task, its classes.
CLASSES: dict[str, tuple[str, ...]] = {
    "package": tuple(sorted((*PACKAGES, STANDARD_LIBRARY))),
    "exception": EXCEPTIONS,
    "type": tuple(sorted(set(TYPES.values()))),
    "section": SECTIONS,
    "part": PARTS,
}
#: ``name : type`` as numpy documents parameters, and ``name (`type`)`` as transformers does.
NUMPY = re.compile(r"^( *)\*{0,2}\w+ : ([\w.-]+).*\n((?:\1 +\S.*\n?)+)", re.MULTILINE)
#: A section as numpy documents it: its name and what stands there.
SECTION = re.compile(
    r"^([A-Z][\w ]+)\n-{3,}\n(.*?)(?=^[A-Z][\w ]+\n-{3,}\n|\Z)", re.MULTILINE | re.DOTALL
)
#: Where statements stand in others. The bodies of conditional expressions and lambdas are none.
BLOCKS = {"body", "handlers", "orelse", "finalbody", "cases"}
#: Of a section, so many paragraphs.
PARAGRAPHS = 3
GOOGLE = re.compile(r"^( *)\w+ \(`?([\w.-]+).*\):\s*\n((?:\1 +\S.*\n?)+)", re.MULTILINE)


class Example(NamedTuple):
    """A text, its class, and the file that it is from."""

    file: str
    label: int
    text: str


class Pair(NamedTuple):
    """The first paragraph of a function's docstring, and the function's body without it."""

    file: str
    words: str
    code: str


class Texts(NamedTuple):
    """Of every task its examples; and pairs to find one another."""

    examples: dict[str, list[Example]]
    pairs: list[Pair]


@lru_cache(maxsize=1)
def texts() -> Texts:
    """All examples of all tasks, in an order of their own; reading takes half a minute."""
    with _uncollected():
        return _read()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the search for circles of objects: a third of the time, for trees have none."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _read() -> Texts:
    found: dict[str, dict[str, set[tuple[str, str]]]] = {task: {} for task in CLASSES}
    pairs: dict[str, Pair] = {}

    def add(task: str, label: str, text: str, file: str) -> None:
        tidy = " ".join(text.split())[:CHARACTERS]
        if len(tidy) >= SHORTEST:
            found[task].setdefault(tidy, set()).add((label, file))

    for part, header in _headers():
        for paragraph in re.split(r"\n\s*\n", header.read_text(encoding="utf-8", errors="replace")):
            lines = [line.strip() for line in paragraph.splitlines()]
            told = [line for line in lines if not line.startswith(TELLTALE)]
            add("part", part, " ".join(told), f"{part}/{header.name}")
    for package, folder, file in _files():
        source = file.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(source)
        except SyntaxError:  # files that their package's tests want broken
            continue
        name = f"{package}/{file.relative_to(folder).as_posix()}"
        lines = source.splitlines()
        for node in _statements(tree):
            for task, label, text in _of_node(package, node):
                add(task, label, text, name)
            if isinstance(node, ast.FunctionDef) and (words := _summary(node)):
                code = " ".join(_body(node, lines).split())[:CHARACTERS]
                if len(code) > 4 * SHORTEST:
                    pairs.setdefault(words, Pair(name, words, code))
    examples = {}
    for task, classes in CLASSES.items():
        examples[task] = [
            Example(min(name for _, name in places), classes.index(label), text)
            for text, places in sorted(found[task].items())
            for label in {label for label, _ in places}
            if len({label for label, _ in places}) == 1
        ]
    return Texts(examples, sorted(pairs.values()))


def refuse_missing() -> None:
    """Raise :class:`PCBError` if a package whose sources are read is not installed."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise PCBError(
            "read the texts of the suite encoder",
            f"they are sources of packages, of which {', '.join(missing)} is not installed",
            "pip install '.[bench-pretrained]'",
        )


def _files() -> Iterator[tuple[str, pathlib.Path, pathlib.Path]]:
    for package in CLASSES["package"]:
        module = "ast" if package == STANDARD_LIBRARY else package
        folder = pathlib.Path(str(importlib.util.find_spec(module).origin)).parent
        files = [
            file
            for file in sorted(folder.rglob("*.py"))
            if not LEFT_OUT & set(file.relative_to(folder).parts)
        ]
        random.Random(package).shuffle(files)  # noqa: S311 - not for secrets
        for file in files[:FILES]:
            yield package, folder, file


def _headers() -> Iterator[tuple[str, pathlib.Path]]:
    folder = pathlib.Path(str(importlib.util.find_spec("torch").origin)).parent / "include"
    for part in PARTS:
        for file in sorted(folder.joinpath(part).rglob("*.h")):
            yield part, file


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of ``ast.walk`` in its order, without expressions, in which no statement stands."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        for name in node._fields:
            if name in BLOCKS:
                waiting.extend(getattr(node, name))
        yield node


def _of_node(package: str, node: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Tasks, classes and texts that a node gives."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
        yield "package", package, _summary(node)
        documented = ast.get_docstring(node) or ""
        for pattern in (NUMPY, GOOGLE):
            for _, kind, text in pattern.findall(documented):
                if kind.lower() in TYPES:
                    yield "type", TYPES[kind.lower()], text
        for name, text in SECTION.findall(documented):
            if name.lower() in SECTIONS:
                for paragraph in re.split(r"\n\s*\n", text.strip())[:PARAGRAPHS]:
                    yield "section", name.lower(), paragraph
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        kind = node.exc.func.id if isinstance(node.exc.func, ast.Name) else ""
        if kind in EXCEPTIONS:
            yield "exception", kind, _message(node.exc.args[0])


def _summary(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    text = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
    return " ".join(text.split())[:CHARACTERS]


def _body(node: ast.FunctionDef, lines: list[str]) -> str:
    """The source of a function below its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return "\n".join(lines[body[0].lineno - 1 : node.end_lineno]) if body else ""


def _message(node: ast.expr) -> str:
    """The text of a literal, whatever is put into it left out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            _message(part) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    if isinstance(node, ast.BinOp):
        return _message(node.left)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _message(node.func.value)
    return ""
