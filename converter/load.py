"""MODEL, as the command takes it: a file told by its content, or a spec. See docs/design.md for the list."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusionblocks.converter.diffusion import from_diffusers, is_diffusers_folder
from diffusionblocks.converter.exported import is_exported_program, load_program
from diffusionblocks.converter.hugging import from_transformers
from diffusionblocks.converter.pickles import read_pickle
from diffusionblocks.converter.recognise import recognise
from diffusionblocks.converter.saved import (
    is_archive,
    misfits,
    one_line,
    open_archive,
    read_json,
    read_safetensors,
    shape_misfits,
)
from diffusionblocks.converter.source import Source
from diffusionblocks.converter.specs import architecture, from_spec, timm_source
from diffusionblocks.runtime.errors import BadInput
from torch import nn

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "net", "module", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.")
NAMED = re.compile(r"((timm|torchvision):)?[\w.-]+")
ARCHITECTURE_KEYS = ("arch", "architecture", "model_name")
KINDS = (
    "an exported program (torch.export.save), a pickled module of torch.nn, timm, torchvision, transformers or diffusers, "
    "a checkpoint that names its architecture, weights with --arch, or a folder saved by transformers or diffusers"
)


def load_model(model: str, *, arch: str | None = None, trust: Sequence[str] = (), allow_pickle: bool = False) -> Source:
    """Load MODEL.

    Args:
        model: a path, or a spec (see :func:`specs.from_spec`).
        arch: a spec that builds the architecture for a file of weights.
        trust: packages whose classes a pickle may name.
        allow_pickle: load pickles unchecked (they can execute anything).

    Raises:
        BadInput: with what was found, what is expected, and the ways out.
    """
    path = Path(model)
    if not path.exists():
        if ":" in model:
            return from_spec(model)
        raise BadInput(
            f"{model} does not exist.",
            hint="Give a file, or a spec such as timm:vit_tiny_patch16_224 or package.module:factory.",
        )
    if path.is_dir():
        return _from_folder(path)
    kind = content_kind(path)
    if kind == "exported":
        return Source("exported", path.name, load_program(path, allow_pickle=allow_pickle))
    if kind == "safetensors":
        weights, metadata = read_safetensors(path)
        return _from_weights(path, weights, arch or _named(metadata))
    if kind in ("torch", "legacy"):
        return _from_object(path, read_pickle(path, trust=trust, allow_pickle=allow_pickle), arch)
    raise BadInput(f"{path} is {kind}.", hint=f"Give {KINDS}.")


def _from_folder(folder: Path) -> Source:
    """The model in a folder that diffusers or transformers saved, told by its config."""
    if is_diffusers_folder(folder):
        return from_diffusers(str(folder))
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(
            f"{folder} is a folder without a config.json (transformers, diffusers) or a model_index.json (a pipeline of diffusers).",
            hint=f"Give {KINDS}.",
        )
    if not any(read_json(path).get(key) for key in ("model_type", "architectures")):
        raise BadInput(
            f"{path} is of neither transformers (no model_type, no architectures) nor diffusers (no _class_name).",
            hint=f"Give {KINDS}.",
        )
    return from_transformers(str(folder))


def content_kind(path: Path) -> str:
    """``exported``, ``torch``, ``legacy``, ``safetensors``, or a description of what the content is instead."""
    size = path.stat().st_size
    if size == 0:
        return "an empty file"
    with path.open("rb") as file:
        head = file.read(512)
    if is_archive(path):
        if is_exported_program(path):
            return "exported"
        with open_archive(path) as archive:
            names = archive.namelist()
        if any("/code/" in n for n in names) or any(n.endswith("constants.pkl") for n in names):
            return "a TorchScript archive, which holds no modules to rewrite"
        if any(n.endswith("data.pkl") for n in names):
            return "torch"
        return "a zip archive without a model"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "safetensors"
    if head[:1] == b"\x80":
        return "legacy"
    if head[:1] == b"\x08" and (b"pytorch" in head or b"onnx" in head.lower()):
        return "an ONNX file, whose training graph is gone"
    if head[:2] == b"PK":
        return "a truncated zip archive"
    try:
        text = head.decode("utf-8").strip().lower()
    except UnicodeDecodeError:
        return "of an unknown kind"
    return "an HTML page (a download that failed?)" if text.startswith(("<!doctype", "<html")) else "a text file"


def _from_object(path: Path, found: Any, arch: str | None) -> Source:
    if isinstance(found, nn.Module):
        model = _whole(found, path)
        return timm_source("module", path.name, model.float() if _is_half(model) else model)
    if not isinstance(found, Mapping):
        raise BadInput(f"{path} holds a {type(found).__name__}, not a model.", hint=f"Give {KINDS}.")
    for key in WRAPPERS:
        if isinstance(found.get(key), nn.Module):
            return timm_source("module", path.name, _whole(found[key], path))
    options = {k: found[k] for k in ("num_classes",) if isinstance(found.get(k), int)}
    return _from_weights(path, found, arch or _named(found), **options)


def _whole(model: nn.Module, path: Path) -> nn.Module:
    """The module, after what every module has was asked for.

    Raises:
        BadInput: it is damaged.
    """
    try:
        tuple(model.parameters())
        tuple(model.buffers())
        return model.eval()
    except Exception as error:  # whatever a module without its attributes raises
        raise BadInput(
            f"{path} holds a damaged {type(model).__name__}: {one_line(error)}", hint="Save the model again."
        ) from error


def _is_half(model: nn.Module) -> bool:
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())


def _named(data: Mapping[str, Any]) -> str | None:
    """The architecture a checkpoint (or its ``args``) names, as a spec: of timm or torchvision alone, as a spec of another kind imports and calls what it names.

    Raises:
        BadInput: it names something else.
    """
    args = data.get("args")
    places = [data, vars(args) if hasattr(args, "__dict__") else args]
    for place in places:
        if isinstance(place, Mapping):
            for key in (*ARCHITECTURE_KEYS, "model"):
                if isinstance(place.get(key), str):
                    name = place[key]
                    if not NAMED.fullmatch(name):
                        raise BadInput(
                            f"The checkpoint names the architecture {name[:80]!r}, which is no name of timm or torchvision. Nothing of that name was imported.",
                            hint="If it is the right one: --arch with the same text.",
                        )
                    return name if ":" in name else f"timm:{name}"
    return None


def unwrap(weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A plain state dict: wrappers such as ``state_dict`` and prefixes such as ``module.`` removed."""
    current: Mapping[str, Any] = weights
    while True:
        inner = next((current[k] for k in WRAPPERS if isinstance(current.get(k), Mapping)), None)
        if inner is None:
            break
        current = inner
    tensors = {str(k): v for k, v in current.items() if isinstance(v, torch.Tensor)}
    return tensors


def _from_weights(path: Path, found: Mapping[str, Any], arch: str | None, **options: Any) -> Source:
    weights = unwrap(found)
    if not weights:
        raise BadInput(
            f"{path} holds no tensors (its keys: {', '.join(map(str, list(found)[:6])) or 'none'}).",
            hint=f"Give {KINDS}.",
        )
    if arch is None:
        arch = recognise(path.name, list(_readings(weights)))
    if arch is None:
        raise BadInput(
            f"{path} holds {len(weights)} weights, but no architecture.",
            hint="Name it: --arch timm:NAME, --arch transformers:FOLDER, --arch diffusers:FOLDER or --arch package.module:factory.",
        )
    source = architecture(arch, **options)
    sized = arch.startswith(("timm:", "torchvision:", "transformers:")) and "num_classes" not in options
    classes = _classes(source.model, weights) if sized and isinstance(source.model, nn.Module) else None
    if classes is not None:
        source = architecture(arch, num_classes=classes)
    source = replace(source, kind="weights", name=f"{path.name} ({arch})")
    if isinstance(source.model, nn.Module):
        load_weights(source.model, weights, path, arch)
    return source


def _classes(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> int | None:
    """Rows of the last matrix of the model that has another number of rows in the weights: its classifier, trained for other classes."""
    own = model.state_dict()
    theirs = _without_prefix(weights, own)
    for name in reversed(own):
        a, b = own[name].shape, theirs[name].shape if name in theirs else None
        if b is not None and a != b and len(a) > 1 and a[1:] == b[1:]:
            return int(b[0])
    return None


def _readings(weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The weights as they are, then without each known prefix that all of their names have."""
    current = dict(weights)
    yield current
    for prefix in PREFIXES:
        if current and all(k.startswith(prefix) for k in current):
            current = {k.removeprefix(prefix): v for k, v in current.items()}
            yield current


def _without_prefix(weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first reading that shares a name with the model, or the last."""
    readings = list(_readings(weights))
    return next((r for r in readings if set(r) & set(own)), readings[-1])


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, arch: str) -> None:
    """Load a state dict, trying the known prefixes; all keys and shapes must fit.

    Raises:
        BadInput: missing, unexpected and misshapen keys, the first of each named.
    """
    own = model.state_dict(keep_vars=True)
    best = _without_prefix(weights, own)
    given = {id(own[k]) for k in best if k in own}  # a tied tensor may be saved under one of its names alone
    missing = [k for k, v in own.items() if id(v) not in given and not k.endswith("num_batches_tracked")]
    problems = misfits(
        {"missing": missing, "unexpected": best.keys() - own.keys(), "misshapen": shape_misfits(own, best)}
    )
    if problems:
        raise BadInput(
            f"The weights in {path} do not fit {arch}.{problems}", hint="Give the --arch they were trained with."
        )
    model.load_state_dict(best, strict=False)
