"""Running exported DiffusionBlocks with NumPy and ONNX Runtime alone, one block in memory at a time."""

from diffusionblocks.runtime.bundle import Bundle, open_bundle
from diffusionblocks.runtime.errors import BadInput, BundleError, CheckFailed, DiffusionBlocksError

__all__ = ["BadInput", "Bundle", "BundleError", "CheckFailed", "DiffusionBlocksError", "open_bundle"]
