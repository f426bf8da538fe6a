"""Sampling from a diffusion transformer, the whole network at every step against a block a step: seconds for an image, paired.

    python benchmarks/sampling.py                       # 12 layers of width 384, 256 tokens, 24 steps, B = 2, 3 and 4
    python benchmarks/sampling.py --batch 8 --width 768

Random weights; the blocks are not trained (their time is the same). "Whole": every step runs all of the network, its blocks in memory together (the fastest way to run it). "Blocks": as `dbconvert run` does it, a
block in memory for the steps that are its own. Rounds take turns, and ratios are paired; the aim is a speed-up of 0.8 B.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from diffusionblocks.converter import convert
from diffusionblocks.converter.denoiser_target import Denoiser
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import open_bundle
from diffusionblocks.runtime.bundle import Bundle

EXAMPLE = Path(__file__).parents[1] / "examples" / "diffusion.py"


def bundle_of(given: argparse.Namespace, blocks: int, folder: Path) -> Path:
    spec = importlib.util.spec_from_file_location("diffusion_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = module.DiT(given.width, given.layers, given.width // 64, side=given.side, patch=2).eval()
    example = {"x": torch.zeros(2, 1, given.side, given.side), "t": torch.zeros(2), "y": torch.zeros(2).long()}
    network = convert(model, example, num_blocks=blocks, task="diffusion", denoiser=Denoiser("edm"))
    network.trained = [True] * blocks
    return export_bundle(network, folder / f"{blocks}.dblocks")


def seconds(bundle: Bundle, batch: int, mode: str, steps: int) -> float:
    start = time.perf_counter()
    bundle.sample({"y": np.arange(batch) % 10}, mode=mode, steps=steps)
    return (time.perf_counter() - start) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 384), ("layers", 12), ("side", 32), ("steps", 24), ("batch", 1), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    print("| B | whole, ms an image | blocks, ms an image | whole / blocks, paired | aim |\n|---|---|---|---|---|")
    for blocks in given.blocks:
        with tempfile.TemporaryDirectory(prefix="sampling-") as place:
            folder = bundle_of(given, blocks, Path(place))
            with (
                open_bundle(folder, memory_budget="64GiB", device=given.device) as all_in,
                open_bundle(folder, device=given.device) as one,
            ):
                rounds = [
                    (
                        seconds(all_in, given.batch, "exact", given.steps),
                        seconds(one, given.batch, "denoise", given.steps),
                    )
                    for _ in range(given.rounds + 1)
                ][1:]
        whole, own = (1e3 * median(r[k] for r in rounds) for k in (0, 1))
        ratio = median(a / b for a, b in rounds)
        print(f"| {blocks} | {whole:.0f} | {own:.0f} | {ratio:.2f} | {0.8 * blocks:.1f} |", flush=True)


if __name__ == "__main__":
    main()
