"""AdaMerging + PCB: coefficients learned from unlabelled inputs (the paper's Table 7).

Source: Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024,
arXiv 2310.02575: the coefficients that make predictions on unlabelled inputs certain, by
gradient descent on their entropy; here they weigh the contributions of PCB.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tqdm import tqdm

from mergekit_pcb.errors import PCBError
from mergekit_pcb.host.groups import further_names
from mergekit_pcb.state_dicts import (
    Contributions,
    Model,
    StateDict,
    combine,
    contributions,
)

# As in the released AdaMerging.
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Adapted:
    """What AdaMerging found.

    ``coefficients`` are one number per expert, or map names of tensors to so many numbers;
    ``entropies`` are the mean entropies in nats, one per batch, in the order of training.
    """

    coefficients: torch.Tensor | dict[str, torch.Tensor]
    state_dict: StateDict
    entropies: list[float]


def adamerge(
    model: torch.nn.Module,
    base: Model,
    experts: Sequence[Model],
    batches: Iterable[Any],
    granularity: Literal["task", "layer"] = "task",
    *,
    epochs: int = 1,
    learning_rate: float = 1e-2,
    start: float = 1.0,
    scale: float = 1.0,
    quiet: bool = True,
    **parameters: Any,
) -> Adapted:
    """Learn the coefficients of PCB's contributions by minimising entropy; no labels needed.

    ``model`` is called with each of ``batches`` (a mapping as keywords, a tuple as arguments,
    else as the one argument) and returns logits ``[..., classes]`` or an object with ``logits``;
    its own values are not changed, and used only for what is not merged, such as a task's head.
    ``granularity`` is one coefficient per expert,
    or one per expert and tensor, which the paper calls layer-wise. All start at ``start``;
    Adam takes one step per batch, ``epochs`` times over. ``parameters`` are those of
    :func:`~mergekit_pcb.state_dicts.contributions`.

    Memory: a float32 copy of the model per expert. Results repeat to the bit where the
    model's own operations do. Raises :class:`~mergekit_pcb.errors.PCBError`.
    """
    if granularity not in ("task", "layer"):
        raise PCBError(
            f"use granularity: {granularity!r}",
            "coefficients belong to tasks or to their tensors",
            "write task or layer",
        )
    kept = list(batches)
    if not kept:
        raise PCBError(
            "adapt the coefficients", "there are no batches", "give unlabelled inputs (a list)"
        )
    parts = contributions(base, experts, **parameters)
    own = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    _refuse_other_names(model, list(own), parts)
    tied = further_names({name: id(parameter) for name, parameter in own.items()})
    held = model.named_buffers(remove_duplicate=False)
    further = further_names({name: id(buffer) for name, buffer in held})
    coefficients, trained = _coefficients(parts, float(start), each=granularity == "layer")
    optimiser = torch.optim.Adam(trained, lr=learning_rate, betas=BETAS)
    entropies: list[float] = []
    steps = [batch for _ in range(epochs) for batch in kept]

    def merge() -> StateDict:
        found = combine(base, parts, coefficients, scale)
        # Copies under several names are one tensor to the model, whatever base and experts hold.
        both = {n: first for n, first in tied.items() if n in found and first in found}
        return found | {name: found[first] for name, first in both.items()}

    for batch in tqdm(steps, desc="AdaMerging", disable=True if quiet else None):
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        merged = buffers | {
            # torch has no gradients towards running averages, and a model may count its batches.
            name: tensor if name in own else tensor.detach().clone()
            for name, tensor in merge().items()
            if not name.endswith("_extra_state")
            and name not in further
            and name.rpartition(".")[0] in modules
        }
        loss = _entropy(_logits(torch.func.functional_call(model, merged, *_call(batch))))
        if not loss.isfinite():
            raise PCBError(
                "adapt the coefficients",
                "the model's predictions became NaN or infinite",
                "lower learning_rate or start",
            )
        optimiser.zero_grad()
        loss.backward(inputs=trained)  # type: ignore[no-untyped-call]
        optimiser.step()
        entropies.append(float(loss.detach()))
    with torch.no_grad():
        merged = merge()
    found: torch.Tensor | dict[str, torch.Tensor]
    if isinstance(coefficients, Mapping):
        found = {name: row.detach() for name, row in coefficients.items()}
    else:
        found = coefficients.detach()
    return Adapted(found, merged, entropies)


def _coefficients(
    parts: Contributions, start: float, *, each: bool
) -> tuple[torch.Tensor | dict[str, torch.Tensor], list[torch.Tensor]]:
    """A row for all tensors, or for each, by its name; and all rows that there are."""
    device = next(iter(parts[0].values())).device if parts[0] else torch.device("cpu")

    def begin() -> torch.Tensor:
        shape, own_kind = (len(parts),), torch.float32
        return torch.full(shape, start, dtype=own_kind, device=device, requires_grad=True)

    if not each:
        row = begin()
        return row, [row]
    rows = {name: begin() for name in parts[0] if name not in parts.tied}
    return rows | {name: rows[first] for name, first in parts.tied.items()}, list(rows.values())


def _refuse_other_names(model: torch.nn.Module, own: Sequence[str], parts: Contributions) -> None:
    """Raise :class:`PCBError` where nothing of the model is merged, or what it has no place for."""
    if parts[0] and not parts[0].keys() & set(own):
        raise PCBError(
            f"adapt {type(model).__name__}",
            f"its parameters have other names ({own[0] if own else 'none'}) than those of base and "
            f"experts ({next(iter(parts[0]))})",
            "give base and experts of the model's own kind (wrapped alike, if it is wrapped)",
        )
    places = {*own, *(name for name, _ in model.named_buffers(remove_duplicate=False))}
    for name in parts[0]:
        if name not in places and any(bool(part[name].any()) for part in parts):
            raise PCBError(
                f"adapt {type(model).__name__}",
                f"it has no {name}, which base and experts have",
                "leave that out of them, or give a model that has it",
            )


def _call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _logits(output: Any) -> torch.Tensor:
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise PCBError(
            "adapt the coefficients",
            f"the model returned {type(output).__name__} without logits",
            "wrap it, and base and experts alike, so that it returns logits",
        )
    return logits


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the predicted distributions, in nats."""
    log = logits.float().log_softmax(-1)
    # A class that is masked out by -inf adds nothing: 0 · log 0 is 0 in the limit.
    return -(log.exp() * log.masked_fill(log == -torch.inf, 0)).sum(-1).mean()
