"""Writing a bundle: every piece as its own graph, weights once per block, the manifest last, the folder renamed at the end."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from diffusionblocks.export.continuing import cached_pieces
from diffusionblocks.export.graph import Apart, CachedPiece, Exporter, Piece
from diffusionblocks.export.positions import NoForm
from diffusionblocks.export.replacing import clear_litter, replace, scratch_folder
from diffusionblocks.export.report_page import add_page
from diffusionblocks.export.structures import Structures
from diffusionblocks.export.verify import compare_cached
from diffusionblocks.export.weights import WeightFiles
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.errors import BadInput, DiffusionBlocksError
from diffusionblocks.runtime.files import FileRecord, sha256_of
from diffusionblocks.runtime.manifest import (
    BlockRecord,
    CachedRecord,
    Decoding,
    DenoiserRecord,
    GraphRecord,
    Manifest,
    MaskingRecord,
    TargetRecord,
    TensorRecord,
    TensorSpec,
)

PROBE = "probe.npz"
log = logging.getLogger(__name__)
ANEW = "a text is computed anew for each of its tokens"
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
    masking: MaskingRecord | None = None


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
    applications: int = 1


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
    dtype: str = "float32",
) -> Path:
    """Write a bundle.

    Args:
        network: a converted network, or its parts.
        out: the folder to make; refused where it exists, unless ``force``, which replaces it once the new one is whole.
        extra: writes further files into the (temporary) folder before the manifest is made.
        progress: called with what is being written.
        dtype: ``float32``, or ``float16``, in which weights take half the bytes and a GPU computes faster.

    Raises:
        BadInput: the folder exists, cannot be written, or the disk is full. Nothing half-written is left.
    """
    target = Path(out)
    if dtype not in ("float32", "float16"):
        raise BadInput(f"The dtype {dtype!r} is not known.", hint="Use float32 or float16.")
    if target.exists() and not force:
        raise BadInput(f"{target} exists already.", hint="Give another --out, or --force to replace it.")
    parts = network if isinstance(network, NetworkParts) else network.parts()
    with building(target) as folder:
        manifest = _write(parts, folder, extra, progress, dtype)
        manifests.write(manifest, folder)
        if manifest.cached_graphs():
            _check_cached(manifest, folder, parts.probe, progress)
        add_page(folder, name=target.name)  # the folder has another name until it is whole
        os.chmod(folder, 0o755)
        replace(folder, target)
    return target


@contextmanager
def building(target: Path, what: str = "bundle") -> Iterator[Path]:
    """A folder beside ``target`` to write in, which is gone at the end unless it was renamed.

    Raises:
        BadInput: what the system says of a disk that is full or a place that cannot be written to.
    """
    folder: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_litter(target)
        folder = scratch_folder(target)
        yield folder
    except OSError as error:
        written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder is not None else 0
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BadInput(
                f"The disk is full (or a file is larger than it allows): {format_bytes(written)} of the {what} {target} had been written.",
                hint="Free some space or give an --out on another disk; nothing was left behind.",
            ) from error
        raise BadInput(f"{target} cannot be written: {error}", hint="Give an --out that you may write to.") from error
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def _write(
    parts: NetworkParts,
    folder: Path,
    extra: Callable[[Path], None] | None,
    progress: Progress | None,
    dtype: str,
) -> Manifest:
    writer = _Writer(folder, progress, half=dtype == "float16")
    writer.facts = {"task": parts.task}
    if progress is not None:
        progress("graphs")
    writer.export.prepare(_pieces(parts))
    writer.prepare_cached(parts)
    stem, head = writer.graph(parts.stem, "stem"), writer.graph(parts.head, "head")
    blocks = []
    for b, block in enumerate(parts.blocks):
        writer.facts = {"task": parts.task, "block": str(b), "units": json.dumps(block.units)}
        if block.sigma:
            writer.facts["sigma"] = json.dumps(block.sigma)
        pair = [(p, f"{n}_{b:02d}") for p, n in ((block.context, "context"), (block.block, "block")) if p is not None]
        records = dict(zip([name for _, name in pair], writer.graphs(f"block_{b:02d}", pair), strict=True))
        blocks.append(
            BlockRecord(
                index=b,
                units=block.units,
                sigma=block.sigma,
                context=records.get(f"context_{b:02d}"),
                block=records.get(f"block_{b:02d}"),
                stem=None if block.stem is None else writer.graph(block.stem, f"stem_{b:02d}"),
                head=None if block.head is None else writer.graph(block.head, f"head_{b:02d}"),
                parameters=block.parameters,
                bytes=_size(folder / f"block_{b:02d}.bin"),
            )
        )
    target = None
    writer.facts = {"task": parts.task}
    if parts.target is not None:
        t = parts.target
        made = writer.graph(t.piece, "target", exact=True)
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
            masking=t.masking,
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
        dtype=dtype,
        applications=parts.applications,
        files=files,
    )


def _check_cached(
    manifest: Manifest, folder: Path, probe: Mapping[str, np.ndarray[Any, Any]], progress: Progress | None
) -> None:
    """Take the graphs for new positions out again where they do not compute what the whole graphs do."""
    if progress is not None:
        progress("graphs for new positions")
    inputs = {name.removeprefix("input."): a for name, a in probe.items() if name.startswith("input.")}
    try:
        failed = [f"{check.name}: {check.detail}" for check in compare_cached(folder, inputs, probe) if not check.ok]
    except DiffusionBlocksError as error:
        failed = [str(error)]
    if not failed:
        return
    log.warning("keys and values cannot be kept: %s; %s", failed[0], ANEW)
    used = {name for graph in manifest.graphs() for name in (graph.file, graph.structure)}
    gone = {name for graph in manifest.cached_graphs() for name in (graph.file, graph.structure) if name} - used
    for name in gone:
        (folder / name).unlink()
    files = {name: record for name, record in manifest.files.items() if name not in gone}
    manifests.write(dataclasses.replace(_without_cached(manifest), files=files), folder)


def _without_cached(record: Any) -> Any:
    """A record of the manifest, none of its graphs with a form for new positions."""
    if isinstance(record, tuple):
        return tuple(map(_without_cached, record))
    if not dataclasses.is_dataclass(record) or isinstance(record, type):
        return record
    held = {f.name: _without_cached(getattr(record, f.name)) for f in dataclasses.fields(record)}
    return dataclasses.replace(record, **held | ({"cached": None} if isinstance(record, GraphRecord) else {}))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _pieces(parts: NetworkParts) -> list[Piece]:
    found = [parts.stem, parts.head, *([] if parts.target is None else [parts.target.piece])]
    for block in parts.blocks:
        found += [piece for piece in (block.context, block.block, block.stem, block.head) if piece is not None]
    return found


class _Writer:
    """Writes the graphs of one folder, their weights and their structures."""

    def __init__(self, folder: Path, progress: Progress | None, *, half: bool) -> None:
        self.folder, self.progress = folder, progress
        self.export, self.weights = Exporter(half=half), WeightFiles(folder)
        self.exact = Exporter() if half else self.export
        self.structures = Structures(folder, self.weights)
        self.version = importlib.metadata.version("diffusionblocks")
        self.facts: dict[str, str] = {}
        self.cached: dict[int, CachedPiece] = {}

    def prepare_cached(self, parts: NetworkParts) -> None:
        """Find the graphs for new positions of a language model; they are written where every piece has one."""
        try:
            self.cached = cached_pieces(self.export, parts, self.exact)
        except NoForm as error:
            log.warning("keys and values cannot be kept: %s; %s", error, ANEW)

    def graph(self, piece: Piece, name: str, *, exact: bool = False) -> GraphRecord:
        """One piece with a weights file of its own; ``exact``: in float32 whatever the others are."""
        return self.graphs(name, [(piece, name)], exact=exact)[0]

    def graphs(self, stem: str, pieces: Sequence[tuple[Piece, str]], *, exact: bool = False) -> list[GraphRecord]:
        """Pieces that share one weights file ``stem.bin``."""
        graphs = []
        for piece, name in pieces:
            if self.progress is not None:
                self.progress(f"{name}.onnx")
            graphs.append((self.exact if exact else self.export).apart(piece))
        forms = {name: self.cached[id(piece)] for piece, name in pieces if id(piece) in self.cached}
        graphs += [form.apart() for form in forms.values()]
        layouts = self.weights.store(graphs, f"{stem}.bin")
        named = [*pieces, *((form.piece, f"{name}_cached") for name, form in forms.items())]
        records = [
            self._save(graph, layout, f"{stem}.bin", piece, name)
            for graph, layout, (piece, name) in zip(graphs, layouts, named, strict=True)
        ]
        found = dict(zip([name for _, name in pieces], records, strict=False))
        for (name, form), record in zip(forms.items(), records[len(pieces) :], strict=True):
            found[name] = dataclasses.replace(found[name], cached=CachedRecord(record, form.caches))
        return list(found.values())

    def _save(self, graph: Apart, layout: tuple[TensorRecord, ...], own: str, piece: Piece, name: str) -> GraphRecord:
        facts = {"version": self.version, "format": str(manifests.FORMAT), "part": name.split("_")[0], **self.facts}
        onnx.helper.set_model_props(graph.model, {f"diffusionblocks.{key}": said for key, said in facts.items()})
        onnx.save(graph.model, self.folder / f"{name}.onnx")
        external = [{e.key: e.value for e in t.external_data} for t in graph.model.graph.initializer if t.external_data]
        locations = {e["location"] for e in external} | {t.file for t in layout if t.file is not None}
        return GraphRecord(
            f"{name}.onnx",
            own if own in locations else None,
            piece.inputs,
            piece.outputs,
            sum({(e["location"], e["offset"]): int(e["length"]) for e in external}.values()),
            tuple(sorted(locations - {own})),
            self.structures.file_of(graph) if layout else None,
            layout,
            graph.template.row_bytes,
        )
