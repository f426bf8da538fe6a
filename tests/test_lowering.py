"""What torch's exporter leaves out, or writes so that ONNX Runtime cannot compute it, is exported in other operators; the rest is left alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusionblocks.converter.capture import capture
from diffusionblocks.export.graph import Piece, to_onnx
from diffusionblocks.export.lowering import Lowered, lowered
from torch import nn
from torch.nn import functional as F

DIM = 16


class Of(nn.Module):
    """A function of x [N, 6, 16] with a linear layer in front."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(DIM, DIM), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x))


def _exported(model: nn.Module, rows: int = 5) -> tuple[np.ndarray, np.ndarray, bool]:
    """What the exported graph and torch make of ``rows`` rows, and whether the graph was written in other operators."""
    example, x = torch.randn(3, 6, DIM), torch.randn(rows, 6, DIM)
    graph = capture(model.eval(), (example,)).graph
    exported = to_onnx(Piece(graph, ("x",), ("y",), (example,)))
    session = ort.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        return session.run(None, {"x": x.numpy()})[0], model(x).numpy(), isinstance(lowered(graph, (example,)), Lowered)


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions by a complex product."""
    angle = torch.arange(6)[:, None] * torch.arange(1, DIM // 2 + 1)[None] / 10
    factor = torch.polar(torch.ones_like(angle), angle)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * factor.unsqueeze(0)
    return torch.view_as_real(turned).flatten(-2)


def _quotient(x: torch.Tensor) -> torch.Tensor:
    z = torch.complex(x[..., :8], x[..., 8:])
    other = torch.cat([z[:, 1:], z[:, :1]], 1).conj() + torch.complex(torch.ones(()), torch.ones(()))
    q = (z / (2.0 + other.abs())).exp() * (1 - z.to(torch.complex64)) @ z.transpose(1, 2)
    return torch.cat([q.real, q.imag, q.angle() * (q.abs() > 1e-3)], -1)


def _attended(x: torch.Tensor) -> torch.Tensor:
    heads = x.unflatten(-1, (2, 2, 4)).permute(0, 2, 3, 1, 4)  # [N, 2, 2, 6, 4]
    return F.scaled_dot_product_attention(heads, heads, heads).flatten(1)


def _chosen(x: torch.Tensor) -> torch.Tensor:
    large, small = x > 0.5, x < -0.5
    mask = torch.where(x > 0, large, small).masked_fill(x > 1, False).masked_fill(x < -1, True)
    return x * (mask * (x.abs() < 2))


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return (x.bfloat16() * (x.bfloat16() + 1)).float()


def _tiny(x: torch.Tensor) -> torch.Tensor:
    kept = F.relu(x - 1.5)
    return kept / (kept.sum(1, keepdim=True) + 1e-12)


def _strided(x: torch.Tensor) -> torch.Tensor:
    """Overlapping windows of a tensor that does not lie in the order of its dimensions."""
    turned = x.transpose(1, 2)  # [N, 16, 6], in memory [N, 6, 16]
    return turned.as_strided((x.shape[0], 5, 2, DIM), (6 * DIM, DIM, DIM, 1))


def _without_keys(x: torch.Tensor) -> torch.Tensor:
    keys = x[:, :0].reshape(x.shape[0], 0, 2, 8).transpose(1, 2)
    return F.scaled_dot_product_attention(x.unflatten(-1, (2, 8)).transpose(1, 2), keys, keys) + x.mean()


def _kernels_of_each(x: torch.Tensor) -> torch.Tensor:
    """A convolution of every sample with kernels of its own: as many groups as samples."""
    n = x.shape[0]
    image, kernels = x[:, :4].reshape(1, n * 4, 4, 4), x.reshape(n, 96)[:, :72].reshape(n * 2, 4, 3, 3)
    return F.conv2d(image, kernels, stride=2, padding=1, groups=n).reshape(n, 2, 2, 2)


def _until(x: torch.Tensor) -> torch.Tensor:
    """The mean of as many rows as have a positive first channel."""
    rows = x.reshape(-1, DIM)
    count = (rows[:, 0] > 0).sum().item()
    torch._check(count >= 0)
    torch._check(count <= rows.shape[0])
    return x + rows[:count].sum(0) / 100


@pytest.mark.parametrize(
    "function",
    [_rotated, _quotient, _attended, _chosen, _rounded, _tiny, _strided, _without_keys, _kernels_of_each, _until],
)
def test_it_computes_what_torch_does(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    got, expected, changed = _exported(Of(function))
    assert changed
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())


def _plain(x: torch.Tensor) -> torch.Tensor:
    heads = x.unflatten(-1, (4, 4)).transpose(1, 2)
    attended = F.scaled_dot_product_attention(heads, heads, heads)
    return torch.where(attended > 0, attended + 1e-3, attended * 2).flatten(1)


def test_layers_in_bfloat16_are_computed_in_float32_and_rounded() -> None:
    """Attention, a product, a norm and a softmax, none of which ONNX Runtime has in bfloat16 on a CPU."""

    def layers(x: torch.Tensor) -> torch.Tensor:
        heads = x.bfloat16().unflatten(-1, (4, 4)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(heads, heads, heads)
        return F.layer_norm(attended @ attended.transpose(-1, -2), (6,)).softmax(-1, dtype=torch.float32)

    torch.manual_seed(0)
    got, expected, changed = _exported(Of(layers))
    assert changed
    assert got.dtype == np.float32
    assert np.abs(got - expected).mean() < 2e-3  # of eight binary digits, several times rounded


def _windows(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided((x.shape[0], 5, 2, DIM), (6 * DIM, DIM, DIM, 1))


def _frequencies(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft2(x).real


@pytest.mark.parametrize("function", [_plain, _windows, _frequencies])
def test_what_has_a_form_is_left_alone(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    got, expected, changed = _exported(Of(function))
    assert not changed
    assert np.abs(got - expected).max() < 1e-4


def test_complex_inputs_weights_and_outputs_are_pairs() -> None:
    """A table of rotations that is held, and one that enters as a side value."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.polar(torch.ones(6, 4), torch.rand(6, 4)))

        def forward(self, x: torch.Tensor, turn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            z = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * self.table * turn
            return torch.view_as_real(z).flatten(-2), z

    model, x = Turned(), torch.randn(3, 6, 8)
    turn = torch.polar(torch.ones(3, 6, 4), torch.rand(3, 6, 4))
    graph = capture(model, (x, turn)).graph
    session = ort.InferenceSession(to_onnx(Piece(graph, ("x", "turn"), ("y", "z"), (x, turn))).SerializeToString())
    y, z = session.run(None, {"x": x.numpy(), "turn": torch.view_as_real(turn).numpy()})
    expected = model(x, turn)
    assert np.abs(y - expected[0].numpy()).max() < 1e-5
    assert np.abs(z - torch.view_as_real(expected[1]).numpy()).max() < 1e-5


class Experts(nn.Module):
    """Each row to its best expert, as rows sorted by expert and a product a group."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, experts)
        self.weight = nn.Parameter(0.2 * torch.randn(experts, DIM, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, DIM)
        of = self.router(rows).argmax(-1)
        order = of.argsort(stable=True)
        ends = (of[:, None] == torch.arange(len(self.weight))).sum(0).cumsum(0).to(torch.int32)
        products = torch.ops.transformers.grouped_mm_fallback(rows[order], self.weight, offs=ends)
        return products[order.argsort()].reshape(x.shape)


@pytest.mark.parametrize("idle", [False, True])
def test_a_grouped_product_is_a_product_an_expert(idle: bool) -> None:
    """Also where an expert gets no row."""
    pytest.importorskip("transformers.integrations.moe")  # it registers the operator
    torch.manual_seed(0)
    model = Experts()
    if idle:
        with torch.no_grad():
            model.router.bias[1] = -1e3
    got, expected, _ = _exported(model)
    assert np.abs(got - expected).max() < 1e-5
