"""Pretrained weights that come as a file of an installed package."""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib

from mergekit_pcb.errors import PCBError


def packaged(
    model: str, package: str, module: str, file: str, digest: str, missing: str, other: str
) -> pathlib.Path:
    """The file, if it has this digest (BLAKE2b, 8 bytes).

    Raises :class:`PCBError`, with what to do if the package is missing or another one.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise PCBError(f"load {model}", f"the package {package} is not installed", missing)
    path = pathlib.Path(spec.origin).parent / file
    found = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    if found != digest:
        raise PCBError(
            f"use {model}",
            f"{path} has the digest {found}, and this benchmark is made for {digest}",
            other,
        )
    return path
