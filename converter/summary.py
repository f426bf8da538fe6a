"""What a command made, as one object for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusionblocks.export.verify import VerifyReport
from diffusionblocks.runtime import manifest as manifests


def summary(bundle: Path, report: VerifyReport | None = None) -> dict[str, Any]:
    """What a bundle is: its blocks with their noise intervals and sizes, what was measured on held-out rows, and the checks it passed when it was written.

    ``checks`` is None where it was not written anew.
    """
    manifest = manifests.read(bundle)
    training = manifest.training or {}
    return {
        "bundle": str(bundle),
        "task": manifest.task,
        "context": manifest.context,
        "tune": manifest.tune,
        "trained": manifest.trained,
        "exact": manifest.exact,
        "dtype": manifest.dtype,
        "decoding": dict(vars(manifest.decoding)),
        "partition": manifest.schedule.get("partition"),
        "blocks": [
            {
                "index": block.index,
                "units": list(block.units),
                "sigma": list(block.sigma),
                "parameters": block.parameters,
                "bytes": block.bytes,
            }
            for block in manifest.blocks
        ],
        "held_out": training.get("held_out"),
        "checks": None if report is None else [dict(vars(check)) for check in report.checks],
    }
