"""Models that decide by their tensors' values: converted along their ModuleList where that is sound, and said; refused with the line elsewhere."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusionblocks.converter import convert
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import BadInput, open_bundle
from torch import nn

DIM, DEPTH = 16, 4


class Layer(nn.Module):
    def __init__(self, decides: bool = False) -> None:
        super().__init__()
        self.norm, self.mlp, self.decides = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), decides

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.decides and x.abs().mean() > 1e3:
            return x
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    """Decides in the ``stem``, in a ``layer``, ``between`` the layers (an early exit at ``limit``), in the ``head``, or without layers (``flat``)."""

    def __init__(self, where: str, limit: float = 1e3) -> None:
        super().__init__()
        self.where, self.limit = where, limit
        self.stem, self.head = nn.Linear(8, DIM), nn.Linear(DIM, 5)
        layers = [Layer(decides=where == "layer") for _ in range(DEPTH)]
        self.layers = nn.Sequential(*layers) if where == "flat" else nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.where in ("stem", "flat") and x.mean() > 1e3:
            x = x / 2
        for layer in self.layers:
            x = layer(x)
            if self.where == "between" and x.abs().mean() > self.limit:
                break
        if self.where == "head" and (x > 1e3).any():
            x = x / 2
        return self.head(x)


def _built(*args: object) -> Net:
    torch.manual_seed(0)
    return Net(*args).eval()  # type: ignore[arg-type]


def test_an_early_exit_is_converted_as_the_chain_of_all_layers(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    model = _built("between")
    with caplog.at_level(logging.WARNING):
        network = convert(model, input_shape=(8,), num_blocks=2)
    assert "between the layers of layers" in caplog.text
    assert "test_control_flow.py:" in caplog.text
    assert network.analysis.captured.notes
    assert [u.name for u in network.analysis.found.trunk] == [f"layers.{k}.mlp" for k in range(DEPTH)]
    export_bundle(network, tmp_path / "b")
    with open_bundle(tmp_path / "b") as bundle, torch.no_grad():
        for batch in (1, 5):
            x = torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))
            assert torch.equal(network.exact(x)[0], model(x))
            assert torch.allclose(torch.from_numpy(bundle.run(x.numpy(), mode="exact")), model(x), atol=1e-5)


def test_the_model_decides_as_before_afterwards() -> None:
    model, x = _built("between", 0.3), torch.randn(3, 8) * 1e4
    layers_run: list[int] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: layers_run.append(1))
    with torch.no_grad():
        model(x)
    assert len(layers_run) == 1


def test_an_exit_taken_on_the_example_is_refused() -> None:
    with pytest.raises(BadInput, match=r"test_control_flow\.py:\d+"):
        convert(_built("between", 1e-6), input_shape=(8,), num_blocks=2)


@pytest.mark.parametrize(
    ("where", "place"), [("stem", "stem"), ("layer", "layer 0"), ("head", "head"), ("flat", "forward")]
)
def test_a_decision_elsewhere_is_refused_with_its_line(where: str, place: str) -> None:
    with pytest.raises(BadInput, match=rf"test_control_flow\.py:\d+ \({place}\)") as caught:
        convert(_built(where), input_shape=(8,), num_blocks=2)
    assert "torch.where" in caught.value.hint


def test_a_model_without_decisions_is_not_touched() -> None:
    network = convert(_built("none"), input_shape=(8,), num_blocks=2)
    assert network.analysis.captured.notes == ()


class Causal(nn.Module):
    """Asks its own mask, which no input reaches, whether it is causal; or, ``padded``, a mask that comes from the input."""

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.layers, self.padded = nn.Sequential(*(Layer() for _ in range(DEPTH))), padded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(x.shape[1], x.shape[1]).tril()
        if self.padded:
            mask = mask.clone()
            mask[0] = (x.abs().sum((0, 2)) > 0).float()
        if (mask == torch.ones_like(mask).tril()).all():
            x = mask @ x
        return self.layers(x)


def test_a_decision_on_a_constant_is_no_obstacle() -> None:
    model = Causal(padded=False).eval()
    network = convert(model, input_shape=(7, DIM), num_blocks=2)
    assert network.analysis.captured.notes == ()
    x = torch.randn(5, 7, DIM)
    with torch.no_grad():
        assert torch.equal(network.exact(x)[0], model(x))


def test_a_constant_that_was_written_to_from_the_input_is_none() -> None:
    with pytest.raises(BadInput, match=r"test_control_flow\.py:\d+ \(forward\)"):
        convert(Causal(padded=True).eval(), input_shape=(7, DIM), num_blocks=2)


class Masked(nn.Module):
    """Leaves out a mask that masks nothing (``idle``); or rectifies what is mostly positive, which is right for the example alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embedding, self.layers, self.how = (
            nn.Embedding(9, DIM),
            nn.Sequential(*(Layer() for _ in range(DEPTH))),
            how,
        )

    def forward(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) * weight[..., None]
        if self.how == "idle":
            mask = ids == 0
            if mask.any():
                x = x.masked_fill(mask[..., None], 0.0)
        elif self.how == "told":
            if 0 in ids:  # as transformers looks for padding
                self.told = True
        elif weight.sum() > 0:
            x = weight.relu()[..., None] * x
        else:
            x = weight[..., None] * x
        return self.layers(x)


def test_a_decision_about_what_is_said_is_no_obstacle() -> None:
    torch.manual_seed(0)
    model = Masked("told").eval()
    network = convert(model, (torch.randint(1, 9, (3, 7)), torch.rand(3, 7)), num_blocks=2)
    ids, weight = torch.randint(0, 9, (4, 7)), torch.rand(4, 7)
    with torch.no_grad():
        assert 0 in ids
        assert torch.equal(network.exact((ids, weight))[0], model(ids, weight))


def test_a_decision_that_saves_work_alone_is_no_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    """The example masks nothing, and what is converted masks."""
    torch.manual_seed(0)
    model = Masked("idle").eval()
    example = torch.randint(1, 9, (3, 7)), torch.rand(3, 7)
    with caplog.at_level(logging.WARNING):
        network = convert(model, example, num_blocks=2)
    assert "makes no difference: converted as if it were always True" in caplog.text
    assert "test_control_flow.py:" in caplog.text
    for ids in (example[0], torch.randint(0, 9, (5, 7)), torch.zeros(1, 7, dtype=torch.long)):
        weight = torch.randn(len(ids), 7)
        with torch.no_grad():
            assert torch.equal(network.exact((ids, weight))[0], model(ids, weight))


def test_a_decision_that_makes_no_difference_on_the_example_alone_is_refused() -> None:
    """All weights of the example are positive: rectifying them does nothing there, and does elsewhere."""
    torch.manual_seed(0)
    example = torch.randint(1, 9, (3, 7)), torch.rand(3, 7)
    with pytest.raises(BadInput, match=r"test_control_flow\.py:\d+ \(forward\)"):
        convert(Masked("rectified").eval(), example, num_blocks=2)
