"""How far the numbers reach: everything PCB has to know beyond a single element.

A scope is one tensor, or all tensors of a model one after the other. Measuring passes over it
twice, first for the magnitudes of the task vectors, then for the scores that depend on
them. A guess that missed costs one more pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_pcb.core import fused
from mergekit_pcb.core.dare import Dare
from mergekit_pcb.core.formulas import (
    Balance,
    Rows,
    high_rank,
    low_rank,
    magnitude,
    representable,
    score,
    tellable,
    threshold_rank,
)
from mergekit_pcb.core.ranks import OrderStatistic, settle
from mergekit_pcb.core.sample import Sample
from mergekit_pcb.core.tally import Open
from mergekit_pcb.core.vectors import Aligned, Scratch, chunk_elements, working_dtype

#: Begins a new pass over the tensors of a scope.
Pass = Callable[[], Iterable[Aligned]]


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


def measure_tensor(aligned: Aligned, recipe: Recipe) -> Statistics:
    """Measure a tensor by itself, in its own precision."""
    dtype = working_dtype(aligned.base.dtype)
    return measure(lambda: [aligned], len(aligned), recipe, dtype, at_hand=True)


def measure(
    start_pass: Pass, count: int, recipe: Recipe, dtype: torch.dtype, *, at_hand: bool = False
) -> Statistics:
    """Measure a scope of ``count`` elements with arithmetic in ``dtype``.

    Every call of ``start_pass`` brings the same tensors, in any order; ``at_hand`` says that it
    costs nothing, so that a few elements may be looked at ahead of all.

    Magnitudes that float32 cannot hold or square are measured again in float64. Raises
    :class:`NotFiniteError` for NaN or infinity in an input, and :class:`OutOfRangeError` where even
    float64 does not suffice.
    """
    sample, scratch = Sample(count, dtype), Scratch.of_thread(dtype)

    def thinned() -> Iterator[Aligned]:
        for aligned in start_pass():
            yield aligned.under(recipe.dare)
            del aligned  # before the next one is loaded, here and below

    if at_hand:
        for aligned in thinned():
            sample.take(aligned)
    try:
        intervals = _intervals(thinned, count, recipe, scratch, sample)
        balances = _balances(thinned, count, recipe, scratch, sample, intervals)
    except OutOfRangeError:
        if dtype == torch.float64:
            raise
        return measure(start_pass, count, recipe, torch.float64, at_hand=at_hand)
    return Statistics(balances, recipe.dare, dtype, len(balances))


def _intervals(
    start_pass: Pass, count: int, recipe: Recipe, scratch: Scratch, sample: Sample
) -> list[Balance]:
    """The clamping interval of every task; fills the sample on the way, unless it is."""
    tasks = range(len(recipe.densities))
    if not count:
        return [Balance(0.0, 0.0) for _ in tasks]
    ranks = low_rank(count, recipe.clip), high_rank(count, recipe.clip)

    def magnitudes(open_: Open) -> None:
        largest, widest = 0.0, ""
        for aligned in start_pass():
            sample.take(aligned)
            compiled = fused.of(aligned, scratch.dtype)
            if compiled is not None:
                peak = compiled.magnitudes(open_)
            else:
                peak = _magnitudes(aligned, scratch, open_)
            largest, widest = max((largest, widest), (_finite(peak, aligned), aligned.name))
            del aligned, compiled
        if not representable(largest, len(recipe.densities), scratch.dtype):
            raise OutOfRangeError(widest)

    guesses = sample.guesses(torch.abs, [ranks] * len(tasks))
    ends = {
        task: [OrderStatistic(rank, count, **guess) for rank, guess in zip(ranks, own, strict=True)]
        for task, own in zip(tasks, guesses, strict=True)
    }
    return [Balance(*values) for values in _settle(ends, magnitudes).values()]


def _magnitudes(aligned: Aligned, scratch: Scratch, open_: Open) -> float:
    """Show all magnitudes; the largest, NaN or infinite where one of them is."""
    peaks = [torch.zeros((), dtype=scratch.dtype, device=aligned.base.device)]
    for chunk in aligned.chunks(scratch):
        for task, statistics in open_.items():
            tau = chunk.task_vector(task)
            values = torch.abs(tau, out=scratch("magnitude", tau))
            peaks.append(values.amax())
            for statistic in statistics:
                statistic.push(values)
    # NaN and infinity survive the maximum; one wait for the device per tensor.
    return float(torch.stack(peaks).amax())


def _balances(
    start_pass: Pass,
    count: int,
    recipe: Recipe,
    scratch: Scratch,
    sample: Sample,
    intervals: Sequence[Balance],
) -> tuple[Balance, ...]:
    """The intervals completed by threshold and peak of the scores."""
    ranks = [threshold_rank(count, density) for density in recipe.densities]
    factors = [own.factor(len(ranks)) for own in intervals if not own.constant]
    if max(factors, default=0) > torch.finfo(scratch.dtype).max:  # magnitudes are subnormal
        for aligned in start_pass():
            raise OutOfRangeError(aligned.name)
    peaks = dict.fromkeys(range(len(ranks)), -math.inf)

    def scores(open_: Open) -> None:
        for aligned in start_pass():
            compiled = fused.of(aligned, scratch.dtype)
            if compiled is not None:
                found = dict(enumerate(compiled.scores(open_, intervals)))
            else:
                found = _scores(aligned, scratch, open_, intervals)
            for task, peak in found.items():
                peaks[task] = max(peaks[task], peak)
            del aligned, compiled

    competing = [
        task for task, rank in enumerate(ranks) if not intervals[task].constant and rank < count
    ]
    guesses = sample.guesses(
        lambda taus: _sampled(taus, competing, intervals), [[ranks[task]] for task in competing]
    )
    thresholds = {
        task: [OrderStatistic(ranks[task], count, **guess)]
        for task, (guess,) in zip(competing, guesses, strict=True)
    }
    settled = _settle(thresholds, scores)
    # With many tasks the factor exp(−n) may leave nothing of scores in float32.
    lost = [task for task in settled if not tellable(peaks[task], scratch.dtype)]
    if lost and scratch.dtype != torch.float64:
        raise OutOfRangeError("")
    return tuple(
        replace(interval, threshold=settled[task][0], peak=peaks[task])
        if task in settled
        else interval
        for task, interval in enumerate(intervals)
    )


def _scores(
    aligned: Aligned, scratch: Scratch, open_: Open, intervals: Sequence[Balance]
) -> dict[int, float]:
    """Show all scores; the largest of each task."""
    peaks: dict[int, torch.Tensor] = {}
    for chunk in aligned.chunks(scratch):
        total = chunk.total()
        for task, statistics in open_.items():
            values = _score(
                chunk.task_vector(task), total, intervals[task], len(intervals), scratch
            )
            peak = values.amax()
            peaks[task] = torch.maximum(peaks.get(task, peak), peak)
            for statistic in statistics:
                statistic.push(values)
    return {task: float(peak) for task, peak in peaks.items()}


def _score(
    tau: torch.Tensor, total: torch.Tensor, balance: Balance, tasks: int, scratch: Scratch
) -> torch.Tensor:
    clamped = magnitude(tau, balance, out=scratch("score", tau))
    return score(tau, clamped, total, balance, tasks, out=clamped, scratch=scratch.passing(tau))


def _sampled(
    taus: torch.Tensor, competing: Sequence[int], intervals: Sequence[Balance]
) -> torch.Tensor:
    """The scores of a sample, a row for each task that competes.

    An accelerator is asked for all at once; a CPU has less of them in memory one by one.
    """
    at_once = 1 if taus.device.type == "cpu" else len(competing)
    total, found = taus.sum(0), []
    for first in range(0, len(competing), at_once):
        some = competing[first : first + at_once]
        own, rows = taus[some], Rows([intervals[task] for task in some], len(intervals), taus)
        one, two, clamped = torch.empty((3, *own.shape), dtype=own.dtype, device=own.device)
        magnitude(own, rows, out=clamped)
        given = own, clamped, total, rows, len(intervals)
        found.append(score(*given, out=clamped, scratch=(one, two)))
    return torch.cat(found)


def _settle(
    statistics: dict[int, list[OrderStatistic]], walk: Callable[[Open], None]
) -> dict[int, list[float]]:
    """Walk over the values of the tasks until each of their statistics has its answer."""
    answers: dict[OrderStatistic, float] = {}
    while waiting := {
        task: left
        for task, own in statistics.items()
        if (left := [statistic for statistic in own if statistic not in answers])
    }:
        walk(waiting)
        looked = list(itertools.chain.from_iterable(waiting.values()))
        found = zip(looked, settle(looked), strict=True)
        answers |= {statistic: answer for statistic, answer in found if answer is not None}
    return {task: [answers[statistic] for statistic in own] for task, own in statistics.items()}


def check_finite(aligned: Aligned) -> None:
    """Raise :class:`NotFiniteError` if an input of a tensor holds NaN or infinity."""
    for task, tensor in ((None, aligned.base), *enumerate(aligned.tasks)):
        if not finite(tensor):
            raise NotFiniteError(aligned.name, task)


def finite(tensor: torch.Tensor) -> bool:
    """Whether all values are; a chunk at a time, for copies of a large tensor may not fit."""
    for part in torch.split(tensor.reshape(-1), chunk_elements(tensor.device)):
        values = part.float() if part.dtype.itemsize == 1 else part  # float8 has no isfinite
        # NaN is their least and their greatest, too.
        if len(values) and not torch.stack(values.aminmax()).isfinite().all():
            return False
    return True


def _finite(largest: float, aligned: Aligned) -> float:
    if not math.isfinite(largest):
        check_finite(aligned)
        raise OutOfRangeError(aligned.name)
    return largest
