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
        self.pad = nn.Parameter(torch.ones(4))
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
        elif self.how == "loop of another kind":
            x = torch.stack([x[i] * (1 + i % 2) for i in range(rows)])
        elif self.how == "by the values":
            x = torch.cat([x[i : i + 1] * len(torch.nonzero(x[i] > 0)) for i in range(rows)])
        elif self.how == "many":
            x = x * 2 if rows > 6 else x
        elif self.how == "packed":
            x = self.packed(x)
        for mlp in self.mlps:
            x = x + mlp(x.reshape(rows, DIM))
        return self.head(x)

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """Samples of [16] as lists of tokens that are padded, packed with a table for each, projected, and parted again."""
        tokens, tables = [], []
        for row in x.unbind():
            row = row.view(2, 2, 4).permute(1, 0, 2).reshape(4, 4)
            tokens.append(torch.cat([row, row[-1:].repeat(2, 1)]))
            tables.append(torch.arange(6.0).sin()[:, None] * torch.ones(6, 4))
        packed = torch.cat(tokens) + torch.cat(tables)
        lengths = [len(t) for t in tokens]
        packed = torch.where(torch.tensor([0, 0, 0, 0, 1, 1] * len(tokens)).bool()[:, None], self.pad, packed)
        padded = nn.utils.rnn.pad_sequence(packed.split(lengths), batch_first=True)
        rows = [torch.cat([padded[i][:4].transpose(0, 1), x[i].reshape(4, 4)]) for i in range(len(padded))]
        parts = [r.unsqueeze(0).flatten(1).chunk(2, dim=-1)[0] for r in rows]
        return torch.cat(parts)


@pytest.mark.parametrize("how", ["number", "list", "loop", "packed"])
def test_the_batch_is_dynamic_again(how: str) -> None:
    torch.manual_seed(0)
    model = Counting(how).eval()
    network = convert(model, input_shape=(8,), num_blocks=2)
    for rows in (1, 2, 7):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            assert torch.equal(network.exact(x)[0], model(x))
    assert [unit.name for unit in network.analysis.found.trunk] == [f"mlps.{i}.1" for i in range(4)]


@pytest.mark.parametrize("how", ["numbered", "loop of another kind", "by the values", "many"])
def test_what_differs_from_sample_to_sample_is_refused(how: str) -> None:
    model = Counting(how).eval()
    assert rebatched(model, (torch.randn(3, 8),), {}) is None
    with pytest.raises(BadInput, match="batch"):
        convert(model, input_shape=(8,), num_blocks=2)


class Pieces(nn.Module):
    """Goes through its samples in pieces of 8, and either takes each sample by itself or not."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.centred, self.embed, self.mlp = centred, nn.Linear(8, DIM), nn.Sequential(nn.Linear(DIM, DIM), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.embed(p - p.mean(0) if self.centred else p) for p in x.split(8)])
        return x + self.mlp(x)


def test_pieces_of_the_batch_are_one() -> None:
    torch.manual_seed(0)
    model, x = Pieces(centred=False).eval(), torch.randn(21, 8)
    network = convert(model, input_shape=(8,), num_blocks=1)
    with torch.no_grad():
        torch.testing.assert_close(network.exact(x)[0], model(x))


def test_pieces_that_see_each_other_are_refused() -> None:
    with pytest.raises(BadInput, match="a batch of 9 otherwise than one of 3"):
        convert(Pieces(centred=True).eval(), input_shape=(8,), num_blocks=1)
