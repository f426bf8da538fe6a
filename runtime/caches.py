"""Where what may be computed or fetched again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``DIFFUSIONBLOCKS_CACHE``, else ``diffusionblocks`` below ``XDG_CACHE_HOME``, on Windows ``LOCALAPPDATA``, else ``~/.cache``."""
    own = Path(os.environ.get("DIFFUSIONBLOCKS_CACHE", ""))
    if own.is_absolute():
        return own
    named = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    home = Path(os.path.expanduser("~"))
    unknown = Path(os.devnull)  # nothing can be read from it or kept in it
    folder = Path(named) if Path(named).is_absolute() else home / ".cache" if home.is_absolute() else unknown
    return folder / "diffusionblocks"


def cache_file() -> Path:
    """The index of architectures."""
    return cache_folder() / "architectures.json.gz"
