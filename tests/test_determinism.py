"""Bits and memory do not depend on how the work is cut."""

import pytest
import torch
from conftest import pieces
from test_properties import merge, models

from mergekit_pcb.core import fused, measure, ranks, sample, vectors


def peak_bytes(action):
    """The most memory that torch and numpy had allocated at once during an action."""
    import tracemalloc

    from torch.profiler import ProfilerActivity, profile

    tracemalloc.start()  # numpy reports to it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    level = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak + numpy_peak


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        pytest.param(torch.float32, marks=pytest.mark.slow),
        pytest.param(torch.float64, marks=pytest.mark.slow),
    ],
)
def test_bits_do_not_depend_on_chunks_or_threads(dtype):
    tensors = models(10, (331, 31), dtype=dtype, size=0.3)  # tanh leaves its linear part
    threads = torch.get_num_threads()
    results = []
    try:
        for size, count in [(None, 1), (None, 2), (1000, 2), (257, 1), (4, 1)]:
            torch.set_num_threads(count)
            with pieces(size):
                results.append(merge(tensors, density=0.3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "guess",
    [
        "sampled",
        {},
        {"low": 1e30, "high": 2e30},
        {"low": -2.0, "high": -1.0},
        {"high": -1e-9},
        {"low": 0.0, "high": 0.0},
        {"low": 0.0, "tied": True},
        {"low": 0.0, "high": 1e-40, "tied": True},
        {"low": 1e30, "high": 2e30, "tied": True},
    ],
)
@pytest.mark.parametrize("compiled", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_guess_never_changes_the_bits(guess, compiled):
    tensors = models(3, (1000, 300), dtype=torch.float32)
    kept = merge(tensors, density=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "POOL_ELEMENTS", 1000)
        patch.setattr(sample, "FEW_ELEMENTS", 1000)
        patch.setattr(ranks, "LARGEST_POOL", 20_000)
        patch.setattr(vectors, "CPU_CHUNK_ELEMENTS", 50_000)
        patch.setenv(fused.SWITCH, compiled)
        if guess != "sampled":
            guesses = lambda *given: [[guess] * len(own) for own in given[-1]]  # noqa: E731
            patch.setattr(sample.Sample, "guesses", guesses)
        assert torch.equal(merge(tensors, density=0.2), kept)


@pytest.mark.usefixtures("as_given")  # a device finds each of the two ranks in passes of its own
@pytest.mark.parametrize("dare_density", [1.0, 0.5])
def test_the_sample_spares_a_third_pass(monkeypatch, dare_density):
    tensors = models(3, (1000, 300), dtype=torch.float32)
    aligned = vectors.Aligned.of("w", tensors[0], tensors[1:])
    passes = []
    monkeypatch.setattr(sample, "FEW_ELEMENTS", 1000)

    def start_pass():
        passes.append("pass")
        return [aligned]

    recipe = measure.Recipe.of([0.2] * 3, 1e-4, [dare_density] * 3, 0, range(3))
    measure.measure(start_pass, len(aligned), recipe, torch.float32)
    assert len(passes) == 2


@pytest.mark.usefixtures("as_given")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_working_memory_is_a_few_chunks(dtype):
    """Peak memory of this process over inputs and output, while merging 16 MiB tensors."""
    shape = (2048, 2048) if dtype == torch.float32 else (4096, 2048)
    tensors = models(3, shape, dtype=dtype)
    peak_bytes(lambda: merge(tensors))  # what the profiler itself allocates once and keeps
    held = sum(tensor.nbytes for tensor in tensors)
    peak = peak_bytes(lambda: merge(tensors))
    assert held == 4 * 2**24
    assert peak <= tensors[0].nbytes + 8 * 2**20
