"""DARE before PCB: the mask as plain integers define it, and merges under it."""

import json
import math
import random
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
import yaml
from checkpoints import configuration, merge, run, save_family, tensors, tiny_llama
from conftest import pieces
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.options import MergeOptions
from reference import dare_factors, kept_by_dare, philox
from reference import pcb as reference
from safetensors.torch import save_file
from test_bad_input import refused, unreadable  # noqa: F401 - a fixture
from test_whole_model import assert_equal_states, whole_reference

from mergekit_pcb.core import dare
from mergekit_pcb.core.dare import WINDOW_ELEMENTS, Dare, Mask
from mergekit_pcb.host import advice, groups, planning

MANY = 1 << 20
# Statistical tests look at so many elements, and allow for five standard deviations.
ENOUGH = 10**7 + 2 * 4096


def models(n=3, shape=(37, 11), *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    rest = [base + 1e-2 * torch.randn(shape, generator=generator).double() for _ in range(n)]
    return [tensor.to(dtype) for tensor in (base, *rest)]


def in_memory(given, **parameters):
    return merge_tensors(given, "pcb", base_index=0, parameters=parameters, name="x")


def thinned(tau, density, *, seed=0, task=0, tensor="w", start=0):
    drawn = Mask(Dare(density, seed, task), tensor, start + len(tau))
    return drawn.apply_(tau.clone(), start, torch.empty_like(tau))


def mask(count=MANY, density=0.5, *, start=0, seed=0, task=0, tensor="w"):
    drawn = Mask(Dare(density, seed, task), tensor, start + count)
    packed, skipped = drawn.packed(start, count)
    return dare.unpack(packed, skipped, out=torch.empty(count, dtype=torch.bool))


def standardised(density, count=MANY, **key):
    """A mask with mean 0 and variance 1, if it is what it should be."""
    drawn = mask(count, density, **key).double()
    return drawn.sub_(density).div_(math.sqrt(density * (1 - density)))


# --- The mask -----------------------------------------------------------------------------

PI = (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
        ),
        (
            (2**64 - 1,) * 4,
            (2**64 - 1,) * 2,
            (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
        ),
        (
            PI,
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_random123(counter, key, expected):
    """The vectors of its kat_vectors for philox4x64 with ten rounds, through what masks draw."""
    number = sum(word << 64 * place for place, word in enumerate(counter))
    drawn = dare.draw(key[0] + (key[1] << 64), (number - 1) % 2**256, 16).tolist()
    found = [sum(w << 16 * i for i, w in enumerate(drawn[k : k + 4])) for k in (0, 4, 8, 12)]
    assert tuple(found) == expected
    assert philox(counter, key) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [2**-29, 0.01, 0.3, 0.5, 0.999])
def test_the_mask_is_what_plain_integers_say(dtype, density):
    key = {"seed": 7, "task": 2, "tensor": "model.layers.0.mlp.down_proj.weight"}
    tau = torch.linspace(-3, 4, 997, dtype=dtype)
    for start in (0, 5, WINDOW_ELEMENTS - 500, 4 * WINDOW_ELEMENTS - 500, 2**40 + 3, 2**68 - 500):
        expected = [
            kept_by_dare(index=start + place, density=density, **key) for place in range(len(tau))
        ]
        result = thinned(tau, density, start=start, **key)
        kept = torch.tensor(expected)
        assert torch.equal(result != 0, kept & (tau != 0))
        assert torch.allclose(result[kept], tau[kept] / density, rtol=4e-7, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_windows_at_once_are_the_same_mask(threads):
    before, start, count = torch.get_num_threads(), WINDOW_ELEMENTS - 70, 3 * WINDOW_ELEMENTS + 9
    try:
        torch.set_num_threads(threads)
        whole = mask(count, 0.3, start=start)
    finally:
        torch.set_num_threads(before)
    for place in [*range(140), *random.Random(0).sample(range(count), 3000), count - 1]:
        assert bool(whole[place]) == kept_by_dare(0, 0, "w", start + place, 0.3)
    for place, size in [(0, 70), (70, 5), (75, 1), (WINDOW_ELEMENTS - 3, 999)]:
        part = mask(size, 0.3, start=start + place)
        assert torch.equal(part, whole[place : place + size])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
@pytest.mark.parametrize("start", [0, 3])
def test_bits_are_shifted_out_on_an_accelerator_as_numpy_unpacks_them(monkeypatch, count, start):
    packed, skipped = Mask(Dare(0.4, 0, 0), "w", start + count).packed(start, count)
    here, there = torch.empty(count), torch.empty(count)
    dare.unpack(packed, skipped, out=here)
    monkeypatch.setattr(dare, "HOST", "none")
    dare.unpack(packed, skipped, out=there)
    assert torch.equal(here, there)


def test_a_sample_on_an_accelerator_draws_no_more_than_it_needs(monkeypatch):
    count = WINDOW_ELEMENTS + 1000
    values, scratch = torch.ones(999), torch.empty(999)
    expected = Mask(Dare(0.4, 0, 0), "w", count).apply_(values.clone(), 0, scratch)
    monkeypatch.setattr(dare, "HOST", "none")
    there = Mask(Dare(0.4, 0, 0), "w", count)
    assert torch.equal(there.apply_first_(values, scratch), expected)
    assert not there._windows


def test_words_that_tie_are_told_apart_by_the_next():
    """At 2^-16 and a bit, every kept element was a tie or below one."""
    for density in (2**-16 + 2**-18, 2**-17):
        found = mask(1 << 22, density, tensor="ties").nonzero().view(-1).tolist()
        assert abs(len(found) - density * 2**22) < 5 * math.sqrt(density * 2**22)
        assert all(kept_by_dare(0, 0, "ties", place, density) for place in found)


def test_a_forked_process_draws_too():
    """Threads do not survive a fork; the pool of them must not be waited for."""
    script = (
        "import multiprocessing, torch\n"
        "from mergekit_pcb.core.dare import Dare, Mask\n"
        "torch.set_num_threads(2)\n"
        "def draw(_): return Mask(Dare(0.5, 0, 0), 'w', 1 << 22).packed(0, 1 << 22)[0].tobytes()\n"
        "here = draw(0)\n"
        "with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        "    assert pool.map_async(draw, [0]).get(60) == [here]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_names_and_numbers_that_read_alike_differ():
    keys = {dare.key(*k) for k in [(1, 1, "w"), (11, 1, "w"), (1, 11, "w"), (-1, 1, "w")]}
    keys |= {dare.key(*k) for k in [(1, 1, "1 w"), (1, 1, "w "), (1, 1, " w"), (1, 1, "")]}
    assert len(keys) == 8


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_rates_and_agreement_of_pairs_and_triples(density):
    """Within a tensor at strides, across tensors, models and seeds: what a linear hash fails."""
    key = {"seed": 3, "task": 1, "tensor": "model.layers.7.mlp.up_proj.weight"}
    first = standardised(density, ENOUGH, **key)
    others = [
        standardised(density, ENOUGH, **{**key, **change})
        for change in ({"seed": 4}, {"task": 2}, {"tensor": "model.layers.8.mlp.up_proj.weight"})
    ]

    def products():  # one at a time: each is of 80 MB
        yield "rate", first
        for stride in (1, 2, 3, 64, 4096):
            pair = first[stride:] * first[:-stride]
            yield f"pairs at {stride}", pair
            yield f"triples at {stride}", pair[stride:] * first[: -2 * stride]
        for number, other in enumerate(others):
            yield f"rate {number}", other
            yield f"the same place {number}", first * other
            yield f"the next place {number}", first[1:] * other[:-1]
        yield "three at once", others[0] * others[1] * others[2]

    for what, product in products():
        assert len(product) >= 10**7
        # Products of standardised values have variance 1, too.
        assert abs(float(product.sum())) < 5 * math.sqrt(len(product)), what


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_share_and_moments(density):
    """Kept share, sum and sum of squares of the thinned vector, each at five sigma."""
    tau = torch.randn(MANY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for seed in range(20):
        result = thinned(tau, density, seed=seed)
        kept = int((result != 0).sum())
        assert abs(kept - MANY * density) < 5 * math.sqrt(MANY * density * (1 - density))
        odds = (1 - density) / density
        off = float(result.sum() - tau.sum())
        assert abs(off) < 5 * math.sqrt(float((tau**2).sum()) * odds)
        off = float((result**2).sum() - (tau**2).sum() / density)
        assert abs(off) < 5 * math.sqrt(float((tau**4).sum()) * odds) / density


@pytest.mark.parametrize("width", [256, 1000, 4096, 1 << 18])
def test_no_row_or_column_of_a_matrix_is_favoured(width):
    """Chi-square of the kept elements per row and per column, at five sigma."""
    rows = standardised(0.2)[: MANY // width * width].view(-1, width)
    for sums in (rows.sum(1) / math.sqrt(width), rows.sum(0) / math.sqrt(len(rows))):
        off = float((sums**2).sum() - len(sums))
        assert abs(off) < 5 * math.sqrt(2 * len(sums))


def test_patterns_of_eight_neighbours_are_as_frequent_as_they_should_be():
    density = 0.3
    patterns = (mask(density=density).view(-1, 8).long() << torch.arange(8)).sum(1)
    found = torch.bincount(patterns, minlength=256).double()
    ones = torch.tensor([pattern.bit_count() for pattern in range(256)])
    due = MANY / 8 * density**ones * (1 - density) ** (8 - ones)
    often = due > 5
    chi = float(((found - due) ** 2 / due)[often].sum())
    freedom = int(often.sum()) - 1
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)


def test_what_is_broken_is_not_hidden():
    tau = torch.full((1000,), float("nan"))
    assert thinned(tau, 0.1).isnan().all()
    assert thinned(torch.full((1000,), float("inf")), 0.1).abs().amax().isnan()


# --- Merging under it ---------------------------------------------------------------------


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("density", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_equals_the_reference_with_the_same_mask(n, density):
    given = models(n)
    chosen = [(0.2, 0.5, 1.0)[task % 3] for task in range(n)]
    merged = in_memory(given, dare_density=chosen, density=density, seed=5)
    factors = [dare_factors(5, task, "x", 37 * 11, share) for task, share in enumerate(chosen)]
    expected = reference(given[0], given[1:], density=density, dare=torch.stack(factors))
    assert (merged - expected).norm() <= 1e-12 * (expected - given[0]).norm()
    assert not torch.equal(merged, in_memory(given, density=density))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_density_one_is_no_dare_to_the_bit(dtype):
    given = models(dtype=dtype)
    assert torch.equal(in_memory(given, dare_density=1.0, seed=9), in_memory(given))


def test_only_kept_elements_change():
    given = models()
    merged = in_memory(given, dare_density=0.1, density=0.5)
    kept = sum(dare_factors(0, task, "x", 37 * 11, 0.1) for task in range(3)) > 0
    assert torch.equal((merged != given[0]).view(-1) & ~kept, torch.zeros(37 * 11).bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_chunks_or_threads(dtype):
    given = models(shape=(1000, 311), dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for size, count in [(None, 1), (None, 2), (None, 20), (1000, 2), (77_777, 1)]:
            torch.set_num_threads(count)
            with pieces(size):
                results.append(in_memory(given, dare_density=0.3, density=0.2, seed=1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_global_generator_is_neither_read_nor_advanced():
    given, results = models(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        before, drawn = torch.get_rng_state(), numpy.random.get_state()[1].copy()
        results.append(in_memory(given, dare_density=0.3))
        assert torch.equal(torch.get_rng_state(), before)
        assert numpy.array_equal(numpy.random.get_state()[1], drawn)
    assert torch.equal(*results)


def test_rescaling_may_go_beyond_the_range_of_float32():
    given = [tensor * 1e33 for tensor in models(shape=(100, 100), dtype=torch.float64)]
    single = [tensor.float() for tensor in given]
    merged = in_memory(single, dare_density=1e-2, density=5e-3, **{"lambda": 1e-3})
    factors = torch.stack([dare_factors(0, task, "x", 10_000, 1e-2) for task in range(3)])
    expected = reference(single[0], single[1:], density=5e-3, lam=1e-3, dare=factors)
    base = single[0].double()
    assert (merged != single[0]).sum() > 50
    assert (merged.double() - expected).norm() <= 1e-4 * (expected - base).norm()


def test_a_tensor_some_models_lack_has_the_mask_of_their_position(tmp_path, family):
    states = [tensors(path) for path in family]
    del states[1]["lm_head.weight"]
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b", "c")]
    for file, state in zip(files, states, strict=True):
        save_file(state, file)
    config = configuration(files, parameters={"dare_density": 0.5, "density": 0.2})
    out, _ = merge(tmp_path, config, "--tensor-union", command="mergekit-pytorch")
    head = [state["lm_head.weight"] for state in states if "lm_head.weight" in state]
    factors = [dare_factors(0, task, "lm_head.weight", head[0].numel(), 0.5) for task in (1, 2)]
    expected = reference(head[0], head[1:], density=0.2, dare=torch.stack(factors))
    found = tensors(out)["lm_head.weight"]
    assert_equal_states({"": found}, {"": expected}, {"": head[0]})


# --- Through the commands -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_files_are_identical_to_the_byte_whatever_runs_them(tmp_path, scope):
    """Hash seeds, threads, shards, orders, generators and commands.

    Strings hash by chance where PYTHONHASHSEED is not set; all of those processes hash alike.
    """
    parameters = {"dare_density": 0.4, "density": 0.2, "seed": 3, "scope": scope}
    contents, bytes_written = [], []
    for index, (shard_size, hashing, threads) in enumerate(
        [("60KB", {}, "1"), ("200KB", {"PYTHONHASHSEED": "1"}, "2"), ("10GB", {}, "3")]
    ):
        place = tmp_path / f"yaml{index}"
        paths = save_family(place / "models", tiny_llama(), shard_size=shard_size)
        out, _ = merge(
            place,
            configuration(paths, parameters=parameters),
            "--random-seed",
            str(index),
            OMP_NUM_THREADS=threads,
            **hashing,
        )
        contents.append(tensors(out))
        (written,) = out.glob("*.safetensors")
        bytes_written.append(written.read_bytes())
    assert bytes_written[0] == bytes_written[1] == bytes_written[2]
    files = [tmp_path / f"{path.name}.safetensors" for path in paths]
    for file, path in zip(files, paths, strict=True):
        save_file(tensors(path), file)
    bytes_written.clear()
    for index, hashing in enumerate(({}, {"PYTHONHASHSEED": "1"}, {})):
        place = tmp_path / f"raw{index}"
        out, _ = merge(
            place,
            configuration(files, parameters=parameters),
            "--random-seed",
            str(index),
            command="mergekit-pytorch",
            OMP_NUM_THREADS=str(1 + index),
            **hashing,
        )
        contents.append(tensors(out))
        (written,) = out.glob("*.safetensors")
        bytes_written.append(written.read_bytes())
    assert bytes_written[0] == bytes_written[1] == bytes_written[2]
    named = {path.name: tensors(path) for path in paths}
    contents.append(merge_state_dicts(named, "pcb", base="base", parameters=parameters))
    reversed_names = {n: dict(reversed(state.items())) for n, state in named.items()}
    contents.append(merge_state_dicts(reversed_names, "pcb", base="base", parameters=parameters))
    for other in contents[1:]:
        assert set(other) == set(contents[0])
        assert all(torch.equal(tensor, other[name]) for name, tensor in contents[0].items())


@pytest.mark.parametrize("way", ["merge", "measured before"])
def test_whole_model_measuring_equals_the_reference_with_the_same_masks(tmp_path, family, way):
    shares = [0.3, 1.0, 0.6]
    config = configuration(
        family,
        parameters={"scope": "model", "density": 0.15, "seed": 11},
        per_model=[{"dare_density": share} for share in shares],
    )
    if way == "measured before":
        file, statistics = tmp_path / "c.yml", tmp_path / "statistics.json"
        file.write_text(json.dumps(config))
        run("mergekit-pcb", "measure", file, "-o", statistics)
        config["parameters"]["statistics"] = str(statistics)
    out, result = merge(tmp_path / "m", config)
    assert "WARNING" not in result.stderr
    states = [tensors(path) for path in family]
    names = sorted(states[0])
    factors = [
        torch.cat([dare_factors(11, task, n, states[0][n].numel(), share) for n in names])
        for task, share in enumerate(shares)
    ]
    expected = whole_reference(states, density=0.15, dare=torch.stack(factors))
    assert_equal_states(tensors(out), expected, states[0])


def test_statistics_measured_under_another_dare_are_refused(tmp_path, family):
    config = configuration(family, parameters={"scope": "model", "dare_density": 0.5})
    file, statistics = tmp_path / "c.yml", tmp_path / "statistics.json"
    file.write_text(json.dumps(config))
    run("mergekit-pcb", "measure", file, "-o", statistics)
    config["parameters"]["statistics"] = str(statistics)
    for change, complaint in (
        ({"seed": 1}, "dare_density 0.5, seed 0 for"),
        ({"dare_density": 0.4}, "the merge asks for dare_density 0.4, seed 0"),
        ({"dare_density": 1.0}, "the merge asks for no DARE"),
    ):
        changed = {**config, "parameters": {**config["parameters"], **change}}
        assert complaint in refused(tmp_path, changed)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("name", ["dare_density", "seed"])
def test_whole_model_masks_have_one_recipe(tmp_path, family, name):
    values = [{"filter": "mlp", "value": 1}, {"value": 0.5 if name == "dare_density" else 0}]
    parameters = {"scope": "model", "dare_density": 0.5, name: values}
    sentence = refused(tmp_path, configuration(family, parameters=parameters))
    assert "several values of dare_density or seed" in sentence


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize(
    "chosen",
    [{"dare_density": v} for v in (0, -0.1, 1.1, float("nan"), 1e-12, "half", True, [0.5, 0])]
    + [{"seed": v} for v in (0.5, "one", True, float("inf"), [1, 2.5], 2**63)],
    ids=str,
)
def test_values_out_of_range(tmp_path, family, chosen):
    sentence = refused(tmp_path, configuration(family, parameters=chosen))
    assert f"use {next(iter(chosen))}: " in sentence
    assert "write a " in sentence


def test_seeds_of_64_bits(tmp_path, family):
    results = []
    for seed in (2**63 - 1, 2**63 - 2, -(2**63)):
        config = configuration(family[:3], parameters={"dare_density": 0.5, "seed": seed})
        out, _ = merge(tmp_path / str(seed), config)
        results.append(tensors(out)["lm_head.weight"])
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_filters_and_gradients(tmp_path, family):
    layered = [{"filter": "mlp", "value": [0.3, 0.9]}, {"value": 1.0}]
    config = configuration(family, parameters={"dare_density": layered, "density": 0.2})
    out, _ = merge(tmp_path, config)
    states = [tensors(path) for path in family]
    for name, tensor in tensors(out).items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        share = 0.3 + layer / 3 * 0.6 if "mlp" in name else 1.0
        rows = [state[name] for state in states]
        factors = [dare_factors(0, task, name, tensor.numel(), share) for task in range(3)]
        expected = reference(rows[0], rows[1:], density=0.2, dare=torch.stack(factors))
        assert_equal_states({name: tensor}, {name: expected}, {name: rows[0]})


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_density_above_dare_density_is_remarked_on_once_a_model(tmp_path, family, scope):
    parameters = {"dare_density": 0.1, "scope": scope}
    per_model = [{"density": 0.3}, {"density": 0.1}, {"density": 0.05}]
    if scope == "tensor":
        per_model[0]["density"] = [0.3, 0.6]
    config = configuration(family, parameters=parameters, per_model=per_model)
    _, result = merge(tmp_path, config)
    assert result.stderr.count("keeps no more of") == 1
    assert f"density 0.3 keeps no more of {family[1]} than its dare_density 0.1" in result.stderr


@pytest.mark.parametrize(
    ("earlier", "warned"),
    [
        ({"seed": [{"filter": "mlp", "value": 1}, {"value": 0}]}, True),
        ({"seed": [{"filter": "mlp", "value": 1}, {"value": 2}]}, False),
        ({"seed": [1, {"x": [0]}]}, False),
        ([1], True),
    ],
)
def test_what_an_earlier_merge_says_of_itself_may_be_anything(tmp_path, family, earlier, warned):
    shutil.copytree(family[1], tmp_path / "first")
    said = {"merge_method": "pcb", "parameters": earlier, "models": [{"dare_density": 0.5}]}
    (tmp_path / "first" / "mergekit_config.yml").write_text(yaml.safe_dump(said))
    config = configuration([family[0], tmp_path / "first"], parameters={"dare_density": 0.5})
    plan = planning.plan_without_merging(config, MergeOptions())
    assert bool(advice._seed_remark(plan)) == warned


def test_tensors_without_a_name_share_a_mask_and_that_is_said_once(caplog):
    groups.warn_of_one_mask.cache_clear()
    tensors_ = [torch.randn(64) for _ in range(2)]
    given = {"base_index": 0, "parameters": {"dare_density": 0.5}}
    merge_tensors(tensors_, "pcb", name="w", **given)
    assert not caplog.messages
    for _ in range(2):
        merge_tensors(tensors_, "pcb", **given)
    assert len([text for text in caplog.messages if "one DARE mask" in text]) == 1


@pytest.mark.parametrize(("seed", "warned"), [(0, True), (1, False)])
def test_stages_that_share_a_seed_are_remarked_on(tmp_path, family, seed, warned):
    """What the first stage kept by a mask, the second would keep by the same mask."""
    parameters = {"dare_density": 0.3, "density": 0.2}
    first = {**configuration(family[:3], parameters=parameters), "name": "first"}
    parameters = {**parameters, "seed": seed}
    second = configuration([family[0], "first", family[3]], parameters=parameters)
    file = tmp_path / "multi.yml"
    file.write_text(yaml.safe_dump_all([first, second]))
    out, stages = tmp_path / "out", tmp_path / "stages"
    command = [file, "-I", stages, "--out-path", out, "--no-copy-tokenizer"]
    result = run("mergekit-multi", *command)
    said = f"{stages / 'first'} was itself merged under DARE with seed 0"
    assert result.stderr.count(said) == warned
    if warned:
        again = configuration([family[0], stages / "first", family[3]], parameters=parameters)
        _, result = merge(tmp_path / "by hand", again)
        assert result.stderr.count(said) == 1
    else:
        base, technical, merged = (tensors(p) for p in (family[0], stages / "first", out))
        names = [name for name in base if "proj" in name]
        changed = torch.cat([(technical[n] != base[n]).view(-1) for n in names])
        kept = torch.cat([(merged[n] != base[n]).view(-1) for n in names])
        other = torch.cat([dare_factors(1, 1, n, base[n].numel(), 0.3) == 0 for n in names])
        mask = torch.cat([dare_factors(0, 0, n, base[n].numel(), 0.3) > 0 for n in names])
        inside, outside = (float(kept[changed & other & m].double().mean()) for m in (mask, ~mask))
        assert abs(inside - outside) < 0.1


def test_a_density_above_dare_density_is_remarked_on_in_memory(caplog):
    in_memory(models(), dare_density=0.1, density=0.3)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    in_memory(models(), dare_density=0.3, density=0.3)
    assert len(caplog.records) == 3


def test_a_density_above_dare_density_keeps_no_more():
    """What the documentation says of it, up to where elements whose sign loses come in."""
    given = models(shape=(100, 100))
    merged = [in_memory(given, dare_density=0.1, density=d) for d in (0.12, 0.3, 0.9)]
    assert torch.equal(merged[0], merged[1])
    assert torch.equal(merged[0], merged[2])
