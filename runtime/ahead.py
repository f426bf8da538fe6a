"""The next block's weights while one computes: read into the system's cache of files (not into the process's memory), or copied to the device.

What lies in that cache already is not read again, so this costs something only where blocks come from the disk. A file that the process uses for the first time is hashed, which reads it as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffusionblocks.runtime.files import FileRecord, checked_path, was_checked
from diffusionblocks.runtime.manifest import GraphRecord

PLACES = 8
PIECE = 512 << 10
"""Bytes that the system is asked to read at once: of more than its window for reading ahead Linux reads the beginning alone."""


class Ahead:
    """One thread that makes graphs ready ahead of their use, by ``prepare``; it lives until :meth:`close`."""

    def __init__(self, prepare: Callable[[GraphRecord], Any]) -> None:
        self._prepare = prepare
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: dict[str, Future[Any]] = {}

    def start(self, record: GraphRecord) -> None:
        """Begin with a graph."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "diffusionblocks-ahead")
        if record.file not in self._under_way:
            self._under_way[record.file] = self._pool.submit(self._prepare, record)

    def wait(self, record: GraphRecord) -> Any:
        """What ``prepare`` returned for a graph, once it is done; None where it was not begun.

        Raises:
            BundleError: a file is missing, truncated or altered.
        """
        begun = self._under_way.pop(record.file, None)
        return None if begun is None else begun.result()

    def drop(self) -> None:
        """Forget what was begun and is not needed; nothing is under way afterwards."""
        for begun in self._under_way.values():
            if not begun.cancel() and begun.exception() is None and begun.result() is not None:
                begun.result().release()
        self._under_way.clear()

    def close(self) -> None:
        """End the thread."""
        self.drop()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def lies_in_cache(path: Path) -> bool:
    """Whether a file was hashed and the system still has it in memory, asked of a few places (where a system can be asked: Linux)."""
    if not was_checked(path) or not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        size, byte = os.fstat(file).st_size, bytearray(1)
        return all(os.preadv(file, [byte], size * i // PLACES, os.RWF_NOWAIT) == 1 for i in range(PLACES))
    except OSError:  # not there, or a file system that cannot tell
        return False
    finally:
        os.close(file)


def read_ahead(folder: Path, record: GraphRecord, files: Mapping[str, FileRecord]) -> None:
    """Have the system read a graph's weights, and hash those that were not.

    Raises:
        BundleError: a file is missing, truncated or altered.
    """
    for name in record.weight_files:
        path = folder / name
        if not was_checked(path):
            checked_path(folder, name, files)
        else:
            ask_for(path)


def ask_for(path: Path) -> None:
    """Have the system read all of a file, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        file = os.open(path, os.O_RDONLY)
        try:
            for start in range(0, os.fstat(file).st_size, PIECE):
                os.posix_fadvise(file, start, PIECE, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)
