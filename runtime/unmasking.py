"""A masked language model's bundle: z are the network's own tokens, some of them hidden, and a block fills in those whose share is its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.entering import Entering, Floats, Values, blocks_of, joined
from diffusionblocks.runtime.manifest import GraphRecord, Manifest, MaskingRecord
from diffusionblocks.runtime.sessions import Sessions
from diffusionblocks.runtime.tokens import drawn
from numpy.typing import NDArray

if TYPE_CHECKING:
    from diffusionblocks.runtime.bundle import Callback

Tokens = NDArray[np.int64]


class Unmasking(Entering):
    """One call; ``values``: all of the network's inputs, its tokens [N, T] among them."""

    def __init__(self, manifest: Manifest, sessions: Sessions, values: Values, *, original: bool) -> None:
        super().__init__(manifest, sessions, original=original)
        assert self.target.masking is not None
        self.masking: MaskingRecord = self.target.masking
        self.values = values
        self.seen = values[self.masking.mask] != 0 if self.masking.mask else None

    @property
    def tokens(self) -> NDArray[Any]:
        """What was given, in the network's own type."""
        return np.asarray(self.values[self.masking.input])

    def hidden(self, z: NDArray[Any]) -> NDArray[np.bool_]:
        """Where tokens are to be filled in, [N, T]."""
        found = z == self.masking.token
        return np.asarray(found if self.seen is None else found & self.seen)

    def shares(self) -> NDArray[np.float64]:
        """The share of each row's tokens that is hidden, [N]."""
        hidden = self.hidden(self.tokens)
        if self.seen is None:
            return np.asarray(hidden.mean(1))
        return np.asarray(hidden.sum(1) / np.maximum(self.seen.sum(1), 1))

    def log_probabilities(self, chain: Sequence[GraphRecord], z: NDArray[Any], sigma: NDArray[np.float32]) -> Floats:
        """Of every token at every position, [N, T, K]; sigma [N]: the share that is hidden."""
        tokens = z.astype(np.int64)
        values = {**self.values, self.masking.input: z.astype(self.tokens.dtype), "z": tokens, "sigma": sigma}
        f = self.through(chain, values)
        levels = {"sigma": sigma, "sigma_next": np.zeros_like(sigma)}
        return joined(self.sessions.run(chain[-1], self.parts({"z": tokens, "f": f, **levels})), "prediction")

    def filled_in(self, rows: int | None) -> Floats:
        """Log-probabilities of the tokens given, each row by the block that owns its share, [N, T, K]."""
        shares, values = self.shares(), self.values
        owners = np.asarray([schedule.block_of(float(s), self.manifest.edges) for s in shares])
        order = sorted(set(owners.tolist()))
        made: list[tuple[NDArray[Any], Floats]] = []
        try:
            for k, block in enumerate(order):
                chosen = np.flatnonzero(owners == block)
                self.values = {name: value[chosen] for name, value in values.items()}
                self.divide(len(chosen), rows)
                with self.opened(order, k) as chain:
                    log = self.log_probabilities(chain, self.tokens, shares[chosen].astype(np.float32))
                made.append((chosen, log))
        finally:
            self.values = values
        places = np.argsort(np.concatenate([chosen for chosen, _ in made]))
        return np.concatenate([log for _, log in made])[places]

    def run(
        self,
        plan: Sequence[schedule.Step],
        *,
        seed: int,
        temperature: float,
        top_p: float,
        rows: int | None,
        callback: Callback | None,
    ) -> Tokens:
        """The tokens with the hidden ones filled in, int64 [N, T]: at a step from share t to s each one with the probability ``(t - s) / t``."""
        z, done = self.tokens.astype(np.int64), 0
        generators = [np.random.default_rng([seed, row]) for row in range(len(z))]
        self.divide(len(z), rows)
        order = blocks_of(plan)
        for k, index in enumerate(order):
            with self.opened(order, k) as chain:
                for step in (s for s in plan if s.block == index):
                    log = self.log_probabilities(chain, z, np.full(len(z), step.sigma, np.float32))
                    share = 1 - step.sigma_next / step.sigma
                    for row, generator in enumerate(generators):
                        reveal, choice = generator.random((2, z.shape[1]))
                        for place in np.flatnonzero(self.hidden(z)[row] & (reveal < share)):
                            z[row, place] = drawn(log[row, place], float(choice[place]), temperature, top_p)
                    if callback is not None:
                        callback(done, index, step.sigma, log)
                    done += 1
        return z

    def bound(self, chain: Sequence[GraphRecord], z: NDArray[Any], share: float) -> NDArray[np.float64]:
        """``1/t sum of -log p`` over the tokens that are hidden in z, nats [N]; ``share``: t."""
        true, hidden = self.tokens.astype(np.int64), self.hidden(z)
        log = self.log_probabilities(chain, z, np.full(len(z), share, np.float32))
        wrong = -np.take_along_axis(log, true[..., None], -1)[..., 0]
        return np.asarray(np.where(hidden, wrong, 0).sum(1, dtype=np.float64) / share)
