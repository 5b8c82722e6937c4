"""What README and docs say can be run is run, and what they quote is what is there."""

import importlib.util
import re
import shlex
import shutil

import pytest
import torch
import yaml
from checkpoints import run, save_family, tensors, tiny_llama
from conftest import DOCUMENTS, ROOT
from reference import pcb as reference
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

import mergekit_pcb.host.method
from mergekit_pcb.tools import small_llama

TEXTS = {path: path.read_text() for path in DOCUMENTS}
LINKS = [
    (path, link)
    for path, text in TEXTS.items()
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text)
]


#: Beginnings of commands in the documents that no test of this folder runs as they stand, and why.
NOT_RUN = {
    "python3 -m venv": "it takes a fresh environment; .ci/run makes one and runs pytest in it",
    "pip install": "the same",
    "pytest": "this is it",
    "ruff": "part of .ci/run",
    "mypy": "the same",
    "mkdocs serve": "it does not end; .ci/run builds the site",
    "mergekit-pytorch ia3.yml": "test_families.py merges (IA)³ adapters this way",
    "mv merged": "the same",
    "cp adapters": "the same",
    "python examples/python/adamerge.py": "test_examples.py runs it",
    "python -m benchmarks": "they take a GPU; test_benchmarks.py runs what needs none",
}


def blocks(language, *names):
    """All blocks of a language, in the documents of these names or in all."""
    texts = [text for path, text in TEXTS.items() if not names or path.name in names]
    return [block for text in texts for block in blocks_of(language, text)]


def blocks_of(language, text):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands():
    """The commands of all documents, without what is remarked on them."""
    told = blocks("sh") + blocks_of("sh", (ROOT / "CONTRIBUTING.md").read_text())
    lines = "\n".join(told).replace(" && ", "\n").splitlines()
    return [command for line in lines if (command := line.partition("  #")[0].strip())]


def test_the_first_configuration_and_command(tmp_path, monkeypatch):
    (text,) = blocks("yaml", "README.md")
    (command,) = [block for block in blocks("sh", "README.md") if block.startswith("mergekit-yaml")]
    paths = save_family(tmp_path / "models", tiny_llama(), tasks=2)
    for path, name in zip(paths[1:], ("code", "math"), strict=True):
        path.rename(path.with_name(name))
    (tmp_path / "pcb.yml").write_text(text)
    monkeypatch.chdir(tmp_path)
    run("mergekit-yaml", *command.split()[1:], "--no-copy-tokenizer")
    base, *tasks = [tensors(tmp_path / "models" / name) for name in ("base", "code", "math")]
    for name, tensor in tensors("merged").items():
        expected = reference(base[name], [task[name] for task in tasks], density=0.1)
        assert (tensor != expected.bfloat16()).double().mean() < 2e-3, name


def test_the_table_of_parameters_is_the_specification():
    pattern = r"^\| `(\w+)` \| (per model|top level) \| [^|]* \| ([^|]+) \|"
    rows = re.findall(pattern, TEXTS[ROOT / "docs" / "parameters.md"], re.M)
    specified = [
        (spec.name, "top level" if spec.scope == "shared" else "per model", spec.default)
        for spec in mergekit_pcb.host.method.PARAMETERS
    ]

    words = {"`none`": "none", "none": "", "`tensor`": "tensor"}
    words["`auto` with `refine: solve`, else 1"] = None

    def value(cell):
        return words[cell] if cell in words else float(cell)

    assert [(name, where, value(default)) for name, where, default in rows] == specified


def test_the_start_up_file_is_printed_whole():
    (line,) = [block for block in blocks("python") if "_autoload" in block]
    assert line == (ROOT / "startup" / "mergekit_pcb_init.pth").read_text()


@pytest.mark.parametrize(("path", "link"), LINKS, ids=lambda x: getattr(x, "name", x))
def test_links_lead_somewhere(path, link):
    file, _, heading = link.partition("#")
    target = path.parent / file if file else path
    assert target.exists()
    if heading:
        lines = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        named = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}
        assert heading in named


def test_the_readme_is_read_in_a_minute():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 150


def test_every_page_is_in_the_site():
    pages = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = [page for part in pages for own in part.values() for page in [own] if own]
    names = [name for page in named for name in ([page] if isinstance(page, str) else page)]
    assert sorted(names) == sorted(path.name for path in DOCUMENTS if path.parent.name == "docs")


def test_what_is_turned_is_what_there_is():
    """The README's six parameters and their defaults."""
    rows = re.findall(r"^\| `(\w+)` \| `?([\w.]+)`? \|", TEXTS[ROOT / "README.md"], re.MULTILINE)
    specified = {s.name: s.default for s in mergekit_pcb.host.method.PARAMETERS}
    assert len(rows) == 6
    for name, default in rows:
        assert str(specified[name]) == default, name


def test_the_interface_is_that_of_the_docstrings():
    spec = importlib.util.spec_from_file_location("interface", ROOT / "docs" / "interface.py")
    interface = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interface)
    assert TEXTS[ROOT / "docs" / "interface.md"] == interface.page(), "python docs/interface.py"
    shown = {thing.__name__ for thing in interface.THINGS}
    assert set(mergekit_pcb.__all__) - {"__version__"} <= shown


def test_the_formulas_are_on_the_page():
    (lines,) = [block for block in blocks("text") if "tanh" in block]
    for formula in ("exp(n·xᵢ²) · tanh(τᵢ·Σⱼτⱼ)", "(max(sᵢ, tᵢ) − tᵢ) / (max sᵢ − tᵢ)"):
        assert formula in lines


def test_yaml_blocks_are_configurations():
    for block in blocks("yaml"):
        assert yaml.safe_load(block)["merge_method"] == "pcb"


@pytest.mark.slow
def test_every_command_is_run_or_said_why_not(tmp_path, monkeypatch):
    """Those of the tools: on models as the pages name them, the search with two trials."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "score.py").symlink_to(ROOT / "examples" / "python" / "score.py")
    tokenizer = small_llama.new_tokenizer(["a tokenizer of bytes"])
    for path in save_family("models", tiny_llama(vocabulary=300), tasks=2):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    (tmp_path / "adapters" / "code").mkdir(parents=True)
    (tmp_path / "demo").mkdir()
    adapter = {"base_model.model.layer.ia3_l": torch.ones(4)}
    save_file(adapter, "adapters/code/adapter_model.safetensors")
    (text,) = blocks("yaml", "README.md")
    text = text.replace("models/code", "models/expert0").replace("models/math", "models/expert1")
    ran = set()
    for command in commands():
        if any(command.startswith(beginning) for beginning in NOT_RUN) or command.startswith("."):
            continue
        words = shlex.split(command)
        if words[1] == "search":
            words += ["--budget", "2"]
            shutil.rmtree("best.search", ignore_errors=True)  # of another page's command
        whole = "  scope: model\n" if words[1] == "measure" else ""
        for file in ("pcb.yml", "demo/pcb.yml"):
            (tmp_path / file).write_text(text.replace("parameters:\n", f"parameters:\n{whole}"))
        if words[1] != "demo" and tuple(words) not in ran:  # test_demo.py runs that
            run(*words)
        ran.add(tuple(words))
    assert {words[words[0] == "mergekit-pcb"] for words in ran} == {
        "check", "demo", "identity-adapter", "measure", "mergekit-yaml", "report", "search"
    }  # fmt: skip
    for file in (
        "merged",
        "identity.safetensors",
        "report/report.html",
        "statistics.json",
        "best.yml",
    ):
        assert (tmp_path / file).exists()


def test_reasons_are_of_commands_that_are_there():
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in commands()), beginning


def test_the_python_of_the_tools_runs():
    (block,) = [block for block in blocks("python", "python.md") if "adamerge" in block]
    model = torch.nn.Linear(6, 3)
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    experts = [{n: t + 0.1 * torch.randn(t.shape) for n, t in base.items()} for _ in range(2)]
    places = {
        "model": model,
        "base": base,
        "experts": experts,
        "batches": list(torch.randn(3, 8, 6)),
        "score": lambda state: -float(state["weight"].abs().sum()),
    }
    exec(block, places)
    assert set(places["merged"]) == set(base)
    assert places["found"].best.score >= places["found"].trials[0].score
