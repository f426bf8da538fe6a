"""Units that are modulated already: by what of the input, and where.

A diffusion transformer's unit is ``z + gate * f(norm(z) * (1 + scale) + shift)`` with gate, scale and shift made from a time step or a class by layers
of their own; a U-Net adds a time embedding inside its branches. Such an operand

* multiplies, or is added to, something that comes from the stream;
* comes from the input through a layer, but not through the trunk;
* has one value a channel and sample, the same at every position.

Requires: a flat captured graph. Ensures: changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusionblocks.converter.graph import GraphView, is_tensor, op_name, value
from diffusionblocks.converter.units import Unit
from torch import fx


@dataclass(frozen=True)
class OwnModulation:
    """``operand``, which ``users`` apply to the stream; its channels lie at ``channel``."""

    operand: fx.Node
    users: tuple[fx.Node, ...]
    channel: int


def own_modulations(view: GraphView, units: Sequence[Unit], starts: Sequence[fx.Node]) -> tuple[OwnModulation, ...]:
    """The operands that modulate ``units``, each once; ``starts`` are the first forks of the trunks."""
    users: dict[fx.Node, dict[fx.Node, None]] = {}
    for unit in units:
        for node in view.members(view.region(unit.fork, unit.add)):
            operand = _operand(view, node, unit, starts)
            if operand is not None:
                users.setdefault(operand, {})[node] = None
    return tuple(OwnModulation(operand, tuple(of), _channel(operand)) for operand, of in users.items())


def _operand(view: GraphView, node: fx.Node, unit: Unit, starts: Sequence[fx.Node]) -> fx.Node | None:
    if op_name(node) not in ("mul", "add") or node is unit.add:
        return None
    pair = [a for a in node.args[:2] if isinstance(a, fx.Node) and is_tensor(a)]
    if len(pair) != 2:
        return None
    stream, other = pair if view.depends(pair[0], unit.fork) else pair[::-1]
    if not view.depends(stream, unit.fork) or any(view.depends(other, start) for start in starts):
        return None
    made = view.from_input[other] and view.ancestors[other] & view.mixing
    return other if made and _is_per_channel(value(other), value(stream), op_name(node)) else None


def _is_per_channel(operand: Any, stream: Any, name: str) -> bool:
    """Whether an operand [N, 1, C], [N, C, 1, 1] or [N, C] holds one value a channel and sample of a larger stream."""
    if (
        not operand.is_floating_point()
        or operand.dim() != stream.dim()
        or str(operand.shape[0]) != str(stream.shape[0])
    ):
        return False
    axes = [d for d in range(1, operand.dim()) if str(operand.shape[d]) != "1"]
    if len(axes) != 1 or not isinstance(operand.shape[axes[0]], int):
        return False
    return operand.dim() > 2 or name == "mul"  # without positions a sum could be anything


def _channel(operand: fx.Node) -> int:
    return next(d for d in range(1, value(operand).dim()) if str(value(operand).shape[d]) != "1")
