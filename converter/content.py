"""What lies in a data folder, of what kind a file is, and a fingerprint of content that does not depend on where it lies or when it was written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusionblocks.runtime.arrays import NPY, NPZ
from diffusionblocks.runtime.errors import BadInput

WHOLE, PIECES, PIECE = 64 << 20, 64, 1 << 20
MOST_FILES = 4096
_HEAD = 1 << 16
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2"}


@dataclass(frozen=True)
class Found:
    """A file below a folder: its path from there with ``/``, and its size in bytes."""

    path: str
    size: int


def files_below(folder: Path) -> list[Found]:
    """All files at any depth, sorted by path; hidden ones and those of Python's or a system's own (``.x``, ``__x``) left out, as ``datasets`` does.

    Raises:
        BadInput: a folder that cannot be listed.
    """

    def failed(error: OSError) -> None:
        raise BadInput(f"{folder} cannot be listed: {error}", hint="Check its permissions.") from error

    found = []
    for place, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        folders[:] = sorted(n for n in folders if not n.startswith((".", "__")))
        for name in names:
            if not name.startswith((".", "__")):
                path = Path(place, name)
                size = path.stat().st_size if path.exists() else -1
                found.append(Found(path.relative_to(folder).as_posix(), size))
    return sorted(found, key=lambda f: f.path)


def kind_of(file: Path) -> str:
    """``npy``, ``npz``, ``parquet``, ``arrow``, ``image``, ``json``, ``csv``, ``text``, ``empty``, or ``unknown``: by content, but that csv is text whose name says so, and
    what cannot be told at all is an image if its name says so (a damaged one)."""
    try:
        if not file.is_file():  # to open a pipe would wait for who writes to it
            return "unknown"
        with file.open("rb") as handle:
            head = handle.read(_HEAD)
    except OSError:
        head = b""
    for start, kind in ((NPY, "npy"), (b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow")):
        if head.startswith(start):
            return kind
    if head.startswith(NPZ):
        return "npz" if b".npy" in head else "unknown"
    if _is_image(file):
        return "image"
    named_image = file.suffix.lower() in _IMAGES
    if not head:
        return "image" if named_image else "empty"
    if named_image or not _is_text(head):
        return "image" if named_image else "unknown"
    if _is_json(head):
        return "json"
    return "csv" if file.suffix.lower() in (".csv", ".tsv") else "text"


def _is_image(file: Path) -> bool:
    try:
        from PIL import Image
    except ImportError:
        return False
    try:
        with Image.open(file):
            return True
    except Exception:  # any damage: it is told by its name then
        return False


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    bad = head.decode("utf-8", "replace").count("\ufffd")
    return bad <= len(head) // 50  # some bad lines are bad rows, not another kind of file


def _is_json(head: bytes) -> bool:
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if text.startswith("["):
        return text[1:].lstrip().startswith("{")
    if not text.startswith("{"):
        return False
    line = text.partition("\n")[0]
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return len(line) >= _HEAD // 2 and line.startswith('{"')


def digest_files(files: Sequence[tuple[str, Path]]) -> str:
    """Of names (as given), sizes and content. Of more than :data:`MOST_FILES` files the content of that many, spread evenly, is read; of a file of more than
    :data:`WHOLE` bytes its beginning, its end and pieces between."""
    digest = hashlib.sha256()
    chosen = set(np.unique(np.linspace(0, max(len(files) - 1, 0), MOST_FILES).astype(int)).tolist())
    for i, (name, path) in enumerate(files):
        size = path.stat().st_size if path.exists() else -1
        digest.update(f"{name}/{size}/".encode("utf-8", "surrogateescape"))
        if i in chosen and size > 0:
            for piece in _pieces(path, size):
                digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    starts = range(0, size, PIECE)
    if size > WHOLE:
        starts = [int(s) for s in np.linspace(0, size - PIECE, PIECES)]  # type: ignore[assignment]
    try:
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                yield file.read(PIECE)
    except OSError:  # the row that needs it will say so
        yield b"unreadable"
