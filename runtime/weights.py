"""Weights of one graph as arrays: mapped from the bundle's files, or read into memory.

A mapped file is not copied: its pages are the system's own cache of the file, and leave the process's memory when the arrays do. A file that is cut off while it is mapped ends the process
with SIGBUS at the first page that is gone (the check of its size comes before each mapping, not during it). Weights that are read are slower, and safe from that.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.runtime.errors import FileError
from diffusionblocks.runtime.files import FileRecord, checked_path
from diffusionblocks.runtime.manifest import GraphRecord, TensorRecord
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class Buffers:
    """Memory that weights are read into, taken once and used again."""

    def __init__(self) -> None:
        self._free: list[Bytes] = []
        self._lock = threading.Lock()

    def take(self, count: int) -> Bytes:
        """At least ``count`` bytes at the start of a page."""
        with self._lock:
            for place, buffer in enumerate(self._free):
                if len(buffer) >= count:
                    return self._free.pop(place)
        return np.frombuffer(mmap.mmap(-1, max(count, 1)), np.uint8)

    def give(self, buffer: Bytes) -> None:
        """A buffer that is no longer read from."""
        self._free.append(buffer)


class Held:
    """A structure's weights by input name (``arrays``), until :meth:`release`; bfloat16 as uint16.

    Args:
        buffers: what files are read into; None to map them.

    Raises:
        FileError: a file is missing, truncated or altered.
    """

    def __init__(
        self, folder: Path, record: GraphRecord, files: Mapping[str, FileRecord], buffers: Buffers | None
    ) -> None:
        self._buffers, self._taken = buffers, list[Bytes]()
        paths = {name: checked_path(folder, name, files) for name in record.weight_files}
        spans = _spans(record)
        data = {name: self._data(paths[name], *span) for name, span in spans.items()}
        self.arrays = {t.input: _tensor(t, data, spans) for t in record.tensors}

    def release(self) -> None:
        """Let go of the arrays, which nobody may read any more."""
        self.arrays = {}
        while self._taken and self._buffers is not None:
            self._buffers.give(self._taken.pop())

    def _data(self, path: Path, start: int, stop: int) -> Bytes:
        try:
            if self._buffers is None:
                return _mapped(path, start, stop)
            self._taken.append(self._buffers.take(stop - start))
            into, done = self._taken[-1].data[: stop - start], 0
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                while done < stop - start and (got := file.readinto(into[done:])):
                    done += got
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        if done < stop - start:
            raise _unreadable(path, f"it ends {stop - start - done} bytes early")
        return self._taken[-1]


@lru_cache(1024)
def _spans(record: GraphRecord) -> dict[str, tuple[int, int]]:
    """First and last byte (exclusive) that a graph reads of each file, the first at a boundary where a mapping may start."""
    found: dict[str, tuple[int, int]] = {}
    for tensor in record.tensors:
        if tensor.file is not None:
            start, stop = found.get(tensor.file, (tensor.offset, 0))
            found[tensor.file] = min(start, tensor.offset), max(stop, tensor.offset + tensor.bytes)
    step = mmap.ALLOCATIONGRANULARITY
    return {name: (start // step * step, stop) for name, (start, stop) in found.items()}


def _tensor(tensor: TensorRecord, data: Mapping[str, Bytes], spans: Mapping[str, tuple[int, int]]) -> NDArray[Any]:
    kind = np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
    if tensor.file is None:
        return np.empty(tensor.shape, kind)
    start = tensor.offset - spans[tensor.file][0]
    return data[tensor.file][start : start + tensor.bytes].view(kind).reshape(tensor.shape)


def _mapped(path: Path, start: int, stop: int) -> Bytes:
    """Bytes of a file, read only; in huge pages where the system has them."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), stop - start, access=mmap.ACCESS_READ, offset=start)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


def _unreadable(path: Path, why: object) -> FileError:
    return FileError(
        f"{path.name} in {path.parent} cannot be read: {why}", hint="Copy the bundle again from where it was made."
    )
