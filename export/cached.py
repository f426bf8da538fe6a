"""A causal graph for new positions only: keys and values of those before them come in, and go out with the new ones'.

Every value is followed along its axis of positions. Most operators act on each position alone and compute the new ones as they would compute all. Where one reads every position of a value (keys,
values, the columns of a mask), that value is kept: its past is an input, the new positions are put behind it, and the whole goes out again. What no token has a say in, such as causal masks and tables of
positions, is computed as before, and the rows and columns that are needed are cut out of it. An operator that mixes positions in a way of its own computes all of them again, of what was kept and zeros
behind it.

Requires: a graph that is causal along its positions; shapes of its values. Ensures: the whole graph's outputs at the new positions, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from diffusionblocks.export.intermediate import length_of
from diffusionblocks.runtime.manifest import PAST, POSITION, PRESENT, TensorSpec
from numpy.typing import NDArray

NEW, ALL, MERGED = "new", "all", "merged"
"""What an axis holds: the new positions; those and all before them; for each sample (or head) in turn its new positions."""
Axes = tuple[str | None, ...]
Shape = tuple[int, tuple[int | str, ...]]
"""ONNX's number of a value's type, and its dimensions as the exporter writes them."""
BATCHES = (10007, 10009)
"""Two lengths of the batch, primes that divide nothing else, by which dimensions that depend on it are told."""
FAR = 2**31 - 1
"""The end of a slice that has no end."""
Array = NDArray[Any]


class NoForm(Exception):
    """The graph cannot be written for new positions only; says why."""


@dataclass(frozen=True)
class CachedGraph:
    """``model`` has the whole graph's inputs, then ``caches`` and ``position`` (where it reads it); its outputs, then what the caches are to be; ``outputs``: what the axes of each output hold."""

    model: onnx.ModelProto
    caches: tuple[TensorSpec, ...]
    outputs: dict[str, Axes]


@dataclass(frozen=True)
class _Value:
    """A value under its name in the new graph; ``origin``: in the old one, whose lengths are ``dims``, of which ``slopes`` depend on the batch."""

    name: str
    origin: str
    axes: Axes
    dims: tuple[int, ...]
    slopes: tuple[int, ...]

    @property
    def plain(self) -> bool:
        return not any(self.axes)


def shapes_of_values(model: onnx.ModelProto) -> dict[str, Shape]:
    """Types and dimensions of all values whose dimensions are all written."""
    found = {}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        kind = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
        if kind.HasField("shape") and "" not in dims:
            found[value.name] = kind.elem_type, dims
    return found


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
    writer = _Writer(model, _Dims(model, shapes), inputs, length)
    for node in model.graph.node:
        writer.add(node)
    return writer.finished()


class _Dims:
    """Dimensions of every value, and by how much they grow with the batch."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> None:
        first, second = (self._inferred(model, shapes, batch) for batch in BATCHES)
        self.kinds = {name: kind for name, (kind, _) in first.items()}
        self._dims = {name: dims for name, (_, dims) in first.items()}
        step = BATCHES[1] - BATCHES[0]
        self._slopes = {
            name: tuple((b - a) // step for a, b in zip(dims, second[name][1], strict=True))
            for name, dims in self._dims.items()
            if name in second and len(second[name][1]) == len(dims)
        }

    def __call__(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if name not in self._slopes:
            raise NoForm(f"the shape of {name} is not known")
        return self._dims[name], self._slopes[name]

    @staticmethod
    def _inferred(
        model: onnx.ModelProto, shapes: Mapping[str, Shape], batch: int
    ) -> dict[str, tuple[int, tuple[int, ...]]]:
        fixed = onnx.ModelProto()
        fixed.CopyFrom(model)
        del fixed.graph.value_info[:]
        for value in (*fixed.graph.input, *fixed.graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.HasField("dim_param"):
                    dim.dim_value = length_of(dim.dim_param, batch)
        own = {value.name for value in (*fixed.graph.input, *fixed.graph.output)}
        made = {name for node in fixed.graph.node for name in node.output} - own
        for name in sorted(made & set(shapes)):
            kind, dims = shapes[name]
            lengths = [d if isinstance(d, int) else length_of(d, batch) for d in dims]
            fixed.graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, lengths))
        try:
            inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
        except Exception as error:
            raise NoForm(f"shapes cannot be inferred: {' '.join(str(error).split())[:200]}") from error
        graph = inferred.graph
        found = {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}
        for value in (*graph.input, *graph.output, *graph.value_info):
            kind = value.type.tensor_type
            if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
                found[value.name] = kind.elem_type, tuple(d.dim_value for d in kind.shape.dim)
        return found


@dataclass
class _Writer:
    model: onnx.ModelProto
    dims: _Dims
    inputs: Mapping[str, Axes]
    length: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    caches: list[tuple[str, str, TensorSpec]] = field(default_factory=list)
    """The value whose past it is, that value with its past, and the cache."""

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.known: dict[str, Array] = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        self.values: dict[str, _Value] = {}
        self.makers: dict[str, onnx.NodeProto] = {}
        self._whole: dict[str, _Value] = {}
        self._cut: dict[tuple[str, Axes], _Value] = {}
        self._vectors: dict[str, str] = {}
        for name in (*(v.name for v in graph.input), *self.known):
            dims, slopes = self.dims(name)
            self.values[name] = _Value(name, name, self.inputs.get(name, (None,) * len(dims)), dims, slopes)
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
        elif node.op_type == "Shape":
            self._shape(node)
        else:
            given = [self.values.get(name) for name in node.input]
            try:
                made = self.applied(node, given)
            except NoForm as error:
                made = self._on_all(node, given, error)
            self.values |= {value.origin: value for value in made}

    def _note(self, name: str) -> None:
        """A value on which no token has a say. One whose shape is not known cannot be cut, and that is found out where it would be."""
        try:
            dims, slopes = self.dims(name)
        except NoForm:
            return
        self.values[name] = _Value(name, name, (None,) * len(dims), dims, slopes)

    def _shape(self, node: onnx.NodeProto) -> None:
        """The shape of the whole graph's value: what is computed of it is what was computed before."""
        value = self.values[node.input[0]]
        start, end = _attribute(node, "start", 0), _attribute(node, "end", len(value.dims))
        chosen = slice(start, end)
        plain = replace(
            value, axes=(None,) * len(value.dims[chosen]), dims=value.dims[chosen], slopes=value.slopes[chosen]
        )
        self.emit("Identity", [self.vector_of(plain)], node.output[0])
        self._note(node.output[0])

    def applied(self, node: onnx.NodeProto, values: Sequence[_Value | None], suffix: str = "") -> list[_Value]:
        """Write a node on these values; its outputs."""
        rule = RULES.get(node.op_type)
        if rule is None or node.domain:
            raise NoForm(f"the operator {node.op_type} on positions")
        names, axes = rule(self, node, values)
        if axes.count(NEW) + axes.count(MERGED) > 1:
            raise NoForm(f"the operator {node.op_type} on positions of two kinds")
        return self._again(node, names, axes, suffix)

    def _again(self, node: onnx.NodeProto, names: Sequence[str], axes: Axes | None, suffix: str = "") -> list[_Value]:
        """Write a node that reads ``names``; ``axes`` None: its outputs have all lengths."""
        outputs = []
        for name in filter(None, node.output):
            dims, slopes = self.dims(name)
            outputs.append(_Value(f"{name}{suffix}", name, (None,) * len(dims) if axes is None else axes, dims, slopes))
        made = onnx.NodeProto()
        made.CopyFrom(node)
        del made.input[:], made.output[:]
        made.input.extend(names)
        made.output.extend(f"{name}{suffix}" if name else "" for name in node.output)
        self.nodes.append(made)
        return outputs

    def _on_all(self, node: onnx.NodeProto, values: Sequence[_Value | None], error: NoForm) -> list[_Value]:
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

    def _filled(self, value: _Value, error: NoForm) -> str:
        """A value at all positions, zeros at those to come."""
        if MERGED in value.axes:
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

    def whole(self, value: _Value) -> _Value:
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

    def _cached(self, value: _Value) -> _Value:
        if value.axes.count(NEW) != 1 or ALL in value.axes or MERGED in value.axes:
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

    def cut(self, value: _Value, axes: Axes) -> _Value:
        """Of a value that has all lengths, the positions that ``axes`` hold."""
        if value.plain and value.name == value.origin:
            return self._cut_of(value, axes)
        return self._sliced(value, axes, f"{value.name}{_mark(axes)}")

    def _cut_of(self, value: _Value, axes: Axes) -> _Value:
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

    def _sliced(self, value: _Value, axes: Axes, name: str) -> _Value:
        made = value
        if (value.name, axes) in self._cut:
            return self._cut[value.name, axes]
        for axis, (old, new) in enumerate(zip(value.axes, axes, strict=True)):
            if new is None or new == old:
                continue
            if old is not None or new == MERGED or value.dims[axis] != self.length:
                raise NoForm(f"{value.origin} has {value.dims[axis]} where there are positions")
            start, end = (self.vector(PAST), self.vector(ALL)) if new == NEW else (self.constant([0]), self.vector(ALL))
            kept = tuple(axes[: axis + 1]) + tuple(made.axes[axis + 1 :])
            cut = self.emit("Slice", [made.name, start, end, self.constant([axis])], f"{name}.{axis}")
            made = replace(made, name=cut, axes=kept)
        self._cut[value.name, axes] = made
        return made

    def joined(self, values: Sequence[_Value], without: frozenset[int] = frozenset()) -> tuple[list[_Value], Axes]:
        """Values that are broadcast to each other, in forms that fit, and what the axes of the result hold; not looking at the axes ``without``, counted from the end."""
        made, rank = list(values), max(len(v.axes) for v in values)
        looked = [axis for axis in range(-rank, 0) if axis not in without]
        while True:
            held = {axis: {v.axes[axis] for v in made if -axis <= len(v.axes)} - {None} for axis in looked}
            twice = [axis for axis in looked if held[axis] == {NEW}][1:]
            mixed = [axis for axis in looked if len(held[axis]) > 1]
            if any(MERGED in held[axis] for axis in mixed):
                raise NoForm("positions of all samples in one axis beside others")
            if not twice and not mixed:
                break
            at = (mixed or twice)[-1]  # of two axes of new positions the later one is that of a mask's columns
            made = [self.whole(v) if -at <= len(v.axes) and v.axes[at] == NEW else v for v in made]
        axes: Axes = tuple(next(iter(held.get(axis, ())), None) for axis in range(-rank, 0))
        return [self._fitted(v, axes, looked) for v in made], axes

    def _fitted(self, value: _Value, axes: Axes, looked: Sequence[int]) -> _Value:
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

    def vector_of(self, value: _Value) -> str:
        """The shape of a value in the new graph."""
        parts: list[str] = []
        for axis, size, slope in zip(value.axes, value.dims, value.slopes, strict=True):
            if axis in (NEW, ALL):
                parts.append(self.vector(str(axis)))
            elif axis == MERGED:
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
        lengths = {**self.inputs, **outputs}
        for value in (*graph.input, *graph.output):
            for dim, axis in zip(value.type.tensor_type.shape.dim, lengths.get(value.name, ()), strict=False):
                if axis is not None:
                    dim.dim_param = axis
        return CachedGraph(made, tuple(spec for _, _, spec in self.caches), outputs)


def _inner(node: onnx.NodeProto) -> Iterator[str]:
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            for each in inner.node:
                yield from each.input
                yield from _inner(each)


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _times(count: int) -> str:
    return "batch" if count == 1 else f"{count}*batch"


def _mark(axes: Axes) -> str:
    return "." + "".join((axis or "-")[0] for axis in axes)


def _aligned(axes: Axes, value: _Value) -> Axes:
    """What of the result's axes concerns a value that was broadcast to it."""
    own = axes[len(axes) - len(value.dims) :]
    return tuple(axis if size != 1 else None for axis, size in zip(own, value.dims, strict=True))


# Rules: the names that an operator reads, and what the axes of its outputs hold

Given = Sequence[_Value | None]
Rule = Callable[[_Writer, onnx.NodeProto, Given], tuple[list[str], Axes]]


def _names(values: Given, node: onnx.NodeProto) -> list[str]:
    return [name if value is None else value.name for value, name in zip(values, node.input, strict=True)]


def _first(values: Given) -> _Value:
    if not values or values[0] is None:
        raise NoForm("a value without a shape")
    return values[0]


def _all_known(node: onnx.NodeProto, values: Given) -> list[_Value]:
    known = [v for v, name in zip(values, node.input, strict=True) if name and v is not None]
    if len(known) < len([name for name in node.input if name]):
        raise NoForm(f"a value without a shape at {node.op_type}")
    return known


def _elementwise(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    made, axes = writer.joined(_all_known(node, values))
    names = iter(made)
    return [next(names).name if name else "" for name in node.input], axes


def _along(writer: _Writer, value: _Value, axis: int) -> _Value:
    """A value for an operator that reads it along an axis: with all positions if these lie there."""
    if value.axes[axis] == MERGED:
        raise NoForm("positions of all samples in one axis")
    return writer.whole(value) if value.axes[axis] == NEW else value


def _softmax(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _along(writer, _first(values), _attribute(node, "axis", -1))
    return [x.name, *node.input[1:]], x.axes


def _normalised(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x, axis = _first(values), _attribute(node, "axis", -1)
    if any(x.axes[axis % len(x.axes) :]) or any(v is not None and not v.plain for v in values[1:]):
        raise NoForm("a norm over positions")
    return _names(values, node), x.axes


def _reduced(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    if len(node.input) > 1 and node.input[1]:
        axes = [int(a) for a in _constant(writer, node, 1).reshape(-1)]
    else:
        axes = _attribute(node, "axes", [_attribute(node, "axis", 0)] if node.op_type.startswith("Arg") else [])
    rank = len(x.axes)
    if not axes and not _attribute(node, "noop_with_empty_axes", 0):
        axes = list(range(rank))
    over = {axis % rank for axis in axes}
    for axis in over:
        x = _along(writer, x, axis)
    kept = bool(_attribute(node, "keepdims", 1))
    held = tuple(None if k in over else a for k, a in enumerate(x.axes) if kept or k not in over)
    return [x.name, *node.input[1:]], held


def _matmul(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    a, b = _all_known(node, values)
    if min(len(a.axes), len(b.axes)) < 2:
        raise NoForm("a product with a vector")
    if a.axes[-1] is not None or b.axes[-2] is not None:  # a sum over positions
        a, b = _along(writer, a, -1), _along(writer, b, -2)
        wanted = ALL if ALL in (a.axes[-1], b.axes[-2]) else None
        a, b = writer.cut(a, (*a.axes[:-1], wanted)), writer.cut(b, (*b.axes[:-2], wanted, b.axes[-1]))
    if b.axes[-1] is not None and a.axes[-2] is not None:  # queries and keys
        b = _along(writer, b, -1)
    (a, b), lead = writer.joined([a, b], frozenset({-1, -2}))
    return [a.name, b.name], (*lead[:-2], a.axes[-2], b.axes[-1])


def _gemm(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    a, b, *rest = _all_known(node, values)
    added = [v for v in rest if not v.plain or (len(v.dims) > 1 and v.dims[0] != 1)]
    if _attribute(node, "transA", 0) or a.axes[-1] is not None or not b.plain or added:
        raise NoForm("a product of matrices over positions")
    return _names(values, node), (a.axes[0], None)


def _transpose(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    order = _attribute(node, "perm", list(reversed(range(len(x.axes)))))
    return [x.name], tuple(x.axes[k] for k in order)


def _unsqueeze(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x, axes = _first(values), _constant(writer, node, 1).reshape(-1)
    rank = len(x.axes) + len(axes)
    new = {int(a) % rank for a in axes}
    held = iter(x.axes)
    return [x.name, node.input[1]], tuple(None if k in new else next(held) for k in range(rank))


def _squeeze(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x, rank = _first(values), len(_first(values).axes)
    if len(node.input) < 2:
        raise NoForm("a squeeze of every axis")
    gone = {int(a) % rank for a in _constant(writer, node, 1).reshape(-1)}
    return [x.name, node.input[1]], tuple(a for k, a in enumerate(x.axes) if k not in gone)


def _along_another(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    """Values put one behind another, or looked up, along an axis that is not that of positions."""
    known = _all_known(node, values)
    rank = len(known[0].axes)
    axis = _attribute(node, "axis", 0) % rank - rank
    if any(v.axes[axis] is not None for v in known):
        raise NoForm(f"{node.op_type} along positions")
    made, axes = writer.joined(known, frozenset({axis}))
    return [v.name for v in made], axes


def _split(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    if x.axes[_attribute(node, "axis", 0)] is not None:
        raise NoForm("positions taken apart")
    return [x.name, *node.input[1:]], x.axes


def _slice(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    starts, ends = (_constant(writer, node, k).reshape(-1) for k in (1, 2))
    given = len(node.input) > 3 and node.input[3]
    axes = _constant(writer, node, 3).reshape(-1) if given else np.arange(len(starts))
    steps = _constant(writer, node, 4).reshape(-1) if len(node.input) > 4 else np.ones(len(starts), int)
    ends = ends.astype(np.int64)
    for k, axis in enumerate(map(int, axes)):
        if x.axes[axis] is not None:
            if starts[k] != 0 or ends[k] < x.dims[axis] or steps[k] != 1:
                raise NoForm("a part of the positions")
            ends[k] = FAR
    return [x.name, node.input[1], writer.constant(ends.tolist()), *node.input[3:]], x.axes


def _gather(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    data, indices = _all_known(node, values)
    axis = _attribute(node, "axis", 0) % len(data.axes)
    if data.axes[axis] is not None:
        raise NoForm("positions looked up")
    return [data.name, indices.name], (*data.axes[:axis], *indices.axes, *data.axes[axis + 1 :])


def _top(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    if x.axes[_attribute(node, "axis", -1)] is not None:
        raise NoForm("the largest of the positions")
    return [x.name, *node.input[1:]], x.axes


def _expand(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
    x = _first(values)
    dims, slopes = writer.dims(node.output[0])
    axes = (None,) * (len(dims) - len(x.axes)) + x.axes
    return [x.name, writer.vector_of(_Value("", "", axes, dims, slopes))], axes


def _reshape(writer: _Writer, node: onnx.NodeProto, values: Given) -> tuple[list[str], Axes]:
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
        elif held == [MERGED] and dims[new[-1]] == writer.length:
            axes[new[-1]] = NEW
        else:
            raise NoForm("positions beside other axes in one")
    return [x.name, writer.vector_of(_Value("", "", tuple(axes), dims, slopes))], tuple(axes)


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


def _constant(writer: _Writer, node: onnx.NodeProto, index: int) -> Array:
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
    **dict.fromkeys(("Concat", "GatherElements"), _along_another),
    "TopK": _top,
    "Expand": _expand,
    "Reshape": _reshape,
}  # fmt: skip
