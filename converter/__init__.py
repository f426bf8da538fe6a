"""Converting a trained residual network into independently trained DiffusionBlocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusionblocks.converter.load import load_model
    from diffusionblocks.converter.network import ConvertedNetwork, convert
    from diffusionblocks.converter.portable import BlockNetwork, load_network, module_of, save_network
    from diffusionblocks.converter.settings import Settings
    from diffusionblocks.converter.train import TrainOptions, finetune

_HOMES = {
    "load_model": "load",
    "ConvertedNetwork": "network",
    "BlockNetwork": "portable",
    "load_network": "portable",
    "module_of": "portable",
    "save_network": "portable",
    "Settings": "settings",
    "convert": "network",
    "TrainOptions": "train",
    "finetune": "train",
}
__all__ = [
    "BlockNetwork",
    "ConvertedNetwork",
    "Settings",
    "TrainOptions",
    "convert",
    "finetune",
    "load_model",
    "load_network",
    "module_of",
    "save_network",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(f"diffusionblocks.converter.{_HOMES[name]}"), name)
