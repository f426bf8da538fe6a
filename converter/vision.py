"""Packages that import torchvision, where its compiled operators do not load.

torchvision's operators are compiled for one build of torch; beside another (its wheels are for CUDA, torch's may be for CPUs) its import fails, and with it timm's and some
of transformers'. No network that is converted calls these operators, which find boxes in detection. So they are declared without being defined: the import works, and a call fails.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from typing import Any

log = logging.getLogger(__name__)

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
USERS = ("timm", "torchvision", "transformers", "diffusers")
"""Packages that import torchvision at once or later."""
_declared: list[Any] = []


def import_module(name: str) -> Any:
    """A module by its dotted name; torchvision is made importable first, where the module is, or is likely to use, one of ``USERS``.

    Raises:
        ImportError: there is none of this name.
        RuntimeError: it, or torchvision, cannot be imported for another reason.
    """
    if name.partition(".")[0] in USERS:
        ensure_torchvision()
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    ensure_torchvision()
    return importlib.import_module(name)


def ensure_torchvision() -> None:
    """Import torchvision if it is installed, with its operators declared where they could not be loaded.

    Raises:
        RuntimeError: it cannot be imported for another reason.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    import torch

    for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        library.define(operator + SCHEMA)
    _declared.append(library)  # what is declared lasts as long as this
    importlib.import_module("torchvision")
    log.info("torchvision's compiled operators do not load beside this torch; they are declared without being defined")
