"""Dividing a trunk of L units into B blocks: by equal unit counts, equal parameters, or an explicit list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusionblocks.runtime.errors import BadInput


@dataclass(frozen=True)
class Partition:
    """``counts[b]`` units in block b, first layers first; ``rule``: units, parameters or explicit."""

    counts: tuple[int, ...]
    rule: str

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of each block's first unit."""
        return tuple(sum(self.counts[:b]) for b in range(len(self.counts)))

    @property
    def remainder(self) -> int:
        """Units left over by an equal division: spread over the first blocks under the rule ``units``."""
        return sum(self.counts) % len(self.counts)

    def describe(self) -> str:
        text = f"{sum(self.counts)} units in {len(self.counts)} blocks: {', '.join(map(str, self.counts))}"
        if self.rule == "units" and self.remainder:
            text += f" (remainder {self.remainder} spread over the first blocks)"
        return text


def partition(unit_parameters: Sequence[int], num_blocks: int, split: str | Sequence[int] = "units") -> Partition:
    """Divide units into contiguous blocks.

    Args:
        unit_parameters: parameters of each unit, first layers first.
        num_blocks: B.
        split: ``units`` (equal counts, remainder to the first blocks), ``parameters`` (the largest block as small as it
            can be), or the unit counts themselves.

    Raises:
        BadInput: more blocks than units, or counts that do not add up.
    """
    units = len(unit_parameters)
    if not isinstance(split, str):
        counts = tuple(int(c) for c in split)
        if any(c < 1 for c in counts) or sum(counts) != units:
            raise BadInput(
                f"The split {','.join(map(str, counts))} does not divide the {units} units of this trunk.",
                hint=f"Give counts of at least 1 that add up to {units}.",
            )
        return Partition(counts, "explicit")
    if num_blocks < 1:
        raise BadInput(f"{num_blocks} blocks were asked for.", hint="Give --num-blocks of at least 1.")
    if num_blocks > units:
        raise BadInput(
            f"{num_blocks} blocks were asked for, but the trunk has {units} residual units.",
            hint=f"Give --num-blocks of at most {units}; `dbconvert inspect` lists the units.",
        )
    if split == "units":
        base, extra = divmod(units, num_blocks)
        return Partition(tuple(base + (b < extra) for b in range(num_blocks)), "units")
    if split == "parameters":
        return Partition(_balance(unit_parameters, num_blocks), "parameters")
    raise BadInput(f"The split {split!r} is not known.", hint="Use units, parameters, or counts such as 4,4,2.")


def _balance(weights: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Contiguous groups whose largest sum is least (dynamic programming, exact)."""
    n = len(weights)
    prefix = [0]
    for w in weights:
        prefix.append(prefix[-1] + w)
    best = [[float("inf")] * (n + 1) for _ in range(num_blocks + 1)]
    cut = [[0] * (n + 1) for _ in range(num_blocks + 1)]
    best[0][0] = 0
    for b in range(1, num_blocks + 1):
        for j in range(b, n + 1):
            for i in range(b - 1, j):
                largest = max(best[b - 1][i], prefix[j] - prefix[i])
                if largest < best[b][j]:
                    best[b][j], cut[b][j] = largest, i
    counts, end = [], n
    for b in range(num_blocks, 0, -1):
        counts.append(end - cut[b][end])
        end = cut[b][end]
    return tuple(counts[::-1])
