"""Arrays on disk as a dataset: a ``.npy``, and what a ``.npz`` holds uncompressed (``numpy.savez``), stay there and are mapped."""

from __future__ import annotations

import logging
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from diffusionblocks.converter.data import name_first, read_arrays
from diffusionblocks.converter.dataset import ArrayDataset, Batch
from diffusionblocks.runtime.arrays import NPY, check_unpacked, read_header
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import TensorSpec

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
_LOCAL_HEADER, _LOCAL_BYTES = b"PK\x03\x04", 30


class ModelArrays(ArrayDataset):
    """Arrays by the model's names, each batch in the types the model takes (integers become floats as they are, unscaled)."""

    def __init__(self, inputs: Mapping[str, Array], targets: Array | None, specs: Sequence[TensorSpec]) -> None:
        """
        Raises:
            BadInput: other names or shapes than the model's, floats where it takes integers, or arrays of different lengths.
        """
        check_inputs(inputs, specs)
        if targets is not None and targets.ndim == 1 and targets.dtype.kind in "iub":
            targets = targets.astype(np.int64)
        super().__init__({s.name: inputs[s.name] for s in specs}, targets)
        self.types = {s.name: getattr(torch, s.dtype) for s in specs}

    def batch(self, rows: Sequence[int]) -> Batch:
        found = super().batch(rows)
        return Batch({name: tensor.to(self.types[name]) for name, tensor in found.inputs.items()}, found.targets)


def check_inputs(inputs: Mapping[str, Any], specs: Sequence[TensorSpec]) -> None:
    """Compare arrays or tensors [N, ...] by name with what the model takes.

    Raises:
        BadInput: names, shapes or types that do not fit, all that differ in one message.
    """
    if set(inputs) != {s.name for s in specs}:
        raise BadInput(
            f"The data has the inputs {', '.join(sorted(inputs)) or 'none'}; the model takes {', '.join(s.name for s in specs)}.",
            hint="Name the arrays of the .npz after forward's arguments (x stands for the first), and the labels y.",
        )
    wrong = []
    for spec in specs:
        array = inputs[spec.name]
        shape, kind = tuple(array.shape), str(array.dtype).removeprefix("torch.")
        fits = len(shape) == len(spec.shape) and all(
            isinstance(want, str) or want == have for want, have in zip(spec.shape[1:], shape[1:], strict=True)
        )
        floats = "float" in kind or "complex" in kind
        if not fits or (floats and "float" not in spec.dtype and "complex" not in spec.dtype):
            wrong.append(f"{spec.name} {kind} {list(shape)} for {spec.dtype} {list(spec.shape)}")
    if wrong:
        raise BadInput(
            f"The data does not fit the model: {'; '.join(wrong)}.",
            hint="Resize or convert the data, or convert the model with the --input-shape it has.",
        )


def array_file(path: Path, specs: Sequence[TensorSpec], labelled: bool | None) -> ModelArrays:
    """A ``.npy`` (the first input) or a ``.npz`` (``y`` the targets). A compressed ``.npz`` is loaded whole; of a mapped one
    the checksums are not compared.

    Raises:
        BadInput: what :func:`data.read_arrays` refuses, no ``y`` though ``labelled``, or what does not fit the model.
    """
    arrays = map_arrays(path)
    if all(array.shape[:1] == (0,) for array in arrays.values()):
        raise BadInput(f"{path} is empty: it holds no rows.", hint="Give at least one row.")
    targets = None if any(s.name == "y" for s in specs) else arrays.pop("y", None)
    if labelled and targets is None:
        raise BadInput(
            f"{path} holds {', '.join(arrays)}: training needs inputs and labels.",
            hint="numpy.savez(FILE, x=inputs, y=labels), with one integer label a row, or --targets teacher.",
        )
    return ModelArrays(name_first(arrays, specs[0].name), None if labelled is False else targets, specs)


def map_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a file by name, mapped where the file allows it.

    Raises:
        BadInput: see :func:`data.read_arrays`.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(NPY)) == NPY:
                file.seek(0)
                found = {"x": _mapped(path, file, path.stat().st_size)}
            else:
                found = _members(path, file)
        if found and all(a.dtype.kind in "biufc" and a.ndim for a in found.values()):
            return found
    except Exception as error:  # zipfile and NumPy raise a dozen kinds; what is wrong read_arrays says
        log.debug("%s is not mapped: %s", path, error)
    return read_arrays(path)


def _members(path: Path, file: IO[bytes]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        check_unpacked(archive.infolist(), size)
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or not member.filename.endswith(".npy"):
                raise ValueError(f"{member.filename} is compressed")
            file.seek(member.header_offset)
            head = file.read(_LOCAL_BYTES)
            if head[:4] != _LOCAL_HEADER:
                raise ValueError("no local header")
            file.seek(sum(struct.unpack("<HH", head[26:30])), 1)
            found[member.filename.removesuffix(".npy")] = _mapped(path, file, size)
    return found


def _mapped(path: Path, file: IO[bytes], size: int) -> Array:
    header = read_header(file, size)
    if header.bytes == 0:
        raise ValueError("nothing to map")
    place = file.tell()
    return np.memmap(path, header.dtype, "r", offset=place, shape=header.shape, order="F" if header.fortran else "C")
