"""Which parameters multiply activations, and how they are stored: read from the types of modules.

A name says nothing reliable; a parameter is what its module makes of it. Where there is no
module to ask, every matrix is taken for the weight of a linear layer, and that is said.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

import torch

from mergekit_pcb.core.matrices import Layout

# Names in a sentence.
SHOWN = 3


class Kind(enum.Enum):
    """What a parameter is to the activations; the shapes are those of one matrix."""

    ROWS = "[out, in]"
    COLUMNS = "[in, out]"
    CONVOLUTION = "[out, in, …]"
    #: An embedding, a norm, a bias: no activations are multiplied by it as a matrix.
    ELEMENTS = "elements"
    #: Nothing is known but the shape; one of two dimensions is taken for the first kind.
    ASSUMED = "assumed"
    #: A parameter with two dimensions or more in a module of a type that is not known here.
    UNKNOWN = "unknown"


def layout_of(kind: Kind, shape: Sequence[int]) -> Layout | None:
    """The matrices that a tensor of this kind and shape is made of; ``None`` if it has none."""
    if kind is Kind.CONVOLUTION and len(shape) > 2:
        return Layout(1, shape[0], torch.Size(shape[1:]).numel())
    if kind is Kind.ASSUMED and len(shape) == 2:
        kind = Kind.ROWS
    if kind not in (Kind.ROWS, Kind.COLUMNS) or len(shape) not in (2, 3) or 0 in shape:
        return None
    count, (first, second) = shape[0] if len(shape) == 3 else 1, shape[-2:]
    if kind is Kind.ROWS:
        return Layout(count, first, second)
    return Layout(count, second, first, transposed=True)


def fitted(kind: Kind, known: Sequence[int] | None, shape: Sequence[int]) -> Kind:
    """The kind of a tensor that may lie the other way round than its module holds it.

    Some files hold fused experts as ``[in, out]`` and modules as ``[out, in]``, under one name:
    transformers turns them if their shape says so, and so does this. Square ones say nothing.
    """
    turned = {Kind.ROWS: Kind.COLUMNS, Kind.COLUMNS: Kind.ROWS}
    if known is None or kind not in turned or known[-1] == known[-2]:
        return kind
    return turned[kind] if tuple(shape) == (*known[:-2], known[-1], known[-2]) else kind


def kinds_of(module: torch.nn.Module) -> dict[str, Kind]:
    """The kind of every parameter of a module; a tied one is an embedding if any of its uses is."""
    found: dict[int, list[Kind]] = {}
    parameters = list(module.named_parameters(remove_duplicate=False))
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append(_kind(part, name, parameter))
    return {name: _joined(found[id(parameter)]) for name, parameter in parameters}


def _kind(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> Kind:
    if parameter.ndim < 2 or isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        return Kind.ELEMENTS
    if isinstance(module, torch.nn.Linear):
        return Kind.ROWS
    if isinstance(module, torch.nn.MultiheadAttention) and name.endswith("proj_weight"):
        return Kind.ROWS
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        plain = module.groups == 1 and not module.transposed
        return Kind.CONVOLUTION if plain else Kind.UNKNOWN
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers', of GPT-2
        return Kind.COLUMNS
    # transformers says so of every mixture's fused experts that it may compute in several ways.
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool) and hasattr(module, "is_concatenated"):
        if parameter.ndim != 3:  # biases, one row an expert
            return Kind.ELEMENTS
        return Kind.COLUMNS if transposed else Kind.ROWS
    return Kind.UNKNOWN


def _joined(uses: Sequence[Kind]) -> Kind:
    if Kind.ELEMENTS in uses:
        return Kind.ELEMENTS
    return uses[0] if len(set(uses)) == 1 else Kind.UNKNOWN


def assumed(names: Iterable[str], because: str) -> str:
    """The sentence that names what was taken for the weight of a linear layer."""
    listed = list(names)
    return (
        f"{because}, so {len(listed)} matrices are refined as weights of linear layers, [out, in] "
        f"({some(listed)}); leave embeddings and transposed ones among them to PCB by a filter, "
        "`refine: [{filter: NAME, value: none}, {value: solve}]`, and the same for spectrum"
    )


def unrefined(names: Sequence[str]) -> str:
    """The sentence that names what is left to PCB."""
    return (
        f"{len(names)} tensors keep PCB's merge unrefined, because it is not known how they "
        f"multiply activations ({some(names)})"
    )


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
