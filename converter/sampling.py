"""The sampler on a network in torch: Euler steps on the probability-flow ODE, block after block. The runtime's is the same on graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusionblocks.runtime import schedule

if TYPE_CHECKING:
    from diffusionblocks.converter.network import ConvertedNetwork, Env

Trace = Callable[[int, int, float, torch.Tensor], None]


def sample(
    network: ConvertedNetwork,
    inputs: Any,
    plan: tuple[schedule.Step, ...],
    *,
    start: str,
    read: str,
    seed: tuple[int, int],
    trace: Trace | None = None,
) -> torch.Tensor:
    """One draw's prediction; see :meth:`ConvertedNetwork.denoise`. ``seed``: of the noise, and the draw's number."""
    target = network.require_target()
    env = network.inputs_env(inputs)
    n = next(iter(env.values())).shape[0]
    z = torch.zeros(n, *target.shape)
    if start == "noise":
        noise = np.random.default_rng(list(seed)).standard_normal((n, *target.shape), dtype=np.float32)
        z = torch.from_numpy(noise) * network.edges[0]
    at, carried = -1, None
    predictions: list[torch.Tensor] = []
    for k, step in enumerate(plan):
        while at < step.block:
            enter(network, env, at + 1, carried)
            at, carried = at + 1, None
        sigma = torch.full((n,), step.sigma)
        f, carried = network.run_block(env, step.block, z, sigma)
        prediction, _, z = target(z, f.float(), sigma, torch.full((n,), step.sigma_next))
        predictions.append(prediction)
        if trace is not None:
            trace(k, step.block, step.sigma, prediction)
    return predictions[-1] if read == "last" else target.combined(torch.stack(predictions))


def enter(network: ConvertedNetwork, env: Env, block: int, carried: torch.Tensor | None) -> None:
    """Bring ``env['stream']`` to what ``block`` reads in the network's context, from what the block before read."""
    if block == 0 or network.settings.context == "stem":
        network.run_stem(env, block)
    else:
        network.advance(env, block - 1, carried)


@torch.no_grad()
def filled_in(network: ConvertedNetwork, inputs: Any) -> torch.Tensor:
    """Log-probabilities of a masked language model's tokens [N, T, K], each row by the block that owns the share of hidden tokens in it."""
    target = network.require_target()
    env = network.inputs_env(inputs)
    z = env[target.masking.input]
    hidden = z == target.masking.token
    if target.masking.mask:
        seen = env[target.masking.mask] != 0
        shares = (hidden & seen).sum(1) / seen.sum(1).clamp(min=1)
    else:
        shares = hidden.double().mean(1)
    owners = torch.tensor([schedule.block_of(float(share), network.edges) for share in shares])
    made: dict[int, torch.Tensor] = {}
    for b in owners.unique().tolist():
        rows = (owners == b).nonzero()[:, 0]
        part = {name: tensor[rows] for name, tensor in env.items()}
        sigma = shares[rows].float()
        network.run_stem(part, b)
        f = network.run_block(part, b, z[rows].long(), sigma)[0].float()
        made |= dict(zip(rows.tolist(), target.read(f), strict=True))
    return torch.stack([made[i] for i in range(len(z))])
