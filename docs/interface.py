"""Writes ``interface.md`` from the docstrings of what the package exports.

python docs/interface.py
"""

from __future__ import annotations

import inspect
import pathlib
import re
from typing import Any

import mergekit_pcb
from mergekit_pcb.tools import adamerge, search_space

PAGE = pathlib.Path(__file__).with_suffix(".md")
#: In the order of use: all that is exported, and what it returns.
THINGS = (
    mergekit_pcb.contributions,
    mergekit_pcb.combine,
    mergekit_pcb.Contributions,
    mergekit_pcb.search_weights,
    search_space.Found,
    search_space.Trial,
    mergekit_pcb.adamerge,
    adamerge.Adapted,
    mergekit_pcb.register,
    mergekit_pcb.PCBMerge,
    mergekit_pcb.PCBError,
)
WIDTH = 80
TITLE = """# The Python interface

Written by `docs/interface.py` from the docstrings. Examples: [From Python](python.md).
"""


def page() -> str:
    return TITLE + "".join(map(_entry, THINGS))


def _entry(thing: Any) -> str:
    name = thing.__name__
    text = inspect.getdoc(thing) or ""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    return f"\n## {name}\n\n```python\n{_signature(thing)}\n```\n\n{text}\n"


def _signature(thing: Any) -> str:
    """As it would be called; one argument a line where there is no room for all."""
    signature, arguments = inspect.signature(thing), list[str]()
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        kind = parameter.annotation
        kind = kind if isinstance(kind, str) else inspect.formatannotation(kind)
        arguments.append(f"{stars}{parameter.name}: {kind}{default}")
    result = "" if inspect.isclass(thing) else f" -> {signature.return_annotation}"
    line = f"{thing.__name__}({', '.join(arguments)}){result}"
    if len(line) > WIDTH:
        line = "\n".join(
            [f"{thing.__name__}(", *(f"    {one}," for one in arguments), f"){result}"]
        )
    return line.replace("<factory>", "{}")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
