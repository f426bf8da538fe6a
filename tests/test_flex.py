"""FlexAttention and compiled parts: captured as what they compute where nothing is compiled, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusionblocks.converter import flex
from diffusionblocks.converter.analysis import analyse
from diffusionblocks.converter.capture import capture
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.settings import Settings
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import BadInput, open_bundle
from torch import nn
from torch.nn.attention import flex_attention as torchs

WIDTH, LENGTH = 8, 16
Attention = Callable[..., torch.Tensor]


class Layer(nn.Module):
    """x + attention of two heads over norm(x)."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.attention = attention
        self.register_buffer("bias", torch.randn(2, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        return x + self.attention(self, x, q, k, v).transpose(1, 2).flatten(2)


def _plain(_: Any, __: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torchs.flex_attention(q, k, v)


def _biased(layer: Any, _: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torchs.flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + layer.bias[h, i, j])


def _chained(layer: Any, _: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torchs.flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + layer.bias[h][i][j])


def _causal(_: Any, __: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torchs.create_block_mask(lambda b, h, i, j: i >= j, None, None, LENGTH, LENGTH, device="cpu")
    return torchs.flex_attention(q, k, v, block_mask=mask)


def _documents(_: Any, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Places see those of their own kind, other in every row."""
    kind = (x[..., 0] > 0).long()
    mask = torchs.create_block_mask(
        lambda b, h, i, j: kind[b, i] == kind[b, j], len(x), None, LENGTH, LENGTH, device="cpu"
    )
    return torchs.flex_attention(q, k, v, block_mask=mask)


def _grouped(_: Any, __: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torchs.flex_attention(q, k[:, :1], v[:, :1], enable_gqa=True, scale=0.3)


def _compiled(_: Any, __: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.compile(nn.functional.scaled_dot_product_attention, backend="eager")(q, k, v)


def _model(attention: Attention) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDTH), Layer(attention), Layer(attention), nn.Linear(WIDTH, 3)).eval()


@pytest.mark.parametrize("attention", [_plain, _biased, _causal, _documents, _grouped, _compiled])
def test_attention_is_captured_to_the_bit(attention: Attention) -> None:
    model, x = _model(attention), torch.randn(5, LENGTH, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
    captured = capture(model, input_shape=(LENGTH, 4))
    with torch.no_grad():
        got = captured.graph(x)[0]
        assert torch.equal(got, expected)
        assert not torch.equal(captured.graph(x.flip(1))[0], expected)
    got = captured.graph(x.requires_grad_())[0]
    assert torch.autograd.grad(got.sum(), x)[0].any()  # which FlexAttention itself refuses on a CPU


def test_a_model_with_flex_attention_is_converted(tmp_path: Any) -> None:
    model, x = _model(_documents), torch.randn(5, LENGTH, 4, generator=torch.Generator().manual_seed(1))
    network = ConvertedNetwork(analyse(model, input_shape=(LENGTH, 4), num_blocks=2), Settings(num_blocks=2))
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(network.exact((x,))[0], expected)
    with open_bundle(export_bundle(network, tmp_path / "flex.dblocks")) as bundle:
        torch.testing.assert_close(
            torch.from_numpy(bundle.run(x.detach().numpy(), mode="exact")), expected, rtol=1e-5, atol=1e-5
        )


def test_a_score_that_is_not_elementwise_is_refused() -> None:
    with pytest.raises(BadInput, match=r"something else|cannot be captured"):
        capture(_model(_chained), input_shape=(LENGTH, 4))


def test_nothing_stays_changed() -> None:
    before = {name: getattr(torchs, name) for name in flex.INNER}
    with flex.plain():
        assert all(getattr(torchs, name) is not before[name] for name in flex.INNER)
    assert {name: getattr(torchs, name) for name in flex.INNER} == before


def test_blocks_that_only_a_compiled_kernel_leaves_out_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    flex._say_dense.cache_clear()
    blocks = torchs.BlockMask.from_kv_blocks(
        torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32), BLOCK_SIZE=LENGTH // 2
    )

    def sparse(_: Any, __: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torchs.flex_attention(q, k, v, block_mask=blocks)

    with caplog.at_level(logging.WARNING, logger="diffusionblocks"):
        capture(_model(sparse), input_shape=(LENGTH, 4))
        assert caplog.text.count("no mask function") == 1
        caplog.clear()
        flex._say_dense.cache_clear()
        capture(_model(_causal), input_shape=(LENGTH, 4))
        assert "no mask function" not in caplog.text
