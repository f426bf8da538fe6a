"""Operators on values of new positions: which forms of its inputs each one reads, and what the axes of its outputs hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from diffusionblocks.export.positions import ALL, MERGED, MORE, NEW, ROWS, Axes, NoForm, Value, attribute
from numpy.typing import NDArray

if TYPE_CHECKING:
    from diffusionblocks.export.cached import Writer

Array = NDArray[Any]
FAR = 2**31 - 1
"""The end of a slice that has no end."""
Given = Sequence[Value | None]
Rule = Callable[["Writer", onnx.NodeProto, Given], tuple[list[str], Axes]]


def _names(values: Given, node: onnx.NodeProto) -> list[str]:
    return [name if value is None else value.name for value, name in zip(values, node.input, strict=True)]


def _first(values: Given) -> Value:
    if not values or values[0] is None:
        raise NoForm("a value without a shape")
    return values[0]


def _all_known(node: onnx.NodeProto, values: Given) -> list[Value]:
    known = [v for v, name in zip(values, node.input, strict=True) if name and v is not None]
    if len(known) < len([name for name in node.input if name]):
        raise NoForm(f"a value without a shape at {node.op_type}")
    return known


def _elementwise(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    made, axes = writer.joined(_all_known(node, values))
    names = iter(made)
    return [next(names).name if name else "" for name in node.input], axes


def _along(writer: Writer, value: Value, axis: int) -> Value:
    """A value for an operator that reads it along an axis: with all positions if these lie there."""
    if value.axes[axis] in (MERGED, ROWS):
        raise NoForm("positions of all samples in one axis")
    return writer.whole(value) if value.axes[axis] == NEW else value


def _softmax(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _along(writer, _first(values), attribute(node, "axis", -1))
    return [x.name, *node.input[1:]], x.axes


def _normalised(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x, axis = _first(values), attribute(node, "axis", -1)
    if any(x.axes[axis % len(x.axes) :]) or any(v is not None and not v.plain for v in values[1:]):
        raise NoForm("a norm over positions")
    return _names(values, node), x.axes


def _reduced(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    if len(node.input) > 1 and node.input[1]:
        axes = [int(a) for a in _constant(writer, node, 1).reshape(-1)]
    else:
        axes = attribute(node, "axes", [attribute(node, "axis", 0)] if node.op_type.startswith("Arg") else [])
    rank = len(x.axes)
    if not axes and not attribute(node, "noop_with_empty_axes", 0):
        axes = list(range(rank))
    over = {axis % rank for axis in axes}
    for axis in over:
        x = _along(writer, x, axis)
    kept = bool(attribute(node, "keepdims", 1))
    held = tuple(None if k in over else a for k, a in enumerate(x.axes) if kept or k not in over)
    return [x.name, *node.input[1:]], held


def _matmul(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    a, b = _all_known(node, values)
    if min(len(a.axes), len(b.axes)) < 2:
        raise NoForm("a product with a vector")
    if MORE in (a.axes[-1], b.axes[-2]):
        raise NoForm("a sum over positions and columns behind them")
    if a.axes[-1] is not None or b.axes[-2] is not None:  # a sum over positions
        a, b = _along(writer, a, -1), _along(writer, b, -2)
        wanted = ALL if ALL in (a.axes[-1], b.axes[-2]) else None
        a, b = writer.cut(a, (*a.axes[:-1], wanted)), writer.cut(b, (*b.axes[:-2], wanted, b.axes[-1]))
    if b.axes[-1] is not None and a.axes[-2] is not None:  # queries and keys
        b = _along(writer, b, -1)
    (a, b), lead = writer.joined([a, b], frozenset({-1, -2}))
    return [a.name, b.name], (*lead[:-2], a.axes[-2], b.axes[-1])


def _gemm(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    a, b, *rest = _all_known(node, values)
    added = [v for v in rest if not v.plain or (len(v.dims) > 1 and v.dims[0] != 1)]
    if attribute(node, "transA", 0) or a.axes[-1] is not None or not b.plain or added:
        raise NoForm("a product of matrices over positions")
    return _names(values, node), (a.axes[0], None)


def _transpose(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    order = attribute(node, "perm", list(reversed(range(len(x.axes)))))
    return [x.name], tuple(x.axes[k] for k in order)


def _unsqueeze(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x, axes = _first(values), _constant(writer, node, 1).reshape(-1)
    rank = len(x.axes) + len(axes)
    new = {int(a) % rank for a in axes}
    held = iter(x.axes)
    return [x.name, node.input[1]], tuple(None if k in new else next(held) for k in range(rank))


def _squeeze(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x, rank = _first(values), len(_first(values).axes)
    if len(node.input) < 2:
        raise NoForm("a squeeze of every axis")
    gone = {int(a) % rank for a in _constant(writer, node, 1).reshape(-1)}
    return [x.name, node.input[1]], tuple(a for k, a in enumerate(x.axes) if k not in gone)


def _along_another(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    """Values put one behind another, or looked up, along an axis that is not that of positions."""
    known = _all_known(node, values)
    rank = len(known[0].axes)
    axis = attribute(node, "axis", 0) % rank - rank
    if any(v.axes[axis] is not None for v in known):
        raise NoForm(f"{node.op_type} along positions")
    made, axes = writer.joined(known, frozenset({axis}))
    return [v.name for v in made], axes


def _concat(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    """Also columns behind those of all positions."""
    first, rank = _first(values), len(_first(values).axes)
    axis = attribute(node, "axis", 0) % rank - rank
    if first.axes[axis] != ALL:
        return _along_another(writer, node, values)
    known = _all_known(node, values)
    if any(v.axes[axis] is not None for v in known[1:]):
        raise NoForm("Concat of positions")
    made, axes = writer.joined(known, frozenset({axis}))
    return [v.name for v in made], (*axes[:axis], MORE, *axes[axis:][1:])


def _split(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    if x.axes[attribute(node, "axis", 0)] is not None:
        raise NoForm("positions taken apart")
    return [x.name, *node.input[1:]], x.axes


def _slice(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    starts, ends = (_constant(writer, node, k).reshape(-1) for k in (1, 2))
    given = len(node.input) > 3 and node.input[3]
    axes = _constant(writer, node, 3).reshape(-1) if given else np.arange(len(starts))
    steps = _constant(writer, node, 4).reshape(-1) if len(node.input) > 4 else np.ones(len(starts), int)
    ends, held = ends.astype(np.int64), list(x.axes)
    for k, axis in enumerate(map(int, axes)):
        if x.axes[axis] == MORE and starts[k] == 0 and steps[k] == 1 and ends[k] in (writer.length, writer.length - x.dims[axis]):  # fmt: skip
            ends[k], held[axis] = writer.length - x.dims[axis], ALL
        elif x.axes[axis] is not None:
            if starts[k] != 0 or ends[k] < x.dims[axis] or steps[k] != 1:
                raise NoForm("a part of the positions")
            ends[k] = FAR
    return [x.name, node.input[1], writer.constant(ends.tolist()), *node.input[3:]], tuple(held)


def _gather(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    data, indices = _all_known(node, values)
    axis = attribute(node, "axis", 0) % len(data.axes)
    if data.axes[axis] is not None:
        raise NoForm("positions looked up")
    return [data.name, indices.name], (*data.axes[:axis], *indices.axes, *data.axes[axis + 1 :])


def _top(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    if x.axes[attribute(node, "axis", -1)] is not None:
        raise NoForm("the largest of the positions")
    return [x.name, *node.input[1:]], x.axes


def _expand(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    dims, slopes = writer.dims(node.output[0])
    axes = (None,) * (len(dims) - len(x.axes)) + x.axes
    return [x.name, writer.vector_of(Value("", "", axes, dims, slopes))], axes


def _tile(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x, times = _first(values), _constant(writer, node, 1).reshape(-1)
    if any(held is not None and n != 1 for held, n in zip(x.axes, times, strict=True)):
        raise NoForm("positions repeated")
    return [x.name, node.input[1]], x.axes


def _reshape(writer: Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    dims, slopes = writer.dims(node.output[0])
    axes: list[str | None] = [None] * len(dims)
    for olds, news in _groups(x.dims, dims):
        old, new = [k for k in olds if x.dims[k] != 1], [k for k in news if dims[k] != 1]
        held = [x.axes[k] for k in old]
        if not any(held):
            continue
        if len(old) == len(new) == 1:
            axes[new[0]] = held[0]
        elif len(new) == 1 and held[-1] == NEW and not any(held[:-1]):
            axes[new[0]] = MERGED
        elif (len(new) == 1 and sum(map(bool, held)) == 1 and not {ALL, MORE} & {*held}) or (
            held == [ROWS] and slopes[new[0]] and slopes[new[0]] % writer.length == 0
        ):
            axes[new[0]] = ROWS
        elif held == [ROWS] and dims[new[1]] == writer.length:
            axes[new[1]] = NEW
        elif (
            held.count(NEW) == 1 and sum(map(bool, held)) == 1 and _whole_rows(x, dims, old[: held.index(NEW) + 1], new)
        ):
            axes[new[0]] = ROWS
        elif held == [MERGED] and dims[new[-1]] == writer.length:
            axes[new[-1]] = NEW
        else:
            raise NoForm("positions beside other axes in one")
    return [x.name, writer.vector_of(Value("", "", tuple(axes), dims, slopes))], tuple(axes)


def _whole_rows(x: Value, dims: Sequence[int], old: Sequence[int], new: Sequence[int]) -> bool:
    """Whether the first of the new axes counts the last of these old ones, or equal parts of it."""
    return dims[new[0]] % math.prod(x.dims[k] for k in old) == 0


def _groups(olds: Sequence[int], news: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The axes of two shapes of as many elements in groups, each as few as have equal products."""
    i = j = 0
    while i < len(olds) or j < len(news):
        left, right, a, b = list[int](), list[int](), 1, 1
        if i < len(olds):
            left, a, i = [i], olds[i], i + 1
        else:
            right, b, j = [j], news[j], j + 1
        while a != b:
            if a > b and j < len(news):
                right, b, j = [*right, j], b * news[j], j + 1
            elif i < len(olds):
                left, a, i = [*left, i], a * olds[i], i + 1
            else:
                raise NoForm("a reshape that cannot be followed")
        yield left, right


def _constant(writer: Writer, node: onnx.NodeProto, index: int) -> Array:
    name = node.input[index]
    if name not in writer.known:
        raise NoForm(f"{node.op_type} by what is computed")
    return writer.known[name]


ELEMENTWISE = frozenset(
    [
        "Abs", "Add", "And", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "Cast", "CastLike", "Ceil", "Clip", "Cos", "Div",
        "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf",
        "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mod", "Mul", "Neg", "Not",
        "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign",
        "Sqrt", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Where", "Xor",
    ]
)  # fmt: skip
LAYOUT = frozenset(["Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Identity", "Mul", "Div"])
"""Operators after which a value is the same numbers in another layout, up to one factor."""
REDUCTIONS = tuple(
    f"Reduce{kind}" for kind in ("Mean", "Sum", "Max", "Min", "L1", "L2", "LogSum", "LogSumExp", "SumSquare", "Prod")
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys((*REDUCTIONS, "ArgMax", "ArgMin"), _reduced),
    "LayerNormalization": _normalised,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Concat": _concat,
    "GatherElements": _along_another,
    "TopK": _top,
    "Tile": _tile,
    "Expand": _expand,
    "Reshape": _reshape,
}  # fmt: skip
