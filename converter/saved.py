"""What reading a model that a library saved needs, whichever library: its import, its weights, and words for what does not fit."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusionblocks.converter.vision import import_module
from diffusionblocks.runtime.arrays import check_unpacked
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.installing import install

if TYPE_CHECKING:
    import torch


def import_package(name: str) -> Any:
    """The package ``name``, which is also the name of the extra that installs it.

    Raises:
        BadInput: it is not installed, or cannot be imported.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise BadInput(f"{name} is not installed.", hint=f"Install it: {install(name)}") from error
    except RuntimeError as error:
        raise BadInput(
            f"{name} cannot be imported: {one_line(error)}",
            hint="Usually torchvision was built for another torch than the one installed: install matching versions.",
        ) from error


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, or says that it is."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of several disks, by its own account
        return True


def open_archive(path: Path) -> zipfile.ZipFile:
    """A zip archive of torch, after what its members unpack to was compared with its size.

    Raises:
        BadInput: it is damaged, unpacks to much more than it holds, or has two members of one name.
    """
    try:
        archive = zipfile.ZipFile(path)
        check_unpacked(archive.infolist(), path.stat().st_size)
    except Exception as error:  # zipfile raises a dozen kinds on damaged files
        raise BadInput(f"{path} is refused, as a zip archive: {one_line(error)}", hint="Copy it again.") from error
    return archive


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of an error without line breaks, at most ``limit`` characters of it."""
    return " ".join(str(error).split())[:limit]


def misfits(found: Mapping[str, Iterable[object]]) -> str:
    """One line for each kind of misfit (``missing``, ``unexpected``, ...) that has any names: their number and the first four."""
    lines = []
    for what, names in found.items():
        names = sorted(map(str, names))
        if names:
            lines.append(f"\n  {what} {len(names)}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}")
    return "".join(lines)


def shape_misfits(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Names in both whose shapes differ, with the two shapes."""
    both = ((name, weights[name].shape, own[name].shape) for name in own if name in weights)
    return [f"{name} {tuple(theirs)} for {tuple(ours)}" for name, theirs, ours in both if theirs != ours]


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file of safetensors, and its metadata.

    Raises:
        BadInput: it is truncated or no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError, OSError) as error:
        raise BadInput(
            f"{path} cannot be read as safetensors: {error}", hint="Copy it again: it may be truncated."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        BadInput: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read: {one_line(error)}", hint="Copy the folder again.") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds a {type(found).__name__}, not an object.", hint="Copy the folder again.")
    return found
