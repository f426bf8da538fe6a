"""What graphs keep of the positions of a text that were computed already: keys and values, for each pass and step of each graph, since they depend on the noise level and on z."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import (
    PAST,
    POSITION,
    PRESENT,
    SIZES,
    CachedRecord,
    GraphRecord,
    Manifest,
    TensorSpec,
    cache_size,
)
from diffusionblocks.runtime.sessions import OpenGraph

Place = Hashable
"""Of a call: the pass or the step, and the part of the batch."""


class Caches:
    """What the graphs of a bundle keep of the positions so far; ``before`` of them, ``after`` with those that are being computed."""

    def __init__(self, batch: Sequence[int]) -> None:
        self.before = self.after = 0
        self._batch = batch
        self._kept: dict[Place, dict[str, Any]] = {}

    def run(self, graph: OpenGraph, record: CachedRecord, values: Mapping[str, Any], place: tuple[Place, int]) -> Any:
        """Outputs of a graph at the new positions; ``place``: the pass or step, and the number of the batch's part."""
        key = record.graph.file, place
        if key not in self._kept:
            batch = self._batch[place[1]]
            self._kept[key] = {c.name: np.empty(_shape(c, batch, 0), c.dtype) for c in record.caches}
        position = np.asarray([self.before, self.after], np.int64)
        outputs = graph({**values, **self._kept[key], POSITION: position})
        self._kept[key] = {c.name: outputs.pop(f"{PRESENT}{c.name.removeprefix(PAST)}") for c in record.caches}
        return outputs


def with_positions(specs: Sequence[TensorSpec], length: int) -> set[str]:
    """The inputs that have a number (or several) for each of ``length`` positions."""
    return {spec.name for spec in specs if spec.shape[1:2] == (length,)}


def cached_of(record: GraphRecord) -> CachedRecord:
    """A graph's form for new positions."""
    if record.cached is None:
        raise BadInput(f"{record.file} has no form for new positions.", hint="Export the bundle again.")
    return record.cached


def bytes_kept(passes: Sequence[tuple[GraphRecord, int]], manifest: Manifest, count: int) -> int:
    """The bytes that caches take for ``count`` texts of the whole length; ``passes``: graphs, and how many passes of each keep their own."""
    assert manifest.target is not None
    length = manifest.target.positions[0]
    return sum(
        times * int(np.prod(_shape(cache, count, length), dtype=object)) * SIZES[cache.dtype]
        for record, times in passes
        for cache in cached_of(record).caches
    )


def _shape(cache: TensorSpec, batch: int, past: int) -> tuple[int, ...]:
    return tuple(past if size == PAST else cache_size(size, batch) for size in cache.shape)
