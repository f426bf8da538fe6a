"""Networks of diffusers: a folder that ``save_pretrained`` wrote, a pipeline's folder, or a class's name; and inputs that fit them.

The class comes from the config's ``_class_name`` and must be a model of diffusers. Weights are read from safetensors alone, here and not by diffusers,
which cannot read some classes without a further package; no code from a folder is run.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from diffusionblocks.converter.licences import licence_files, licence_of
from diffusionblocks.converter.prepared import prepare
from diffusionblocks.converter.saved import (
    import_package,
    misfits,
    one_line,
    read_json,
    read_safetensors,
    shape_misfits,
)
from diffusionblocks.converter.source import Source
from diffusionblocks.runtime.errors import BadInput
from torch import nn

log = logging.getLogger(__name__)

CONFIG, PIPELINE, CLASS = "config.json", "model_index.json", "_class_name"
WEIGHTS = "diffusion_pytorch_model"
DENOISERS = ("transformer", "unet")
"""The components of a pipeline that denoise, of which the first there is is taken."""


def is_diffusers_folder(folder: Path) -> bool:
    """Whether diffusers wrote it: a pipeline's index, or a config that names its class as diffusers does."""
    if (folder / PIPELINE).is_file():
        return True
    return (folder / CONFIG).is_file() and CLASS in read_json(folder / CONFIG)


def from_diffusers(name: str, *, weights: bool = True) -> Source:
    """A model of diffusers with example inputs.

    Args:
        name: a folder that ``save_pretrained`` of a model or of a pipeline wrote, or the name of a class (its default config, random weights).
        weights: False for the architecture alone.

    Raises:
        BadInput: no config, no model class of this version, no safetensors, or weights that do not fit.
    """
    diffusers = import_package("diffusers")
    folder = Path(name)
    if folder.is_dir():
        folder = _denoiser(folder)
        config = _config(folder)
        model = _built(_class_of(diffusers, str(config[CLASS]), str(folder)), config, str(folder))
        if weights:
            _load(model, folder)
    else:
        model = _built(_class_of(diffusers, name, None), None, name)
        if weights:
            log.warning("diffusers:%s: random weights (a class names an architecture, not a trained network)", name)
    settings: Any = model.config
    whole = Path(name)  # of a pipeline, whose folder holds the model's
    source = Source(
        "diffusers",
        f"diffusers:{name}",
        model.float().eval(),
        licence=licence_of(whole) or licence_of(folder),
        licence_files=licence_files(whole) or licence_files(folder),
    )
    return prepare(source, settings)


def _denoiser(folder: Path) -> Path:
    """The folder of the model: itself, or a pipeline's component."""
    if not (folder / PIPELINE).is_file():
        return folder
    for component in DENOISERS:
        if (folder / component / CONFIG).is_file():
            log.warning("%s is a pipeline: its %s is taken (%s)", folder, component, folder / component)
            return folder / component
    inside = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folder"
    raise BadInput(
        f"The pipeline in {folder} has neither a transformer nor a unet: it holds {inside}.",
        hint="Give the folder of the component to convert.",
    )


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise BadInput(
            f"{folder} is a folder without a config.json.",
            hint="Give a folder that diffusers' save_pretrained wrote, of a model or of a pipeline.",
        )
    config = read_json(folder / CONFIG)
    if CLASS not in config:
        raise BadInput(
            f"The config in {folder} names no class ({CLASS}), so diffusers did not write it.",
            hint="Give a folder that diffusers' save_pretrained wrote; one of transformers is transformers:FOLDER.",
        )
    if config.get("quantization_config"):
        raise BadInput(
            f"The weights in {folder} are quantised.", hint="Load the model, dequantize() it and save it again."
        )
    return config


def _class_of(diffusers: Any, name: str, folder: str | None) -> Any:
    try:
        found = getattr(diffusers, name, None) if name.isidentifier() else None
    except (ImportError, RuntimeError) as error:
        raise BadInput(
            f"diffusers cannot import {name}: {one_line(error)}",
            hint="Usually a package it needs is missing, or torchvision was built for another torch.",
        ) from error
    if isinstance(found, type) and issubclass(found, diffusers.ModelMixin):
        return found
    what = "is not a model" if found is not None else "does not exist"
    if folder is not None:
        raise BadInput(
            f"The config in {folder} names the class {name}, which {what} in diffusers {diffusers.__version__}.",
            hint="Install the version it was saved with, or export the model with torch.export.save and give that file.",
        )
    raise BadInput(
        f"{name} is no folder, and as a class it {what} in diffusers {diffusers.__version__}.",
        hint="Give a folder that save_pretrained wrote (a model of the hub has to be downloaded first), or a class "
        "such as DiTTransformer2DModel.",
    )


def _built(build: Any, config: dict[str, Any] | None, name: str) -> nn.Module:
    try:
        model: nn.Module = build() if config is None else build.from_config(config)
    except Exception as error:
        raise BadInput(
            f"{build.__name__} cannot be built for {name}: {type(error).__name__}: {one_line(error)}",
            hint="Check its config." if config else "Give a folder with its config.",
        ) from error
    return model


def _load(model: nn.Module, folder: Path) -> None:
    """Load the folder's weights; all names and shapes must fit."""
    found = {name: tensor for file in _files(folder) for name, tensor in read_safetensors(file)[0].items()}
    rename = getattr(
        model, "_fix_state_dict_keys_on_load", None
    )  # attention layers as diffusers named them before 0.15
    if rename is not None:
        rename(found)
    own, dropped = model.state_dict(), getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    problems = misfits(
        {
            "missing": own.keys() - found.keys(),
            "unexpected": [n for n in found.keys() - own.keys() if not any(re.search(p, n) for p in dropped)],
            "misshapen": shape_misfits(own, found),
        }
    )
    if problems:
        raise BadInput(
            f"The weights in {folder} do not fit {type(model).__name__} with the config beside them.{problems}",
            hint="Copy the folder again, or save the model again with the version of diffusers that wrote it.",
        )
    model.load_state_dict(found, strict=False)


def _files(folder: Path) -> list[Path]:
    """The files of the weights: one, or the shards that the index names."""
    index = next(iter(sorted(folder.glob(f"{WEIGHTS}.safetensors.index*.json"), key=_length)), None)
    if index is not None:
        shards = sorted(set(map(str, read_json(index).get("weight_map", {}).values())))
        absent = [s for s in shards if Path(s).name != s or not (folder / s).is_file()]
        if not shards or absent:
            raise BadInput(
                f"{index} names {', '.join(absent) or 'no files'}, not beside it.", hint="Copy the folder again."
            )
        return [folder / s for s in shards]
    found = sorted(folder.glob(f"{WEIGHTS}*.safetensors"), key=_length)
    if not found:
        raise BadInput(
            f"{folder} holds no weights in safetensors ({WEIGHTS}.safetensors).",
            hint="Pickled weights (.bin) are not read: load the model with diffusers and save it again with save_pretrained.",
        )
    return found[:1]


def _length(path: Path) -> int:
    """Orders a file before its variants (``.fp16``)."""
    return len(path.name)
