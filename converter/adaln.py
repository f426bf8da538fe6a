"""AdaLN conditioning of residual units, inserted so that the network's function is unchanged until it is trained.

With ``c = MLP(fourier(c_noise(sigma))) + W(c_in(sigma) z)`` (Karras et al. 2022 for c_in and c_noise; Peebles & Xie 2023 for adaLN-Zero),
a unit ``z + f(norm(z))`` becomes ``z + (1 + gate(c)) * f(norm(z) * (1 + scale(c)) + shift(c))``. scale, shift and gate come from one
linear projection whose weight and bias start at zero, and ``n * (1 + 0) + 0 == n`` to the bit. Everything before the projection has its
usual random start: were it zero as well, no gradient would ever pass.

Where a branch holds a norm, its first norm's output is modulated; where it holds none (post-norm units), the branch's input is.

Requires: a flat captured graph with the trunk found in it. Ensures: placeholders for z and sigma behind the others; one
conditioner a block, one modulation a branch; all else as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusionblocks.converter.graph import NORMS, GraphView, is_tensor, op_name, value
from diffusionblocks.converter.residual import Unit
from diffusionblocks.runtime import schedule
from torch import fx, nn
from torch.nn import functional as F

Z, SIGMA = "adaln_z", "adaln_sigma"
"""Names of the placeholders of the noisy target [N, d] and its noise level [N]."""

FREQUENCIES = 8
BUDGET = 0.05
"""Share of a block's parameters that its conditioning may add."""


class Conditioner(nn.Module):
    """``c = SiLU(MLP(fourier(c_noise)) + W(c_in z))``; z [N, d], sigma [N] -> c [N, width]."""

    frequencies: torch.Tensor

    def __init__(self, target_dim: int, width: int, sigma_data: float) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.noise = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.target = nn.Linear(target_dim, width, bias=False)
        self.register_buffer(
            "frequencies", torch.exp(torch.linspace(0.0, math.log(32.0), FREQUENCIES)), persistent=False
        )

    def forward(self, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        angle = (0.25 * sigma.log())[:, None] * self.frequencies  # [N, FREQUENCIES]
        noise = self.noise(torch.cat([angle.cos(), angle.sin()], dim=-1))  # [N, width]
        scaled = schedule.c_in(sigma, self.sigma_data)[:, None] * z  # [N, d]
        return F.silu(noise + self.target(scaled))


class Modulation(nn.Module):
    """``x * (1 + scale(c)) + shift(c)``, the channels of x at ``dim``; zero-initialised."""

    def __init__(self, width: int, channels: int, dim: int, rank: int) -> None:
        super().__init__()
        self.dim, self.rank = dim, rank
        self.projection = _zero_linear(width, 2 * channels)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        scale, shift = _along(self.projection(c), self.dim, self.rank).chunk(2, dim=self.dim)
        return x * (1 + scale) + shift


class Gate(nn.Module):
    """``x * (1 + gate(c))``, the channels of x at ``dim``; zero-initialised."""

    def __init__(self, width: int, channels: int, dim: int, rank: int) -> None:
        super().__init__()
        self.dim, self.rank = dim, rank
        self.projection = _zero_linear(width, channels)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x * (1 + _along(self.projection(c), self.dim, self.rank))


def _along(values: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """[N, C] as a tensor of ``rank`` dimensions that holds C at ``dim`` and broadcasts over the others."""
    for d in range(1, rank):
        if d != dim:
            values = values.unsqueeze(d)
    return values


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


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
                    and value(other).shape == value(node).shape
                    and name not in ("permute", "transpose")
                ):
                    queue.append(other)
    return int(value(node).dim()) - 1


def width_for(sites_of_block: Sequence[Site], target_dim: int, block_parameters: int) -> int:
    """The largest width whose conditioner and modulations stay under :data:`BUDGET` of the block's parameters (at least 1)."""
    channels = sum(2 * _channels(s.at, s.at_channel) + _channels(s.end, s.end_channel) for s in sites_of_block)
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
    view: GraphView,
    blocks: Sequence[Sequence[Unit]],
    *,
    target_dim: int,
    sigma_data: float,
    block_parameters: Sequence[int],
    seed: int,
) -> tuple[tuple[str, ...], ...]:
    """Insert a conditioner per block and a modulation and gate per branch into ``module`` (in place).

    ``view`` must be the view of ``module`` itself. Weights are drawn from (seed, block) alone, so that a block's start does not depend on
    the others. Returns, for each block, the names of the submodules added.
    """
    graph = module.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    batch = value(last).shape[0]
    with graph.inserting_after(last):
        z = graph.placeholder(Z)
    with graph.inserting_after(z):
        sigma = graph.placeholder(SIGMA)
    fake = value(last).fake_mode if hasattr(value(last), "fake_mode") else None
    z.meta["val"] = _fake(fake, batch, target_dim)
    sigma.meta["val"] = _fake(fake, batch)
    added = []
    places = [[site for unit in units for site in sites(view, unit)] for units in blocks]  # before the graph changes
    for b, at in enumerate(places):
        width = width_for(at, target_dim, block_parameters[b])
        names = [f"conditioner_{b:02d}"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1000003 + b)
            module.add_submodule(names[0], Conditioner(target_dim, width, sigma_data))
            with graph.inserting_after(sigma):
                c = graph.call_module(names[0], (z, sigma))
            c.meta["val"] = _fake(fake, batch, width)
            for k, site in enumerate(at):
                names += [f"modulation_{b:02d}_{k:02d}", f"gate_{b:02d}_{k:02d}"]
                module.add_submodule(
                    names[-2],
                    Modulation(width, _channels(site.at, site.at_channel), site.at_channel, value(site.at).dim()),
                )
                module.add_submodule(
                    names[-1],
                    Gate(width, _channels(site.end, site.end_channel), site.end_channel, value(site.end).dim()),
                )
                _modulate(graph, site, names[-2], names[-1], c)
        added.append(tuple(names))
    graph.lint()
    module.recompile()
    return tuple(added)


def _modulate(graph: fx.Graph, site: Site, modulation: str, gate: str, c: fx.Node) -> None:
    whole = site.at is site.end
    users = list(site.at.users) if whole else [n for n in site.at.users if n in site.region]
    with graph.inserting_after(c if site.at.op == "placeholder" else site.at):
        modulated = graph.call_module(modulation, (site.at, c))
    modulated.meta = _meta(site.at)
    for user in users:
        user.replace_input_with(site.at, modulated)
    end = modulated if whole else site.end
    readers = [n for n in end.users if n is not modulated]
    with graph.inserting_after(end):
        gated = graph.call_module(gate, (end, c))
    gated.meta = _meta(site.end)
    for user in readers:
        user.replace_input_with(end, gated)


def _meta(node: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}


def _fake(mode: Any, *shape: Any) -> torch.Tensor:
    if mode is None:
        return torch.empty([3 if i == 0 else int(s) for i, s in enumerate(shape)])
    with mode:
        return torch.empty(shape)
