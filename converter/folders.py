"""A folder a class, or a flat folder without classes: of images, or of text files with one sample each."""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.converter.classes import numbered
from diffusionblocks.converter.content import Found
from diffusionblocks.converter.hub_data import load, table_of
from diffusionblocks.runtime.errors import BadInput

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".zst")
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}


@dataclass(frozen=True)
class Listing:
    """A table with a column ``column`` that names one file a row; ``order``: its rows as they are used; ``labels`` int64 in that order, None without classes."""

    table: Any
    column: str
    order: Array
    labels: Array | None
    class_names: tuple[str, ...] | None
    folder: Path

    def name(self, row: int) -> str:
        """The file of a row, from the folder."""
        return _below(_paths(self.table, self.column, [int(self.order[row])])[0], self.folder)

    def names(self) -> list[str]:
        """The files of all rows."""
        paths = _paths(self.table, self.column)
        return [_below(paths[i], self.folder) for i in self.order]


def _below(path: str, folder: Path) -> str:
    return Path(path).relative_to(folder).as_posix()


def _paths(table: Any, column: str, rows: Sequence[int] | None = None) -> list[str]:
    """The files of these rows of a table, or of all."""
    values = table.with_format("arrow")[slice(None) if rows is None else rows].column(column).combine_chunks()
    found: list[str] = (values.field("path") if column == "image" else values).to_pylist()
    return found


def classes_of(folder: Path, files: Sequence[Found]) -> tuple[str, ...] | None:
    """The sub folders of a folder in the order of their names, those without files among them; None where it has none.

    Raises:
        BadInput: files beside sub folders, or sub folders that are parts (train, test) and not classes.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    if not names:
        return None
    if {n.lower() for n in names} <= SPLITS:
        raise BadInput(
            f"{folder} holds the parts {', '.join(names)} of a data set, not classes.",
            hint=f"Give one of them: --data {folder / names[0]}.",
        )
    loose = [f.path for f in files if "/" not in f.path]
    if loose:
        raise BadInput(
            f"{folder} holds sub folders and also {len(loose)} of the files to be read: {', '.join(loose[:3])}.",
            hint="Put every file into the folder of its class, or all into one folder without classes.",
        )
    filled = {f.path.partition("/")[0] for f in files}
    empty = [n for n in names if n not in filled]
    if empty:
        log.warning("%d of %d classes have no files: %s", len(empty), len(names), ", ".join(empty[:5]))
    return tuple(names)


def image_folder(folder: Path, known: Sequence[str] | None) -> Listing:
    """The images of a folder, listed by ``datasets`` (its table lies in the cache folder), sorted by path.

    Raises:
        BadInput: see :func:`classes_of`; a class that is not ``known``; no images.
    """
    folder = folder.resolve()
    pattern = f"{glob.escape(str(folder))}/**"
    table = load("imagefolder", [pattern], folder, drop_labels=True, drop_metadata=True)
    return _listing(table, "image", folder, known)


def text_folder(folder: Path, files: Sequence[Found], known: Sequence[str] | None) -> Listing:
    """The text files of a folder of folders, each a sample."""
    folder = folder.resolve()
    return _listing(table_of({"file": [str(folder / f.path) for f in files]}), "file", folder, known)


def _listing(table: Any, column: str, folder: Path, known: Sequence[str] | None) -> Listing:
    try:
        below = [_below(p, folder) for p in _paths(table, column)]
    except ValueError as error:
        raise BadInput(f"{folder} holds an archive of images.", hint="Unpack it first.") from error
    order = np.asarray(sorted(range(len(below)), key=below.__getitem__), np.int64)
    names = classes_of(folder, [Found(p, 0) for p in below])
    if names is None:
        return Listing(table, column, order, None, None, folder)
    class_names, numbers = numbered(names, known)
    labels = np.asarray([numbers[below[i].partition("/")[0]] for i in order], np.int64)
    return Listing(table, column, order, labels, class_names, folder)


def report_left_out(folder: Path, files: Sequence[Found], rows: int) -> None:
    """Say which files of a folder are not among its ``rows`` images.

    Raises:
        BadInput: an archive, whose content nobody asked to unpack.
    """
    packed = [f.path for f in files if f.path.lower().endswith(ARCHIVES)]
    if packed:
        raise BadInput(f"{folder} holds archives among the images: {', '.join(packed[:3])}.", hint="Unpack them first.")
    if len(files) > rows:
        log.warning("%d files of %s have no image's name (.png, .jpg, ...) and are left out", len(files) - rows, folder)
