"""The numbers of Philox4x64-10 against a threshold, compiled: the bits are those of ``dare.py``."""

from __future__ import annotations

from typing import Any

import numpy

from mergekit_pcb.core.dare import MULTIPLIERS, ROUNDS, WEYL
from mergekit_pcb.core.intrinsics import kept_on_disk, whole_product, words_below, words_equal
from mergekit_pcb.core.vectors import STRIP

_MULTIPLIERS = tuple(map(numpy.uint64, MULTIPLIERS))
_WEYL = tuple(map(numpy.uint64, WEYL))


@kept_on_disk
def compare(
    k0: Any, k1: Any, low: Any, high: Any, fence: Any, numbers: Any, words: Any, less: Any,
    same: Any,
) -> None:  # fmt: skip
    """Which words are less than ``fence`` and which are equal to it, 64 to a number, lowest first.

    They are drawn with the key ``k0 + 2^64 k1``, four numbers of four words a counter, which stood
    at ``low + 2^64 high``. ``words`` is the memory of ``numbers``, scratch of one strip.
    """
    for strip in range(len(less)):
        for place in range(0, STRIP // 4, 4):
            low += numpy.uint64(1)  # numpy adds one before it draws
            high += numpy.uint64(low == 0)
            c0, c1, c2, c3 = low, high, numpy.uint64(0), numpy.uint64(0)
            a, b = k0, k1
            for _ in range(ROUNDS):
                high0, low0 = whole_product(_MULTIPLIERS[0], c0)
                high1, low1 = whole_product(_MULTIPLIERS[1], c2)
                c0, c1, c2, c3 = high1 ^ c1 ^ a, low1, high0 ^ c3 ^ b, low0
                a, b = a + _WEYL[0], b + _WEYL[1]
            numbers[place], numbers[place + 1] = c0, c1
            numbers[place + 2], numbers[place + 3] = c2, c3
        less[strip] = words_below(words, 0, fence)
        same[strip] = words_equal(words, 0, fence)


def against(key: int, counter: int, count: int, fence: int) -> tuple[Any, Any]:
    """As that of ``dare.py``, with more bits than words asked for."""
    strips, numbers = -(-count // STRIP), numpy.empty(STRIP // 4, "u8")
    below, equal = numpy.empty((2, strips), "<u8")
    halves = [
        numpy.uint64(half) for whole in (key, counter) for half in divmod(whole, 1 << 64)[::-1]
    ]
    asked = *halves, numpy.uint16(fence)
    compare(*asked, numbers, numbers.view("u2"), below, equal)
    return below.view("u1"), equal.view("u1")
