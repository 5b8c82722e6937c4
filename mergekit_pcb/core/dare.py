"""DARE's drop mask as a pure function of seed, task, tensor and element; knows nothing of PCB.

Source: Yu et al., "Language Models are Super Mario" (DARE), arXiv 2311.03099: drop elements of
a task vector at random and divide the others by the share that is kept.

The random numbers are Philox4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2,
3", SC 2011), as numpy implements it. The key is the BLAKE2b hash of seed, position of the task
and name of the tensor. Element ``i`` of the flattened tensor takes the ``i``-th 16 bits of that
stream, of each number of 64 bits the lowest first. It is kept if they are below the upper half
of ``density · 2^32``; where they equal it, the next 16 bits, from the same place of the stream
whose counter has its top word set to one, are compared with the lower half. So an element's fate
depends neither on what was computed before it, nor on where a tensor is cut, nor on the
device: bits are drawn by all cores of a CPU, or by the kernel of ``gpu_masks.py`` on a GPU.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy
import torch

from mergekit_pcb.core import pools

#: Recorded with statistics that were measured under it.
GENERATOR: Final = "Philox4x64-10 keyed by BLAKE2b"
#: Below it nothing would ever be kept.
SMALLEST_DENSITY = 2.0**-29
#: Constants and order of the generator's library Random123, for whoever draws without numpy.
ROUNDS = 10
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
# Where bits are drawn.
HOST = "cpu"
# One counter of the generator gives four numbers of 64 bits.
WORDS_PER_COUNTER = 16
# Elements that are drawn at a time, by one thread: fewer cost more than they save.
WINDOW_ELEMENTS = 1 << 20


#: Draws the bits of so many elements by key, upper and lower half of the density, on a device.
DrawThere = Callable[[int, int, int, int, torch.device], torch.Tensor]


@dataclass(frozen=True)
class Dare:
    """Drop and rescale one task's vector: keep an element with probability ``density``.

    ``task`` is the position of the task in the configuration (or in its slice), from 0, not
    counting the base: a path would give the same configuration other masks elsewhere.
    """

    density: float
    seed: int
    task: int


class Mask:
    """Which of the ``count`` elements of one tensor a task keeps.

    Held as bits, because every tensor is passed over three times: drawn window by window as it is
    asked for, or on a GPU at once.
    """

    def __init__(self, dare: Dare, tensor: str, count: int) -> None:
        self._dare, self._count = dare, count
        self._key = key(dare.seed, dare.task, tensor)
        self._windows: dict[int, Any] = {}
        self._elsewhere: dict[torch.device, torch.Tensor] = {}
        self._lock = threading.Lock()

    @property
    def density(self) -> float:
        return self._dare.density

    def whole(self, device: torch.device, draw: DrawThere) -> torch.Tensor:
        """The bits of all elements on a device, eight to a byte, lowest first.

        They are drawn once, by ``draw``, and stay there as long as this mask.
        """
        if device not in self._elsewhere:
            upper, lower = self._fences
            self._elsewhere[device] = draw(self._key, upper, lower, self._count, device)
        return self._elsewhere[device]

    @property
    def _fences(self) -> tuple[int, int]:
        return divmod(round(self._dare.density * 2**32), 1 << 16)

    def apply_(self, tau: torch.Tensor, start: int, scratch: torch.Tensor) -> torch.Tensor:
        """Drop elements of a task vector in place and divide the others by the density.

        ``tau`` holds the elements from ``start`` on; the contents of ``scratch``, contiguous and
        like ``tau``, are lost. NaN and infinity become NaN even where dropped, so that no mask
        hides a broken checkpoint.
        """
        return self._apply_(*self.packed(start, len(tau)), tau, scratch)

    def apply_first_(self, tau: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """The same with the first bits, whichever elements ``tau`` holds: for a sample of them."""
        if tau.device.type == HOST:  # which needs the bits around them too
            return self.apply_(tau, 0, scratch)
        return self._apply_(self._draw(0, len(tau)), 0, tau, scratch)

    def _apply_(
        self, packed: Any, skipped: int, tau: torch.Tensor, scratch: torch.Tensor
    ) -> torch.Tensor:
        unpack(packed, skipped, out=scratch)
        zero = _zero(tau.dtype, tau.device)
        return torch.addcmul(zero, tau, scratch, value=1 / self._dare.density, out=tau)

    def packed(self, start: int, count: int) -> tuple[Any, int]:
        """The bits of some elements, eight to a byte, lowest first, after so many others."""
        first, end = start // 8 * 8, start + count
        parts = []
        with self._lock:
            while first < end:
                window, place = divmod(first, WINDOW_ELEMENTS)
                taken = min(end - first, WINDOW_ELEMENTS - place)
                parts.append(self._window(window)[place // 8 : -(-(place + taken) // 8)])
                first += taken
        return parts[0] if len(parts) == 1 else numpy.concatenate(parts), start % 8

    def _window(self, window: int) -> Any:
        # The next, one by each thread, are drawn while this one is used.
        for wanted in range(window, window + 1 + torch.get_num_threads()):
            if wanted not in self._windows and wanted * WINDOW_ELEMENTS < self._count:
                self._windows[wanted] = self._begin(wanted * WINDOW_ELEMENTS)
        bits = self._windows[window]
        if callable(bits):
            bits = self._windows[window] = bits()
        return bits

    def _begin(self, start: int) -> Callable[[], Any]:
        """Begin to draw a window; what comes back waits for its bits."""
        count = min(WINDOW_ELEMENTS, self._count - start)
        if self._count <= WINDOW_ELEMENTS or torch.get_num_threads() == 1:
            return functools.partial(self._draw, start, count)
        return pools.pool("masks", torch.get_num_threads()).submit(self._draw, start, count).result

    def _draw(self, start: int, count: int) -> Any:
        upper, lower = self._fences
        first = start // WORDS_PER_COUNTER
        below, equal = compare(self._key, first, count, min(upper, (1 << 16) - 1))
        kept = (below if upper < 1 << 16 else ~numpy.zeros_like(below))[: -(-count // 8)]
        ties = numpy.unpackbits(equal, count=count, bitorder="little") if lower else ()
        for place in map(int, numpy.flatnonzero(ties)):
            counter, word = divmod(place, WORDS_PER_COUNTER)
            counter += first + (1 << 192)
            if draw(self._key, counter, WORDS_PER_COUNTER)[word] < lower:
                kept[place // 8] |= numpy.uint8(1 << place % 8)
        return kept


def key(seed: int, task: int, tensor: str) -> int:
    """The key of a task's mask in a tensor, 128 bits.

    The name stands last in what is hashed, so no two lists of arguments read the same.
    """
    text = f"{seed} {task} {tensor}".encode(errors="surrogatepass")
    digest = hashlib.blake2b(text, digest_size=16, person=b"mergekit-pcb").digest()
    return int.from_bytes(digest, "little")


def against(philox_key: int, counter: int, count: int, fence: int) -> tuple[Any, Any]:
    """Which words are less than a fence, and which equal: bits, eight to a byte, lowest first."""
    words = draw(philox_key, counter, count)
    below, equal = words < fence, words == fence
    return numpy.packbits(below, bitorder="little"), numpy.packbits(equal, bitorder="little")


#: :func:`against`, or compiled code that does the same; more bits may follow.
compare: Callable[[int, int, int, int], tuple[Any, Any]] = against


def draw(philox_key: int, counter: int, count: int) -> Any:
    """Words of 16 bits from a counter on; numpy's generator adds one to it before it draws."""
    drawn = numpy.random.Philox(key=philox_key, counter=counter).random_raw(-(-count // 4))
    return drawn.astype("<u8", copy=False).view("<u2")[:count]


def unpack(packed: Any, skipped: int, *, out: torch.Tensor) -> torch.Tensor:
    """Turn bits, eight to a byte and the lowest first, into zeros and ones, on any device."""
    if out.device.type == HOST:
        bits = torch.from_numpy(numpy.unpackbits(packed, bitorder="little"))
    else:
        shifts = torch.arange(8, dtype=torch.uint8, device=out.device)
        moved = torch.from_numpy(packed).to(out.device)
        bits = ((moved[:, None] >> shifts) & 1).view(-1)
    return out.copy_(bits[skipped : skipped + len(out)])


@functools.lru_cache(maxsize=16)
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros((), dtype=dtype, device=device)
