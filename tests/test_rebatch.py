"""A model that turns its number of rows into a plain number gets a dynamic batch all the same, where that number is all that changes."""

from __future__ import annotations

import pytest
import torch
from diffusionblocks.converter import convert
from diffusionblocks.converter.rebatch import rebatched
from diffusionblocks.runtime import BadInput
from torch import nn

DIM = 16


class Counting(nn.Module):
    """Residual layers; ``how`` its forward counts the rows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.head = nn.Linear(8, DIM), nn.Linear(DIM, 5)
        self.mlps = nn.ModuleList(nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU()) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = int(x.shape[0])
        x = self.embed(x)
        if self.how == "list":
            x = x + torch.tensor([0.5] * rows)[:, None]
        elif self.how == "numbered":
            x = x + torch.tensor([0.5 * i for i in range(rows)])[:, None]
        elif self.how == "loop":
            x = torch.stack([x[i] * 2 for i in range(rows)])
        for mlp in self.mlps:
            x = x + mlp(x.reshape(rows, DIM))
        return self.head(x)


@pytest.mark.parametrize("how", ["number", "list"])
def test_the_batch_is_dynamic_again(how: str) -> None:
    torch.manual_seed(0)
    model = Counting(how).eval()
    network = convert(model, input_shape=(8,), num_blocks=2)
    for rows in (1, 2, 7):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            assert torch.equal(network.exact(x)[0], model(x))
    assert [unit.name for unit in network.analysis.found.trunk] == [f"mlps.{i}.1" for i in range(4)]


@pytest.mark.parametrize("how", ["numbered", "loop"])
def test_what_differs_from_sample_to_sample_is_refused(how: str) -> None:
    model = Counting(how).eval()
    assert rebatched(model, (torch.randn(3, 8),), {}) is None
    with pytest.raises(BadInput, match="batch"):
        convert(model, input_shape=(8,), num_blocks=2)
