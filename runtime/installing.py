"""The command that installs what is missing, for the way this package itself was installed: from an index, a folder or a file."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

PACKAGE = "diffusionblocks"


def install(extra: str) -> str:
    """``pip install`` of this package with ``extra``; of the folder or wheel that it was installed from, where that is still there."""
    try:
        told = metadata.distribution(PACKAGE).read_text("direct_url.json")
        source = json.loads(told) if told else {}
        parts = urlsplit(str(source.get("url", "")))
        path = Path(url2pathname(unquote(parts.path))) if parts.scheme == "file" else None
        editable = bool(source.get("dir_info", {}).get("editable"))
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        path, editable = None, False
    if path is None or not path.exists():
        return f'pip install "{PACKAGE}[{extra}]"'
    return f'pip install {"-e " if editable else ""}"{path}[{extra}]"'
