"""Shared fixtures. Warnings are errors: silence here would be silence for users."""

import contextlib
import os
import pathlib

# Threads of several of pytest's workers share the cores: they sleep where they wait, or they take
# a fifth of the time from one another. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import filelock
import pytest
import torch

from mergekit_pcb.core import cells, fused, ranks, sample, tally, vectors
from mergekit_pcb.core.vectors import STRIP

# The compiled loops run in the tests' small merges, too; test_fused.py runs both ways.
os.environ.setdefault(fused.SWITCH, "1")

ON_GPU = torch.cuda.is_available()
if not ON_GPU:  # Triton's interpreter runs its kernels; read when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

FLATTEN = vectors.Aligned.of
ROOT = pathlib.Path(__file__).resolve().parent.parent
#: What is read: the README and every page of the documentation.
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tensors are merged, such as cuda")


def pytest_configure(config):
    """Have all tensors merged on a device: those in memory are moved there and back."""
    device = config.getoption("--device")
    if device == "cpu":
        return
    import checkpoints

    from mergekit_pcb.host.prepared import Prepared

    merged, contributions = Prepared.merged, Prepared.contributions

    def of(name, base, tasks):
        return FLATTEN(name, base.to(device), [task.to(device) for task in tasks])

    def parts_of(prepared):
        parts, spectrum = contributions(prepared)
        return tuple(part.cpu() for part in parts), spectrum

    vectors.Aligned.of = staticmethod(of)
    Prepared.merged = lambda prepared: merged(prepared).cpu()
    Prepared.contributions = parts_of
    if device.startswith("cuda"):
        checkpoints.FLAGS.append("--cuda")


@contextlib.contextmanager
def pieces(size):
    """Cut tensors into chunks of ``size`` and let statistics hold hardly more; None: as shipped."""
    with pytest.MonkeyPatch.context() as patch:
        if size is not None:
            patch.setattr(vectors, "CPU_CHUNK_ELEMENTS", size)
            patch.setattr(vectors, "CPU_THREADS_PER_CHUNK", 1024)
            patch.setattr(ranks, "POOL_ELEMENTS", 8 * size)
            patch.setattr(sample, "FEW_ELEMENTS", 8 * size)
            patch.setattr(ranks, "LARGEST_POOL", 64 * size)
            patch.setattr(cells, "CELLS", 64)
            patch.setattr(cells, "SLICE_ELEMENTS", 10 * size)
            patch.setattr(sample, "LARGEST_SAMPLE", 16 * size)
            patch.setattr(fused, "BLOCK_ELEMENTS", -(-size // STRIP) * STRIP)
            for name in ("SMALLEST_PIECE", "LARGEST_PIECE"):
                patch.setattr(fused, name, 10 * size)
            patch.setattr(tally, "KEPT_ELEMENTS", 4 * size)
        yield


@pytest.fixture
def as_given():
    """Tensors stay where a test puts them, with ``--device`` too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors.Aligned, "of", FLATTEN)
        yield


@pytest.fixture(params=[None, 5], ids=["chunks as shipped", "chunks of five"])
def chunked(request):
    with pieces(request.param):
        yield


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A tiny Llama in several shards with an untied head, and three experts of it."""
    from checkpoints import save_family, tiny_llama

    directory = tmp_path_factory.mktemp("family")
    return save_family(directory, tiny_llama(), shard_size="60KB")


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory, worker_id):
    """A shortened demo's folder, and what it printed; made once for all of pytest's workers."""
    from checkpoints import run

    place = tmp_path_factory.getbasetemp()
    place = place if worker_id == "master" else place.parent
    directory, printed = place / "the demo", place / "printed"
    with filelock.FileLock(place / "demo.lock"):
        if not printed.exists():
            steps = ("--base-steps", "25", "--expert-steps", "15")
            said = run("mergekit-pcb", "demo", directory, "--seed", "3", *steps).stdout
            printed.write_text(said, encoding="utf-8")
    return directory, printed.read_text(encoding="utf-8")
