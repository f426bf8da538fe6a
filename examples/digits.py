"""From a trained ViT to one ONNX block per denoising step, on scikit-learn's digits, in a few minutes on two cores.

Trains a small ViT end to end, saves it with torch.export, runs the command ``dbconvert`` on the file in each context with the digits as
data, and prints what the original, the converted network and the exported bundle make of 497 digits none of them was trained on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusionblocks.converter.parts import load_training
from diffusionblocks.runtime import Bundle, open_bundle
from diffusionblocks.runtime.budget import format_bytes
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

OUT = Path("demo")
TRAIN = 1300


class Layer(nn.Module):
    """A pre-norm transformer layer: two residual units."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DigitViT(nn.Module):
    """[N, 1, 8, 8] images in 16 patches -> [N, 10] logits."""

    def __init__(self, dim: int = 64, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, dim))
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h).mean(1))


def train_end_to_end(x: torch.Tensor, y: torch.Tensor, steps: int = 500) -> nn.Module:
    torch.manual_seed(0)
    model = DigitViT()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(scores: np.ndarray, labels: np.ndarray) -> str:
    return f"{100 * float((scores.argmax(-1) == labels).mean()):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="Updates of each block.")
    steps = parser.parse_args().steps
    console = Console()
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, None] / 16 - 0.3).astype(np.float32)
    labels = digits.target[order].astype(np.int64)
    test, truth = images[TRAIN:], labels[TRAIN:]
    np.savez(OUT / "train.npz", x=images[:TRAIN], y=labels[:TRAIN])

    console.print("Training a small ViT end to end ...")
    model = train_end_to_end(torch.from_numpy(images[:TRAIN]), torch.from_numpy(labels[:TRAIN]))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (torch.randn(3, 1, 8, 8),), dynamic_shapes=({0: batch},), strict=False)
    with (OUT / "model.pt").open("wb") as file:
        torch.export.save(program, file)
    with torch.no_grad():
        original = model(torch.from_numpy(test)).numpy()

    table = Table("network", "accuracy", "block by block", "largest difference, torch to ONNX")
    table.add_row("original", accuracy(original, truth), "-", "-")
    memory: list[str] = []
    for context in ("frozen", "carry", "stem"):
        bundle_path = OUT / f"{context}.dblocks"
        command = [sys.executable, "-m", "diffusionblocks.converter", str(OUT / "model.pt"), "--out", str(bundle_path)]
        command += ["--data", str(OUT / "train.npz"), "--context", context, "--steps", str(steps)]
        console.print("dbconvert " + " ".join(command[3:]))
        subprocess.run(command, check=True)
        network = load_training(bundle_path / "train")
        with open_bundle(bundle_path) as bundle:
            decoding = bundle.manifest.decoding
            in_torch = network.denoise(
                torch.from_numpy(test), steps=decoding.steps, start=decoding.start, read=decoding.read
            ).numpy()
            in_onnx = bundle.run(test, mode="denoise")
            exact = bundle.run(test, mode="exact")
            difference = max(abs(in_onnx - in_torch).max(), abs(exact - original).max())
            label = f"{context}, {decoding.steps} steps, {decoding.read}"
            table.add_row(label, accuracy(in_torch, truth), accuracy(in_onnx, truth), f"{difference:.1e}")
            if context == "frozen":
                table.add_row(
                    "frozen, exact",
                    accuracy(original, truth),
                    accuracy(exact, truth),
                    f"{abs(exact - original).max():.1e}",
                )
                memory = _memory(model, bundle, bundle_path)
    console.print(table)
    for line in memory:
        console.print(line)
    console.print(f"{time.monotonic() - started:.0f} s in all; everything is in {OUT}/")


def _memory(model: nn.Module, bundle: Bundle, path: Path) -> list[str]:
    manifest = json.loads((path / "manifest.json").read_text())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    block = max(b["training_bytes"] for b in manifest["training"]["blocks"])
    peak = bundle.peak_weight_bytes
    return [
        f"Training state (weights, gradients, Adam): one block {format_bytes(block)}, the whole network {format_bytes(4 * whole)}",
        f"Running, mode exact: {format_bytes(peak)} of graphs and weights open at once, the whole network's weights {format_bytes(whole)}",
    ]


if __name__ == "__main__":
    main()
