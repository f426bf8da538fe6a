"""Files out of the system's cache, and reading them from the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path
from statistics import median

from diffusionblocks.runtime.files import safe_name
from diffusionblocks.runtime.manifest import Manifest

PIECE = 8 << 20


class Cold:
    """Drops a bundle's files from the cache. ``possible``: so far it had the effect; ``notes``: why it had not, or what is not known of it.

    Args:
        folder: the bundle.
        manifest: its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        graphs = [manifest.stem, *(b.context for b in manifest.blocks if b.context is not None), manifest.head]
        names = dict.fromkeys(safe_name(name) for graph in graphs for name in graph.weight_files)
        self.files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()]
        self.weights = [folder / name for name in names]
        self.notes: list[str] = []
        self.possible = hasattr(os, "posix_fadvise")
        self._times: list[float] = []
        if not self.possible:
            self.notes.append("This system cannot drop files from its cache, so there are no cold runs.")

    @property
    def read_seconds(self) -> float | None:
        """The median of the readings so far."""
        return median(self._times) if self._times else None

    def drop(self) -> bool:
        """Drop every file of the bundle; whether that had an effect."""
        for path in self.files:
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)  # what is not yet written stays
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
        known = [cached for path in self.weights if (cached := cached_share(path)) is not None]
        if not known and not self.notes:
            self.notes.append("The system does not say whether the files left its cache: cold runs may be warm.")
        if sum(known) > 0.1 * len(known):
            self.possible = False
            self.notes.append(
                "Dropping the files from the cache had no effect (files in memory, or held by another process), so there are no cold runs."
            )
        return self.possible

    def read(self) -> bool:
        """Drop the files, then read all weights one after another; whether dropping had an effect."""
        if not self.drop():
            return False
        piece = bytearray(PIECE)
        start = time.perf_counter()
        for path in self.weights:
            with path.open("rb", buffering=0) as file:
                while file.readinto(piece):
                    pass
        self._times.append(time.perf_counter() - start)
        return True


def cached_share(path: Path) -> float | None:
    """How much of a file lies in the cache, from 0 to 1; None where the system does not say. By ``mincore``: unlike a read that may not block, it starts no reading."""
    try:
        ask = ctypes.CDLL(None, use_errno=True).mincore
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, AttributeError, TypeError, ValueError):  # no such function, an empty file
        return None
    try:
        pages = -(-len(view) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(view)
        failed = ask(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), found)
        del start
        return None if failed else sum(state & 1 for state in bytes(found)) / pages
    finally:
        view.close()
