"""Arrays of ``.npy`` and ``.npz`` files: what their headers claim is compared with the file's size before anything is allocated, and pickled objects are refused."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

NPY, NPZ = b"\x93NUMPY", b"PK"
ALWAYS, RATIO = 256 << 20, 100
"""An archive may unpack to so many bytes, or to so many times its own size: a few kB of zeros that unpack to many GB are refused."""


class Unreadable(ValueError):
    """An array file that is damaged, cut off, or claims more than it holds; the text says what."""


@dataclass(frozen=True)
class Header:
    """What a ``.npy`` says of its array; ``bytes`` of its numbers."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file by name; that of a ``.npy`` is named ``x``.

    Raises:
        Unreadable: it is neither, damaged, cut off, holds Python objects, or unpacks to more than :data:`ALWAYS` bytes and :data:`RATIO` times its own size.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(len(NPY))
            file.seek(0)
            return {"x": _array(file, size)} if head == NPY else _archive(file, size)
    except Unreadable:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds on damaged files
        raise Unreadable(" ".join(f"{error or type(error).__name__}".split())[:300]) from error


def read_header(file: IO[bytes], size: int) -> Header:
    """The header at a file's place, which is then at the array's first byte; ``size``: where the file ends.

    Raises:
        Unreadable: Python objects, a negative size, or more bytes than are left.
        ValueError: no such header, as NumPy says.
    """
    version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    header = Header(*read(file))  # type: ignore[arg-type]
    if header.dtype.hasobject:
        raise Unreadable("it holds Python objects")
    left = size - file.tell()
    if min(header.shape, default=0) < 0 or header.bytes > left:
        raise Unreadable(f"its header says {header.shape} of {header.dtype}, {header.bytes} bytes; {left} are there")
    return header


def check_unpacked(members: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Compare what an archive of ``size`` bytes claims to unpack to with what is allowed.

    Raises:
        Unreadable: more than that, or two members of one name.
    """
    total = sum(member.file_size for member in members)
    if total > max(ALWAYS, RATIO * size):
        raise Unreadable(f"its {size} bytes would unpack to {total}, which is refused")
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise Unreadable("it has two members of one name")


def _archive(file: IO[bytes], size: int) -> dict[str, NDArray[Any]]:
    found = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        check_unpacked(members, size)
        for member in members:
            if not member.filename.endswith(".npy"):
                raise Unreadable(f"its member {member.filename!r} is no array")
            with archive.open(member) as data:
                found[member.filename.removesuffix(".npy")] = _array(data, member.file_size)
    return found


def _array(file: IO[bytes], size: int) -> NDArray[Any]:
    read_header(file, size)
    file.seek(0)
    found = np.asarray(np.lib.format.read_array(file, allow_pickle=False))  # type: ignore[arg-type]
    return found.astype(plain_dtype(found.dtype), copy=False)


def plain_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that other libraries take for it: this machine's order of bytes, and no number longer than a double (two, if complex)."""
    longer = {"f": np.float64, "c": np.complex128}.get(dtype.kind)
    return np.dtype(longer) if longer and dtype.itemsize > np.dtype(longer).itemsize else dtype.newbyteorder("=")
