"""A small language model of bytes on the documentation inside Python's own modules: trained whole, converted, its blocks fine-tuned, scored, and continued by the runtime.

python examples/language.py        # about a minute on two cores
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from pathlib import Path

import numpy as np
import torch
from diffusionblocks.converter import convert, finetune
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import open_bundle
from diffusionblocks.runtime.language import generate, score
from torch import nn
from torch.nn import functional as F

OUT, LENGTH, BYTES = Path("demo"), 48, 128
MODULES = [
    "argparse",
    "ast",
    "asyncio",
    "collections",
    "contextlib",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "email",
    "fractions",
    "functools",
]
MODULES += [
    "inspect",
    "ipaddress",
    "json",
    "logging",
    "pathlib",
    "pickle",
    "random",
    "re",
    "shutil",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
]
MODULES += ["tempfile", "textwrap", "threading", "turtle", "typing", "unittest", "uuid", "zipfile"]


class Layer(nn.Module):
    """Causal attention and MLP, pre-norm: two residual units."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens [N, 48] -> logits [N, 48, 128] of the next one."""

    def __init__(self, dim: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(BYTES, dim), nn.Parameter(0.02 * torch.randn(LENGTH, dim))
        self.layers = nn.ModuleList(Layer(dim, 4) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, BYTES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def windows() -> torch.Tensor:
    """Windows [M, 48] of the docstrings of the standard library."""
    texts = []
    for name in MODULES:
        module = importlib.import_module(name)
        owners = [module, *(v for _, v in inspect.getmembers(module) if inspect.isclass(v) or inspect.isfunction(v))]
        texts += [text for owner in owners if (text := inspect.getdoc(owner))]
    data = np.frombuffer("\n".join(texts).encode("ascii", "ignore"), np.uint8)
    return torch.from_numpy(data[: len(data) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="Updates of the whole model, and of each block.")
    steps = parser.parse_args().steps
    OUT.mkdir(exist_ok=True)
    torch.manual_seed(0)
    rows = windows()[torch.randperm(len(windows()))]
    train, test = rows[:-200], rows[-200:]
    print(f"{train.numel():,} bytes of documentation. Training a GPT of six layers ...")
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (32,))]
        loss = F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network = convert(model.eval(), (train[:3],), num_blocks=3, task="lm")
    finetune(network, train, steps=steps, batch_size=32)
    folder = export_bundle(network, OUT / "language.dblocks", force=True)
    with open_bundle(folder) as bundle:
        exact, blocks = (float(score(bundle, test.numpy(), mode=mode).mean()) for mode in ("exact", "denoise"))
        prompt = np.frombuffer(b"Return the ", np.uint8).astype(np.int64)
        made = generate(bundle, prompt[None], 60, mode="denoise", temperature=0.7, seed=1)[0]
    print("Return the" + bytes(made.tolist()).decode("ascii").replace("\n", " "))
    print(f"nats per byte: {exact:.3f} the original, {blocks:.3f} its blocks (all bytes alike: {np.log(BYTES):.3f})")


if __name__ == "__main__":
    main()
