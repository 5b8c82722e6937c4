"""Models in memory as people hold them: tied, of several dtypes, quantised, of their own making."""

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.merge_methods.base import TensorGroup
from reference import pcb as reference
from test_adaptive import Tied

from mergekit_pcb import Contributions, PCBError, combine, contributions
from mergekit_pcb.core.measure import Recipe
from mergekit_pcb.host import in_memory


@pytest.mark.parametrize("given", [{"scope": "model"}, {"dare_density": 0.5}, {}], ids=str)
def test_what_has_two_names_is_ranked_once_and_has_one_mask(given):
    states = [Tied(seed).state_dict() for seed in range(3)]
    parameters = {"density": 0.4, **given}
    merged = merge_state_dicts(states, "pcb", base=0, parameters=parameters)
    assert torch.equal(merged["head.weight"], merged["embedding.weight"])
    parts = contributions(states[0], states[1:], **parameters)
    taken_apart = combine(states[0], parts, [1.0, 1.0])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, taken_apart[name], msg=name)


def test_what_only_the_base_ties_is_told(caplog):
    base, expert = Tied(0).state_dict(), Tied(1, tied=False).state_dict()
    contributions(base, [expert])
    assert (
        "embedding.weight and head.weight are one tensor in the base and not in all" in caplog.text
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_quantised_weights_that_differ_are_refused(dtype):
    base = {"qweight": torch.zeros(8, 16, dtype=dtype), "scales": torch.randn(16)}
    other = {"qweight": torch.ones(8, 16, dtype=dtype), "scales": torch.randn(16)}
    with pytest.raises(PCBError, match=r"tensor qweight, because .*that are not quantised"):
        contributions(base, [other])


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_models_of_two_dtypes_are_cast_as_they_are_looked_at(scope):
    torch.manual_seed(0)
    base = {name: torch.randn(6, 5) for name in "ab"}
    experts = [{n: (t + 0.1 * torch.randn(6, 5)).bfloat16() for n, t in base.items()}] * 1
    experts.append({n: t + 0.1 * torch.randn(6, 5) for n, t in base.items()})
    parts = contributions(base, experts, density=0.4, scope=scope)
    merged = combine(base, parts, [1.0, 1.0])
    if scope == "model":
        flat = [torch.cat([s[n].double().view(-1) for n in "ab"]) for s in (base, *experts)]
        expected = reference(flat[0], flat[1:], density=0.4).split(30)
    else:
        expected = [
            reference(base[n].double(), [e[n].double() for e in experts], density=0.4) for n in "ab"
        ]
    for name, wanted in zip("ab", expected, strict=True):
        torch.testing.assert_close(
            merged[name].double().view(-1), wanted.view(-1), atol=1e-6, rtol=0
        )
    again = merge_state_dicts(
        [base, *experts], "pcb", base=0, parameters={"density": 0.4, "scope": scope}
    )
    torch.testing.assert_close(again["a"], merged["a"])


def test_float8_is_neither_clipped_nor_mixed_in_silence():
    narrow = torch.float8_e4m3fn
    base = {"w": torch.full((4, 4), 400.0).to(narrow)}
    parts = Contributions([{"w": torch.full((4, 4), 20.0)}])
    assert combine(base, parts, [1.0])["w"].float().max() == 416
    with pytest.raises(PCBError, match=r"store tensor w, because its values do not fit into"):
        combine(base, parts, [5.0])
    high = torch.full((4, 4), 3.4e38)
    with pytest.raises(PCBError, match=r"do not fit into torch\.bfloat16"):
        merge_tensors([high, high], "pcb", base_index=0, name="w", out_dtype=torch.bfloat16)
    wide = [torch.full((4, 4), value).to(torch.float8_e5m2) for value in (8.0, 9.0)]
    assert merge_tensors(wide, "pcb", base_index=0, name="w", out_dtype=narrow).dtype == narrow
    given = [torch.full((4, 4), 900.0), torch.full((4, 4), 1000.0)]
    with pytest.raises(PCBError, match=r"do not fit into torch.float8_e4m3fn"):
        merge_tensors(given, "pcb", base_index=0, name="w", out_dtype=narrow)
    mixed = [torch.zeros(4, 4).bfloat16(), torch.ones(4, 4).to(narrow)]
    for merge in (
        lambda: merge_tensors(mixed, "pcb", base_index=0, name="w"),
        lambda: contributions({"w": mixed[0]}, [{"w": mixed[1]}]),
    ):
        with pytest.raises(PCBError, match=r"it is torch.bfloat16 in .*set `dtype: float32`"):
            merge()
    given = {"base_index": 0, "name": "w", "dtype": torch.float32}
    assert merge_tensors(mixed, "pcb", **given).dtype == torch.float32


@pytest.mark.parametrize(
    ("parts", "weights", "said"),
    [
        ([{}, {"a": torch.ones(3)}], [1, 1], "not all have a"),
        ([{"a": torch.ones(3)}, {}], [1, 1], "not all have a"),
        ([{"a": torch.ones(3)}, {"a": torch.ones(1)}], [1, 1], r"they have the shape \(1,\)"),
        ([{"a": torch.ones(3)}] * 2, torch.ones(2, 3), "2 contributions with 2 × 3 weights"),
        ([{"a": torch.ones(3)}] * 2, [1.0], "2 contributions with 1 weights"),
    ],
)
def test_contributions_of_ones_own_making(parts, weights, said):
    with pytest.raises(PCBError, match=said):
        combine({"a": torch.zeros(3)}, Contributions(parts), weights)


def test_a_float64_base_keeps_its_digits():
    base = {"a": torch.tensor([1 + 1e-12], dtype=torch.float64)}
    merged = combine(base, Contributions([{"a": torch.zeros(1)}]), [1.0])
    assert torch.equal(merged["a"], base["a"])


def test_task_vectors_that_even_float64_cannot_multiply_are_refused():
    torch.manual_seed(0)
    base = torch.zeros(40, dtype=torch.float64)
    tasks = [1e-200 * torch.randn(40, dtype=torch.float64) for _ in range(2)]
    with pytest.raises(PCBError, match="its values are too large or too small for float64"):
        merge_tensors([base, *tasks], "pcb", base_index=0, name="w")


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_matrices_of_any_size_are_solved(scope):
    """One of them so small that one over its norm is beyond float32."""
    torch.manual_seed(0)
    base = {name: torch.zeros(6, 6) for name in "ab"}
    experts = [{"a": torch.randn(6, 6), "b": 1e-40 * torch.randn(6, 6)} for _ in range(2)]
    given = {"refine": "solve", "scope": scope, "density": 0.4}
    merged = merge_state_dicts([base, *experts], "pcb", base=0, parameters=given)
    assert merged["a"].isfinite().all()
    assert merged["b"].abs().max() > 0


def test_small_slips_end_in_sentences():
    base, expert = {"a": torch.zeros(3)}, {"a": torch.ones(3)}
    assert torch.equal(
        contributions(base, [expert] * 2, density="0.1")[0]["a"],
        contributions(base, [expert] * 2, density=0.1)[0]["a"],
    )
    with pytest.raises(PCBError, match="1 is no name of a tensor"):
        contributions({1: torch.zeros(3)}, [{1: torch.ones(3)}])


def test_a_model_over_several_devices_is_merged_by_tensors_alone(monkeypatch):
    groups = [
        TensorGroup.from_tensors([torch.ones(4, device=device)] * 2, base_index=0)
        for device in ("cpu", "meta")
    ]
    monkeypatch.setattr(in_memory, "is_infinite", lambda *_: False)  # it would look at values
    recipe = Recipe.of([0.5], 1e-4, [1.0], 0, range(1))
    with pytest.raises(PCBError, match="lie on cpu and meta; move them to one device, or use"):
        in_memory._measured(groups, [None, None], recipe, ())
