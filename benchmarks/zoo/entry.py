"""One architecture of the zoo, with its number of residual branches written down before any finder runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Inputs = Callable[[int], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Entry:
    """``build()`` makes the model with random weights and a small config; ``inputs(batch)`` its arguments by name.

    ``branches``: how many maximal residual branches its forward has, 0 where there is no residual chain; ``why``: the count's
    derivation from the configuration. ``refused``: why the model cannot be captured at all, where that is known beforehand.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    branches: int
    why: str
    refused: str = ""
