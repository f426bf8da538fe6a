"""Weights of graphs in page-aligned files beside them, as ONNX external data, each tensor once.

A weight that several graphs read (the original block and the DiffusionBlock on it, a block that is applied again, an embedding that is also the classifier) is
stored in the first file that needs it and referred to by the others, where they read it in the same layout.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from diffusionblocks.export.half import halved
from diffusionblocks.runtime.manifest import TensorRecord
from numpy.typing import NDArray

if TYPE_CHECKING:
    from diffusionblocks.export.graph import Apart, Template

PAGE, LINE = 4096, 64
SMALLEST = 1024
"""Constants of a structure below this size (shapes, scalars), and whole numbers among the weights, are also inside the graph."""
PIECE = 2 << 20
"""Files are written in pieces of this size, one huge page each: a system that keeps them so in its page cache maps a block in a fraction of the time."""

Place = tuple[str, int]
Weight = torch.Tensor | NDArray[Any]
BFLOAT16 = int(onnx.TensorProto.BFLOAT16)


def identity(tensor: torch.Tensor) -> Hashable:
    """Equal for two tensors that are one: the same elements of the same memory, in the same layout."""
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *place, tuple(tensor.shape), tensor.stride(), tensor.dtype


class WeightFiles:
    """Writes weights into files of one folder. The tensors must live as long as it does: it knows them by their memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[Hashable, Place] = {}

    def store(self, graphs: Sequence[Apart], name: str) -> list[tuple[TensorRecord, ...]]:
        """Give graphs their weights, in the file ``name`` (made where it is needed) or where they lie already.

        A tensor of a page or more starts at a multiple of 4096 bytes, a smaller one at a multiple of 64.

        Returns:
            For each graph, where the weights of its structure lie.
        """
        path = self.folder / name
        with path.open("wb", buffering=0) as file:
            writer = _Writer(file, name)
            records = [self._store(graph, writer) for graph in graphs]
        if writer.end == 0:
            path.unlink()
        return records

    def place(self, template: Template, constant: str) -> Place:
        """Where a large constant of a structure lies, once a graph of that structure was stored."""
        return self._places[template, constant]

    def _store(self, graph: Apart, writer: _Writer) -> tuple[TensorRecord, ...]:
        model = graph.model
        constants = {t.name: _array_of(t) for t in large_constants(model)}
        for tensor in [t for t in model.graph.initializer if t.name in constants]:
            model.graph.initializer.remove(tensor)
        for key, constant in constants.items():
            place = self._placed((graph.template, key), constant, writer)
            refer(_added(model, key, constant), *place, constant.nbytes)
        records = []
        for own, key in graph.names.items():
            half = graph.halves(graph.weights[key])
            known = identity(graph.weights[key]), half
            weight = halved(graph.weights[key]) if half else graph.weights[key]
            empty = weight.nbytes == 0
            file, offset = (None, 0) if empty else self._placed(known, weight, writer)
            if file is None or (weight.nbytes < SMALLEST and not weight.dtype.is_floating_point):
                add_initializer(model, key, weight)
            else:
                refer(_added(model, key, weight), file, offset, weight.nbytes)
            kind = str(weight.dtype).removeprefix("torch.")
            records.append(TensorRecord(own, file, offset, kind, tuple(weight.shape)))
        return tuple(records)

    def _placed(self, known: Hashable, weight: Weight, writer: _Writer) -> Place:
        if known not in self._places:
            self._places[known] = writer.name, writer.write(weight)
        return self._places[known]


class _Writer:
    """Appends tensors to a file, in pieces that end where huge pages do."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file, self.name, self.end = file, name, 0

    def write(self, weight: Weight) -> int:
        """Returns the offset."""
        step = PAGE if weight.nbytes >= PAGE else LINE
        start = -(-self.end // step) * step
        for data in (memoryview(b"\0" * (start - self.end)), _data(weight).data.cast("B")):
            while len(data):
                done = self.file.write(data[: PIECE - self.end % PIECE])
                self.end += done
                data = data[done:]
        return start


def large_constants(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The initializers of a graph that are stored beside it."""
    return [t for t in model.graph.initializer if _size(t) >= SMALLEST]


def add_initializer(model: onnx.ModelProto, name: str, weight: Weight) -> None:
    """Put a weight into a graph."""
    _added(model, name, weight).raw_data = _data(weight).tobytes()


def _added(model: onnx.ModelProto, name: str, weight: Weight) -> onnx.TensorProto:
    initializer = model.graph.initializer.add()
    initializer.name, initializer.data_type = name, kind_of(weight)
    initializer.dims.extend(weight.shape)
    return initializer


def kind_of(weight: Weight) -> int:
    """ONNX's number of a weight's type."""
    if isinstance(weight, torch.Tensor):
        return BFLOAT16 if weight.dtype == torch.bfloat16 else kind_of(weight.detach().cpu().numpy())
    return int(onnx.helper.np_dtype_to_tensor_dtype(weight.dtype))


def _data(weight: Weight) -> NDArray[Any]:
    if not isinstance(weight, torch.Tensor):
        return np.ascontiguousarray(weight)
    plain = weight.detach().cpu().contiguous()
    return plain.view(torch.int16).numpy() if weight.dtype == torch.bfloat16 else plain.numpy()


def _size(tensor: onnx.TensorProto) -> int:
    return len(tensor.raw_data) if tensor.HasField("raw_data") else tensor.ByteSize()


def _array_of(tensor: onnx.TensorProto) -> NDArray[Any]:
    return np.asarray(onnx.numpy_helper.to_array(tensor))


def refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Let a tensor be read from a file beside the graph."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
