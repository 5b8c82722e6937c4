"""The mergekit method ``pcb``: groups of tensors and their parameters in, merged tensors out.

mergekit calls it in two ways. In memory it brings all groups at once. In a graph it brings
one group a call, and what is known of the whole merge comes along as a parameter, put there
by the node that was planned for it (``nodes.py``). Importing this module registers the method.
It imports only what mergekit's registry has loaded, because it is imported while mergekit's
package of merge methods is half initialised (see ``_autoload.py``).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    TensorGroup,
)

from mergekit_pcb import _autoload
from mergekit_pcb.errors import PCBError
from mergekit_pcb.host.groups import (
    check_shapes,
    explained_for,
    is_constant,
    name_of,
    refuse_beyond,
    refuse_mixed,
)
from mergekit_pcb.host.in_memory import in_memory
from mergekit_pcb.host.parameters import MODEL, PARAMETERS, Values, refines
from mergekit_pcb.host.prepared import KNOWN, Known, not_planned, prepare

_IN_MEMORY = object()  # in its place until all groups of a call in memory are seen


class PCBMerge(GroupMergeMethod):
    """PCB-Merging (Du et al., NeurIPS 2024, arXiv 2410.02396) of the inputs of one tensor.

    Inputs are borrowed, of one shape, floating dtype and device; the result is a new tensor
    of that shape and dtype, outside of autograd. Raises :class:`PCBError`, a
    ``ValueError``, for what cannot be merged.
    """

    spec = MergeMethodSpec(
        name="pcb",
        parameters=PARAMETERS,
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
        pretty_name="PCB-Merging",
        reference_url="https://arxiv.org/abs/2410.02396",
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
    )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Refuse what mergekit's contract would refuse, in sentences."""
        where = f" in {group_name}" if group_name else ""
        for position, input_id in enumerate(input_ids):
            if input_id in input_ids[:position]:
                raise PCBError(
                    f"merge {input_id} twice{where}",
                    "every task vector competes once",
                    "list the model once, and raise its weight if it should count for more",
                )
        if base_id is None:
            raise PCBError(
                f"merge with pcb{where}",
                "task vectors are differences from a base model, and none is given",
                "add `base_model:` to the configuration (in Python: base= or base_index=)",
            )
        if base_id not in input_ids and ".slices[" in where:
            raise PCBError(
                f"merge{where}",
                f"the base model {base_id} is none of the slice's sources",
                "list it there with its layer_range",
            )
        if base_id not in input_ids:
            raise PCBError(
                f"merge{where or ' with pcb'}",
                f"the base model {base_id} lacks it",
                "choose a base that has every tensor, or leave this one out "
                "(mergekit-pytorch: --tensor-intersection)",
            )
        if len(input_ids) < 2:
            raise PCBError(
                f"merge with pcb{where}",
                f"only the base model {base_id} is given",
                "add at least one model fine-tuned from it",
            )
        super().validate_inputs(input_ids, base_id, group_name=group_name)

    def _bind_parameters(
        self, groups: Sequence[TensorGroup], parameters: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Bind what a call in memory gives; a graph has resolved its parameters while planning."""
        for group in groups:
            check_shapes(group)
        bound = super()._bind_parameters(groups, parameters)
        return [{**values, KNOWN: _IN_MEMORY} for values in bound]

    def _execute_resolved(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        *,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, ...]:
        for group in groups if dtype is None else ():
            if group.entries:
                refuse_mixed(group)
        found: tuple[torch.Tensor, ...] = super()._execute_resolved(
            groups, parameters, dtype=dtype, **options
        )
        return found

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Merge the groups; under ``scope: model`` in memory, measure all of them first."""
        if not groups:
            return ()
        known = parameters[0].get(KNOWN)
        if known is None:
            parameters = [
                {**values, KNOWN: _unplanned(group, values)}
                for group, values in zip(groups, parameters, strict=True)
            ]
        elif known is _IN_MEMORY:
            parameters = in_memory(groups, parameters, input_dtypes)
        merged = []
        for group, values, dtype in zip(groups, parameters, input_dtypes, strict=True):
            (tensor,) = super()._execute([group], [values], options, input_dtypes=[dtype])
            if out_dtype is not None:
                if not is_constant(group):
                    refuse_beyond(out_dtype, tensor, name_of(group))
                tensor = tensor.to(out_dtype)
            merged.append(tensor)
        return tuple(merged)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        if is_constant(group):
            constant: torch.Tensor = group.entries[0].tensor
            return constant.clone()
        with explained_for(group):
            prepared = prepare(group, parameters)
            if (observe := parameters[KNOWN].observe) is not None:
                observe(prepared)
            merged = prepared.merged()
        return merged.view(group.entries[0].tensor.shape)


def _unplanned(group: TensorGroup, values: Values) -> Known:
    """What is known of a tensor whose merge was not planned by this package: only itself."""
    if values["scope"] == MODEL or values["statistics"]:
        raise not_planned("scope: model", group)
    # Masks go by position, and models that lack the tensor are not seen.
    if any(density < 1 for density in values["dare_density"].values()):
        raise not_planned("dare_density", group)
    if refines(values):
        raise not_planned("refine or spectrum", group)
    return Known([task.id for task in group.non_base])


if not any(method.spec.name == PCBMerge.spec.name for method in registry.registered_methods()):
    registry.register(PCBMerge())
_autoload.watch()
