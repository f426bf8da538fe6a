"""What blocks are worth on held-out rows while they train: each alone, and the chain up to it, by the sampler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusionblocks.converter import blocks as block_tools
from diffusionblocks.converter.dataset import Dataset
from diffusionblocks.converter.network import ConvertedNetwork, Env
from diffusionblocks.converter.residence import Residence
from torch.nn import functional as F

CHUNK = 256


class Validator:
    """``validator(b)`` -> accuracy and cross-entropy of block b ``alone`` (from z = 0 at its upper edge) and of the ``chain`` of blocks 0 to b.

    Against the data's labels, or, where it has none, the original network's decisions.
    """

    def __init__(self, network: ConvertedNetwork, data: Dataset, residence: Residence) -> None:
        self.network, self.data, self.residence = network, data, residence

    @torch.no_grad()
    def __call__(self, b: int) -> dict[str, Any]:
        whole = all(self.network.trained[:b])
        found: dict[str, list[torch.Tensor]] = {"alone": [], "chain": []}
        truth = []
        with _settled(self.network, b):
            for start in range(0, len(self.data), CHUNK):
                rows = list(range(start, min(start + CHUNK, len(self.data))))
                alone, chain, y = self._rows(rows, b, whole)
                found["alone"].append(alone)
                found["chain"].append(chain)
                truth.append(y)
        labels = torch.cat(truth)
        scores: dict[str, Any] = {"block": b, "rows": len(labels), "alone": _scores(torch.cat(found["alone"]), labels)}
        scores["chain"] = _scores(torch.cat(found["chain"]), labels) if whole else None
        return scores

    def _rows(self, rows: list[int], b: int, whole: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        network, device = self.network, self.residence.device
        batch = self.data.batch(rows)
        inputs = {name: tensor.to(device) for name, tensor in network.inputs_env(batch.inputs).items()}
        target, n = network.require_target(), len(rows)
        env, z, predictions = dict(inputs), torch.zeros(n, target.dim, device=device), []
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
                    alone = network.run_block(env, a, zero, sigma)[0].float().log_softmax(-1)
            prediction, _, z = target(z, f.float(), sigma, after)
            predictions.append(prediction)
        read = torch.stack(predictions).mean(0) if network.settings.context == "stem" else predictions[-1]
        y = batch.targets
        if y is None:
            y = self._original(dict(inputs)).argmax(-1)
        return alone.cpu(), read.log_softmax(-1).cpu(), y.long().cpu()

    def _enter(self, env: Env, a: int, carried: torch.Tensor | None) -> None:
        network = self.network
        if a == 0 or network.settings.context == "stem":
            network.run_stem(env, a)
            return
        with self.residence.passing(network.contexts[a - 1].module):
            network.advance(env, a - 1, carried)

    def _original(self, env: Env) -> torch.Tensor:
        self.network.run_stem(env)
        for a in range(self.network.num_blocks):
            with self.residence.passing(self.network.contexts[a].module):
                self.network.run_context(env, a)
        return self.network.run_head(env, env["stream"])[0]


def _scores(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    return {
        "accuracy": float((logits.argmax(-1) == labels).double().mean()),
        "cross_entropy": float(F.cross_entropy(logits.double(), labels)),
    }


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
