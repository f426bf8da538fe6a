"""Sampling from a diffusion model's bundle: z is the network's own noisy input, from noise to an image, one block in memory for all steps that are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from diffusionblocks.runtime import parameterisation, schedule
from diffusionblocks.runtime.engine import as_float32
from diffusionblocks.runtime.entering import Entering, Floats, Values, blocks_of, joined
from diffusionblocks.runtime.manifest import DenoiserRecord, GraphRecord, Manifest
from diffusionblocks.runtime.sessions import Sessions
from numpy.typing import NDArray

if TYPE_CHECKING:
    from diffusionblocks.runtime.bundle import Callback

SOLVERS = ("euler", "heun")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: ``f = f_null + scale (f - f_null)``, f_null at the conditions ``null``, each [N, ...] or [1, ...]."""

    scale: float
    null: Mapping[str, NDArray[Any]]


class Denoising(Entering):
    """One call's sampling; ``original``: by the whole network at every step, instead of a block."""

    def __init__(
        self, manifest: Manifest, sessions: Sessions, conditions: Values, guidance: Guidance | None, *, original: bool
    ) -> None:
        super().__init__(manifest, sessions, original=original)
        assert self.target.denoiser is not None
        self.conditions = conditions
        self.denoiser: DenoiserRecord = self.target.denoiser
        self.guidance = guidance if guidance is not None and guidance.scale != 1.0 else None
        self.time_dtype = next(s.dtype for s in manifest.inputs if s.name == self.denoiser.time)

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
        self.divide(count, rows)
        denoised, done = z, 0
        order = blocks_of(plan)
        for k, index in enumerate(order):
            with self.opened(order, k) as chain:
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

    def _step(self, chain: Sequence[GraphRecord], z: Floats, sigma: float, after: float) -> tuple[Floats, Floats]:
        """D and the Euler step from z."""
        f = self._f(chain, z, sigma, self.conditions)
        if self.guidance is not None:
            null = {name: np.broadcast_to(v, (len(z), *v.shape[1:])) for name, v in self.guidance.null.items()}
            without = self._f(chain, z, sigma, {**self.conditions, **null})
            f = without + np.float32(self.guidance.scale) * (f - without)
        levels = (np.full(len(z), s, np.float32) for s in (sigma, after))
        values = {"z": z, "f": f, **dict(zip(("sigma", "sigma_next"), levels, strict=True))}
        results = self.sessions.run(chain[-1], self.parts(values))
        return joined(results, "denoised"), joined(results, "z_next")

    def _f(self, chain: Sequence[GraphRecord], z: Floats, sigma: float, conditions: Mapping[str, Any]) -> Floats:
        kind, n = self.denoiser.parameterisation, len(z)
        time = parameterisation.time_of(kind, np.full(n, sigma), self.denoiser.sigmas)
        return self.through(
            chain,
            {
                **conditions,
                self.denoiser.input: z * np.float32(parameterisation.input_scale(kind, sigma)),
                self.denoiser.time: parameterisation.as_time(time, self.time_dtype),
                "z": z,
                "sigma": np.full(n, sigma, np.float32),
            },
        )
