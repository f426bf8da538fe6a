"""Converting a trained residual network into independently trained DiffusionBlocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusionblocks.converter.load import load_model
    from diffusionblocks.converter.network import ConvertedNetwork, convert
    from diffusionblocks.converter.settings import Settings
    from diffusionblocks.converter.train import TrainOptions, finetune

_HOMES = {
    "load_model": "load",
    "ConvertedNetwork": "network",
    "Settings": "settings",
    "convert": "network",
    "TrainOptions": "train",
    "finetune": "train",
}
__all__ = ["ConvertedNetwork", "Settings", "TrainOptions", "convert", "finetune", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(f"diffusionblocks.converter.{_HOMES[name]}"), name)
