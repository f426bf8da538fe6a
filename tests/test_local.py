"""What one layer alone makes of the inputs, with weights of its own, belongs to its block; what more of the network reads belongs to the stem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusionblocks.converter import convert
from diffusionblocks.converter.analysis import analyse
from diffusionblocks.converter.cut import cut, cuts_of
from diffusionblocks.converter.partition import Partition
from diffusionblocks.converter.residual import find_trunk
from diffusionblocks.export import export_bundle
from diffusionblocks.export.verify import verify_bundle
from diffusionblocks.runtime import manifest
from torch import nn
from torch.nn import functional as F

WIDTH, LAYERS = 16, 4


class Layer(nn.Module):
    """Attention to another input, and a feed-forward part; both modulated by a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.q, self.kv, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, condition: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        a, b = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        k, v = self.kv(other).chunk(2, -1)
        x = x + self.o(F.scaled_dot_product_attention(self.q(x * (1 + a)), k, v))
        return x + self.mlp(x * (1 + b))


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.condition, self.other = (nn.Linear(8, WIDTH) for _ in range(3))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.last, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor, condition: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        x, condition, other = self.embed(x), self.condition(condition), self.other(other)
        for layer in self.layers:
            x = layer(x, condition, other)
        return self.head((x * (1 + self.last(condition)[:, None])).mean(1))


class OneModulation(Modulated):
    """All layers modulated by one layer's weights."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers[1:]:
            layer.modulation = self.layers[0].modulation


class TwoTowers(nn.Module):
    """A chain behind a chain, each with an embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.other = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH)
        self.first, self.second = (nn.ModuleList(self.part() for _ in range(LAYERS)) for _ in range(2))
        self.head = nn.Linear(2 * WIDTH, 5)

    @staticmethod
    def part() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        x, condition = self.embed(x), self.other(condition)
        for part in self.first:
            x = x + part(x)
        for part in self.second:
            condition = condition + part(condition)
        return self.head(torch.cat([x, condition], -1))


def example(n: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = {"x": (n, 6, 8), "condition": (n, 8), "other": (n, 7, 8)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def weights(piece: Any) -> set[str]:
    """The layers and other modules whose weights a piece holds."""
    return {name.rpartition(".")[0] for name, _ in piece.module.named_parameters()}


def test_a_layers_modulation_and_keys_stay_with_its_block() -> None:
    network = convert(Modulated().eval(), example(), num_blocks=2)
    assert weights(network.stem) == {"embed", "condition", "other"}
    assert weights(network.head) == {"last", "head"}
    for b, piece in enumerate(network.contexts):
        held = {name for name in weights(piece) if name.endswith(("modulation", "kv"))}
        assert held == {f"layers.{k}.{part}" for k in (2 * b, 2 * b + 1) for part in ("modulation", "kv")}
        assert len(piece.inputs) == 3  # the state, the condition and the other input, embedded: once for all layers
    with torch.no_grad():
        inputs = example(5)
        assert torch.equal(network.exact(inputs)[0], network.analysis.captured.graph(*inputs.values())[0])


def test_what_a_divided_layer_reads_is_the_stems() -> None:
    network = convert(Modulated().eval(), example(), num_blocks=8)
    modulations = {f"layers.{k}.modulation" for k in range(LAYERS)}
    assert weights(network.stem) == {"embed", "condition", "other"} | modulations
    assert all(not weights(piece) & modulations for piece in network.contexts)
    assert [{n for n in weights(p) if n.endswith("kv")} for p in network.contexts[::2]] == [{f"layers.{k}.kv"} for k in range(LAYERS)]  # fmt: skip


def test_what_the_whole_trunk_reads_is_the_stems_however_few_blocks_there_are() -> None:
    network = convert(Modulated().eval(), example(), num_blocks=1)
    assert weights(network.stem) == {"embed", "condition", "other"}


def test_weights_that_several_layers_read_are_the_stems() -> None:
    network = convert(OneModulation().eval(), example(), num_blocks=2)
    assert any("modulation" in name for name in weights(network.stem))
    assert not any("modulation" in name for piece in network.contexts for name in weights(piece))
    with torch.no_grad():
        assert torch.equal(network.exact(example(5))[0], OneModulation()(**example(5)))


def test_what_enters_a_later_trunk_is_the_stems() -> None:
    inputs = {"x": torch.randn(3, 8), "condition": torch.randn(3, 8)}
    model = TwoTowers().eval()
    network = convert(model, inputs, num_blocks=2)
    assert weights(network.stem) == {"embed", "other"}
    assert network.analysis.cuts.local == ()
    with torch.no_grad():
        assert torch.equal(network.exact(inputs)[0], model(**inputs))


class Twice(Layer):
    """What it makes of the condition passes through weights that all layers read, between two that it alone reads."""

    shared = nn.Linear(WIDTH, WIDTH)

    def __init__(self) -> None:
        super().__init__()
        self.before, self.common = nn.Linear(WIDTH, WIDTH), self.shared

    def forward(self, x: torch.Tensor, condition: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return super().forward(x, self.common(self.before(condition)), other)


def test_what_the_stem_reads_is_the_stems() -> None:
    model = Modulated().eval()
    model.layers = nn.ModuleList(Twice() for _ in range(LAYERS)).eval()
    network = convert(model, example(), num_blocks=2)
    assert {f"layers.{k}.before" for k in range(LAYERS)} <= weights(network.stem)
    assert any("common" in name for name in weights(network.stem))
    assert not any("modulation" in name for name in weights(network.stem))
    with torch.no_grad():
        assert torch.equal(network.exact(example(5))[0], model(**example(5)))


class Shaped(Layer):
    """Its modulation is made of the condition in another shape, with one size left open."""

    def forward(self, x: torch.Tensor, condition: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        a, b = self.modulation(F.silu(condition)).reshape(len(x), -1, 2 * WIDTH).chunk(2, -1)
        x = x + self.o(self.q(x * (1 + a)))
        return x + self.mlp(x * (1 + b))


def test_a_size_left_open_is_known_in_a_piece(tmp_path: Path) -> None:
    model = Modulated().eval()
    model.layers = nn.ModuleList(Shaped() for _ in range(LAYERS)).eval()
    inputs = {name: value for name, value in example().items() if name != "other"}
    model.forward = lambda x, condition: Modulated.forward(model, x, condition, x)
    network = convert(model, inputs, num_blocks=2)
    reshapes = [n for n in network.contexts[1].module.graph.nodes if "reshape" in str(n.target)]
    assert reshapes
    assert all(-1 not in n.args[1] for n in reshapes)
    assert verify_bundle(export_bundle(network, tmp_path / "made.dblocks")).ok


def test_what_nobody_reads_does_not_follow_a_layer() -> None:
    """And so what it reads does not either: the stem reads no block."""
    captured = analyse(Modulated().eval(), example(), num_blocks=2).captured
    graph = captured.graph.graph
    made = next(n for n in graph.nodes if "layers_0_kv" in str(n.args[1:2]) and n.users)
    keys = next(n for n in next(iter(made.users)).users)
    with graph.inserting_after(keys):
        acts = graph.call_function(torch.ops.aten.relu_.default, (keys,))  # written into, and not read
        acts.meta = dict(keys.meta)
    captured.graph.recompile()
    found = find_trunk(captured.graph)
    cuts = cuts_of(found, Partition((4, 4), "units"))
    kept = {n.name for n in cuts.kept}
    assert made.name not in kept
    assert any("layers_1_kv" in str(n.args[1:2]) for n in cuts.kept)
    assert "layers.0.kv" in weights(cut(captured.graph, cuts)[0])


class InPlace(Layer):
    """Writes into what it made of the other input."""

    def forward(self, x: torch.Tensor, condition: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        made = self.kv(other)
        made.mul_(2.0)
        k, v = made.chunk(2, -1)
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), k, v))
        return x + self.mlp(x * (1 + self.modulation(condition)[:, None, :WIDTH]))


def test_what_is_written_into_is_written_into_where_it_is_read() -> None:
    model = Modulated().eval()
    model.layers = nn.ModuleList(InPlace() for _ in range(LAYERS)).eval()
    network = convert(model, example(), num_blocks=2)
    with torch.no_grad():
        assert torch.equal(network.exact(example(5))[0], model(**example(5)))


@pytest.mark.parametrize("context", ["frozen", "stem", "carry"])
def test_bundles_of_such_a_network_are_its_own(context: str, tmp_path: Path) -> None:
    network = convert(Modulated().eval(), example(), num_blocks=2, context=context)
    network.trained = [True] * 2
    for block in network.blocks:  # its conditioning starts at zero
        for name, parameter in block.module.named_parameters():
            if "adaln" in name:
                nn.init.normal_(parameter, std=0.1)
    folder = export_bundle(network, tmp_path / "made.dblocks")
    assert verify_bundle(folder).ok
    records = manifest.read(folder)
    alone = sum(p.nbytes for p in network.stem.module.parameters())
    assert records.stem.bytes == pytest.approx(alone, rel=0.1)


def test_a_part_is_as_wide_as_what_reads_it() -> None:
    found = analyse(Modulated().eval(), example(), num_blocks=2)
    assert [(part.first, part.last) for part in found.cuts.local] == [(0, 0), (0, 1), (2, 2), (2, 3), (4, 4), (4, 5), (6, 6), (6, 7), (8, 8)]  # fmt: skip
