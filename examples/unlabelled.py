"""Blocks that learn from the original network's own answers: no label is used after the original is trained.

python examples/unlabelled.py      # less than a minute on two cores
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusionblocks.converter import convert, finetune
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import open_bundle
from sklearn.datasets import load_digits
from torch import nn

OUT, TRAIN = Path("demo"), 1300


class Unit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="Updates of the original, and of each block.")
    steps = parser.parse_args().steps
    OUT.mkdir(exist_ok=True)
    torch.manual_seed(0)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = (digits.data[order] / 16 - 0.3).astype(np.float32), digits.target[order].astype(np.int64)
    model = nn.Sequential(nn.Linear(64, 64), *(Unit(64) for _ in range(6)), nn.LayerNorm(64), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        rows = torch.randint(TRAIN, (64,))
        loss = nn.functional.cross_entropy(model(torch.from_numpy(x)[rows]), torch.from_numpy(y)[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network = convert(model.eval(), input_shape=(64,), num_blocks=3)
    finetune(network, x[:TRAIN], targets="teacher", steps=steps)  # no y
    folder = export_bundle(network, OUT / "unlabelled.dblocks", force=True)
    with open_bundle(folder) as bundle:
        original = bundle.run(x[TRAIN:], mode="exact").argmax(1)
        for k in (1, 2, 3):
            blocks = bundle.run(x[TRAIN:], mode="denoise", steps=k).argmax(1)
            right, same = (100 * float(np.mean(blocks == of)) for of in (y[TRAIN:], original))
            print(f"denoise, {k} steps: {right:.1f} % right, {same:.1f} % as the original")
    print(f"the original: {100 * float(np.mean(original == y[TRAIN:])):.1f} % right, of {len(x) - TRAIN} digits")


if __name__ == "__main__":
    main()
