"""Arrays on disk: ``.npy`` is the model's first input, the names in a ``.npz`` are forward's arguments (``x`` the first, ``y`` the labels)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.runtime.arrays import NPY, NPZ, Unreadable, load_arrays
from diffusionblocks.runtime.errors import BadInput

Array = np.ndarray[Any, Any]


def read_arrays(path: str | Path) -> dict[str, Array]:
    """Arrays by name; a ``.npy`` is named ``x``. Told by content; pickled objects are refused.

    Raises:
        BadInput: no such file, not an array file, truncated, or holding objects.
    """
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"{file} does not exist.", hint="Give a .npy (the first input) or a .npz (arrays by name).")
    with file.open("rb") as handle:
        head = handle.read(6)
    if not head.startswith((NPY, NPZ)):
        raise BadInput(f"{file} is neither a .npy nor a .npz file.", hint="Save it with numpy.save or numpy.savez.")
    try:
        found = load_arrays(file)
    except Unreadable as error:
        raise BadInput(
            f"{file} cannot be read: {error}", hint="It is truncated, or holds Python objects: save plain arrays."
        ) from error
    for name, array in found.items():
        if array.dtype.kind not in "biufc":
            raise BadInput(f"{name} in {file} is an array of {array.dtype}.", hint="Save numbers or booleans.")
    return found


def name_first(arrays: dict[str, Array], first: str) -> dict[str, Array]:
    """The arrays with ``x`` standing for the model's first argument."""
    if "x" in arrays and first != "x" and first not in arrays:
        return {first if name == "x" else name: array for name, array in arrays.items()}
    return arrays


def write_npy(path: str | Path, array: Array) -> None:
    """Write a ``.npy`` under exactly this name, whole or not at all.

    Raises:
        BadInput: the file cannot be written.
    """
    file = Path(path)
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as handle:
            np.save(handle, array)
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadInput(
            f"{file} cannot be written: {error}", hint="Give an --output that you may write to, on a disk with space."
        ) from error
