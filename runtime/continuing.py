"""A text computed position by position: each graph keeps, for every pass and step it makes, what it needs of the positions before (keys and values), and computes the new ones only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.cached import Caches, cached_of
from diffusionblocks.runtime.engine import as_float32
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import GraphRecord, Manifest
from diffusionblocks.runtime.parts import bounds
from diffusionblocks.runtime.predicting import Part, Predicting, combined
from diffusionblocks.runtime.sessions import Sessions
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Continuing:
    """The network on a text that grows, in the mode ``exact`` (``plan`` None) or ``denoise``; ``bytes``: what it keeps at the whole length.

    Args:
        manifest: of a language model's bundle whose graphs have forms for new positions.
        sessions: its graphs.
        count: texts.
        plan: the denoising steps.
        rows: how many texts are computed together at most.
        start: ``mean`` or ``noise``.
        seed: of the noise.
    """

    def __init__(
        self,
        manifest: Manifest,
        sessions: Sessions,
        count: int,
        plan: Sequence[schedule.Step] | None,
        rows: int | None,
        *,
        start: str = "mean",
        seed: int = 0,
    ) -> None:
        assert manifest.target is not None
        self.manifest, self.sessions, self.plan, self.target = manifest, sessions, plan, manifest.target
        self._bounds = bounds(count, rows)
        self._caches = Caches([b - a for a, b in self._bounds])
        self.bytes = 0
        self._noise: Floats | None = None
        if plan is not None and start == "noise":
            self._noise = np.random.default_rng([seed, 0]).standard_normal((count, *self.target.shape), np.float32)
            self._noise *= np.float32(manifest.edges[0])

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Floats:
        """The network's prediction at new positions, [N, new, K].

        Args:
            inputs: of the new positions alone, each [N, new].

        Raises:
            BadInput: more positions than the network has.
        """
        new, length = next(iter(inputs.values())).shape[1], self.target.positions[0]
        caches = self._caches
        if caches.before + new > length:
            raise BadInput(f"The model was converted for {length} tokens.", hint="Convert it for more (--window).")
        caches.after = caches.before + new
        parts = [{name: value[a:b] for name, value in inputs.items()} for a, b in self._bounds]
        found = self._exact(parts) if self.plan is None else self._denoised(parts, self.plan)
        caches.before = caches.after
        return found

    def _exact(self, parts: list[dict[str, Any]]) -> Floats:
        chain = exact_chain(self.manifest)
        for record, following in pairwise([*chain, None]):
            assert record is not None
            own = cached_of(record)
            with self.sessions.opened(own.graph) as graph:
                self.sessions.next(None if following is None else cached_of(following).graph)
                for k, part in enumerate(parts):
                    outputs = self._caches.run(graph, own, part, ("exact", k))
                    if following is None:
                        parts[k] = outputs
                    else:
                        part["stream"] = outputs.pop("stream_out")
                        part.update(outputs)
        return np.concatenate([as_float32(part[self.manifest.head.outputs[0]]) for part in parts])

    def _denoised(self, parts: list[dict[str, Any]], plan: Sequence[schedule.Step]) -> Floats:
        a, b = self._caches.before, self._caches.after
        z = np.zeros((self._bounds[-1][1], b - a, self.target.dim), np.float32)
        if self._noise is not None:
            z = self._noise[:, a:b]
        given = [Part(part, z[i:j]) for part, (i, j) in zip(parts, self._bounds, strict=True)]
        predicting = Predicting(self.manifest, self.target, self.sessions, self._caches)
        predictions = predicting.run(given, plan, None, None)
        return combined(predictions, self.target, self.manifest.decoding.read, None)


def exact_chain(manifest: Manifest) -> list[GraphRecord]:
    """Stem, original blocks, head."""
    blocks = [block.context for block in manifest.blocks if block.context is not None]
    return [manifest.stem, *blocks, manifest.head]
