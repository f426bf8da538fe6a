"""Where the samples of a batch lie in a tensor: at which dimension, and how many rows each has.

Most networks keep the batch first. Some put time first ([T, N, C]), and some flatten positions, frames or windows into the batch: [N, T, C] becomes
[N * T, C], where each sample has T rows in a sequence, and [T, N, C] becomes [T * N, C], where every N-th row is of one sample.

Requires: a graph captured with a dynamic batch. Ensures: changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from diffusionblocks.converter.graph import MIXERS, NORMS, GraphView, is_tensor, op_name, value
from torch import fx

RESHAPES = frozenset({"view", "reshape", "flatten", "_unsafe_view", "unflatten", "squeeze", "unsqueeze"})
KEEP_ROWS = (
    MIXERS
    | NORMS
    | RESHAPES
    | {"softmax", "dropout", "contiguous", "clone", "to", "_to_copy", "expand", "pad", "split", "chunk", "slice"}
)
"""Operators that leave the order of the rows as it is, where the number of rows is the same (pointwise ones do as well)."""


class Samples(NamedTuple):
    """Samples lie along dimension ``dim``, with ``repeat`` rows each: one sample after the other, or all of them again and again (``tiled``)."""

    dim: int
    repeat: int = 1
    tiled: bool = False


def batch_symbols(nodes: Iterable[fx.Node]) -> frozenset[Any]:
    """The symbols that the inputs' numbers of rows have."""
    firsts = [value(n).shape[0] for n in nodes if n.op == "placeholder" and is_tensor(n) and value(n).dim()]
    return frozenset(s for first in firsts if isinstance(first, torch.SymInt) for s in first.node.expr.free_symbols)


def batch_axes(shape: Iterable[Any], symbols: frozenset[Any]) -> dict[int, int]:
    """The dimensions whose size is the batch or a fixed multiple of it, with that multiple."""
    return {d: k for d, size in enumerate(shape) if (k := multiple(size, symbols))}


def axes_or_first(shape: Sequence[Any], symbols: frozenset[Any]) -> dict[int, int]:
    """The same; dimension 0 where a size is symbolic and none is a multiple of the batch."""
    return batch_axes(shape, symbols) or ({0: 1} if any(isinstance(size, torch.SymInt) for size in shape) else {})


def as_text(size: Any, symbols: frozenset[Any]) -> str:
    """A size as text; every input's number of rows is ``batch``, whatever symbol each has."""
    names = {str(symbol) for symbol in symbols}
    return re.sub(r"[A-Za-z_]\w*", lambda found: "batch" if found.group() in names else found.group(), str(size))


def multiple(size: Any, symbols: frozenset[Any]) -> int:
    """How many times the batch a symbolic size is; 0 where it is no whole multiple."""
    if not isinstance(size, torch.SymInt):
        return 0
    quotients = [size.node.expr / symbol for symbol in symbols]
    return next((int(q) for q in quotients if q.is_Integer and q > 0), 0)


def samples_of(view: GraphView, node: fx.Node, symbols: frozenset[Any]) -> Samples | None:
    """Where the samples lie in a node's tensor; None where that cannot be told."""
    axes = batch_axes(value(node).shape, symbols)
    if len(axes) != 1:
        return None
    dim, repeat = next(iter(axes.items()))
    if repeat == 1:
        return Samples(dim)
    tiled = _is_tiled(view, node, symbols) if dim == 0 else None
    return None if tiled is None else Samples(0, repeat, tiled)


def _is_tiled(view: GraphView, node: fx.Node, symbols: frozenset[Any]) -> bool | None:
    """How the rows of ``node``, several a sample, lie, by where they begin: the flattening of a tensor, or a repetition. None where that is not found."""
    rows = str(value(node).shape[0])
    seen: set[fx.Node] = set()
    while node not in seen:
        seen.add(node)
        if op_name(node) == "getitem":
            node = node.all_input_nodes[0]
        name = op_name(node)
        sources = [n for n in view.data_inputs(node) if is_tensor(n) and value(n).dim()]
        same = next((n for n in sources if str(value(n).shape[0]) == rows), None)
        if same is None:  # the rows begin here
            first = batch_axes(value(sources[0]).shape, symbols) if len(sources) == 1 else {}
            if name in RESHAPES and list(first.values()) == [1]:
                return {0: False, 1: True}.get(next(iter(first)))
            return {"repeat_interleave": False, "repeat": True}.get(name) if first == {0: 1} else None
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        keeps = pointwise or name in KEEP_ROWS or name.startswith(("conv", "max_pool", "avg_pool", "adaptive"))
        if not keeps and not (name in ("permute", "transpose") and _keeps_first(node)):
            return None
        node = same
    return None


def _keeps_first(node: fx.Node) -> bool:
    first = node.args[1] if len(node.args) > 1 else None
    if op_name(node) == "permute":
        return isinstance(first, list | tuple) and first[0] == 0
    dims = [int(d) % value(node).dim() for d in node.args[1:3] if isinstance(d, int)]
    return len(dims) == 2 and 0 not in dims
