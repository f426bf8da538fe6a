"""Drawing a token from its log-probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def drawn(log: NDArray[np.float32], u: float, temperature: float, top_p: float) -> int:
    """The token that u in [0, 1) draws.

    Args:
        log: log-probabilities [K], up to a constant.
        u: uniform.
        temperature: what they are divided by; 0 takes the likeliest.
        top_p: draw from the fewest tokens that have this probability together (nucleus sampling: Holtzman et al. 2020).
    """
    if temperature == 0:
        return int(log.argmax())
    scaled = log.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    p = np.exp(scaled[order] - scaled.max())
    total = np.cumsum(p / p.sum())
    kept = int(np.searchsorted(total, top_p - 1e-12)) + 1
    return int(order[min(int(np.searchsorted(total[:kept], u * total[kept - 1], side="right")), kept - 1)])
