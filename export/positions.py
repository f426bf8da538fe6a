"""What the axes of a graph's values hold, and how long they are: what the form of a graph for new positions is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from diffusionblocks.export.intermediate import length_of

NEW, ALL, MERGED, ROWS, MORE = "new", "all", "merged", "rows", "more"
"""What an axis holds: the new positions; those and all before them; for each sample (or head) in turn its new positions; rows of those, several for each or in an order of their own; all positions and behind
them columns that are none, such as those of attention sinks."""
Axes = tuple[str | None, ...]
Shape = tuple[int, tuple[int | str, ...]]
"""ONNX's number of a value's type, and its dimensions as the exporter writes them."""
BATCHES = (10007, 10009)
"""Two lengths of the batch, primes that divide nothing else, by which dimensions that depend on it are told."""


class NoForm(Exception):
    """The graph cannot be written for new positions only; says why."""


@dataclass(frozen=True)
class Value:
    """A value under its name in the new graph; ``origin``: in the old one, whose lengths are ``dims``, of which ``slopes`` depend on the batch; ``loose``: of rows, its lengths not known."""

    name: str
    origin: str
    axes: Axes
    dims: tuple[int, ...]
    slopes: tuple[int, ...]
    loose: bool = False

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


class Dims:
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


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
