"""Where what may be computed again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_file() -> Path:
    """Below ``XDG_CACHE_HOME``, on Windows ``LOCALAPPDATA``, else ``~/.cache``."""
    named = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    home = Path(os.path.expanduser("~"))
    unknown = Path(os.devnull)  # nothing can be read from it or kept in it
    folder = Path(named) if Path(named).is_absolute() else home / ".cache" if home.is_absolute() else unknown
    return folder / "diffusionblocks" / "architectures.json.gz"
