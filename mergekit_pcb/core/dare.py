"""DARE's drop mask as a pure function of seed, task, tensor and element; knows nothing of PCB.

Source: Yu et al., "Language Models are Super Mario" (DARE), arXiv 2311.03099: drop elements of
a task vector at random and divide the others by the share that is kept. Departure: the
random numbers come from a hash, not from a generator with a state, so an element's fate
depends neither on what was computed before it nor on where a tensor is cut.

The hash of an element is ``(A + K t)²`` in 32 bits. ``t`` is a well mixed odd number that
belongs to the element's place within its block of 2^18; the even ``A`` and the odd ``K`` are
drawn from a cryptographic hash of seed, task, tensor and block. Squares of odd numbers
are 1 modulo 8, so the upper 29 bits are what is random. Two places whose ``t`` differed by a
multiple of 2^29 would be tied together under every key, so the lower 19 bits of ``t`` all
differ. All of it is exact in integers, so it is the same on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

BLOCK_ELEMENTS = 1 << 18
#: Densities are drawn to this precision; below it nothing would ever be kept.
SMALLEST_DENSITY = 2.0**-29


@dataclass(frozen=True)
class Dare:
    """Drop and rescale one task's vector: keep an element with probability ``density``.

    ``task`` is the position of the task in the configuration (or in its slice), from 0, not
    counting the base: a path would give the same configuration other masks elsewhere.
    """

    density: float
    seed: int
    task: int

    def apply_(
        self,
        tau: torch.Tensor,
        tensor: str,
        start: int,
        scratch: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Drop elements of a task vector in place and divide the others by ``density``.

        ``tau`` holds the elements from ``start`` on of the flattened tensor of that name; the
        contents of ``scratch``, contiguous and like ``tau``, are lost. NaN and infinity become
        NaN even where dropped, so that no mask hides a broken checkpoint.
        """
        kept, hashes = scratch[0], scratch[1].view(torch.int32)[: len(tau)]
        places = _places(tau.device)
        for block, blocks, place, part in _spans(start, len(tau)):
            addends, factors = _keys(self.seed, self.task, tensor, block, blocks, tau.device)
            if isinstance(factors, int):
                torch.add(addends, places[place], alpha=factors, out=hashes[part])
            else:
                table = hashes[part].view(blocks, -1)
                torch.mul(places[place], factors, out=table).add_(addends)
        torch.mul(hashes, hashes, out=hashes)
        kept.copy_(hashes.le_(self._largest))
        zero = _zero(tau.dtype, tau.device)
        return torch.addcmul(zero, tau, kept, value=1 / self.density, out=tau)

    @property
    def _largest(self) -> int:
        """The largest hash, as a signed 32-bit integer, of an element that is kept."""
        return -(2**31) + 8 * round(self.density * 2**29) - 1


def key(seed: int, task: int, tensor: str, block: int) -> tuple[int, int]:
    """``A`` and ``K`` of a block, as signed 32-bit integers.

    The name stands last in what is hashed, so no two lists of arguments read the same.
    """
    text = f"{seed} {task} {block} {tensor}".encode(errors="surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, person=b"mergekit-pcb").digest()
    addend, factor = (int.from_bytes(d, "little", signed=True) for d in (digest[:4], digest[4:]))
    return addend & ~1, factor | 1


@lru_cache(maxsize=4096)  # three passes over a tensor
def _keys(
    seed: int, task: int, tensor: str, first: int, blocks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | int]:
    """``A`` and ``K`` of consecutive blocks as columns, or of one: a scalar and a number."""
    pairs = [key(seed, task, tensor, block) for block in range(first, first + blocks)]
    columns = torch.tensor(pairs, dtype=torch.int32, device=device)
    return (columns[:, :1], columns[:, 1:]) if blocks > 1 else (columns[0, 0], pairs[0][1])


@lru_cache(maxsize=16)
def _places(device: torch.device) -> torch.Tensor:
    """``t`` for each place in a block: 13 mixed bits, 18 that are a mixed permutation, and 1."""
    place = torch.arange(BLOCK_ELEMENTS)
    t = 2 * (_mixed(place, 31) * BLOCK_ELEMENTS + _mixed(place, 18)) + 1
    signed = (t + 2**31 & 0xFFFFFFFF) - 2**31
    return signed.to(torch.int32).to(device)


@lru_cache(maxsize=16)
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _mixed(place: torch.Tensor, bits: int) -> torch.Tensor:
    """Mix up numbers of so many bits; every step is one-to-one."""
    mask, half = 2**bits - 1, (bits + 1) // 2
    x: torch.Tensor = place * 0x1E3779B1 + 0x3C6EF372 & mask
    for factor in (0x21F0AAAD, 0x735A2D97):
        x = (x ^ (x >> half)) * factor & mask
    return x ^ (x >> half)


def _spans(start: int, count: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Cut elements from ``start`` on into runs of whole blocks and parts of one.

    Yields a run's first block and number of blocks, and where it lies in each of its blocks
    and among the elements.
    """
    done = 0
    while done < count:
        block, place = divmod(start + done, BLOCK_ELEMENTS)
        blocks = max(1, (count - done) // BLOCK_ELEMENTS) if place == 0 else 1
        size = min(blocks * BLOCK_ELEMENTS - place, count - done)
        yield block, blocks, slice(place, place + size // blocks), slice(done, done + size)
        done += size
