"""Threads that are kept for the next tensor. A forked child has none of its parent's."""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch


@functools.cache
def pool(purpose: str, count: int) -> ThreadPoolExecutor:
    """Threads of one purpose alone: a walk waits for masks, and neither may wait for itself."""
    return ThreadPoolExecutor(count, thread_name_prefix=purpose)


@functools.cache
def alone(count: int) -> ThreadPoolExecutor:
    """Threads in each of which torch and its BLAS use no other; ``count`` is the caller's own."""
    begun = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # sets it, the first time in a thread
        torch.set_num_threads(1)  # of this thread, but also of all that have not begun yet
        begun.wait()

    workers = ThreadPoolExecutor(count, "alone", begin)
    for _ in range(count):
        workers.submit(bool)
    begun.wait()
    torch.set_num_threads(count)  # as it was, for those that begin from here on
    return workers


if hasattr(os, "register_at_fork"):
    for kept in (pool, alone):
        os.register_at_fork(after_in_child=kept.cache_clear)
