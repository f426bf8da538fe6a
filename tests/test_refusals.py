"""What has no residual chain, and additions that are none: refused with a reason."""

from __future__ import annotations

import pytest
import timm
import torch
from diffusionblocks.converter import convert
from diffusionblocks.converter.capture import capture
from diffusionblocks.converter.partition import partition
from diffusionblocks.converter.residual import find_trunk
from diffusionblocks.converter.settings import Settings
from diffusionblocks.runtime.errors import BadInput
from torch import nn


@pytest.mark.parametrize("name", ["vgg11", "densenet121"])
def test_networks_without_a_trunk_say_what_was_found(name: str) -> None:
    model = timm.create_model(name, pretrained=False).eval()
    with pytest.raises(BadInput, match=r"no chain of residual units.*concatenations") as error:
        convert(model, input_shape=(3, 64, 64))
    assert "DenseNet" in str(error.value)


class Adds(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        if self.kind == "shift":
            return h + self.b(x).mean(1, keepdim=True)
        if self.kind == "rotary":
            return h * 2 + torch.cat([-h[..., 4:], h[..., :4]], -1)
        if self.kind == "bias":
            return h + torch.ones(8)
        if self.kind == "twice":
            return h + h
        return x + self.b(h)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("shift", "broadcast"), ("rotary", "no parameter"), ("bias", "does not depend"), ("twice", "same tensor")],
)
def test_additions_that_are_no_units(kind: str, reason: str) -> None:
    found = find_trunk(capture(Adds(kind).eval(), input_shape=(8,)).graph)
    assert not found.trunk
    assert [r for r in found.refused if reason in r.reason]
    assert all(r.nodes for r in found.refused)


def test_the_same_module_with_a_residual_is_a_unit() -> None:
    found = find_trunk(capture(Adds("residual").eval(), input_shape=(8,)).graph)
    assert [u.kind for u in found.trunk] == ["identity"]


def test_more_blocks_than_units() -> None:
    with pytest.raises(BadInput, match="9 blocks were asked for, but the trunk has 8"):
        partition([1] * 8, 9)


@pytest.mark.parametrize(
    ("weights", "blocks", "split", "counts"),
    [
        ([1] * 8, 3, "units", (3, 3, 2)),
        ([1, 1, 1, 9], 2, "parameters", (3, 1)),
        ([5, 1, 1, 1, 1, 1], 2, "parameters", (1, 5)),
        ([1] * 5, 2, (4, 1), (4, 1)),
    ],
)
def test_partition(weights: list[int], blocks: int, split: str, counts: tuple[int, ...]) -> None:
    assert partition(weights, blocks, split).counts == counts


def test_explicit_counts_must_add_up() -> None:
    with pytest.raises(BadInput, match="does not divide the 5 units"):
        partition([1] * 5, 2, (3, 3))


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_control_flow_on_data_is_refused_with_causes() -> None:
    with pytest.raises(BadInput, match=r"decides by the values of its tensors at .*test_refusals\.py:\d+"):
        capture(Branching(), input_shape=(4,))


def test_wrong_input_shape_is_named() -> None:
    with pytest.raises(BadInput, match=r"fails on the example input of shape \(3, 5\)"):
        capture(nn.Linear(8, 8), input_shape=(5,))


@pytest.mark.parametrize("fields", [{"context": "deep"}, {"tune": "all"}, {"overlap": -1.0}, {"scratch": True}])
def test_settings_are_checked(fields: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        Settings(**fields)
