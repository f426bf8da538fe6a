"""The licence of what is converted, which its bundle keeps: what a model's card says, and the files that say it whole."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

CARD = "README.md"
FOLDER = "licence"
LARGEST = 1 << 20
"""Bytes of a file that is copied."""
FILES = re.compile(r"(licen[cs]e|copying|notice)([.-][\w.-]*)?", re.IGNORECASE)


def licence_of(folder: Path) -> str | None:
    """What the card of a folder (``README.md``, its first lines between ``---``) says of the licence, such as ``apache-2.0``."""
    path = folder / CARD
    if not path.is_file() or path.stat().st_size > LARGEST:
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    said: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            break
        key, colon, value = line.partition(":")
        if colon and key.strip() == key:
            said[key] = value.strip().strip("'\"")
    found = said.get("license", "")
    return said.get("license_name") or found if found == "other" else found or None


def licence_files(folder: Path) -> tuple[Path, ...]:
    """Files of a folder that say the licence: ``LICENSE``, ``LICENCE.txt``, ``COPYING``, ``NOTICE`` and the like."""
    if not folder.is_dir():
        return ()
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if FILES.fullmatch(path.name) and path.is_file() and path.stat().st_size <= LARGEST
    )


def keep_licence(files: tuple[Path, ...], bundle: Path) -> None:
    """Copy files into a bundle's folder ``licence``.

    Raises:
        OSError: they cannot be read or written.
    """
    if files:
        (bundle / FOLDER).mkdir()
    for path in files:
        shutil.copyfile(path, bundle / FOLDER / path.name)
