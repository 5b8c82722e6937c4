"""AdaMerging + PCB: coefficients from unlabelled inputs."""

import types

import pytest
import torch

from mergekit_pcb import PCBError, adamerge, combine, contributions


@pytest.fixture
def models():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5)).eval()
    experts = []
    for _ in range(3):
        state = {
            n: t + 0.1 * torch.randn(t.shape) if t.is_floating_point() else t
            for n, t in base.state_dict().items()
        }
        state["1.running_var"] = base.state_dict()["1.running_var"]
        experts.append(state)
    return base, experts


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_entropy_falls_and_the_result_is_the_combination(models, granularity):
    base, experts = models
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    batches = list(torch.randn(4, 16, 6))
    found = adamerge(base, base, experts, batches, granularity, epochs=20, density=0.6)
    assert len(found.entropies) == 80
    assert sum(found.entropies[-4:]) < sum(found.entropies[:4])
    parts = contributions(base, experts, density=0.6)
    expected = combine(base, parts, found.coefficients)
    assert set(found.state_dict) == set(before)
    for name, tensor in found.state_dict.items():
        assert torch.equal(tensor, expected[name])
        assert not tensor.requires_grad
        assert torch.equal(base.state_dict()[name], before[name])
    if granularity == "task":
        assert found.coefficients.shape == (3,)
        assert not torch.equal(found.coefficients, torch.ones(3))
    else:
        assert set(found.coefficients) == set(parts[0])
        assert len({tuple(row.tolist()) for row in found.coefficients.values()}) > 2
    again = adamerge(base, base, experts, batches, granularity, epochs=20, density=0.6)
    assert again.entropies == found.entropies


def test_solved_matrices_are_adapted_through_their_spectrum(models):
    base, experts = models
    batches = list(torch.randn(4, 16, 6))
    chosen = {"density": 0.6, "refine": "solve"}
    found = adamerge(base, base, experts, batches, epochs=20, **chosen)
    assert sum(found.entropies[-4:]) < sum(found.entropies[:4])
    parts = contributions(base, experts, **chosen)
    assert set(parts.spectra) == {"0.weight"}
    expected = combine(base, parts, found.coefficients)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in found.state_dict.items())
    weights = torch.tensor([1.0, 0.5, 1.5], requires_grad=True)
    combine(base, parts, weights)["0.weight"].square().sum().backward()
    for task in range(3):
        with torch.no_grad():
            moved = [weights.clone() for _ in range(2)]
            moved[0][task] += 1e-2
            moved[1][task] -= 1e-2
            up, down = (combine(base, parts, w)["0.weight"].square().sum() for w in moved)
        assert float(weights.grad[task]) == pytest.approx(float((up - down) / 2e-2), rel=1e-3)


def test_the_gradient_is_the_contribution():
    base = {"w": torch.randn(4, 3)}
    experts = [{"w": base["w"] + 0.1 * torch.randn(4, 3)} for _ in range(2)]
    parts = contributions(base, experts, density=1.0)
    weights = torch.tensor([0.5, 2.0], requires_grad=True)
    merged = combine(base, parts, weights, 1.5)["w"]
    merged.sum().backward()
    expected = torch.stack([1.5 * part["w"].sum() for part in parts])
    assert torch.allclose(weights.grad, expected, rtol=1e-5)


def test_batches_in_every_form(models):
    base, experts = models
    inputs = torch.randn(8, 6)

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = base

        def forward(self, x, scale=1.0):
            return types.SimpleNamespace(logits=self.inner(x) * scale)

    state = {f"inner.{name}": tensor for name, tensor in base.state_dict().items()}
    wrapped = [{f"inner.{name}": t for name, t in expert.items()} for expert in experts]
    results = [
        adamerge(Wrapped().eval(), state, wrapped, [batch]).entropies
        for batch in (inputs, (inputs, 1.0), [inputs], {"x": inputs, "scale": 1.0})
    ]
    assert all(result == results[0] for result in results)


def test_mistakes_end_in_sentences(models):
    base, experts = models
    batch = torch.randn(8, 6)
    with pytest.raises(PCBError, match="write task or layer"):
        adamerge(base, base, experts, [batch], "model")
    with pytest.raises(PCBError, match="became NaN or infinite"):
        adamerge(base, base, experts, [batch * float("nan")])

    class Silent(torch.nn.Sequential):
        def forward(self, _):
            return None

    with pytest.raises(PCBError, match="returned NoneType without logits"):
        adamerge(Silent(*base), base, experts, [batch])
