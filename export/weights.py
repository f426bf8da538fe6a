"""Weights of several graphs in one page-aligned file, each distinct tensor once, as ONNX external data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import onnx

PAGE = 4096
SMALLEST = 1024
"""Initializers below this size (shapes, scalars) stay inside the graph."""


def store(models: Sequence[onnx.ModelProto], path: Path) -> int:
    """Move the models' initializers into the file ``path`` (same folder as the graphs will be); returns its size, 0 for no file.

    A tensor is stored once, however many graphs (or names) hold the same bytes; each starts at a multiple of 4096.
    """
    offsets: dict[str, int] = {}
    end = 0
    with path.open("wb") as file:
        for model in models:
            for tensor in model.graph.initializer:
                raw = _raw(tensor)
                if len(raw) < SMALLEST:
                    continue
                digest = hashlib.sha256(raw).hexdigest()
                if digest not in offsets:
                    start = -(-end // PAGE) * PAGE
                    file.write(b"\0" * (start - end))
                    file.write(raw)
                    offsets[digest], end = start, start + len(raw)
                tensor.ClearField("raw_data")
                del tensor.external_data[:]
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, value in (
                    ("location", path.name),
                    ("offset", str(offsets[digest])),
                    ("length", str(len(raw))),
                ):
                    entry = tensor.external_data.add()
                    entry.key, entry.value = key, value
    if end == 0:
        path.unlink()
    return end


def _raw(tensor: onnx.TensorProto) -> bytes:
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    if tensor.data_type == onnx.TensorProto.STRING:
        return b""
    packed = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name)
    tensor.CopyFrom(packed)
    return bytes(tensor.raw_data)
