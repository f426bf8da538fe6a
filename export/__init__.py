"""Exporting a converted network as a bundle of ONNX graphs, and verifying it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusionblocks.export.bundle import BlockParts, NetworkParts, TargetParts, export_bundle
    from diffusionblocks.export.graph import Piece, to_onnx
    from diffusionblocks.export.verify import VerifyReport, verify_bundle

_HOMES = {
    "BlockParts": "bundle",
    "NetworkParts": "bundle",
    "TargetParts": "bundle",
    "export_bundle": "bundle",
    "Piece": "graph",
    "to_onnx": "graph",
    "VerifyReport": "verify",
    "verify_bundle": "verify",
}
__all__ = [
    "BlockParts",
    "NetworkParts",
    "Piece",
    "TargetParts",
    "VerifyReport",
    "export_bundle",
    "to_onnx",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(f"diffusionblocks.export.{_HOMES[name]}"), name)
