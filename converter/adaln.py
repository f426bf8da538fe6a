"""AdaLN conditioning of residual units, inserted so that the network's function is unchanged until it is trained.

With ``c = MLP(fourier(c_noise(sigma))) + W(c_in(sigma) z)`` (Karras et al. 2022 for c_in and c_noise; Peebles & Xie 2023 for adaLN-Zero),
a unit ``z + f(norm(z))`` becomes ``z + (1 + gate(c)) * f(norm(z) * (1 + scale(c)) + shift(c))``. All scales, shifts and gates of a block are made by
one linear projection whose weight and bias start at zero, and ``n * (1 + 0) + 0 == n`` to the bit. Everything before the projection has its
usual random start: were it zero as well, no gradient would ever pass.

Where a branch holds a norm, its first norm's output is modulated; where it holds none (post-norm units), the branch's input is.

Where the target has positions (a sequence, an image), c is made at each: where a unit's state has the same positions, or a whole multiple or part of them along
each dimension, its factors follow them (``grid``); elsewhere it gets those of the mean over positions.

A block that is modulated already (by a time step, a class: ``modulated``) keeps its own conditioning and gets no second one: its scales, shifts and
gates become ``m + W c``, with W zero at first.

Requires: a flat captured graph with the trunk found in it. Ensures: placeholders for z and sigma behind the others; one
conditioner a block, a product and sums at every branch; all else as it was.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from diffusionblocks.converter.blank import blank
from diffusionblocks.converter.graph import NORMS, GraphView, is_tensor, module_path, op_name, value
from diffusionblocks.converter.grid import Grid, grid_of, grid_of_rows, resampled
from diffusionblocks.converter.modulated import OwnModulation, own_modulations
from diffusionblocks.converter.residual import Found
from diffusionblocks.converter.samples import Samples, as_text, batch_symbols, rows_of_positions, samples_of
from diffusionblocks.converter.targets import beside
from diffusionblocks.converter.units import Unit
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.errors import BadInput
from torch import fx, nn
from torch.nn import functional as F

Z, SIGMA = "adaln_z", "adaln_sigma"
"""Names of the placeholders of the noisy target [N, d] and its noise level [N]."""

FREQUENCIES = 8
BUDGET = 0.05
"""Share of a block's parameters that its conditioning may add."""


@dataclass(frozen=True)
class Factor:
    """A value a block's conditioner makes: ``size`` channels at dimension ``dim`` of a tensor of ``rank`` dimensions, the samples as ``samples`` says
    and 1 elsewhere, but for the positions of ``grid``; 1 + it if ``scales``."""

    size: int
    dim: int
    rank: int
    scales: bool
    samples: Samples
    grid: Grid | None = None

    @property
    def layout(self) -> tuple[int, int, bool, Samples, Grid | None]:
        return self.rank, self.dim, self.scales, self.samples, self.grid


class Conditioner(nn.Module):
    """``c = SiLU(MLP(fourier(c_noise)) + W(c_in z))`` and all factors made of it; z [N, *positions, d], sigma [N] -> one tensor a factor.

    ``projection`` is zero at first: every scale and gate is 1, every shift 0. Its rows are ordered by the factors' layouts; ``rows`` are the
    factors' sizes in that order.
    """

    frequencies: torch.Tensor

    def __init__(
        self,
        target_dim: int,
        width: int,
        sigma_data: float,
        factors: Sequence[Factor],
        positions: tuple[int, ...] = (),
        reads_z: bool = True,
    ) -> None:
        super().__init__()
        self.sigma_data, self.positions = sigma_data, positions
        self.noise = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.target = nn.Linear(target_dim, width, bias=False) if reads_z else None
        self.register_buffer(
            "frequencies", torch.exp(torch.linspace(0.0, math.log(32.0), FREQUENCIES)), persistent=False
        )
        grids = list(dict.fromkeys(f.grid for f in factors))
        self.layouts = tuple(sorted(dict.fromkeys(f.layout for f in factors), key=lambda of: grids.index(of[4])))
        groups = [[i for i, f in enumerate(factors) if f.layout == of] for of in self.layouts]
        self.sizes = tuple(tuple(factors[i].size for i in group) for group in groups)
        order = [i for group in groups for i in group]
        self.places = tuple(order.index(i) for i in range(len(factors)))
        self.rows = tuple(size for sizes in self.sizes for size in sizes)
        self.projection = nn.Linear(width, sum(self.rows), device="meta")
        self.projection.weight = nn.Parameter(blank((sum(self.rows), width)))
        self.projection.bias = nn.Parameter(blank((sum(self.rows),)))

    def forward(self, z: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        angle = (0.25 * sigma.log())[:, None] * self.frequencies  # [N, FREQUENCIES]
        noise = self.noise(torch.cat([angle.cos(), angle.sin()], dim=-1))  # [N, width]
        scaled = None if self.target is None else beside(schedule.c_in(sigma, self.sigma_data), z) * z
        factors: list[torch.Tensor] = []
        at = 0
        for grid, group in groupby(zip(self.layouts, self.sizes, strict=True), key=lambda of: of[0][4]):
            members = list(group)
            counts = [sum(sizes) for _, sizes in members]
            made = self._projected(noise, scaled, grid, slice(at, at := at + sum(counts)))
            parts = made.split(counts, dim=-1) if len(counts) > 1 else (made,)
            for ((rank, dim, scales, samples, _), sizes), part in zip(members, parts, strict=True):
                laid = _along(part, dim, rank, samples) if grid is None else grid.along(part, dim, rank, samples)
                factors += (1 + laid if scales else laid).split(list(sizes), dim=dim)
        return tuple(factors[place] for place in self.places)

    def _projected(
        self, noise: torch.Tensor, scaled: torch.Tensor | None, grid: Grid | None, rows: slice
    ) -> torch.Tensor:
        """Rows ``rows`` of all that is made of c_in z [N, *positions, d], at the positions of a grid or of the mean over all: [N, *sizes, rows]."""
        if self.target is None or scaled is None:
            c = F.silu(noise)
        else:
            if grid is not None:
                scaled = resampled(scaled, self.positions, grid.sizes)
            elif self.positions:
                scaled = scaled.flatten(1, -2).mean(1)
            c = F.silu(beside_channels(noise, scaled) + self.target(scaled))
        if rows == slice(0, sum(self.rows)):
            made: torch.Tensor = self.projection(c)
            return made
        return F.linear(c, self.projection.weight[rows], self.projection.bias[rows])


def beside_channels(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[N, C] so that it broadcasts over [N, ..., C]."""
    for _ in range(like.dim() - values.dim()):
        values = values.unsqueeze(1)
    return values


def _along(values: torch.Tensor, dim: int, rank: int, samples: Samples) -> torch.Tensor:
    """[N, C] as a tensor of ``rank`` dimensions that holds C at ``dim`` and the samples as ``samples`` says, and broadcasts over the others."""
    if samples.repeat > 1:
        each = values.unsqueeze(0 if samples.tiled else 1)
        values = each.expand(*((samples.repeat, -1) if samples.tiled else (-1, samples.repeat)), -1).flatten(0, 1)
    if samples.dim > dim:
        values = values.t()
    for d in range(rank):
        if d not in (samples.dim, dim):
            values = values.unsqueeze(d)
    return values


@dataclass(frozen=True)
class Site:
    """Where one branch is modulated: ``at`` (a norm's output or the fork), ``end`` (the branch), channels and their dimensions."""

    at: fx.Node
    norm: bool
    end: fx.Node
    region: frozenset[fx.Node]
    at_channel: int
    end_channel: int


def sites(view: GraphView, unit: Unit) -> tuple[Site, ...]:
    """The places of ``unit`` that AdaLN modulates, one a branch."""
    found = []
    for branch in unit.branches:
        region = frozenset(view.members(view.region(unit.fork, branch)))
        norm = next(
            (n for n in sorted(region, key=lambda n: view.index[n]) if op_name(n) in NORMS and is_tensor(n)), None
        )
        channel = stream_channel(view, unit.fork, region)
        end_channel = channel if value(branch).dim() == value(unit.fork).dim() else value(branch).dim() - 1
        if norm is None:
            found.append(Site(unit.fork, False, branch, region, channel, end_channel))
        else:
            found.append(Site(norm, True, branch, region, norm_channel(norm), end_channel))
    return tuple(found)


def norm_channel(norm: fx.Node) -> int:
    """Channel dimension of a norm's output: the last for layer and RMS norms, 1 for batch and group norms."""
    return value(norm).dim() - 1 if op_name(norm) in ("layer_norm", "native_layer_norm", "rms_norm") else 1


def stream_channel(view: GraphView, node: fx.Node, within: frozenset[fx.Node] | None = None) -> int:
    """Channel dimension of a tensor, told by the nearest layer that reads it, else by the nearest that made it.

    1 where that is a convolution, batch or group norm, the last where it is a linear layer or a layer norm; the search passes
    operators that keep the layout. Falls back to the last dimension.
    """
    for forward in (True, False):
        queue, seen = [node], {node}
        while queue:
            current = queue.pop(0)
            near = sorted(current.users, key=lambda n: view.index.get(n, 0)) if forward else view.data_inputs(current)
            for other in near if forward else [current, *near]:
                if (other in seen and other is not current) or (forward and within is not None and other not in within):
                    continue
                name = op_name(other)
                if name.startswith("conv") or name in ("batch_norm", "group_norm", "instance_norm"):
                    return 1
                if name in ("linear", "layer_norm", "native_layer_norm", "rms_norm", "addmm"):
                    return int(value(node).dim()) - 1
                if other in seen:
                    continue
                seen.add(other)
                if (
                    is_tensor(other)
                    and str(value(other).shape) == str(value(node).shape)
                    and name not in ("permute", "transpose")
                ):
                    queue.append(other)
    return int(value(node).dim()) - 1


def width_for(factors: Sequence[Factor], target_dim: int, block_parameters: int) -> int:
    """The largest width whose conditioner stays under :data:`BUDGET` of the block's parameters (at least 1)."""
    channels = sum(factor.size for factor in factors)
    budget = BUDGET * block_parameters
    width = 1
    while width < 256 and _parameters(width + 1, channels, target_dim) <= budget:
        width += 1
    return width


def _parameters(width: int, channels: int, target_dim: int) -> int:
    return channels * (width + 1) + (2 * FREQUENCIES + 1) * width + width * (width + 1) + target_dim * width


def _channels(node: fx.Node, dim: int) -> int:
    return int(value(node).shape[dim])


def insert(
    module: fx.GraphModule,
    found: Found,
    blocks: Sequence[Sequence[Unit]],
    *,
    target_dim: int,
    sigma_data: float,
    block_parameters: Sequence[int],
    seed: int,
    positions: tuple[int, ...] = (),
    every_position: bool = False,
    reads_z: bool = True,
) -> tuple[str, ...]:
    """Insert a conditioner per block, and what it makes at every branch, into ``module`` (in place).

    ``found`` must be what was found in ``module`` itself; ``positions`` are the target's, at each of which all units must
    be conditioned with ``every_position``; without ``reads_z`` c is made of the noise level alone. Weights are drawn from (seed, block) alone, so that a block's start does not depend
    on the others. Returns, for each block, the name of its conditioner.

    Raises:
        NotPerSample: it cannot be told where the samples lie in what is to be modulated.
        BadInput: nor where the positions lie, and ``every_position`` asks for that.
    """
    graph, view = module.graph, found.view
    symbols = batch_symbols(graph.nodes)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    batch = value(last).shape[0]
    with graph.inserting_after(last):
        z = graph.placeholder(Z)
    with graph.inserting_after(z):
        sigma = graph.placeholder(SIGMA)
    fake = value(last).fake_mode if hasattr(value(last), "fake_mode") else None
    z.meta["val"] = _fake(fake, batch, *positions, target_dim)
    sigma.meta["val"] = _fake(fake, batch)
    added = []
    whole = positions if every_position else None
    places = [places_of(found, units) for units in blocks]  # before the graph changes
    wanted = [[_factors_of(view, place, symbols, positions if reads_z else ()) for place in at] for at in places]
    for b, at in enumerate(places):
        factors = [factor for of in wanted[b] for factor in of]
        _check_positions(at, wanted[b], whole)
        width, name = width_for(factors, target_dim, block_parameters[b]), f"conditioner_{b:02d}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1000003 + b)
            module.add_submodule(name, Conditioner(target_dim, width, sigma_data, factors, positions, reads_z))
        with graph.inserting_after(sigma):
            made = graph.call_module(name, (z, sigma))
        values = []
        made.meta["val"] = tuple(_fake(fake, *shape_of(factor, batch)) for factor in factors)
        for i in reversed(range(len(factors))):
            with graph.inserting_after(made):
                values.append(graph.call_function(operator.getitem, (made, i)))
            values[-1].meta["val"] = made.meta["val"][i]
        given = iter(values[::-1])
        for place, of in zip(at, wanted[b], strict=True):
            _apply(graph, place, [next(given) for _ in of], values[0])
        added.append(name)
    graph.lint()
    module.recompile()
    return tuple(added)


def _check_positions(
    places: Sequence[Site | OwnModulation],
    wanted: Sequence[Sequence[Factor]],
    positions: tuple[int, ...] | None,
) -> None:
    for place, of in zip(places, wanted, strict=True):
        if positions is None or all(f.grid is not None and f.grid.sizes == positions for f in of):
            continue
        node = place.operand if isinstance(place, OwnModulation) else place.at
        shape = ", ".join(map(str, value(node).shape[1:]))
        raise BadInput(
            f"{module_path(node) or node.name} works on a tensor of shape (batch, {shape}), in which the {positions[0]} positions of the text are not to be told: "
            "conditioned as a whole it would tell each position the tokens behind it.",
            hint="The network converts for the mode exact (--task auto).",
        )


def _factors_of(
    view: GraphView, place: Site | OwnModulation, symbols: frozenset[Any], positions: tuple[int, ...]
) -> tuple[Factor, ...]:
    """What is made of c for one place: scale, shift and gate, or a shift of what the network makes itself."""

    def of(node: fx.Node, channel: int, *, scales: bool) -> Factor:
        return _factor(view, node, channel, symbols, positions, scales=scales)

    if isinstance(place, OwnModulation):
        return (of(place.operand, place.channel, scales=False),)
    scale, shift = (of(place.at, place.at_channel, scales=scales) for scales in (True, False))
    return scale, shift, of(place.end, place.end_channel, scales=True)


def _factor(
    view: GraphView, node: fx.Node, dim: int, symbols: frozenset[Any], positions: tuple[int, ...], *, scales: bool
) -> Factor:
    samples = samples_of(view, node, symbols) if symbols else Samples(0)
    if samples is None or samples.dim == dim:
        shape = ", ".join(as_text(size, symbols) for size in value(node).shape)
        raise NotPerSample(
            f"{module_path(node) or node.name} works on a tensor of shape ({shape}), in which it cannot be told where the samples of a batch lie, so that its "
            "units cannot be conditioned.",
            hint="The network converts for the mode exact. To train blocks, keep the batch as the first dimension in the layers.",
        )
    grid = grid_of(tuple(value(node).shape), dim, samples, positions)
    if positions and samples.repeat == math.prod(positions):
        rows = rows_of_positions(view, node, symbols, samples.repeat)
        grid = grid_of_rows(rows, value(node).dim(), positions) if rows == samples else None
    return Factor(_channels(node, dim), dim, value(node).dim(), scales, samples, grid)


def shape_of(factor: Factor, batch: Any) -> list[Any]:
    """The shape of a factor for a batch."""
    shape: list[Any] = [1] * factor.rank
    shape[factor.dim], shape[factor.samples.dim] = factor.size, factor.samples.repeat * batch
    for place, size in () if factor.grid is None else factor.grid.places:
        shape[place] = size
    return shape


class NotPerSample(BadInput):
    """A unit cannot be conditioned, since it cannot be told which rows of its state belong to which sample."""


def places_of(found: Found, units: Sequence[Unit]) -> tuple[Site | OwnModulation, ...]:
    """What AdaLN modulates in a block: the modulations it has already, or else a site for every branch."""
    own = own_modulations(found.view, units, [trunk[0].fork for trunk in found.trunks])
    return own or tuple(site for unit in units for site in sites(found.view, unit))


def _apply(graph: fx.Graph, place: Site | OwnModulation, factors: Sequence[fx.Node], last: fx.Node) -> None:
    """Apply a place's factors; ``last`` is the last of all factors in the graph."""
    if isinstance(place, OwnModulation):
        moved = _call(graph, torch.ops.aten.add.Tensor, place.operand, factors[0], last)
        for user in place.users:
            user.replace_input_with(place.operand, moved)
        return
    scale, shift, gate = factors
    whole = place.at is place.end
    users = list(place.at.users) if whole else [n for n in place.at.users if n in place.region]
    scaled = _call(graph, torch.ops.aten.mul.Tensor, place.at, scale, last)
    modulated = _call(graph, torch.ops.aten.add.Tensor, scaled, shift, last)
    for user in users:
        user.replace_input_with(place.at, modulated)
    end = modulated if whole else place.end
    readers = list(end.users)
    gated = _call(graph, torch.ops.aten.mul.Tensor, end, gate, last)
    for user in readers:
        if user is not gated:
            user.replace_input_with(end, gated)


def _call(graph: fx.Graph, target: Any, node: fx.Node, factor: fx.Node, last: fx.Node) -> fx.Node:
    """``target(node, factor)`` right behind ``node``, or behind the factors where it is a placeholder above them."""
    with graph.inserting_after(last if node.op == "placeholder" else node):
        made = graph.call_function(target, (node, factor))
    made.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}
    return made


def _fake(mode: Any, *shape: Any) -> torch.Tensor:
    if mode is None:
        return torch.empty([3 if i == 0 else int(s) for i, s in enumerate(shape)])
    with mode:
        return torch.empty(shape)
