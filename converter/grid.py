"""Where the positions of a target (a sequence's, an image's) lie in a unit's state, and a target brought to them."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from diffusionblocks.converter.samples import Samples


class Grid(NamedTuple):
    """The target's positions as ``sizes`` along each of its dimensions, and the state's dimensions that hold them, with their sizes (``places``).

    Without places the positions are rows of the batch: a sample's one after another, or (``tiled``) all samples' first ones first.
    """

    sizes: tuple[int, ...]
    places: tuple[tuple[int, int], ...] = ()
    tiled: bool = False

    def along(self, values: torch.Tensor, dim: int, rank: int, samples: Samples) -> torch.Tensor:
        """[N, *sizes, C] as a tensor of ``rank`` dimensions: samples, channels and positions each in their place."""
        if not self.places:
            rows = (values.flatten(1, -2).transpose(0, 1) if self.tiled else values).flatten(0, -2)
            return rows if dim == rank - 1 else rows.t()
        if len(self.places) != len(self.sizes):
            values = values.flatten(1, -2).unflatten(1, [size for _, size in self.places])
        source = {samples.dim: 0, dim: values.dim() - 1} | {place: 1 + i for i, (place, _) in enumerate(self.places)}
        order = [source[d] for d in sorted(source)]
        values = values if order == sorted(order) else values.permute(order)
        for d in (d for d in range(rank) if d not in source):
            values = values.unsqueeze(d)
        return values


def grid_of(shape: tuple[Any, ...], dim: int, samples: Samples, positions: tuple[int, ...]) -> Grid | None:
    """The grid of a state of ``shape`` with its channels at ``dim``; None where the target's positions are not to be told in it."""
    places = [(d, size) for d, size in enumerate(shape) if d not in (dim, samples.dim)]
    sizes = [size for _, size in places]
    if not positions or not places or samples.repeat != 1 or samples.tiled:
        return None
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    same = [place for place in places if place[1] == positions[0]]
    if len(positions) == 1 and len(sizes) > 1 and len(same) == 1:  # others, such as heads, have one factor together
        return Grid(positions, tuple(same))
    if len(sizes) == len(positions):
        fits = all(have % want == 0 or want % have == 0 for have, want in zip(positions, sizes, strict=True))
        return Grid(tuple(sizes), tuple(places)) if fits else None
    divided = _divided(positions, prod(sizes))
    return None if divided is None or 1 not in (len(positions), len(sizes)) else Grid(divided, tuple(places))


def grid_of_rows(rows: Samples | None, rank: int, positions: tuple[int, ...]) -> Grid | None:
    """The grid of a state [positions x batch, C] (or its transpose), whose ``rows`` are the positions."""
    return Grid(positions, (), rows.tiled) if rows is not None and rank == 2 else None


def _divided(positions: tuple[int, ...], count: int) -> tuple[int, ...] | None:
    """The positions with every dimension divided by one number, so that there are ``count`` of them."""
    for by in range(1, gcd(*positions) + 1):
        sizes = tuple(size // by for size in positions)
        if all(size % by == 0 for size in positions) and prod(sizes) == count:
            return sizes
    return None


def resampled(values: torch.Tensor, have: Sequence[int], want: Sequence[int]) -> torch.Tensor:
    """[N, *have, C] -> [N, *want, C]: means over neighbours where there are fewer, repeated where there are more."""
    for i, (before, after) in enumerate(zip(have, want, strict=True)):
        at = 1 + i
        if before > after:
            values = values.unflatten(at, (after, before // after)).mean(at + 1)
        elif after > before:
            sizes = [-1] * (values.dim() + 1)
            sizes[at + 1] = after // before
            values = values.unsqueeze(at + 1).expand(sizes).flatten(at, at + 1)
    return values
