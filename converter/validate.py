"""What blocks are worth on held-out rows while they train: each alone, and the chain up to it, by the sampler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusionblocks.converter import blocks as block_tools
from diffusionblocks.converter.dataset import Dataset
from diffusionblocks.converter.generation import losses_of
from diffusionblocks.converter.network import ConvertedNetwork, Env
from diffusionblocks.converter.residence import Residence
from diffusionblocks.converter.sampling import enter
from diffusionblocks.converter.targets import averaged, chunk_of


class Validator:
    """``validator(b)`` -> the target's figures of merit of block b ``alone`` (from z = 0 at its upper edge) and of the ``chain`` of blocks 0 to b.

    Of a diffusion model the loss of block b ``alone`` on its noise levels, and the ``original``'s. Against the data's labels, or, where it has none, what the original network says.
    """

    def __init__(self, network: ConvertedNetwork, data: Dataset, residence: Residence) -> None:
        self.network, self.data, self.residence = network, data, residence

    @torch.no_grad()
    def __call__(self, b: int) -> dict[str, Any]:
        if self.network.require_target().enters:
            losses = {
                mode: losses_of(self.network, self.data, b, self.residence, original=mode == "original")
                for mode in ("alone", "original")
            }
            return {"block": b, "rows": len(self.data), **{k: {"loss": float(v.mean())} for k, v in losses.items()}}
        whole = all(self.network.trained[:b])
        target = self.network.require_target()
        alone, chain = [], []
        step = chunk_of(target)
        with _settled(self.network, b):
            for start in range(0, len(self.data), step):
                rows = list(range(start, min(start + step, len(self.data))))
                by_itself, read, y = self._rows(rows, b, whole)
                alone.append((len(rows), target.scores(by_itself, y)))
                chain.append((len(rows), target.scores(read, y)))
        scores: dict[str, Any] = {"block": b, "rows": len(self.data), "alone": averaged(alone)}
        scores["chain"] = averaged(chain) if whole else None
        return scores

    def _rows(self, rows: list[int], b: int, whole: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        network, device = self.network, self.residence.device
        batch = self.data.batch(rows)
        inputs = {name: tensor.to(device) for name, tensor in network.inputs_env(batch.inputs).items()}
        target, n = network.require_target(), len(rows)
        env, z = dict(inputs), torch.zeros(n, *target.shape, device=device)
        predictions: list[torch.Tensor] = []
        zero, carried, alone = z, None, z
        for a in range(b + 1):
            self._enter(env, a, carried)
            sigma, after = (torch.full((n,), float(e), device=device) for e in network.edges[a : a + 2])
            if a < b and not whole:
                continue
            block = network.blocks[a].module
            with self.residence.passing(*([] if a == b else [block])):
                f, carried = network.run_block(env, a, z, sigma)
                if a == b:
                    f_alone = network.run_block(env, a, zero, sigma)[0].float()
                    alone = target(zero, f_alone, sigma, after)[0]
            prediction, _, z = target(z, f.float(), sigma, after)
            predictions.append(prediction)
        read = target.combined(torch.stack(predictions)) if network.settings.context == "stem" else predictions[-1]
        y = batch.targets
        if y is None:
            y = target.decided(self._original(dict(inputs)).float())
        return alone.cpu(), read.cpu(), y.cpu()

    def _enter(self, env: Env, a: int, carried: torch.Tensor | None) -> None:
        passed = [] if a == 0 or self.network.settings.context == "stem" else [self.network.contexts[a - 1].module]
        with self.residence.passing(*passed):
            enter(self.network, env, a, carried)

    def _original(self, env: Env) -> torch.Tensor:
        self.network.run_stem(env)
        for a in range(self.network.num_blocks):
            with self.residence.passing(self.network.contexts[a].module):
                self.network.run_context(env, a)
        return self.network.run_head(env, env["stream"])[0]


@contextmanager
def _settled(network: ConvertedNetwork, b: int) -> Iterator[None]:
    """Block b's batch norms by their running statistics meanwhile."""
    modules = [module for _, module in network.own_modules(b)] if network.settings.tune == "block" else []
    for module in modules:
        block_tools.set_batch_norm_training(module, False)
    try:
        yield
    finally:
        for module in modules:
            block_tools.set_batch_norm_training(module, True)
