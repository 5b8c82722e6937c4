"""PCB-Merging the slow, obvious way: whole vectors, float64, sorting; none of the package."""

import functools
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


def philox(counter, key):
    """Philox4x64-10 in plain integers: four words of 64 bits (Salmon et al., SC 2011)."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (
            (second >> 64) ^ b ^ low,
            second % 2**64,
            (first >> 64) ^ d ^ high,
            first % 2**64,
        )
        low, high = (low + 0x9E3779B97F4A7C15) % 2**64, (high + 0xBB67AE8584CAA73B) % 2**64
    return a, b, c, d


@functools.lru_cache(maxsize=4096)
def words(seed, task, tensor, block, top):
    """Sixteen words of 16 bits, those of the elements from 16 block on."""
    text = f"{seed} {task} {tensor}".encode()
    digest = hashlib.blake2b(text, digest_size=16, person=b"mergekit-pcb").digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    counter = block + 1
    drawn = philox((counter % 2**64, counter >> 64, 0, top), key)
    return [word >> shift & 0xFFFF for word in drawn for shift in (0, 16, 32, 48)]


def kept_by_dare(seed, task, tensor, index, density):
    """Whether DARE keeps one element, in plain integers after what dare.py's first lines say."""
    first, second = (words(seed, task, tensor, index // 16, top)[index % 16] for top in (0, 1))
    return first * 2**16 + second < round(density * 2**32)


def dare_factors(seed, task, tensor, count, density):
    """0 where an element is dropped, else 1 / density."""
    kept = [kept_by_dare(seed, task, tensor, index, density) for index in range(count)]
    return torch.tensor(kept, dtype=torch.float64) / density


def refined(base, tasks, prior, *, weights=None, anchor=0.1, spectrum=None, lam=1.0, dare=None):
    """One matrix ``[out, in]`` solved for and its spectrum evened, in float64; returns base + M.

    ``prior`` is PCB's merged task vector at lambda 1; ``anchor`` ``None`` keeps it; ``spectrum``
    ``None`` takes the exponent from the task vectors. Inverse and singular values are torch's.
    """
    base, prior = base.double(), prior.double()
    taus = [task.double() - base for task in tasks]
    taus = taus if dare is None else [tau * own for tau, own in zip(taus, dare, strict=True)]
    weights = [1.0] * len(taus) if weights is None else weights
    changed = [(w, tau) for w, tau in zip(weights, taus, strict=True) if tau.any()]
    if not changed:
        return base
    matrix = prior
    if anchor is not None:
        grams = [tau.T @ tau / tau.square().sum() for _, tau in changed]
        ridge = anchor * sum(grams).diagonal().mean()
        right = sum(w * tau @ g for (w, tau), g in zip(changed, grams, strict=True))
        system = sum(grams) + ridge * torch.eye(base.shape[1], dtype=torch.float64)
        matrix = torch.linalg.solve(system.T, (right + ridge * prior).T).T
    if spectrum is None:
        norms = sum(tau.square().sum() for _, tau in changed)
        spectrum = float(sum(tau for _, tau in changed).norm() / (len(changed) * norms).sqrt())
        spectrum = 1.0 if len(changed) == 1 else spectrum
    return base + lam * evened(matrix, spectrum)


def evened(matrix, exponent):
    """The spectrum raised to a power, directions below 1e-3 of the largest raised no further."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    if exponent == 1 or not values.numel() or values[0] == 0:
        return matrix.double()
    raised = values * (values / values[0]).clamp(min=1e-3) ** (exponent - 1)
    return (left * (raised * values.norm() / raised.norm())) @ right
