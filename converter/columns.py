"""Which column of a table is which of the model's inputs, and which is the target."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusionblocks.converter.classes import numbered
from diffusionblocks.converter.preprocessing import Preprocessing, for_input
from diffusionblocks.converter.tables import ClassReader, ImageReader, NumberReader, Reader, TextReader
from diffusionblocks.converter.texts import Tokens, takes_text
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import TensorSpec

log = logging.getLogger(__name__)

TARGETS = ("y", "label", "labels")
IMAGES = ("image", "img", "pixel_values")


def image_reader(column: str, spec: TensorSpec, preparing: Preprocessing, root: Path) -> ImageReader:
    """Reads images for an input [N, C, H, W] or [N, H, W, C] of 1 or 3 channels.

    Raises:
        BadInput: an input of another shape, or of no floating point.
    """
    prepared, last = for_input(spec, preparing)
    return ImageReader(column, spec.name, prepared, root=root, channels_last=last)


def input_readers(
    table: Any, inputs: Sequence[TensorSpec], preparing: Preprocessing, tokenizer: Path | None, root: Path
) -> list[Reader]:
    """Readers for all inputs: by name, ``x`` or an image for the first, ``text`` for tokens and what goes with them.

    Raises:
        BadInput: an input that no column gives, or one column of a wrong kind.
    """
    found: list[Reader] = []
    features, left = table.features, list(inputs)
    names, first = table.column_names, inputs[0]
    text = text_column(features, names)
    if takes_text(inputs) and text is not None and first.name not in names and "x" not in names:
        found.append(TextReader(text, Tokens(tokenizer, inputs)))
        left = [s for s in left if s.name not in found[0].names]
    for spec in left:
        column = spec.name if spec.name in names else _first_column(features, names) if spec is first else None
        if column is None:
            raise BadInput(
                f"The data has the columns {', '.join(names)}; none is the model's input {spec.name} ({spec.dtype} {list(spec.shape)}).",
                hint="Name the columns after forward's arguments (x or image stands for the first, text for what a tokenizer makes), and the target y or label.",
            )
        found.append(_reader(column, features[column], spec, preparing, root))
    return found


def _reader(column: str, feature: Any, spec: TensorSpec, preparing: Preprocessing, root: Path) -> Reader:
    if _is_image(feature) or getattr(feature, "dtype", None) in ("string", "large_string", "binary", "large_binary"):
        return image_reader(column, spec, preparing, root)
    shape = [n for n in spec.shape[1:] if isinstance(n, int)]
    if len(shape) < len(spec.shape) - 1:
        raise BadInput(
            f"The model's input {spec.name} has the shape {list(spec.shape)}, which a column cannot be read as.",
            hint="Give the data as a .npz.",
        )
    return NumberReader(column, spec.name, shape)


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _first_column(features: Mapping[str, Any], names: Sequence[str]) -> str | None:
    images = [n for n in names if _is_image(features[n])]
    return next((n for n in ("x", *IMAGES) if n in names), images[0] if len(images) == 1 else None)


def text_column(features: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The column of texts; None where it cannot be told."""
    strings = [n for n in names if getattr(features[n], "dtype", None) in ("string", "large_string")]
    others = [n for n in strings if n not in TARGETS]
    return "text" if "text" in strings else others[0] if len(others) == 1 else None


def target_reader(
    table: Any, inputs: Sequence[TensorSpec], known: Sequence[str] | None, labelled: bool | None
) -> tuple[Reader | None, tuple[str, ...] | None]:
    """What reads the target, and the class names the column gives; ``labelled``: None where it may be missing, False where it is not wanted.

    Raises:
        BadInput: no target though one is wanted, or one that is neither classes nor numbers.
    """
    taken = {s.name for s in inputs}
    column = next((n for n in TARGETS if n in table.column_names and n not in taken), None)
    if labelled is False or (column is None and not labelled):
        return None, None
    if column is None:
        raise BadInput(
            f"The data has the columns {', '.join(table.column_names)}, and no target.",
            hint="Name the column of the labels y, label or labels, or train with --targets teacher.",
        )
    feature = table.features[column]
    kind = str(getattr(feature, "dtype", ""))
    if type(feature).__name__ == "ClassLabel":
        names, numbers = numbered(feature.names, known)
        return ClassReader(column, {i: numbers[n] for i, n in enumerate(feature.names)}), names
    if kind.endswith("string"):
        names, numbers = numbered(sorted(v for v in table.unique(column) if v is not None), known)
        return ClassReader(column, numbers), names
    if kind.startswith(("int", "uint", "bool")):
        return ClassReader(column, None), None
    return NumberReader(column, "y", _shape(table, column)), None


def _shape(table: Any, column: str) -> tuple[int, ...]:
    """The shape of the first value of a column of (nested) lists of numbers."""
    value, shape = table.with_format(None)[0][column] if len(table) else 0.0, []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else 0.0
    return tuple(shape)
