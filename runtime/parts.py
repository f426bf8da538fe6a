"""A batch in parts that are small enough, and their results as one again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from diffusionblocks.runtime.engine import as_array
from numpy.typing import NDArray


def bounds(count: int, rows: int | None) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each part: as few parts as ``rows`` at a time need, of about equal size."""
    number = 1 if rows is None else -(-count // rows)
    edges = [count * i // number for i in range(number + 1)]
    return list(pairwise(edges))


def split(values: Mapping[str, NDArray[Any]], rows: int | None) -> list[dict[str, Any]]:
    """The rows of a batch's values in parts."""
    count = len(next(iter(values.values())))
    return [{name: value[a:b] for name, value in values.items()} for a, b in bounds(count, rows)]


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """The parts' values as one batch."""
    first = parts[0]
    if len(parts) == 1:
        return {name: as_array(value) for name, value in first.items()}
    return {name: np.concatenate([as_array(part[name]) for part in parts]) for name in first}
