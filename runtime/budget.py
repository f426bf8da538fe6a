"""Sizes of memory: ``256MiB`` as a number of bytes, and back."""

from __future__ import annotations

import re

from diffusionblocks.runtime.errors import BadInput

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def parse_bytes(text: str | int) -> int:
    """Bytes of ``150MiB``, ``2GB`` or a plain number.

    Raises:
        BadInput: no such size.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match.group(2).lower() not in UNITS:
        raise BadInput(f"{text!r} is no size of memory.", hint="Write it like 256MiB, 1.5GiB or 2GB.")
    return int(float(match.group(1)) * UNITS[match.group(2).lower()])


def format_bytes(count: int) -> str:
    """``152.3 MiB``."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
