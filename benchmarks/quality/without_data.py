"""Methods that need no data: those of the literature, and refine with its parts left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from benchmarks.quality import baselines, datafree
from benchmarks.quality.methods import PCB, Choice, Knob, Knobs, Method, by_mergekit
from benchmarks.quality.suite import StateDict, Suite
from mergekit_pcb import Contributions, combine, contributions
from mergekit_pcb.host.kinds import kinds_of, layout_of

OURS = "pcb, refine: solve"


def matrices_of(suite: Suite) -> list[str]:
    """The weights of linear layers and convolutions, which refine and its rivals solve for."""
    kinds = kinds_of(suite.model)
    return [n for n, t in suite.base.items() if n in kinds and layout_of(kinds[n], t.shape)]


@lru_cache(maxsize=4)
def _parts(
    suite: Suite, density: float, refine: str, spectrum: float | str | None
) -> Contributions:
    return contributions(
        suite.base,
        suite.experts,
        density=density,
        refine=refine,
        spectrum=spectrum,
        architecture=suite.model,
    )


def _ours(name: str, refine: str, spectrum: float | str | None) -> Method:
    def merge(suite: Suite, knobs: Knobs) -> StateDict:
        if suite.folders:
            step = {} if spectrum is None else {"spectrum": spectrum}
            return by_mergekit(suite, "pcb", {"refine": refine, **step, **knobs})
        parts = _parts(suite, knobs["density"], refine, spectrum)
        return combine(suite.base, parts, [1.0] * len(suite.experts), knobs["lambda"])

    return Method(name, PCB.knobs, merge)


#: A merged task vector, of which the scale alone is searched further.
Find = Callable[..., StateDict]


@lru_cache(maxsize=1)
def _delta(suite: Suite, name: str, find: Find, own: tuple[tuple[str, float], ...]) -> StateDict:
    """What is found is kept beside the suite's models: it may take a minute."""
    said = " ".join([name, *(f"{value:g}" for _, value in own), "of", *suite.tasks])
    return suite.work.state(said, lambda: find(suite, **dict(own)))


def _scaled(name: str, find: Find, *knobs: Knob | Choice) -> Method:
    """A method whose merge is a scale, ``lambda``, times what it found, by other knobs if any."""

    def merge(suite: Suite, chosen: Knobs) -> StateDict:
        own = tuple((name, value) for name, value in chosen.items() if name != "lambda")
        delta = _delta(suite, name, find, own)
        return {n: base + chosen["lambda"] * delta[n] for n, base in suite.base.items()}

    return Method(name, (Knob("lambda", 1.0, 0.1, 3.0), *knobs), merge)


def _found(method: str, rest: Callable[..., torch.Tensor] | None = None) -> Find:
    """A rival's merged task vector at its paper's scale."""

    def find(suite: Suite, **knobs: float) -> StateDict:
        names = matrices_of(suite)
        merged = datafree.merge(method, suite.base, suite.experts, names, rest=rest, **knobs)
        return {name: merged[name] - base for name, base in suite.base.items()}

    return find


def _mean_elsewhere(suite: Suite, knobs: Knobs) -> StateDict:
    """Ours, but for what is no matrix: its mean, which is what the rivals have there."""
    merged = _OURS.merge(suite, knobs)
    scale, matrices = knobs["lambda"] / len(suite.experts), set(matrices_of(suite))
    for name in suite.base.keys() - matrices:
        base = suite.base[name]
        merged[name] = base + scale * sum(expert[name] - base for expert in suite.experts)
    return merged


def _svc(suite: Suite, knobs: Knobs) -> StateDict:
    return datafree.merge(
        "svc", suite.base, suite.experts, matrices_of(suite), scale=knobs["lambda"]
    )


def _other_prior(suite: Suite) -> StateDict:
    return baselines.solved(suite, matrices_of(suite), 0.1, 0.4)


def forget(*, parts: bool = True) -> None:
    """Let go of what is kept of a suite's merges, and of our own ``parts``."""
    _delta.cache_clear()
    if parts:
        _parts.cache_clear()


_OURS = _ours(OURS, "solve", None)
#: Ours and its rivals, but for SVC, differ in embeddings, too; this one does not.
MEAN_ELSEWHERE = Method(f"{OURS}, mean elsewhere", PCB.knobs, _mean_elsewhere)


#: Two changes favour WUDI-Merging. Its authors leave what is no matrix at the base's values, and
#: here it gets the mean, as the others do; and their rate of 1e-5 belongs to smaller task vectors:
#: on seeds that are not reported 1e-4 was better by far, and so comes first here.
_WUDI = Choice("rate", 1e-4, (1e-5, 1e-4, 1e-3, 1e-2))


def methods_of(suite: str) -> Sequence[Method]:
    """All of them, with what their authors say of a kind of models."""
    eps = 2e-4 if suite == "encoder" else 1e-5  # what ACE-Merging's have for RoBERTa
    return (
        _scaled("ACTMat", _found("actmat")),
        _scaled("ACE-Merging", _found("ace"), Choice("eps", eps, (1e-5, 2e-4, 4e-2))),
        _scaled("WUDI-Merging", _found("wudi", datafree.mean), _WUDI),
        _scaled("Iso-C", _found("iso_c")),
        _scaled("TSV-M", _found("tsv_m")),
        Method("SVC", (Knob("lambda", 0.3, 0.1, 3.0),), _svc),
        _ours("pcb, refine: solve, spectrum: 1", "solve", 1.0),
        _ours("pcb, spectrum: auto", "none", "auto"),
        _scaled("task_arithmetic + solve + spectrum", _other_prior),
        _OURS,
    )
