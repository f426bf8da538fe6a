"""Which architecture weights are of, by their names and shapes: every architecture of timm, torchvision and transformers is compared.

Shapes do not show everything (numbers of heads, epsilons, activations, strides), so a match is used only where one architecture remains; architectures that
agree in all of that too are one network. The index is made once per version of a package and kept in the user's cache folder.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusionblocks.converter import architectures
from diffusionblocks.converter.architectures import (
    COUNTER,
    Entry,
    Package,
    Shape,
    describe_all,
    names_hash,
    patterns_of,
    shapes_hash,
)
from diffusionblocks.converter.saved import one_line
from diffusionblocks.runtime.caches import cache_file
from diffusionblocks.runtime.errors import BadInput

log = logging.getLogger(__name__)

FORMAT = 1  # of the cache, and of what its hashes are computed over
LISTED, NEAREST = 10, 5
WAY_OUT = (
    "Name it: --arch timm:NAME, --arch torchvision:NAME, --arch transformers:TYPE or --arch package.module:factory."
)


@dataclass(frozen=True)
class Index:
    """Entries of all packages, and how many architectures could not be built."""

    entries: tuple[Entry, ...]
    skipped: int


def recognise(name: str, readings: Sequence[Mapping[str, torch.Tensor]]) -> str | None:
    """The spec of the one architecture that weights are of; it is said in a warning.

    Args:
        name: of the file, for messages.
        readings: the weights by name, once for each way of reading their names (as they are, without a prefix).

    Returns:
        None where no package of architectures is installed.

    Raises:
        BadInput: no architecture fits (the nearest are named), or several do that differ in what shapes do not show.
    """
    index = load_index(architectures.installed())
    if not index.entries:
        return None
    shapes = [_shapes(weights) for weights in readings]
    fitting = list(dict.fromkeys(entry for reading in shapes for entry in matches(index.entries, reading)))
    if not fitting:
        raise BadInput(_unknown(name, shapes, index), hint=WAY_OUT)
    networks: dict[str, list[str]] = {}
    for entry in fitting:
        networks.setdefault(entry.configuration, []).append(entry.spec)
    if len(networks) > 1:
        listed = [" = ".join(specs) for specs in networks.values()]
        raise BadInput(
            f"The {len(shapes[0])} weights in {name} fit {len(networks)} architectures, which differ in what names and shapes do not show "
            f"(heads, activations, epsilons, strides): {_some(listed, LISTED)}.",
            hint=f"Name the one they were trained with, for example --arch {fitting[0].spec}",
        )
    spec, *same = next(iter(networks.values()))
    also = f" (the same network as {_some(same, LISTED)})" if same else ""
    log.warning(
        "%s: recognised as %s%s by the names and shapes of its %d weights; --arch overrides this.",
        name,
        spec,
        also,
        len(shapes[0]),
    )
    return spec


def matches(entries: Iterable[Entry], shapes: Mapping[str, Shape]) -> list[Entry]:
    """The entries with exactly these names and shapes; a classifier may have any number of classes, the same for all its weights."""
    found = []
    hashes: dict[frozenset[str], str] = {}
    for entry in entries:
        tied = frozenset(entry.tied).intersection(shapes)
        if tied not in hashes:
            hashes[tied] = names_hash({k: s for k, s in shapes.items() if k not in tied})
        if hashes[tied] != entry.names:
            continue
        kept = {k: s for k, s in shapes.items() if k not in tied}
        classes = {kept[k][:1] for k in entry.classifier}
        if len(classes) <= 1 and shapes_hash(kept, entry.classifier) == entry.shapes:
            found.append(entry)
    return found


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {k: tuple(v.shape) for k, v in weights.items() if not k.endswith(COUNTER)}


def _some(items: Sequence[str], limit: int) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _unknown(name: str, readings: Sequence[Mapping[str, Shape]], index: Index) -> str:
    """What is said where nothing fits: the architectures that share most names, those of about the same size first."""
    ranked: list[tuple[float, float, str, str]] = []
    for shapes in readings:
        patterns, size = patterns_of(shapes), max(sum(torch.Size(s).numel() for s in shapes.values()), 1)
        for entry in index.entries:
            shared = sum(min(count, entry.patterns.get(p, 0)) for p, count in patterns.items())
            union = len(shapes) + sum(entry.patterns.values()) - shared
            ratio = max(entry.size, 1) / size
            what = "every name, other shapes" if shared == union else f"{shared} of {union} names"
            if shared:
                ranked.append((-shared / union, max(ratio, 1 / ratio), entry.spec, what))
    near = {spec: what for *_, spec, what in sorted(ranked, reverse=True)}
    best = list(near.items())[::-1][:NEAREST]
    left = f" ({index.skipped} could not be built and were not compared)" if index.skipped else ""
    return (
        f"{name} holds {len(readings[0])} weights, but no architecture, and none of {len(index.entries)} known ones{left} has their names and shapes.\n"
        f"The nearest: {', '.join(f'{spec} ({what})' for spec, what in best) or 'none shares a name'}."
    )


def load_index(packages: Sequence[Package]) -> Index:
    """The index of these packages: from the cache where it has their versions; what is missing is built and kept.

    A cache that cannot be read is built again, one that cannot be written is done without, and a package that cannot be imported is left out.
    """
    path = cache_file()
    kept = _read(path)
    entries: list[Entry] = []
    skipped = 0
    for package in packages:
        version = f"{package.version}, torch {torch.__version__}"
        found = _unpacked(kept.get(package.name), version)
        if found is None:
            try:
                found = describe_all(package)
            except Exception as error:  # whatever an import raises
                log.warning(
                    "%s cannot be imported, so its architectures are not compared: %s", package.name, one_line(error)
                )
                continue
            kept[package.name] = _packed(version, *found)
            _write(path, kept)
        entries += found[0]
        skipped += found[1]
    return Index(tuple(entries), skipped)


def _read(path: Path) -> dict[str, Any]:
    """What the cache holds of each package, unchecked; nothing where it is missing, broken or of another format."""
    try:
        data = json.loads(gzip.decompress(path.read_bytes()))
        return dict(data["packages"]) if data["format"] == FORMAT else {}
    except FileNotFoundError:
        return {}
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        log.debug("%s is made again: %s", path, error)
        return {}


def _write(path: Path, packages: Mapping[str, Any]) -> None:
    """The whole file or nothing of it."""
    data = gzip.compress(json.dumps({"format": FORMAT, "packages": packages}).encode(), 6, mtime=0)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            temporary = file.name
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("The index of architectures cannot be kept in %s, and will be made again: %s", path.parent, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _packed(version: str, entries: Sequence[Entry], skipped: int) -> dict[str, Any]:
    """As JSON: the patterns of all entries in one list, and what each entry has of them as (position, count) in one flat list."""
    patterns = {p: i for i, p in enumerate(dict.fromkeys(p for entry in entries for p in entry.patterns))}
    rows = [
        {**vars(entry), "patterns": [n for p, count in entry.patterns.items() for n in (patterns[p], count)]}
        for entry in entries
    ]
    return {"version": version, "skipped": skipped, "patterns": list(patterns), "entries": rows}


def _unpacked(data: Any, version: str) -> tuple[list[Entry], int] | None:
    """None where it is of another version, or not what :func:`_packed` made."""
    try:
        if data["version"] != version:
            return None
        patterns = data["patterns"]
        entries = []
        for row in data["entries"]:
            flat = row["patterns"]
            counts = {str(patterns[i]): int(n) for i, n in zip(flat[::2], flat[1::2], strict=True)}
            fields: dict[str, Any] = {k: str(row[k]) for k in ("spec", "names", "shapes", "configuration")}
            fields |= {k: tuple(map(str, row[k])) for k in ("tied", "classifier")}
            entries.append(Entry(**fields, size=int(row["size"]), patterns=counts))
        return entries, int(data["skipped"])
    except (KeyError, TypeError, ValueError, IndexError):
        return None
