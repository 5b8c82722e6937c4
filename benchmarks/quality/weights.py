"""Pretrained weights that come as a file of an installed package."""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib
from collections.abc import Mapping

from mergekit_pcb.errors import PCBError


def packaged(
    model: str, package: str, module: str, digests: Mapping[str, str], missing: str, other: str
) -> pathlib.Path:
    """The first of the files, if all of them have these digests (BLAKE2b, 8 bytes).

    Raises :class:`PCBError`, with what to do if the package is missing or another one.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise PCBError(f"load {model}", f"the package {package} is not installed", missing)
    paths = [pathlib.Path(spec.origin).parent / file for file in digests]
    for path, digest in zip(paths, digests.values(), strict=True):
        if not path.is_file():
            raise PCBError(f"use {model}", f"{path} is not there", other)
        found = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        if found != digest:
            raise PCBError(
                f"use {model}",
                f"{path} has the digest {found}, and this benchmark is made for {digest}",
                other,
            )
    return paths[0]
