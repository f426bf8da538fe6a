"""``structure_K.onnx``: what equal blocks compute, with their weights as inputs, once for all of them.

The runtime opens such a graph once and feeds it one block's weights after another, since to open a session costs many times what it costs to map a block's
bytes. Two pieces have one structure where their graphs without weights are the same bytes and their weights have the same types and shapes.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import onnx
from diffusionblocks.export.graph import Apart
from diffusionblocks.export.weights import WeightFiles, kind_of, large_constants, refer


class Structures:
    """Writes the structures of one folder."""

    def __init__(self, folder: Path, files: WeightFiles) -> None:
        self.folder, self.files = folder, files
        self._names: dict[Hashable, str] = {}

    def file_of(self, graph: Apart) -> str:
        """The structure's file, written where it is new; the graph's weights must have been stored."""
        layout = tuple((name, _kind(graph, key), tuple(graph.weights[key].shape)) for name, key in graph.names.items())
        known = graph.template.model.SerializeToString(deterministic=True), layout
        if known not in self._names:
            self._names[known] = f"structure_{len(self._names):02d}.onnx"
            onnx.save(self._with_inputs(graph, layout), self.folder / self._names[known])
        return self._names[known]

    def _with_inputs(self, graph: Apart, layout: tuple[tuple[str, int, tuple[int, ...]], ...]) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(graph.template.model)
        model.graph.input.extend(onnx.helper.make_tensor_value_info(*weight) for weight in layout)
        for tensor in large_constants(model):
            place, length = self.files.place(graph.template, tensor.name), len(tensor.raw_data)
            tensor.ClearField("raw_data")
            refer(tensor, *place, length)
        return model


def _kind(graph: Apart, key: str) -> int:
    weight = graph.weights[key]
    return int(onnx.TensorProto.FLOAT16) if graph.halves(weight) else kind_of(weight)
