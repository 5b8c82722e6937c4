"""PCB-Merging the slow, obvious way: whole vectors, float64, sorting; none of the package."""

import torch


def pcb(base, tasks, *, density=0.1, weight=1.0, lam=1.0, clip=1e-4):
    """Merged tensor in float64; ``density`` and ``weight`` are one number or one per task."""
    n, shape = len(tasks), base.shape
    base = base.double().reshape(-1)
    densities = density if isinstance(density, (list, tuple)) else [density] * n
    weights = weight if isinstance(weight, (list, tuple)) else [weight] * n
    tau = torch.stack([task.double().reshape(-1) for task in tasks]) - base
    d, total = base.numel(), tau.sum(0)
    numerator, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for row, kept, coefficient in zip(tau, densities, weights, strict=True):
        if d == 0:
            break
        ordered = row.abs().sort().values
        low, high = ordered[int(d * clip)], ordered[int(d * (1 - clip) - 1)]
        rank = int(d * (1 - kept))
        if low >= high or rank >= d:
            continue
        magnitude = row.abs().clamp(low, high)
        x = (magnitude - low) / (high - low)
        score = torch.exp(n * (x**2 - 1)) * torch.tanh(row * total)
        threshold, peak = score.sort().values[rank], score.max()
        if threshold >= peak:
            continue
        share = (score.clamp(min=threshold) - threshold) / (peak - threshold)
        numerator += coefficient * share * magnitude * row.sign()
        divisor += share
    return (base + lam * numerator / divisor.clamp(min=1e-12)).reshape(shape)
