"""Weights of graphs in page-aligned files beside them, as ONNX external data, each tensor once.

A weight that several graphs read (the original block and the DiffusionBlock on it, a block that is applied again) is stored in the first file that
needs it and referred to by the others, where they store it in the same layout (an embedding that is also the classifier is stored transposed
there, and so twice).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

PAGE = 4096
SMALLEST = 1024
"""Initializers below this size (shapes, scalars) stay inside the graph."""

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

    def store(self, graphs: Sequence[tuple[onnx.ModelProto, Mapping[str, torch.Tensor]]], name: str) -> None:
        """Give graphs their weights: small ones inside, the others in the file ``name`` (made where it is needed) or where they lie already.

        Each tensor starts at a multiple of 4096 bytes.
        """
        path, end = self.folder / name, 0
        with path.open("wb") as file:
            for g, (model, weights) in enumerate(graphs):
                own: dict[str, Weight] = {t.name: _array_of(t) for t in model.graph.initializer if _size(t) >= SMALLEST}
                for tensor in [t for t in model.graph.initializer if t.name in own]:
                    model.graph.initializer.remove(tensor)
                for key, weight in (own | dict(weights)).items():
                    if weight.nbytes < SMALLEST:
                        add_initializer(model, key, weight)
                        continue
                    known = identity(weight) if isinstance(weight, torch.Tensor) else (name, g, key)
                    if known not in self._places:
                        start = -(-end // PAGE) * PAGE
                        file.write(b"\0" * (start - end))
                        file.write(_data(weight).data)
                        end = start + weight.nbytes
                        self._places[known] = name, start
                    _refer(_added(model, key, weight), *self._places[known], weight.nbytes)
        if end == 0:
            path.unlink()


def add_initializer(model: onnx.ModelProto, name: str, weight: Weight) -> None:
    """Put a weight into a graph."""
    _added(model, name, weight).raw_data = _data(weight).tobytes()


def _added(model: onnx.ModelProto, name: str, weight: Weight) -> onnx.TensorProto:
    initializer = model.graph.initializer.add()
    initializer.name, initializer.data_type = name, _kind(weight)
    initializer.dims.extend(weight.shape)
    return initializer


def _kind(weight: Weight) -> int:
    if isinstance(weight, torch.Tensor):
        return BFLOAT16 if weight.dtype == torch.bfloat16 else _kind(weight.detach().cpu().numpy())
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


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
