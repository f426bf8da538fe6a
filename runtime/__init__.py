"""Running exported DiffusionBlocks with NumPy and ONNX Runtime alone, one block in memory at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusionblocks.runtime.errors import (
    BadInput,
    BudgetError,
    BundleError,
    CheckFailed,
    ClosedError,
    DeviceError,
    DiffusionBlocksError,
    FallbackError,
    FileError,
    FormatError,
    InputError,
)

if TYPE_CHECKING:
    from diffusionblocks.runtime.bundle import Bundle, open_bundle

__all__ = [
    "BadInput",
    "BudgetError",
    "Bundle",
    "BundleError",
    "CheckFailed",
    "ClosedError",
    "DeviceError",
    "DiffusionBlocksError",
    "FallbackError",
    "FileError",
    "FormatError",
    "InputError",
    "open_bundle",
]


def __getattr__(name: str) -> Any:
    """What runs bundles is imported when it is asked for: onnxruntime starts threads, which a process that is to fork must not have."""
    if name not in __all__:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module("diffusionblocks.runtime.bundle"), name)
