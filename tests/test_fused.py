"""Compiled loops and torch's operations give the same bits, whoever does which part."""

import itertools
import math
import os
import subprocess
import sys
import threading

import numpy
import pytest
import torch
from conftest import pieces

from mergekit_pcb.core import dare, fused, kernels, measure, merge, philox, pools, ranks
from mergekit_pcb.core.formulas import ELEMENTARY, MIDDLE, Balance, power_of_two_, tanh_
from mergekit_pcb.core.measure import NotFiniteError, OutOfRangeError, Recipe
from mergekit_pcb.core.ranks import OrderStatistic
from mergekit_pcb.core.vectors import Aligned, Scratch

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def inputs(kind, size, tasks, *, step=1e-3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator).mul(0.02)
    steps = [torch.randn(size, generator=generator).mul(step) for _ in range(tasks)]
    return base.to(kind), [(base + own).to(kind) for own in steps]


def merged(base, tasks, *, way, density=0.2, clip=1e-4, dare=1.0, weights=None, together=True):
    """Statistics and merge with compiled loops (``"1"``) or without (``"0"``)."""
    count = len(tasks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fused.SWITCH, way)
        recipe = Recipe.of([density] * count, clip, [dare] * count, 0, range(count))
        aligned = Aligned.of("w", base, tasks)
        if together:
            statistics = measure.measure_tensor(aligned, recipe)
        else:  # without a look ahead, as a whole model is measured
            dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
            statistics = measure.measure(lambda: [aligned], len(aligned), recipe, dtype)
        return statistics, merge.merge(aligned, statistics, weights or [1.0] * count, 0.9)


def assert_same(base, tasks, **options):
    assert fused.compiled(str(base.device), base.dtype) is not None
    eager, fast = (merged(base, tasks, way=way, **options) for way in "01")
    assert fast[0] == eager[0]
    assert fast[1].dtype == base.dtype
    assert torch.equal(as_bits(fast[1]), as_bits(eager[1]))


def as_bits(tensor):
    """Zeros of both signs are not the same."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


@pytest.fixture(params=[None, 5], ids=["blocks as shipped", "blocks of five"])
def blocks(request):
    with pieces(request.param):
        yield


SLOW = pytest.mark.slow


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [1, 2, pytest.param(3, marks=SLOW), pytest.param(9, marks=SLOW)])
@pytest.mark.parametrize("dare", [1.0, 0.3])
def test_the_bits_are_those_of_torch(kind, tasks, dare):
    base, models = inputs(kind, 1000, tasks)
    assert_same(base, models, dare=dare, weights=[1.0 - 0.3 * task for task in range(tasks)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("size", [131_073, pytest.param(600_011, marks=SLOW)])
def test_the_bits_of_large_tensors_on_several_threads(kind, size, together):
    base, models = inputs(kind, size, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same(base, models, together=together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dare", [1.0, 0.3])
@pytest.mark.parametrize("begin", [0, 24, 13])  # from 13 on no loop is compiled
def test_the_bits_of_a_part_of_the_merged_task_vector(kind, dare, begin, monkeypatch):
    base, models = inputs(kind, 10_000, 3)
    statistics, _ = merged(base, models, way="0", dare=dare)
    aligned = Aligned.of("w", base, models).under(statistics.dare)
    found = []
    for way in "01":
        monkeypatch.setenv(fused.SWITCH, way)
        chunks = aligned.chunks(Scratch(statistics.dtype), begin, 9_001)
        parts = [merge.delta(chunk, statistics, [1.0, 0.5, -0.25]).clone() for chunk in chunks]
        found.append(as_bits(torch.cat(parts)))
    assert len(found[0]) == 9_001 - begin
    assert torch.equal(*found)


def test_a_processor_that_takes_subnormal_numbers_for_zero_is_no_obstacle():
    """As torch.set_flush_denormal asks it to, and libraries with fast arithmetic."""
    torch.manual_seed(0)
    base = (3e-5 * torch.randn(1 << 17)).half()
    models = [(base.float() + 2e-5 * torch.randn(1 << 17)).half() for _ in range(2)]
    wanted = merged(base, models, way="1")
    if not torch.set_flush_denormal(True):
        pytest.skip("a processor that cannot")
    try:
        found = merged(base, models, way="1")
    finally:
        torch.set_flush_denormal(False)
    assert found[0] == wanted[0]
    assert torch.equal(found[1].view(torch.int16), wanted[1].view(torch.int16))


def test_where_no_further_thread_can_be_begun_one_does_it_all(monkeypatch):
    """And nothing stands in line to be done later, when nobody waits for it."""
    base, models = inputs(torch.float32, 600_011, 2)
    wanted = merged(base, models, way="1")
    start, begun = threading.Thread.start, []

    def one_more(thread):
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    before = torch.get_num_threads()
    pools.pool.cache_clear()
    torch.set_num_threads(4)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", one_more)
            found = merged(base, models, way="1")
            begun.clear()
            with pytest.raises(RuntimeError, match="new thread"):
                pools.pool("walks", 2)
    finally:
        torch.set_num_threads(before)
        pools.pool.cache_clear()
    assert torch.equal(found[1], wanted[1])


def test_a_sample_is_looked_at_without_torchs_other_threads(monkeypatch):
    """They would go on spinning while the walk begins."""
    before, seen = torch.get_num_threads(), []
    sampled = measure._sampled

    def look(*given):
        seen.append(torch.get_num_threads())
        return sampled(*given)

    def fail(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(measure, "_sampled", look)
    base, models = inputs(torch.float32, 600_011, 3)
    with torch.inference_mode():
        inside = [torch.clone(tensor) for tensor in (base, *models)]
    torch.set_num_threads(3)
    try:
        found = [merged(base, models, way="1")]
        monkeypatch.setattr(pools, "SHARED_ELEMENTS", 1 << 6)
        found.append(merged(base, models, way="1"))
        with torch.inference_mode():
            found.append(merged(inside[0], inside[1:], way="1"))
        monkeypatch.setattr(pools, "of", fail)
        found.append(merged(base, models, way="1"))
    finally:
        torch.set_num_threads(before)
    assert seen == [3, 1, 1, 3]
    assert all(torch.equal(one[1], found[0][1]) for one in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dare", [1.0, 0.3])
def test_large_products_have_the_same_tangents(kind, dare):
    """Where all are large, where some are, and where some are in between."""
    base, models = inputs(kind, 50_000, 3, step=3.0)
    assert_same(base, models, dare=dare)
    assert_same(*inputs(kind, 50_000, 3, step=0.1), dare=dare)
    base, models = inputs(kind, 50_000, 3)
    for place in (0, 20_001, 20_002, 49_999):
        models[1][place] += 4
    assert_same(base, models, dare=dare)


def test_compiled_code_draws_the_masks_of_numpys_generator():
    philox_key = dare.key(3, 1, "model.layers.0.mlp.up_proj.weight")
    for counter, count, fence in (
        (0, 1, 0),
        (7, 1000, 65535),
        (1 << 40, 4096, 30_000),
        ((1 << 64) - 1, 300, 30_000),  # its upper half changes at once,
        ((1 << 64) - 20, 1000, 30_000),  # or later
        ((5 << 64) - 16, 1000, 30_000),
    ):
        for found, expected in zip(
            philox.against(philox_key, counter, count, fence),
            dare.against(philox_key, counter, count, fence),
            strict=True,
        ):
            bits = numpy.unpackbits(found, count=count, bitorder="little")
            assert numpy.array_equal(
                bits, numpy.unpackbits(expected, count=count, bitorder="little")
            )


@pytest.mark.parametrize("density", [0.5, 0.3, 1e-3, 1 - 1e-5, 1 - 2.0**-40, 2.0**-29])
def test_masks_do_not_depend_on_who_compares_words(density, monkeypatch):
    drawn = []
    for compare in (philox.against, dare.against):
        monkeypatch.setattr(dare, "compare", compare)
        mask = dare.Mask(dare.Dare(density, 5, 2), "w", 3_000_001)
        drawn.append(numpy.unpackbits(mask.packed(0, 3_000_001)[0], bitorder="little")[:3_000_001])
    assert numpy.array_equal(*drawn)


ADVERSARIAL = {
    "all the same step": lambda size: torch.full((size,), 0.01),
    "two values": lambda size: torch.arange(size) % 2 * 0.01,
    "sorted": lambda size: torch.linspace(-0.01, 0.01, size),
    "one outlier": lambda size: torch.zeros(size).index_fill(0, torch.tensor(3), 5.0),
    "nothing changed": torch.zeros,
    "negative zeros": lambda size: -torch.zeros(size),
    "subnormal": lambda size: torch.linspace(-1, 1, size) * 1e-39,
}


@pytest.mark.parametrize("together", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize(
    "kind", [torch.bfloat16, *(pytest.param(k, marks=SLOW) for k in KINDS if k != torch.bfloat16)]
)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_bits_of_inputs_that_are_hard_to_rank(name, kind, together):
    size = 150_000
    base = torch.randn(size, generator=torch.Generator().manual_seed(1)).mul(0.02).to(kind)
    step = ADVERSARIAL[name](size)
    assert_same(base, [(base + step).to(kind), (base - 0.5 * step).to(kind)], together=together)


def test_opposite_tasks_have_scores_below_zero_alone():
    """The peak of a task all of whose scores are negative is looked for in another way."""
    base, (near,) = inputs(torch.float32, 5000, 1)
    far = base - 2 * (near - base)
    assert_same(base, [near, far])
    statistics, _ = merged(base, [near, far], way="1")
    assert statistics.balances[0].peak <= 0


@pytest.mark.parametrize("where", ["base", "task"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_are_found_on_the_way(kind, value, where):
    base, models = inputs(kind, 70_000, 2)
    (base if where == "base" else models[1])[66_001] = value
    with pytest.raises(NotFiniteError) as raised:
        merged(base, models, way="1")
    assert raised.value.task == (None if where == "base" else 1)


@pytest.mark.parametrize("way", ["0", "1"])
def test_intervals_too_narrow_for_float64_are_refused(way):
    first, second = torch.randn(2, 2000, dtype=torch.float64) * 1e-309
    first[7] = 1.0
    with pytest.raises(OutOfRangeError) as raised:
        merged(torch.zeros(2000, dtype=torch.float64), [first, second], way=way, clip=0.01)
    assert raised.value.tensor == "w"


@pytest.mark.parametrize("precision", ["f4", "f8"])
def test_ranks_are_looked_for_by_what_was_tried(precision, monkeypatch):
    """Where it was not, nothing is compiled in the middle of a merge."""
    looked = []
    monkeypatch.setattr(fused, "_looks", {numpy.dtype("f8"): lambda *_, **__: looked.append(1)})
    values = numpy.linspace(0, 1, 100, dtype=precision)
    found = fused._look(values, 0.25, 0.75, tied=False)
    assert looked == [1] * (precision == "f8")
    assert (found is None) == (precision == "f8")


def test_what_float32_cannot_square_is_measured_in_float64():
    base = torch.zeros(5000)
    tiny = [torch.linspace(-1e-22, 1e-22, 5000), torch.linspace(1e-22, -2e-22, 5000)]
    assert_same(base, tiny)
    assert merged(base, tiny, way="1")[0].dtype == torch.float64


def test_a_result_beyond_the_dtype_is_refused_by_both():
    base, models = inputs(torch.float16, 5000, 2)
    for way in "01":
        with pytest.raises(OutOfRangeError):
            merged(base, models, way=way, weights=[1e9, 1e9])


def exactly(function, values):
    """By numbers that are longer than those of torch."""
    return function(values.numpy().astype(numpy.longdouble))


def ulps(found, exact):
    """How many units in the last place the farthest is away."""
    spacing = numpy.spacing(abs(exact).astype(found.numpy().dtype))
    return float((abs(found.numpy() - exact) / spacing).max())


@pytest.mark.parametrize("precision", ELEMENTARY)
def test_powers_of_two_are_exact_to_a_unit_in_the_last_place(precision):
    least = ELEMENTARY[precision].least_exponent
    exponents = torch.linspace(least, 0, 1_000_003, dtype=precision)
    scratch = torch.empty_like(exponents), torch.empty_like(exponents)
    found = power_of_two_(exponents.clone(), scratch=scratch)
    exact = exactly(numpy.exp2, exponents)
    assert ulps(found, exact) < 1.25
    most, coefficients = {torch.float32: (1.05e-7, 7), torch.float64: (1.95e-16, 12)}[precision]
    assert float((abs(found.numpy() - exact) / exact).max()) < most
    assert len(ELEMENTARY[precision].power_of_two) == coefficients
    below = torch.tensor([2 * least, least, 0.0], dtype=precision)
    scratch = torch.empty_like(below), torch.empty_like(below)
    assert power_of_two_(below, scratch=scratch).tolist() == [2.0**least, 2.0**least, 1.0]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("kind", "size", "dare", "together"),
    [
        *itertools.product((torch.bfloat16, torch.float64), [600], [1.0, 0.3], [True, False]),
        # Many blocks: everything with one kind, and every kind with one of the rest.
        *(
            pytest.param(kind, 3000, dare, together, marks=SLOW)
            for kind, dare, together in itertools.product(KINDS, [1.0, 0.3], [True, False])
            if kind == torch.float32 or (dare, together) == (0.3, True)
        ),
    ],
)
def test_ranks_as_accelerators_find_them_give_the_same_bits(
    kind, size, dare, together, monkeypatch
):
    base, models = inputs(kind, size, 3)
    expected = merged(base, models, way="0", dare=dare, together=together)
    monkeypatch.setattr(ranks, "HOST", "another device")
    found = merged(base, models, way="0", dare=dare, together=together)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def test_every_float16_is_read_as_torch_reads_it():
    raw = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    found, zeros = numpy.empty((1, len(raw)), "f4"), torch.zeros_like(raw).numpy()
    addresses, none = numpy.array([raw.data_ptr()]), numpy.zeros((1, 0), "u1")
    kernels.task_vectors(zeros, addresses, none, numpy.zeros(1, "f4"), 0, 0, found, len(raw))
    expected = raw.view(torch.float16).float()
    assert torch.equal(torch.from_numpy(found[0]).nan_to_num(9e9), expected.nan_to_num(9e9))


@pytest.mark.parametrize(
    ("kind", "written", "largest"), [(torch.bfloat16, "u2", math.inf), (torch.float16, "i2", 65504)]
)
def test_every_float32_that_matters_is_rounded_as_torch_rounds_it(kind, written, largest):
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 20,), dtype=torch.int32)
    near = torch.randn(1 << 20) * 2.0 ** torch.randint(-30, 17, (1 << 20,))
    edges = torch.tensor([0.0, -0.0, 2.0**-14, 2.0**-24, 2.0**-25, 65504.0, -65504.0])
    # Halfway between two: the even one is due.
    halves = torch.arange(0, 2048).float().add(0.5) * 2.0**-24
    values = torch.cat((bits.view(torch.float32), near, edges, halves, -halves))
    values = values[(values.isfinite()) & (values.abs() <= largest)].contiguous()
    found = numpy.empty(len(values), written)
    kernels.store(values.numpy(), values.numpy().view("i4"), found, len(values))
    assert torch.equal(torch.from_numpy(found.view("i2")), values.to(kind).view(torch.int16))


@pytest.mark.parametrize("precision", ELEMENTARY)
def test_tangents_are_exact_to_two_units_in_the_last_place(precision):
    small, many = ELEMENTARY[precision].small, {"steps": 1_000_003, "dtype": precision}
    sizes = torch.cat((torch.logspace(-30, 1.5, **many), torch.linspace(0, 20, **many)))
    edges = torch.tensor([0.0, small, MIDDLE, math.inf, 3e38], dtype=precision)
    z = torch.cat((sizes, -sizes, edges))
    found = tanh_(z.clone(), scratch=torch.empty_like(z))
    assert ulps(found, exactly(numpy.tanh, z)) < 2
    for largest in (small, MIDDLE):  # whatever stands beside it
        few = z.abs() <= largest
        alone = tanh_(z[few], scratch=torch.empty(int(few.sum()), dtype=precision))
        assert torch.equal(alone, found[few])


def test_a_statistic_takes_counts_between_older_fences():
    """A thread that saw values between wider fences gives them in after these were drawn closer."""
    values = torch.arange(1000.0)
    statistic = OrderStatistic(500, 1000, low=-math.inf, high=math.inf)
    statistic.low, statistic.high = 400.0, 600.0
    for part in values.split(250):
        seen = (-math.inf, math.inf)
        statistic.absorb(len(part), seen, 0, 0, part.numpy().copy())
    assert statistic.settle() == 500.0


@pytest.mark.usefixtures("as_given")
def test_an_error_in_a_thread_ends_the_walk(monkeypatch):
    base, models = inputs(torch.float32, 400_000, 2)
    monkeypatch.setattr(fused, "LARGEST_PIECE", 1 << 13)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    own = threading.current_thread()
    found = fused.Fused(Aligned.of("w", base, models), fused.compiled("cpu", torch.float32))
    real = found._inputs

    def broken(*given):
        if threading.current_thread() is not own:
            raise MemoryError("no room")
        return real(*given)

    monkeypatch.setattr(found, "_inputs", broken)

    def walk():  # a thread that starts late may find nothing left to do
        for _ in range(20):
            found.scores({}, [Balance(0.0, 1.0, 0.0, 1.0)] * 2)

    with pytest.raises(MemoryError, match="no room"):
        walk()


BROKEN = {
    "an import that fails": "sys.modules['numba'] = None",
    "a folder that cannot be written": (
        "import numba.core.caching as c; c.CacheImpl._locator_classes = []"
    ),
    "wrong numbers": (
        "from mergekit_pcb.core import walks; walks.walk_magnitudes = lambda *a: (a[6], 0x7F800000)"
    ),
    "wrong masks": ("from mergekit_pcb.core import philox; philox.compare = lambda *a: None"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_engine_is_said_once_and_merges_go_on(name):
    program = f"""
import sys, logging
logging.basicConfig()
{BROKEN[name]}
import torch
from mergekit.merge_methods import merge_tensors
import mergekit_pcb
torch.manual_seed(0)
tensors = [torch.randn(100, 50) for _ in range(3)]
for _ in range(2):
    out = merge_tensors(tensors, "pcb", base_index=0, parameters={{"density": 0.3}})
print(out.double().sum().item())
"""
    said = []
    for way in ("1", "0"):
        environment = {**os.environ, fused.SWITCH: way}
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        said.append((done.stdout, done.stderr.count("merging without compiled loops")))
    assert said[0] == (said[1][0], 1)
    assert said[1][1] == 0


def test_small_tensors_do_not_load_the_engine():
    program = """
import sys, torch
from mergekit.merge_methods import merge_tensors
import mergekit_pcb
merge_tensors([torch.randn(64, 64) for _ in range(3)], "pcb", base_index=0)
assert "numba" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name != fused.SWITCH}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
