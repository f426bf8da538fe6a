"""Conversion and export of a bundle against one plain torch.onnx.export of the whole model: time and peak memory, in one run.

    python benchmarks/conversion.py                                # ViT-B/16, 4 blocks, three pairs
    python benchmarks/conversion.py --model vit_tiny_patch16_224 --blocks 4 --pairs 1

Each measurement is a process of its own; the two kinds take turns, and the ratio is that of each pair. Random weights of timm's architecture.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

KINDS = ("plain", "bundle")


def measure(kind: str, name: str, blocks: int) -> dict[str, float]:
    """Seconds (wall and CPU) and peak resident bytes of one export; loading the packages and the model is left out of the time."""
    from diffusionblocks.converter.vision import ensure_torchvision

    ensure_torchvision()
    import timm
    import torch
    import torch.onnx
    from diffusionblocks.converter import convert
    from diffusionblocks.export import export_bundle

    model = timm.create_model(name, pretrained=False).eval()
    shape = tuple(model.default_cfg["input_size"])
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if kind == "plain":
            batch = {0: torch.export.Dim("batch", min=1, max=2**16)}
            program = torch.onnx.export(
                model, (torch.randn(3, *shape),), dynamo=True, verbose=False, opset_version=20, dynamic_shapes=(batch,)
            )
            assert program is not None
            program.save(str(Path(folder) / "model.onnx"), external_data=True)
        else:
            export_bundle(convert(model, input_shape=shape, num_blocks=blocks), Path(folder) / "model.dblocks")
    return {
        "seconds": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
        "base": base * 1024.0,
    }


def child(kind: str, name: str, blocks: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", kind, "--model", name, "--blocks", str(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.model, given.blocks)))
        return
    pairs: list[dict[str, Any]] = []
    for _ in range(given.pairs):
        pairs.append({kind: child(kind, given.model, given.blocks) for kind in KINDS})
        for kind in KINDS:
            m = pairs[-1][kind]
            print(
                f"{kind:7} {m['seconds']:6.1f} s  {m['cpu']:6.1f} CPU s  peak {m['peak'] / 2**20:6.0f} MiB (before: {m['base'] / 2**20:.0f})"
            )
    for what, bar in (("seconds", 1.5), ("cpu", 1.5), ("peak", 1.3)):
        ratios = [pair["bundle"][what] / pair["plain"][what] for pair in pairs]
        print(
            f"{what}: bundle / plain {median(ratios):.2f} (of {', '.join(f'{r:.2f}' for r in ratios)}); aim at most {bar}"
        )


if __name__ == "__main__":
    main()
