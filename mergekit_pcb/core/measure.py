"""How far the numbers reach: everything PCB has to know beyond a single element.

A scope is one tensor, or all tensors of a model one after the other. Measuring passes over it
twice, first for the magnitudes of the task vectors, then for the scores that depend on
them. A guess that missed costs one more pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch

from mergekit_pcb.core.dare import Dare
from mergekit_pcb.core.formulas import (
    Balance,
    high_rank,
    low_rank,
    magnitude,
    representable,
    score,
    tellable,
    threshold_rank,
)
from mergekit_pcb.core.ranks import POOL_ELEMENTS, OrderStatistic, kth, neighbour
from mergekit_pcb.core.vectors import Aligned, Scratch, working_dtype

#: Begins a new pass over the tensors of a scope.
Pass = Callable[[], Iterable[Aligned]]
Values = Iterator[tuple[int, torch.Tensor]]

# Elements of each task in the sample that guesses where thresholds lie: the two-thirds power
# of all, which balances looking at a sample against keeping what its guess leaves open (about
# 1 % of a large tensor), up to 4 MiB a task. It decides about work, never about the answer.
LARGEST_SAMPLE = 1 << 20
# A guess misses about once in 16 000 times.
SAMPLE_DEVIATIONS = 4.0


@dataclass(frozen=True)
class Recipe:
    """All that determines the statistics of given inputs.

    ``densities`` and ``dare`` have one entry per task, in the order of the configuration.
    """

    densities: tuple[float, ...]
    clip: float
    dare: tuple[Dare | None, ...]

    @classmethod
    def of(
        cls,
        densities: Iterable[float],
        clip: float,
        dare_densities: Iterable[float],
        seed: int,
        positions: Iterable[int],
    ) -> Recipe:
        """The recipe of tasks at these positions of the configuration; rules are kept already."""
        masks = tuple(
            Dare(density, seed, position) if density < 1 else None
            for density, position in zip(dare_densities, positions, strict=True)
        )
        return cls(tuple(densities), clip, masks)


@dataclass(frozen=True)
class Statistics:
    """What was measured: one balance per task, in the precision it was measured in.

    ``dare`` is what the task vectors were thinned by, and have to be when they are merged.
    ``tasks`` is the number of tasks that competed, also where :meth:`of` leaves fewer.
    """

    balances: tuple[Balance, ...]
    dare: tuple[Dare | None, ...]
    dtype: torch.dtype
    tasks: int

    def of(self, tasks: Sequence[int]) -> Statistics:
        """The same statistics for some of the tasks, where not every model has a tensor."""
        return replace(
            self,
            balances=tuple(self.balances[task] for task in tasks),
            dare=tuple(self.dare[task] for task in tasks),
        )


class NotFiniteError(Exception):
    """A tensor holds NaN or infinity; ``task`` is ``None`` where the base does."""

    def __init__(self, tensor: str, task: int | None) -> None:
        super().__init__(tensor, task)
        self.tensor, self.task = tensor, task


class OutOfRangeError(Exception):
    """Finite inputs of a tensor whose task vectors or result the precision cannot hold."""

    def __init__(self, tensor: str) -> None:
        super().__init__(tensor)
        self.tensor = tensor


def measure_together(tensors: Sequence[Aligned], recipe: Recipe) -> Statistics:
    """Measure tensors that are all at hand as one scope, in the widest of their precisions."""
    dtypes = (working_dtype(aligned.base.dtype) for aligned in tensors)
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    return measure(lambda: tensors, sum(map(len, tensors)), recipe, dtype)


def measure(start_pass: Pass, count: int, recipe: Recipe, dtype: torch.dtype) -> Statistics:
    """Measure a scope of ``count`` elements with arithmetic in ``dtype``.

    Every call of ``start_pass`` brings the same tensors, in any order.

    Magnitudes that float32 cannot hold or square are measured again in float64. Raises
    :class:`NotFiniteError` for NaN or infinity in an input, and :class:`OutOfRangeError` where even
    float64 does not suffice.
    """
    sample, scratch = _Sample(count, len(recipe.densities)), Scratch.of_thread(dtype)

    def thinned() -> Iterator[Aligned]:
        return (aligned.under(recipe.dare) for aligned in start_pass())

    try:
        intervals = _intervals(thinned, count, recipe, scratch, sample)
        balances = _balances(thinned, count, recipe, scratch, sample, intervals)
    except OutOfRangeError:
        if dtype == torch.float64:
            raise
        return measure(start_pass, count, recipe, torch.float64)
    return Statistics(balances, recipe.dare, dtype, len(balances))


def _intervals(
    start_pass: Pass, count: int, recipe: Recipe, scratch: Scratch, sample: _Sample
) -> list[Balance]:
    """The clamping interval of every task; fills the sample on the way."""
    tasks = range(len(recipe.densities))
    if not count:
        return [Balance(0.0, 0.0) for _ in tasks]
    ranks = low_rank(count, recipe.clip), high_rank(count, recipe.clip)

    def magnitudes(tasks: Sequence[int]) -> Values:
        sample.clear(tasks)
        largest, widest = 0.0, ""
        passed = 0
        for aligned in start_pass():
            peaks: list[torch.Tensor] = []
            for chunk in aligned.chunks(scratch):
                for task in tasks:
                    tau = chunk.task_vector(task)
                    sample.take(task, tau, passed + chunk.start)
                    values = torch.abs(tau, out=scratch("magnitude", tau))
                    peaks.append(values.amax())
                    yield task, values
            # NaN and infinity survive the maximum; one wait for the device per tensor.
            if peaks:
                peak = _finite(float(torch.stack(peaks).amax()), aligned)
                largest, widest = max((largest, widest), (peak, aligned.name))
            passed += len(aligned)
        if not representable(largest, len(recipe.densities), scratch.dtype):
            raise OutOfRangeError(widest)

    ends = {task: [OrderStatistic(rank, count) for rank in ranks] for task in tasks}
    return [Balance(*values) for values in _settle(ends, magnitudes).values()]


def _balances(
    start_pass: Pass,
    count: int,
    recipe: Recipe,
    scratch: Scratch,
    sample: _Sample,
    intervals: Sequence[Balance],
) -> tuple[Balance, ...]:
    """The intervals completed by threshold and peak of the scores."""
    ranks = [threshold_rank(count, density) for density in recipe.densities]
    peaks: dict[int, torch.Tensor] = {}

    def scores(tasks: Sequence[int]) -> Values:
        for aligned in start_pass():
            for chunk in aligned.chunks(scratch):
                total = chunk.total()
                for task in tasks:
                    tau = chunk.task_vector(task)
                    values = _score(tau, total, intervals[task], len(intervals), scratch)
                    peak = values.amax()
                    peaks[task] = torch.maximum(peaks.get(task, peak), peak)
                    yield task, values

    thresholds = {
        task: [OrderStatistic(rank, count, **sample.guess(task, rank, intervals))]
        for task, rank in enumerate(ranks)
        if not intervals[task].constant and rank < count
    }
    settled = _settle(thresholds, scores)
    # With many tasks the factor exp(−n) may leave nothing of scores in float32.
    lost = [task for task in settled if not tellable(float(peaks[task]), scratch.dtype)]
    if lost and scratch.dtype != torch.float64:
        raise OutOfRangeError("")
    return tuple(
        replace(interval, threshold=settled[task][0], peak=float(peaks[task]))
        if task in settled
        else interval
        for task, interval in enumerate(intervals)
    )


def _score(
    tau: torch.Tensor, total: torch.Tensor, balance: Balance, tasks: int, scratch: Scratch
) -> torch.Tensor:
    clamped = magnitude(tau, balance, out=scratch("score", tau))
    return score(tau, clamped, total, balance, tasks, out=clamped, scratch=scratch.passing(tau))


def _settle(
    statistics: dict[int, list[OrderStatistic]], values_of: Callable[[Sequence[int]], Values]
) -> dict[int, list[float]]:
    """Pass over the values of the tasks until each of their statistics has its answer."""
    answers: dict[int, list[float | None]] = {
        task: [None] * len(s) for task, s in statistics.items()
    }
    while waiting := [task for task in statistics if None in answers[task]]:
        for task, values in values_of(waiting):
            for statistic, answer in zip(statistics[task], answers[task], strict=True):
                if answer is None:
                    statistic.push(values)
        for task in waiting:
            answers[task] = [
                statistic.settle() if answer is None else answer
                for statistic, answer in zip(statistics[task], answers[task], strict=True)
            ]
    return answers  # type: ignore[return-value]


class Guess(TypedDict, total=False):
    """Where an order statistic may lie, as :class:`OrderStatistic` takes it."""

    low: float
    high: float
    tied: bool


class _Sample:
    """Evenly spaced task vector elements of a scope, to guess thresholds from."""

    def __init__(self, count: int, tasks: int) -> None:
        self._count = count
        # Odd, so that it does not fall in step with the rows of a matrix.
        size = min(max(1, round(count ** (2 / 3))), LARGEST_SAMPLE)
        self._step = (count // size) | 1
        self._task_vectors: list[list[torch.Tensor]] = [[] for _ in range(tasks)]

    def clear(self, tasks: Sequence[int]) -> None:
        for task in tasks:
            self._task_vectors[task].clear()

    def take(self, task: int, tau: torch.Tensor, passed: int) -> None:
        """Take what is due of a task's elements, of which so many have passed before."""
        if self._count > POOL_ELEMENTS:  # else every value is kept anyway
            self._task_vectors[task].append(tau[-passed % self._step :: self._step].clone())

    def guess(self, task: int, rank: int, intervals: Sequence[Balance]) -> Guess:
        """Scores strictly between which the one at ``rank`` should lie, unless it is tied."""
        if not self._task_vectors[task]:
            return {}
        task_vectors = [torch.cat(parts) for parts in self._task_vectors]
        scratch = Scratch(task_vectors[0].dtype)
        total = torch.stack(task_vectors).sum(0)
        scores = _score(task_vectors[task], total, intervals[task], len(intervals), scratch)
        share, size = rank / self._count, scores.numel()
        margin = SAMPLE_DEVIATIONS * math.sqrt(size * share * (1 - share)) + 2
        first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
        guess: Guess = {}
        if first >= 0:
            low = kth(scores, first)
            # Zeros of DARE, and of tensors that training left alone.
            guess["tied"] = int((scores == low).sum()) > margin
            # Else a step outwards, because a few elements may share the value of a fence.
            guess["low"] = low if guess["tied"] else neighbour(low, -math.inf, scores.dtype)
        if last < size:
            guess["high"] = neighbour(kth(scores, last), math.inf, scores.dtype)
        return guess


def check_finite(aligned: Aligned) -> None:
    """Raise :class:`NotFiniteError` if an input of a tensor holds NaN or infinity."""
    for task, tensor in ((None, aligned.base), *enumerate(aligned.tasks)):
        if not tensor.to(torch.float64).isfinite().all():
            raise NotFiniteError(aligned.name, task)


def _finite(largest: float, aligned: Aligned) -> float:
    if not math.isfinite(largest):
        check_finite(aligned)
        raise OutOfRangeError(aligned.name)
    return largest
