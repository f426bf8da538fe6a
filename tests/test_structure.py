"""Pieces of one structure are exported once, each with its own weights; what differs in anything but weights is exported by itself."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusionblocks.converter import convert
from diffusionblocks.export import graph as graphs
from diffusionblocks.export.bundle import NetworkParts
from diffusionblocks.export.graph import Exporter, Piece
from diffusionblocks.export.structure import structure_of, weights_of
from torch import fx, nn


class Layer(nn.Module):
    """Two linear layers (whose weights ONNX transposes), a table read as it is, a factor that is no weight."""

    def __init__(self, seed: int, factor: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.table = nn.Parameter(torch.randn(8))
        self.factor = factor

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * self.table + self.factor * self.b(torch.relu(self.a(x))),)


def _piece(module: nn.Module, name: str = "stream") -> Piece:
    return Piece(module, (name,), (f"{name}_out",), (torch.randn(3, 8, generator=torch.Generator().manual_seed(0)),))


def _run(model: onnx.ModelProto, *values: torch.Tensor) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: v.numpy() for i, v in zip(session.get_inputs(), values, strict=True)})[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each call of torch's exporter was given."""
    found: list[int] = []
    export = graphs._export

    def counted(pieces: list[Piece], half: bool) -> object:
        found.append(len(pieces))
        return export(pieces, half)

    monkeypatch.setattr(graphs, "_export", counted)
    return found


def test_equal_structures_are_exported_once_with_their_own_weights(calls: list[int]) -> None:
    exporter, x = Exporter(), torch.randn(5, 8)
    modules = [Layer(seed) for seed in range(3)]
    for k, module in enumerate(modules):
        model = exporter(_piece(module, f"value_{k}"))
        assert [i.name for i in model.graph.input] == [f"value_{k}"]
        assert [o.name for o in model.graph.output] == [f"value_{k}_out"]
        assert np.abs(_run(model, x) - module(x)[0].detach().numpy()).max() < 1e-5
    assert calls == [1]


def test_a_difference_that_is_no_weight_is_exported_again(calls: list[int]) -> None:
    exporter, x = Exporter(), torch.randn(5, 8)
    for module in (Layer(0), Layer(0, factor=3.0)):
        assert np.abs(_run(exporter(_piece(module)), x) - module(x)[0].detach().numpy()).max() < 1e-5
    assert calls == [1, 1]


def test_a_product_takes_the_transpose_of_its_weight_in() -> None:
    """A product with three dimensions is a MatMul, which wants the weight the other way round than torch holds it; ONNX Runtime makes the transpose a part of it."""
    module, x = Layer(0), torch.randn(3, 5, 8)
    model = Exporter()(Piece(module, ("stream",), ("stream_out",), (x,)))
    assert np.abs(_run(model, x) - module(x)[0].detach().numpy()).max() < 1e-5
    assert {"a.weight", "b.bias", "table"} <= {t.name for t in model.graph.initializer}
    stored = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer]
    assert any(np.array_equal(s, module.a.weight.detach().numpy()) for s in stored)


def test_other_transposes_are_carried_out_when_a_weight_is_stored() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 5))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x + self.table.T,)

    module, x = Turned(), torch.randn(3, 5, 8)
    model = Exporter()(Piece(module, ("stream",), ("stream_out",), (x,)))
    assert np.abs(_run(model, x) - module(x)[0].detach().numpy()).max() < 1e-5
    assert "Transpose" not in {n.op_type for n in model.graph.node}
    assert [list(t.dims) for t in model.graph.initializer] == [[5, 8]]


def test_a_weight_read_in_two_ways_keeps_its_transpose() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x @ self.weight + nn.functional.linear(x, self.weight),)

    module, x = Tied(), torch.randn(5, 8)
    model = Exporter()(_piece(module))
    assert sum(t.dims == [8, 8] for t in model.graph.initializer) == 1
    assert np.abs(_run(model, x) - module(x)[0].detach().numpy()).max() < 1e-5


def test_what_cannot_be_compared_is_exported_by_itself(calls: list[int]) -> None:
    class Opaque(Layer):
        def __init__(self, seed: int, function: object) -> None:
            super().__init__(seed)
            self.function = function

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.function(super().forward(x)[0]),)

    x, exporter = torch.randn(5, 8), Exporter()
    modules = [Opaque(0, torch.tanh), Opaque(0, torch.sigmoid)]
    assert [structure_of(m) for m in modules] == [None, None]
    for module in modules:
        assert np.abs(_run(exporter(_piece(module)), x) - module(x)[0].detach().numpy()).max() < 1e-5
    assert calls == [1, 1]


def test_graphs_differ_in_a_constant_argument() -> None:
    def scaled(factor: float) -> fx.GraphModule:
        class Scale(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * factor

        return fx.symbolic_trace(Scale())

    assert structure_of(scaled(2.0)) == structure_of(scaled(2.0))
    assert structure_of(scaled(2.0)) != structure_of(scaled(3.0))


def test_a_tensor_under_two_names_is_one_weight() -> None:
    layer = nn.Linear(4, 4, bias=False)
    assert list(weights_of(nn.Sequential(layer, layer))) == ["0.weight"]
    untied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert structure_of(nn.Sequential(layer, layer)) != structure_of(untied)


def _pieces(parts: NetworkParts) -> list[Piece]:
    blocks = [piece for b in parts.blocks for piece in (b.context, b.block)]
    return [parts.stem, parts.head, *(piece for piece in blocks if piece is not None)]


@pytest.mark.road
def test_exported_together_or_alone_the_graphs_compute_the_same(trained_mlp, calls: list[int]) -> None:
    pieces = _pieces(convert(trained_mlp, input_shape=(64,), num_blocks=3).parts())
    together = Exporter()
    assert together.prepare(pieces) == 4  # stem, head, context and block: the three blocks are alike
    made = [together(piece) for piece in pieces]
    assert calls == [4]
    for piece, one in zip(pieces, made, strict=True):
        values = tuple(v[:2] for v in piece.example)
        with torch.no_grad():
            expected = piece.module(*values)[0].numpy()
        for model in (one, Exporter()(piece)):
            assert np.abs(_run(model, *values) - expected).max() < 1e-5


def test_a_piece_that_fails_is_named_by_its_own_error(calls: list[int]) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x.reshape(3, 8) * 2,)

    exporter = Exporter()
    assert exporter.prepare([_piece(Layer(0)), _piece(Fixed())]) == 0
    exporter(_piece(Layer(0)))
    with pytest.raises(graphs.BadInput, match="hard-coded batch"):
        exporter(_piece(Fixed()))


def test_pieces_that_read_their_batch_size_do_not_read_one_another(calls: list[int]) -> None:
    """Sizes are read from whatever has them: exported together, each piece must find its own."""

    class Sized(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width
            self.table = nn.Parameter(torch.randn(1, width))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.cat([x, self.table.expand(x.shape[0], self.width)], -1),)

    pieces = [_piece(Sized(width)) for width in (2, 5)]
    exporter, x = Exporter(), torch.randn(4, 8)
    assert exporter.prepare(pieces) == 2
    for piece in pieces:
        model = exporter(piece)
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert np.array_equal(_run(model, x), piece.module(x)[0].detach().numpy())
    assert calls == [2]


def test_a_weight_that_is_not_read_makes_another_structure() -> None:
    def add_one(spare: bool) -> nn.Module:
        module = nn.Module()
        module.own = nn.Parameter(torch.randn(4))
        if spare:
            module.spare = nn.Parameter(torch.randn(2))
        graph = fx.Graph()
        graph.output((graph.call_function(torch.add, (graph.placeholder("x"), graph.get_attr("own"))),))
        made = fx.GraphModule(module, graph)
        if spare:
            made.register_parameter("spare", module.spare)
        return made

    assert structure_of(add_one(False)) == structure_of(add_one(False))
    assert structure_of(add_one(False)) != structure_of(add_one(True))
