"""Reading pickled files by torch's weights-only reader, widened by exactly the module classes that well-known packages define."""

from __future__ import annotations

import _compat_pickle
import argparse
import dataclasses
import enum
import io
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusionblocks.converter.saved import is_archive, one_line, open_archive
from diffusionblocks.converter.vision import import_module
from diffusionblocks.runtime.errors import BadInput
from torch import nn
from torch.serialization import safe_globals

PACKAGES = ("torch.nn", "timm", "torchvision", "transformers", "diffusers")
FUNCTIONS = frozenset(
    [
        "relu",
        "gelu",
        "silu",
        "mish",
        "tanh",
        "sigmoid",
        "softmax",
        "log_softmax",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "relu6",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "softplus",
        "softsign",
        "logsigmoid",
        "glu",
        "prelu",
        "rrelu",
        "threshold",
        "normalize",
        "layer_norm",
        "group_norm",
        "batch_norm",
        "linear",
        "dropout",
        "scaled_dot_product_attention",
    ]
)
"""Functions of torch.nn.functional that a pickle may name as values."""
COSTLY = frozenset({"builtins.bytearray"})
"""What the weights-only reader calls with numbers of the file: a few bytes that make it fill all memory."""


def _member(kind: Any, name: str) -> Any:
    """What stands for ``getattr`` in a pickle, by which Python before 3.11.4 writes members of enumerations: that, and nothing else.

    Raises:
        ValueError: it is asked for something else.
    """
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise ValueError(f"the pickle asks for the attribute {name!r} of {kind!r}")


PLAIN = {
    "builtins.getattr": _member,
    "argparse.Namespace": argparse.Namespace,
    "torch._C._nn.gelu": torch._C._nn.gelu,
    "torch.nn.modules.linear.Identity": nn.Identity,
}


def read_pickle(path: Path, *, trust: Sequence[str] = (), allow_pickle: bool = False) -> Any:
    """What ``torch.save`` wrote: a dict of weights, a checkpoint, or a module of well-known classes.

    Raises:
        BadInput: the file names a class or function outside the allowed packages (nothing of it was executed), or is damaged.
    """
    if allow_pickle:
        return _load(path, weights_only=False)
    names = _globals_of(path)
    allowed: list[Any] = []
    refused: list[str] = []
    for name in names:
        found = _resolve(name, trust)
        if found is None:
            refused.append(name)
        else:
            allowed.append(found)
    if refused:
        package = refused[0].split(".")[0]
        raise BadInput(
            f"{path} is a pickle that names {', '.join(sorted(refused)[:5])}, which {'is' if len(refused) == 1 else 'are'} not "
            "of torch.nn, timm, torchvision, transformers or diffusers. Nothing in it was executed.",
            hint=f"If you trust the file: --trust {package} (that package must be importable) or --allow-pickle. Otherwise save the model "
            "with torch.export.save, or its weights alone, and give --arch package.module:factory.",
        )
    with safe_globals([(obj, name) for name, obj in allowed]):
        return _load(path, weights_only=True)


def _load(path: Path, *, weights_only: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except ModuleNotFoundError as error:
        raise BadInput(
            f"{path} needs the package {error.name}, which is not installed.",
            hint=f"Install it, or put it on PYTHONPATH: {error.name}.",
        ) from error
    except Exception as error:  # the reader raises a dozen kinds on damaged files
        if "persistent_load of storage" in str(error):
            raise BadInput(
                f"{path} is a pickled module in the format torch wrote before 1.6, of which the weights-only reader reads tensors alone.",
                hint="If you trust the file: --allow-pickle. Otherwise save the module again with torch.save, or its weights alone with --arch.",
            ) from error
        raise BadInput(
            f"{path} cannot be read by torch {torch.__version__}: {one_line(error)}",
            hint="The file may be truncated, or written by another version: save it again, or save the weights alone and give --arch.",
        ) from error


def _globals_of(path: Path) -> list[str]:
    """Dotted names a torch file's pickle refers to, beyond those the weights-only reader knows; without executing it."""
    if is_archive(path):
        try:
            with open_archive(path) as archive:
                pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
            costly = COSTLY & {name for data in pickles for name in map(_python3_name, _scan(data))}
            return sorted(costly.union(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(
                f"{path} is damaged: {one_line(error, 200)}", hint="Copy it again, or save it again."
            ) from error
    known = {f"{m}.{n}" for m, n in _legacy_known()} - COSTLY
    return sorted(n for n in map(_python3_name, _scan(path.read_bytes())) if n not in known)


def _python3_name(name: str) -> str:
    """What an unpickler makes of a name written for Python 2, as protocol 2 does: ``__builtin__.set`` is ``builtins.set``."""
    module, _, attribute = name.rpartition(".")
    if (module, attribute) in _compat_pickle.NAME_MAPPING:
        return ".".join(_compat_pickle.NAME_MAPPING[module, attribute])
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{attribute}"


def _legacy_known() -> list[tuple[str, str]]:
    return [(k.rpartition(".")[0], k.rpartition(".")[2]) for k in torch._weights_only_unpickler._get_allowed_globals()]


def _scan(data: bytes) -> set[str]:
    """Globals named by the pickles of a legacy file."""
    found: set[str] = set()
    position, file = 0, io.BytesIO(data)
    while position < len(data) and data[position : position + 1] == b"\x80":
        strings: list[str] = []
        end = position
        try:
            file.seek(position)
            for op, argument, at in pickletools.genops(file):
                if isinstance(argument, str) and op.name not in ("GLOBAL", "INST"):
                    strings.append(argument)
                elif op.name in ("GLOBAL", "INST") and isinstance(argument, str):
                    found.add(argument.replace(" ", "."))
                elif op.name == "STACK_GLOBAL":
                    found.add(".".join(strings[-2:]))
                end = (at or 0) + 1
        except Exception:
            break
        position = end
    return found


def _resolve(name: str, trust: Sequence[str]) -> tuple[str, Any] | None:
    """The object a dotted name means, if a pickle may use it; None if not."""
    if name in PLAIN:
        return name, PLAIN[name]
    module_name, _, attribute = name.rpartition(".")
    if module_name == "torch.nn.functional":
        return (name, getattr(torch.nn.functional, attribute)) if attribute in FUNCTIONS else None
    trusted = any(module_name == t or module_name.startswith(t + ".") for t in trust)
    if not trusted and not any(module_name == p or module_name.startswith(p + ".") for p in PACKAGES):
        return None
    try:
        found = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise BadInput(
            f"The file names {name}, which cannot be imported: {error}",
            hint="Install the package and version it was saved with.",
        ) from error
    if trusted:
        return name, found
    own = isinstance(found, type) and any(
        found.__module__ == p or found.__module__.startswith(p + ".") for p in PACKAGES
    )
    data = own and (issubclass(found, nn.Module | enum.Enum | nn.Parameter) or dataclasses.is_dataclass(found))
    return (name, found) if data else None
