"""The mathematics of noise levels, in one place: preconditioning, partitions of the noise range, sampling steps.

Functions of sigma use operators only, so that they serve NumPy arrays and tensors alike. High sigma belongs to the FIRST layers: edges
descend, ``edges[b]`` and ``edges[b + 1]`` bound block b, and an edge belongs to the lower-sigma block.

Sources: Karras et al. 2022 (EDM, table 1 and equation 7-8); Shing, Koyama, Akiba 2026 (DiffusionBlocks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Protocol, TypeVar

import numpy as np
from diffusionblocks.runtime.errors import BadInput
from numpy.typing import NDArray

Array = TypeVar("Array")
Floats = NDArray[np.float64]
NORMAL = NormalDist()
LARGE = 2048
"""Rows of a table whose products with each other are not kept."""
CACHED = 2**18
"""Numbers of one pass over the noise levels: what a processor keeps at hand."""
LEAST_MASKED = 1e-3
"""The least share of masked tokens that is trained on."""


@dataclass(frozen=True)
class Schedule:
    """log sigma ~ N(p_mean, p_std^2) on [sigma_min, sigma_max]."""

    p_mean: float
    p_std: float
    sigma_min: float
    sigma_max: float


PAPER = Schedule(p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0)
"""The values of EDM and of the DiffusionBlocks paper."""


def c_in(sigma: Any, sigma_data: float) -> Any:
    """Scale of the network's input: 1 / sqrt(sigma^2 + sigma_data^2) (EDM, table 1)."""
    return (sigma * sigma + sigma_data * sigma_data) ** -0.5


def c_skip(sigma: Any, sigma_data: float) -> Any:
    """Weight of z in D: sigma_data^2 / (sigma^2 + sigma_data^2) (EDM, table 1)."""
    return sigma_data * sigma_data / (sigma * sigma + sigma_data * sigma_data)


def c_out(sigma: Any, sigma_data: float) -> Any:
    """Weight of F in D: sigma sigma_data / sqrt(sigma^2 + sigma_data^2) (EDM, table 1)."""
    return sigma * sigma_data * (sigma * sigma + sigma_data * sigma_data) ** -0.5


def edm_weight(sigma: Any, sigma_data: float) -> Any:
    """Loss weight per sample: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM, table 1); [N] -> [N]."""
    return (sigma * sigma + sigma_data * sigma_data) / (sigma * sigma_data) ** 2


def euler_step(z: Any, denoised: Any, sigma: Any, sigma_next: Any) -> Any:
    """One Euler step of the probability-flow ODE: z + (sigma' - sigma) / sigma (z - D) (EDM, algorithm 1)."""
    return z + (sigma_next - sigma) / sigma * (z - denoised)


class Density(Protocol):
    """The training distribution of sigma in one block."""

    upper: float
    lower: float

    def sigma(self, u: Floats) -> Floats:
        """Noise levels at the quantiles u in [0, 1)."""
        ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LogNormalDensity:
    """log sigma ~ N(p_mean, p_std^2), truncated to [lower, upper]."""

    upper: float
    lower: float
    p_mean: float
    p_std: float

    def sigma(self, u: Floats) -> Floats:
        low, high = (NORMAL.cdf((np.log(s) - self.p_mean) / self.p_std) for s in (self.lower, self.upper))
        quantiles = np.clip(low + np.asarray(u, np.float64) * (high - low), 1e-300, 1 - 1e-16)
        z = np.array([NORMAL.inv_cdf(float(q)) for q in quantiles.ravel()]).reshape(quantiles.shape)
        return np.clip(np.exp(self.p_mean + self.p_std * z), self.lower, self.upper)

    def to_json(self) -> dict[str, Any]:
        values = {"upper": self.upper, "lower": self.lower, "p_mean": self.p_mean, "p_std": self.p_std}
        return {"kind": "log-normal", **values}


@dataclass(frozen=True)
class InformationDensity:
    """Uniform in the share of I(y; z_sigma), given at the ascending ``sigmas``, between the shares of ``lower`` and ``upper``."""

    upper: float
    lower: float
    sigmas: tuple[float, ...]
    shares: tuple[float, ...]

    def sigma(self, u: Floats) -> Floats:
        logs = np.log(self.sigmas)
        first, last = np.interp(np.log([self.lower, self.upper]), logs, self.shares)
        share = first + np.asarray(u, np.float64) * (last - first)
        sigma = np.exp(np.interp(-share, -np.asarray(self.shares), logs))
        return np.clip(sigma, self.lower, self.upper)

    def between(self, upper: float, lower: float) -> InformationDensity:
        """The same curve on another interval."""
        return InformationDensity(upper, lower, self.sigmas, self.shares)

    def to_json(self) -> dict[str, Any]:
        curve = {"sigmas": list(self.sigmas), "shares": list(self.shares)}
        return {"kind": "information", "upper": self.upper, "lower": self.lower, **curve}


@dataclass(frozen=True)
class UniformDensity:
    """Uniform on [lower, upper]: of shares of masked tokens."""

    upper: float
    lower: float

    def sigma(self, u: Floats) -> Floats:
        return self.lower + np.asarray(u, np.float64) * (self.upper - self.lower)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "uniform", "upper": self.upper, "lower": self.lower}


def density_from_json(data: Mapping[str, Any]) -> LogNormalDensity | InformationDensity | UniformDensity:
    """The density that ``to_json`` wrote."""
    upper, lower = float(data["upper"]), float(data["lower"])
    if data["kind"] == "uniform":
        return UniformDensity(upper, lower)
    if data["kind"] == "log-normal":
        return LogNormalDensity(upper, lower, float(data["p_mean"]), float(data["p_std"]))
    if data["kind"] == "information":
        return InformationDensity(upper, lower, tuple(map(float, data["sigmas"])), tuple(map(float, data["shares"])))
    raise BadInput(f"The noise density {data['kind']!r} is not known.", hint="Use a newer diffusionblocks.")


def equal_probability_edges(num_blocks: int, schedule: Schedule = PAPER) -> tuple[float, ...]:
    """Edges at equal quantiles of the truncated log-normal, descending from sigma_max to sigma_min; B + 1 values."""
    inner = LogNormalDensity(schedule.sigma_max, schedule.sigma_min, schedule.p_mean, schedule.p_std).sigma(
        np.arange(1, num_blocks) / num_blocks
    )
    return (schedule.sigma_max, *(float(s) for s in inner[::-1]), schedule.sigma_min)


def information_share(
    table: NDArray[Any], sigmas: Sequence[float] | Floats, samples: int = 2048, seed: int = 0
) -> Floats:
    """Share of I(y; z_sigma) / log K left at each noise level, for y uniform over the rows of ``table`` [K, d].

    Monte Carlo over (y, eps), the same draws for every sigma: with z = E_y + sigma eps, I = log K + E[log p(y | z)]. Monotone by construction.
    """
    rows = np.asarray(table, np.float64)
    count = len(rows)
    rng = np.random.default_rng(seed)
    samples = min(samples, max(256, 2**22 // count))  # a sample of many rows costs more, and says more
    if count > LARGE:
        rows = rows.astype(np.float32)
    half = np.sum(rows * rows, axis=1) / 2  # [K]
    gram: NDArray[np.float32] | None = None
    if count <= LARGE:  # row y: <E_y, E_k> - |E_k|^2 / 2; a part at a time, since float64 takes twice as much
        gram = np.empty((count, count), np.float32)
        for a in range(0, count, 512):
            gram[a : a + 512] = rows[a : a + 512] @ rows.T - half
    chunk = max(1, min(samples, CACHED // count))
    left = np.zeros(len(sigmas))
    done = 0
    while done < samples:
        n = min(chunk, samples - done)
        y = (np.arange(done, done + n) * count // samples) if samples >= count else rng.integers(count, size=n)
        own = gram[y] if gram is not None else (rows[y] @ rows.T - half).astype(np.float32)  # [n, K]
        noise = (rng.standard_normal((n, rows.shape[1])) @ rows.T).astype(np.float32)  # [n, K]
        logits = np.empty_like(own)
        for i, sigma in enumerate(sigmas):  # own / sigma^2 + noise / sigma
            np.multiply(own, np.float32(1 / sigma), out=logits)
            logits += noise
            logits *= np.float32(1 / sigma)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(n), y]
            left[i] += (chosen - np.log(np.exp(logits, out=logits).sum(axis=1))).sum(dtype=np.float64)
        done += n
    shares = np.clip(1.0 + left / samples / np.log(count), 0.0, 1.0)
    return np.minimum.accumulate(shares)


def equal_information_edges(
    table: NDArray[Any], num_blocks: int, samples: int = 2048, seed: int = 0
) -> tuple[tuple[float, ...], InformationDensity]:
    """Edges at equal shares of I(y; z_sigma) between the sigmas of 0.99 and 0.01, descending; and the density over the whole range."""
    scale = float(np.sqrt(np.mean(np.sum(np.asarray(table, np.float64) ** 2, axis=1))))
    sigmas = scale * np.geomspace(1e-3, 1e3, 121)
    shares = information_share(table, sigmas, min(samples, max(64, 2**18 // len(table))), seed)
    inside = np.flatnonzero((shares < 0.999) & (shares > 0.001))
    if len(inside) == 0:
        raise BadInput("The target table holds no information to divide.", hint="Use --partition equal-probability.")
    fine = np.geomspace(sigmas[max(inside[0] - 1, 0)], sigmas[min(inside[-1] + 1, 120)], 49)
    shares = information_share(table, fine, samples, seed)
    strict = shares - 1e-9 * np.arange(len(fine))
    wanted = np.linspace(0.01, 0.99, num_blocks + 1)
    edges = np.exp(np.interp(-wanted, -strict, np.log(fine)))
    curve = InformationDensity(float(edges[0]), float(edges[-1]), tuple(map(float, fine)), tuple(map(float, strict)))
    return tuple(float(e) for e in edges), curve


def masked_edges(num_blocks: int) -> tuple[float, ...]:
    """Equal decrements of the share of masked tokens, from 1 down to :data:`LEAST_MASKED`; B + 1 values (MD4's linear schedule, Shi et al. 2024)."""
    return (*(1 - b / num_blocks for b in range(num_blocks)), LEAST_MASKED)


def widen(
    upper: float, lower: float, overlap: float, sigma_max: float, sigma_min: float, *, linear: bool = False
) -> tuple[float, float]:
    """An interval widened in log sigma (``linear``: in sigma itself) by ``overlap`` of its own width on each side, clipped; for training only."""
    if linear:
        added = (upper - lower) * overlap
        return min(upper + added, sigma_max), max(lower - added, sigma_min)
    factor = (upper / lower) ** overlap
    return min(upper * factor, sigma_max), max(lower / factor, sigma_min)


def block_of(sigma: float, edges: Sequence[float]) -> int:
    """The block whose interval holds sigma; an edge belongs to the lower-sigma block."""
    inner = edges[1:-1]
    return sum(sigma <= edge for edge in inner)


@dataclass(frozen=True)
class Step:
    """One evaluation of ``block`` at ``sigma``, and the Euler step down to ``sigma_next``."""

    block: int
    sigma: float
    sigma_next: float


def sampling_steps(edges: Sequence[float], num_steps: int) -> tuple[Step, ...]:
    """N steps on B blocks: N // B each, the remainder to the first blocks, geometric from a block's upper edge to its lower one.

    The last step goes to 0; sigma is above 0 in every evaluation. N < B runs blocks 0 .. N-1.

    Raises:
        BadInput: fewer than one step.
    """
    if num_steps < 1:
        raise BadInput(f"{num_steps} denoising steps were asked for.", hint="Give --steps of at least 1.")
    blocks = len(edges) - 1
    base, extra = divmod(num_steps, blocks)
    steps: list[Step] = []
    for b in range(blocks):
        count = base + (b < extra)
        upper, lower = edges[b], edges[b + 1]
        levels = [upper * (lower / upper) ** (i / count) for i in range(count)] + [lower]
        steps += [Step(b, levels[i], levels[i + 1]) for i in range(count)]
    steps[-1] = Step(steps[-1].block, steps[-1].sigma, 0.0)
    return tuple(steps)


def unmasking_steps(edges: Sequence[float], num_steps: int, start: float = 1.0) -> tuple[Step, ...]:
    """N steps from a share ``start`` of masked tokens down to none, on the blocks whose shares those are: a block's steps in proportion to its part of the way, equal decrements each.

    ``sigma`` is the share. A block with a part of the way has a step at least as long as there are steps for all of them; with fewer the most masked go first, and the last step goes to 0.

    Raises:
        BadInput: fewer than one step.
    """
    if num_steps < 1:
        raise BadInput(f"{num_steps} unmasking steps were asked for.", hint="Give --steps of at least 1.")
    lowers = (*edges[1:-1], 0.0)
    parts = [(b, min(start, edges[b]), lowers[b]) for b in range(len(edges) - 1) if start > lowers[b]]
    counts = [1] * len(parts)
    while sum(counts) < num_steps:  # to the longest decrement, the most masked first
        lengths = [(upper - lower) / count for (_, upper, lower), count in zip(parts, counts, strict=True)]
        counts[max(range(len(parts)), key=lambda i: (round(lengths[i], 12), -i))] += 1
    steps = []
    for (block, upper, lower), count in list(zip(parts, counts, strict=True))[:num_steps]:
        levels = [upper + (lower - upper) * i / count for i in range(count)] + [lower]
        steps += [Step(block, a, b) for a, b in pairwise(levels)]
    steps[-1] = Step(steps[-1].block, steps[-1].sigma, 0.0)
    return tuple(steps)
