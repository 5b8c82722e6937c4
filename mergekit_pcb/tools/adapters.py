"""(IA)³ adapters: the adapter that changes nothing, as the base to merge others against.

An (IA)³ adapter (Liu et al., arXiv 2205.05638) multiplies activations by learned vectors, so
all ones is the model without it. The paper merges such adapters for T0-3B.
"""

from __future__ import annotations

import json
import pathlib
import pickle

import torch

from mergekit_pcb.errors import PCBError, one_line
from mergekit_pcb.files import written_whole

NAMES = ("adapter_model.safetensors", "adapter_model.bin")
SUFFIX = "ia3_l"


def identity(adapter: pathlib.Path) -> dict[str, torch.Tensor]:
    """All ones in the names, shapes and dtypes of an adapter.

    ``adapter`` is a folder as peft writes it or the file of weights in it. Raises
    :class:`~mergekit_pcb.errors.PCBError` for what is no (IA)³ adapter.
    """
    if adapter.is_dir():
        file = next((adapter / name for name in NAMES if (adapter / name).exists()), None)
        if file is None:
            raise PCBError(
                f"read {adapter}",
                f"there is no {' or '.join(NAMES)} in it",
                "name the folder of an adapter, or its file",
            )
    else:
        file = adapter
    config = _config(file.parent)
    kind = config.get("peft_type", "IA3")
    if kind == "LORA":
        raise PCBError(
            f"make an identity for {adapter}",
            "it is a LoRA adapter: its change is the product of two factors, and merging the "
            "factors one by one does not merge the products",
            "merge `base+adapter` with mergekit-yaml and --lora-merge-cache instead",
        )
    if kind != "IA3":
        raise PCBError(
            f"make an identity for {adapter}", f"it is a {kind} adapter", "name an (IA)³ adapter"
        )
    state = _read(file)
    other = next((name for name in state if not str(name).endswith(SUFFIX)), None)
    if other is not None or not state:
        raise PCBError(
            f"make an identity for {adapter}",
            f"{other} in it is no vector of (IA)³" if other else "it holds no tensors",
            "name an (IA)³ adapter without further trained modules (modules_to_save)",
        )
    return {name: torch.ones_like(tensor) for name, tensor in state.items()}


def write_identity(adapter: pathlib.Path, file: pathlib.Path) -> dict[str, torch.Tensor]:
    """Write the :func:`identity` of an adapter: all of a safetensors file or none of it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def refuse(because: str, remedy: str = "name another file") -> PCBError:
        return PCBError(f"write {file}", because, remedy)

    folder = adapter.resolve() if adapter.is_dir() else adapter.resolve().parent
    if file.suffix != ".safetensors":
        raise refuse(
            "mergekit-pytorch tells safetensors files by their name", "let it end in .safetensors"
        )
    if file.name in NAMES and file.resolve().parent == folder:
        raise refuse("it would take the adapter's place")
    if file.resolve() == adapter.resolve():
        raise refuse("it is the adapter itself")
    state = identity(adapter)
    try:
        with written_whole(file) as unfinished:
            save_file(state, unfinished, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise refuse(one_line(error)) from None
    return state


def _config(folder: pathlib.Path) -> dict[str, object]:
    try:
        found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(file: pathlib.Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise ValueError("it holds something else than tensors by name")
        return state
    except (
        OSError,
        EOFError,
        TypeError,
        ValueError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise PCBError(
            f"read {file}", one_line(error), "name an adapter's folder or file of weights"
        ) from None
