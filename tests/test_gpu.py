"""The kernels for GPUs: they give the bits of torch's operations on a CPU.

Without a GPU they are run by Triton's interpreter, on tensors in main memory.
"""

import dataclasses
import logging
import math

import numpy
import pytest
import torch
from checkpoints import configuration, merge, save_family, tensors, tiny_llama
from conftest import ON_GPU, pieces
from test_fused import ADVERSARIAL, inputs, merged

from mergekit_pcb.core import cells, dare, formulas, fused, gpu, measure, ranks, rehearsal
from mergekit_pcb.core.measure import NotFiniteError, OutOfRangeError
from mergekit_pcb.core.merge import delta
from mergekit_pcb.core.merge import merge as pcb_merge
from mergekit_pcb.core.vectors import Aligned, Scratch

pytest.importorskip("triton")
from mergekit_pcb.core import gpu_kernels

pytestmark = pytest.mark.usefixtures("as_given")
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

SLOW = pytest.mark.slow
# The interpreter rounds to bfloat16 in a way of its own.
KINDS = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch):
    """Tensors are walked over by the kernels, however small, and by few programs."""

    def of(aligned, dtype):
        walked = dtype == torch.float32 and len(aligned)
        return gpu.OnGPU(aligned, gpu_kernels) if walked else None

    monkeypatch.setattr(fused, "of", of)
    monkeypatch.setattr(gpu, "PROGRAMS", 3)
    if not ON_GPU:
        monkeypatch.setattr(ranks, "HOST", "another device")


def there(base, tasks, **options):
    """Statistics and merge by the kernels."""
    moved = base.to(DEVICE), [task.to(DEVICE) for task in tasks]
    statistics, result = merged(*moved, way="1", **options)
    return statistics, result.cpu()


def here(base, tasks, **options):
    """Statistics and merge by torch's operations, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "of", lambda *_: None)
        patch.setattr(ranks, "HOST", "cpu")
        return merged(base, tasks, way="0", **options)


def assert_same(base, tasks, **options):
    found, expected = there(base, tasks, **options), here(base, tasks, **options)
    assert found[0] == expected[0]
    # As bits: zeros of both signs are not the same.
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.dtype.itemsize]
    assert torch.equal(found[1].view(integer), expected[1].view(integer))


@pytest.mark.parametrize("kind", [pytest.param(KINDS[0], marks=SLOW), *KINDS[1:]], ids=str)
@pytest.mark.parametrize("tasks", [2, pytest.param(1, marks=SLOW), pytest.param(5, marks=SLOW)])
@pytest.mark.parametrize("dare", [0.3, pytest.param(1.0, marks=SLOW)])
def test_the_bits_are_those_of_torch_on_a_cpu(kind, tasks, dare):
    base, models = inputs(kind, 1037, tasks)
    weights = [1.0 - 0.3 * task for task in range(tasks)]
    assert_same(base, models, dare=dare, weights=weights)


def assert_same_merge(base, tasks, statistics, weights):
    """Of given statistics, the bits of both ways; returns them."""
    moved = Aligned.of("w", base.to(DEVICE), [task.to(DEVICE) for task in tasks])
    found = pcb_merge(moved, statistics, weights, 1.0).cpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "of", lambda *_: None)
        expected = pcb_merge(Aligned.of("w", base, tasks), statistics, weights, 1.0)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    return found


@pytest.mark.parametrize("tasks", [2, 89, 120])
def test_statistics_of_more_tasks_than_have_a_tensor(tasks):
    base, models = inputs(torch.float32, 600, 2)
    statistics, _ = here(base, models)
    statistics = dataclasses.replace(statistics, tasks=tasks)
    assert_same_merge(base, models, statistics, [1.0, 0.5])


@pytest.mark.parametrize("near", [True, False])
def test_subnormal_results(near, monkeypatch):
    _, models = inputs(torch.float32, 600, 2)
    statistics, _ = here(torch.zeros(600), models)
    monkeypatch.setattr(gpu, "_near", lambda _: near)
    found = assert_same_merge(torch.zeros(600), models, statistics, [1e-37, -2e-38])
    assert ((found != 0) & (found.abs() < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.parametrize("size", [1, 255, 256, 300])
def test_tensors_of_few_blocks(size):
    assert_same(*inputs(torch.float32, size, 2))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("room", [1500, 3])
def test_more_than_a_walk_can_keep_is_counted_by_another(together, room, monkeypatch):
    base, models = inputs(torch.float32, 1500, 2)
    with pieces(5):  # guesses, and few cells
        made = []

        def keep(low, high, _, device):
            made.append(cells.Kept(low, high, room, device))
            return made[-1]

        monkeypatch.setattr(ranks, "Kept", keep)
        assert_same(base, models, together=together, clip=0.05)
    assert made
    assert any(int(own.fills.amax()) > own.room for own in made) == (room == 3)


def test_a_column_that_stands_out_is_kept_by_all_parts(monkeypatch):
    """Programs come in turn, so blocks a row apart would all be in one part."""
    monkeypatch.setattr(gpu, "PROGRAMS", 1 << 16)
    monkeypatch.setattr(gpu, "BLOCK_ELEMENTS", 32)
    rows = torch.full((8, 32 * cells.PARTS), 0.25)
    rows[:, 7] = torch.arange(1.0, 9.0)
    aligned = Aligned.of("w", torch.zeros(rows.numel(), device=DEVICE), [rows.to(DEVICE)])
    made = []

    def keep(low, high, _, device):
        made.append(cells.Kept(low, high, 2, device))
        return made[-1]

    monkeypatch.setattr(ranks, "Kept", keep)
    statistic = ranks.OrderStatistic(rows.numel() - 3, rows.numel(), low=0.5, expected=8)
    gpu.OnGPU(aligned, gpu_kernels).magnitudes({0: [statistic]})
    assert statistic.settle() == 6.0
    assert sorted(made[0].fills.tolist())[-8:] == [1] * 8


@pytest.mark.parametrize(
    "name", [n if n == "two values" else pytest.param(n, marks=SLOW) for n in ADVERSARIAL]
)
@pytest.mark.parametrize("together", [True, False])
def test_inputs_that_are_hard_to_rank(name, together):
    base = torch.randn(700, generator=torch.Generator().manual_seed(1)).mul(0.02)
    step = ADVERSARIAL[name](700)
    with pieces(5):
        assert_same(base, [base + step, base - 0.5 * step], together=together)


def test_ties_at_a_fence_are_counted():
    base, models = inputs(torch.float32, 1500, 2)
    with pieces(5):
        assert_same(base, models, dare=0.2)


@pytest.mark.parametrize("step", [0.1, 3.0])
def test_large_products_have_the_same_tangents(step):
    assert_same(*inputs(torch.float32, 600, 3, step=step))


@pytest.mark.parametrize("near", [True, False])
def test_quotients_are_right_to_the_last_bit_however_they_are_made(near, monkeypatch):
    base, models = inputs(torch.float32, 2000, 2, step=0.02)
    used = []
    monkeypatch.setattr(gpu, "_near", lambda balances: used.append(balances) or near)
    assert_same(base, models, density=0.9)
    assert used


def test_quotients_near_underflow_are_divided_out():
    base, models = inputs(torch.float32, 600, 2)
    statistics, _ = here(base, models, density=1.0)
    assert not gpu._near(statistics.balances)
    statistics, _ = here(base, models, density=0.2)
    assert gpu._near(statistics.balances)


@pytest.mark.parametrize("begin", [0, 24])
@pytest.mark.parametrize("dare", [1.0, 0.3])
def test_a_part_of_the_merged_task_vector(begin, dare):
    base, models = inputs(torch.float32, 900, 2)
    statistics, _ = here(base, models, dare=dare)
    found = []
    for device in (DEVICE, torch.device("cpu")):
        moved = Aligned.of("w", base.to(device), [model.to(device) for model in models])
        chunks = moved.under(statistics.dare).chunks(Scratch(torch.float32), begin, 801)
        with pytest.MonkeyPatch.context() as patch:
            if found:
                patch.setattr(fused, "of", lambda *_: None)
            found.append(torch.cat([delta(c, statistics, [1.0, -0.25]).cpu() for c in chunks]))
    assert len(found[0]) == 801 - begin
    assert torch.equal(found[0].view(torch.int32), found[1].view(torch.int32))


@pytest.mark.parametrize("density", [0.5, 0.3, 1 - 1e-5, 1 - 2.0**-40])
def test_masks_are_those_of_numpys_generator(density):
    walked = gpu.OnGPU(Aligned.of("w", torch.zeros(1, device=DEVICE), []), gpu_kernels)
    mask = dare.Mask(dare.Dare(density, 5, 2), "w", 30_001)
    found = mask.whole(DEVICE, walked._draw).cpu().numpy()
    bits = [
        numpy.unpackbits(b, bitorder="little")[:30_001] for b in (found, mask.packed(0, 30_001)[0])
    ]
    assert numpy.array_equal(*bits)
    assert mask.whole(DEVICE, None) is mask.whole(DEVICE, None)


def test_a_tie_with_the_upper_half_of_a_density_is_decided_by_the_lower():
    walked = gpu.OnGPU(Aligned.of("w", torch.zeros(1, device=DEVICE), []), gpu_kernels)
    counters, key = 4096, dare.key(5, 2, "w")
    drawn = [dare.draw(key, start, 16 * counters) for start in (0, 1 << 192)]
    upper, lower = int(drawn[0][7]), 1 + int(drawn[1][7])
    expected = (drawn[0] < upper) | ((drawn[0] == upper) & (drawn[1] < lower))
    assert expected[7]
    found = walked._draw(key, upper, lower, 16 * counters, DEVICE).cpu().numpy()
    assert numpy.array_equal(numpy.unpackbits(found, bitorder="little"), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_found_on_the_way(value):
    base, models = inputs(torch.float32, 700, 2)
    models[1][650] = value
    with pytest.raises(NotFiniteError) as raised:
        there(base, models)
    assert raised.value.task == 1


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in the interpreter
def test_a_result_beyond_the_dtype_is_refused():
    base, models = inputs(torch.float16, 700, 2)
    with pytest.raises(OutOfRangeError):
        there(base, models, weights=[1e9, 1e9])


def test_what_float32_cannot_square_is_measured_in_float64():
    tiny = [torch.linspace(-1e-22, 1e-22, 500), torch.linspace(1e-22, -2e-22, 500)]
    statistics, _ = there(torch.zeros(500), tiny)
    assert statistics.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_kernels_are_rehearsed_on_every_way_through_them(kind, monkeypatch):
    def walk(aligned):
        return gpu.OnGPU(aligned, gpu_kernels)

    counted = {cells.Cells: 0, cells.Kept: 0}
    there = ranks.OrderStatistic.there

    def seen(*given):
        found = there(*given)
        counted[type(found)] += 1
        return found

    monkeypatch.setattr(ranks.OrderStatistic, "there", seen)
    with pieces(5):
        rehearsal.walks(walk, DEVICE.type, kind)
    assert all(counted.values())
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_fences", lambda _: (math.inf, math.inf, 0.0))
        with pytest.raises((RuntimeError, ValueError)):
            rehearsal.walks(walk, DEVICE.type, kind)
    monkeypatch.setattr(gpu, "table", lambda *given: numpy.ones_like(formulas.table(*given)))
    with pytest.raises(RuntimeError, match="wrong numbers"):
        rehearsal.walks(walk, DEVICE.type, kind)


def test_a_triton_that_does_not_work_costs_speed_and_says_so(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.undo()
    monkeypatch.setattr(gpu.OnGPU, "_launch", fail)
    fused.compiled.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert fused.compiled("cuda", torch.float32) is None
    fused.compiled.cache_clear()
    (said,) = caplog.messages
    assert "Triton did not give them" in said
    assert "to the same bits" in said


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
class TestOnAGPU:
    """What only a GPU can show."""

    @pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("dare", [1.0, 0.5])
    @pytest.mark.parametrize("together", [True, False])
    def test_large_tensors(self, kind, dare, together, monkeypatch):
        monkeypatch.undo()
        base, models = inputs(kind, 6_000_011, 3)
        moved = Aligned.of("w", base.cuda(), [model.cuda() for model in models])
        assert isinstance(fused.of(moved, torch.float32), gpu.OnGPU)
        assert_same(base, models, dare=dare, together=together)

    @pytest.mark.parametrize("tasks", [gpu.MOST_TASKS, gpu.MOST_TASKS + 1])
    def test_many_tasks(self, tasks, monkeypatch):
        monkeypatch.undo()
        monkeypatch.setenv(fused.SWITCH, "1")
        base, models = inputs(torch.bfloat16, 200_000, tasks)
        moved = Aligned.of("w", base.cuda(), [model.cuda() for model in models])
        assert (fused.of(moved, torch.float32) is None) == (tasks > gpu.MOST_TASKS)
        assert_same(base, models)

    @pytest.mark.parametrize("option", ["--cuda", "--multi-gpu"])
    @pytest.mark.parametrize("parameters", [{}, {"scope": "model"}, {"dare_density": 0.3}], ids=str)
    def test_the_command_gives_the_same_bytes(self, tmp_path, option, parameters):
        paths = save_family(tmp_path / "models", tiny_llama(hidden=256, vocabulary=2048, layers=2))
        config = configuration(paths, parameters={"density": 0.2, **parameters})
        results = [
            tensors(merge(tmp_path / str(number), config, *more)[0])
            for number, more in enumerate(([], [option]))
        ]
        assert results[0].keys() == results[1].keys()
        assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())

    def test_measured_on_the_gpu_and_merged_on_the_cpu(self, monkeypatch):
        monkeypatch.undo()
        base, models = inputs(torch.bfloat16, 300_000, 3)
        recipe = measure.Recipe.of([0.2] * 3, 1e-4, [0.5] * 3, 0, range(3))
        found = [
            measure.measure_tensor(
                Aligned.of("w", base.to(device), [model.to(device) for model in models]), recipe
            )
            for device in ("cuda", "cpu")
        ]
        assert found[0] == found[1]
