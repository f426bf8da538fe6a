"""What training reads: rows by number, as batches of the model's inputs with or without what is to be learned from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from diffusionblocks.runtime.arrays import plain_dtype
from diffusionblocks.runtime.errors import BadInput


@dataclass(frozen=True)
class Batch:
    """``inputs``: the model's inputs by argument name, each [N, ...]; ``targets``: class numbers int64 [N], numbers float32 [N, ...], or None."""

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor | None


class Dataset(Protocol):
    """Rows to train on. Whatever needs memory in proportion to their number stays on disk.

    ``names``: the inputs' names; ``class_names``: by class number, where the data names them; ``fingerprint``: changes with the data and with how it is prepared, and
    with nothing else: a stopped training goes on with the same data alone.
    """

    names: tuple[str, ...]
    class_names: tuple[str, ...] | None
    fingerprint: str

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of these numbers, in this order. The same numbers give the same bits.

        Raises:
            BadInput: a row cannot be read; names it.
        """
        ...


class ArrayDataset:
    """Arrays in memory, or mapped from a file (``numpy.load(mmap_mode="r")``)."""

    class_names: tuple[str, ...] | None = None

    def __init__(self, inputs: Mapping[str, np.ndarray[Any, Any]], targets: np.ndarray[Any, Any] | None) -> None:
        """
        Args:
            inputs: arrays [M, ...] by argument name.
            targets: integers [M], numbers [M, ...], or None.

        Raises:
            BadInput: arrays of different lengths.
        """
        self.inputs, self.targets = dict(inputs), targets
        self.names = tuple(inputs)
        lengths = {
            name: len(array) for name, array in (*inputs.items(), *([] if targets is None else [("y", targets)]))
        }
        if len(set(lengths.values())) > 1:
            rows = ", ".join(f"{n} rows of {name}" for name, n in lengths.items())
            raise BadInput(f"The data has {rows}.", hint="They must be as many.")
        self._rows = next(iter(lengths.values()))
        self.fingerprint = _fingerprint(inputs, targets)

    def __len__(self) -> int:
        return self._rows

    def batch(self, rows: Sequence[int]) -> Batch:
        chosen = np.asarray(rows)
        targets = None if self.targets is None else as_tensor(self.targets[chosen])
        return Batch({name: as_tensor(array[chosen]) for name, array in self.inputs.items()}, targets)


class Subset:
    """Some rows of a dataset, such as those that are not held out."""

    def __init__(self, data: Dataset, rows: np.ndarray[Any, Any]) -> None:
        self.data, self.rows = data, rows
        self.names, self.class_names = data.names, data.class_names
        digest = hashlib.sha256(np.ascontiguousarray(rows, np.int64).tobytes()).hexdigest()
        self.fingerprint = hashlib.sha256(f"{data.fingerprint}/{digest}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        return self.data.batch(self.rows[np.asarray(rows)])


class Wrapped:
    """A dataset made of another with the same rows; ``what`` tells its fingerprint from the other's."""

    def __init__(self, data: Dataset, what: str) -> None:
        self.data, self.names = data, data.names
        self.class_names = data.class_names
        self.fingerprint = f"{data.fingerprint}/{what}"
        self.by_content = getattr(data, "by_content", False)

    def __len__(self) -> int:
        return len(self.data)

    def row_name(self, row: int) -> str:
        """What a person calls a row."""
        name = getattr(self.data, "row_name", None)
        return str(name(row)) if callable(name) else f"row {row}"

    def batch(self, rows: Sequence[int]) -> Batch:
        """The other's rows."""
        return self.data.batch(rows)


def as_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array as a tensor of its own: float64 as float32, other integers of labels as they are."""
    dtype = plain_dtype(array.dtype)
    return torch.from_numpy(np.array(array, np.float32 if dtype == np.float64 else dtype, order="C"))


def _fingerprint(inputs: Mapping[str, np.ndarray[Any, Any]], targets: np.ndarray[Any, Any] | None) -> str:
    """Of names, types, shapes, and the bytes of up to 4,096 rows spread over each array."""
    digest = hashlib.sha256()
    named = [*sorted(inputs.items()), *([] if targets is None else [("y", targets)])]
    for name, array in named:
        digest.update(f"{name}/{array.dtype}/{array.shape}".encode())
        rows = np.unique(np.linspace(0, max(len(array) - 1, 0), 4096).astype(np.int64))[: len(array)]
        digest.update(np.ascontiguousarray(array[rows]).tobytes())
    return digest.hexdigest()
