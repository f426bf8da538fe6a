"""Zeros that take no memory until they are written to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

ALIGNMENT = 64
"""Bytes; torch's own, on which the last digits of a product may depend."""


def blank(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros of a shape: pages that the system has promised and not yet given, where they are many; as torch makes them where another device or mode is set (meta, fake tensors)."""
    if torch.get_default_device().type != "cpu" or _get_current_dispatch_mode() is not None:
        return torch.zeros(tuple(shape), dtype=dtype)
    size = math.prod(shape)
    memory = np.zeros(max(size, 1) * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[start : start + size * dtype.itemsize]).view(dtype).reshape(tuple(shape))
