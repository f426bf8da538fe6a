"""Low-rank updates (LoRA, Hu et al. 2021) of the linear layers and dense convolutions of a piece, exact until trained.

``y = W x`` becomes ``y + up(down(x))``; ``up`` starts at zero, so the first output is ``y + 0``. The original weight stays as it is,
and so its bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusionblocks.converter.graph import op_name
from torch import fx, nn

RANK = 4


class LowRankLinear(nn.Module):
    """``up(down(x))``; x [..., inputs] -> [..., outputs]."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class LowRankConv2d(nn.Module):
    """A convolution of the same geometry to ``rank`` channels, then a 1x1 one; x [N, C, H, W]."""

    def __init__(self, weight: torch.Tensor, rank: int, stride: Any, padding: Any, dilation: Any) -> None:
        super().__init__()
        outputs, inputs, *kernel = weight.shape
        self.down = nn.Conv2d(
            inputs, rank, (kernel[0], kernel[1]), _pair(stride), _pair(padding), _pair(dilation), bias=False
        )
        self.up = nn.Conv2d(rank, outputs, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


def add_low_rank(module: fx.GraphModule, rank: int = RANK) -> tuple[str, ...]:
    """Give every linear layer and dense 2-d convolution with its own weight a low-rank update; returns the names added."""
    names: list[str] = []
    for node in list(module.graph.nodes):
        update = _update_for(module, node, rank)
        if update is None:
            continue
        name = f"low_rank_{len(names):02d}"
        module.add_submodule(name, update)
        readers = list(node.users)
        with module.graph.inserting_after(node):
            delta = module.graph.call_module(name, (node.args[0],))
        with module.graph.inserting_after(delta):
            total = module.graph.call_function(torch.ops.aten.add.Tensor, (node, delta))
        delta.meta, total.meta = dict(node.meta), dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, total)
        names.append(name)
    module.graph.lint()
    module.recompile()
    return tuple(names)


def _update_for(module: fx.GraphModule, node: fx.Node, rank: int) -> nn.Module | None:
    if op_name(node) not in ("linear", "conv2d") or len(node.args) < 2:
        return None
    source = node.args[1]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    weight = module.get_parameter(str(source.target))
    if op_name(node) == "linear":
        return LowRankLinear(weight.shape[1], weight.shape[0], rank)
    extra = [*node.args[3:], *([1, 1], [0, 0], [1, 1], 1)[len(node.args[3:]) :]]
    stride, padding, dilation, groups = extra[:4]
    if groups != 1 or not isinstance(padding, list | tuple):
        return None
    return LowRankConv2d(weight, rank, stride, padding, dilation)


def _pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return int(values[0]), int(values[-1])
