"""Rows that cannot be read: counted and named before a training begins, and left out only where that is asked for. Labels that do not fit the model."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.dataset import Batch, Dataset, Subset
from diffusionblocks.converter.targets import Target
from diffusionblocks.runtime.errors import BadInput

log = logging.getLogger(__name__)

CHUNK, SHOWN = 256, 5
LABELS_AT_ONCE = 1 << 16
Progress = Callable[[int, int], None]


class BadRow(BadInput):
    """A row that cannot be read: ``name`` and ``reason`` for the user."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name} cannot be read: {reason}.", hint="Repair or remove it, or leave such rows out with --skip-bad."
        )
        self.name, self.reason = name, reason


def row_name(data: Dataset, row: int) -> str:
    """What a person calls a row: a file below the data's folder, a line, or its number, counted from 0."""
    if isinstance(data, Subset):
        return row_name(data.data, int(data.rows[row]))
    name = getattr(data, "row_name", None)
    return str(name(row)) if callable(name) else f"row {row}"


def scan(
    data: Dataset, skip_bad: bool, progress: Progress | None = None, memory: Path | None = None
) -> tuple[Dataset, list[str]]:
    """Read every row once, and refuse or leave out those that cannot be read or hold NaN or infinity.

    Args:
        data: read in order, :data:`CHUNK` rows at a time.
        skip_bad: leave bad rows out, and say so by a warning, in place of refusing the data.
        progress: called with the rows that were read and their number.
        memory: a folder that keeps the result by the data's fingerprint, so that the next run need not read all; None for none.

    Returns:
        the data without its bad rows (itself where there are none), and the bad rows' names, each with its reason.

    Raises:
        BadInput: bad rows and no ``skip_bad``, or nothing but bad rows.
    """
    found = _remembered(data, memory)
    if found is None:
        found = _bad_rows(data, progress)
        _remember(data, memory, found)
    unit = str(getattr(data, "unit", "rows"))
    if not len(data):
        raise BadInput("The data is empty.", hint="Give at least one row.")
    if not found:
        return data, []
    names = [f"{row_name(data, row)} ({reason})" for row, reason in found]
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    text = f"{len(found)} of {len(data)} {unit} cannot be read: {shown}"
    if not skip_bad:
        raise BadInput(f"{text}.", hint="Repair or remove them, or leave them out with --skip-bad.")
    if len(found) == len(data):
        raise BadInput(f"{text}: nothing is left.", hint="Give data that can be read.")
    log.warning("%s; they are left out", text)
    return Subset(data, np.setdiff1d(np.arange(len(data)), [row for row, _ in found])), names


def _bad_rows(data: Dataset, progress: Progress | None) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for start in range(0, len(data), CHUNK):
        rows = range(start, min(start + CHUNK, len(data)))
        if _reason(data, rows) is not None:
            single = ((row, _reason(data, [row])) for row in rows)
            found += [(row, reason) for row, reason in single if reason is not None]
        if progress is not None:
            progress(rows.stop, len(data))
    return found


def _reason(data: Dataset, rows: Sequence[int]) -> str | None:
    """Why these rows cannot be trained on, if so."""
    try:
        batch = data.batch(rows)
    except BadRow as error:
        return error.reason
    except BadInput as error:
        return error.message
    return _not_finite(batch)


def _not_finite(batch: Batch) -> str | None:
    tensors = {**batch.inputs, **({} if batch.targets is None else {"y": batch.targets})}
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            return f"NaN or infinity in {name}"
    return None


def _file_of(data: Dataset, memory: Path | None) -> Path | None:
    """Where a scan's result is kept: only for data whose fingerprint this package made from its content."""
    return memory / f"{data.fingerprint}.json" if memory is not None and getattr(data, "by_content", False) else None


def _remembered(data: Dataset, memory: Path | None) -> list[tuple[int, str]] | None:
    file = _file_of(data, memory)
    try:
        found = None if file is None else json.loads(file.read_text(encoding="utf-8"))
        return None if found is None else [(int(row), str(reason)) for row, reason in found if 0 <= row < len(data)]
    except (OSError, ValueError, TypeError):
        return None


def _remember(data: Dataset, memory: Path | None, found: list[tuple[int, str]]) -> None:
    file = _file_of(data, memory)
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{id(found)}.part")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        log.debug("the result of reading all rows is not kept: %s", error)


def check_targets(data: Dataset, target: Target) -> None:
    """Refuse targets that a model cannot learn. Fewer classes than it has are allowed, with a line in the log.

    Raises:
        BadInput: no targets, targets of another shape or type, more classes than outputs, or labels outside 0..K - 1; with those that do not fit.
    """
    names, classes = data.class_names, target.num_classes
    if names is not None and classes and len(names) > classes:
        extra = ", ".join(names[classes : classes + SHOWN]) + (" ..." if len(names) > classes + SHOWN else "")
        raise BadInput(
            f"The data has {len(names)} classes, the model {classes} outputs: {extra} would have none.",
            hint="Remove classes, convert a model with as many outputs as there are classes, or convert with --new-labels K.",
        )
    seen = np.zeros(classes, bool)
    for y in _targets(data, max(CHUNK, LABELS_AT_ONCE // math.prod(target.layout.shape))):
        target.check(y)
        if target.kind == "label":
            seen[y[y >= 0]] = True
    if target.kind == "label" and not seen.all():
        missing = np.flatnonzero(~seen)
        which = ", ".join(names[i] if names is not None and i < len(names) else str(i) for i in missing[:SHOWN])
        log.info(
            "the data has rows of %d of the model's %d classes; none of %s%s",
            int(seen.sum()),
            classes,
            which,
            " ..." if len(missing) > SHOWN else "",
        )


def _targets(data: Dataset, at_once: int) -> Iterator[np.ndarray[Any, Any]]:
    """All targets in pieces."""
    for start in range(0, len(data), at_once):
        rows = np.arange(start, min(start + at_once, len(data)))
        y = labels_of(data, rows)
        if y is None:
            raise BadInput(
                "The data has no labels.", hint="Give data with labels: y, label or labels, or a folder a class."
            )
        yield y


def labels_of(data: Dataset, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """The targets of these rows, their inputs unread where the dataset can do that."""
    if isinstance(data, Subset):
        return labels_of(data.data, data.rows[rows])
    direct = getattr(data, "labels", None)
    if callable(direct):
        found: np.ndarray[Any, Any] | None = direct(rows)
        return found
    if hasattr(data, "targets") and isinstance(data.targets, np.ndarray | None):
        return None if data.targets is None else np.asarray(data.targets[rows])
    pieces = [data.batch(part.tolist()).targets for part in np.split(rows, range(CHUNK, len(rows), CHUNK))]
    tensors = [p for p in pieces if p is not None]
    return torch.cat(tensors).numpy() if tensors else None
