"""Makes torchvision importable beside a CPU build of torch: its compiled operators cannot load, so two schemas are declared."""

from __future__ import annotations

import importlib
import sys

import torch

_library: torch.library.Library | None = None


def ensure_torchvision() -> None:
    """Import torchvision, declaring ``nms`` and ``qnms`` where its own library could not."""
    global _library
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
