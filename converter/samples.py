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

BATCH = 3
"""Of the batches in which rows are followed."""
RESHAPES = frozenset({"view", "reshape", "flatten", "_unsafe_view", "unflatten", "squeeze", "unsqueeze"})
LAYOUT = RESHAPES | {
    *("permute", "transpose", "t", "movedim", "contiguous", "clone", "expand", "repeat", "repeat_interleave"),
    *("getitem", "unbind", "split", "split_with_sizes", "chunk", "slice", "select", "narrow"),
    *("im2col", "unfold", "roll", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
}
"""Operators of one tensor (or of its parts) that only move numbers, or leave some out."""
KEEP_ROWS = MIXERS | NORMS | {"softmax", "dropout", "to", "_to_copy", "pad"}
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
    rows = _samples_of_rows(view, node, symbols) if dim == 0 else None
    if rows is None:
        return None
    one = torch.arange(1, BATCH + 1)
    if torch.equal(rows, one.repeat_interleave(repeat)):
        return Samples(0, repeat)
    return Samples(0, repeat, tiled=True) if torch.equal(rows, one.repeat(repeat)) else None


def _samples_of_rows(view: GraphView, node: fx.Node, symbols: frozenset[Any]) -> torch.Tensor | None:
    """For each row of ``node``, in a batch of :data:`BATCH`, the number of its sample, from 1; None where that is not found.

    A tensor of these numbers is led from where the batch is a dimension of its own through all changes of layout.
    """
    path = _path(view, node, symbols)
    if path is None:
        return None
    shape = _concrete(value(path[0]).shape, symbols)
    dim = next(iter(batch_axes(value(path[0]).shape, symbols)))
    return _followed(path[1:], _marked(shape, dim), symbols)


def rows_of_positions(view: GraphView, node: fx.Node, symbols: frozenset[Any], count: int) -> Samples | None:
    """The rows of a node [count x batch, C], where each sample's are its ``count`` positions in order; None where that is not found.

    The positions' numbers are led from where the batch is a dimension of its own, and one other has their size.
    """
    path = _path(view, node, symbols)
    if path is None:
        return None
    shape = _concrete(value(path[0]).shape, symbols)
    batch = next(iter(batch_axes(value(path[0]).shape, symbols)))
    dims = [d for d, size in enumerate(shape) if size == count and d != batch]
    rows = _followed(path[1:], _marked(shape, dims[0]), symbols) if len(dims) == 1 else None
    if rows is None:
        return None
    one = torch.arange(1, count + 1)
    if torch.equal(rows, one.repeat(BATCH)):
        return Samples(0, count)
    return Samples(0, count, tiled=True) if torch.equal(rows, one.repeat_interleave(BATCH)) else None


def _marked(shape: Sequence[int], dim: int) -> torch.Tensor:
    """The numbers from 1 along one dimension, the same along all others."""
    numbers = torch.arange(1.0, shape[dim] + 1)
    return numbers.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(list(shape))


def _followed(steps: Iterable[fx.Node], marks: torch.Tensor, symbols: frozenset[Any]) -> torch.Tensor | None:
    """The one number of each row behind these steps."""
    for step in steps:
        if op_name(step) in LAYOUT:
            named = dict(zip(step.kwargs, _with(tuple(step.kwargs.values()), marks, symbols), strict=True))
            marks = step.target(*_with(step.args, marks, symbols), **named)  # type: ignore[operator]
            continue
        rows = _rows(marks)
        if rows is None:
            return None
        shape = _concrete(value(step).shape, symbols)
        marks = rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    rows = _rows(marks)
    return None if rows is None else rows.long()


def _path(view: GraphView, node: fx.Node, symbols: frozenset[Any]) -> list[fx.Node] | None:
    """The nodes by which the rows of ``node`` came, from one whose batch is a dimension of its own."""
    path: list[fx.Node] = []
    while not is_tensor(node) or list(batch_axes(value(node).shape, symbols).values()) != [1]:
        name = op_name(node)
        sources = [n for n in view.data_inputs(node) if not is_tensor(n) or value(n).dim()]
        if name in LAYOUT:
            source = sources[0] if len(sources) == 1 else None
        elif is_tensor(node):
            pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
            keeps = pointwise or name in KEEP_ROWS or name.startswith(("conv", "max_pool", "avg_pool", "adaptive"))
            rows = str(value(node).shape[0])
            same = (n for n in sources if is_tensor(n) and str(value(n).shape[0]) == rows)
            source = next(same, None) if keeps else None
        else:
            source = None
        if source is None or source in path:
            return None
        path.append(node)
        node = source
    return [node, *path[::-1]]


def _rows(marks: torch.Tensor) -> torch.Tensor | None:
    """The one sample of each row; 0, which padding leaves, is none."""
    rows = marks.reshape(len(marks), -1)
    most = rows.amax(1)
    return most if bool(((rows == most[:, None]) | (rows == 0)).all()) and bool((most > 0).all()) else None


def _concrete(sizes: Iterable[Any], symbols: frozenset[Any]) -> list[int]:
    """Sizes in a batch of :data:`BATCH`."""
    known = dict.fromkeys(symbols, BATCH)
    return [int(s.node.expr.subs(known)) if isinstance(s, torch.SymInt) else int(s) for s in sizes]


def _with(args: Sequence[Any], marks: torch.Tensor, symbols: frozenset[Any]) -> list[Any]:
    """A layout operator's arguments, with ``marks`` for its tensor and numbers for sizes."""

    def plain(arg: Any) -> Any:
        if isinstance(arg, list | tuple):
            return [plain(a) for a in arg]
        if not isinstance(arg, fx.Node):
            return arg
        return _concrete([value(arg)], symbols)[0] if isinstance(value(arg), torch.SymInt | int) else marks

    return [plain(arg) for arg in args]
