"""How much memory a graph's intermediate values take: from the shapes that the exporter writes into it, for one row of the batch."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

import onnx

OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


def bytes_of_values(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of every value whose shape is written, by name; the batch, and any other length that is not known, is 1."""
    graph = model.graph
    return {v.name: _bytes(v.type.tensor_type) for v in (*graph.input, *graph.output, *graph.value_info)}


def row_bytes(model: onnx.ModelProto, sizes: Mapping[str, int], weights: Collection[str] = ()) -> int:
    """The most bytes of values that are alive at once, inputs and outputs among them; a value lives from its node to its last reader.

    Values of unknown shape count nothing, and neither do the weights and their transposes, which products take in.
    """
    graph = model.graph
    turned = {n.output[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights}
    sizes = {name: size for name, size in sizes.items() if name not in weights and name not in turned}
    last = {name: k for k, node in enumerate(graph.node) for name in _read(node)}
    outputs = {output.name for output in graph.output}
    alive = {value.name for value in graph.input}
    total = most = sum(sizes.get(name, 0) for name in alive)
    for k, node in enumerate(graph.node):
        made = {name for name in node.output if name and name not in alive}
        alive |= made
        total += sum(sizes.get(name, 0) for name in made)
        most = max(most, total)
        dead = {name for name in (*_read(node), *made) if name in alive and last.get(name, k) <= k} - outputs
        alive -= dead
        total -= sum(sizes.get(name, 0) for name in dead)
    return most


def _read(node: onnx.NodeProto) -> list[str]:
    inner = [name for a in node.attribute if a.HasField("g") for n in a.g.node for name in _read(n)]
    return [name for name in (*node.input, *inner) if name]


def _bytes(kind: onnx.TypeProto.Tensor) -> int:
    try:
        size = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    except (KeyError, TypeError):  # no tensor
        return 0
    return size * math.prod(d.dim_value if d.HasField("dim_value") else length_of(d.dim_param) for d in kind.shape.dim)


def length_of(text: str, batch: int = 1) -> int:
    """The number that an expression such as ``12*batch`` is where every name is ``batch``; 1 where it is no such expression."""
    try:
        return max(1, _value(ast.parse(text, mode="eval").body, batch))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return 1


def _value(node: ast.expr, batch: int) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return batch
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return int(OPERATORS[type(node.op)](_value(node.left, batch), _value(node.right, batch)))
    raise ValueError(ast.dump(node))
