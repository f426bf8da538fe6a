"""Generating text with and without keys and values of past tokens, paired: the time of a token, and that both make the same text.

    python benchmarks/generating.py                # GPT-2's size (12 layers of width 768), a window of 512, 256 tokens behind a prompt of 128
    python benchmarks/generating.py --width 256 --layers 6 --window 256

Random weights; the blocks are not trained (their time is the same). Both ways take turns, round by round; a token's time is the mean over a round's tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from coverage import use_torchvision
from diffusionblocks.converter import convert
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import open_bundle
from diffusionblocks.runtime.bundle import Bundle
from diffusionblocks.runtime.language import generate


def bundle_of(given: argparse.Namespace, folder: Path) -> Path:
    use_torchvision()
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=given.width, n_layer=given.layers, n_head=given.width // 64, n_positions=given.window, use_cache=False
    )
    example = torch.zeros(2, given.window, dtype=torch.long)
    network = convert(GPT2LMHeadModel(config).eval(), (example,), num_blocks=given.blocks, task="lm", context="frozen")
    network.trained = [True] * given.blocks
    start = time.perf_counter()
    made = export_bundle(network, folder / "model.dblocks")
    print(f"export: {time.perf_counter() - start:.0f} s", flush=True)
    return made


def milliseconds(bundle: Bundle, count: int, prompt: Any, **settings: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    tokens = generate(bundle, prompt, count, temperature=0, **settings)
    return (time.perf_counter() - start) / count * 1e3, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 768), ("layers", 12), ("window", 512), ("blocks", 3), ("prompt", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs=2, default=(256, 8), help="kept, and computed anew, a round")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="generating-") as place, open_bundle(bundle_of(given, Path(place))) as b:
        prompt = np.random.default_rng(0).integers(0, 50000, (given.batch, given.prompt))
        print("| mode | kept, ms a token | anew, ms a token | anew / kept, paired | kept at the whole length, MB |")
        print("|---|---|---|---|---|")
        for mode, steps in [("exact", None), *(("denoise", s) for s in given.steps)]:
            kept, anew = [], []
            for _ in range(given.rounds):
                quick, text = milliseconds(b, given.tokens[0], prompt, mode=mode, steps=steps, cached=True)
                slow, other = milliseconds(b, given.tokens[1], prompt, mode=mode, steps=steps, cached=False)
                if not (text[:, : given.tokens[1]] == other).all():
                    raise SystemExit("The two ways make different texts.")
                kept.append(quick)
                anew.append(slow)
            with b.continuing(given.batch, mode, steps=steps) as continued:
                size = 0 if continued is None else continued.bytes / 1e6
            said = f"{median(kept):.1f} | {median(anew):.0f} | {median(a / k for a, k in zip(anew, kept, strict=True)):.1f}"
            print(f"| {mode}{f', {steps} steps' if steps else ''} | {said} | {size:.0f} |", flush=True)


if __name__ == "__main__":
    main()
