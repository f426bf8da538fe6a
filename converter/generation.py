"""Sampling from a diffusion model in torch, and how wrong its blocks are on given images. The runtime samples the same on graphs (``runtime/denoising.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusionblocks.converter.dataset import Dataset
from diffusionblocks.converter.draws import sigma_of
from diffusionblocks.converter.feeding import Feeder
from diffusionblocks.converter.residence import Residence
from diffusionblocks.converter.targets import Told
from diffusionblocks.runtime import parameterisation, schedule

if TYPE_CHECKING:
    from diffusionblocks.converter.network import ConvertedNetwork, Env

CHUNK = 64


@torch.no_grad()
def generate(
    network: ConvertedNetwork,
    conditions: Mapping[str, torch.Tensor],
    *,
    count: int | None = None,
    steps: int | None = None,
    solver: str = "euler",
    guidance: float = 1.0,
    null: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    original: bool = False,
) -> torch.Tensor:
    """D of the last step, [N, *shape]; see ``Bundle.sample``. ``original``: by the whole network at every step."""
    target = network.require_target()
    rows = len(next(iter(conditions.values()))) if conditions else int(count or 1)
    plan = schedule.sampling_steps(network.edges, steps or network.num_blocks)
    noise = np.random.default_rng([seed, 0]).standard_normal((rows, *target.shape), dtype=np.float32)
    z = torch.from_numpy(noise * np.float32(plan[0].sigma))
    denoised = z

    def at(block: int, z: torch.Tensor, level: float, after: float) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = torch.full((rows,), level)
        env = {**conditions}
        f = output(network, env, block, z, sigma, original=original)
        if guidance != 1.0 and null:
            away = {n: v.expand(rows, *v.shape[1:]) for n, v in null.items()}
            without = output(network, {**env, **away}, block, z, sigma, original=original)
            f = without + guidance * (f - without)
        found = target(z, f, sigma, torch.full((rows,), after))
        return found[1], found[2]

    for step in plan:
        denoised, z_next = at(step.block, z, step.sigma, step.sigma_next)
        if solver == "heun" and step.sigma_next > 0:
            again, _ = at(step.block, z_next, step.sigma_next, step.sigma_next)
            z_next = parameterisation.heun_step(z, denoised, z_next, again, step.sigma, step.sigma_next)
        z = z_next
    return denoised


def output(
    network: ConvertedNetwork, env: Env, block: int, z: torch.Tensor, sigma: torch.Tensor, *, original: bool
) -> torch.Tensor:
    """The model's output at z and sigma: of a block between stem and head, or of the whole original network."""
    entered = network.require_target().entered(env, z, sigma)
    if original:
        return network.exact(entered)[0].float()
    network.run_stem(entered, block)
    return network.run_block(entered, block, z, sigma)[0].float()


@torch.no_grad()
def losses_of(
    network: ConvertedNetwork, data: Dataset, block: int, residence: Residence, *, original: bool, seed: int = 0
) -> torch.Tensor:
    """The loss of each row of ``data`` at noise levels of a block's interval, [N] in float64; the same draws for the block and the original.

    The block, stem and head must be on the residence's device.
    """
    target, feeder = network.require_target(), Feeder(network, block, residence)
    generator = torch.Generator().manual_seed(seed * 1000003 + block)
    found = []
    for start in range(0, len(data), CHUNK):
        rows = range(start, min(start + CHUNK, len(data)))
        env = {n: t.to(residence.device) for n, t in network.inputs_env(data.batch(rows).inputs).items()}
        y = target.from_inputs(env)
        u = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        sigma = sigma_of(network.densities[block], u).to(residence.device)
        z = target.noisy(y, sigma, torch.randn(len(rows), *target.shape, generator=generator).to(residence.device))
        if original:
            f = feeder.original(target.entered(env, z, sigma)).float()
        else:
            f = output(network, env, block, z, sigma, original=False)
        found.append(target.losses(Told(f, z, sigma, y), target.weight).double().cpu())
    return torch.cat(found)


def compared(network: ConvertedNetwork, data: Dataset) -> dict[str, Any]:
    """The mean losses of the original and of the blocks, each block on its own interval: ``exact``, ``denoise``, and of each block."""
    residence = Residence(network, torch.device("cpu"))
    losses = {
        mode: [
            float(losses_of(network, data, b, residence, original=mode == "exact").mean())
            for b in range(network.num_blocks)
        ]
        for mode in ("exact", "denoise")
    }
    return {mode: {"loss": sum(of) / len(of), "blocks": of} for mode, of in losses.items()}
