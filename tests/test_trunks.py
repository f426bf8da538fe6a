"""More than one trunk: an encoder and its decoder, two towers, a stream beside another; cut, conditioned and run to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.capture import capture
from diffusionblocks.converter.residual import Found, find_trunk
from diffusionblocks.runtime.errors import BadInput
from torch import nn

DIM = 16


class Layer(nn.Module):
    """Self-attention, cross-attention where there is a memory, and an MLP, each a pre-norm unit."""

    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(DIM, 2, batch_first=True) if cross else None
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        n = self.norms[0](x)
        x = x + self.attention(n, n, n, need_weights=False)[0]
        if self.cross is not None:
            x = x + self.cross(self.norms[1](x), memory, memory, need_weights=False)[0]
        return x + self.mlp(self.norms[2](x))


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(6, DIM), nn.Linear(5, DIM)
        self.encoder = nn.ModuleList(Layer() for _ in range(2))
        self.decoder = nn.ModuleList(Layer(cross=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 7)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        memory, h = self.source(x), self.target(y)
        for layer in self.encoder:
            memory = layer(memory)
        memory = self.norm(memory)
        for layer in self.decoder:
            h = layer(h, memory)
        return self.head(h.mean(1))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, DIM), Layer(), Layer(), Layer())
        self.right = nn.Sequential(nn.Linear(5, DIM), Layer(), Layer())
        self.head = nn.Linear(2 * DIM, 7)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.left(x).mean(1), self.right(y).mean(1)], -1))


class Woven(nn.Module):
    """Two streams, each of which reads the other after every unit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, DIM), nn.Linear(5, DIM)
        self.ab = nn.ModuleList(nn.Linear(2 * DIM, DIM) for _ in range(4))
        self.ba = nn.ModuleList(nn.Linear(2 * DIM, DIM) for _ in range(3))
        self.head = nn.Linear(DIM, 7)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x).mean(1), self.b(y).mean(1)
        for i in range(4):
            joint = torch.cat([a, b], -1)
            a = a + torch.tanh(self.ab[i](joint))
            if i < 3:
                b = b + torch.tanh(self.ba[i](joint))
        return self.head(a)


MODELS = {"encoder-decoder": EncoderDecoder, "towers": Towers, "woven": Woven}


def _inputs(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {"x": torch.randn(batch, 4, 6, generator=generator), "y": torch.randn(batch, 3, 5, generator=generator)}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def _found(name: str) -> Found:
    return find_trunk(capture(_model(name), _inputs(3)).graph)


def test_a_decoder_is_a_trunk_of_its_own_behind_its_encoder() -> None:
    found = _found("encoder-decoder")
    assert [len(t) for t in found.trunks] == [4, 6]
    assert found.beside == ()
    assert {u.name.split(".")[0] for u in found.trunks[0]} == {"encoder"}
    assert {u.name.split(".")[0] for u in found.trunks[1]} == {"decoder"}


def test_two_towers_are_two_trunks() -> None:
    assert sorted(len(t) for t in _found("towers").trunks) == [4, 6]


def test_a_stream_that_is_woven_with_a_longer_one_lies_beside_it() -> None:
    found = _found("woven")
    assert [len(t) for t in found.trunks] == [4]
    assert [len(t) for t in found.beside] == [3]
    assert found.branches == 7


def test_one_chain_is_one_trunk() -> None:
    class Single(Towers):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            h = self.left(x)
            for layer in list(self.right)[1:]:
                h = layer(h)
            return self.head(torch.cat([h.mean(1), h[:, 0] * y.mean()], -1))

    found = find_trunk(capture(Single().eval(), _inputs(3)).graph)
    assert [len(t) for t in found.trunks] == [10]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_divided_to_the_bit(name: str, blocks: int) -> None:
    model = _model(name)
    network = convert(model, _inputs(3), num_blocks=blocks, tune="adaln")
    for batch in (1, 5):
        with torch.no_grad():
            expected = model(**_inputs(batch))
        assert torch.equal(network.exact(_inputs(batch))[0], expected)


@pytest.mark.parametrize("name", ["encoder-decoder", "woven"])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("context", ["frozen", "carry"])
def test_conditioned_to_the_bit(name: str, blocks: int, context: str) -> None:
    """The last block on the original's state before it gives the original's output, whatever z and sigma are."""
    model = _model(name)
    network = convert(model, _inputs(3), num_blocks=blocks, context=context, tune="adaln")
    for batch in (1, 5):
        env = network.inputs_env(_inputs(batch))
        with torch.no_grad():
            network.run_stem(env)
            for b in range(blocks - 1):
                network.run_context(env, b)
            z = torch.randn(batch, network.require_target().dim)
            f, _ = network.run_block(env, blocks - 1, z, torch.ones(batch))
            assert torch.equal(f, model(**_inputs(batch)))


def test_a_head_that_reads_two_towers_runs_exact_and_is_not_trained() -> None:
    network = convert(_model("towers"), _inputs(3), num_blocks=2)
    x = {name: tensor.numpy() for name, tensor in _inputs(20).items()}
    with pytest.raises(BadInput, match="which only later blocks make"):
        finetune(network, x, np.arange(20) % 7, steps=1)


def test_the_decoder_reads_the_encoder_as_a_side_input() -> None:
    network = convert(_model("encoder-decoder"), _inputs(3), split=(4, 6))
    encoder, decoder = network.contexts
    assert all(u.startswith("encoder") for u in network.blocks[0].units)
    assert all(u.startswith("decoder") for u in network.blocks[1].units)
    assert len(network.input_names_of(decoder)) == 2
    assert set(network.input_names_of(decoder)[1:]) <= {
        *network.output_names(encoder),
        *network.output_names(network.stem),
    }
