"""Networks of Hugging Face transformers: a folder with a config and safetensors, or an architecture's name; and inputs that fit them.

The class comes from the config's ``architectures``. Weights are read from safetensors alone, and no code from a folder is run. A cache of keys and values
is switched off, since it would be an output of every layer.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusionblocks.converter.licences import licence_files, licence_of
from diffusionblocks.converter.preprocessing import of_folder
from diffusionblocks.converter.saved import import_package, misfits, one_line
from diffusionblocks.converter.source import Source
from diffusionblocks.runtime.errors import BadInput
from torch import nn

log = logging.getLogger(__name__)

BATCH, LENGTH, IMAGE = 3, 16, 224
Make = Callable[[], torch.Tensor]


def from_transformers(name: str, *, weights: bool = True, classes: int | None = None) -> Source:
    """A model of transformers with example inputs.

    Args:
        name: a folder that ``save_pretrained`` wrote, a model type (``bert``: its default config, random weights), ``TYPE:CLASS`` (with a head), or a
            name on the hub (from the cache of this machine, or downloaded).
        weights: False for the architecture alone.
        classes: labels of a classifier, where they are not the config's.

    Raises:
        BadInput: no config, a class this version does not have, no safetensors, or weights that do not fit.
    """
    transformers = import_package("transformers")
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise BadInput(
            f"{name} is a folder without a config.json.",
            hint="Give a folder that transformers' save_pretrained wrote, or a file.",
        )
    model_type, _, head = name.partition(":")
    known = model_type in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES and not folder.is_dir()
    try:
        config = (
            transformers.AutoConfig.for_model(model_type)
            if known
            else transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        )
    except Exception as error:
        raise BadInput(
            f"transformers {transformers.__version__} cannot read the config of {name}: {one_line(error)}",
            hint="Give a folder with a config.json whose model_type this version knows, or a model type such as bert.",
        ) from error
    if known and head:
        config.architectures = [head]
    if classes is not None:
        config.num_labels = classes
    if hasattr(config, "use_cache"):
        config.use_cache = False
    build = _class_of(transformers, config, name)
    if known or not weights:
        if weights:
            log.warning(
                "transformers:%s: random weights (a model type names an architecture, not a trained network)", name
            )
        model = _built(build, config, name)
    else:
        model = _loaded(build, config, name)
    preparing = of_folder(folder) if folder.is_dir() else None
    source = Source(
        "transformers",
        f"transformers:{name}",
        model,
        preprocessing=None if preparing is None else preparing.to_json(),
        licence=getattr(config, "license", None) or licence_of(folder),
        licence_files=licence_files(folder),
    )
    try:
        return replace(source, example=example_of(model))
    except BadInput as error:  # the user may have inputs
        return replace(source, no_example=error)


def _class_of(transformers: Any, config: Any, name: str) -> Any:
    wanted = list(getattr(config, "architectures", None) or ["AutoModel"])
    found = getattr(transformers, wanted[0], None)
    if found is None:
        raise BadInput(
            f"The config of {name} names the class {wanted[0]}, which transformers {transformers.__version__} does not have.",
            hint="Install the version it was saved with, or export the model with torch.export.save and give that file.",
        )
    return found


def _built(build: Any, config: Any, name: str) -> nn.Module:
    try:
        model: nn.Module = build.from_config(config) if hasattr(build, "from_config") else build(config)
    except Exception as error:
        hint = "Check its config."
        if isinstance(error, ImportError):
            hint = "Usually a package it needs is missing, or torchvision was built for another torch: install matching versions, or uninstall it."
        raise BadInput(f"{build.__name__} cannot be built for {name}: {one_line(error)}", hint=hint) from error
    return model.float().eval()


def _loaded(build: Any, config: Any, name: str) -> nn.Module:
    options = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, info = build.from_pretrained(name, config=config, **options)
    except OSError as error:
        raise BadInput(
            f"{name} holds no weights in safetensors: {one_line(error)}",
            hint="Pickled weights (.bin) are not read: load the model with transformers and save it again with save_pretrained.",
        ) from error
    except Exception as error:
        raise BadInput(
            f"The weights of {name} cannot be read: {one_line(error)}", hint="Copy the folder again."
        ) from error
    problems = misfits({what: info[f"{what}_keys"] for what in ("missing", "mismatched")})
    if problems:
        raise BadInput(
            f"The weights in {name} do not fit {type(model).__name__}.{problems}",
            hint="Save the whole model with save_pretrained, or name the class the weights are of in the config's architectures.",
        )
    return model.eval()


def example_of(model: nn.Module, window: int = LENGTH) -> dict[str, torch.Tensor]:
    """The fewest inputs the model runs on, batch :data:`BATCH`, made from its config; texts of ``window`` tokens, or the most it takes.

    The model's main input (and a decoder's) come first; others that its forward names are added while it refuses to run.

    Raises:
        BadInput: it does not run on any of them.
    """
    positions = _positions(model.config)
    lengths = [min(window, positions)] + [positions - 2] * (window > positions - 2)  # some count positions from 2
    failed: BadInput | None = None
    for length in lengths:
        try:
            return _fewest(model, length)
        except BadInput as error:
            failed = failed or error
    assert failed is not None
    raise failed


def takes_tokens(model: Any) -> bool:
    """Whether a model's config says that its main input is tokens."""
    return getattr(model, "main_input_name", "") in ("input_ids", "decoder_input_ids")


def _positions(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "max_position_embeddings", None) or 1 << 20)


def _fewest(model: nn.Module, length: int) -> dict[str, torch.Tensor]:
    makers = _makers(model.config, max(length, 2))
    named = [n for n in inspect.signature(model.forward).parameters if n in makers]
    main = str(getattr(model, "main_input_name", ""))
    first = [n for n in named if n == main or (n == "decoder_input_ids" and model.config.is_encoder_decoder)]  # type: ignore[union-attr]
    rest = [n for n in named if n not in first]
    error: Exception | None = None
    for count in range(len(rest) + 1):
        chosen = [n for n in named if n in first or n in rest[:count]]
        if not chosen:
            continue
        inputs = {n: makers[n]() for n in chosen}
        try:
            with torch.no_grad():
                model(**{n: t.clone() for n, t in inputs.items()})
        except Exception as failed:
            error = error or failed
            continue
        return inputs
    raise BadInput(
        f"No example inputs for {type(model).__name__} could be made from its config"
        + (f": {type(error).__name__}: {one_line(error)}" if error else "."),
        hint="Give them: --example FILE.npz, with arrays named after forward's arguments.",
    )


def _makers(config: Any, length: int) -> Mapping[str, Make]:
    """How to make each input that a config tells the size of."""
    generator = torch.Generator().manual_seed(0)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vision = getattr(config, "vision_config", config)
    audio = getattr(config, "audio_config", config)
    makers: dict[str, Make] = {}
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary:

        def tokens() -> torch.Tensor:
            return torch.randint(min(3, vocabulary - 1), vocabulary, (BATCH, length), generator=generator)

        makers |= {"input_ids": tokens, "decoder_input_ids": tokens}
        makers["attention_mask"] = lambda: torch.ones(BATCH, length, dtype=torch.long)
    size = getattr(vision, "image_size", None) or (IMAGE if hasattr(vision, "num_channels") else None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = getattr(vision, "num_channels", 3)
        makers["pixel_values"] = lambda: torch.randn(BATCH, channels, height, width, generator=generator)
    bins = getattr(audio, "num_mel_bins", None) or getattr(audio, "input_feat_per_channel", None)
    if bins and hasattr(audio, "max_source_positions"):
        frames = 2 * int(audio.max_source_positions)
        makers["input_features"] = lambda: torch.randn(BATCH, bins, frames, generator=generator)
    elif bins and hasattr(audio, "max_length"):
        makers["input_values"] = lambda: torch.randn(BATCH, audio.max_length, bins, generator=generator)
    elif hasattr(audio, "conv_stride") and hasattr(audio, "conv_kernel"):
        makers["input_values"] = lambda: torch.randn(BATCH, 16000, generator=generator)
    return makers
