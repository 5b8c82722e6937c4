"""The released PCB-Merging algorithm, sort-based and whole-vector, for comparison only.

Written after ``pcb-merging.py`` of duguodong7/pcb-merging at 5897888: the same steps on the
same shapes in the same order, two full sorts of ``n × d`` included.
"""

from __future__ import annotations

import torch


def released_pcb(tau: torch.Tensor, density: float, clip: float = 1e-4) -> torch.Tensor:
    """Merge task vectors ``[n, d]`` into one ``[d]``, holding everything in memory."""
    magnitude = _clamp(tau.abs(), clip, clip)
    clamped = tau.sign() * magnitude
    intra = torch.exp(len(tau) * _min_max(magnitude) ** 2)
    inter = torch.tanh(tau * tau.sum(dim=0))
    share = _min_max(_clamp(intra * inter, 1 - density, 0))
    return (clamped * share).sum(dim=0) / share.sum(dim=0).clamp(min=1e-12)


def _clamp(rows: torch.Tensor, below: float, above: float) -> torch.Tensor:
    d = rows.shape[1]
    ordered, _ = rows.sort(dim=1)
    lowest = ordered[:, int(d * below)].unsqueeze(1)
    highest = ordered[:, int(d * (1 - above) - 1)].unsqueeze(1)
    return torch.clamp(rows, lowest, highest)


def _min_max(rows: torch.Tensor) -> torch.Tensor:
    lowest = rows.amin(dim=1, keepdim=True)
    highest = rows.amax(dim=1, keepdim=True)
    return (rows - lowest) / (highest - lowest)
