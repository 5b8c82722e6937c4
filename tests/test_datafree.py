"""The data-free rivals of the quality benchmark, against formulas computed in Python's floats."""

import inspect
import itertools
import math
import sys

import pytest
import torch
from conftest import ROOT

# Behind the installed package, so that it is the one that is benchmarked.
sys.path.append(str(ROOT))

from benchmarks.quality import datafree
from benchmarks.quality.datafree import MATRIX, REST, ace, actmat, iso_c, svc, tsv_m, wudi

every_method = pytest.mark.parametrize("method", MATRIX)


def matrices(*rows):
    """Lists as task vectors."""
    return [torch.tensor(matrix, dtype=torch.float32) for matrix in rows]


def random_taus(tasks, rows, columns, size=0.1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [size * torch.randn(rows, columns, generator=draw) for _ in range(tasks)]


def close(found, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = (found.double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max(), (found, expected)


def times(a, b):
    return [
        [sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)]
        for row in a
    ]


def transposed(a):
    return [list(row) for row in zip(*a, strict=True)]


def combined(a, b, weight=1.0):
    return [[x + weight * y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def scaled(a, factor):
    return [[factor * x for x in row] for row in a]


def norm2(a):
    return sum(x * x for row in a for x in row)


def diagonal(*values):
    return [[value * (i == j) for j in range(len(values))] for i, value in enumerate(values)]


def rotation(angle):
    return [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]


def outer(a, b):
    return [[x * y for y in b] for x in a]


def inverse(a):
    """By Gauss and Jordan, with pivots."""
    size = len(a)
    work = [list(row) + unit for row, unit in zip(a, diagonal(*[1.0] * size), strict=True)]
    for place in range(size):
        pivot = max(range(place, size), key=lambda row: abs(work[row][place]))
        work[place], work[pivot] = work[pivot], work[place]
        work[place] = [x / work[place][place] for x in work[place]]
        for row in range(size):
            if row != place:
                factor = work[row][place]
                work[row] = [x - factor * y for x, y in zip(work[row], work[place], strict=True)]
    return [row[size:] for row in work]


def first_component(a):
    """The first singular value and the outer product of its vectors, by power iteration."""
    right = [[1.0 + 0.1 * place] for place in range(len(a[0]))]
    for _ in range(5000):
        right = times(transposed(a), times(a, right))
        right = scaled(right, 1 / math.sqrt(norm2(right)))
    left = times(a, right)
    value = math.sqrt(norm2(left))
    return value, scaled(times(left, transposed(right)), 1 / value)


TWO = ([[0.5, -0.2], [0.1, 0.4]], [[-0.3, 0.2], [0.6, 0.7]])
# Singular vectors at angles that are no round fractions of a turn.
U, V = rotation(0.7), rotation(-1.9)


def turned(a):
    """A matrix of the same singular values with other vectors."""
    return times(times(U, a), transposed(V))


# ACTMat


def test_actmat_weighs_single_numbers_by_their_squares():
    found = actmat(matrices([[0.3]], [[-0.1]], [[0.5]]))
    close(found, [[(0.3**3 - 0.1**3 + 0.5**3) / (0.3**2 + 0.1**2 + 0.5**2)]])


def test_actmat_is_the_closed_form_of_its_paper():
    covariances = [times(transposed(tau), tau) for tau in TWO]
    left = combined(*[times(*pair) for pair in zip(TWO, covariances, strict=True)])
    expected = times(left, inverse(combined(*covariances)))
    close(actmat(matrices(*TWO)), expected)


def test_actmat_of_weights_is_actmat_of_task_vectors_at_full_rank():
    base = [[1.5, -0.7], [0.2, 3.0]]
    covariances = [times(transposed(tau), tau) for tau in TWO]
    weights = [combined(base, tau) for tau in TWO]
    left = combined(*[times(*pair) for pair in zip(weights, covariances, strict=True)])
    expected = times(left, inverse(combined(*covariances)))
    close(actmat(matrices(*TWO)), combined(expected, base, -1.0))


def test_actmat_sums_what_lies_in_orthogonal_inputs():
    taus = [turned(diagonal(0.3, 0.0)), turned(diagonal(0.0, 0.2))]
    close(actmat(matrices(*taus)), turned(diagonal(0.3, 0.2)))


def test_actmat_leaves_out_what_float32_would_call_zero():
    small = 1e-4  # its square is 1e-8 of the largest
    found = actmat(matrices(diagonal(1.0, small)))
    close(found, diagonal(1.0, 0.0))
    assert found[1, 1] == 0
    assert actmat(matrices(diagonal(1.0, small)), rtol=1e-12)[1, 1] == pytest.approx(small)


# ACE-Merging


def ace_by_hand(taus, eps, mixed, fraction=0.3):
    """Equations 5 to 19; ``fraction`` must come to one singular vector where tasks are mixed."""
    rows, columns, tasks = len(taus[0]), len(taus[0][0]), len(taus)
    centred = []
    for tau in taus:
        means = [sum(column) / rows for column in zip(*tau, strict=True)]
        centred.append([[x - m for x, m in zip(row, means, strict=True)] for row in tau])
    covariances = [times(transposed(tau), tau) for tau in centred]
    ridges = [eps] * tasks
    if mixed:
        traces = [sum(c[i][i] for i in range(columns)) for c in covariances]
        covariances = [scaled(c, 1 / trace) for c, trace in zip(covariances, traces, strict=True)]
        ridges = [eps / trace for trace in traces]
    regular = [
        combined(c, diagonal(*[ridge] * columns))
        for c, ridge in zip(covariances, ridges, strict=True)
    ]
    zero = [[0.0] * columns for _ in range(columns)]
    total, agreed = zero, zero
    left = [[0.0] * columns for _ in range(rows)]
    for tau, c, r in zip(centred, covariances, regular, strict=True):
        total, agreed = combined(total, r), combined(agreed, c)
        left = combined(left, times(tau, r))
    prior = [[sum(column) / columns for column in zip(*agreed, strict=True)]] * columns
    if mixed:
        prior = scaled(prior, tasks / sum(map(norm2, taus)))
    merged = times(left, inverse(combined(total, prior)))
    if mixed:
        assert int(min(rows, columns) * fraction) == 1
        fused = merged
        for tau, c in zip(taus, covariances, strict=True):
            fused = combined(fused, times(tau, combined(c, total, -1 / tasks)))
        value, component = first_component(fused)
        merged = combined(merged, component, value)
    return merged


def heterogeneity(taus):
    logarithms = [math.log(norm2(tau)) for tau in taus]
    mean = sum(logarithms) / len(taus)
    variance = sum((x - mean) ** 2 for x in logarithms) / (len(taus) - 1)
    return variance / mean**2


def test_ace_merges_like_tasks_by_its_closed_form():
    taus = [*TWO, [[0.1, 0.3], [-0.2, 0.2]]]
    assert heterogeneity(taus) > 0.3
    found = ace(matrices(*taus), eps=0.02, threshold=heterogeneity(taus) * 1.01)
    close(found, ace_by_hand(taus, 0.02, mixed=False))


@pytest.mark.parametrize("eps", [1e-5, 0.05])
def test_ace_normalises_and_refines_unlike_tasks(eps):
    taus = [tau.double().tolist() for tau in random_taus(3, 5, 4)]
    taus[1] = scaled(taus[1], 0.02)
    threshold = heterogeneity(taus) * 0.99
    found = ace(matrices(*taus), eps=eps, threshold=threshold)
    close(found, ace_by_hand(taus, eps, mixed=True), 1e-4)


def test_ace_calls_tasks_mixed_from_three_tenths_on():
    # Two squared norms a and b of logarithms that differ by d have the variance d²/2.
    def of(heterogeneous):
        # d²/2 = g m² with the mean m of the logarithms -4
        apart = math.sqrt(2 * heterogeneous) * 4
        sizes = [math.exp((-4 + sign * apart / 2) / 2) for sign in (1, -1)]
        return [
            (size * tau / tau.norm()) for size, tau in zip(sizes, random_taus(2, 6, 5), strict=True)
        ]

    for value, mixed in ((0.29, False), (0.31, True)):
        taus = of(value)
        expected = ace_by_hand([tau.double().tolist() for tau in taus], 1e-5, mixed)
        close(ace(taus), expected, 1e-4)


def test_ace_of_one_input_is_a_weighted_mean_of_centred_columns():
    taus = [[[0.3], [0.1]], [[-0.2], [0.6]]]
    halves = [0.1, -0.4]  # what centring leaves of the first row
    squares = [2 * half**2 for half in halves]
    top = sum(half * (q + 0.01) for half, q in zip(halves, squares, strict=True))
    value = top / (sum(squares) + 0.02 + sum(squares))
    close(ace(matrices(*taus), eps=0.01, threshold=math.inf), [[value], [-value]])


def test_ace_of_one_task_has_no_variance_to_speak_of():
    close(ace(matrices(TWO[1]), eps=0.01), ace_by_hand([TWO[1]], 0.01, mixed=False))


def test_ace_refines_nothing_where_there_is_less_than_one_vector_to_refine():
    unlike = [TWO[0], scaled(TWO[1], 1e-3)]
    assert heterogeneity(unlike) > 0.3
    assert ace(matrices(*unlike)).isfinite().all()
    assert torch.equal(ace(matrices(*unlike)), ace(matrices(*unlike), fraction=0.0))


# WUDI-Merging


def wudi_loss(merged, taus):
    """The paper's loss of a merged task vector."""
    return sum(
        norm2(times(combined(merged, tau, -1.0), transposed(tau))) / norm2(tau) for tau in taus
    )


def adam(taus, rate, steps):
    """WUDI's loss, its slope by central differences, and Adam's update."""
    rows, columns = len(taus[0]), len(taus[0][0])
    value = [[sum(tau[i][j] for tau in taus) for j in range(columns)] for i in range(rows)]
    first = [[0.0] * columns for _ in range(rows)]
    second = [[0.0] * columns for _ in range(rows)]
    for step in range(1, steps + 1):
        slope = [[0.0] * columns for _ in range(rows)]
        for i, j in itertools.product(range(rows), range(columns)):
            around = []
            for shift in (0.5, -0.5):  # a quadratic's central difference is exact
                moved = [list(row) for row in value]
                moved[i][j] += shift
                around.append(wudi_loss(moved, taus))
            slope[i][j] = around[0] - around[1]
        for i, j in itertools.product(range(rows), range(columns)):
            first[i][j] = 0.9 * first[i][j] + 0.1 * slope[i][j]
            second[i][j] = 0.999 * second[i][j] + 0.001 * slope[i][j] ** 2
            size = math.sqrt(second[i][j] / (1 - 0.999**step)) + 1e-8
            value[i][j] -= rate * first[i][j] / (1 - 0.9**step) / size
    return value


@pytest.mark.parametrize("steps", [1, 4])
def test_wudi_takes_adams_steps_down_its_papers_loss(steps):
    close(wudi(matrices(*TWO), rate=0.02, steps=steps), adam(TWO, 0.02, steps))


def test_wudi_goes_three_hundred_steps_at_the_published_rate():
    close(wudi(matrices([[0.5]], [[0.2]])), adam([[[0.5]], [[0.2]]], 1e-5, 300), 1e-6)
    assert float(wudi(matrices([[0.5]], [[0.2]]))) == pytest.approx(0.7 - 3e-3, abs=1e-4)


def test_wudi_starts_at_the_sum():
    close(wudi(matrices(*TWO), steps=0), combined(*TWO))


def test_wudis_loss_falls():
    taus = [tau.double().tolist() for tau in random_taus(4, 5, 6)]
    losses = [
        wudi_loss(wudi(matrices(*taus), rate=1e-3, steps=steps).double().tolist(), taus)
        for steps in (0, 50, 100, 200)
    ]
    assert losses[0] > losses[1] > losses[2] > losses[3]
    assert losses[3] < 0.5 * losses[0]


def test_wudi_ends_at_the_closed_form():
    covariances = [scaled(times(transposed(tau), tau), 1 / norm2(tau)) for tau in TWO]
    left = combined(*[times(*pair) for pair in zip(TWO, covariances, strict=True)])
    expected = times(left, inverse(combined(*covariances)))
    found = wudi(matrices(*TWO), rate=1e-3, steps=6000)
    close(found, expected, 1e-3)
    assert wudi_loss(found.double().tolist(), TWO) < 0.6 * wudi_loss(combined(*TWO), TWO)


def test_wudi_keeps_the_sum_where_inputs_are_orthogonal():
    # In numbers that float32 holds exactly, since Adam makes full steps of the smallest slope;
    # 300 steps to one side would be 3e-3.
    taus = [[[0.25, 0.5, 0.5], [0.5, 1.0, 1.0]], [[-0.5, 0.25, 0.0], [1.0, -0.5, 0.0]]]
    assert wudi_loss(combined(*taus), taus) == 0
    close(wudi(matrices(*taus)), combined(*taus), 5e-5)
    weights = [1 / norm2(tau) for tau in taus]
    # Off the sum the loss is the closed form's too: each input sees its own expert alone.
    merged = combined(combined(*taus), [[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    response = norm2(times([[1.0, 2.0, 2.0]], transposed(taus[0])))
    assert wudi_loss(merged, taus) == pytest.approx(response * weights[0])


def test_wudi_of_single_numbers_is_their_mean():
    found = wudi(matrices([[0.5]], [[0.2]], [[-0.1]]), rate=1e-2, steps=3000)
    close(found, [[0.2]], 1e-3)


# Iso-C


def test_iso_c_gives_every_direction_the_mean_of_the_singular_values():
    taus = [turned(diagonal(5.0, 2.0)), turned(diagonal(2.0, -1.0))]
    close(iso_c(matrices(*taus)), turned(diagonal(4.0, 4.0)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_iso_c_of_two_by_two_is_half_the_sum_of_matrix_and_cofactors(sign):
    # The singular values of [[a, b], [c, d]] add up to the root of a² + b² + c² + d² + 2 |ad - bc|.
    (a, b), (c, d) = combined(TWO[0], scaled(TWO[1], sign))
    turn = math.copysign(0.5, a * d - b * c)
    expected = [[a / 2 + turn * d, b / 2 - turn * c], [c / 2 - turn * b, d / 2 + turn * a]]
    close(iso_c(matrices(TWO[0], scaled(TWO[1], sign))), expected)


def test_iso_c_averages_over_zeros_and_leaves_their_arbitrary_vectors_out():
    # The sum has the singular values 75, 0 and 0.
    component = outer([3.0, 4.0, 0.0], [0.0, 3.0, -4.0])
    close(iso_c(matrices(component, scaled(component, 2.0))), component)


# TSV-M


def test_tsv_m_sums_orthogonal_components():
    taus = [turned(diagonal(0.3, 0.0)), turned(diagonal(0.0, 0.2))]
    close(tsv_m(matrices(*taus)), turned(diagonal(0.3, 0.2)))


def test_tsv_m_makes_components_orthogonal_that_are_not():
    lefts, rights = [[1.0, 0.0], [0.6, 0.8]], [[0.8, 0.6], [1.0, 0.0]]
    sizes = [3.0, 1.0]
    # Each keeps one of its two components: the second ones are lost.
    seconds = [outer([0.0, 0.5], [-0.6, 0.8]), outer([-0.8, 0.6], [0.0, 0.3])]
    taus = [
        combined(scaled(outer(left, right), size), second)
        for left, right, size, second in zip(lefts, rights, sizes, seconds, strict=True)
    ]

    def orthogonal(vectors):
        # Two unit vectors with the inner product c, times the inverse root of [[1, c], [c, 1]].
        c = sum(x * y for x, y in zip(*vectors, strict=True))
        same, other = [(1 / math.sqrt(1 + c) + sign / math.sqrt(1 - c)) / 2 for sign in (1, -1)]
        return combined(scaled(vectors, same), vectors[::-1], other)

    parts = [
        scaled(outer(left, right), size)
        for left, right, size in zip(orthogonal(lefts), orthogonal(rights), sizes, strict=True)
    ]
    close(tsv_m(matrices(*taus)), combined(*parts))


def test_tsv_m_keeps_an_experts_share_of_the_rank():
    full = diagonal(4.0, 3.0, 2.0, 1.0)
    close(tsv_m(matrices(full)), full)
    # What is shared exactly is counted once.
    close(tsv_m(matrices(full, full)), diagonal(4.0, 3.0, 0.0, 0.0))
    close(tsv_m(matrices(full, full, full)), diagonal(4.0, 0.0, 0.0, 0.0))


def test_tsv_m_keeps_a_component_of_each_when_there_are_fewer_than_experts():
    taus = [[[1.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]], [[0.0, 0.0, 0.5]]]
    # The left vectors are all the same number, which becomes 1 over the root of three.
    close(tsv_m(matrices(*taus)), [[x / math.sqrt(3) for x in (1.0, 2.0, 0.5)]])


def test_tsv_m_does_not_make_room_for_what_has_no_size():
    first, second = diagonal(0.3, 0.0, 0.0, 0.0), diagonal(0.0, 0.2, 0.0, 0.0)
    close(tsv_m(matrices(first, second)), diagonal(0.3, 0.2, 0.0, 0.0))
    close(tsv_m(matrices(first, diagonal(0.0, 0.0, 0.0, 0.0))), first)


# SVC


@pytest.mark.parametrize(("alpha", "factor"), [(None, 0.6), (0.1, 1.5), (0.3, 1.0), (1.0, 0.3)])
def test_svc_divides_orthogonal_components_by_their_experts_mean_share(alpha, factor):
    # The merge has 0.3 of its expert and nothing of the other one in each direction.
    taus = [turned(diagonal(0.4, 0.0)), turned(diagonal(0.0, 0.2))]
    expected = turned(diagonal(0.4 * factor, 0.2 * factor))
    close(svc(matrices(*taus), alpha=alpha), expected)


@pytest.mark.parametrize("numbers", [(0.5, 0.2), (0.5, -0.2), (0.4, 0.4, 0.1)])
def test_svc_of_single_numbers_is_the_papers_ratio(numbers):
    merged = 0.3 * sum(numbers)
    shares = [max(1 / len(numbers), merged / number) for number in numbers]
    expected = merged * len(numbers) / sum(shares)
    close(svc(matrices(*[[[number]] for number in numbers])), [[expected]])


def test_svc_looks_at_responses_along_left_singular_vectors():
    # By construction the sum has the singular vectors of U and V, and the parts have not.
    sizes = [0.9, 0.4]
    parts = [[[0.5, 0.2], [-0.3, 0.1]], [[0.4, -0.2], [0.3, 0.3]]]
    close(torch.tensor(combined(*parts)), diagonal(*sizes))
    expected = []
    for row, size in enumerate(sizes):
        shares = [
            max(0.2, 0.7 * size * part[row][row] / sum(x * x for x in part[row])) for part in parts
        ]
        expected.append(0.7 * size / (sum(shares) / 2))
    found = svc(matrices(*map(turned, parts)), scale=0.7, alpha=0.2)
    close(found, turned(diagonal(*expected)))


# All of them


@pytest.mark.parametrize(
    ("method", "factor"),
    [(actmat, 1.0), (tsv_m, 1.0), (svc, 0.3), (wudi, 1.0)],
)
def test_one_task_is_kept_as_its_formula_says(method, factor):
    (tau,) = random_taus(1, 6, 4)
    close(method([tau]), factor * tau.double())


@pytest.mark.parametrize("method", [actmat, svc])
def test_of_four_equal_tasks_one_is_kept(method):
    (tau,) = random_taus(1, 6, 4)
    close(method([tau] * 4), tau.double())


def test_equal_tasks_add_up_in_iso_c():
    (tau,) = random_taus(1, 6, 4)
    close(iso_c([tau] * 4), 4 * iso_c([tau]).double())


def test_equal_tasks_are_wudis_optimum_one_by_one():
    (tau,) = random_taus(1, 4, 4)
    close(wudi([tau] * 2, rate=1e-3, steps=6000), tau.double(), 0.05)


@every_method
def test_the_order_of_experts_changes_nothing(method):
    taus = random_taus(3, 7, 9)
    taus[2] *= 0.01
    knobs = {"rate": 1e-3} if method == "wudi" else {}
    expected = MATRIX[method](taus, **knobs)
    for order in itertools.permutations(taus):
        close(MATRIX[method](order, **knobs), expected.double())


@every_method
def test_task_vectors_of_zero_are_finite(method):
    zero = torch.zeros(5, 6)
    assert torch.equal(MATRIX[method]([zero, zero]), zero)
    assert MATRIX[method]([*random_taus(2, 5, 6), zero]).isfinite().all()


@every_method
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1), (5, 12), (12, 5)])
def test_any_shape_merges_to_float32_and_leaves_task_vectors_alone(method, shape):
    taus = random_taus(3, *shape)
    before = [tau.clone() for tau in taus]
    found = MATRIX[method](taus)
    assert found.dtype is torch.float32
    assert found.shape == shape
    assert found.isfinite().all()
    assert not found.requires_grad
    assert all(map(torch.equal, taus, before))


@pytest.mark.parametrize("method", [iso_c, tsv_m])
def test_scale_multiplies_what_is_merged(method):
    taus = random_taus(2, 4, 5)
    close(method(taus, scale=1.3), 1.3 * method(taus).double())


@every_method
def test_knobs_are_arguments_with_their_defaults(method):
    parameters = inspect.signature(MATRIX[method]).parameters
    for name, knob in datafree.KNOBS[method].items():
        assert parameters[name].default == knob.default
        assert knob.low <= (knob.default or knob.low) <= knob.high
    if "scale" in parameters:
        rest = inspect.signature(REST[method]).parameters
        assert rest["scale"].default == parameters["scale"].default


# State dicts


@pytest.fixture
def family():
    """A base and two experts of a convolution, its bias, and a counter."""
    draw = torch.Generator().manual_seed(1)
    base = {
        "conv.weight": torch.randn(4, 3, 2, 2, generator=draw),
        "conv.bias": torch.randn(4, generator=draw),
        "embedding": torch.randn(6, 5, generator=draw).bfloat16(),
        "count": torch.tensor(7),
    }
    experts = [
        {
            name: tensor + (torch.randn(tensor.shape, generator=draw) / 8).to(tensor.dtype)
            for name, tensor in base.items()
        }
        for _ in range(2)
    ]
    for number, expert in enumerate(experts):
        expert["count"] = base["count"] + number + 1
    return base, experts


def test_every_method_has_a_rule_for_the_rest_and_knobs():
    assert list(MATRIX) == list(REST) == list(datafree.KNOBS)


@every_method
def test_a_state_dict_is_merged_name_by_name(family, method):
    base, experts = family
    found = datafree.merge(method, base, experts, {"conv.weight"})
    assert list(found) == list(base)
    for name, tensor in found.items():
        assert tensor.shape == base[name].shape
        assert tensor.dtype == base[name].dtype
    assert found["count"] == 7
    taus = [(expert["conv.weight"] - base["conv.weight"]).reshape(4, 12) for expert in experts]
    close(found["conv.weight"] - base["conv.weight"], MATRIX[method](taus).reshape(4, 3, 2, 2))
    total = sum(expert["conv.bias"] - base["conv.bias"] for expert in experts)
    factor = {"svc": 0.3, "wudi": 0.0}.get(method, 0.5)
    assert torch.allclose(found["conv.bias"], base["conv.bias"] + factor * total, atol=1e-6)
    total = sum(expert["embedding"].float() - base["embedding"].float() for expert in experts)
    close(found["embedding"], base["embedding"].double() + factor * total.double(), 1e-2)


@pytest.mark.parametrize(("method", "factor"), [("iso_c", 0.65), ("tsv_m", 0.65), ("svc", 1.3)])
def test_scale_is_for_matrices_and_for_the_rest(family, method, factor):
    base, experts = family
    found = datafree.merge(method, base, experts, {"conv.weight"}, scale=1.3)
    taus = [(expert["conv.weight"] - base["conv.weight"]).flatten(1) for expert in experts]
    delta = (found["conv.weight"] - base["conv.weight"]).flatten(1)
    close(delta, MATRIX[method](taus, scale=1.3).double())
    total = sum(expert["conv.bias"] - base["conv.bias"] for expert in experts)
    close(found["conv.bias"] - base["conv.bias"], factor * total.double())


def test_another_rule_for_the_rest_may_be_given(family):
    base, experts = family
    averaged = datafree.merge("wudi", base, experts, set(), rest=datafree.mean)
    for name in ("conv.weight", "conv.bias"):
        expected = (experts[0][name] + experts[1][name]).double() / 2
        close(averaged[name], expected)
    kept = datafree.merge("iso_c", base, experts, set(), rest=datafree.unchanged, scale=2.0)
    assert all(map(torch.equal, kept.values(), base.values()))


def test_knobs_reach_the_method(family):
    base, experts = family
    found = datafree.merge("wudi", base, experts, {"conv.weight"}, rate=0.01, steps=3)
    taus = [(expert["conv.weight"] - base["conv.weight"]).flatten(1) for expert in experts]
    delta = (found["conv.weight"] - base["conv.weight"]).flatten(1)
    close(delta, wudi(taus, rate=0.01, steps=3).double())
    with pytest.raises(TypeError):
        datafree.merge("actmat", base, experts, {"conv.weight"}, scale=1.0)
    with pytest.raises(KeyError):
        datafree.merge("none", base, experts, {"conv.weight"})
