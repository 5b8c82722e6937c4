r"""A score for `mergekit-pcb search`: the negative mean loss of a model on files of its kinds.

For the models of `mergekit-pcb demo`, on installed C++, stubs of Python and fields of packages that
the demo does not train on. The last number printed is the score.

    mergekit-pcb search demo/pcb.yml -o best.yml \
        --evaluate 'python examples/python/score.py {model}'
"""

import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SITE = pathlib.Path(torch.__file__).parents[1]
KINDS = {
    "c++": sorted(SITE.glob("torch/include/ATen/ops/*.h")),
    "stubs": sorted(SITE.glob("torch/**/*.pyi")),
    "metadata": sorted(SITE.glob("*.dist-info/WHEEL")),
}
FILES = 40
CHARACTERS_PER_FILE = 2_000
SEQUENCES, CONTEXT = 64, 128


@torch.no_grad()
def main(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = {}
    for kind, files in KINDS.items():
        texts = [file.read_text(errors="ignore")[:CHARACTERS_PER_FILE] for file in files[:FILES]]
        tokens = tokenizer("\n".join(texts))["input_ids"][: SEQUENCES * CONTEXT]
        rows = torch.tensor(tokens[: len(tokens) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
        losses[kind] = float(model(input_ids=rows, labels=rows).loss)
    print(losses)
    print(-sum(losses.values()) / len(losses))


if __name__ == "__main__":
    main(sys.argv[1])
