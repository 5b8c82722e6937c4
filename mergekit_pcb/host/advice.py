"""What a user is told, once a merge, of settings that are allowed and hardly meant."""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from mergekit_pcb.errors import printable
from mergekit_pcb.host import refined
from mergekit_pcb.host.checkpoints import loaders
from mergekit_pcb.host.configuration import parts, scalars
from mergekit_pcb.host.kinds import some
from mergekit_pcb.host.parameters import density_remarks, ignored
from mergekit_pcb.host.plan import Plan, sources_of

LOG = logging.getLogger(__name__)
#: Of this process: which ignored parameters were named, and of which models.
_said: set[tuple[str, ...]] = set()

# What old checkpoints hold of causal masks and positions.
BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "rotary_emb.inv_freq",
    "position_ids",
)


def give(plan: Plan, configuration: BaseModel) -> None:
    """Log every remark, unless the tool that planned prints them itself.

    What mergekit ignores is said once in a process of the same models: mergekit-evolve writes such
    parameters into the configuration of every candidate.
    """
    if plan.options.advise:
        document, models = configuration.model_dump(), (str(plan.base), *map(str, plan.models))
        new = [one for one in ignored_in(document) if (one, *models) not in _said]
        _said.update((one, *models) for one in new)
        for remark in (*new, *remarks(plan, document).values()):
            LOG.warning(printable(remark))


def ignored_in(document: Any) -> Iterator[str]:
    """Parameters, anywhere in a configuration, that mergekit ignores without a word."""
    for part in parts(document):
        model = part.get("model")
        for name in part.get("parameters") or ():
            if wrong := ignored(name, per_model=model is not None):
                yield f"{model}: {wrong}" if model else wrong


def remarks(plan: Plan, document: Any) -> dict[str, str]:
    """All there is to say of a plan and the configuration it was made of, by topic."""
    found = density_remarks(plan.values())
    if plan.is_raw and (names := sorted(set(_gradients(document)))):
        found["gradients"] = (
            f"{', '.join(names)}: of a layer gradient mergekit-pytorch takes the first value for "
            "every tensor, for it knows no layers; write one value, or filters"
        )
    if said := _seed_remark(plan):
        found["seed"] = said
    if said := _left_out_remark(plan):
        found["plan"] = said
    return {**found, **refined.remarks(plan)}


def _gradients(document: Any) -> Iterator[str]:
    """Names of the parameters, anywhere in a configuration, that have a value for each layer."""
    for part in parts(document):
        for name, value in (part.get("parameters") or {}).items():
            values = [value]
            if isinstance(value, list) and all(isinstance(one, dict) for one in value):
                values = [one.get("value") for one in value]
            if any(isinstance(one, list) and len(one) > 1 for one in values):
                yield name


def _seed_remark(plan: Plan) -> str:
    """Masks that were applied before keep again what they kept once, and no more."""
    drawn = {
        values["seed"]
        for values in plan.values()
        if any(density < 1 for density in values["dare_density"].values())
    }
    for model, document in _merged_before(plan) if drawn else ():
        earlier = document.get("parameters")
        seeds = earlier.get("seed", 0) if isinstance(earlier, dict) else 0
        again = drawn.intersection(scalars(seeds))
        had_dare = "'dare_density'" in repr(document)
        if document.get("merge_method") == "pcb" and had_dare and again:
            return (
                f"{model} was itself merged under DARE with seed {min(again)}, so its elements are "
                "kept and dropped by the same masks again; give each stage a seed of its own"
            )
    return ""


def _merged_before(plan: Plan) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Models that mergekit made, and the configurations it left beside them."""
    for model in plan.models if not plan.is_raw else ():
        file = pathlib.Path(model.model.path) / "mergekit_config.yml"
        try:
            document = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(document, dict):
            yield model, document


def _left_out_remark(plan: Plan) -> str:
    names = left_out(plan)
    return (
        f"mergekit leaves {len(names)} tensors of {plan.base} out of the result "
        f"({some(names)}); if the model needs them, see which command merges it in "
        "docs/models.md of mergekit-pcb"
        if names
        else ""
    )


def left_out(plan: Plan) -> list[str]:
    """Tensors of the base that mergekit leaves out of the result.

    mergekit-pytorch leaves out what only the base has. In plans of mergekit-yaml layer numbers
    are left aside, because slices may leave layers out on purpose, and the answer is empty
    where mergekit fuses tensors, because only transformers knows which. Buffers that models
    make anew do not count.
    """
    cache, key = loaders(plan, plan.base)
    loader = cache.loaders.get(key)
    if loader is None:
        return []
    present = loader.index.tensor_paths
    if plan.is_raw:
        return sorted(set(present) - {task.output_weight.name for task in plan.tasks})
    planned: set[str] = set()
    for task in plan.tasks:
        info = sources_of(task)[task.base_model]
        names = [info.name, *(info.aliases or ()), *(info.tied_names or ())]
        if not info.optional and not any(name in present for name in names):
            return []
        planned |= {_kind(name) for name in names}
    left = (name for name in present if _kind(name) not in planned)
    return sorted(name for name in left if not name.endswith(BUFFERS))


def _kind(name: str) -> str:
    return re.sub(r"\d+", "N", name)
