"""Products and decompositions of matrices, to the same bits on any number of threads.

BLAS and LAPACK add up in an order that may depend on how many threads they use. So a result is cut
into tiles by its shape alone, and each tile is the work of one thread; what cannot be cut is done
by a fixed number. A device is given larger pieces, one after the other: what runs side by side
there is its library's choice.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from mergekit_pcb.core import pools

HOST = "cpu"
# Of a tile: with fewer BLAS gets slower, with more some threads get nothing to do.
ROWS, COLUMNS = 256, 512
# Columns of a matrix that are factored at a time.
FACTOR_BLOCK = 256
# What a device gets at a time; its memory is to hold a copy.
DEVICE_ROWS = 4096
# Threads of LAPACK's decompositions: more than there are cores would cost twice the time.
DECOMPOSING = 2
# What torch calls products of float32 in float32.
EXACT = "highest"
T = TypeVar("T")


def add_product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """Add ``scale · left @ right`` to a matrix."""
    _do(out.device, _products(out, left, right, alpha=scale))


def product(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``left @ right``, a new matrix or in the memory of ``out``."""
    if out is None:
        out = left.new_empty((len(left), right.shape[1]))
    _do(out.device, _products(out, left, right, beta=0))
    return out


def add_gram_(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Add ``rowsᵀ rows`` to the tiles of a symmetric matrix that touch its lower half."""
    strips = (
        _products(gram[part.start :, part], rows[:, part.start :].T, rows[:, part])
        for part in _slices(len(gram), COLUMNS)
    )
    _do(gram.device, itertools.chain.from_iterable(strips))


def mirror_(gram: torch.Tensor) -> None:
    """Make the upper half of a matrix what its lower half is."""
    for part in _slices(len(gram), COLUMNS):
        corner = gram[part, part]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        gram[part, part.stop :] = gram[part.stop :, part].T


def cholesky_(gram: torch.Tensor) -> bool:
    """Put the lower Cholesky factor in the lower half of a matrix; whether it has one.

    By blocks of columns (Golub and Van Loan, Matrix Computations, 4.2.6).
    """
    failed = torch.zeros((), dtype=torch.int32, device=gram.device)
    for part in _slices(len(gram), FACTOR_BLOCK):
        corner, beside = gram[part, part], gram[part, : part.start]
        below, known = gram[part.stop :, part], gram[part.stop :, : part.start]
        _do(gram.device, [functools.partial(_corner_, corner, beside, failed)])
        _do(
            gram.device,
            [
                functools.partial(_below_, below[down], known[down], corner, beside)
                for down in _heights(below)
            ],
        )
    return not int(failed)


def divide_(rows: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply by the inverse of ``factor factorᵀ`` from the right, in place."""
    _do(rows.device, [functools.partial(_divide_, rows[part], factor) for part in _heights(rows)])


def decomposed(function: Callable[[torch.Tensor], T], matrix: torch.Tensor) -> T:
    """What a function that is LAPACK's makes of a matrix. Raises what it raises."""
    with _in_float32:
        if matrix.device.type != HOST:
            return function(matrix)
        return _begun(pools.of(1, DECOMPOSING), functools.partial(function, matrix)).result()


def _divide_(rows: torch.Tensor, factor: torch.Tensor) -> None:
    _quotient_(rows, factor.T, upper=True)
    _quotient_(rows, factor, upper=False)


def _corner_(corner: torch.Tensor, beside: torch.Tensor, failed: torch.Tensor) -> None:
    """Factor a block on the diagonal, what stands left of it being known."""
    found, info = torch.linalg.cholesky_ex(corner.addmm_(beside, beside.T, alpha=-1))
    corner.copy_(found)
    failed.bitwise_or_(info)


def _below_(
    rows: torch.Tensor, known: torch.Tensor, corner: torch.Tensor, beside: torch.Tensor
) -> None:
    """The same for rows below a block."""
    _quotient_(rows.addmm_(known, beside.T, alpha=-1), corner.T, upper=True)


def _quotient_(rows: torch.Tensor, triangle: torch.Tensor, *, upper: bool) -> None:
    """Multiply by the inverse of a triangular matrix from the right, in place."""
    torch.linalg.solve_triangular(triangle, rows, upper=upper, left=False, out=rows)


def _products(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **factors: float
) -> Iterator[Callable[[], object]]:
    """What makes each tile of ``beta · out + alpha · left @ right``; on a device, whole rows."""
    columns = COLUMNS if out.device.type == HOST else max(1, out.shape[1])
    for across in _slices(out.shape[1], columns):
        for down in _heights(out):
            yield functools.partial(
                out[down, across].addmm_, left[down], right[:, across], **factors
            )


def _heights(matrix: torch.Tensor) -> list[slice]:
    """Rows that are the work of one thread, or of a device at a time."""
    return _slices(len(matrix), ROWS if matrix.device.type == HOST else DEVICE_ROWS)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, length)) for at in range(0, length, size)]


def _do(device: torch.device, jobs: Iterable[Callable[[], object]]) -> None:
    """Do what does not depend on one another, on the host each by a thread that works alone."""
    with _in_float32:
        if device.type == HOST:
            _by_threads(jobs)
            return
        for job in jobs:
            job()


def _by_threads(jobs: Iterable[Callable[[], object]]) -> None:
    workers = pools.of(torch.get_num_threads(), 1)
    begun: list[Future[object]] = []
    try:
        begun.extend(_begun(workers, job) for job in jobs)
        wait(begun)
    except BaseException:  # nothing writes any more when a merge was stopped
        for one in begun:
            one.cancel()
        wait(begun)
        raise
    for one in begun:
        one.result()


class _InFloat32:
    """Has float32 multiplied as such, whatever torch was told: TF32 and bfloat16 keep three digits.

    These are settings of all threads: the first one that comes changes them, the last one that goes
    puts them back.
    """

    def __init__(self) -> None:
        self._put_back: Callable[[], object] = bool
        self.forget()

    def forget(self) -> None:
        """Nobody is inside: a forked child has none of its parent's threads."""
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._put_back = _refuse_less()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._put_back()


def _refuse_less() -> Callable[[], object]:
    """Refuse products of less than float32; what puts back how it was.

    torch has two ways to ask for them, refuses to tell one where the other was used, and since 2.9
    keeps a setting for each library.
    """
    both: list[Any] = [
        getattr(own, "matmul", None) for own in (torch.backends.cuda, torch.backends.mkldnn)
    ]
    libraries = [one for one in both if hasattr(one, "fp32_precision")]
    before = [_own_precision(one) for one in libraries]
    try:
        asked = torch.get_float32_matmul_precision()
    except RuntimeError:
        asked = EXACT
    if asked != EXACT:
        torch.set_float32_matmul_precision(EXACT)
    for one in libraries:
        if one.fp32_precision not in ("ieee", "none"):
            one.fp32_precision = "ieee"

    def put_back() -> None:
        if asked != EXACT:
            torch.set_float32_matmul_precision(asked)
        for one, own in zip(libraries, before, strict=True):
            one.fp32_precision = own

    return put_back


def _own_precision(library: Any) -> str:
    """What it was told itself; "none" where it does as all libraries do."""
    told = str(library.fp32_precision)
    library.fp32_precision = "none"
    if library.fp32_precision == told:
        return "none"
    library.fp32_precision = told
    return told


_in_float32 = _InFloat32()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_float32.forget)


def _begun(workers: ThreadPoolExecutor, job: Callable[[], T]) -> Future[T]:
    """Have a worker do it in the caller's mode: modes are of their thread."""
    inference = torch.is_inference_mode_enabled()

    def in_mode() -> T:
        with torch.inference_mode(inference), torch.no_grad():
            return job()

    return workers.submit(in_mode)
