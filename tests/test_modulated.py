"""Networks that are modulated already keep their conditioning: it is found, moved by c, and not doubled; what only looks like it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusionblocks.converter import adaln, convert
from diffusionblocks.converter.capture import capture, flatten
from diffusionblocks.converter.residual import find_trunk
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import BadInput, open_bundle
from torch import fx, nn

DIM = 32


class Unit(nn.Module):
    """A unit of a diffusion transformer: scale, shift and gate from a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.modulation = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        scale, shift, gate = self.modulation(c).unsqueeze(1).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(8, DIM), nn.Linear(1, DIM)
        self.units = nn.ModuleList(Unit() for _ in range(3))
        self.head = nn.Linear(DIM, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        c, x = self.time(t), self.embed(x)
        for unit in self.units:
            x = unit(x, c)
        return self.head(x)


class Residual(nn.Module):
    """A convolutional unit whose branch is scaled by its own pooled state (squeeze and excitation), or shifted by a time step."""

    def __init__(self, excited: bool) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(DIM, DIM, 3, padding=1), nn.Conv2d(DIM, DIM, 1)
        self.gate, self.excited = nn.Linear(DIM, DIM), excited

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        vector = self.gate(y.mean((2, 3)) if self.excited else c)[:, :, None, None]
        return x + self.after(torch.relu(y * torch.sigmoid(vector) if self.excited else y + vector))


class Convolutional(nn.Module):
    def __init__(self, excited: bool) -> None:
        super().__init__()
        self.embed, self.time = nn.Conv2d(3, DIM, 3, padding=1), nn.Linear(1, DIM)
        self.units = nn.ModuleList(Residual(excited) for _ in range(3))
        self.head = nn.Conv2d(DIM, 3, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        c, x = self.time(t), self.embed(x)
        for unit in self.units:
            x = unit(x, c)
        return self.head(x)


def _inserted(model: nn.Module, *inputs: torch.Tensor) -> tuple[fx.GraphModule, list[tuple[str, ...]]]:
    graph = flatten(capture(model, inputs).graph)
    found = find_trunk(graph)
    groups = [(unit,) for unit in found.trunk]
    places = [tuple(type(p).__name__ for p in adaln.places_of(found, g)) for g in groups]
    adaln.insert(graph, found, groups, target_dim=4, sigma_data=0.5, block_parameters=[10_000] * len(groups), seed=0)
    return graph, places


def _check_exact_and_alive(model: nn.Module, graph: fx.GraphModule, *inputs: torch.Tensor) -> None:
    z, sigma = torch.randn(len(inputs[0]), 4), torch.rand(len(inputs[0])) + 0.1
    assert torch.equal(graph(*inputs, z, sigma)[0], model(*inputs))
    conditioners = [m for m in graph.modules() if isinstance(m, adaln.Conditioner)]
    for conditioner in conditioners:
        nn.init.normal_(conditioner.projection.weight, std=0.1)
    output = graph(*inputs, z, sigma)[0]
    assert not torch.equal(output, model(*inputs))
    output.square().mean().backward()
    for conditioner in conditioners:
        parts = conditioner.projection.weight.grad.split(conditioner.rows)
        assert all(bool(part.abs().sum() > 0) for part in parts)


def test_a_diffusion_transformer_keeps_its_modulation() -> None:
    torch.manual_seed(0)
    model, inputs = Transformer().eval(), (torch.randn(5, 7, 8), torch.rand(5, 1))
    graph, places = _inserted(model, *inputs)
    assert places == [("OwnModulation",) * 3] * 3
    assert not any(
        scales for m in graph.modules() if isinstance(m, adaln.Conditioner) for _, _, scales, *_ in m.layouts
    )
    _check_exact_and_alive(model, graph, *inputs)


def test_a_time_embedding_that_is_added_inside_a_branch_is_kept() -> None:
    torch.manual_seed(0)
    model, inputs = Convolutional(excited=False).eval(), (torch.randn(5, 3, 8, 8), torch.rand(5, 1))
    graph, places = _inserted(model, *inputs)
    assert places == [("OwnModulation",)] * 3
    _check_exact_and_alive(model, graph, *inputs)


def test_squeeze_and_excitation_is_no_conditioning() -> None:
    torch.manual_seed(0)
    model, inputs = Convolutional(excited=True).eval(), (torch.randn(5, 3, 8, 8), torch.rand(5, 1))
    graph, places = _inserted(model, *inputs)
    assert places == [("Site",)] * 3
    _check_exact_and_alive(model, graph, *inputs)


def test_a_mask_is_no_conditioning() -> None:
    """It comes from the input, is one value a position, and passes no layer."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlps = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            for mlp in self.mlps:
                x = x + mlp(x) * mask.unsqueeze(-1)
            return x

    inputs = (torch.randn(5, 7, DIM), torch.ones(5, 7))
    graph, places = _inserted(Masked().eval(), *inputs)
    assert places == [("Site",)] * 3
    assert all(len(m.layouts) == 2 for m in graph.modules() if isinstance(m, adaln.Conditioner))


class Laid(nn.Module):
    """Layers on [positions, batch, channels], or on positions of all samples in one dimension."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.embed, self.head = nn.Linear(8, DIM), nn.Linear(DIM, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.mlps = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        n, t, c = x.shape
        if self.layout not in ("flat", "patches"):
            x = x.transpose(0, 1)
        if self.layout == "shuffled":
            x = x.flip(1)
        if (
            self.layout == "patches"
        ):  # [N, T, C] -> [2 N, T / 2, C], positions of one parity together, as sorted by an unfolding
            x = x.reshape(n, t // 2, 2, c).transpose(1, 2).reshape(n * 2, t // 2, c)
        elif self.layout != "time first":
            x = x.reshape(-1, c)
        if self.layout == "shuffled":
            x = x[torch.arange(n * t - 1, -1, -1)]
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + torch.relu(mlp(norm(x)))
        if self.layout == "patches":
            return self.head(x.reshape(n, 2, t // 2, c).transpose(1, 2).reshape(n, t, c).mean(1))
        x = x.reshape(n, t, c) if self.layout == "flat" else x.reshape(t, n, c).transpose(0, 1)
        return self.head(x.mean(1))


@pytest.mark.parametrize("layout", ["time first", "flat", "flat time first", "patches"])
def test_samples_are_conditioned_wherever_they_lie(layout: str) -> None:
    """Equal to the original at first; then another z for one sample changes that sample alone."""
    model = Laid(layout).eval()
    network = convert(model, input_shape=(6, 8), num_blocks=2)
    x, z, sigma = torch.randn(5, 6, 8), torch.randn(5, network.target.dim), torch.full((5,), 0.5)
    with torch.no_grad():
        assert torch.equal(network.exact(x)[0], model(x))
        for block in network.blocks:
            for conditioner in (m for m in block.module.modules() if isinstance(m, adaln.Conditioner)):
                conditioner.projection.weight.normal_()
        env = network.inputs_env(x)
        network.run_stem(env)
        before, _ = network.run_block(env, 0, z, sigma)
        z[2] += 1
        after, _ = network.run_block(env, 0, z, sigma)
    changed = (before - after).abs().amax(1)
    assert changed[2] > 1e-3
    assert changed[[0, 1, 3, 4]].max() < 1e-6


@pytest.mark.road
@pytest.mark.parametrize("layout", ["time first", "flat", "flat time first", "patches"])
def test_a_bundle_takes_samples_wherever_they_lie(layout: str, tmp_path: Path) -> None:
    model = Laid(layout).eval()
    network = convert(model, input_shape=(6, 8), num_blocks=2)
    network.trained = [True, True]
    export_bundle(network, tmp_path / "bundle")
    with open_bundle(tmp_path / "bundle") as bundle:
        for rows in (1, 5):
            x = torch.randn(rows, 6, 8)
            with torch.no_grad():
                expected = model(x).numpy()
            assert np.abs(bundle.run(x.numpy(), mode="exact") - expected).max() < 1e-5
            assert np.abs(bundle.run(x.numpy(), mode="denoise") - network.denoise(x).numpy()).max() < 1e-5


def test_layers_whose_rows_are_moved_about_convert_for_exact_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = Laid("shuffled").eval()
    network = convert(model, input_shape=(6, 8), num_blocks=2)
    assert network.target is None
    assert "cannot be told where the samples of a batch lie" in caplog.text
    x = torch.randn(5, 6, 8)
    with torch.no_grad():
        assert torch.equal(network.exact(x)[0], model(x))
    with pytest.raises(BadInput):
        network.require_target()
