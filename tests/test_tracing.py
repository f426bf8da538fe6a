"""Models that do more than compute: they ask whether they are exported, move their modules, return objects, loop over what was hit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusionblocks.converter import tracing
from diffusionblocks.converter.capture import capture
from diffusionblocks.converter.constants import fold
from diffusionblocks.converter.residual import find_trunk
from diffusionblocks.runtime import BadInput
from torch import nn
from torch.nn.utils import parametrizations

DIM = 16


class Layers(nn.Module):
    """Residual layers on [N, 6, 16]; ``before`` changes what enters them."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU()) for _ in range(3))

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        for mlp in self.mlps:
            x = x + mlp(x)
        return x


class Shifted(Layers):
    """Softmax of logits that are all one larger while it is exported: the same function, other last digits."""

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return (x + torch.ones(()) if torch.compiler.is_exporting() else x).softmax(-1)


class Failing(Layers):
    """It knows no export."""

    def before(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            raise NotImplementedError("not while it is compiled")
        return x.exp()


class Deciding(Layers):
    def before(self, x: torch.Tensor) -> torch.Tensor:
        return x if not torch.compiler.is_exporting() and x.sum() > 0 else 2 * x


class Moving(Layers):
    def before(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlps.to(torch.float32)[0](x)


class Cache:
    def __init__(self, kept: torch.Tensor) -> None:
        self.kept = kept


class Returning(Layers):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Cache]:  # type: ignore[override]
        return super().forward(x), Cache(x)


class Experts(Layers):
    """Each position to the best of four experts, in a loop over those that have any."""

    places = 4

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 4)
        self.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(DIM, DIM) for i in range(4)})

    def before(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, DIM)
        mask = nn.functional.one_hot(self.router(rows).argmax(-1), self.places).t()  # [experts, rows]
        result = torch.zeros_like(rows)
        for hit in (mask.sum(-1) > 0).nonzero():
            (places,) = torch.where(mask[hit].squeeze(0))
            result.index_add_(0, places, self.experts[f"expert_{hit[0]}"](rows[places]))
        return result.reshape(x.shape)


class Dropping(Experts):
    """A fifth place, for tokens of no expert, that none ever takes."""

    places = 5


def _equal(model: nn.Module, rows: int = 5) -> bool:
    captured = capture(model.eval(), input_shape=(6, DIM))
    x = torch.randn(rows, 6, DIM)
    with torch.no_grad():
        expected = model(x)
    got = captured.graph(x)
    return len(got) == 1 and torch.equal(got[0], expected[0] if isinstance(expected, tuple) else expected)


@pytest.mark.parametrize("model", [Layers, Shifted, Failing, Moving, Returning, Experts, Dropping])
def test_the_graph_is_the_model_to_the_bit(model: type[Layers]) -> None:
    torch.manual_seed(0)
    assert _equal(model())


def test_a_loop_over_hits_is_one_over_all_experts() -> None:
    """Also those without any position, of which the example may have none."""
    torch.manual_seed(0)
    model = Experts()
    with torch.no_grad():
        model.router.bias[2] = -1e3
    captured = capture(model.eval(), input_shape=(6, DIM))
    with torch.no_grad():
        model.router.bias[2] = 1e3
        x = torch.randn(5, 6, DIM)
        assert torch.equal(captured.graph(x)[0], model(x))


class Rows(Layers):
    """A loop over the samples that are hit, whose number is no constant."""

    def before(self, x: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for hit in (x.sum((1, 2)) > 0).nonzero():
            result[hit] = x[hit] * 2
        return result


def test_a_loop_over_samples_is_refused() -> None:
    with pytest.raises(BadInput):
        capture(Rows().eval(), input_shape=(6, DIM))


def test_a_module_that_is_moved_elsewhere_moves() -> None:
    model = Layers()
    with tracing.settled(model):
        assert model.to(torch.float32) is model
        assert model.mlps.to(torch.float64)[0][1].weight.dtype == torch.float64
        assert model.mlps.to(torch.float32)[0][1].weight.dtype == torch.float32


def test_a_decision_is_left_out_only_where_the_model_leaves_it_out() -> None:
    """Exported it doubles its input, otherwise it decides by the input's sum: no graph is the model."""
    torch.manual_seed(0)
    model = Deciding().eval()
    with pytest.raises(BadInput):
        capture(model, (torch.rand(3, 6, DIM),))


def test_a_model_that_asks_its_tensors_is_captured_as_it_computes() -> None:
    """Where it is exported, Nystromformer makes the mask of ones that it leaves out otherwise, and fails with it."""
    torch.manual_seed(0)
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.NystromformerConfig(
        vocab_size=50,
        num_landmarks=4,
        segment_means_seq_len=16,
        max_position_embeddings=32,
        conv_kernel_size=3,
        **sizes,
    )
    model = transformers.NystromformerModel(config).eval()
    captured = capture(model, {"input_ids": torch.randint(0, 50, (3, 16))})
    ids = torch.randint(0, 50, (5, 16))
    with torch.no_grad():
        assert torch.equal(captured.graph(ids)[0], model(ids)[0])
    assert transformers.utils.import_utils.is_fake_tensor.__module__ == "transformers.utils.import_utils"


def test_whoever_asks_is_noted_and_answered_truly() -> None:
    with tracing.watched() as asking:
        assert torch.compiler.is_exporting() is False
    assert asking == [__name__]


def test_nothing_stays_changed() -> None:
    model = Layers()
    before = torch.Tensor.nonzero, torch.Tensor.__iter__, nn.Module.to, torch.compiler.is_exporting
    with tracing.settled(model), tracing.unnoticed():
        assert hasattr(torch.SymFloat, "sqrt")
        assert torch.Tensor.nonzero is not before[0]
    assert before == (torch.Tensor.nonzero, torch.Tensor.__iter__, nn.Module.to, torch.compiler.is_exporting)
    assert not hasattr(torch.SymFloat, "sqrt")
    assert "forward" not in vars(model)


class Tables(Layers):
    """Frequencies, and a quotient of two sizes that is the same in every batch."""

    def before(self, x: torch.Tensor) -> torch.Tensor:
        angles = 1000 * torch.exp(-torch.arange(DIM) / 3)
        large = torch.arange(70_000.0).sqrt().sum() if x.shape[1] > 5 else 0
        return x * angles.sin() * float(np.sqrt(x.numel() / x[..., 0].numel())) + large


def test_tables_of_constants_are_folded() -> None:
    torch.manual_seed(0)
    model = Tables()
    assert _equal(model)
    graph = capture(model.eval(), input_shape=(6, DIM)).graph
    names = [str(n.target) for n in graph.graph.nodes]
    assert not any("exp" in name or "sin" in name or "sqrt" in name for name in names)
    assert {tuple(b.shape) for n, b in graph.named_buffers() if n.startswith("folded_")} == {(DIM,), ()}


def test_what_the_batch_or_chance_makes_is_not_folded() -> None:
    class Others(Layers):
        def before(self, x: torch.Tensor) -> torch.Tensor:
            table = torch.arange(x.shape[0]).exp()[:, None, None]
            return x + table + torch.arange(70_000).sqrt()[:DIM] + self.mlps[0][1].weight.exp()[0]

    graph = capture(Others().eval(), input_shape=(6, DIM)).graph
    count = len(list(graph.graph.nodes))
    fold(graph)
    assert len(list(graph.graph.nodes)) == count
    folded = [tuple(b.shape) for n, b in graph.named_buffers() if n.startswith("folded_")]
    assert folded == [(DIM,)]  # the slice of the large table


def test_weights_made_by_a_decomposition_are_folded() -> None:
    """An orthogonal layer: ONNX has no matrix exponential, and needs none."""
    torch.manual_seed(0)
    model = Layers()
    for mlp in model.mlps:
        parametrizations.orthogonal(mlp[1], orthogonal_map="matrix_exp")
    graph = capture(model.eval(), input_shape=(6, DIM)).graph
    assert not any("matrix_exp" in str(n.target) for n in graph.graph.nodes)
    assert find_trunk(graph).branches == 3
    x = torch.randn(5, 6, DIM)
    with torch.no_grad():
        assert torch.equal(graph(x)[0], model(x))
