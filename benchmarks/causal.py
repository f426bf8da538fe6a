"""Every causal language model of the zoo as ``--task lm``: does anything behind a position reach its prediction?

    python benchmarks/causal.py

Each small model (random weights) is converted to two blocks with the context ``stem``, its conditioning is stirred as training would, and another token, and another z, at one position is
compared with what was there: nothing may change before it, and z must move the prediction at it. Prints a line for each model, and the counts.
"""

from __future__ import annotations

import logging
import warnings

import torch
from coverage import use_torchvision
from diffusionblocks.converter import convert
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.runtime.errors import BadInput
from torch import nn
from zoo import entries


def stirred(network: ConvertedNetwork) -> ConvertedNetwork:
    torch.manual_seed(1)
    for block in network.blocks:
        for module in block.module.modules():
            if hasattr(module, "projection") and hasattr(module, "layouts"):
                nn.init.normal_(module.projection.weight, std=0.2)
    return network


@torch.no_grad()
def reach(network: ConvertedNetwork, inputs: dict[str, torch.Tensor]) -> tuple[float, float, float]:
    """How far the prediction moves before a position by its token, before it by its z, and at it by its z."""
    x, first = network.inputs_env(inputs), network.input_names[0]
    j, target = x[first].shape[1] // 2, network.require_target()
    z, sigma = torch.randn(len(x[first]), *target.shape), torch.full((len(x[first]),), 0.4)

    def f(env: dict[str, torch.Tensor], noisy: torch.Tensor) -> torch.Tensor:
        env = dict(env)
        network.run_stem(env)
        return network.run_block(env, 1, noisy, sigma)[0].float()

    token, other = {**x, first: x[first].clone()}, z.clone()
    token[first][:, j] = (token[first][:, j] + 1) % 90
    other[:, j] += 1
    plain = f(x, z)
    by_token, by_z = ((f(env, noisy) - plain).abs() for env, noisy in ((token, z), (x, other)))
    return float(by_token[:, :j].amax()), float(by_z[:, :j].amax()), float(by_z[:, j].amax())


def main() -> None:
    use_torchvision()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    counts = {"holds": 0, "LEAKS": 0, "refused": 0}
    for entry in entries("transformers"):
        model = entry.build()
        if not any(kind in type(model).__name__ for kind in ("CausalLM", "LMHead")):
            continue
        inputs = entry.inputs(3)
        try:
            network = stirred(convert(model, inputs, num_blocks=2, task="lm", context="stem"))
        except BadInput as error:
            counts["refused"] += 1
            print(f"refused  {entry.name}: {error.message}", flush=True)
            continue
        before, by_z, at = reach(network, dict(inputs))
        verdict = "holds" if max(before, by_z) <= at / 100 else "LEAKS"
        counts[verdict] += 1
        print(f"{verdict:8} {entry.name}: before {max(before, by_z):.1e}, at {at:.1e}", flush=True)
    print(counts)


if __name__ == "__main__":
    main()
