"""A model of 6 GB: converted and exported with how much memory beside its own weights, and run in how much.

    python benchmarks/large.py                          # a ViT of width 2048 and depth 30: 6.0 GB in float32, a block a layer
    python benchmarks/large.py --width 512 --depth 12   # a quick look

Each step is a process of its own; figures are peaks of resident memory, in all and above what the process had with everything imported. The bundle is written to the
present folder, and removed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def model_of(given: argparse.Namespace) -> Any:
    from coverage import use_torchvision

    use_torchvision()
    import torch
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    size = {"embed_dim": given.width, "depth": given.depth, "num_heads": given.width // 64}
    model = VisionTransformer(img_size=224, patch_size=16, weight_init="skip", **size).eval()
    for parameter in (model.cls_token, model.pos_embed):
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def export(given: argparse.Namespace) -> dict[str, Any]:
    from diffusionblocks.converter import convert
    from diffusionblocks.export import export_bundle
    from diffusionblocks.runtime.memory import peak_resident, restart_peak

    small = argparse.Namespace(width=64, depth=2)
    export_bundle(convert(model_of(small), input_shape=(3, 224, 224), num_blocks=2), given.folder / "small")
    restart_peak()
    base = peak_resident() or 0
    model = model_of(given)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    built = peak_resident() or 0
    start = time.perf_counter()
    network = convert(model, input_shape=(3, 224, 224), num_blocks=given.depth)
    converted, seconds = peak_resident() or 0, time.perf_counter() - start
    folder = export_bundle(network, given.folder / "model.dblocks")
    peaks = {"model built": built, "converted": converted, "exported": peak_resident() or 0}
    above = {what: peak - base for what, peak in peaks.items()}
    stored = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    block = max(p.stat().st_size for p in folder.glob("block_*.bin"))
    times = {"convert_seconds": seconds, "export_seconds": time.perf_counter() - start - seconds}
    return {"weights": weights, "block": block, "bundle": stored, "base": base, "above_base": above, **times}


def run(given: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    from diffusionblocks.runtime import open_bundle
    from diffusionblocks.runtime.memory import peak_resident, restart_peak

    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    seconds = []
    with open_bundle(given.folder / "model.dblocks") as bundle:
        restart_peak()
        base = peak_resident() or 0
        for _ in range(3):
            start = time.perf_counter()
            output = bundle.run(x, "exact")
            seconds.append(time.perf_counter() - start)
    return {
        "peak": peak_resident(),
        "above_base": (peak_resident() or 0) - base,
        "seconds": seconds,
        "finite": bool(np.isfinite(output).all()),
    }


STEPS = {"export": export, "run": run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=30)
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step is not None:
        print(json.dumps(STEPS[given.step](given)))
        return
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for step in STEPS:
            command = [
                sys.executable,
                __file__,
                "--step",
                step,
                "--folder",
                folder,
                "--width",
                given.width,
                "--depth",
                given.depth,
            ]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            print(step, done.stdout.strip() or done.stderr[-2000:])


if __name__ == "__main__":
    main()
