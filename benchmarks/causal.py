"""Every causal language model of the zoo as ``--task lm``: does anything behind a position reach its prediction, and can keys and values of past positions be kept?

    python benchmarks/causal.py
    python benchmarks/causal.py --only llama mixtral

Each small model (random weights) is converted to two blocks with the context ``stem``, its conditioning is stirred as training would, and another token, and another z, at one position is
compared with what was there: nothing may change before it, and z must move the prediction at it. The bundle (context ``frozen``) is then run position by position in both modes, against what torch computed of
the whole. Prints a line for each model, and the counts.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from coverage import use_torchvision
from diffusionblocks.converter import convert
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.export import export_bundle
from diffusionblocks.export.verify import compare_cached
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


def kept(network: ConvertedNetwork) -> tuple[bool, str]:
    """Whether the bundle's graphs for new positions compute what torch did of the whole: by how much they differ, or why there are none."""
    said = Said()
    logging.getLogger("diffusionblocks.export.bundle").addHandler(said)
    network.trained = [True] * network.num_blocks
    try:
        with tempfile.TemporaryDirectory(prefix="causal-") as place:
            folder = export_bundle(network, Path(place) / "m")
            probe = np.load(folder / "probe.npz")
            inputs = {n.removeprefix("input."): probe[n] for n in probe if n.startswith("input.")}
            checks = compare_cached(folder, inputs, probe)
    finally:
        logging.getLogger("diffusionblocks.export.bundle").removeHandler(said)
    if not checks:
        return False, said.text.removeprefix("keys and values cannot be kept: ").partition(";")[0]
    return all(c.ok for c in checks), f"kept, differs by {max(c.difference or 0.0 for c in checks):.0e}"


class Said(logging.Handler):
    """The last message."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    only = parser.parse_args().only
    use_torchvision()
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    counts = {"holds": 0, "LEAKS": 0, "refused": 0, "kept": 0, "computed anew": 0}
    for entry in entries("transformers"):
        if not any(part in entry.name for part in only):
            continue
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
        ok, why = kept(stirred(convert(entry.build(), inputs, num_blocks=2, task="lm", context="frozen")))
        counts["kept" if ok else "computed anew"] += 1
        print(f"{verdict:8} {entry.name}: before {max(before, by_z):.1e}, at {at:.1e}; {why}", flush=True)
    print(counts)


if __name__ == "__main__":
    main()
