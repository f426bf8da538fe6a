"""Fixtures: a small trained network, its bundle, and torch set up for exact comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusionblocks.converter.vision import ensure_torchvision
from torch import nn

ensure_torchvision()


@pytest.fixture(autouse=True)
def _exact_attention():
    """nn.TransformerEncoder's fused eager path differs from its own captured graph in the last bits."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


class Unit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def small_mlp(units: int = 6, width: int = 32, classes: int = 10, inputs: int = 64) -> nn.Module:
    torch.manual_seed(0)
    head = [nn.LayerNorm(width), nn.Linear(width, classes)]
    return nn.Sequential(nn.Linear(inputs, width), *(Unit(width) for _ in range(units)), *head).eval()


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.data[order] / 16 - 0.3).astype(np.float32), data.target[order].astype(np.int64)


@pytest.fixture(scope="session")
def trained_mlp(digits: tuple[np.ndarray, np.ndarray]) -> nn.Module:
    """A residual MLP trained end to end on 1,400 digits."""
    model = small_mlp().train()
    x, y = map(torch.from_numpy, digits)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        rows = torch.randint(1400, (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def program_file(trained_mlp: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained network as an exported program with a dynamic batch."""
    path = tmp_path_factory.mktemp("program") / "model.pt"
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(trained_mlp, (torch.randn(3, 64),), dynamic_shapes=({0: batch},), strict=False)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="session")
def data_file(digits: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.npz"
    np.savez(path, x=digits[0][:1400], y=digits[1][:1400])
    return path


@pytest.fixture(scope="session")
def bundles(trained_mlp: nn.Module, digits: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory):
    """For each context: the trained converted network and its bundle."""
    from diffusionblocks.converter import convert, finetune
    from diffusionblocks.export import export_bundle

    made = {}
    for context, tune in (("frozen", "adaln"), ("carry", "block"), ("stem", "lora")):
        network = convert(trained_mlp, input_shape=(64,), num_blocks=3, context=context, tune=tune)
        finetune(network, digits[0][:1400], digits[1][:1400], steps=40, lr=1e-3)
        folder = tmp_path_factory.mktemp(context) / "model.dblocks"
        export_bundle(network, folder)
        made[context] = (network, folder)
    return made
