"""The released algorithm's own numbers (``golden/``: run in float64, provenance in each file)."""

import json
import pathlib

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from safetensors import safe_open

VECTORS = sorted(
    path
    for path in (pathlib.Path(__file__).parent / "golden").glob("*.safetensors")
    if not path.name.startswith("whole_model")
)
# Of the delta's norm. From float32 the arithmetic is float32; the stored result, base plus
# delta, is compared in double.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def test_every_golden_vector_is_here():
    assert len(VECTORS) == 8


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("chunked")
def test_equals_the_released_algorithm(path, dtype):
    with safe_open(path, "pt") as file:
        recorded = file.metadata()
        base, tasks = file.get_tensor("base"), file.get_tensor("tasks")
        delta, merged = file.get_tensor("delta"), file.get_tensor("merged")
    result = merge_tensors(
        [base.to(dtype), *tasks.to(dtype)],
        "pcb",
        base_index=0,
        parameters={
            "density": float(recorded["density"]),
            "clip": float(recorded["clip"]),
            "lambda": float(recorded["lambda"]),
            "weight": json.loads(recorded["task_weights"]),
        },
    )
    assert result.dtype == dtype
    assert (result.double() - merged).norm() <= TOLERANCE[dtype] * delta.norm()
