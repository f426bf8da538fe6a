"""``manifest.json``: what a bundle holds, read strictly. docs/bundle.md specifies it, docs/manifest.schema.json pins it."""

from __future__ import annotations

import json
import math
import types
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from diffusionblocks.runtime.errors import BundleError, FormatError
from diffusionblocks.runtime.files import FileRecord, safe_name

FORMAT = 1
NAME = "manifest.json"
LIMIT = 64 << 20
PAST, PRESENT, POSITION = "past", "present", "position"
MOST_STEPS, MOST_DIMENSIONS, ALIGNED = 100_000, 32, 64
SIZES = {"bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2}
SIZES |= {"int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8}
"""Bytes of an element, by type."""


@dataclass(frozen=True)
class TensorRecord:
    """A weight that a structure takes as the input ``input``: its file (None where it has no elements), offset in bytes, type in NumPy's words (or bfloat16), shape."""

    input: str
    file: str | None
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * SIZES[self.dtype]


@dataclass(frozen=True)
class GraphRecord:
    """An ONNX graph: its file, its weights file, the names of its inputs and outputs in order, the bytes of weights it reads.

    ``shared``: other weights files it reads, where it has weights in common with an earlier graph.
    ``structure``: the graph without its weights, which are inputs of it: the i-th input is ``in.i``, the i-th output ``out.i``, and ``tensors`` are the weights.
    ``row_bytes``: the most bytes of intermediate values at once, for one row of the batch; 0 where that is not known.
    ``cached``: the same for new positions of a text only.
    """

    file: str
    weights: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes: int
    shared: tuple[str, ...] = ()
    structure: str | None = None
    tensors: tuple[TensorRecord, ...] = ()
    row_bytes: int = 0
    cached: CachedRecord | None = None

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Every weights file it reads."""
        return self.shared if self.weights is None else (self.weights, *self.shared)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the whole network; ``shape[0]`` is ``"batch"``, but for an output of the whole batch, such as a loss; ``dtype`` in NumPy's words."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class CachedRecord:
    """A graph for new positions of a text: its inputs are the whole graph's (at the new positions), the caches ``past.K``, and ``position`` int64 [2], how many positions there were before and are there with the new ones.
    Its outputs are the whole graph's and ``present.K``, the caches with the new positions.

    ``caches``: what it keeps, such as keys and values; of its dimensions ``past`` is how many positions there were, ``batch`` and ``K*batch`` grow with the batch.
    """

    graph: GraphRecord
    caches: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class BlockRecord:
    """One block: units by module name, the sigma interval (upper, lower), graphs; ``stem``/``head`` only where it owns copies."""

    index: int
    units: tuple[str, ...]
    sigma: tuple[float, ...]
    context: GraphRecord | None
    block: GraphRecord | None
    stem: GraphRecord | None
    head: GraphRecord | None
    parameters: int
    bytes: int


@dataclass(frozen=True)
class DenoiserRecord:
    """A diffusion model's own input: what its output means (``eps``, ``v``, ``x0``, ``edm``), the names of its noisy input and of its time, and the noise levels
    of its time steps, ascending (none for ``edm``)."""

    parameterisation: str
    input: str
    time: str
    sigmas: tuple[float, ...] = ()


@dataclass(frozen=True)
class MaskingRecord:
    """A masked language model's own tokens: the one that stands for a hidden token, the name of the input they are, and of the one that is 0 at positions left out ('' for none)."""

    token: int
    input: str
    mask: str = ""


@dataclass(frozen=True)
class TargetRecord:
    """What is denoised, as z [N, *positions, dim].

    ``kind``: ``label``, a row of a table of ``num_classes`` rows and ``dim`` columns; ``bits``, yes or no for each of ``num_classes``; ``features``, numbers;
    ``denoiser``, the network's own noisy input, z laid as that is; ``masked``, its own tokens, of which some are hidden, z int64 [N, dim].
    ``axis``: the prediction's dimension of classes or features, 0 where a sample's prediction is one number.
    """

    kind: str
    num_classes: int
    dim: int
    sigma_data: float
    evidence: str
    graph: GraphRecord
    positions: tuple[int, ...] = ()
    axis: int = 1
    denoiser: DenoiserRecord | None = None
    masking: MaskingRecord | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample of z."""
        return (*self.positions, self.dim)


@dataclass(frozen=True)
class Decoding:
    """What ``run`` does by default: mode exact or denoise, z from its mean or from noise, read last or mean, number of steps."""

    mode: str
    start: str
    read: str
    steps: int


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says of itself; ``dtype`` is what the graphs compute in, ``float32`` or ``float16`` (their inputs and outputs are float32).

    ``applications``: how often the original applies the units of its only block, where they are a loop.
    """

    format: int
    versions: dict[str, Any]
    source: dict[str, Any]
    task: str
    context: str
    tune: str
    trained: bool
    exact: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    stem: GraphRecord
    head: GraphRecord
    blocks: tuple[BlockRecord, ...]
    target: TargetRecord | None
    schedule: dict[str, Any]
    decoding: Decoding
    class_names: tuple[str, ...] | None = None
    preprocessing: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    probe: str | None = None
    dtype: str = "float32"
    applications: int = 1
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def edges(self) -> tuple[float, ...]:
        """Noise levels between blocks, descending, B + 1 values."""
        return tuple(float(e) for e in self.schedule["edges"])

    def graphs(self) -> tuple[GraphRecord, ...]:
        """Every graph of the bundle, but for those of new positions."""
        found = [self.stem, self.head]
        for block in self.blocks:
            found += [g for g in (block.context, block.block, block.stem, block.head) if g is not None]
        return tuple([*found, self.target.graph] if self.target is not None else found)

    def cached_graphs(self) -> tuple[GraphRecord, ...]:
        """Those of new positions."""
        return tuple(graph.cached.graph for graph in self.graphs() if graph.cached is not None)


def write(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest.json`` into ``folder``."""
    (folder / NAME).write_text(json.dumps(asdict(manifest), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """Read and check a bundle's manifest.

    Raises:
        BundleError: no manifest, not JSON, another format, a key that is missing, unknown or of another type, an unsafe file name.
    """
    try:
        return _read(folder)
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error}", hint="Give the folder that dbconvert wrote.") from error


def _read(folder: Path) -> Manifest:
    path = folder / NAME
    if not folder.is_dir():
        raise BundleError(
            f"{folder} is not a bundle: there is no such folder.", hint="Give the folder that dbconvert wrote."
        )
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {NAME}.", hint="Give the folder that dbconvert wrote.")
    if path.stat().st_size > LIMIT:
        raise BundleError(f"{path} has {path.stat().st_size} bytes; a manifest has at most {LIMIT}.")
    try:
        data = strict_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, MemoryError) as error:
        said = str(error)[:300]
        raise BundleError(f"{path} is not JSON: {said}", hint="Copy the bundle again, or export it again.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        newer = isinstance(found, int) and found > FORMAT
        raise FormatError(
            f"{path} has the format {found!r}; this version reads format {FORMAT}.",
            hint="Upgrade diffusionblocks: a newer version made this bundle."
            if newer
            else "Export the bundle again, or use the version of diffusionblocks that made it.",
        )
    manifest = _build(Manifest, data, "manifest")
    _check(manifest)
    return manifest


def strict_json(text: str) -> Any:
    """JSON without what readers take differently: a key said twice, numbers that are not finite, whole numbers beyond 64 bits.

    Raises:
        ValueError: one of those, or no JSON.
        RecursionError: lists in lists in lists.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object says a key twice, among {', '.join(list(found)[:4])}")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text[:40])


def _whole(text: str) -> int:
    return int(text) if len(text) < 20 and abs(int(text)) < 1 << 63 else _no_number(text[:40])


def _check(manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        safe_name(name)
        if record.bytes < 0:
            raise BundleError(f"The manifest says that {name} has {record.bytes} bytes.")
    if len({unicodedata.normalize("NFC", name).casefold() for name in manifest.files}) < len(manifest.files):
        raise BundleError("The manifest names files that are one where upper and lower case are.")
    _check_values(manifest)
    _check_cached(manifest)
    for graph in (*manifest.graphs(), *manifest.cached_graphs()):
        for file in (graph.file, *graph.weight_files):
            if safe_name(file) not in manifest.files:
                raise BundleError(f"The manifest records no hash for {file}.", hint="Export the bundle again.")
        _check_tensors(manifest, graph)
    if manifest.applications < 1 or (manifest.applications > 1 and len(manifest.blocks) != 1):
        raise BundleError(
            f"The manifest says {manifest.applications} applications of {len(manifest.blocks)} blocks; a loop is one block."
        )
    if [b.index for b in manifest.blocks] != list(range(len(manifest.blocks))) or not manifest.blocks:
        raise BundleError("The manifest's blocks are not numbered 0, 1, ....")
    if manifest.target is not None:
        edges: Any = manifest.schedule.get("edges")
        numbers = isinstance(edges, list) and all(isinstance(e, int | float) and e > 0 for e in edges)
        descending = isinstance(edges, list) and numbers and sorted(edges, reverse=True) == edges
        if not descending or len(edges) != len(manifest.blocks) + 1:
            raise BundleError("The manifest's schedule does not hold one descending edge more than there are blocks.")
    if manifest.target is not None and min(manifest.target.shape) < 1:
        raise BundleError("The manifest's target has a size below 1.")
    if manifest.target is not None:
        _check_denoiser(manifest, manifest.target)
        _check_masking(manifest, manifest.target)
    for what, value, allowed in (
        (
            "target.kind",
            "label" if manifest.target is None else manifest.target.kind,
            ("label", "bits", "features", "denoiser", "masked"),
        ),
        ("dtype", manifest.dtype, ("float32", "float16")),
        ("context", manifest.context, ("stem", "frozen", "carry")),
        ("decoding.mode", manifest.decoding.mode, ("exact", "denoise")),
        ("decoding.start", manifest.decoding.start, ("mean", "noise")),
        ("decoding.read", manifest.decoding.read, ("last", "mean")),
    ):
        if value not in allowed:
            raise BundleError(f"The manifest's {what} is {value!r}; known are {', '.join(allowed)}.")


def _check_values(manifest: Manifest) -> None:
    for what, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        if not specs or len({spec.name for spec in specs}) < len(specs):
            raise BundleError(f"The manifest's {what} have no names of their own, or there are none.")
    for spec in manifest.inputs:
        sizes = all(isinstance(size, str) or size >= 0 for size in spec.shape)
        if spec.shape[:1] != ("batch",) or spec.dtype not in SIZES or not sizes:
            raise BundleError(f"The manifest's input {spec.name} is {spec.dtype} {list(spec.shape)}.")
    if not 1 <= manifest.decoding.steps <= MOST_STEPS:
        raise BundleError(f"The manifest decodes in {manifest.decoding.steps} steps; known are 1 to {MOST_STEPS}.")
    for graph in (*manifest.graphs(), *manifest.cached_graphs()):
        if min(graph.bytes, graph.row_bytes) < 0 or not graph.inputs or not graph.outputs:
            raise BundleError(f"The manifest's graph {graph.file} has sizes below 0, or no inputs or outputs.")
        if not all(file.endswith(".onnx") for file in (graph.file, graph.structure or ".onnx")):
            raise BundleError(f"The manifest's graph {graph.file} is no .onnx.")
    for graph, names in _made_by(manifest):
        if not names <= set(graph.outputs):
            raise BundleError(
                f"The manifest's graph {graph.file} does not make {', '.join(sorted(names - set(graph.outputs)))}."
            )
    tokenizer = (manifest.preprocessing or {}).get("tokenizer")
    if tokenizer is not None and (not isinstance(tokenizer, str) or not safe_name(tokenizer)):
        raise BundleError("The manifest's tokenizer is no name of a file.")


def _check_cached(manifest: Manifest) -> None:
    for whole in manifest.graphs():
        if whole.cached is None:
            continue
        graph, caches = whole.cached.graph, whole.cached.caches
        names = [f"{PAST}.{k}" for k in range(len(caches))]
        made = tuple(f"{PRESENT}.{k}" for k in range(len(caches)))
        fits = graph.inputs == (*whole.inputs, *names, POSITION) and graph.outputs == (*whole.outputs, *made)
        for name, cache in zip(names, caches, strict=True):
            sizes = [cache_size(size, 1) for size in cache.shape if size != PAST]
            fits = fits and cache.name == name and cache.dtype in SIZES and len(cache.shape) <= MOST_DIMENSIONS
            fits = fits and len(sizes) == len(cache.shape) - 1 and min(sizes, default=1) >= 0
            fits = fits and math.prod(max(size, 1) for size in sizes) < 1 << 40
        if not fits or graph.cached is not None:
            raise BundleError(
                f"The manifest's graph {graph.file} does not fit {whole.file}, whose new positions it computes.",
                hint="Export the bundle again.",
            )


def cache_size(size: int | str, batch: int) -> int:
    """A dimension of a cache that is not ``past``; -1 where it is none."""
    if isinstance(size, int):
        return size
    times, _, name = size.rpartition("*")
    number = times or "1"
    return int(number) * batch if name == "batch" and number.isascii() and number.isdigit() and len(number) < 10 else -1


def _made_by(manifest: Manifest) -> Iterator[tuple[GraphRecord, set[str]]]:
    """Graphs, and the outputs that running them counts on."""
    blocks = [g for b in manifest.blocks for g in (b.context, b.block, b.stem) if g is not None]
    yield from ((graph, {"stream_out"}) for graph in (manifest.stem, *blocks))
    if manifest.target is not None:
        step = {"prediction"} if manifest.target.kind == "masked" else {"prediction", "denoised", "z_next"}
        yield manifest.target.graph, step


def _check_tensors(manifest: Manifest, graph: GraphRecord) -> None:
    if graph.structure is not None and safe_name(graph.structure) not in manifest.files:
        raise BundleError(f"The manifest records no hash for {graph.structure}.", hint="Export the bundle again.")
    for tensor in graph.tensors:
        known = tensor.dtype in SIZES and min(tensor.shape, default=0) >= 0 and tensor.offset >= 0
        known = known and len(tensor.shape) <= MOST_DIMENSIONS and tensor.offset % ALIGNED == 0
        known = known and math.prod(max(size, 1) for size in tensor.shape) < 1 << 59
        empty = known and tensor.bytes == 0 and tensor.file is None
        if known and not empty and tensor.file in graph.weight_files:
            known = tensor.offset + tensor.bytes <= manifest.files[tensor.file].bytes
        elif not empty:
            known = False
        if not known:
            raise BundleError(
                f"The manifest places {tensor.input} of {graph.file} ({tensor.dtype}, {tensor.shape}) at {tensor.offset} of {tensor.file}, where it does not lie.",
                hint="Export the bundle again.",
            )


def _check_masking(manifest: Manifest, target: TargetRecord) -> None:
    own = target.masking
    if (own is None) == (target.kind == "masked"):
        raise BundleError("The manifest's target is of the kind masked and says nothing of it, or the other way round.")
    if own is None:
        return
    named = {own.input, own.mask} - {""}
    fits = own.input == manifest.inputs[0].name and named <= {spec.name for spec in manifest.inputs}
    if own.token < 0 or not fits or manifest.inputs[0].shape != ("batch", target.dim):
        raise BundleError(
            f"The manifest's masking ({own.token}, {own.input}, {own.mask}) does not fit the network.",
            hint="Export the bundle again.",
        )


def _check_denoiser(manifest: Manifest, target: TargetRecord) -> None:
    own = target.denoiser
    if (own is None) == (target.kind == "denoiser"):
        raise BundleError(
            "The manifest's target is of the kind denoiser and says nothing of it, or the other way round."
        )
    if own is None:
        return
    names = {spec.name for spec in manifest.inputs}
    sigmas = list(own.sigmas)
    fits = (
        all(s > 0 for s in sigmas) and sorted(sigmas) == sigmas and (len(sigmas) > 1 or own.parameterisation == "edm")
    )
    if own.parameterisation not in ("eps", "v", "x0", "edm") or not {own.input, own.time} <= names or not fits:
        raise BundleError(
            f"The manifest's denoiser ({own.parameterisation}, {own.input}, {own.time}, {len(sigmas)} noise levels) does not fit the network.",
            hint="Export the bundle again.",
        )


def _build(kind: Any, data: Any, where: str) -> Any:
    """A value of the annotated type, or a BundleError that names the place."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in get_args(kind):
            return None
        options = [k for k in get_args(kind) if k is not type(None)]
        if len(options) == 1:
            return _build(options[0], data, where)
        if isinstance(data, tuple(options)) and not isinstance(data, bool):
            return data
        raise _wrong(where, kind, data)
    if is_dataclass(kind):
        return _record(kind, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise _wrong(where, kind, data)
        return tuple(_build(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise _wrong(where, kind, data)
        return {
            k: v if get_args(kind)[1] is Any else _build(get_args(kind)[1], v, f"{where}.{k}") for k, v in data.items()
        }
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise _wrong(where, kind, data)
    return data


def _record(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(where, kind.__name__, data)
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}
    unknown = sorted(set(data) - set(known))
    required = (n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING)
    missing = sorted(n for n in required if n not in data)
    if unknown or missing:
        parts = [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [f"missing: {', '.join(missing)}"] * bool(missing)
        raise BundleError(f"Keys of {where} in {NAME}: {'; '.join(parts)}.", hint="Export the bundle again.")
    return kind(**{name: _build(hints[name], data[name], f"{where}.{name}") for name in data})


def _wrong(where: str, kind: Any, data: Any) -> BundleError:
    return BundleError(f"{where} in {NAME} is a {type(data).__name__}; expected {getattr(kind, '__name__', kind)}.")
