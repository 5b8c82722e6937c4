"""What a configuration says of models, parts and values. Nothing is planned here."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from mergekit_pcb.errors import PCBError
from mergekit_pcb.files import seen

#: Where configurations name models, and the paths of models and adapters.
_NAMING = "model", "base_model", "lora", "path"


def is_raw(document: dict[str, Any]) -> bool:
    """Whether a configuration is for mergekit-pytorch: the models it names are files."""
    return any(seen(name, pathlib.Path.is_file) for name in named_models(document)[:2])


def named_models(part: Any) -> list[str]:
    """What a configuration, or a part of it, names as models and adapters, each once.

    mergekit-pytorch takes the names of files as they are. All others may be `base+adapter`, and
    each part may end in `@revision`, or be a mapping with its `path`.
    """
    found: list[str] = []
    if isinstance(part, dict):
        for name, value in part.items():
            if name in _NAMING and isinstance(value, str):
                if seen(value, pathlib.Path.is_file):
                    found.append(value)
                else:
                    found += [name.partition("@")[0] for name in value.split("+")]
            else:
                found += named_models(value)
    elif isinstance(part, list):
        for value in part:
            found += named_models(value)
    return list(dict.fromkeys(found))


def tokenizer_source(document: Any) -> list[str]:
    """The model that a configuration takes the tokenizer of, if it names one."""
    own = document if isinstance(document, dict) else {}
    tokenizer = own.get("tokenizer")
    source = tokenizer.get("source") if isinstance(tokenizer, dict) else own.get("tokenizer_source")
    return [] if source in ("union", "base") else named_models({"model": source})


def refuse_to_overwrite(output: pathlib.Path, config: pathlib.Path, document: Any) -> None:
    """Refuse an output that is the configuration or lies in a model it names."""
    target = output.resolve()
    if target == config.resolve():
        raise PCBError(f"write {output}", "it is the configuration itself", "name another file")
    for name in [*named_models(document), *tokenizer_source(document)]:
        if not seen(name):
            continue
        place = pathlib.Path(name).resolve()
        if target == place or place in target.parents:
            raise PCBError(
                f"write {output}", f"it belongs to the model {name}", "name another file"
            )


def parts(part: Any) -> Iterator[dict[str, Any]]:
    """Every mapping of a configuration that parameters may stand in, from the outside in."""
    if isinstance(part, dict):
        yield part
        for name, inner in part.items():
            if name != "parameters":
                yield from parts(inner)
    elif isinstance(part, (list, tuple)):
        for inner in part:
            yield from parts(inner)


def scalars(setting: Any) -> Iterator[Any]:
    """The values of a setting: one, a gradient, or filters of either; what is shared, once."""
    waiting, seen = [setting], set()
    while waiting:
        part = waiting.pop(0)
        if not isinstance(part, (dict, list)):
            yield part
        elif id(part) not in seen:
            seen.add(id(part))
            waiting[:0] = part if isinstance(part, list) else [part.get("value")]


def filters(setting: Any) -> Iterator[str]:
    for part in setting if isinstance(setting, list) else [setting]:
        if isinstance(part, dict) and part.get("filter") not in (None, "*"):
            yield str(part["filter"])
