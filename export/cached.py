"""A causal graph for new positions only: keys and values of those before them come in, and go out with the new ones'.

Every value is followed along its axis of positions. Most operators act on each position alone and compute the new ones as they would compute all. Where one reads every position of a value (keys,
values, the columns of a mask), that value is kept: its past is an input, the new positions are put behind it, and the whole goes out again. What no token has a say in, such as causal masks and tables of
positions, is computed as before, and the rows and columns that are needed are cut out of it. An operator that mixes positions in a way of its own computes all of them again, of what was kept and zeros
behind it.

Requires: a graph that is causal along its positions; shapes of its values. Ensures: the whole graph's outputs at the new positions, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from diffusionblocks.export.position_rules import ELEMENTWISE, LAYOUT, RULES, Array
from diffusionblocks.export.positions import ALL, MERGED, MORE, NEW, ROWS, Axes, Dims, NoForm, Shape, Value, attribute
from diffusionblocks.export.sorting import among_rows, is_loose
from diffusionblocks.runtime.manifest import PAST, POSITION, PRESENT, TensorSpec


@dataclass(frozen=True)
class CachedGraph:
    """``model`` has the whole graph's inputs, then ``caches`` and ``position`` (where it reads it); its outputs, then what the caches are to be; ``outputs``: what the axes of each output hold."""

    model: onnx.ModelProto
    caches: tuple[TensorSpec, ...]
    outputs: dict[str, Axes]


def cached(model: onnx.ModelProto, shapes: Mapping[str, Shape], inputs: Mapping[str, Axes], length: int) -> CachedGraph:
    """The form of a graph for new positions.

    Args:
        model: the graph; what is not in ``inputs`` among its inputs are weights.
        shapes: of its values, those that are known.
        inputs: for each input, what its axes hold.
        length: how many positions the graph computes.

    Raises:
        NoForm: the graph has none.
    """
    if model.functions:
        raise NoForm("functions in the graph")
    writer = Writer(model, Dims(model, shapes), inputs, length)
    for node in model.graph.node:
        writer.add(node)
    return writer.finished()


@dataclass
class Writer:
    model: onnx.ModelProto
    dims: Dims
    inputs: Mapping[str, Axes]
    length: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    caches: list[tuple[str, str, TensorSpec]] = field(default_factory=list)
    """The value whose past it is, that value with its past, and the cache."""

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.known: dict[str, Array] = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        self.values: dict[str, Value] = {}
        self.makers: dict[str, onnx.NodeProto] = {}
        self._whole: dict[str, Value] = {}
        self._cut: dict[tuple[str, Axes], Value] = {}
        self._vectors: dict[str, str] = {}
        self.written: set[str] = set()
        for name in (*(v.name for v in graph.input), *self.known):
            dims, slopes = self.dims(name)
            self.values[name] = Value(name, name, self.inputs.get(name, (None,) * len(dims)), dims, slopes)
        if all(v.plain for v in self.values.values()):
            raise NoForm("no input has positions")

    # Nodes

    def add(self, node: onnx.NodeProto) -> None:
        """Write what a node of the whole graph is for new positions."""
        for name in node.output:
            self.makers[name] = node
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            self.known[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
        reads = [*node.input, *_inner(node)]
        moved = [name for name in reads if name in self.values and not self.values[name].plain]
        if not moved:
            self.nodes.append(node)
            for name in filter(None, node.output):
                self._note(name)
        elif node.op_type == "Shape" and not self.values[node.input[0]].loose:
            self._shape(node)
        else:
            given = [self.values.get(name) for name in node.input]
            try:
                made = self.applied(node, given)
            except NoForm as error:
                rows = any(mark in (MERGED, ROWS) for v in given if v is not None for mark in v.axes)
                if rows and not any(_inner(node)):
                    made = among_rows(self, node, given, error)
                else:
                    made = self._on_all(node, given, error)
            self.values |= {value.origin: value for value in made}

    def _note(self, name: str) -> None:
        """A value on which no token has a say. One whose shape is not known cannot be cut, and that is found out where it would be."""
        try:
            dims, slopes = self.dims(name)
        except NoForm:
            return
        self.values[name] = Value(name, name, (None,) * len(dims), dims, slopes)

    def _shape(self, node: onnx.NodeProto) -> None:
        """The shape of the whole graph's value: what is computed of it is what was computed before."""
        value = self.values[node.input[0]]
        start, end = attribute(node, "start", 0), attribute(node, "end", len(value.dims))
        chosen = slice(start, end)
        plain = replace(
            value, axes=(None,) * len(value.dims[chosen]), dims=value.dims[chosen], slopes=value.slopes[chosen]
        )
        self.emit("Identity", [self.vector_of(plain)], node.output[0])
        self._note(node.output[0])

    def applied(self, node: onnx.NodeProto, values: Sequence[Value | None], suffix: str = "") -> list[Value]:
        """Write a node on these values; its outputs."""
        rule = RULES.get(node.op_type)
        if rule is None or node.domain or is_loose(values):
            raise NoForm(f"the operator {node.op_type} on positions")
        names, axes = rule(self, node, values)
        if sum(axes.count(mark) for mark in (NEW, MERGED, ROWS)) > 1:
            raise NoForm(f"the operator {node.op_type} on positions of two kinds")
        return self._again(node, names, axes, suffix)

    def _again(self, node: onnx.NodeProto, names: Sequence[str], axes: Axes | None, suffix: str = "") -> list[Value]:
        """Write a node that reads ``names``; ``axes`` None: its outputs have all lengths."""
        outputs = []
        for name in filter(None, node.output):
            dims, slopes = self.dims(name)
            outputs.append(Value(f"{name}{suffix}", name, (None,) * len(dims) if axes is None else axes, dims, slopes))
        made = onnx.NodeProto()
        made.CopyFrom(node)
        del made.input[:], made.output[:]
        made.input.extend(names)
        made.output.extend(f"{name}{suffix}" if name else "" for name in node.output)
        self.nodes.append(made)
        return outputs

    def _on_all(self, node: onnx.NodeProto, values: Sequence[Value | None], error: NoForm) -> list[Value]:
        """Write a node that mixes positions in a way of its own: on all of them, those to come being zeros, of which the new ones are taken."""
        if any(not self.values[name].plain for name in _inner(node) if name in self.values):
            raise error
        names = [n if v is None or v.plain else self._filled(v, error) for v, n in zip(values, node.input, strict=True)]
        made = []
        for value in self._again(node, names, None):
            at = [k for k, size in enumerate(value.dims) if size == self.length]
            axes = tuple(NEW if at == [k] else None for k in range(len(value.dims)))
            made.append(value if value.axes == axes else self._sliced(value, axes, f"{value.name}.new"))
        return made

    def _filled(self, value: Value, error: NoForm) -> str:
        """A value at all positions, zeros at those to come."""
        if {MERGED, ROWS, MORE} & {*value.axes}:
            raise error
        value = self.whole(value) if NEW in value.axes else value
        name = f"{value.name}.filled"
        if name not in self._vectors:
            rest = self.emit("Sub", [self.constant([self.length]), self.vector(ALL)], f"{name}.rest")
            pads = self.emit("Concat", [self.constant([0]), rest], f"{name}.pads", axis=0)
            axis = self.constant([value.axes.index(ALL)])
            self._vectors[name] = self.emit("Pad", [value.name, pads, "", axis], name)
        return name

    def emit(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(onnx.helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    # Values in other forms

    def whole(self, value: Value) -> Value:
        """A value of new positions with all positions before them."""
        name = value.origin
        if name not in self._whole:
            kept = self._kept(name)
            if kept == name:
                self._whole[name] = self._cached(self.values[name])
            else:
                node = self.makers[name]
                given = [self.values.get(n) for n in node.input]
                made = self.applied(node, [v if v is None or v.plain else self.whole(v) for v in given], ".whole")
                self._whole |= {v.origin: v for v in made}
        return self._whole[name]

    def _kept(self, name: str) -> str:
        """The value that is kept for ``name``: itself, or a smaller one of which it is only another layout, such as keys before they are repeated for each head."""
        best = name
        while (node := self.makers.get(name)) is not None and node.op_type in LAYOUT:
            given = [self.values.get(n) for n in node.input]
            moved = [v for v in given if v is not None and not v.plain]
            rest = [v for v in given if v is not None and v.plain]
            scaled = node.op_type in ("Mul", "Div") and (len(moved) != 1 or any(math.prod(v.dims) > 1 for v in rest))
            if len(moved) != 1 or scaled:
                break
            name = moved[0].origin
            if NEW in moved[0].axes and math.prod(moved[0].dims) < math.prod(self.values[best].dims):
                best = name
        return best

    def _cached(self, value: Value) -> Value:
        if value.axes.count(NEW) != 1 or {ALL, MERGED, ROWS, MORE} & {*value.axes}:
            raise NoForm(f"{value.origin} cannot be kept")
        axis, count = value.axes.index(NEW), len(self.caches)
        cache, joined = f"{PAST}.{count}", f"{value.name}.whole"
        shape = [_times(slope) if slope else size for size, slope in zip(value.dims, value.slopes, strict=True)]
        shape[axis] = PAST
        kind = onnx.helper.tensor_dtype_to_np_dtype(self.dims.kinds[value.origin]).name
        self.caches.append((value.origin, joined, TensorSpec(cache, kind, tuple(shape))))
        self.emit("Concat", [cache, value.name], joined, axis=axis)
        axes = tuple(ALL if a == NEW else a for a in value.axes)
        return replace(value, name=joined, axes=axes)

    def cut(self, value: Value, axes: Axes) -> Value:
        """Of a value that has all lengths, the positions that ``axes`` hold."""
        if value.plain and value.name == value.origin:
            return self._cut_of(value, axes)
        return self._sliced(value, axes, f"{value.name}{_mark(axes)}")

    def _cut_of(self, value: Value, axes: Axes) -> Value:
        """Cut before it is computed, where it is made of others element by element."""
        if not any(axes):
            return value
        if (value.name, axes) not in self._cut:
            node = self.makers.get(value.name)
            given = [] if node is None else [self.values.get(n) for n in node.input if n]
            if node is None or node.op_type not in ELEMENTWISE or len(node.output) != 1 or None in given:
                self._cut[value.name, axes] = self._sliced(value, axes, f"{value.name}{_mark(axes)}")
            else:
                parts = iter([self._cut_of(v, _aligned(axes, v)) for v in given if v is not None])
                names = [next(parts).name if n else "" for n in node.input]
                (self._cut[value.name, axes],) = self._again(node, names, axes, _mark(axes))
        return self._cut[value.name, axes]

    def _sliced(self, value: Value, axes: Axes, name: str) -> Value:
        made = value
        if (value.name, axes) in self._cut:
            return self._cut[value.name, axes]
        for axis, (old, new) in enumerate(zip(value.axes, axes, strict=True)):
            if new is None or new == old:
                continue
            if old is not None or new in (MERGED, ROWS, MORE) or value.dims[axis] != self.length:
                raise NoForm(f"{value.origin} has {value.dims[axis]} where there are positions")
            start, end = (self.vector(PAST), self.vector(ALL)) if new == NEW else (self.constant([0]), self.vector(ALL))
            kept = tuple(axes[: axis + 1]) + tuple(made.axes[axis + 1 :])
            cut = self.emit("Slice", [made.name, start, end, self.constant([axis])], f"{name}.{axis}")
            made = replace(made, name=cut, axes=kept)
        self._cut[value.name, axes] = made
        return made

    def joined(self, values: Sequence[Value], without: frozenset[int] = frozenset()) -> tuple[list[Value], Axes]:
        """Values that are broadcast to each other, in forms that fit, and what the axes of the result hold; not looking at the axes ``without``, counted from the end."""
        made, rank = list(values), max(len(v.axes) for v in values)
        looked = [axis for axis in range(-rank, 0) if axis not in without]
        while True:
            held = {axis: {v.axes[axis] for v in made if -axis <= len(v.axes)} - {None} for axis in looked}
            twice = [axis for axis in looked if held[axis] == {NEW}][1:]
            mixed = [axis for axis in looked if len(held[axis]) > 1]
            if any({MERGED, ROWS, MORE} & held[axis] for axis in mixed):
                raise NoForm("positions of all samples in one axis, or columns behind them, beside others")
            if not twice and not mixed:
                break
            at = (mixed or twice)[-1]  # of two axes of new positions the later one is that of a mask's columns
            made = [self.whole(v) if -at <= len(v.axes) and v.axes[at] == NEW else v for v in made]
        axes: Axes = tuple(next(iter(held.get(axis, ())), None) for axis in range(-rank, 0))
        return [self._fitted(v, axes, looked) for v in made], axes

    def _fitted(self, value: Value, axes: Axes, looked: Sequence[int]) -> Value:
        rank = len(value.axes)
        wanted = list(value.axes)
        for axis in looked:
            if -axis <= rank and value.axes[axis] is None and value.dims[axis] != 1:
                wanted[axis] = axes[axis]
        return value if tuple(wanted) == value.axes else self.cut(value, tuple(wanted))

    # Lengths, as vectors of one number

    def vector(self, what: str) -> str:
        """How many positions there were before, are new, are there together; or the length of the batch."""
        if what not in self._vectors:
            self._vectors[what] = self._written(what)
        return self._vectors[what]

    def _written(self, what: str) -> str:
        name = f"positions.{what}"
        if what in (PAST, ALL):
            at = [self.constant([k]) for k in ((0, 1) if what == PAST else (1, 2))]
            return self.emit("Slice", [POSITION, *at, self.constant([0])], name)
        if what == NEW:
            return self.emit("Sub", [self.vector(ALL), self.vector(PAST)], name)
        inputs = [self.values[v.name] for v in self.model.graph.input]
        for value in inputs:
            if 1 in value.slopes:
                axis = value.slopes.index(1)
                return self.emit("Shape", [value.name], name, start=axis, end=axis + 1)
        for value in inputs:
            if MERGED in value.axes:
                axis = value.axes.index(MERGED)
                rows = self.emit("Shape", [value.name], f"{name}.rows", start=axis, end=axis + 1)
                lead = self.constant([value.slopes[axis] // self.length])
                return self.emit("Div", [rows, self._product(self.vector(NEW), lead)], name)
        raise NoForm("no input tells the batch")

    def constant(self, numbers: Sequence[int]) -> str:
        name = "number." + ".".join(map(str, numbers))
        if name not in self.known:
            self.known[name] = np.asarray(numbers, np.int64)
            self.constants.append(onnx.numpy_helper.from_array(self.known[name], name))
        return name

    def vector_of(self, value: Value) -> str:
        """The shape of a value in the new graph."""
        parts: list[str] = []
        for axis, size, slope in zip(value.axes, value.dims, value.slopes, strict=True):
            if axis in (NEW, ALL):
                parts.append(self.vector(str(axis)))
            elif axis == MORE:
                behind = self.constant([size - self.length])
                parts.append(self.emit("Add", [self.vector(ALL), behind], f"more.{len(self.nodes)}"))
            elif axis in (MERGED, ROWS):
                lead = self._batches(slope // self.length) if slope else self.constant([size // self.length])
                parts.append(self._product(lead, self.vector(NEW)))
            else:
                parts.append(self._batches(slope) if slope else self.constant([size]))
        if not parts:
            return self.constant([])
        return parts[0] if len(parts) == 1 else self.emit("Concat", parts, f"shape.{len(self.nodes)}", axis=0)

    def _batches(self, count: int) -> str:
        batch = self.vector("batch")
        return batch if count == 1 else self._product(batch, self.constant([count]))

    def _product(self, left: str, right: str) -> str:
        name = f"{left}*{right}"
        if name not in self._vectors:
            self._vectors[name] = self.emit("Mul", [left, right], name)
        return self._vectors[name]

    # The graph

    def finished(self) -> CachedGraph:
        old = self.model.graph
        made = onnx.ModelProto()
        made.CopyFrom(self.model)
        graph = made.graph
        for number, (_, joined, spec) in enumerate(self.caches):
            output = self.emit("Identity", [joined], f"{PRESENT}.{number}")
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
            graph.input.append(onnx.helper.make_tensor_value_info(spec.name, kind, list(spec.shape)))
            grown = [ALL if size == PAST else size for size in spec.shape]
            graph.output.append(onnx.helper.make_tensor_value_info(output, kind, grown))
        wanted = {output.name for output in graph.output}
        nodes = []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                nodes.append(node)
                wanted |= {*node.input, *_inner(node)}
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(reversed(nodes))
        graph.initializer.extend(t for t in (*old.initializer, *self.constants) if t.name in wanted)
        if POSITION in wanted:
            graph.input.append(onnx.helper.make_tensor_value_info(POSITION, onnx.TensorProto.INT64, [2]))
        outputs = {output.name: self.values[output.name].axes for output in old.output if output.name in self.values}
        if len(outputs) < len(old.output):
            raise NoForm("the shape of an output is not known")
        if any(MORE in axes for axes in outputs.values()):
            raise NoForm("an output of positions and columns behind them")
        lengths = {**self.inputs, **outputs}
        for value in (*graph.input, *graph.output):
            for dim, axis in zip(value.type.tensor_type.shape.dim, lengths.get(value.name, ()), strict=False):
                if axis is not None:
                    dim.dim_param = axis
        return CachedGraph(made, tuple(spec for _, _, spec in self.caches), outputs)


def _inner(node: onnx.NodeProto) -> Iterator[str]:
    for held in node.attribute:
        for inner in (*([held.g] if held.HasField("g") else ()), *held.graphs):
            for each in inner.node:
                yield from each.input
                yield from _inner(each)


def _times(count: int) -> str:
    return "batch" if count == 1 else f"{count}*batch"


def _mark(axes: Axes) -> str:
    return "." + "".join((axis or "-")[0] for axis in axes)


def _aligned(axes: Axes, value: Value) -> Axes:
    """What of the result's axes concerns a value that was broadcast to it."""
    own = axes[len(axes) - len(value.dims) :]
    return tuple(axis if size != 1 else None for axis, size in zip(own, value.dims, strict=True))
