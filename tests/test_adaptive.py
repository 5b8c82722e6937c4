"""AdaMerging + PCB: coefficients from unlabelled inputs."""

import types

import pytest
import torch

from mergekit_pcb import PCBError, adamerge, combine, contributions
from mergekit_pcb.core import fused


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
    torch.manual_seed(0)
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
    with pytest.raises(PCBError, match="there are no batches"):
        adamerge(base, base, experts, iter(()))
    others = [{f"module.{n}": t for n, t in e.items()} for e in (base.state_dict(), *experts)]
    with pytest.raises(PCBError, match=r"other names \(0\.weight\) than those of base and experts"):
        adamerge(base, others[0], others[1:], [batch])


def test_parts_of_the_model_that_are_not_merged_stay(models):
    """A head of a task's own, as in the paper, and what only the experts' files hold."""
    base, experts = models
    head = torch.nn.Linear(5, 3)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    old = {"inv_freq": torch.ones(3)}  # of an older version, and no longer the model's
    found = adamerge(
        torch.nn.Sequential(*base, head).eval(),
        {**base.state_dict(), **old},
        [{**expert, **old} for expert in experts],
        list(torch.randn(4, 16, 6)),
        epochs=5,
        density=0.6,
    )
    assert sum(found.entropies[-4:]) < sum(found.entropies[:4])
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    assert head.weight.grad is None
    assert set(found.state_dict) == {*base.state_dict(), "inv_freq"}


def test_a_start_may_be_a_whole_number_and_classes_masked_out(models):
    base, experts = models
    mask = torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf])
    masked = torch.nn.Sequential(*base, Masked(mask)).eval()
    batches = list(torch.randn(4, 16, 6))
    found = adamerge(masked, base, experts, batches, epochs=5, start=1, density=0.6)
    assert all(0 < entropy <= torch.tensor(4.0).log() for entropy in found.entropies)
    assert torch.isfinite(found.coefficients).all()
    assert not torch.equal(found.coefficients, torch.ones(3))


class Masked(torch.nn.Module):
    """Adds what is no parameter."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask  # no buffer

    def forward(self, x):
        return x + self.mask


def test_a_model_that_counts_its_batches_leaves_the_base_alone(models):
    base, experts = models
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5))
    found = adamerge(model.train(), base, experts, list(torch.randn(3, 16, 6)), density=0.6)
    for counted in (base.state_dict(), model.state_dict(), found.state_dict):
        assert counted["1.num_batches_tracked"] == 0


def test_buffers_that_are_not_merged_stay_the_models_own(models):
    base = dict(models[0].named_parameters())
    experts = [{name: state[name] for name in base} for state in models[1]]
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5)).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    adamerge(model, base, experts, list(torch.randn(3, 16, 6)), density=0.6)
    assert before
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


class Twice(torch.nn.Module):
    """A normalisation that stands under two names."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5)
        self.again = self.norm

    def forward(self, x):
        return self.again(self.norm(self.linear(x)))


def test_modules_under_two_names():
    torch.manual_seed(0)
    base, *experts = (Twice() for _ in range(3))
    found = adamerge(Twice().train(), base, experts, list(torch.randn(3, 16, 6)), density=0.6)
    assert len(found.entropies) == 3


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64], ids=str)
def test_what_torch_makes_by_default_is_nothing_to_merges(models, kind):
    base, experts = models
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5)).eval()
    batches = list(torch.randn(4, 16, 6))

    def found():
        fused.compiled.cache_clear()
        return adamerge(model, base, experts, batches, density=0.6, learning_rate=1e-3)

    expected = found()
    try:
        torch.set_default_dtype(kind)
        again = found()
        assert fused.compiled("cpu", torch.float32) is not None
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again.coefficients, expected.coefficients)
    assert not torch.equal(again.coefficients, torch.ones(len(experts)))


class Tied(torch.nn.Module):
    """Rows of an embedding that are a head's as well."""

    def __init__(self, seed, tied=True):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(20, 8)
        self.inner = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.inner(self.embedding(tokens)))


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_tied_weights_are_one_tensor(granularity):
    base, *experts = map(Tied, range(3))
    chosen = {"scope": "model", "density": 0.1, "dare_density": 0.5, "seed": 3}
    parts = contributions(base, experts, **chosen)
    assert dict(parts.tied) == {"head.weight": "embedding.weight"}
    # As if the head were not there.
    names = ["embedding.weight", "inner.weight", "inner.bias"]
    once = [{name: model.state_dict()[name] for name in names} for model in (base, *experts)]
    alone = contributions(once[0], once[1:], **chosen)
    for part, own in zip(parts, alone, strict=True):
        assert all(torch.equal(part[name], own[name]) for name in names)
        assert part["head.weight"] is part["embedding.weight"]
    merged = combine(base, parts, [1.0, 0.5])
    assert merged["head.weight"] is merged["embedding.weight"]
    batches = list(torch.randint(20, (3, 4, 6)))
    found = adamerge(base, base, experts, batches, granularity, epochs=4, **chosen)
    assert torch.equal(found.state_dict["head.weight"], found.state_dict["embedding.weight"])
    assert len(set(found.entropies)) > 1
    # A checkpoint without the head's name gives the same.
    again = adamerge(base, once[0], once[1:], batches, granularity, epochs=4, **chosen)
    assert again.entropies == found.entropies
    # Copies under both names are one tensor to the model.
    copies = [{n: t.clone() for n, t in m.state_dict().items()} for m in (base, *experts)]
    found = adamerge(base, copies[0], copies[1:], batches, granularity, density=0.1)
    assert torch.equal(found.state_dict["head.weight"], found.state_dict["embedding.weight"])
    # Equal values in two places are two tensors.
    apart = [Tied(seed, tied=False) for seed in range(3)]
    assert not contributions(apart[0], apart[1:]).tied


def test_what_cannot_be_merged_is_told(models, caplog):
    base, experts = models
    state = {"w": torch.randn(4, 4), "q": torch.zeros(4, 4, dtype=torch.int8)}
    state["count"] = torch.tensor(0)
    expert = {name: tensor + 1 for name, tensor in state.items()}

    def changed(**more):
        return [{**expert, "q": state["q"], **more}]

    contributions(state, changed())  # a counter may differ
    mask = {"mask": torch.ones(4, 4).bool()}
    contributions({**state, **mask}, changed(mask=torch.ones(4, 4, dtype=torch.uint8)))
    contributions({**state, **mask, "ids": torch.arange(4)}, changed(ids=torch.arange(1, 5)))
    with caplog.at_level("WARNING"):
        assert set(contributions(state, changed(head=state["w"]))[0]) == {"w"}
    assert "head, of expert 0, is left out: the base lacks it" in caplog.text
    generator = (one for one in changed())
    assert len(contributions(state, generator)) == 1
    for wrong, said in (
        ([expert], r"merge tensor q, because it is torch\.int8 .* and not the same, and task"),
        (changed(w=state["q"]), r"merge tensor w, because it is torch\.float32 in the base, torch"),
        ([{"q": state["q"]}], "merge tensor w, because expert 0 lacks it"),
        (changed(w=state["w"].to("meta")), "merge tensor w, because it is on the device meta"),
        ([{"state_dict": state}], "state_dict is a dict and no tensor"),
    ):
        with pytest.raises(PCBError, match=said):
            contributions(state, wrong)
    parts = contributions(state, changed())
    with pytest.raises(PCBError, match="combine 1 contributions with one weights, because each"):
        combine(state, parts, 1.0)
    with pytest.raises(PCBError, match="to w, because there are no weights of that name"):
        combine(state, parts, {"v": [1.0]})
    for other in ({"v": state["w"]}, {"w": torch.zeros(2, 4)}):
        with pytest.raises(PCBError, match=r"to w, because they have the shape \(4, 4\), and"):
            combine(other, parts, [1.0])
    half = {name: tensor.half() for name, tensor in state.items() if name == "w"}
    with pytest.raises(PCBError, match=r"its values do not fit into torch\.float16"):
        combine(half, parts, [1e9])
    for wrong in (torch.nan, torch.inf, 1e39):
        with pytest.raises(PCBError, match="infinite or no number; give weights and a scale that"):
            combine(state, parts, [wrong])
    for one in (state, base):
        with pytest.raises(PCBError, match="experts is one model"):
            contributions(base, one)
    assert len(contributions(base, torch.nn.ModuleList([base, base]))) == 2
    with pytest.raises(PCBError, match="one of them is a list"):
        contributions(base, [[state]])
    assert contributions(base, experts)


def test_what_the_model_has_no_place_for_is_told(models):
    base, experts = models
    own = {"head.weight": torch.zeros(20, 5)}
    more = [{**expert, "head.weight": torch.randn(20, 5)} for expert in experts]
    with pytest.raises(PCBError, match=r"it has no head.weight, which base and experts have"):
        adamerge(base, {**base.state_dict(), **own}, more, [torch.randn(4, 6)])
    # Of a module that is there, too.
    name = next(n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)) + ".more"
    more = [{**expert, name: torch.randn(20, 5)} for expert in experts]
    with pytest.raises(PCBError, match=rf"it has no {name}, which base and experts have"):
        adamerge(base, {**base.state_dict(), name: torch.zeros(20, 5)}, more, [torch.randn(4, 6)])
