"""Models named by a spec: an architecture of timm or torchvision, a folder of transformers or diffusers, a factory function."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping
from typing import Any

from diffusionblocks.converter.diffusion import from_diffusers
from diffusionblocks.converter.hugging import from_transformers
from diffusionblocks.converter.preprocessing import of_timm
from diffusionblocks.converter.saved import import_package, one_line
from diffusionblocks.converter.source import Source
from diffusionblocks.converter.vision import import_module
from diffusionblocks.runtime.errors import BadInput
from torch import nn

log = logging.getLogger(__name__)


def from_spec(spec: str) -> Source:
    """The model a spec names: ``timm:NAME``, ``torchvision:NAME``, ``transformers:FOLDER_OR_NAME``, ``diffusers:FOLDER_OR_NAME`` or
    ``package.module:factory``.

    Raises:
        BadInput: no such package, name or folder.
    """
    package, _, name = spec.partition(":")
    if package == "transformers":
        return from_transformers(name)
    if package == "diffusers":
        return from_diffusers(name)
    if package in ("timm", "torchvision"):
        log.warning("%s: random weights (a spec names an architecture, not a trained network)", spec)
    return architecture(spec)


def architecture(spec: str, **options: Any) -> Source:
    """A spec's network with random weights; ``options`` go to timm's or torchvision's constructor (transformers heeds ``num_classes`` alone)."""
    package, _, name = spec.partition(":")
    if package == "timm":
        return timm_source("spec", spec, timm_model(name, **options))
    if package == "torchvision":
        return Source("spec", spec, torchvision_model(name, **options), (3, 224, 224))
    if package == "transformers":
        return from_transformers(name, weights=False, classes=options.get("num_classes"))
    if package == "diffusers":
        return from_diffusers(name, weights=False)
    return Source("spec", spec, _factory(package, name))


def _factory(module_name: str, name: str) -> nn.Module:
    sys.path.insert(0, "")
    try:
        factory = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(
            f"{module_name}:{name} cannot be imported: {error}",
            hint="Give package.module:factory, importable from here (PYTHONPATH).",
        ) from error
    finally:
        sys.path.remove("")
    try:
        model = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise BadInput(
            f"{module_name}:{name}() failed: {type(error).__name__}: {error}", hint="It must work without arguments."
        ) from error
    if not isinstance(model, nn.Module):
        raise BadInput(f"{module_name}:{name} made a {type(model).__name__}.", hint="It must return a torch.nn.Module.")
    return model.eval()


def timm_model(name: str, **options: Any) -> nn.Module:
    timm = import_package("timm")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
    except Exception as error:
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise BadInput(
            f"timm cannot make {name!r}: {one_line(error)}",
            hint=f"Names timm has that are near: {near or 'none'}.",
        ) from error
    return model.eval()


def torchvision_model(name: str, **options: Any) -> nn.Module:
    try:
        models = import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:
        raise BadInput(
            f"torchvision cannot be imported: {one_line(error)}",
            hint="Install the torchvision that belongs to the torch that is installed.",
        ) from error
    try:
        if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
            options["weights_backbone"] = None
        model: nn.Module = models.get_model(name, weights=None, **options)
    except (ValueError, TypeError) as error:
        near = ", ".join(n for n in models.list_models() if n.startswith(name[:4].lower())) or "none"
        raise BadInput(
            f"torchvision cannot make {name!r}: {one_line(error)}",
            hint=f"Names torchvision has that are near: {near}.",
        ) from error
    return model.eval()


def timm_source(kind: str, name: str, model: nn.Module) -> Source:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    config = config if isinstance(config, Mapping) else vars(config)
    shape = config.get("input_size")
    embedding = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if shape is not None and embedding is not None:
        shape = (shape[0], *embedding)
    first = next((p for p in model.parameters() if p.dim() == 4), None)
    if shape is not None and first is not None and first.shape[1] in (1, 3):
        shape = (int(first.shape[1]), *shape[1:])
    return Source(
        kind,
        name,
        model.eval(),
        input_shape=tuple(map(int, shape)) if shape is not None else None,
        preprocessing=None if shape is None else of_timm(config, shape).to_json(),
        licence=config.get("license"),
    )
