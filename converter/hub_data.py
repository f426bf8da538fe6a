"""Reading data by Hugging Face ``datasets``: offline, quiet, and with its tables in a cache folder of the user, never beside the data."""

from __future__ import annotations

import atexit
import functools
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusionblocks.converter.saved import one_line
from diffusionblocks.converter.tables import need_data_package
from diffusionblocks.runtime.caches import cache_file
from diffusionblocks.runtime.errors import BadInput

log = logging.getLogger(__name__)

PARTS = ("train", "training")


@functools.cache
def cache_folder() -> Path:
    """Where tables and the results of reading all rows are kept: ``data`` beside the index of architectures; where nothing can be written there, a temporary folder."""
    folder = cache_file().parent / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="diffusionblocks-data-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def load(reader: str, patterns: Sequence[str], where: Path, **options: Any) -> Any:
    """All rows of files as one memory-mapped table.

    Args:
        reader: ``imagefolder``, ``parquet``, ``csv``, ``json`` or ``text``.
        patterns: files, or patterns of files, absolute.
        where: what the user gave, for messages.

    Raises:
        BadInput: ``datasets`` is not installed, or cannot read a file.
    """
    datasets = need_data_package("datasets")
    try:
        with _quiet(datasets):
            return datasets.load_dataset(
                reader, data_files={"train": list(patterns)}, split="train", cache_dir=str(cache_folder()), **options
            )
    except Exception as error:
        cause = error.__cause__ or error
        raise BadInput(
            f"{where} cannot be read as {reader}: {one_line(cause)}",
            hint="Repair or remove the file that is named, or copy it again.",
        ) from error


def load_saved(folder: Path) -> Any:
    """The table of a folder that ``save_to_disk`` wrote, memory-mapped where it lies; of one with several parts that for training.

    Raises:
        BadInput: it cannot be read, or has several parts, none of them for training.
    """
    datasets = need_data_package("datasets")
    try:
        with _quiet(datasets):
            found = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except Exception as error:
        raise BadInput(
            f"{folder} cannot be read as a saved dataset: {one_line(error)}", hint="Copy the folder again."
        ) from error
    if not isinstance(found, Mapping):
        return found
    part = next((p for p in PARTS if p in found), next(iter(found)) if len(found) == 1 else None)
    if part is None:
        raise BadInput(
            f"{folder} has the parts {', '.join(found)}, none of them for training.",
            hint=f"Give one: --data {folder / next(iter(found), 'train')}.",
        )
    if len(found) > 1:
        log.warning("%s has the parts %s: %s is used", folder, ", ".join(found), part)
    return found[part]


def table_of(columns: Mapping[str, list[Any]]) -> Any:
    """A table in memory, for what is small."""
    return need_data_package("datasets").Dataset.from_dict(dict(columns))
