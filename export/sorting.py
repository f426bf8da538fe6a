"""Operators that sort, count and pick rows of new positions, as mixtures of experts do with the tokens of each expert.

Such operators read all rows, and yet what becomes of one row does not depend on the others: the same operators, unchanged, do with the rows of new positions what they do with all. That is so where rows are
brought back into their order in the end, which no rule here can tell: what is made this way is compared with the whole graph like every other form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx
from diffusionblocks.export.position_rules import ELEMENTWISE
from diffusionblocks.export.positions import MERGED, NEW, ROWS, Axes, NoForm, Value

if TYPE_CHECKING:
    from diffusionblocks.export.cached import Writer

LENGTHS = frozenset(
    ["Add", "Cast", "Concat", "Div", "Gather", "Identity", "Max", "Min", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze"]
)  # fmt: skip
"""Operators by which lengths are computed of a shape."""


def among_rows(writer: Writer, node: onnx.NodeProto, values: Sequence[Value | None], error: NoForm) -> list[Value]:
    """Write a node as it is, on rows of new positions.

    Raises:
        NoForm: ``error``, where another value of positions is read too, or a table of all rows that is not the count of them.
    """
    if any(mark not in (MERGED, ROWS, None) for v in values if v is not None for mark in v.axes):
        raise error
    if node.op_type == "Reshape" and (made := _grouped(writer, node, values[0])):
        return [made]
    names = [_of_rows(writer, v, name, error) for v, name in zip(values, node.input, strict=True)]
    same = onnx.NodeProto()
    same.CopyFrom(node)
    del same.input[:]
    same.input.extend(names)
    writer.nodes.append(same)
    return [Value(name, name, (ROWS,), (), (), loose=True) for name in node.output if name]


def _grouped(writer: Writer, node: onnx.NodeProto, value: Value | None) -> Value | None:
    """Rows whose number is known again: as many for each new position as there are, or the new positions of each sample."""
    try:
        dims, slopes = writer.dims(node.output[0])
    except NoForm:
        return None
    at = next((k for k, slope in enumerate(slopes) if slope), None)
    if value is None or at is None or sum(map(bool, slopes)) > 1:
        return None
    axes: list[str | None] = [None] * len(dims)
    if slopes[at] % writer.length == 0:
        axes[at] = ROWS
    elif at + 1 < len(dims) and dims[at + 1] == writer.length:
        axes[at + 1] = NEW
    else:
        return None
    made = Value(node.output[0], node.output[0], tuple(axes), dims, slopes)
    writer.emit("Reshape", [value.name, writer.vector_of(made)], made.name)
    return made


def _of_rows(writer: Writer, value: Value | None, name: str, error: NoForm) -> str:
    if value is None or not any(value.slopes):
        return value.name if value is not None and not value.plain else _lengths(writer, name)
    if not value.plain:
        return value.name
    at = next(k for k, slope in enumerate(value.slopes) if slope)
    if value.slopes[at] % writer.length or not _counts(writer, name):
        raise error
    axes: Axes = tuple(ROWS if k == at else None for k in range(len(value.dims)))
    made = f"{name}.first"
    if made not in writer.written:
        writer.written.add(made)
        end = writer.vector_of(Value("", "", axes[at : at + 1], value.dims[at : at + 1], value.slopes[at : at + 1]))
        writer.emit("Slice", [name, writer.constant([0]), end, writer.constant([at])], made)
    return made


def _counts(writer: Writer, name: str) -> bool:
    """Whether a value of all rows is computed of each row's number, or is the same for all: its first rows are what fewer rows would have."""
    node = writer.makers.get(name)
    if node is None or node.op_type == "Constant":
        return name in writer.known and writer.known[name].size == 1
    if node.op_type == "Range":
        return bool(writer.known.get(node.input[0], 1) == 0)
    if node.op_type == "ConstantOfShape":
        return True
    if node.op_type in ("Expand", "Unsqueeze"):
        return _counts(writer, node.input[0])
    return node.op_type in ELEMENTWISE and all(_counts(writer, read) for read in node.input if read)


def _lengths(writer: Writer, name: str) -> str:
    """A value that no token has a say in, computed of the shapes that values have in the new graph."""
    node = writer.makers.get(name)
    if node is None or len(node.output) != 1:
        return name
    made = f"{name}.rows"
    if made in writer.written:
        return made
    if node.op_type == "Shape":
        value = writer.values.get(node.input[0])
        if value is None or value.plain:
            return name
        names = [value.name]
    elif node.op_type in LENGTHS:
        names = [_lengths(writer, read) if read else "" for read in node.input]
        if names == list(node.input):
            return name
    else:
        return name
    writer.written.add(made)
    kept = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return writer.emit(node.op_type, names, made, **kept)


def is_loose(values: Sequence[Value | None]) -> bool:
    """Whether one of them has rows whose number is not known, which no rule can follow."""
    return any(v is not None and v.loose for v in values)
