"""Gradient checkpointing inside a block: the state between residual units is kept, what lies between is computed again in the backward pass.

:func:`recomputed` does so with whole units. :func:`lean` does so with a norm and its scale and shift alone, always, since that costs next to nothing: without it a conditioned unit keeps its norm's output
beside what is made of that, which the unit it came from does not.

Requires: a DiffusionBlock. Ensures: the same function of the same parameters. Units with a batch norm that moves its statistics are left as they are, since
computing them again would move these twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusionblocks.converter.graph import op_name
from torch import fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

BODY = "body"


class Recomputed(nn.Module):
    """A stretch of a block that keeps its inputs alone."""

    def __init__(self, stretch: nn.Module) -> None:
        super().__init__()
        self.stretch = stretch

    def forward(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.stretch(*args)
        return checkpoint(self.stretch, *args, use_reentrant=False)


def recomputed(block: fx.GraphModule, ends: Iterable[str]) -> fx.GraphModule:
    """A block on the same parameters that computes its units again in the backward pass.

    Args:
        block: what :func:`blocks.compose` made.
        ends: names of the nodes that end a unit, in the body's graph.
    """
    body = block.get_submodule(BODY)
    assert isinstance(body, fx.GraphModule)
    marks, place, number = set(ends), {}, 0
    for node in body.graph.nodes:
        place[node] = number
        number += node.name in marks
    pieces = split_module(body, body, lambda node: place[node])  # type: ignore[no-untyped-call]
    for name, stretch in list(pieces.named_children()):
        if isinstance(stretch, fx.GraphModule) and not _moves_statistics(stretch):
            setattr(pieces, name, Recomputed(stretch))
    outer = fx.GraphModule(block, block.graph)
    setattr(outer, BODY, pieces)
    return outer


def lean(block: fx.GraphModule) -> fx.GraphModule:
    """A block on the same parameters that keeps a norm's input, but not its output before scale and shift."""
    body = block.get_submodule(BODY)
    assert isinstance(body, fx.GraphModule)
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))  # type: ignore[arg-type]
    for norm in list(graph.nodes):
        found = _scale_and_shift(norm) if op_name(norm) in STATELESS else None
        if found is None:
            continue
        scaled, shifted = found
        with graph.inserting_before(shifted):
            args = (norm.target, norm.args, norm.kwargs, scaled.args[1], shifted.args[1])
            made = graph.call_function(modulated, args)
        shifted.replace_all_uses_with(made)
        for node in (shifted, scaled, norm):
            graph.erase_node(node)
    outer = fx.GraphModule(block, block.graph)
    setattr(outer, BODY, fx.GraphModule(body, graph))
    return outer


STATELESS = ("layer_norm", "rms_norm", "group_norm")


def _scale_and_shift(norm: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The product and the sum that a norm's output goes through and nothing else, as the conditioning writes them."""
    nodes, node = [], norm
    for name in ("mul", "add"):
        users = list(node.users)
        if len(users) != 1 or op_name(users[0]) != name or users[0].args[:1] != (node,) or len(users[0].args) != 2:
            return None
        node = users[0]
        if not isinstance(node.args[1], fx.Node) or op_name(node.args[1]) != "getitem":
            return None
        nodes.append(node)
    return nodes[0], nodes[1]


def modulated(
    norm: Callable[..., torch.Tensor], args: Any, kwargs: Any, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """``norm(*args) * scale + shift``, of which the backward pass computes the norm again."""

    def compute(scale: torch.Tensor, shift: torch.Tensor, *args: Any) -> torch.Tensor:
        return norm(*args, **kwargs) * scale + shift

    if not torch.is_grad_enabled():
        return compute(scale, shift, *args)
    result: torch.Tensor = checkpoint(compute, scale, shift, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def _moves_statistics(stretch: fx.GraphModule) -> bool:
    return any(op_name(n) == "batch_norm" and n.args[5] is True for n in stretch.graph.nodes)
