"""A network whose own input is what is denoised: stem, a block and head run one after another at every step, one block in memory for all steps that are its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.engine import as_array, as_float32
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import GraphRecord, Manifest, TargetRecord
from diffusionblocks.runtime.parts import bounds
from diffusionblocks.runtime.sessions import Sessions
from numpy.typing import NDArray

Values = dict[str, Any]
Floats = NDArray[np.float32]


class Entering:
    """What the samplers of such networks have in common; ``original``: by the whole network at every step, instead of a block."""

    def __init__(self, manifest: Manifest, sessions: Sessions, *, original: bool) -> None:
        assert manifest.target is not None
        self.manifest, self.sessions, self.original = manifest, sessions, original
        self.target: TargetRecord = manifest.target
        self._bounds: list[tuple[int, int]] = []

    def records(self, blocks: Sequence[int]) -> list[GraphRecord]:
        """The graphs that some blocks use, each once."""
        chains = [self.chain(index) for index in blocks]
        return list({record.file: record for chain in chains for record in chain}.values())

    def divide(self, count: int, rows: int | None) -> None:
        """Compute at most ``rows`` of ``count`` rows together."""
        self._bounds = bounds(count, rows)

    def chain(self, index: int) -> tuple[GraphRecord, ...]:
        """Stem, block, head and target, or the original's blocks between stem and head."""
        manifest = self.manifest
        block = manifest.blocks[index]
        middle = [b.context for b in manifest.blocks] if self.original else [block.block]
        if any(record is None for record in middle):
            raise BadInput("The bundle does not hold the graphs of this mode.", hint="Use the other --mode.")
        stem, head = (
            (manifest.stem, manifest.head)
            if self.original
            else (block.stem or manifest.stem, block.head or manifest.head)
        )
        return (stem, *(r for r in middle if r is not None), head, self.target.graph)

    @contextmanager
    def opened(self, order: Sequence[int], place: int) -> Iterator[tuple[GraphRecord, ...]]:
        """The chain of the block at a place of ``order``, its graphs kept open where the budget has room for all of them."""
        chain = self.chain(order[place])
        following = next((self.chain(i)[1] for i in order[place + 1 : place + 2]), None)
        with ExitStack() as kept:
            if self.sessions.fits(*chain):
                for record in chain:
                    kept.enter_context(self.sessions.opened(record))
                self.sessions.next(following)
            yield chain

    def through(self, chain: Sequence[GraphRecord], values: Values) -> Floats:
        """The network's first output."""
        parts = self.parts(values)
        for record, following in pairwise(chain[:-1]):
            with self.sessions.opened(record) as graph:
                self.sessions.next(following)
                for part in parts:
                    outputs = graph(part)
                    part["stream"] = outputs.pop("stream_out")
                    part.update(outputs)
        return as_float32(joined(self.sessions.run(chain[-2], parts), chain[-2].outputs[0]))

    def parts(self, values: Values) -> list[Values]:
        return [{name: value[a:b] for name, value in values.items()} for a, b in self._bounds]


def blocks_of(plan: Sequence[schedule.Step]) -> list[int]:
    """The blocks of a plan, in their order."""
    return sorted({step.block for step in plan})


def joined(results: Sequence[Mapping[str, Any]], name: str) -> Floats:
    """An output of several parts as one array."""
    found = [as_array(result[name]) for result in results]
    return found[0] if len(found) == 1 else np.concatenate(found)
