"""Exact order statistics, compared with sorting."""

import contextlib

import pytest
import torch
from conftest import pieces
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_pcb.core import cells, ranks, sample, walks
from mergekit_pcb.core.cells import Cells
from mergekit_pcb.core.ranks import OrderStatistic


@pytest.fixture(autouse=True)
def numpys(monkeypatch):
    """What looks between fences; compiled loops put theirs there for the whole process."""
    monkeypatch.setattr(ranks, "look", ranks.between)


@pytest.fixture(params=["numpy", "compiled"])
def look(request, monkeypatch, numpys):  # noqa: ARG001 - that one comes first
    if request.param == "compiled":
        monkeypatch.setattr(ranks, "look", walks.between)


def settled(values, rank, *, piece=7, guess=(None, None), tied=False):
    """Stream the values until the statistic settles; returns it and the number of sweeps."""
    statistic = OrderStatistic(rank, values.numel(), *guess, tied=tied)
    for sweep in range(1, 20):  # 64 bits at the 5 bits a sweep of 64 cells, and a bad guess
        for part in values.split(piece):
            statistic.push(part)
        if (answer := statistic.settle()) is not None:
            return answer, sweep
    raise AssertionError("did not settle")


def distributions(dtype):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(4001, generator=generator, dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal
    return {
        "normal": normal,
        "half zeros": torch.where(normal > 0, normal, 0.0),
        "both zeros": torch.where(normal > 0, 0.0, -0.0).to(dtype),
        "denormals": normal * tiny / 64,
        "infinities": torch.where(normal.abs() > 1, normal / 0, normal),
        "constant": torch.full((4001,), 0.25, dtype=dtype),
        "heavy ties": (normal * 4).round() / 4,
        "bfloat16 steps": normal.bfloat16().to(dtype),
        "wide": torch.exp(normal * 20) * normal.sign(),
        "one": normal[:1],
        "two": normal[:2],
        "ascending": normal.sort().values,
        "descending": normal.sort(descending=True).values,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", distributions(torch.float32))
@pytest.mark.parametrize("pool", [None, 1, 5])
@pytest.mark.usefixtures("look")
def test_equals_sorting(name, dtype, pool):
    values = distributions(dtype)[name]
    ordered = values.sort().values
    with pieces(pool):
        for share in (0.0, 1e-4, 0.01, 0.3, 0.5, 0.9, 0.9999, 1.0):
            rank = round(share * (values.numel() - 1))
            answer, _ = settled(values, rank, piece=97)
            assert answer == ordered[rank], (name, rank)


@contextlib.contextmanager
def as_on(device):
    """On ``"accelerator"``, the code for tensors on another device, with tensors on this one."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "accelerator":
            patch.setattr(ranks, "HOST", "another device")
        elif device == "cpu, compiled":
            patch.setattr(ranks, "look", walks.between)
        yield


@pytest.fixture(params=["cpu", "cpu, compiled", "accelerator"])
def device(request):
    with as_on(request.param):
        yield request.param


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("name", distributions(torch.float32))
@pytest.mark.parametrize("pool", [None, 5])
def test_equals_sorting_with_the_code_for_accelerators(name, dtype, pool, monkeypatch):
    monkeypatch.setattr(ranks, "HOST", "another device")
    values = distributions(dtype)[name]
    ordered = values.sort().values
    with pieces(pool):
        for share in (0.0, 0.01, 0.5, 0.9999, 1.0):
            rank = round(share * (values.numel() - 1))
            fence = ordered[values.numel() // 3].item()
            for guess in ((None, None), (fence, None)):
                assert settled(values, rank, piece=97, guess=guess)[0] == ordered[rank]


@pytest.mark.parametrize("low", [None, -9.0, -0.5, 0.0, 0.1, 0.9, 9.0])
@pytest.mark.parametrize("high", [None, -8.0, 0.0, 0.2, 0.9, 9.5])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pool", [None, 5])
@pytest.mark.usefixtures("device")
def test_a_bad_guess_costs_sweeps_but_not_exactness(low, high, tied, pool):
    if low is not None and high is not None and low > high:
        low, high = high, low
    values = (distributions(torch.float32)["normal"] * 8).round() / 8
    ordered = values.sort().values
    with pieces(pool):
        for rank in (0, 17, 2000, 2400, 4000):
            found = settled(values, rank, piece=97, guess=(low, high), tied=tied)
            assert found[0] == ordered[rank]


@pytest.mark.usefixtures("look")
def test_strided_values_are_values():
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(0))[::2]
    found, _ = settled(values, 50_000, piece=100_000, guess=(0.45, 0.55))
    assert found == values.sort().values[50_000]


def test_a_tail_takes_one_sweep_and_little_memory():
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "POOL_ELEMENTS", 1000)
        statistic = OrderStatistic(40, values.numel())
        largest = 0
        for part in values.split(500):
            statistic.push(part)
            largest = max(largest, statistic._inside)
        assert statistic.settle() == values.sort().values[40]
    assert largest <= 1500  # one limit's worth and one piece


def test_what_is_pushed_may_change_afterwards():
    statistic, buffer = OrderStatistic(1, 4), torch.empty(2)
    for part in ([3.0, 1.0], [2.0, 4.0]):
        statistic.push(buffer.copy_(torch.tensor(part)))
    assert statistic.settle() == 2.0


def test_streams_longer_than_32_bits_can_count():
    """2.2 billion values: the same quarter million over and over, so that sorting one tells all."""
    piece = torch.randn(1 << 18, generator=torch.Generator().manual_seed(7))
    times = 8400
    count = piece.numel() * times
    assert count > 2**31
    ordered = piece.sort().values
    wanted = {rank: ordered[rank // times].item() for rank in (count // 10**6, count - 2)}
    fences = (ordered[200_000].item(), ordered[200_040].item())
    middle = 200_020 * times + 5
    statistics = {rank: OrderStatistic(rank, count) for rank in wanted}
    statistics[middle] = OrderStatistic(middle, count, *fences)
    wanted[middle] = ordered[200_020].item()
    # Only what the fences cut off is ever compared again, so a narrowed stream is the same stream.
    for _ in range(times):
        for statistic in statistics.values():
            statistic.push(piece)
    for rank, statistic in statistics.items():
        assert statistic.settle() == wanted[rank]


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60),
    st.data(),
)
def test_equals_sorting_for_any_floats(numbers, data):
    values = torch.tensor(numbers, dtype=torch.float32)
    rank = data.draw(st.integers(0, len(numbers) - 1))
    piece = data.draw(st.integers(1, 60))
    fence = st.none() | st.sampled_from(numbers) | st.floats(width=32, allow_nan=False)
    guess = data.draw(fence), data.draw(fence)
    if None not in guess:
        guess = min(guess), max(guess)
    where = as_on(data.draw(st.sampled_from(["cpu", "accelerator"])))
    with where, pieces(data.draw(st.sampled_from([None, 1, 3]))):
        found = settled(values, rank, piece=piece, guess=guess, tied=data.draw(st.booleans()))
        assert found[0] == values.sort().values[rank]


@pytest.mark.usefixtures("device")
def test_a_tie_that_was_foreseen_takes_one_sweep_and_no_memory():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    values[::2] = 0.0
    values[::4] = -0.0
    with pieces(5):
        answer, sweeps = settled(values, 2000, piece=97, guess=(0.0, 1e-40), tied=True)
    assert (answer, sweeps) == (0.0, 1)


def test_a_rank_beyond_the_stream_is_refused():
    with pytest.raises(ValueError, match="rank 4 lies outside"):
        OrderStatistic(4, 4)


def test_a_short_sweep_is_noticed():
    statistic = OrderStatistic(0, 3)
    statistic.push(torch.ones(2))
    with pytest.raises(ValueError, match="brought 2 values where 3 were due"):
        statistic.settle()


def test_an_accelerator_counts_what_the_cpu_counts():
    values = distributions(torch.float32)["heavy ties"]
    low, high = -0.25, 0.75
    counted = Cells(low, high, torch.float32, values.device)
    for part in values.split(97):
        counted.add_all(part, tied=True)
    found = counted.found(2500, counted.asked(2500).tolist())
    assert found.at_most == int((values <= low).sum())
    assert found.below == int((values < low).sum())
    assert found.inside == int(((values > low) & (values < high)).sum())
    assert found.low < values.sort().values[2500] < found.high


@pytest.mark.parametrize("finer", [1, cells.FINER_THERE])
def test_nan_has_a_cell_too(finer, monkeypatch):
    """All of a sum's bits are one on a card: a merge then tells of it, once a walk is over."""
    monkeypatch.setattr(cells, "CELLS", finer * cells.CELLS)
    values = torch.tensor([1.0, -1.0, 0.0, 0.0])
    values.view(torch.int32)[2:] = torch.tensor([0x7FFFFFFF, 0x7FC00000], dtype=torch.int32)
    for low, high in ((None, None), (0.5, None), (None, 0.5)):
        counted = Cells(low, high, torch.float32, values.device)
        counted.add_all(values, tied=False)
        assert int(counted.counts.sum()) == len(values)


def test_an_accelerator_needs_one_pass_with_a_guess_and_two_without():
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(5)).abs()
    ordered = values.sort().values
    with as_on("accelerator"):
        for rank in (30, 150_000, 299_990):
            assert settled(values, rank, piece=10_000) == (ordered[rank], 2)
            near = ordered[max(0, rank - 1500)].item(), ordered[min(299_999, rank + 1500)].item()
            guess = (None if rank == 30 else near[0]), (None if rank == 299_990 else near[1])
            answer, sweeps = settled(values, rank, piece=10_000, guess=guess)
            assert answer == ordered[rank]
            assert sweeps == 1 if rank == 150_000 else sweeps <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sample_says_the_same_on_an_accelerator(dtype):
    values = torch.randn((2, 500), generator=torch.Generator().manual_seed(0), dtype=dtype)
    values[1] = values[1].mul(2).round().mul(-0.25)  # ties, and zeros of both signs
    ends = [[(0, 499), (17, 230)], [(120, 121), (250, 250)]]
    here, there = sample._looked(values, ends), list(sample._looked_there(values, ends))
    for row, ours, theirs in zip(values, here, there, strict=True):
        for (low, high, below, at_most, _), found in zip(ours, theirs, strict=True):
            assert (low, high, at_most - below) == (*found[:2], found[3] - found[2])
            counts = (row < low).sum(), (row <= low).sum(), (row <= high).sum()
            assert found[2:] == tuple(map(int, counts))
