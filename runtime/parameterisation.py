"""What a diffusion model's output means, and how its input and time step follow from (z, sigma): operators only, for arrays and tensors alike.

z = y + sigma eps throughout. A variance-preserving model (``eps``, ``v``, ``x0``) reads x = z / sqrt(1 + sigma^2), which is alpha y + sqrt(1 - alpha^2) eps with
alpha = 1 / sqrt(1 + sigma^2), at the time step whose noise level sigma is. ``edm`` reads c_in z at log(sigma) / 4.

Sources: Ho et al. 2020 (eps), Salimans & Ho 2022 (v), Karras et al. 2022 (edm, table 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusionblocks.runtime import schedule
from numpy.typing import NDArray

KINDS = ("eps", "v", "x0", "edm")
SIGMA_DATA = 0.5
"""Of ``edm``; the other parameterisations need none."""


def input_scale(kind: str, sigma: Any) -> Any:
    """What z is multiplied by to be the model's input."""
    return schedule.c_in(sigma, SIGMA_DATA if kind == "edm" else 1.0)


def denoised(kind: str, z: Any, f: Any, sigma: Any) -> Any:
    """D of the model's output f at z; sigma broadcasts over z."""
    if kind == "x0":
        return f
    if kind == "eps":
        return z - sigma * f
    if kind == "v":
        return schedule.c_skip(sigma, 1.0) * z - schedule.c_out(sigma, 1.0) * f
    return schedule.c_skip(sigma, SIGMA_DATA) * z + schedule.c_out(sigma, SIGMA_DATA) * f


def weight(kind: str, sigma: Any) -> Any:
    """The weight of (D - y)^2 under which the loss is the plain mean square of the model's output; of ``x0`` that is 1."""
    if kind == "x0":
        return sigma * 0 + 1
    if kind == "eps":
        return sigma**-2
    return schedule.edm_weight(sigma, 1.0 if kind == "v" else SIGMA_DATA)


def time_of(kind: str, sigma: NDArray[Any], sigmas: Sequence[float]) -> NDArray[np.float64]:
    """The model's time of noise levels: log(sigma) / 4 for ``edm``, else the (fractional) place among the time steps' noise levels ``sigmas``, ascending."""
    log = np.log(np.asarray(sigma, np.float64))
    if kind == "edm":
        return np.asarray(log / 4)
    return np.asarray(np.interp(log, np.log(np.asarray(sigmas, np.float64)), np.arange(len(sigmas), dtype=np.float64)))


def as_time(times: NDArray[np.float64], dtype: str) -> NDArray[Any]:
    """Times in the type the model takes them in, whole numbers by rounding."""
    return (np.rint(times) if np.dtype(dtype).kind in "iu" else times).astype(dtype)


def heun_step(z: Any, denoised: Any, z_next: Any, denoised_next: Any, sigma: Any, sigma_next: Any) -> Any:
    """The second-order step from z [N, ...] by the slopes at both ends (EDM, algorithm 1)."""
    slopes = (z - denoised) / sigma + (z_next - denoised_next) / sigma_next
    return z + (sigma_next - sigma) * 0.5 * slopes
