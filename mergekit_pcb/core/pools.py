"""Threads that are kept for the next tensor. A forked child has none of its parent's."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Result = TypeVar("_Result")
# From so many elements on torch lets all of its threads do an operation.
SHARED_ELEMENTS = 1 << 15


@functools.cache
def pool(purpose: str, count: int) -> ThreadPoolExecutor:
    """Threads of one purpose alone: a walk waits for masks, and neither may wait for itself.

    All of them have begun; raises :class:`RuntimeError` where the system has no more. (What is
    submitted to threads that cannot begin stays in line, and may be done when nobody waits for it.)
    """
    workers, begun = ThreadPoolExecutor(count, purpose), threading.Barrier(count + 1)
    try:
        for _ in range(count):
            workers.submit(begun.wait)
        begun.wait()
    except BaseException:
        begun.abort()
        workers.shutdown(wait=False, cancel_futures=True)
        raise
    return workers


def of(count: int, each: int) -> ThreadPoolExecutor:
    """Threads in each of which torch and its BLAS use so many: 1 is the thread itself."""
    with _building:
        if (count, each) not in _begun:
            _begun[count, each] = _begin(count, each)
        return _begun[count, each]


def alone(work: Callable[[], _Result], elements: int) -> _Result:
    """Do with so many elements what torch's other threads are to take no part in.

    When they have done theirs, they go on asking for more for some milliseconds, and take the
    cores from whoever is next.
    """
    if elements < SHARED_ELEMENTS or torch.get_num_threads() == 1:
        return work()
    try:
        begun = of(1, 1).submit(work)
    except RuntimeError:  # the system has no thread left, or the interpreter ends
        return work()
    return begun.result()


_begun: dict[tuple[int, int], ThreadPoolExecutor] = {}
_building = threading.Lock()


def _begin(count: int, each: int) -> ThreadPoolExecutor:
    """What torch is told in a thread counts for that thread and for all that have not begun yet.

    For these it is told otherwise again, by one more thread, right after.
    """
    started, told = threading.Barrier(count), threading.Barrier(count + 1)
    inherited = []

    def begin() -> None:
        inherited.append(torch.get_num_threads())  # and sets it, the first time in a thread
        started.wait()
        torch.set_num_threads(each)
        told.wait()

    def tell_others() -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            told.wait()
            torch.set_num_threads(inherited[0])

    workers = ThreadPoolExecutor(count, "products", begin)
    last = threading.Thread(target=tell_others)
    try:
        last.start()
        for _ in range(count):
            workers.submit(bool)
    except BaseException:
        started.abort()
        told.abort()
        workers.shutdown(wait=False)
        raise
    last.join()
    return workers


def _forget() -> None:
    global _building
    _building = threading.Lock()
    _begun.clear()
    pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
