"""Everything random in one update, drawn from generators named by (seed, block, step): not by rank, process, or the blocks trained before.

An update's draws are made for its whole batch; ranks that share a block and parts of an accumulated batch take their slices of them. So however the batch is divided, the
update is the same up to the order of summation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.targets import beside


@dataclass(frozen=True)
class Draw:
    """One update's: ``rows`` int64 [N]; ``u`` float64 [b + 1, N] in [0, 1) and ``noise`` [b + 1, N, ...] of this block (last) and, in ``carry``, of
    those before; ``choice`` float64 [N, ...] in [0, 1), which pick classes by their probabilities."""

    rows: torch.Tensor
    u: torch.Tensor
    noise: torch.Tensor
    choice: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, of: slice) -> Draw:
        """The same of some samples."""
        return Draw(self.rows[of], self.u[:, of], self.noise[:, of], self.choice[of])


def step_seed(seed: int, block: int, step: int, rank: int = 0) -> int:
    """A seed that depends on (seed, block, step, rank) alone, by hash."""
    digest = hashlib.sha256(f"{seed}/{block}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_of(seed: int, block: int, step: int) -> torch.Generator:
    """The generator of an update's draws, on the CPU whatever the device."""
    return torch.Generator().manual_seed(step_seed(seed, block, step))


def draw(
    generator: torch.Generator,
    *,
    rows: int,
    batch: int,
    shape: Sequence[int],
    choices: Sequence[int] = (),
    levels: int = 1,
) -> Draw:
    """Draw for one update.

    Args:
        generator: :func:`generator_of` the update.
        rows: number of rows of the data, M.
        batch: number of samples, N; drawn with replacement.
        shape: of one sample of z.
        choices: of one sample's uniform numbers.
        levels: how many blocks' noise is drawn.
    """
    chosen = torch.randint(rows, (batch,), generator=generator)
    u = torch.rand(levels, batch, generator=generator, dtype=torch.float64)
    noise = torch.randn(levels, batch, *shape, generator=generator)
    return Draw(chosen, u, noise, torch.rand(batch, *choices, generator=generator, dtype=torch.float64))


def sigma_of(density: Any, u: torch.Tensor) -> torch.Tensor:
    """Noise levels [N] in float32 from u [N], by a block's training density."""
    return torch.from_numpy(np.asarray(density.sigma(u.numpy()), dtype=np.float32))


def tied_chain(
    densities: Sequence[Any], drawn: Draw, z: torch.Tensor, sigma: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(z, sigma) of the blocks before the last, tied: ``z_{a} = z_{a+1} + sqrt(s_a^2 - s_{a+1}^2) eps``, so that they add no evidence to z [N, ...]."""
    chain = [(z, sigma)]
    for a in reversed(range(len(drawn.u) - 1)):
        after, at = chain[0]
        before = torch.maximum(sigma_of(densities[a], drawn.u[a]).to(at.device), at)
        noise = drawn.noise[a].to(at.device)
        added = beside((before * before - at * at).clamp(min=0).sqrt(), noise) * noise
        chain.insert(0, (after + added, before))
    return chain[:-1]


def shares(count: int, *, parts: int, rank: int = 0, ranks: int = 1) -> Iterator[slice]:
    """The slices of ``count`` samples that one rank computes, in ``parts`` parts of nearly equal size; none is empty."""
    own = _cut(0, count, ranks)[rank]
    yield from (s for s in _cut(own.start, own.stop, parts) if s.stop > s.start)


def _cut(start: int, stop: int, count: int) -> list[slice]:
    edges = [start + (stop - start) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
