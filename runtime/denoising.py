"""Sampling from a diffusion model's bundle: z is the network's own noisy input, from noise to an image, one block in memory for all steps that are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from diffusionblocks.runtime import parameterisation, schedule
from diffusionblocks.runtime.engine import as_array, as_float32
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import DenoiserRecord, GraphRecord, Manifest, TargetRecord
from diffusionblocks.runtime.parts import bounds
from diffusionblocks.runtime.sessions import Sessions
from numpy.typing import NDArray

if TYPE_CHECKING:
    from diffusionblocks.runtime.bundle import Callback

SOLVERS = ("euler", "heun")
Values = dict[str, Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: ``f = f_null + scale (f - f_null)``, f_null at the conditions ``null``, each [N, ...] or [1, ...]."""

    scale: float
    null: Mapping[str, NDArray[Any]]


class Denoising:
    """One call's sampling; ``original``: by the whole network at every step, instead of a block."""

    def __init__(
        self, manifest: Manifest, sessions: Sessions, conditions: Values, guidance: Guidance | None, *, original: bool
    ) -> None:
        target = manifest.target
        assert target is not None
        assert target.denoiser is not None
        self.manifest, self.sessions, self.conditions, self.original = manifest, sessions, conditions, original
        self.target: TargetRecord = target
        self.denoiser: DenoiserRecord = target.denoiser
        self.guidance = guidance if guidance is not None and guidance.scale != 1.0 else None
        self._bounds: list[tuple[int, int]] = []
        self.time_dtype = next(s.dtype for s in manifest.inputs if s.name == self.denoiser.time)

    def records(self, plan: Sequence[schedule.Step]) -> list[GraphRecord]:
        """The graphs that a plan uses, each once."""
        chains = [self._chain(index) for index in _blocks(plan)]
        return list({record.file: record for chain in chains for record in chain}.values())

    def run(
        self,
        count: int,
        plan: Sequence[schedule.Step],
        seed: int,
        solver: str,
        callback: Callback | None,
        rows: int | None = None,
    ) -> Floats:
        """D of the last step, [count, *shape]; at most ``rows`` of them computed together."""
        z = np.random.default_rng([seed, 0]).standard_normal((count, *self.target.shape), dtype=np.float32)
        z *= np.float32(plan[0].sigma)
        self._bounds = bounds(count, rows)
        denoised, done = z, 0
        order = _blocks(plan)
        for k, index in enumerate(order):
            chain = self._chain(index)
            following = next((self._chain(i)[1] for i in order[k + 1 : k + 2]), None)
            with ExitStack() as kept:
                if self.sessions.fits(*chain):
                    for record in chain:
                        kept.enter_context(self.sessions.opened(record))
                    self.sessions.next(following)
                for step in (s for s in plan if s.block == index):
                    denoised, z_next = self._step(chain, z, step.sigma, step.sigma_next)
                    if solver == "heun" and step.sigma_next > 0:
                        again, _ = self._step(chain, z_next, step.sigma_next, step.sigma_next)
                        z_next = parameterisation.heun_step(
                            z, denoised, z_next, again, np.float32(step.sigma), np.float32(step.sigma_next)
                        )
                    z = as_float32(z_next)
                    if callback is not None:
                        callback(done, index, step.sigma, denoised)
                    done += 1
        return denoised

    def _chain(self, index: int) -> tuple[GraphRecord, ...]:
        """Stem, block and head, or the original's blocks between them."""
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

    def _step(self, chain: Sequence[GraphRecord], z: Floats, sigma: float, after: float) -> tuple[Floats, Floats]:
        """D and the Euler step from z."""
        f = self._f(chain, z, sigma, self.conditions)
        if self.guidance is not None:
            null = {name: np.broadcast_to(v, (len(z), *v.shape[1:])) for name, v in self.guidance.null.items()}
            without = self._f(chain, z, sigma, {**self.conditions, **null})
            f = without + np.float32(self.guidance.scale) * (f - without)
        levels = (np.full(len(z), s, np.float32) for s in (sigma, after))
        values = {"z": z, "f": f, **dict(zip(("sigma", "sigma_next"), levels, strict=True))}
        results = self.sessions.run(chain[-1], self._parts(values))
        return _joined(results, "denoised"), _joined(results, "z_next")

    def _f(self, chain: Sequence[GraphRecord], z: Floats, sigma: float, conditions: Mapping[str, Any]) -> Floats:
        kind, n = self.denoiser.parameterisation, len(z)
        time = parameterisation.time_of(kind, np.full(n, sigma), self.denoiser.sigmas)
        parts = self._parts(
            {
                **conditions,
                self.denoiser.input: z * np.float32(parameterisation.input_scale(kind, sigma)),
                self.denoiser.time: parameterisation.as_time(time, self.time_dtype),
                "z": z,
                "sigma": np.full(n, sigma, np.float32),
            }
        )
        for record, following in pairwise(chain[:-1]):
            with self.sessions.opened(record) as graph:
                self.sessions.next(following)
                for values in parts:
                    outputs = graph(values)
                    values["stream"] = outputs.pop("stream_out")
                    values.update(outputs)
        return as_float32(_joined(self.sessions.run(chain[-2], parts), chain[-2].outputs[0]))

    def _parts(self, values: Values) -> list[Values]:
        return [{name: value[a:b] for name, value in values.items()} for a, b in self._bounds]


def _blocks(plan: Sequence[schedule.Step]) -> list[int]:
    return sorted({step.block for step in plan})


def _joined(results: Sequence[Mapping[str, Any]], name: str) -> Floats:
    found = [as_array(result[name]) for result in results]
    return found[0] if len(found) == 1 else np.concatenate(found)
