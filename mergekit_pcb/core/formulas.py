"""The formulas of PCB-Merging, elementwise on whatever part of the vectors they are given.

Every product and sum is rounded by itself: torch's operations that do both at once round once on
some processors and twice on others, and the compiled loops of ``kernels.py`` could not follow them.

Source: Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024,
arXiv 2410.02396, in the form of its released ``pcb-merging.py`` (commit 5897888), where
paper and code differ. What needs the whole vector, four numbers per task, is an argument
here (:class:`Balance`) and is found in ``measure.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

# Released code, last line of PCB_merge: the divisor is clamped here, not guarded against zero.
SMALLEST_DIVISOR = 1e-12
LOG2_E = 1 / math.log(2)
#: Numbers of a task in :func:`table`.
COLUMNS = 9


@dataclass(frozen=True)
class Balance:
    """The four numbers per task that PCB needs from beyond the element at hand.

    ``low`` and ``high`` are order statistics of the magnitudes (intra-balancing clamps between
    them), ``threshold`` is one of the scores and ``peak`` their maximum (drop and rescale).
    A task with an empty interval (``high <= low`` or ``peak <= threshold``) has no
    competition to balance: it is *silent* and gets no weight anywhere. The released code
    divides by the empty interval and returns NaN.
    """

    low: float
    high: float
    threshold: float = 0.0
    peak: float = 0.0

    @property
    def constant(self) -> bool:
        """Every magnitude clamps to one value: intra-balancing has nothing to tell apart."""
        return not self.low < self.high

    @property
    def silent(self) -> bool:
        return self.constant or not self.threshold < self.peak

    def factor(self, tasks: int) -> float:
        """What takes a clamped magnitude above ``low`` to the root of its exponent of two."""
        return math.sqrt(tasks * LOG2_E) / (self.high - self.low)


class Rows:
    """The intervals of several tasks, for :func:`score` of a matrix with a row for each."""

    def __init__(self, balances: Sequence[Balance], tasks: int, like: torch.Tensor) -> None:
        rows = [(own.low, own.high, own.factor(tasks)) for own in balances]
        columns = torch.tensor(rows, dtype=like.dtype).to(like.device)
        self.low, self.high, self._factors = columns[:, :1], columns[:, 1:2], columns[:, 2:]

    def factor(self, _tasks: int) -> torch.Tensor:
        """As of :class:`Balance`, for as many tasks as it was made for."""
        return self._factors


def table(
    balances: Sequence[Balance], tasks: int, weights: Sequence[float], precision: str = "f4"
) -> Any:
    """What compiled loops take of ``balances``, in numpy's name of a precision: a row per task.

    ``low, high, √(n log₂ e) / (high − low), n log₂ e, threshold, peak − threshold, its inverse,
    weight, whether it competes``, where ``n`` is the number of ``tasks``.
    """
    rows = numpy.zeros((len(balances), COLUMNS), precision)
    with numpy.errstate(divide="ignore", over="ignore"):  # the inverse of a subnormal number
        for row, b, weight in zip(rows, balances, weights, strict=True):
            row[:4] = b.low, b.high, 0 if b.constant else b.factor(tasks), tasks * LOG2_E
            row[4:6] = b.threshold, b.peak - b.threshold
            row[6] = 0 if b.silent else 1 / row[5]
            row[7:] = weight, not b.silent
    return rows


def low_rank(count: int, clip: float) -> int:
    """0-based rank of ``low`` among ``count`` magnitudes (released code: ``clamp``)."""
    return int(count * clip)


def high_rank(count: int, clip: float) -> int:
    """0-based rank of ``high`` among ``count`` magnitudes (released code: ``clamp``)."""
    return int(count * (1 - clip) - 1)


def threshold_rank(count: int, density: float) -> int:
    """0-based rank of ``threshold`` among ``count`` scores; ``count`` itself keeps nothing."""
    return int(count * (1 - density))


def magnitude(tau: torch.Tensor, balance: Balance | Rows, *, out: torch.Tensor) -> torch.Tensor:
    """The clamped magnitude ``a`` of a task vector."""
    ends: Any = balance.low, balance.high
    return torch.abs(tau, out=out).clamp_(*ends)


def score(
    tau: torch.Tensor,
    clamped: torch.Tensor,
    total: torch.Tensor,
    balance: Balance | Rows,
    tasks: int,
    *,
    out: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Intra-balancing times inter-balancing: ``exp(n x²) · tanh(τ Σ_j τ_j)``, up to a constant.

    ``clamped`` is the :func:`magnitude` of ``tau`` and may be ``out`` itself; ``total`` is the
    sum of all ``tasks`` task vectors; all are of one length, or ``tau`` and ``balance`` are rows.
    Departure from the released code: the exponent is ``n (x² − 1)``, which scales every score by
    the same ``exp(−n)`` and so changes no weight, but cannot overflow (``exp(n x²)`` does from 89
    tasks on in float32).
    """
    x = torch.sub(clamped, balance.low, out=out).mul_(balance.factor(tasks))
    intra = power_of_two_(x.mul_(x).sub_(tasks * LOG2_E), scratch=scratch)
    return intra.mul_(tanh_(torch.mul(tau, total, out=scratch[0]), scratch=scratch[1]))


@dataclass(frozen=True)
class Elementary:
    """How powers of two and hyperbolic tangents are computed in one precision.

    They are spelled out, because libraries' own differ from one processor to the next, and compiled
    loops could not follow them. All are within two units in the last place.
    """

    #: Integers of as many bits, and how many of these are the fraction's.
    integer: torch.dtype
    fraction: int
    #: The least exponent of a number that is not subnormal.
    least_exponent: float
    #: 2^f for f from -0.5 to 0.5, by powers of f: the polynomial of least relative error whose
    #: first coefficient is 1, rounded to this precision.
    power_of_two: tuple[float, ...]
    #: Up to here z − z³/3 is tanh z to within rounding.
    small: float
    #: Up to ``MIDDLE`` z + z³ P(z²) is, with P the polynomial of least relative error, rounded to
    #: this precision; beyond, (1 − t) / (1 + t) with t = exp(−2 |z|).
    hyperbolic: tuple[float, ...]

    @property
    def rounding(self) -> float:
        """Added to a small number, it leaves no room for a fraction."""
        return 1.5 * 2.0**self.fraction


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float.fromhex, text.split()))


MIDDLE = 0.625
# Relative errors of the polynomials: 2e-9 and 4e-9.
SINGLE = Elementary(
    integer=torch.int32,
    fraction=23,
    least_exponent=-126.0,
    power_of_two=_numbers(
        "0x1p+0 0x1.62e430p-1 0x1.ebfbdcp-3 0x1.c6aee8p-5 0x1.3b2d4cp-7 0x1.5f3e52p-10 "
        "0x1.41fbbcp-13"
    ),
    small=2.0**-6,
    hyperbolic=_numbers("-0x1.555532p-2 0x1.110726p-3 -0x1.b83c58p-5 0x1.522692p-6 -0x1.75e1a8p-8"),
)
# Relative errors of the polynomials: 3e-18 and 1e-17.
DOUBLE = Elementary(
    integer=torch.int64,
    fraction=52,
    least_exponent=-1022.0,
    power_of_two=_numbers(
        "0x1p+0 0x1.62e42fefa39efp-1 0x1.ebfbdff82c5a4p-3 0x1.c6b08d7049fe8p-5 "
        "0x1.3b2ab6fba0119p-7 0x1.5d87fe78cd6e2p-10 0x1.4309130ed8f0ap-13 0x1.ffcbfba97cbfap-17 "
        "0x1.62bfc79cf6aadp-20 0x1.b5267ce6d1bf2p-24 0x1.e61b502708e4cp-28 0x1.e79bae7fbaf41p-32"
    ),
    small=2.0**-13,
    hyperbolic=_numbers(
        "-0x1.55555555554ffp-2 0x1.111111110accfp-3 -0x1.ba1ba1b506558p-5 0x1.664f477adc3acp-6 "
        "-0x1.226e162c15e41p-7 0x1.d6cf2811ea851p-9 -0x1.7d68a34ab373fp-10 0x1.3366137ae7b58p-11 "
        "-0x1.df557dd3e877dp-13 0x1.439129adc171cp-14 -0x1.0da736708bfcbp-16"
    ),
)
ELEMENTARY = {torch.float32: SINGLE, torch.float64: DOUBLE}


def power_of_two_(y: torch.Tensor, *, scratch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """2 to the power of numbers that are not above 0, in place.

    The least exponent takes the place of what is less: in float32 only with more than 87 tasks is
    anything, and :func:`tellable` asks for float64 long before that matters.
    """
    own = ELEMENTARY[y.dtype]
    whole = torch.add(y.clamp_(min=own.least_exponent), own.rounding, out=scratch[0])
    fraction = y.sub_(whole.sub_(own.rounding))
    powers = torch.mul(fraction, own.power_of_two[-1], out=scratch[1])
    for coefficient in own.power_of_two[-2:0:-1]:
        powers.add_(coefficient).mul_(fraction)
    powers.add_(own.power_of_two[0])
    bits = whole.view(own.integer).copy_(whole.to(own.integer))
    bits.add_(-int(own.least_exponent) + 1).bitwise_left_shift_(own.fraction)
    return torch.mul(powers, bits.view(y.dtype), out=y)


def tanh_(z: torch.Tensor, *, scratch: torch.Tensor) -> torch.Tensor:
    """Tanh in place.

    Real models have tiny products, for which it is short. Each element's value depends on that
    element alone, whichever way a chunk is computed.
    """
    own, largest = ELEMENTARY[z.dtype], math.inf
    if z.device.type == "cpu":  # elsewhere it would be waited for
        lowest, highest = torch.aminmax(z)
        largest = float(torch.maximum(-lowest, highest))
    square = torch.mul(z, z, out=scratch)
    if largest <= own.small:
        return z.add_(square.mul_(z).mul_(-1 / 3))
    size = z.abs()
    polynomial = square * own.hyperbolic[-1]
    for coefficient in own.hyperbolic[-2::-1]:
        polynomial.add_(coefficient).mul_(square)
    found = polynomial.mul_(z).add_(z)
    if largest > MIDDLE:
        t = power_of_two_(size * (-2 * LOG2_E), scratch=(torch.empty_like(z), torch.empty_like(z)))
        far = torch.copysign((1 - t).div_(1 + t), z)
        found = torch.where(size <= MIDDLE, found, far)
    series = square.mul_(z).mul_(-1 / 3).add_(z)
    return z.copy_(torch.where(size <= own.small, series, found))


def rescale_(scores: torch.Tensor, balance: Balance) -> torch.Tensor:
    """Turn scores into weights in [0, 1] in place: drop below the threshold, then min-max."""
    scores.clamp_(min=balance.threshold).sub_(balance.threshold)
    # By a number, a GPU would multiply by one over it.
    return scores.div_(scores.new_full((), balance.peak - balance.threshold))


def signed_(clamped: torch.Tensor, tau: torch.Tensor, *, scratch: torch.Tensor) -> torch.Tensor:
    """Give clamped magnitudes the signs of ``tau`` in place: the task vector that is merged."""
    return clamped.mul_(torch.sign(tau, out=scratch))


def representable(largest: float, tasks: int, dtype: torch.dtype) -> bool:
    """Whether scores of task vectors up to ``largest`` in magnitude can be told in ``dtype``.

    The sum of the task vectors must not overflow, and the product of two magnitudes must
    not underflow so far that weights down to :data:`SMALLEST_DIVISOR` of the peak vanish.
    """
    limits = torch.finfo(dtype)
    if not math.isfinite(largest) or largest * tasks > limits.max:
        return False
    return largest == 0 or tellable(largest * largest, dtype)


def tellable(peak: float, dtype: torch.dtype) -> bool:
    """Whether scores down to :data:`SMALLEST_DIVISOR` of a peak are above underflow."""
    return abs(peak) * SMALLEST_DIVISOR > torch.finfo(dtype).tiny
