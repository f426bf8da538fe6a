"""Images as the input of a run, and the classes they are told to be; Pillow and NumPy are enough for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.converter.images import image_array
from diffusionblocks.converter.preprocessing import Preprocessing, for_input
from diffusionblocks.converter.unreadable import Unreadable
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import Manifest

Array = np.ndarray[Any, Any]
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
AT_ONCE = 256
"""Images that are decoded and run together."""


@dataclass(frozen=True)
class Answer:
    """A row's most probable classes, with their probabilities."""

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def image_files(given: str) -> list[Path] | None:
    """The images that a run was given, a file or all of a folder in the order of their names; None where it was given something else.

    Raises:
        BadInput: a folder without images.
    """
    path = Path(given)
    if path.is_file():
        return [path] if path.suffix.lower() in SUFFIXES else None
    if not path.is_dir():
        return None
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != ".")
    if not found:
        raise BadInput(
            f"{path} is a folder without images ({', '.join(sorted(SUFFIXES))}).",
            hint="Give images, or arrays as .npy or .npz.",
        )
    return found


def image_batches(files: Sequence[Path], manifest: Manifest) -> Iterator[dict[str, Array]]:
    """Images [N, C, H, W] as the network's input, prepared as the bundle says, at most ``AT_ONCE`` together.

    Raises:
        BadInput: the network takes no images, or more than one input; an image that cannot be read.
    """
    spec, *others = manifest.inputs
    if others:
        names = ", ".join(s.name for s in manifest.inputs)
        raise BadInput(f"The network takes {names}, not images alone.", hint="Give arrays by name, as .npz.")
    preparing, last = for_input(spec, Preprocessing.from_json(manifest.preprocessing or {}))
    for start in range(0, len(files), AT_ONCE):
        rows = np.stack([_row(file, preparing) for file in files[start : start + AT_ONCE]])
        yield {spec.name: rows.transpose(0, 2, 3, 1) if last else rows}


def _row(file: Path, preparing: Preprocessing) -> Array:
    try:
        return image_array(file, preparing)
    except Unreadable as error:
        raise BadInput(f"{file} cannot be read: {error.reason}.", hint="Repair it or take it away.") from error


def answers(
    result: Array, files: Sequence[Path], manifest: Manifest, count: int = 3, below: Path | None = None
) -> list[Answer]:
    """The most probable classes of each row [N, K] of logits or log-probabilities; none where the result is something else. ``below``: the folder that files are named from."""
    target = manifest.target
    if target is None or target.kind != "label" or target.positions or result.ndim != 2:
        return []
    names = manifest.class_names if len(manifest.class_names or ()) == result.shape[1] else None
    shifted = np.exp(result.astype(np.float64) - result.max(1, keepdims=True))
    probabilities = shifted / shifted.sum(1, keepdims=True)
    best = np.argsort(-probabilities, 1, kind="stable")[:, :count]
    return [
        Answer(
            file.relative_to(below).as_posix() if below is not None and below.is_dir() else file.name,
            tuple(names[k] if names else str(k) for k in row),
            tuple(round(float(probabilities[i, k]), 4) for k in row),
        )
        for i, (file, row) in enumerate(zip(files, best, strict=True))
    ]
