"""A small diffusion transformer on scikit-learn's digits: trained whole, converted to blocks that denoise, fine-tuned, and sampled from, one block in memory at a time.

python examples/diffusion.py       # some minutes on two cores; writes demo/diffusion.png: the original's samples above the blocks'
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.denoiser_target import Denoiser
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import open_bundle, parameterisation
from diffusionblocks.runtime.budget import format_bytes
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

OUT, NONE = Path("demo"), 10


class Layer(nn.Module):
    """Attention and MLP with scales, shifts and gates made of c (Peebles & Xie 2023)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, -1)
        x = x + gate * self.attention(self.norm1(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """(noisy image [N, 1, side, side], time [N], class [N]) -> [N, channels, side, side]; class ``classes`` stands for none."""

    def __init__(
        self,
        dim: int = 64,
        depth: int = 6,
        heads: int = 4,
        classes: int = 10,
        channels: int = 1,
        side: int = 8,
        patch: int = 2,
    ) -> None:
        super().__init__()
        self.shape = channels, side // patch, patch
        self.patch = nn.Conv2d(1, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, dim))
        self.time = nn.Sequential(nn.Linear(16, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, patch * patch * channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        angle = t.float()[:, None] * torch.exp(-math.log(1e4) * torch.arange(8, device=t.device) / 8)
        c = self.time(torch.cat([angle.cos(), angle.sin()], -1)) + self.label(y)
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            h = layer(h, c)
        channels, grid, patch = self.shape
        h = self.out(self.norm(h)).reshape(-1, grid, grid, patch, patch, channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, grid * patch, grid * patch)


def train_whole(model: nn.Module, x: torch.Tensor, y: torch.Tensor, updates: int, none: int) -> nn.Module:
    """EDM: log sigma ~ N(-1.2, 1.2^2); a tenth of the samples get the class of none."""
    optimizer, generator = torch.optim.AdamW(model.train().parameters(), 2e-3), torch.Generator().manual_seed(0)
    for _ in range(updates):
        rows = torch.randint(len(x), (64,), generator=generator)
        sigma = torch.exp(-1.2 + 1.2 * torch.randn(64, generator=generator))[:, None, None, None]
        z = x[rows] + sigma * torch.randn(x[rows].shape, generator=generator)
        label = torch.where(torch.rand(64, generator=generator) < 0.1, none, y[rows])
        f = model(z * parameterisation.input_scale("edm", sigma), sigma.flatten().log() / 4, label)
        error = parameterisation.denoised("edm", z, f, sigma) - x[rows]
        optimizer.zero_grad()
        (error.square() * parameterisation.weight("edm", sigma)).mean().backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=1000, help="Updates of each block, and two thirds of the whole model's."
    )
    steps, started = parser.parse_args().steps, time.monotonic()
    OUT.mkdir(exist_ok=True)
    digits = load_digits()
    x = torch.from_numpy((digits.images[:, None] / 8 - 1).astype(np.float32))
    y = torch.from_numpy(digits.target.astype(np.int64))
    torch.manual_seed(0)
    print("Training a small DiT ...")
    model = train_whole(DiT(), x, y, 3 * steps // 2, NONE)
    example = {"x": x[:3], "t": torch.zeros(3), "y": y[:3]}
    network = convert(model, example, num_blocks=3, task="diffusion", denoiser=Denoiser("edm"))
    finetune(network, {"x": x.numpy(), "y": y.numpy()}, steps=steps, null=NONE)
    folder = export_bundle(network, OUT / "diffusion.dblocks", force=True)
    classes = {"y": np.repeat(np.arange(10), 4)}
    made = []
    with open_bundle(folder) as bundle:
        for mode in ("exact", "denoise"):
            began = time.monotonic()
            made.append(bundle.sample(classes, mode=mode, steps=24, guidance=1.5, null={"y": NONE}))
            memory = format_bytes(bundle.peak_weight_bytes)
            print(f"{mode}: 40 images in 24 steps, {time.monotonic() - began:.2f} s, {memory} of graphs and weights")
    framed = [np.pad(m[:, 0], ((0, 0), (1, 1), (1, 1)), constant_values=-0.6) for m in made]
    rows = [f.reshape(10, 4, 10, 10).transpose(1, 2, 0, 3).reshape(40, 100) for f in framed]
    picture = np.concatenate([rows[0], np.full((4, 100), 1.0, np.float32), rows[1]])
    pixels = (np.clip(picture + 1, 0, 2) * 127.5).astype(np.uint8)
    Image.fromarray(pixels).resize((800, 672), Image.Resampling.NEAREST).save(OUT / "diffusion.png")
    print(f"{time.monotonic() - started:.0f} s in all; {OUT}/diffusion.png: the original's samples above the blocks'")


if __name__ == "__main__":
    main()
