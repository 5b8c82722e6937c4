"""PCB-Merging the slow, obvious way: whole vectors, float64, sorting; none of the package."""

import hashlib

import torch


def pcb(base, tasks, *, density=0.1, weight=1.0, lam=1.0, clip=1e-4, dare=None):
    """Merged tensor in float64; ``density`` and ``weight`` are one number or one per task.

    ``dare`` holds a factor per task and element: 0 where dropped, else 1 / dare_density.
    """
    n, shape = len(tasks), base.shape
    base = base.double().reshape(-1)
    densities = density if isinstance(density, (list, tuple)) else [density] * n
    weights = weight if isinstance(weight, (list, tuple)) else [weight] * n
    tau = torch.stack([task.double().reshape(-1) for task in tasks]) - base
    if dare is not None:
        tau = tau * dare.reshape(n, -1)
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


def mixed(place, bits):
    x, half = (place * 0x1E3779B1 + 0x3C6EF372) % 2**bits, (bits + 1) // 2
    for factor in (0x21F0AAAD, 0x735A2D97):
        x = (x ^ (x >> half)) * factor % 2**bits
    return x ^ (x >> half)


def kept_by_dare(seed, task, tensor, index, density):
    """Whether DARE keeps one element, in plain integers after what dare.py's first lines say."""
    block, place = divmod(index, 2**18)
    t = 2 * (mixed(place, 31) * 2**18 + mixed(place, 18)) + 1
    text = f"{seed} {task} {block} {tensor}".encode()
    digest = hashlib.blake2b(text, digest_size=8, person=b"mergekit-pcb").digest()
    a = int.from_bytes(digest[:4], "little") // 2 * 2
    k = int.from_bytes(digest[4:], "little") | 1
    square = (a + k * t) ** 2 % 2**32
    # Numbers from 2^31 on are the lower half: a device reads them as negative.
    return (square + 2**31) % 2**32 < 8 * round(density * 2**29)


def dare_factors(seed, task, tensor, count, density):
    """0 where an element is dropped, else 1 / density."""
    kept = [kept_by_dare(seed, task, tensor, index, density) for index in range(count)]
    return torch.tensor(kept, dtype=torch.float64) / density
