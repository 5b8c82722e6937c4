"""Aligned tensors and the task vectors between them, thinned by DARE and cut into chunks.

A result never depends on where a tensor is cut; whatever looks beyond one chunk belongs
to ``measure.py``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from mergekit_pcb.core.dare import Dare, Mask

# Bounds full-precision scratch independently of the size of a tensor, and keeps a chunk's
# handful of temporaries in the caches of a CPU (1 MiB each in float32).
CPU_CHUNK_ELEMENTS = 1 << 18
# torch splits an elementwise operation into pieces of 2^15 elements, one thread each.
CPU_THREADS_PER_CHUNK = 8
# Values that compiled loops look at together, by vectors, before they do one by one.
STRIP = 64
# Values of a strip that they keep without looking how many there are to be kept.
AT_ONCE = 4
# Large enough to keep an accelerator busy and to make the waits for it rare (64 MiB each).
ACCELERATOR_CHUNK_ELEMENTS = 1 << 24
# A chunk's task vectors are needed twice, for their sum and for themselves. So many are
# computed once; with more tasks the memory would matter more than the subtraction.
KEPT_TASK_VECTORS = 8


@dataclass(frozen=True)
class Aligned:
    """One tensor of the base model and of every task, flattened: same length, same device.

    Built by :meth:`of`; contiguous tensors are borrowed, never copied and never written to.
    ``masks`` say what is dropped of each task vector (``None``: nothing), before anything else.
    """

    name: str
    base: torch.Tensor
    tasks: tuple[torch.Tensor, ...]
    masks: tuple[Mask | None, ...]
    #: By whose name masks are drawn, where it is not its own: of a tensor that this one is tied to.
    drawn_as: str | None = None
    #: Drawn once, however often the tensor is passed over.
    _drawn: dict[Dare, Mask] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, name: str, base: torch.Tensor, tasks: Sequence[torch.Tensor]) -> Aligned:
        """Flatten tensors of one shape in row-major order, outside of autograd."""
        flat = [tensor.detach().reshape(-1) for tensor in (base, *tasks)]
        return cls(name, flat[0], tuple(flat[1:]), (None,) * len(tasks))

    def under(self, dare: tuple[Dare | None, ...]) -> Aligned:
        """The same tensors with task vectors thinned by DARE."""
        for mask in dare:
            if mask is not None and mask not in self._drawn:
                self._drawn[mask] = Mask(mask, self.drawn_as or self.name, len(self))
        masks = tuple(None if mask is None else self._drawn[mask] for mask in dare)
        return replace(self, masks=masks)

    @property
    def factors(self) -> list[float]:
        """What is left of each task vector is multiplied by these; 0 where nothing is dropped."""
        return [0 if mask is None else 1 / mask.density for mask in self.masks]

    def __len__(self) -> int:
        return self.base.numel()

    def chunks(self, scratch: Scratch, begin: int = 0, end: int | None = None) -> Iterator[Chunk]:
        """Cut elements into chunks, in order; arithmetic is in the precision of ``scratch``.

        They are all elements, or those from ``begin`` up to ``end``.
        """
        step, end = chunk_elements(self.base.device), len(self) if end is None else end
        for start in range(begin, end, step):
            place = slice(start, min(start + step, end))
            base = self.base[place]
            if base.dtype != scratch.dtype:
                base = scratch("base", base).copy_(base)
            yield Chunk(self, start, base, tuple(task[place] for task in self.tasks), scratch)


@dataclass(frozen=True)
class Chunk:
    """Some elements of an aligned tensor, valid until the next chunk of the same scratch.

    They are those from ``start`` on; ``base`` is in working precision, ``tasks`` are as given.
    """

    aligned: Aligned
    start: int
    base: torch.Tensor
    tasks: tuple[torch.Tensor, ...]
    scratch: Scratch
    _computed: set[int] = field(default_factory=set)

    def task_vector(self, index: int) -> torch.Tensor:
        """τ of one task in working precision: borrowed, and only until the next one is asked for.

        Both operands are widened before the subtraction: in bfloat16 the difference itself
        would be rounded (7–12 % of the merged delta's norm). Whatever a caller keeps in the
        buffers of :meth:`Scratch.passing` is lost.
        """
        if index >= KEPT_TASK_VECTORS:
            return self._subtract(index, self.scratch("task vector", self.base))
        tau = self.scratch(f"task vector {index}", self.base)
        if index not in self._computed:
            self._computed.add(index)
            self._subtract(index, tau)
        return tau

    def _subtract(self, index: int, out: torch.Tensor) -> torch.Tensor:
        task = self.tasks[index]
        narrow = task.dtype != self.base.dtype
        tau = out.copy_(task).sub_(self.base) if narrow else torch.sub(task, self.base, out=out)
        mask = self.aligned.masks[index]
        if mask is None:
            return tau
        scratch, _ = self.scratch.passing(tau)
        return mask.apply_(tau, self.start, scratch)

    def total(self) -> torch.Tensor:
        """The sum of all task vectors, added in configuration order."""
        total = self.scratch("total", self.base).copy_(self.task_vector(0))
        for index in range(1, len(self.tasks)):
            total.add_(self.task_vector(index))
        return total


class Scratch:
    """Named buffers in working precision that one chunk hands on to the next.

    Fresh memory for every temporary would cost more than the arithmetic: an allocator gives
    pieces of this size back to the system, which then has to zero and map them anew.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._here: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._there: dict[tuple[str, torch.device], torch.Tensor] = {}

    @classmethod
    def of_thread(cls, dtype: torch.dtype) -> Scratch:
        """The scratch that this thread uses for one tensor after the other.

        It stays when a merge is done, about ten chunks of main memory. What lies on an
        accelerator does not: memory is scarce there, and torch's allocator keeps it anyway.
        """
        scratch = cls(dtype)
        scratch._here = _thread.__dict__.setdefault("scratch", {}).setdefault(dtype, {})
        return scratch

    def __call__(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The buffer of that name, as long as ``like``, its contents undefined."""
        key, size = (name, like.device), like.numel()
        buffers = self._here if like.device.type == "cpu" else self._there
        buffer = buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # or none but that mode could write to it
                buffer = torch.empty(size, dtype=self.dtype, device=like.device)
            buffers[key] = buffer
        return buffer[:size]

    def passing(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two buffers that any step may use, and none may rely on after it."""
        return self("first", like), self("second", like)


_thread = threading.local()


def chunk_elements(device: torch.device) -> int:
    if device.type != "cpu":
        return ACCELERATOR_CHUNK_ELEMENTS
    return CPU_CHUNK_ELEMENTS * -(-torch.get_num_threads() // CPU_THREADS_PER_CHUNK)


def scratch_chunks(tasks: int) -> int:
    """How many buffers of a chunk's length measuring and merging use at most."""
    named = 9 + 6  # see the names given to Scratch, and what ``formulas.tanh_`` takes
    return named + min(tasks, KEPT_TASK_VECTORS) + (tasks > KEPT_TASK_VECTORS)


def promoted(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The dtype that holds the values of all of them, as mergekit chooses it."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of all arithmetic for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
