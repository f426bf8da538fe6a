"""What crosses the cuts of a divided graph beside the stream: side inputs, and weights that several pieces share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.graph import GraphView, module_path, op_name, shape_of, value
from diffusionblocks.converter.residual import Found
from torch import fx, nn


def place(piece: int, count: int) -> str:
    """``stem``, ``block 0`` ... or ``head``: the name of one of ``count`` pieces."""
    return "stem" if piece == 0 else "head" if piece == count - 1 else f"block {piece - 1}"


def side_name(node: fx.Node) -> str:
    """The name of a side value, as the bundle's graphs have it."""
    return str(node.target) if node.op == "placeholder" else f"side_{node.name}"


def side_values(found: Found, pieces: Sequence[GraphPiece]) -> list[dict[str, Any]]:
    """Every value that a block or the head reads beside the stream, in the graph's order.

    ``made_by``: input, stem or a block; ``via``: where a block makes it, the sums it is made from: the end of an ``earlier trunk``, a
    ``stream beside``, or an earlier state of this trunk (``long skip``).
    """
    count = len(pieces)
    makers: dict[fx.Node, int] = {}
    for k, piece in enumerate(pieces[:-1]):
        makers |= {node: k for node in piece.outputs if node not in makers}
    readers: dict[fx.Node, list[str]] = {}
    for k, piece in enumerate(pieces[1:], 1):
        for node in piece.inputs[1:]:
            readers.setdefault(node, []).append(place(k, count))
    values = []
    for node in sorted(readers, key=lambda n: found.view.index[n]):
        maker = makers.get(node, 0)
        values.append(
            {
                "name": side_name(node),
                "shape": list(shape_of(node)),
                "dtype": str(value(node).dtype).removeprefix("torch."),
                "made_by": "input" if node.op == "placeholder" else place(maker, count),
                "via": _via(found, node) if maker else None,
                "module": module_path(node),
                "operator": op_name(node),
                "read_by": readers[node],
            }
        )
    return values


def _via(found: Found, node: fx.Node) -> str | None:
    ends = {units[-1].add for units in found.trunks[:-1]}
    trunk = {unit.add for unit in found.trunk}
    beside = {unit.add for units in found.beside for unit in units}
    near = _nearest(found.view, node, trunk | beside)
    if near & ends:
        return "earlier trunk"
    if near & beside:
        return "stream beside"
    return "long skip" if near else None


def _nearest(view: GraphView, node: fx.Node, sums: set[fx.Node]) -> set[fx.Node]:
    """The sums of units that a value is made from without another sum between."""
    near: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        step = stack.pop()
        if step in sums:
            near.add(step)
        elif step not in seen:
            seen.add(step)
            stack += view.data_inputs(step)
    return near


def shared_weights(pieces: Sequence[GraphPiece]) -> list[dict[str, Any]]:
    """Parameters that more than one piece reads (by identity: tied embeddings, looped layers), by the pieces that share them."""
    weights: dict[int, nn.Parameter] = {}
    names: dict[int, str] = {}
    where: dict[int, list[str]] = {}
    for k, piece in enumerate(pieces):
        for name, parameter in piece.module.named_parameters():
            weights[id(parameter)] = parameter
            names.setdefault(id(parameter), name)
            where.setdefault(id(parameter), []).append(place(k, len(pieces)))
    groups: dict[tuple[str, ...], list[int]] = {}
    for key, places in where.items():
        if len(places) > 1:
            groups.setdefault(tuple(places), []).append(key)
    return [
        {
            "places": list(places),
            "names": sorted(names[key] for key in keys),
            **size_of({key: weights[key] for key in keys}),
        }
        for places, keys in groups.items()
    ]


def size_of(parameters: Mapping[Any, nn.Parameter]) -> dict[str, int]:
    """``parameters`` and their ``bytes``."""
    return {
        "parameters": sum(p.numel() for p in parameters.values()),
        "bytes": sum(p.numel() * p.element_size() for p in parameters.values()),
    }
