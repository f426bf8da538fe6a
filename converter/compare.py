"""A bundle against the model it was made from, on inputs neither has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusionblocks.converter.capture import capture
from diffusionblocks.converter.load import load_model
from diffusionblocks.export.verify import Check, compare_with
from diffusionblocks.runtime import manifest as manifests

ROWS = 5


def compare_with_model(bundle: Path, model: str, **options: Any) -> list[Check]:
    """Checks of the mode exact against MODEL on random inputs of the bundle's own shapes."""
    manifest = manifests.read(bundle)
    generator = torch.Generator().manual_seed(1)
    inputs = {}
    for spec in manifest.inputs:
        sizes = [ROWS, *(int(s) for s in spec.shape[1:])]
        dtype = getattr(torch, spec.dtype)
        inputs[spec.name] = (
            torch.randn(sizes, generator=generator).to(dtype)
            if dtype.is_floating_point
            else torch.ones(sizes, dtype=dtype)
        )
    if not manifest.exact:
        return [Check("model", True, "the bundle keeps no original weights: nothing to compare")]
    source = load_model(model, **options)
    example: Any = tuple(inputs.values()) if len(inputs) == 1 else inputs
    captured = capture(source.model, example)
    with torch.no_grad():
        outputs = captured.graph(*(inputs[name] for name in captured.input_names))
    expected = {f"exact.{spec.name}": o.numpy() for spec, o in zip(manifest.outputs, outputs, strict=True)}
    return [
        Check(f"model {c.name}", c.ok, c.detail, c.difference, c.tolerance)
        for c in compare_with(bundle, {k: v.numpy() for k, v in inputs.items()}, expected)
    ]
