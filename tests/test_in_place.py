"""Models that overwrite tensors convert as if they did not; what outlives the call, or is random, is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.functional import is_in_place
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import BadInput, open_bundle
from torch import nn

WIDTH = 16


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.ReLU(inplace=True)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class AddInPlace(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += self.mlp(self.norm(x))
        return x


class ResultUnused(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(self.mlp(self.norm(x)))
        return x


class ActivatedStream(Base):
    """The skip reads what the branch's first activation has overwritten."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act(x)
        return x + self.mlp(self.norm(h))


class WrittenView(Base):
    """A view is written and its base read: only torch's own functionalisation can tell."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        h[:, 0] = 0
        return x + self.mlp(h)


class Copied(Base):
    """The branch's result is copied into an empty tensor; a copy has no derivative of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros_like(x)
        h.copy_(self.mlp(self.norm(x)))
        return x + h


def _model(unit: type[Base]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, WIDTH), *(unit() for _ in range(4)), nn.Linear(WIDTH, 10)).eval()


@pytest.mark.parametrize("unit", [AddInPlace, ResultUnused, ActivatedStream, WrittenView])
@pytest.mark.parametrize("context", ["frozen", "carry", "stem"])
def test_exact_and_nothing_is_overwritten(unit: type[Base], context: str) -> None:
    model, x = _model(unit), torch.randn(5, 8)
    network = convert(model, input_shape=(8,), num_blocks=2, context=context)
    assert len(network.analysis.found.trunk) == 4
    assert not any(is_in_place(n) for n in network.analysis.captured.graph.graph.nodes)
    with torch.no_grad():
        assert torch.equal(network.exact(x)[0], model(x.clone()))
        env = network.inputs_env(x)
        network.run_stem(env)
        stream = env["stream"].clone()
        f, _ = network.run_block(env, 0, torch.zeros(5, network.require_target().dim), torch.ones(5))
        assert torch.equal(env["stream"], stream)
        assert torch.isfinite(f).all()


@pytest.mark.road
@pytest.mark.parametrize("unit", [AddInPlace, WrittenView, Copied])
def test_trains_and_exports(unit: type[Base], tmp_path) -> None:
    network = convert(_model(unit), input_shape=(8,), num_blocks=2)
    x = np.random.default_rng(0).standard_normal((20, 8), dtype=np.float32)
    finetune(network, x, np.arange(20) % 10, steps=2)
    export_bundle(network, tmp_path / "b")
    with open_bundle(tmp_path / "b") as bundle:
        for mode, expected in (
            ("exact", network.exact(torch.from_numpy(x))[0]),
            ("denoise", network.denoise(torch.from_numpy(x))),
        ):
            assert np.abs(bundle.run(x, mode=mode) - expected.numpy()).max() < 1e-4


def test_batch_norms_stay_batch_norms() -> None:
    """Functionalising by torch would turn them into an operator without batch statistics."""
    import timm

    network = convert(timm.create_model("resnet18").eval(), input_shape=(3, 64, 64), num_blocks=2)
    names = {str(n.target) for n in network.analysis.captured.graph.graph.nodes}
    assert "aten.batch_norm.default" in names
    assert "aten.relu.default" in names
    assert "aten.relu_.default" not in names


def test_a_state_that_forward_changes_is_refused() -> None:
    class Counting(AddInPlace):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x + self.mlp(self.norm(x)) * self.calls

    with pytest.raises(BadInput, match="overwrites a tensor that outlives the call"):
        convert(_model(Counting), input_shape=(8,), num_blocks=2)


def test_random_numbers_in_forward_are_refused() -> None:
    class Noisy(AddInPlace):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mlp(self.norm(x)) + torch.rand_like(x)

    with pytest.raises(BadInput, match="computes something else"):
        convert(_model(Noisy), input_shape=(8,), num_blocks=2)
