"""A bundle in a server: several threads ask one opened bundle under a memory budget, in a process that has no torch.

python examples/serve.py           # half a minute on two cores
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

OUT, WIDTH, UNITS = Path("demo"), 512, 12


def make(folder: Path) -> None:
    """A network of some 25 MB with random weights, in six blocks."""
    import torch
    from diffusionblocks.converter import convert
    from diffusionblocks.export import export_bundle
    from torch import nn

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mlp(self.norm(x))

    torch.manual_seed(0)
    model = nn.Sequential(*(Unit() for _ in range(UNITS)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)).eval()
    export_bundle(convert(model, input_shape=(WIDTH,), num_blocks=6), folder, force=True)


def serve(folder: Path, requests: int) -> None:
    """Answer requests of four threads with one bundle; prints what they took."""
    from diffusionblocks.runtime import open_bundle
    from diffusionblocks.runtime.budget import format_bytes

    assert "torch" not in sys.modules
    batches = [np.random.default_rng(i).normal(size=(4, WIDTH)).astype(np.float32) for i in range(requests)]
    size = sum(path.stat().st_size for path in folder.glob("*.bin"))
    with open_bundle(folder, memory_budget="12MiB") as bundle:
        alone = [bundle.run(x, mode="exact") for x in batches]
        start = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda x: bundle.run(x, mode="exact"), batches))
        seconds = time.monotonic() - start
        same = all(np.array_equal(a, b) for a, b in zip(alone, answers, strict=True))
        print(f"plan: {bundle.last_plan}")
        print(
            f"{requests} requests of 4 threads: {1000 * seconds / requests:.1f} ms each, at most {format_bytes(bundle.peak_weight_bytes)} of "
            f"{format_bytes(size)} open at once, answers {'as alone' if same else 'DIFFER'}"
        )
    assert "torch" not in sys.modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64, help="Requests.")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.steps)
        return
    OUT.mkdir(exist_ok=True)
    make(OUT / "serve.dblocks")
    command = [sys.executable, __file__, "--serve", str(OUT / "serve.dblocks"), "--steps", str(options.steps)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
