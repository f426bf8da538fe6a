"""Embeddings that are repeated for the frames of each sample: their rows are followed, with a size that torch is told beforehand."""

from __future__ import annotations

import torch
from diffusionblocks.converter.capture import capture
from diffusionblocks.converter.graph import GraphView
from diffusionblocks.converter.samples import Samples, batch_symbols, samples_of
from torch import fx, nn

DIM, FRAMES = 8, 4


class Frames(nn.Module):
    """Residual layers on [N x frames, 8], each with an embedding of its sample added inside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.stem = nn.Linear(3, DIM), nn.Linear(5, DIM)
        self.mlps = nn.ModuleList(nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU()) for _ in range(3))

    def forward(self, x: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        size = x.shape[0] * FRAMES
        embedding = self.embed(kind).repeat_interleave(FRAMES, dim=0, output_size=size)
        x = self.stem(x).reshape(size, DIM)
        for mlp in self.mlps:
            x = x + mlp(x + embedding)
        return x.reshape(-1, FRAMES * DIM)


def test_repeated_rows_are_followed() -> None:
    torch.manual_seed(0)
    graph = capture(Frames().eval(), (torch.randn(3, FRAMES, 5), torch.randn(3, 3))).graph
    view = GraphView(graph)
    repeated = next(n for n in graph.graph.nodes if "repeat_interleave" in str(n.target))
    assert any(isinstance(a, fx.Node) for a in repeated.kwargs.values())
    assert samples_of(view, repeated, batch_symbols(graph.graph.nodes)) == Samples(0, FRAMES)
