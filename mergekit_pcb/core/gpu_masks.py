"""DARE's masks, drawn on a GPU by Triton: the bits are those of ``dare.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from mergekit_pcb.core.dare import MULTIPLIERS, ROUNDS, WEYL

_M0, _M1 = map(tl.constexpr, MULTIPLIERS)
_W0, _W1 = map(tl.constexpr, WEYL)
_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit(do_not_specialize=["counters", "upper", "lower"])
def draw_mask(out, counters, key, upper, lower, BLOCK: tl.constexpr):
    """Whether elements are kept, 16 bits a counter, as ``dare.py`` says it.

    ``key`` is two numbers of 64 bits, the lower half first.
    """
    k0, k1 = tl.load(key).to(tl.uint64), tl.load(key + 1).to(tl.uint64)
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # numpy adds one before it draws.
    c0 = (counter + 1).to(tl.uint64)
    zero = c0 * 0
    kept, equal = _compare(c0, zero, k0, k1, upper)
    if lower > 0:
        if tl.max(equal) > 0:
            below, _ = _compare(c0, zero + 1, k0, k1, lower)
            kept |= equal & below
    tl.store(out + counter, kept.to(tl.int16), mask=counter < counters)


@triton.jit
def _compare(c0, c3, k0, k1, fence):
    """Which of a counter's sixteen words are less than a fence, and which equal: a bit each."""
    c1 = c0 * 0
    c2 = c1
    a = c1 + k0
    b = c1 + k1
    m0 = c1 + _M0
    m1 = c1 + _M1
    for _ in range(_ROUNDS):
        high0 = tl.umulhi(m0, c0)
        high1 = tl.umulhi(m1, c2)
        low0 = m0 * c0
        low1 = m1 * c2
        c0 = high1 ^ c1 ^ a
        c2 = high0 ^ c3 ^ b
        c1 = low1
        c3 = low0
        a += _W0
        b += _W1
    less = tl.zeros(c0.shape, tl.int32)
    equal = tl.zeros(c0.shape, tl.int32)
    for word in tl.static_range(4):
        first = ((c0 >> (16 * word)) & 0xFFFF).to(tl.int32)
        second = ((c1 >> (16 * word)) & 0xFFFF).to(tl.int32)
        third = ((c2 >> (16 * word)) & 0xFFFF).to(tl.int32)
        fourth = ((c3 >> (16 * word)) & 0xFFFF).to(tl.int32)
        less |= (first < fence).to(tl.int32) << word
        less |= (second < fence).to(tl.int32) << (word + 4)
        less |= (third < fence).to(tl.int32) << (word + 8)
        less |= (fourth < fence).to(tl.int32) << (word + 12)
        equal |= (first == fence).to(tl.int32) << word
        equal |= (second == fence).to(tl.int32) << (word + 4)
        equal |= (third == fence).to(tl.int32) << (word + 8)
        equal |= (fourth == fence).to(tl.int32) << (word + 12)
    return less, equal
