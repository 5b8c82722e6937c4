"""`refine: solve` and `spectrum`: the mathematics, against float64, an inverse and an SVD."""

import math
import threading
import time

import pytest
import torch
from conftest import pieces
from reference import dare_factors, evened, refined
from reference import pcb as reference

from mergekit_pcb.core import fused, matrices, pools, products, refine, solve, spectrum, vectors
from mergekit_pcb.core.matrices import Layout, Matrix
from mergekit_pcb.core.measure import OutOfRangeError, Recipe, measure_tensor
from mergekit_pcb.core.vectors import Aligned

#: Of the merged task vector's norm; what solve.py and spectrum.py promise.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 4e-4}
LAYOUTS = {
    "square": Layout(1, 24, 24),
    "wide": Layout(1, 10, 40),
    "tall": Layout(1, 40, 10),
    "transposed": Layout(1, 24, 16, True),
    "transposed and wide": Layout(1, 8, 40, True),
    "experts": Layout(3, 12, 8),
    "experts, transposed": Layout(3, 12, 8, True),
    "one row": Layout(1, 1, 30),
    "one column": Layout(1, 30, 1),
    "one element": Layout(1, 1, 1),
}


def shape_of(layout):
    one = (layout.columns, layout.rows) if layout.transposed else (layout.rows, layout.columns)
    return (layout.count, *one)


def models(layout, tasks=3, *, kind="full", dtype=torch.float32, seed=0):
    """A base and its fine-tunes: full, of rank one or two, or with a steeply falling spectrum."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = shape_of(layout)
    base = 0.02 * drawn(*shape)
    found = [base]
    for _ in range(tasks):
        if kind.startswith("rank"):
            rank = int(kind[-1])
            step = drawn(*shape[:2], rank) @ drawn(shape[0], rank, shape[2])
        else:
            step = drawn(*shape)
            if kind == "falling":
                left, values, right = torch.linalg.svd(step, full_matrices=False)
                values = torch.arange(1, values.shape[-1] + 1, dtype=torch.float64) ** -1.5
                step = (left * values) @ right
        found.append(base + 1e-2 * step)
    return [tensor.to(dtype) for tensor in found]


def prepared(tensors, *, density=0.2, dare=1.0, name="a tensor"):
    tasks = len(tensors) - 1
    aligned = Aligned.of(name, tensors[0], tensors[1:])
    recipe = Recipe.of([density] * tasks, 1e-4, [dare] * tasks, 0, range(tasks))
    return aligned, measure_tensor(aligned, recipe)


def expected(tensors, layout, *, weights=None, density=0.2, factors=None, lam=1.0, **chosen):
    """The reference for every matrix of a tensor, put together again."""
    tensors = [tensor.double() for tensor in tensors]
    weights = weights or [1.0] * (len(tensors) - 1)
    whole = reference(tensors[0], tensors[1:], density=density, weight=weights, dare=factors)
    own = None if factors is None else factors.view(-1, *tensors[0].shape)
    found = []
    for number in range(layout.count):
        rows = [t[number].T if layout.transposed else t[number] for t in (*tensors, whole)]
        masks = (
            None if own is None else [m[number].T if layout.transposed else m[number] for m in own]
        )
        prior = rows[-1] - rows[0]
        made = refined(rows[0], rows[1:-1], prior, weights=weights, dare=masks, lam=lam, **chosen)
        found.append(made.T if layout.transposed else made)
    return torch.stack(found)


def assert_close(merged, wanted, base, tolerance):
    """Compare in the norm of the delta; storage rounds too."""
    merged, wanted, base = merged.cpu(), wanted.cpu(), base.cpu()
    delta = (wanted - base.double()).norm()
    rounding = torch.finfo(base.dtype).eps * base.double().norm()
    assert (merged.double() - wanted).norm() <= tolerance * delta + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["full", "rank1", "rank2", "falling"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_an_inverse_and_singular_values(layout, kind, dtype):
    tensors, weights = models(layout, kind=kind, dtype=dtype), [1.0, 0.5, 1.5]
    aligned, statistics = prepared(tensors)
    for anchor, exponent in ((0.1, None), (0.1, 1.0), (None, None), (None, 0.0), (1.0, 0.5)):
        own = refine.Refinement(layout, anchor, exponent)
        merged = refine.merge(aligned, statistics, weights, 1.3, own).view(tensors[0].shape)
        assert merged.dtype == dtype
        wanted = expected(
            tensors, layout, weights=weights, anchor=anchor, spectrum=exponent, lam=1.3
        )
        assert_close(merged, wanted, tensors[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_widened_first(dtype):
    layout = LAYOUTS["tall"]
    tensors = models(layout, dtype=dtype)
    aligned, statistics = prepared(tensors)
    merged = refine.merge(aligned, statistics, [1.0] * 3, 1.0, refine.Refinement(layout, 0.1, None))
    assert merged.dtype == dtype
    wanted = expected(tensors, layout)
    assert_close(merged.view(tensors[0].shape), wanted, tensors[0], TOLERANCE[torch.float32])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_contributions_are_parts_of_the_sum(layout):
    tensors, weights = models(layout), [1.0, 0.5, 1.5]
    aligned, statistics = prepared(tensors)
    own = refine.Refinement(layout, 0.1, None)
    parts, step = refine.contributions(aligned, statistics, own)
    summed = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    made = summed if step is None else refine.apply(step, summed, "a tensor")
    merged = refine.merge(aligned, statistics, weights, 1.0, own)
    delta = (merged - aligned.base).double()
    rounding = torch.finfo(torch.float32).eps * aligned.base.double().norm()
    assert (made - delta).norm() <= 1e-4 * delta.norm() + rounding


def test_dare_thins_the_task_vectors_that_enter():
    layout = Layout(2, 12, 9)
    tensors = models(layout)
    aligned, statistics = prepared(tensors, dare=0.5)
    merged = refine.merge(aligned, statistics, [1.0] * 3, 1.0, refine.Refinement(layout, 0.1, None))
    count = tensors[0].numel()
    factors = torch.stack([dare_factors(0, task, "a tensor", count, 0.5) for task in range(3)])
    wanted = expected(tensors, layout, factors=factors)
    assert_close(merged.view(tensors[0].shape), wanted, tensors[0], 1e-4)


def bits(layout, tensors, **how):
    aligned, statistics = prepared(tensors, **how)
    merged = refine.merge(aligned, statistics, [1.0] * 3, 1.0, refine.Refinement(layout, 0.1, None))
    parts, step = refine.contributions(aligned, statistics, refine.Refinement(layout, None, 0.5))
    return merged, *parts, step


def same(one, other):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dare", [1.0, 0.5])
def test_bits_do_not_depend_on_chunks(layout, dare):
    tensors = models(layout)
    whole = bits(layout, tensors, dare=dare)
    with pieces(5):
        assert same(bits(layout, tensors, dare=dare), whole)


@pytest.mark.parametrize(
    "layout",
    [Layout(1, 700, 500), Layout(1, 200, 600), Layout(2, 90, 300, True), Layout(1, 64, 64)],
)
@pytest.mark.parametrize("kind", ["full", "rank2"])
@pytest.mark.parametrize("exponent", [1.0, None, 0.0])
def test_a_refined_merge_does_not_depend_on_threads(layout, kind, exponent):
    tensors = models(layout, kind=kind)
    aligned, statistics = prepared(tensors)
    own, before = refine.Refinement(layout, 0.1, exponent), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(refine.merge(aligned, statistics, [1.0] * 3, 1.0, own))
            found.append(
                torch.tensor([matrices.norms(Matrix(aligned, layout, 0, torch.float32)).total])
            )
    finally:
        torch.set_num_threads(before)
    for merged, total in zip(found[2::2], found[3::2], strict=True):
        assert torch.equal(merged, found[0])
        assert torch.equal(total, found[1])


def test_a_product_is_made_by_threads_of_their_own():
    seen, before = [], torch.get_num_threads()

    def look():
        seen.append(torch.get_num_threads())

    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            seen.clear()
            products._do(torch.device("cpu"), [look] * 9)
            assert seen == [1] * 9
            assert torch.get_num_threads() == threads
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            assert seen[-1] == threads
    finally:
        torch.set_num_threads(before)


def test_a_device_gets_products_by_whole_rows(monkeypatch):
    layout = Layout(1, 700, 600)
    tensors = models(layout)
    aligned, statistics = prepared(tensors)
    own = refine.Refinement(layout, 0.1, 1.0)
    merged = refine.merge(aligned, statistics, [1.0] * 3, 1.0, own)
    monkeypatch.setattr(products, "HOST", "none")
    monkeypatch.setattr(pools, "of", None)
    at_once = refine.merge(aligned, statistics, [1.0] * 3, 1.0, own)
    assert_close(at_once, merged, aligned.base, 1e-5)


def precisions():
    matmul = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return tuple(one.fp32_precision for one in matmul)


def by_torchs_older_way(asked):
    torch.set_float32_matmul_precision(asked)
    return lambda: torch.set_float32_matmul_precision("highest")


def for_gpus_alone(_):
    torch.backends.cuda.matmul.allow_tf32 = True
    return lambda: torch.set_float32_matmul_precision("highest")


def by_library(asked):
    libraries = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    for one in libraries[asked == "bf16" :]:
        one.fp32_precision = asked

    def undo():
        for one in libraries:
            one.fp32_precision = "none"

    return undo


@pytest.mark.parametrize("host", ["cpu", "none"])
@pytest.mark.parametrize(
    ("ask", "asked"),
    [
        (by_torchs_older_way, "highest"),
        (by_torchs_older_way, "high"),
        (by_torchs_older_way, "medium"),
        (for_gpus_alone, ""),
        (by_library, "tf32"),
        (by_library, "bf16"),
    ],
)
def test_products_are_float32s_whatever_torch_is_told(monkeypatch, ask, asked, host):
    monkeypatch.setattr(products, "HOST", host)
    seen = []

    def look(_=None):
        seen.extend(precisions())

    undo = ask(asked)
    try:
        before = precisions()
        products._do(torch.device("cpu"), [look])
        products.decomposed(look, torch.eye(2))
        assert len(seen) == 4
        assert set(seen) <= {"none", "ieee"}
        assert precisions() == before
        with pytest.raises(ValueError, match="broken"), products._in_float32:
            raise ValueError("broken")
        assert precisions() == before
        # A thread that comes while another is at it stays undisturbed when that one goes.
        first, second = (products._in_float32 for _ in range(2))
        first.__enter__()
        second.__enter__()
        first.__exit__()
        look()
        second.__exit__()
        assert set(seen) <= {"none", "ieee"}
        assert precisions() == before
    finally:
        undo()


def test_a_refined_merge_is_the_same_whatever_torch_is_told():
    layout = Layout(1, 300, 260)
    aligned, statistics = prepared(models(layout))
    own = refine.Refinement(layout, 0.1, 0.5)
    found = []
    for asked in ("highest", "medium"):
        undo = by_torchs_older_way(asked)
        try:
            found.append(refine.merge(aligned, statistics, [1.0] * 3, 1.0, own))
        finally:
            undo()
    assert torch.equal(*found)


def test_threads_that_ask_together_share_a_pool_and_leave_torch_as_it_was():
    """What torch is told in one thread counts for those that have not begun, until told again."""
    count, seen = torch.get_num_threads(), []
    pools._forget()
    together = threading.Barrier(8)

    def look():
        seen.append(torch.get_num_threads())

    def ask():
        look()
        together.wait()
        products.product(torch.ones(2, 2), torch.ones(2, 2))
        look()

    for tasks in ([ask] * 8, [look]):
        threads = [threading.Thread(target=task) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len([each for _, each in pools._begun if each == 1]) == 1
    assert seen == [count] * 17
    assert torch.get_num_threads() == count


def test_a_thread_that_cannot_begin_leaves_none_waiting(monkeypatch):
    pools._forget()
    begin, begun = threading.Thread.start, []

    def start(thread):
        begun.append(thread)
        if len(begun) == 3:
            raise RuntimeError("can't start new thread")
        begin(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="new thread"):
            pools.of(2, 1)
    for thread in begun[:2]:
        thread.join(60)
        assert not thread.is_alive()
    assert pools.of(2, 1).submit(torch.get_num_threads).result() == 1


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_caller_s_mode_changes_nothing(mode):
    layout = LAYOUTS["square"]
    aligned, statistics = prepared(models(layout))
    own = refine.Refinement(layout, 0.1, 0.5)
    vectors._thread.__dict__.clear()
    with mode():
        merged = refine.merge(aligned, statistics, [1.0] * 3, 1.0, own)
    assert torch.equal(refine.merge(aligned, statistics, [1.0] * 3, 1.0, own), merged)


def test_a_gradient_is_the_same_under_autocast():
    matrix = torch.randn(6, 4, requires_grad=True)
    weights = torch.randn(6, 4)
    (plain,) = torch.autograd.grad((spectrum.even(matrix, 0.5) * weights).sum(), matrix)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad((spectrum.even(matrix, 0.5) * weights).sum(), matrix)
    assert torch.equal(found, plain)


def test_a_job_that_fails_is_told_when_all_have_ended():
    ended = []

    def fails():
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        products._do(torch.device("cpu"), [fails, *[lambda: ended.append(1)] * 5])
    assert len(ended) == 5


def test_what_was_stopped_goes_on_no_more():
    begun = []

    def jobs():
        for number in range(100):
            yield lambda number=number: (begun.append(number), time.sleep(0.01))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        products._do(torch.device("cpu"), jobs())
    found = len(begun)
    assert found < 100
    time.sleep(0.1)
    assert len(begun) == found


def test_a_product_is_not_differentiated():
    rows = torch.ones(3, 2, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(products.product(rows, rows.T), 2 * torch.ones(3, 3))


def test_nothing_is_a_product_of_nothing(monkeypatch):
    for host in ("cpu", "none"):
        monkeypatch.setattr(products, "HOST", host)
        assert products.product(torch.zeros(3, 2), torch.zeros(2, 0)).shape == (3, 0)
        assert products.product(torch.zeros(0, 2), torch.zeros(2, 3)).shape == (0, 3)


def test_a_task_that_changed_nothing_takes_no_part():
    layout = LAYOUTS["square"]
    tensors = models(layout, 2)
    with_it = [*tensors, tensors[0].clone()]
    own = refine.Refinement(layout, 0.1, None)
    aligned, statistics = prepared(with_it)
    merged = refine.merge(aligned, statistics, [1.0] * 3, 1.0, own).view(tensors[0].shape)
    assert_close(merged, expected(with_it, layout), tensors[0], 1e-4)
    norms = matrices.norms(Matrix(aligned, layout, 0, torch.float32))
    assert norms.changed == [0, 1]
    alone, _ = prepared(tensors)
    assert norms.agreement == matrices.norms(Matrix(alone, layout, 0, torch.float32)).agreement


def test_unchanged_matrices_keep_the_bits_of_the_base():
    layout = Layout(3, 6, 5)
    tensors = models(layout)
    for tensor in tensors[1:]:
        tensor[1] = tensors[0][1]
    aligned, statistics = prepared(tensors)
    merged = refine.merge(aligned, statistics, [1.0] * 3, 1.0, refine.Refinement(layout, 0.1, None))
    merged = merged.view(tensors[0].shape).cpu()
    assert torch.equal(merged[1], tensors[0][1])
    assert not torch.equal(merged[0], tensors[0][0])
    assert torch.equal(
        refine.merge(aligned, statistics, [1.0] * 3, 0.0, refine.Refinement(layout, 0.1, None)),
        aligned.base,
    )


def test_one_task_is_its_own_closed_form():
    layout = LAYOUTS["wide"]
    tensors = models(layout, 1)
    aligned, statistics = prepared(tensors)
    merged = refine.merge(aligned, statistics, [0.7], 1.0, refine.Refinement(layout, 0.1, None))
    base, tau = tensors[0][0].double(), tensors[1][0].double() - tensors[0][0].double()
    prior = reference(tensors[0], tensors[1:], density=0.2, weight=0.7)[0] - base
    gram = tau.T @ tau / tau.square().sum()
    ridge = 0.1 / layout.columns
    wanted = (0.7 * tau @ gram + ridge * prior) @ torch.linalg.inv(
        gram + ridge * torch.eye(layout.columns)
    )
    assert_close(merged.view(base.shape), base + wanted, tensors[0][0], 1e-4)


@pytest.mark.parametrize(
    ("vectors", "agreement"),
    [
        ([[1.0, 0.0], [1.0, 0.0]], 1.0),
        ([[1.0, 0.0], [0.0, 1.0]], 1 / math.sqrt(2)),
        ([[1.0, 0.0], [-1.0, 0.0]], 0.0),
        ([[3.0, 0.0], [0.0, 0.0]], 1.0),
        ([[3.0, 0.0], [0.0, 4.0]], 1 / math.sqrt(2)),
        ([[1e-30, 0.0], [0.0, 1e-30]], 1 / math.sqrt(2)),
        ([[1e30, 0.0], [1e30, 0.0]], 1.0),
        ([[0.0, 0.0], [0.0, 0.0]], 1.0),
    ],
)
def test_how_far_tasks_agree(vectors, agreement):
    rows = [torch.tensor([vector], dtype=torch.float32) for vector in vectors]
    aligned = Aligned.of("a tensor", torch.zeros(1, 2), rows)
    norms = matrices.norms(Matrix(aligned, Layout(1, 1, 2), 0, torch.float32))
    assert norms.agreement == pytest.approx(agreement, rel=1e-6)


def spectra():
    """Matrices that are hard to decompose."""
    generator = torch.Generator().manual_seed(1)

    def rotated(values, rows, columns):
        left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator).double())
        right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator).double())
        return (left * torch.tensor(values, dtype=torch.float64)) @ right.T

    falling = torch.logspace(0, -4.5, 60).tolist()
    yield "clustered", rotated([1.0] * 20 + [0.5] * 20 + [0.5 + 1e-6] * 20, 60, 60)
    yield "falling to 3e-5", rotated(falling, 60, 60)
    yield "falling, wide", rotated(falling, 60, 200)
    yield "falling, tall", rotated(falling, 200, 60)
    yield "rank one", rotated([2.0], 50, 70)
    yield "rank five", rotated([5.0, 4.0, 3.0, 2.0, 1.0], 50, 70)
    yield "two far apart", rotated([1.0, 1e-3], 40, 30)
    yield "zero", torch.zeros(20, 30).double()
    yield "tiny", rotated(falling, 60, 60) * 1e-30
    yield "huge", rotated(falling, 60, 60) * 1e30
    yield "diagonal", torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])).double()


#: What spectrum.py says it is good for in float32, by exponent; in float64 it is 1e-6.
WITHIN = {0.0: 5e-3, 0.3: 1e-3, 0.5: 3e-4, 0.9: 1e-5}


@pytest.mark.parametrize("exponent", WITHIN)
@pytest.mark.parametrize("name", dict(spectra()))
def test_a_spectrum_is_evened_as_by_a_decomposition(name, exponent):
    matrix = dict(spectra())[name]
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, WITHIN[exponent])):
        found = spectrum.even(matrix.to(dtype), exponent)
        wanted = evened(matrix.to(dtype), exponent)
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()
        assert float(found.double().norm()) == pytest.approx(float(matrix.norm()), rel=1e-4)


def test_an_exponent_of_one_touches_nothing():
    matrix = torch.randn(9, 7)
    assert torch.equal(spectrum.even(matrix, 1), matrix)


def test_a_null_space_is_not_filled_with_noise():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(300, 4, generator=generator), torch.randn(4, 200, generator=generator)
    matrix = left @ right
    for exponent in (0.0, 0.5):
        values = torch.linalg.svdvals(spectrum.even(matrix, exponent).double())
        assert values[4] <= 0.05 * values[3]


def test_float64_is_taken_where_float32_does_not_suffice(monkeypatch):
    layout = Layout(1, 300, 300)
    tensors = models(layout, kind="rank1")
    aligned, statistics = prepared(tensors)
    own = refine.Refinement(layout, 0.01, 1.0)
    wanted = expected(tensors, layout, anchor=0.01, spectrum=1.0)
    merged = refine.merge(aligned, statistics, [1.0] * 3, 1.0, own).view(tensors[0].shape)
    assert_close(merged, wanted, tensors[0], 1e-5)
    monkeypatch.setattr(solve, "LARGEST_CONDITION", math.inf)
    merged = refine.merge(aligned, statistics, [1.0] * 3, 1.0, own).view(tensors[0].shape)
    with pytest.raises(AssertionError):
        assert_close(merged, wanted, tensors[0], 1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (120, 80), (30, 90)])
def test_it_holds_no_more_than_it_says(rows, columns, monkeypatch):
    """Inputs apart, chunks and blocks being whole."""
    layout = Layout(1, rows, columns)
    tensors = models(layout, 2)
    aligned, statistics = prepared(tensors)
    norms = matrices.norms(Matrix(aligned, layout, 0, torch.float32))
    vectors._thread.__dict__.clear()  # buffers that another test left are longer
    monkeypatch.setattr(products, "_do", lambda _, jobs: [job() for job in jobs])  # in sight
    own = Matrix(aligned, layout, 0, torch.float32)
    most = most_alive(lambda: solve.solve(own, statistics, [[1.0, 1.0]], 0.1, norms))
    # The result, and the buffers of a chunk, which are as long as the matrix here; both are
    # counted by the caller. torch's operations have two more of these than compiled loops.
    buffers = 9 if fused.of(aligned, torch.float32) is not None else 11
    held = buffers * rows * columns + 2 * min(products.FACTOR_BLOCK, columns) ** 2
    assert most <= solve.working_elements(layout) + held


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (600, 400), (400, 600), (300, 900)])
def test_evening_holds_no_more_than_it_says(rows, columns, monkeypatch):
    monkeypatch.setattr(products, "_do", lambda _, jobs: [job() for job in jobs])
    monkeypatch.setattr(spectrum, "decomposed", lambda function, matrix: function(matrix))
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, columns, generator=generator)
    said = spectrum.working_elements(rows, columns)
    # The argument is written to, and so is seen.
    held = most_alive(lambda: spectrum.even_(matrix, 0.5)) - matrix.numel()
    assert held <= said
    # Where most directions are weak, it takes more; LAPACK's own copies are out of sight.
    matrix.mul_(1e-4).addr_(torch.ones(rows), torch.ones(columns))
    held = most_alive(lambda: spectrum.even_(matrix, 0.5)) - matrix.numel()
    assert 0.6 * said <= held <= said


@pytest.mark.parametrize("anchor", [0.1, 1e-3, 1e-5])
def test_rows_that_cancel_one_another_are_solved_as_well(anchor):
    """A head of two classes that began at zero: its rows are opposite, and so is their sum."""
    torch.manual_seed(0)
    layout = Layout(1, 2, 768)
    rows = 1e-2 * torch.randn(2, 768)
    tensors = [torch.zeros(2, 768), *(torch.stack([row, -row]) for row in rows)]
    aligned, statistics = prepared(tensors)
    own = Matrix(aligned, layout, 0, torch.float32)
    norms = matrices.norms(own)
    (found,) = solve.solve(own, statistics, [[1.0, 1.0]], anchor, norms)
    wide = Matrix(aligned, layout, 0, torch.float64)
    wanted = solve._solved(wide, statistics, [[1.0, 1.0]], anchor, norms, torch.float64)[0]
    assert (found.double() - wanted).norm() <= 4e-4 * sum(norms.tasks)


def test_a_norm_beyond_float32_is_no_obstacle_to_a_spectrum():
    torch.manual_seed(0)
    matrix = torch.randn(64, 48)
    found = spectrum.even_(matrix * 1e37, 0.5) / 1e37
    wanted = spectrum.even_(matrix.clone(), 0.5)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_precision_that_is_inherited_stays_so():
    library = torch.backends.cuda.matmul
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("a torch that has one setting for all")
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        products.product(torch.ones(3, 3), torch.ones(3, 3))
        torch.backends.fp32_precision = "ieee"
        assert library.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


def most_alive(act):
    """Of the float32 numbers that torch makes, the most that are there at once."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    alive, most = {}, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal most
            result = function(*arguments, **(keywords or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                    storage = leaf.untyped_storage()
                    if storage._cdata not in alive:
                        alive[storage._cdata] = storage.nbytes() // 4
                        weakref.finalize(storage, alive.pop, storage._cdata, None)
            most = max(most, sum(alive.values()))
            return result

    with Watch():
        act()
    return most


def test_what_cannot_be_represented_is_refused():
    layout = LAYOUTS["square"]
    tensors = [t.half() for t in models(layout)]
    aligned, statistics = prepared(tensors)
    with pytest.raises(OutOfRangeError):
        refine.merge(aligned, statistics, [1e7] * 3, 1.0, refine.Refinement(layout, 0.1, None))


@pytest.mark.parametrize("anchor", [1e200, 1e307])
def test_a_very_large_anchor_leaves_pcb(anchor):
    layout = LAYOUTS["square"]
    aligned, statistics = prepared(models(layout))
    found = refine.merge(aligned, statistics, [1.0] * 3, 1.0, refine.Refinement(layout, anchor, 1))
    plain = refine.merge(aligned, statistics, [1.0] * 3, 1.0, refine.Refinement(layout, None, 1))
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("weight", [1e39, 1e308])
def test_weights_beyond_the_precision_are_refused(weight):
    layout = LAYOUTS["square"]
    aligned, statistics = prepared(models(layout))
    own = refine.Refinement(layout, 0.1, 1)
    with pytest.raises(OutOfRangeError):
        refine.merge(aligned, statistics, [weight, 1.0, 1.0], 1.0, own)


def test_a_factor_that_fails_names_the_tensor(monkeypatch):
    layout = LAYOUTS["square"]
    aligned, statistics = prepared(models(layout))
    monkeypatch.setattr(solve, "cholesky_", lambda _: False)
    with pytest.raises(solve.NotSolvableError, match="a tensor"):
        refine.merge(aligned, statistics, [1.0] * 3, 1.0, refine.Refinement(layout, 0.1, None))
    with pytest.raises(OutOfRangeError, match="a tensor"):
        refine.evened(torch.full((4,), math.nan), Layout(1, 2, 2), 0.5, "a tensor")


@pytest.mark.parametrize("size", [1, 100, 256, 257, 600])
def test_the_factor_is_cholesky(size):
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(size + 5, size, generator=generator, dtype=torch.float64)
    gram = rows.T @ rows
    factor = gram.clone()
    assert products.cholesky_(factor)
    torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(gram))
    assert not products.cholesky_(-gram)


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1100])
def test_the_symmetric_product(size):
    rows = torch.randn(7, size, dtype=torch.float64)
    gram = torch.zeros(size, size, dtype=torch.float64)
    products.add_gram_(gram, rows)
    products.mirror_(gram)
    torch.testing.assert_close(gram, rows.T @ rows)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (7, 1)])
@pytest.mark.parametrize("exponent", [0.0, 0.4, 0.8])
def test_gradients_pass_through_the_spectrum(shape, exponent):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: spectrum.even(rows, exponent), (matrix,))


def test_gradients_are_finite_where_those_of_a_decomposition_are_not():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    low_rank = torch.randn(5, 2, generator=generator, dtype=torch.float64) @ torch.randn(
        2, 4, generator=generator, dtype=torch.float64
    )
    for matrix in (low_rank, torch.eye(5, 4, dtype=torch.float64), torch.zeros(5, 4).double()):
        matrix.requires_grad_()
        (spectrum.even(matrix, 0.5) * weights).sum().backward()
        assert matrix.grad.isfinite().all()
    # Equal singular values: along a change that keeps them equal, the differences tell.
    matrix = 2 * torch.eye(4, dtype=torch.float64)
    matrix.requires_grad_()
    (spectrum.even(matrix, 0.5) * weights[:4]).sum().backward()
    step = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    step = step - step.T  # a turn
    moved = [
        (spectrum.even(matrix.detach() + h * step, 0.5) * weights[:4]).sum() for h in (1e-6, -1e-6)
    ]
    slope = float((moved[0] - moved[1]) / 2e-6)
    assert float((matrix.grad * step).sum()) == pytest.approx(slope, rel=1e-5)
