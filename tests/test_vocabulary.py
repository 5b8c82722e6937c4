"""A union of vocabularies: the same rows in every process, under masks that go by place."""

import json

import pytest
import torch
import yaml
from checkpoints import configuration, merge, run, save_family, tensors, tiny_llama
from reference import dare_factors
from reference import pcb as reference
from test_whole_model import assert_equal_states, whole_reference, with_tokenizer

WORDS = [f"w{i}" for i in range(64)]
NEW = ["zebra", "new", "<|end|>", "more", "other", "last", "Ä", "<|begin|>"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def paths(tmp_path):
    """A base and two experts; the second knows eight words more."""
    made = save_family(tmp_path / "models", tiny_llama(layers=1), tasks=1)
    wider = tiny_llama(layers=1, vocabulary=64 + len(NEW))
    made += save_family(tmp_path / "wider", wider, tasks=1)[1:]
    for path, vocabulary in zip(made, (WORDS, WORDS, [*WORDS, *NEW]), strict=True):
        with_tokenizer(path, vocabulary)
    return made


def aligned(paths):
    """The inputs with rows for all words, new ones in the order of their text."""
    order = [*WORDS, *sorted(NEW)]
    states = [tensors(path) for path in paths]
    for name in (EMBEDDING, HEAD):
        known = [
            dict(zip(words, state[name], strict=True))
            for words, state in zip((WORDS, WORDS, [*WORDS, *NEW]), states, strict=True)
        ]
        for state, rows in zip(states, known, strict=True):
            # A token that a model lacks gets the row of the one model that has it.
            state[name] = torch.stack([rows.get(word, known[2][word]) for word in order])
    return states


def in_two_processes(tmp_path, config):
    """Outputs and tokenizers of two processes that hash differently: by chance, and by a seed."""
    found = []
    for number, hashing in enumerate(({}, {"PYTHONHASHSEED": "1"})):
        out, _ = merge(tmp_path / f"process{number}", config, **hashing)
        vocabulary = json.loads((out / "tokenizer.json").read_text())
        files = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".md"}
        found.append((tensors(out), vocabulary, files))
    return found


@pytest.mark.parametrize("scope", ["tensor", pytest.param("model", marks=pytest.mark.slow)])
def test_two_processes_write_equal_files_that_equal_the_reference(tmp_path, paths, scope):
    parameters = {"scope": scope, "dare_density": 0.5, "density": 0.2, "seed": 4}
    config = configuration(paths, parameters=parameters, tokenizer={"source": "union"})
    first, second = in_two_processes(tmp_path, config)
    assert first[2] == second[2]
    added = {token["content"]: token["id"] for token in first[1]["added_tokens"]}
    assert [added[word] for word in sorted(NEW)] == list(range(64, 64 + len(NEW)))
    if scope == "model":
        states = aligned(paths)
        names = sorted(states[0])
        factors = [
            torch.cat([dare_factors(4, task, n, states[0][n].numel(), 0.5) for n in names])
            for task in range(2)
        ]
        expected = whole_reference(states, density=0.2, dare=torch.stack(factors))
    else:
        states = aligned(paths)
        expected = {
            name: reference(
                base,
                [state[name] for state in states[1:]],
                density=0.2,
                dare=torch.stack([dare_factors(4, i, name, base.numel(), 0.5) for i in range(2)]),
            )
            for name, base in states[0].items()
        }
    assert_equal_states(first[0], expected, states[0])


@pytest.mark.slow
def test_a_document_measured_in_one_process_fits_the_merge_in_another(tmp_path, paths):
    parameters = {"scope": "model", "dare_density": 0.5, "density": 0.2}
    config = configuration(paths, parameters=parameters, tokenizer={"source": "union"})
    own, _ = merge(tmp_path / "own", config)
    file, statistics = tmp_path / "c.yml", tmp_path / "s.json"
    file.write_text(yaml.safe_dump(config))
    run("mergekit-pcb", "measure", file, "-o", statistics, PYTHONHASHSEED="2")
    config["parameters"]["statistics"] = str(statistics)
    out, _ = merge(tmp_path / "reused", config)
    assert all(torch.equal(tensors(out)[n], t) for n, t in tensors(own).items())


def test_the_saved_tokenizer_reads_what_the_rows_say(tmp_path, paths):
    from transformers import AutoTokenizer

    config = configuration(paths, tokenizer={"source": "union"})
    out, _ = merge(tmp_path / "m", config)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = [3, *(64 + sorted(NEW).index(word) for word in ("zebra", "<|end|>", "new"))]
    assert tokenizer("w3 zebra <|end|> new")["input_ids"] == ids
    head = tensors(out)[HEAD]
    states = aligned(paths)
    # With one model that has a token, all rows of it are that model's.
    assert torch.equal(head[64:], states[2][HEAD][64:])


@pytest.mark.parametrize("source", ["base", "expert"])
def test_other_sources_keep_their_own_order(tmp_path, paths, source):
    chosen = {"base": "base", "expert": str(paths[2])}[source]
    out, _ = merge(tmp_path / "m", configuration(paths, tokenizer={"source": chosen}))
    vocabulary = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    expected = WORDS if source == "base" else [*WORDS, *NEW]
    assert sorted(vocabulary, key=vocabulary.get) == expected
