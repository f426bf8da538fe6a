"""Files of a bundle: names that stay inside its folder, and hashes checked before a file is used."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from diffusionblocks.runtime.errors import BundleError, FileError

Key = tuple[int, int, int, int]
_checked: dict[Key, str] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class FileRecord:
    """SHA-256 (hex) and size of one file of a bundle."""

    sha256: str
    bytes: int


@lru_cache(4096)
def safe_name(name: str) -> str:
    """The name itself, if it is a plain relative path below the bundle.

    Raises:
        BundleError: absolute paths, ``..``, back-slashes, drive letters, empty parts.
    """
    path = PurePosixPath(name)
    plain = name and not path.is_absolute() and str(path) == name and ".." not in path.parts
    if (
        not plain or "\\" in name or ":" in name or not name.isprintable()
    ):  # also lone surrogates, which no file can be named by
        raise BundleError(f"The manifest names the file {name!r}, which is not a plain path inside the bundle.")
    return name


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def checked_path(folder: Path, name: str, files: Mapping[str, FileRecord], *, again: bool = False) -> Path:
    """Path of a bundle's file after its size and hash were compared with the manifest.

    The hash is computed at a file's first use in a process; afterwards size, modification time and inode are compared, unless ``again``.

    Raises:
        BundleError: the file is not recorded, missing, a link, no plain file, of another size, or altered.
    """
    if safe_name(name) not in files:
        raise BundleError(f"The manifest records no hash for {name}.", hint="Export the bundle again.")
    record, path = files[name], folder / name
    mend = "Copy the bundle again from where it was made, or export it again."
    status = _plain(folder, name)
    if status is None:
        raise FileError(f"{name} is missing from {folder}.", hint=mend)
    if status.st_size != record.bytes:
        raise FileError(f"{name} has {status.st_size} bytes; the manifest says {record.bytes}.", hint=mend)
    key = _key(status)
    with _lock:
        found = None if again else _checked.get(key)
    if found is None:
        try:
            found = sha256_of(path)
        except OSError as error:
            raise FileError(f"{name} in {folder} cannot be read: {error}", hint=mend) from error
        with _lock:
            _checked[key] = found
    if found != record.sha256:
        raise FileError(
            f"{name} was altered: its SHA-256 is {found[:12]}..., the manifest says {record.sha256[:12]}....", hint=mend
        )
    return path


def was_checked(path: Path) -> bool:
    """Whether a file's hash was computed in this process, and the file has not changed since."""
    try:
        key = key_of(path)
    except OSError:
        return False
    with _lock:
        return key in _checked


def _plain(folder: Path, name: str) -> os.stat_result | None:
    """A file's status, where it is a plain file below the folder.

    Raises:
        BundleError: it is a link, or lies behind one.
    """
    path, status = str(folder), None
    for part in name.split("/"):
        path = os.path.join(path, part)
        try:
            status = os.lstat(path)
        except OSError:
            return None
        if stat.S_ISLNK(status.st_mode):
            raise BundleError(f"{name} in {folder} is a link.", hint="Replace it by the file itself.")
    return status if status is not None and stat.S_ISREG(status.st_mode) else None


def key_of(path: Path) -> Key:
    """What changes when a file does: device, inode, size and modification time."""
    return _key(os.stat(path))


def _key(status: os.stat_result) -> Key:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
