"""AdaMerging + PCB on small classifiers: coefficients learned without labels.

A classifier of scanned digits and three experts of it, each fine-tuned on digits that are written
in another manner, one of them only a little. AdaMerging starts from one coefficient for all and
finds one for each from unlabelled images, by making the predictions certain.

    pip install scikit-learn
    python examples/python/adamerge.py [SEEDS]
"""

import statistics
import sys

import torch
from sklearn.datasets import load_digits

from mergekit_pcb import adamerge, combine, contributions

MANNERS = {
    "moved": lambda images: images.roll(1, -1),
    "dim": lambda images: 0.3 * images + 0.5,
    "slanted": lambda images: torch.stack(
        [images[:, row].roll((row - 3) // 2, -1) for row in range(8)], 1
    ),
}
# Steps and rate of each expert.
TRAINING = {"moved": (150, 1e-3), "dim": (150, 3e-4), "slanted": (150, 1e-3)}
DENSITY = 0.2
FIXED = (0.3, 0.5, 0.7, 1.0, 1.3, 1.6)


class Classifier(torch.nn.Module):
    """Features of length one against ten fixed directions, so that logits have bounds.

    Where larger logits are to be had by larger weights, entropy falls that way and nothing is won.
    """

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(64, 256),
            torch.nn.GELU(),
            torch.nn.Linear(256, 256),
            torch.nn.GELU(),
            torch.nn.Linear(256, 32),
        )
        directions = torch.linalg.qr(torch.randn(32, 10)).Q
        self.register_buffer("directions", directions, persistent=False)

    def forward(self, images):
        features = torch.nn.functional.normalize(self.layers(images), dim=-1)
        return 12 * features @ self.directions


def train(model, images, labels, steps, rate):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,))
        loss = torch.nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def main(seed):
    """The accuracies in % of fixed coefficients and of learned ones, on test images."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    known, unlabelled, test = order.split([897, 450, 450])

    torch.manual_seed(seed)
    model = Classifier()
    base = train(model, images[known], labels[known], 300, 1e-3)
    experts = []
    for name, manner in MANNERS.items():
        model.load_state_dict(base)
        experts.append(train(model, manner(images[known]), labels[known], *TRAINING[name]))

    @torch.no_grad()
    def accuracy(state):
        model.load_state_dict(state)
        right = [model(m(images[test])).argmax(-1) == labels[test] for m in MANNERS.values()]
        return 100 * float(torch.stack(right).float().mean())

    parts = contributions(base, experts, density=DENSITY)
    found = {f"fixed at {x:g}": accuracy(combine(base, parts, [x] * len(parts))) for x in FIXED}
    batches = [m(images[rows]) for rows in unlabelled.split(150) for m in MANNERS.values()]
    for granularity in ("task", "layer"):
        adapted = adamerge(
            model, base, experts, batches, granularity, epochs=40, start=0.3, density=DENSITY
        )
        found[f"learned per {granularity}, from 0.3"] = accuracy(adapted.state_dict)
    return {"base": accuracy(base), **found}


if __name__ == "__main__":
    # Rates and epochs were chosen on other seeds than these.
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    results = [main(seed) for seed in range(100, 100 + count)]
    for name in results[0]:
        values = [result[name] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:<28}{statistics.mean(values):6.1f} ± {spread:.1f} %")
