"""What a checkpoint's tensors are, told by its architecture.

The model is built from its configuration without weights (on torch's meta device, remote code only
where mergekit was allowed it), and names in files are turned into names of its parameters as
transformers turns them when it loads.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mergekit_pcb.host.kinds import Kind, kinds_of

_LOUDNESS = threading.Lock()


class Architecture:
    """The kinds of a checkpoint's tensors, by the names that they have in its files."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kinds = kinds_of(model)
        self._shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }

    def shape(self, name: str) -> Sequence[int] | None:
        """That of a tensor, where the model has it under the same name."""
        return self._shapes.get(name)

    def kind(self, name: str) -> Kind:
        """That of a tensor; experts that lie apart in the file are what they are fused to."""
        if name in self._kinds:
            return self._kinds[name]
        renamed, turned = self._renamed(name)
        kind = self._kinds.get(renamed, Kind.UNKNOWN)
        if turned is None:
            return Kind.UNKNOWN
        if turned and kind in (Kind.ROWS, Kind.COLUMNS):
            return Kind.COLUMNS if kind is Kind.ROWS else Kind.ROWS
        return kind

    def _renamed(self, name: str) -> tuple[str, bool | None]:
        """What transformers calls a tensor of a file, and whether it transposes it on the way.

        ``None``: it does something to it that is not known here.
        """
        from transformers.core_model_loading import (
            Concatenate,
            MergeModulelist,
            Transpose,
            rename_source_key,
        )

        renamings, converters = self._conversions
        try:
            prefix = self._model.base_model_prefix
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, self._kinds)
        except (AttributeError, TypeError, ValueError, KeyError):
            return name, None
        if pattern is None:
            return renamed, False
        converter = next(c for c in converters if pattern in c.source_patterns)
        turns = [op for op in converter.operations if isinstance(op, Transpose)]
        known = all(
            isinstance(op, (Concatenate, MergeModulelist, Transpose)) for op in converter.operations
        )
        return renamed, len(turns) % 2 == 1 if known else None

    @functools.cached_property
    def _conversions(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        try:
            found = get_model_conversion_mapping(self._model) or []
        except (AttributeError, TypeError, ValueError):
            found = []
        converters = [step for step in found if isinstance(step, WeightConverter)]
        return [step for step in found if not isinstance(step, WeightConverter)], converters


def architecture_of(model: Any, *, trust_remote_code: bool) -> Architecture | None:
    """The architecture of a model reference, or of a single file with a ``config.json`` beside.

    ``None`` where there is no configuration, or none that transformers can build.
    """
    import transformers
    from mergekit.common import get_auto_cls
    from transformers.initialization import no_init_weights

    path = pathlib.Path(model.model.path)
    try:
        with _quiet():
            if path.is_file():
                if not (path.parent / "config.json").exists():
                    return None
                config = transformers.AutoConfig.from_pretrained(
                    path.parent, trust_remote_code=trust_remote_code
                )
            else:
                config = model.config(trust_remote_code=trust_remote_code)
            name = (config.architectures or [""])[0]
            own = getattr(transformers, name, None)
            with torch.device("meta"), no_init_weights():
                if own is not None:
                    built = own(config)
                else:
                    auto = get_auto_cls(name)
                    built = auto.from_config(config, trust_remote_code=trust_remote_code)
            built.tie_weights()
    except Exception:  # whatever a configuration or a model's own code raises
        return None
    return Architecture(built)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks that building a model makes, which mergekit has made already."""
    with _LOUDNESS:  # it is the process's, and threads may take turns in any order
        before = logging.root.manager.disable
        logging.disable(max(before, logging.WARNING))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)
