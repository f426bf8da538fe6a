"""What loading a model gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusionblocks.runtime.errors import BadInput
from torch import nn
from torch.export import ExportedProgram


@dataclass(frozen=True)
class Source:
    """A loaded model: ``model`` is a module in eval mode or an exported program; ``input_shape`` (batch left out) or ``example`` inputs by name
    where the source knows them, or ``no_example`` why it does not."""

    kind: str
    name: str
    model: nn.Module | ExportedProgram
    input_shape: tuple[int, ...] | None = None
    example: Mapping[str, torch.Tensor] | None = None
    preprocessing: dict[str, Any] | None = None
    licence: str | None = None
    licence_files: tuple[Path, ...] = ()
    no_example: BadInput | None = None

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "licence": self.licence}
