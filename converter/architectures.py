"""The architectures of timm, torchvision and transformers, each built without memory and described by what a file of weights can show of it.

Every architecture is built on the meta device. Nothing cheaper is sound: which names a constructor makes, and which of them it replaces or deletes again,
is known only when it returns, so an architecture that was not built cannot be ruled out. What is skipped is the filling of the weights, which takes three
quarters of the time and shows nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import io
import logging
import re
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusionblocks.converter.saved import import_package
from diffusionblocks.converter.specs import timm_model, torchvision_model
from diffusionblocks.converter.vision import import_module
from torch import nn
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
Build = Callable[[], nn.Module]
COUNTER = "num_batches_tracked"  # BatchNorm's, which older files lack
SECONDS = 15.0  # between two lines about the progress
DEPTH = 6  # of containers and plain objects that are looked into for a configuration
FILLS = {  # functions of torch, torch.nn.init and torch.Tensor that change nothing but a tensor's values
    *("uniform_", "normal_", "log_normal_", "trunc_normal_", "exponential_", "bernoulli_", "random_", "erfinv_"),
    *("xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_", "dirac_"),
    *("constant_", "ones_", "zeros_", "eye_", "fill_", "zero_", "copy_"),
    *("add_", "sub_", "mul_", "div_", "neg_", "clamp_", "clip_"),
}
EMPTY = {"empty", "empty_strided", "rand", "randn", "normal"}
# What a module holds besides its configuration: torch's own bookkeeping, the mode, the number of classes, where weights come from, and the arguments it
# was asked for with, which its submodules show.
OTHER = {*vars(nn.Module()), "num_classes", "num_labels", "pretrained_cfg", "default_cfg", "_model_args"}
CONFIG_OTHER = {"num_labels", "id2label", "label2id", "architectures", "transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class Package:
    """A package of architectures: ``version`` as installed; ``architectures()`` imports it and gives what builds each spec."""

    name: str
    version: str
    architectures: Callable[[], Mapping[str, Build]]


@dataclass(frozen=True)
class Entry:
    """What is kept of one architecture.

    ``names`` and ``shapes`` are hashes over its weights without the ``tied`` ones (further names of a tensor, which some files leave out); ``shapes`` has
    the rows of the ``classifier`` weights left out, as many as there are classes. ``configuration`` is a hash over everything that shapes do not show.
    ``patterns`` counts its names with every number replaced by ``#``; ``size`` is its number of elements.
    """

    spec: str
    names: str
    shapes: str
    tied: tuple[str, ...]
    classifier: tuple[str, ...]
    configuration: str
    size: int
    patterns: Mapping[str, int] = field(hash=False)


def installed() -> list[Package]:
    """The packages whose architectures are compared, in the order in which they are preferred."""
    packages = []
    for name, architectures in (("timm", _timm), ("torchvision", _torchvision), ("transformers", _transformers)):
        try:
            packages.append(Package(name, importlib.metadata.version(name), architectures))
        except importlib.metadata.PackageNotFoundError:
            continue
    return packages


def describe_all(package: Package) -> tuple[list[Entry], int]:
    """Every architecture of a package, and the number of those that could not be built; raises what importing the package raises."""
    architectures = package.architectures()
    log.warning(
        "Indexing the %d architectures of %s %s by the names and shapes of their weights, once: this takes minutes, and naming it with --arch avoids it.",
        len(architectures),
        package.name,
        package.version,
    )
    entries: list[Entry] = []
    said = time.monotonic()
    gc.freeze()  # the imported packages are not searched again and again for what can be freed: a seventh of the time
    try:
        for count, (spec, build) in enumerate(architectures.items()):
            if time.monotonic() - said > SECONDS:
                said = time.monotonic()
                log.warning("  %d of %d", count, len(architectures))
            entry = _described(spec, build)
            entries += [] if entry is None else [entry]
    finally:
        gc.unfreeze()
    return entries, len(architectures) - len(entries)


def _described(spec: str, build: Build) -> Entry | None:
    """None where it cannot be built, with all of it or with its weights alone on the meta device (some compute sizes with tensors)."""
    for everything in (True, False):
        try:
            with unfilled(everything):
                return describe(spec, build())
        except Exception as error:  # whatever a constructor raises, often for want of an optional package
            log.debug("%s cannot be built: %s", spec, error)
    return None


class _Unfilled(TorchFunctionMode):
    """Uninitialised tensors are made on the meta device, and filling one does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        if name in EMPTY and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def unfilled(everything: bool = True) -> Iterator[None]:
    """Modules made inside have their weights (or every tensor) on the meta device, not initialised. Nothing is printed or logged."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(torch.no_grad())
            if everything:
                stack.enter_context(torch.device("meta"))
            stack.enter_context(_Unfilled())
            yield
    finally:
        logging.disable(before)


def describe(spec: str, model: nn.Module) -> Entry:
    """The entry of a built model; nothing of its weights but names and shapes is read."""
    tensors = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)}
    shapes = {k: tuple(v.shape) for k, v in tensors.items() if not k.endswith(COUNTER)}
    first = {id(v): k for k, v in reversed(tensors.items())}
    tied = tuple(k for k in shapes if first[id(tensors[k])] != k)
    kept = {k: s for k, s in shapes.items() if k not in tied}
    modules = _classifiers(model, shapes)
    classifier = tuple(k for m in sorted(modules) for k in (f"{m}.weight", f"{m}.bias") if k in kept)
    return Entry(
        spec,
        names=names_hash(kept),
        shapes=shapes_hash(kept, classifier),
        tied=tied,
        classifier=classifier,
        configuration=_configuration(model, modules),
        size=sum(tensors[k].numel() for k in kept),
        patterns=patterns_of(kept),
    )


def names_hash(shapes: Mapping[str, Shape]) -> str:
    return _hash(sorted(shapes))


def shapes_hash(shapes: Mapping[str, Shape], classifier: tuple[str, ...]) -> str:
    """Over names and shapes, the first dimension of the classifier's weights left out."""
    return _hash(sorted(f"{k} {('*', *s[1:]) if k in classifier else s}" for k, s in shapes.items()))


def patterns_of(names: Mapping[str, Any]) -> dict[str, int]:
    return dict(Counter(re.sub(r"\d+", "#", name) for name in names))


def _hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _classifiers(model: nn.Module, shapes: Mapping[str, Shape]) -> set[str]:
    """Names of the modules with one output per class: timm's models and the configs of transformers tell; elsewhere it is the last with a matrix."""
    told = getattr(model, "pretrained_cfg", None) or {}
    named = told.get("classifier") if isinstance(told, Mapping) else None
    if named:
        return {named} if isinstance(named, str) else set(named)
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if labels is None:
        return {name.rpartition(".")[0] for name in [k for k, s in shapes.items() if len(s) > 1][-1:]}
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)))
    return {name for name, m in layers if m.weight.shape[0] == labels}


def _configuration(model: nn.Module, classifiers: set[str]) -> str:
    """A hash over every module's class and plain attributes: numbers of heads, epsilons, activations, strides, and whatever else shapes do not show.

    Tensors count by type and shape: those that are not saved are computed from such attributes.
    """
    known: dict[int, str] = {}
    lines = []
    for name, module in model.named_modules():
        lines.append(f"{name} {type(module).__module__}.{type(module).__qualname__}")
        for key, value in vars(module).items():
            if key in OTHER or (name in classifiers and key in ("out_features", "out_channels")):
                continue
            lines.append(f"{name}.{key} = {_plain(value, known)}")
    return _hash(lines)


def _plain(value: Any, known: dict[int, str], depth: int = DEPTH) -> str:
    """Text that is equal for equal values. ``known`` holds what was said of objects that many modules share, such as a config."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    if isinstance(value, functools.partial):
        return f"partial({_plain((value.func, value.args, value.keywords), known, depth)})"
    if isinstance(value, types.MethodType):
        return _plain(value.__func__, known, depth)
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or ()]
        inside = _plain([cells, value.__defaults__], known, depth - 1) if depth else ""
        return f"{value.__module__}.{value.__qualname__}:{value.__code__.co_firstlineno}({inside})"
    if not depth:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{k!r}: {_plain(v, known, depth - 1)}' for k, v in value.items()))}}}"
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_plain(v, known, depth - 1) for v in value]
        return f"[{', '.join(sorted(items) if isinstance(value, (set, frozenset)) else items)}]"
    if id(value) not in known:
        known[id(value)] = type(value).__qualname__
        attributes = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in CONFIG_OTHER}
        known[id(value)] += _plain(attributes, known, depth - 1)
    return known[id(value)]


def _timm() -> dict[str, Build]:
    timm = import_package("timm")
    return {f"timm:{name}": functools.partial(timm_model, name) for name in timm.list_models()}


def _torchvision() -> dict[str, Build]:
    models = import_module("torchvision.models")
    quantized = set(models.list_models(module=models.quantization))
    names = [n for n in models.list_models() if n not in quantized]
    return {f"torchvision:{name}": functools.partial(torchvision_model, name) for name in names}


def _transformers() -> dict[str, Build]:
    """Each model type with its default config, in each class that one of the automatic classes makes of it; ``transformers:TYPE`` alone is the bare model."""
    transformers = import_package("transformers")
    modeling_auto = import_module("transformers.models.auto.modeling_auto")

    def build(model_type: str, name: str) -> nn.Module:
        model: nn.Module = getattr(transformers, name)(transformers.AutoConfig.for_model(model_type))
        return model

    tables = {k: v for k, v in vars(modeling_auto).items() if k.startswith("MODEL_") and k.endswith("MAPPING_NAMES")}
    bare = {t: c if isinstance(c, str) else c[0] for t, c in tables["MODEL_MAPPING_NAMES"].items()}
    pairs = {
        (t, c)
        for table in tables.values()
        for t, found in table.items()
        for c in ([found] if isinstance(found, str) else found)
    }
    return {
        f"transformers:{t}" + ("" if bare.get(t) == c else f":{c}"): functools.partial(build, t, c)
        for t, c in sorted(pairs, key=lambda pair: (bare.get(pair[0]) != pair[1], pair))
    }
