"""Rows of an Arrow table on disk (a dataset of Hugging Face ``datasets``) as batches: each of the model's inputs is read from a column when a batch asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusionblocks.converter.bad_rows import BadRow
from diffusionblocks.converter.dataset import Batch
from diffusionblocks.converter.images import image_array
from diffusionblocks.converter.preprocessing import Preprocessing
from diffusionblocks.converter.saved import import_package, one_line
from diffusionblocks.converter.texts import Tokens
from diffusionblocks.converter.unreadable import Unreadable
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.installing import install
from diffusionblocks.runtime.manifest import TensorSpec

Array = np.ndarray[Any, Any]


def need_data_package(name: str) -> Any:
    """``datasets`` or ``PIL``, which the extra ``data`` installs.

    Raises:
        BadInput: it is not installed.
    """
    try:
        return import_package(name)
    except BadInput as error:
        raise BadInput(error.message, hint=f"Install it: {install('data')}") from error


class Reader(Protocol):
    """Makes inputs (``names``, each [N, ...]) of the values of one column, an Arrow array of N rows. Raises Unreadable with the row's position."""

    column: str
    names: tuple[str, ...]

    def read(self, values: Any) -> dict[str, Array]: ...


class ImageReader:
    """Images, as ``datasets`` stores them ({bytes, path}), as bytes, or as paths below ``root``."""

    def __init__(self, column: str, name: str, preparing: Preprocessing, *, root: Path, channels_last: bool) -> None:
        """
        Args:
            preparing: sized for the input ``name``.
            channels_last: the input is [N, H, W, C], not [N, C, H, W].
        """
        self.column, self.root = column, root
        self.names: tuple[str, ...] = (name,)
        self.preparing, self.channels_last = preparing, channels_last
        self.workers = os.cpu_count() or 1

    def read(self, values: Any) -> dict[str, Array]:
        listed = values.to_pylist()
        if len(listed) == 1 or self.workers == 1:
            made = [self._image(i, v) for i, v in enumerate(listed)]
        else:
            with ThreadPoolExecutor(min(self.workers, len(listed))) as pool:
                made = list(pool.map(self._image, range(len(listed)), listed))
        images = np.stack(made)
        return {self.names[0]: images.transpose(0, 2, 3, 1) if self.channels_last else images}

    def _image(self, position: int, value: Any) -> Array:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise Unreadable("no image", position)
        try:
            return image_array(value if isinstance(value, bytes) else self.root / value, self.preparing)
        except Unreadable as error:
            raise Unreadable(error.reason, position) from error


class TextReader:
    """Texts of a column of strings; with ``files``, of the text files whose paths it holds."""

    def __init__(self, column: str, tokens: Tokens, *, files: bool = False) -> None:
        self.column, self.names, self.tokens, self.files = column, tokens.names, tokens, files

    def read(self, values: Any) -> dict[str, Array]:
        texts = values.to_pylist()
        return self.tokens.read([_text(i, p) for i, p in enumerate(texts)] if self.files else texts)


def _text(position: int, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable("not UTF-8", position) from error
    except OSError as error:
        raise Unreadable(error.strerror or "unreadable", position) from error


class NumberReader:
    """Numbers, or (nested) lists of them, each row with as many as ``shape`` says."""

    def __init__(self, column: str, name: str, shape: Sequence[int]) -> None:
        self.column, self.shape = column, tuple(shape)
        self.names: tuple[str, ...] = (name,)

    def read(self, values: Any) -> dict[str, Array]:
        rows, flat = len(values), values
        while _is_list(flat.type):
            flat = flat.storage if hasattr(flat, "storage") else flat
            flat = flat.flatten() if _is_list(flat.type) else flat
        size = int(np.prod(self.shape))
        if len(flat) != rows * size or flat.null_count or values.null_count:
            self._refuse(values)
        try:
            numbers = flat.to_numpy(zero_copy_only=False)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise Unreadable(f"{self.column}: {one_line(error, 80)}") from error
        if numbers.dtype.kind not in "biuf":
            raise Unreadable(f"{self.column} holds {flat.type}, not numbers")
        return {self.names[0]: numbers.reshape(rows, *self.shape)}

    def _refuse(self, values: Any) -> None:
        """Name the first row that has other numbers than it must."""
        for i, value in enumerate(values.to_pylist()):
            flat = list(_flat(value))
            if any(v is None for v in flat):
                raise Unreadable(f"{self.column} is missing", i)
            if len(flat) != int(np.prod(self.shape)):
                raise Unreadable(f"{self.column} has {len(flat)} values, not {list(self.shape)}", i)


def _flat(value: Any) -> Iterable[Any]:
    if not isinstance(value, list):
        return [value]
    return [v for item in value for v in _flat(item)]


def _is_list(kind: Any) -> bool:
    """Whether an Arrow type is a list of any kind, or an extension (``datasets.Array2D``) stored as one."""
    types = need_data_package("pyarrow.types")
    kind = getattr(kind, "storage_type", kind)
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


class ClassReader:
    """Class numbers, where ``numbers`` is None as they are, else by what the column holds."""

    names: tuple[str, ...] = ("y",)

    def __init__(self, column: str, numbers: Mapping[Any, int] | None) -> None:
        self.column, self.numbers = column, numbers

    def read(self, values: Any) -> dict[str, Array]:
        listed = values.to_pylist()
        if self.numbers is not None:
            listed = [self.numbers.get(v) for v in listed]
        if None in listed:
            raise Unreadable("no label", listed.index(None))
        return {"y": np.asarray(listed, np.int64)}


class TableDataset:
    """Rows of a table, in an order of its own. Nothing of it is in memory but the order, and the labels where they are given as numbers."""

    by_content = True

    def __init__(
        self,
        table: Any,
        readers: Sequence[Reader],
        target: Reader | Array | None,
        inputs: Sequence[TensorSpec],
        *,
        fingerprint: str,
        class_names: tuple[str, ...] | None = None,
        order: Array | None = None,
        unit: str = "rows",
        name: Callable[[int], str] | None = None,
    ) -> None:
        """
        Args:
            table: a ``datasets.Dataset``, memory-mapped.
            readers: for all inputs together.
            target: reads y from a column, or class numbers int64 [M] in the order of this dataset, or nothing.
            inputs: the model's, with the types they are to have.
            order: the table's row of each row; None for all as they are.
            unit: what the rows are called, in the plural.
            name: what a person calls the row of this number.
        """
        self.table, self.readers, self.target = table.with_format("arrow"), tuple(readers), target
        self.names = tuple(s.name for s in inputs)
        self.types = {s.name: getattr(torch, s.dtype) for s in inputs}
        self.class_names, self.fingerprint, self.order, self.unit = class_names, fingerprint, order, unit
        self._name = name

    def __len__(self) -> int:
        return len(self.table) if self.order is None else len(self.order)

    def row_name(self, row: int) -> str:
        return f"row {row}" if self._name is None else self._name(row)

    def batch(self, rows: Sequence[int]) -> Batch:
        columns = self._columns(rows, [r.column for r in self.readers])
        inputs = {n: a for reader in self.readers for n, a in self._read(reader, columns, rows).items()}
        targets = self.labels(np.asarray(rows))
        return Batch(
            {name: torch.from_numpy(np.array(inputs[name])).to(self.types[name]) for name in self.names},
            None if targets is None else torch.from_numpy(np.array(targets)),
        )

    def labels(self, rows: Array) -> Array | None:
        """The targets of these rows, whose inputs are not read: class numbers int64 [N], or numbers float32 [N, ...].

        Raises:
            BadRow: a row without a target.
        """
        if self.target is None or isinstance(self.target, np.ndarray):
            return None if self.target is None else self.target[rows]
        columns = self._columns(rows, [self.target.column])
        found = self._read(self.target, columns, rows)["y"]
        return found if found.dtype == np.int64 else found.astype(np.float32)

    def _columns(self, rows: Sequence[int] | Array, names: Sequence[str]) -> Any:
        chosen = np.asarray(rows, np.int64)
        places = chosen if self.order is None else self.order[chosen]
        return self.table.select_columns(list(dict.fromkeys(names)))[places.tolist()]

    def _read(self, reader: Reader, columns: Any, rows: Sequence[int] | Array) -> dict[str, Array]:
        values = columns.column(reader.column).combine_chunks()
        try:
            return reader.read(values)
        except Unreadable as error:
            raise BadRow(self.row_name(int(rows[error.position])), error.reason) from error
