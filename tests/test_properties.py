"""What PCB promises for any tensors, in memory, with chunks as shipped and of five elements."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from reference import pcb as reference

import mergekit_pcb

pytestmark = pytest.mark.usefixtures("chunked")


def models(n=3, shape=(37, 11), *, dtype=torch.float64, seed=0, size=1e-2):
    """A base and ``n`` models a fine-tuning step away from it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    rest = [base + size * torch.randn(shape, generator=generator).double() for _ in range(n)]
    return [tensor.to(dtype) for tensor in (base, *rest)]


def merge(tensors, **parameters):
    parameters = {{"lam": "lambda"}.get(name, name): value for name, value in parameters.items()}
    return merge_tensors(tensors, "pcb", base_index=0, parameters=parameters, name="x")


def assert_close(result, expected, base, tolerance=1e-12):
    delta = (expected.double() - base.double()).norm()
    assert (result.double() - expected.double()).norm() <= tolerance * max(delta, 1e-30)


@pytest.mark.parametrize("n", [1, 2, 5, 9, 200])
@pytest.mark.parametrize("density", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_equals_the_reference(n, density):
    tensors = models(n, (13, 31) if n < 200 else (40,))
    expected = reference(tensors[0], tensors[1:], density=density, clip=0.01)
    assert_close(merge(tensors, density=density, clip=0.01), expected, tensors[0])


def test_density_and_weight_are_per_task():
    tensors = models(3)
    chosen = {"density": [0.05, 0.3, 0.8], "weight": [0.5, 2.0, -1.0]}
    expected = reference(tensors[0], tensors[1:], lam=1.4, **chosen)
    assert_close(merge(tensors, lam=1.4, **chosen), expected, tensors[0])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, 0.25, -0.25, 1.0, -1.0, 1e-3]), min_size=4, max_size=4),
        min_size=1,
        max_size=40,
    ),
    density=st.floats(0, 1),
    clip=st.floats(0, 0.49),
)
def test_equals_the_reference_under_heavy_ties(rows, density, clip):
    columns = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    expected = reference(columns[0], list(columns[1:]), density=density, clip=clip)
    result = merge(list(columns), density=density, clip=clip)
    assert torch.allclose(result, expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3
        ),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from([0.1, 0.5, 1.0]),
)
def test_finite_wherever_the_inputs_are_finite(rows, density):
    columns = list(torch.tensor(rows, dtype=torch.float32).T.contiguous())
    assert merge(columns, density=density).isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e18, 1e30])
def test_magnitudes_that_float32_cannot_square(size):
    tensors = [size * tensor.float() for tensor in models(3, size=0.5)]
    result = merge(tensors, density=0.3)
    assert result.dtype == torch.float32
    assert_close(result, reference(tensors[0], tensors[1:], density=0.3), tensors[0], 1e-6)


def test_order_of_tasks_does_not_matter():
    base, *tasks = models(4)
    forward = merge([base, *tasks], weight=[1.0, 2.0, 3.0, 4.0])
    assert_close(merge([base, *tasks[::-1]], weight=[4.0, 3.0, 2.0, 1.0]), forward, base)


def test_order_of_elements_does_not_matter_to_the_bit():
    tensors = models(3, (407,), dtype=torch.float32)
    order = torch.randperm(407, generator=torch.Generator().manual_seed(1))
    assert torch.equal(merge([tensor[order] for tensor in tensors]), merge(tensors)[order])


def test_flipped_signs_flip_the_result_to_the_bit():
    tensors = models(3, dtype=torch.float32)
    assert torch.equal(merge([-tensor for tensor in tensors]), -merge(tensors))


def test_linear_in_weight():
    tensors = models(3)
    base = tensors[0]
    single = [merge(tensors, weight=[float(i == j) for j in range(3)]) - base for i in range(3)]
    combined = base + 0.5 * single[0] - 2 * single[1] + 3 * single[2]
    assert_close(merge(tensors, weight=[0.5, -2.0, 3.0]), combined, base, 1e-9)


@pytest.mark.parametrize("chosen", [{"lam": 0.0}, {"density": 0.0}, {"weight": 0.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nothing_asked_for_gives_the_base_bit_for_bit(chosen, dtype):
    tensors = models(3, dtype=dtype)
    tensors[0].view(-1)[:5] = -0.0
    result = merge(tensors, **chosen)
    assert torch.equal(result, tensors[0])
    assert torch.equal(result.signbit(), tensors[0].signbit())


def test_elements_no_task_weighs_keep_the_bits_of_the_base():
    base, *tasks = models(2, (1000,), dtype=torch.float32)
    base[::2] = -0.0
    result = merge([base, *tasks], density=0.05, lam=-1.0)
    kept = result == base
    assert 800 < kept.sum() < 1000
    assert torch.equal(result.signbit()[kept], base.signbit()[kept])


def test_identical_tasks_merge_to_their_clamped_strongest_elements():
    base, task = models(1)
    expected = reference(base, [task] * 5, density=0.2)
    result = merge([base, *[task] * 5], density=0.2)
    assert_close(result, expected, base)
    changed = result != base
    assert changed.double().mean() == pytest.approx(0.2, abs=0.01)


def test_a_frozen_task_leaves_the_others_alone():
    base, *tasks = models(2)
    expected = reference(base, [*tasks, base])
    assert_close(merge([base, *tasks, base.clone()]), expected, base)


def test_a_task_with_one_magnitude_gets_no_weight():
    base = torch.zeros(37, 11, dtype=torch.float64)
    step, other = (tensor - models(1)[0] for tensor in models(2)[1:])
    sign = torch.where(other > 0, 0.125, -0.125).double()
    assert torch.equal(merge([base, sign]), base)
    # It still speaks up in the sum that the other task's score looks at.
    assert_close(merge([base, step, sign]), reference(base, [step, sign]), base)
    assert torch.equal(merge([base, step, sign]), merge([base, step, sign], weight=[1.0, 7.0]))


@pytest.mark.parametrize("n", [1, 3])
def test_all_frozen_gives_the_base(n):
    base = models(1)[0]
    assert torch.equal(merge([base] + [base.clone() for _ in range(n)]), base)


def test_exactly_opposite_tasks_give_the_base():
    base = torch.zeros(100, dtype=torch.float64)
    step = models(1, (100,))[0]
    assert torch.equal(merge([base, step, -step]), base)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2,), (2, 3), (0, 4), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_shape_and_dtype_comes_back(shape, dtype):
    tensors = models(2, shape, dtype=dtype)
    result = merge(tensors, density=0.5)
    assert result.shape == shape
    assert result.dtype == dtype
    assert result.data_ptr() != tensors[0].data_ptr() or not result.numel()
    expected = reference(tensors[0], tensors[1:], density=0.5)
    assert torch.allclose(result.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    tensors = models(3, (4096,), dtype=dtype)
    expected = reference(tensors[0], tensors[1:]).to(dtype)
    result = merge(tensors)
    # float32 and float64 may fall on different sides of a rounding boundary, rarely.
    assert (result != expected).double().mean() < 1e-3


def test_strided_inputs_are_read_right_and_not_written_to():
    tensors = models(3, (40, 30), dtype=torch.float32)
    strided = [
        tensors[0].T.contiguous().T,
        tensors[1][:, :],
        torch.cat([tensors[2]] * 2, 1)[:, :30],
    ]
    strided.append(tensors[3].flip(0).flip(0))
    before = [tensor.clone() for tensor in strided]
    result = merge(strided)
    assert torch.equal(result, merge(tensors))
    assert all(torch.equal(now, then) for now, then in zip(strided, before, strict=True))


def test_inputs_that_require_gradients_are_merged_outside_of_autograd():
    tensors = [tensor.requires_grad_() for tensor in models(2)]
    assert not merge(tensors).requires_grad


def test_state_dicts_keep_buffers_and_names():
    state = [
        {"w": tensor, "scale": tensor[0, 0].clone(), "ids": torch.arange(3)} for tensor in models(2)
    ]
    merged = merge_state_dicts(dict(zip("bxy", state, strict=True)), "pcb", base="b")
    assert list(merged) == ["w", "scale", "ids"]
    assert_close(merged["w"], reference(state[0]["w"], [s["w"] for s in state[1:]]), state[0]["w"])
    assert torch.equal(merged["scale"], state[0]["scale"])
    assert torch.equal(merged["ids"], torch.arange(3))


def test_mixed_dtypes_are_promoted_before_subtracting():
    base, first, second = models(2)
    merged = merge([base.float(), first.bfloat16(), second.half()])
    assert merged.dtype == torch.float32
    assert_close(merged, reference(base.float(), [first.bfloat16(), second.half()]), base, 1e-4)


def test_the_global_generator_is_not_touched():
    before = torch.random.get_rng_state()
    merge(models(3))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("values", "culprit"),
    [([float("nan"), 0.0], "task-a"), ([0.0, float("inf")], "task-a"), (None, "the-base")],
)
def test_nan_and_infinity_are_named(values, culprit):
    base, first, second = models(2, (2,))
    if values is None:
        base = torch.tensor([1.0, float("nan")]).double()
    else:
        first = torch.tensor(values).double()
    with pytest.raises(mergekit_pcb.PCBError, match=f"tensor w, because {culprit} holds NaN"):
        merge_tensors(
            [base, first, second],
            "pcb",
            base_index=0,
            ids=["the-base", "task-a", "task-b"],
            name="w",
        )


def test_a_result_that_does_not_fit_is_refused():
    base = torch.full((64,), 60000.0)
    base[::2] = 1.0
    task = base + torch.linspace(1, 3000, 64)
    with pytest.raises(mergekit_pcb.PCBError, match=r"do not fit into torch.float16; lower lambda"):
        merge([base.half(), task.half()], density=1.0, lam=100.0)


@pytest.mark.parametrize("n", [60, 90, 110, 200])
def test_a_task_whose_best_elements_disagree_with_many_others_is_not_lost(n):
    torch.manual_seed(0)
    signs = torch.randn(400).sign()
    tasks = [1e-3 * signs * (1 + torch.rand(400)) * 0.1 for _ in range(n)]
    tasks[0][:2] = -1e-2 * signs[:2]
    weight = [1.0, *[0.0] * (n - 1)]
    base = torch.zeros(400)
    result = merge([base, *tasks], weight=weight)
    assert_close(result, reference(base, tasks, weight=weight), base, 2e-3)


@pytest.mark.parametrize(
    "chosen", [{"lam": 1e39}, {"weight": 1e39}, {"lam": 1e200, "weight": 1e200}]
)
def test_coefficients_beyond_the_precision_are_refused(chosen):
    with pytest.raises(mergekit_pcb.PCBError, match="lower lambda or the weights"):
        merge(models(2, dtype=torch.float32), **chosen)


def test_eight_bit_floats():
    tensors = [tensor.to(torch.float8_e4m3fn) for tensor in models(2, size=0.5)]
    result = merge(tensors, density=0.5)
    expected = reference(tensors[0].double(), [t.double() for t in tensors[1:]], density=0.5)
    assert result.dtype == torch.float8_e4m3fn
    assert (result.double() - expected).abs().max() <= 0.07 * expected.abs().max()


def test_an_out_dtype_too_narrow_for_the_result_is_refused():
    tensors = [1e5 * tensor for tensor in models(2, dtype=torch.float32)]
    with pytest.raises(mergekit_pcb.PCBError, match=r"do not fit into torch.float16; lower"):
        merge_tensors(tensors, "pcb", base_index=0, name="x", out_dtype=torch.float16)
