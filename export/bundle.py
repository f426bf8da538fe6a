"""Writing a bundle: every piece as its own graph, weights once per block, the manifest last, the folder renamed at the end."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from diffusionblocks.export.graph import Exporter, Piece
from diffusionblocks.export.weights import WeightFiles
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.files import FileRecord, sha256_of
from diffusionblocks.runtime.manifest import (
    BlockRecord,
    Decoding,
    DenoiserRecord,
    GraphRecord,
    Manifest,
    TargetRecord,
    TensorSpec,
)

PROBE = "probe.npz"
UNDER_WAY = "train/run"
"""What a training that is not finished writes: the manifest does not record it."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class BlockParts:
    """The pieces of one block; ``stem`` and ``head`` only where it owns copies; ``context`` None where the original is not kept."""

    units: tuple[str, ...]
    sigma: tuple[float, ...]
    context: Piece | None
    block: Piece | None
    stem: Piece | None
    head: Piece | None
    parameters: int


@dataclass(frozen=True)
class TargetParts:
    """The target: its sampling step as a piece, and what describes it (see ``TargetRecord``)."""

    piece: Piece
    kind: str
    num_classes: int
    dim: int
    sigma_data: float
    evidence: str
    positions: tuple[int, ...] = ()
    axis: int = 1
    denoiser: DenoiserRecord | None = None


@dataclass(frozen=True)
class NetworkParts:
    """A whole network, ready to be written. ``probe`` maps ``input.NAME``, ``exact.NAME``, ``denoise.prediction`` to arrays."""

    stem: Piece
    head: Piece
    blocks: tuple[BlockParts, ...]
    target: TargetParts | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    task: str
    context: str
    tune: str
    trained: bool
    exact: bool
    schedule: dict[str, Any]
    decoding: Decoding
    source: dict[str, Any]
    probe: Mapping[str, np.ndarray[Any, Any]]
    preprocessing: dict[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    training: dict[str, Any] | None = None


class HasParts(Protocol):
    """Anything that can be taken apart, such as a converted network."""

    def parts(self) -> NetworkParts: ...


def export_bundle(
    network: NetworkParts | HasParts,
    out: str | Path,
    *,
    force: bool = False,
    extra: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a bundle.

    Args:
        network: a converted network, or its parts.
        out: the folder to make; refused where it exists, unless ``force``, which replaces it once the new one is whole.
        extra: writes further files into the (temporary) folder before the manifest is made.
        progress: called with what is being written.

    Raises:
        BadInput: the folder exists, cannot be written, or the disk is full. Nothing half-written is left.
    """
    target = Path(out)
    if target.exists() and not force:
        raise BadInput(f"{target} exists already.", hint="Give another --out, or --force to replace it.")
    parts = network if isinstance(network, NetworkParts) else network.parts()
    with _building(target) as folder:
        manifest = _write(parts, folder, extra, progress)
        manifests.write(manifest, folder)
        manifests.read(folder)
        _replace(folder, target)
    return target


@contextmanager
def _building(target: Path) -> Iterator[Path]:
    folder: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield folder
    except OSError as error:
        written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder is not None else 0
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BadInput(
                f"The disk is full (or a file is larger than it allows): {format_bytes(written)} of the bundle {target} had been written.",
                hint="Free some space or give an --out on another disk; nothing was left behind.",
            ) from error
        raise BadInput(f"{target} cannot be written: {error}", hint="Give an --out that you may write to.") from error
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def _replace(folder: Path, target: Path) -> None:
    os.chmod(folder, 0o755)
    if not target.exists():
        os.rename(folder, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    os.rename(target, aside / "old")
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(aside / "old", target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(
    parts: NetworkParts, folder: Path, extra: Callable[[Path], None] | None, progress: Progress | None
) -> Manifest:
    export, files_of = Exporter(), WeightFiles(folder)
    if progress is not None:
        progress("graphs")
    export.prepare(_pieces(parts))

    def graph(piece: Piece, name: str) -> GraphRecord:
        return _save(export, files_of, name, [(piece, name)], progress)[0]

    stem, head = graph(parts.stem, "stem"), graph(parts.head, "head")
    blocks = []
    for b, block in enumerate(parts.blocks):
        pair = [(p, f"{n}_{b:02d}") for p, n in ((block.context, "context"), (block.block, "block")) if p is not None]
        records = dict(
            zip([name for _, name in pair], _save(export, files_of, f"block_{b:02d}", pair, progress), strict=True)
        )
        blocks.append(
            BlockRecord(
                index=b,
                units=block.units,
                sigma=block.sigma,
                context=records.get(f"context_{b:02d}"),
                block=records.get(f"block_{b:02d}"),
                stem=None if block.stem is None else graph(block.stem, f"stem_{b:02d}"),
                head=None if block.head is None else graph(block.head, f"head_{b:02d}"),
                parameters=block.parameters,
                bytes=_size(folder / f"block_{b:02d}.bin"),
            )
        )
    target = None
    if parts.target is not None:
        t = parts.target
        made = graph(t.piece, "target")
        target = TargetRecord(
            t.kind,
            t.num_classes,
            t.dim,
            t.sigma_data,
            t.evidence,
            made,
            positions=t.positions,
            axis=t.axis,
            denoiser=t.denoiser,
        )
    np.savez(folder / PROBE, **parts.probe)  # type: ignore[arg-type]
    if extra is not None:
        extra(folder)
    files = {
        str(p.relative_to(folder).as_posix()): FileRecord(sha256_of(p), p.stat().st_size)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.is_relative_to(folder / UNDER_WAY)
    }
    return Manifest(
        format=manifests.FORMAT,
        versions={
            name: importlib.metadata.version(name)
            for name in ("diffusionblocks", "torch", "onnx", "onnxscript", "numpy")
        },
        source=parts.source,
        task=parts.task,
        context=parts.context,
        tune=parts.tune,
        trained=parts.trained,
        exact=parts.exact,
        inputs=parts.inputs,
        outputs=parts.outputs,
        stem=stem,
        head=head,
        blocks=tuple(blocks),
        target=target,
        schedule=parts.schedule,
        decoding=parts.decoding,
        class_names=parts.class_names,
        preprocessing=parts.preprocessing,
        training=parts.training,
        probe=PROBE,
        files=files,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _pieces(parts: NetworkParts) -> list[Piece]:
    found = [parts.stem, parts.head, *([] if parts.target is None else [parts.target.piece])]
    for block in parts.blocks:
        found += [piece for piece in (block.context, block.block, block.stem, block.head) if piece is not None]
    return found


def _save(
    export: Exporter, files: WeightFiles, stem: str, pieces: list[tuple[Piece, str]], progress: Progress | None
) -> list[GraphRecord]:
    """Export pieces that share one weights file ``stem.bin``."""
    graphs = []
    for piece, name in pieces:
        if progress is not None:
            progress(f"{name}.onnx")
        graphs.append(export.apart(piece))
    own = f"{stem}.bin"
    files.store(graphs, own)
    records = []
    for (model, _), (piece, name) in zip(graphs, pieces, strict=True):
        onnx.save(model, files.folder / f"{name}.onnx")
        external = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
        read = sum({(e["location"], e["offset"]): int(e["length"]) for e in external}.values())
        locations = {e["location"] for e in external}
        weights = own if own in locations else None
        shared = tuple(sorted(locations - {own}))
        records.append(GraphRecord(f"{name}.onnx", weights, piece.inputs, piece.outputs, read, shared))
    return records
