"""What a bundle's page shows, gathered from its manifest alone (of the target's table the file is read); NumPy is enough for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.export.chart import Band, Chart, Line, number
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.errors import DiffusionBlocksError
from diffusionblocks.runtime.files import checked_path
from diffusionblocks.runtime.manifest import BlockRecord, GraphRecord, Manifest

LARGE = 2048
"""Rows of a table beyond which its information curve is not computed for a page."""
STRETCHES = 12
"""Of an interval whose density is drawn, each with one height."""
FIRST = 12
"""Units of a block that are named."""


@dataclass(frozen=True)
class Figure:
    """A chart, or the sentence that stands in its place."""

    title: str
    name: str
    chart: Chart | None
    note: str


@dataclass(frozen=True)
class Table:
    """``rows`` of cells as text; the first cell of a row is its heading."""

    title: str
    name: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Box:
    """A part of the trunk as the page draws it; ``kind``: a block's number, or -1 for stem and head."""

    name: str
    kind: int
    lines: tuple[str, ...]
    units: tuple[str, ...] = ()
    more: int = 0


@dataclass(frozen=True)
class Report:
    """Everything on the page, ready to be laid out."""

    title: str
    facts: tuple[tuple[str, str], ...]
    trunk: tuple[Box, ...]
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]


def gather(
    bundle: Path,
    manifest: Manifest,
    checks: Sequence[Mapping[str, Any]] | None = None,
    bench: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Report:
    """What the page of a bundle shows.

    Args:
        bundle: its folder.
        manifest: what it says of itself.
        checks: of ``verify_bundle`` (name, ok, detail), None where it was not verified.
        bench: what ``dbconvert bench --json`` prints, where it was measured.
        name: what the bundle is called where its source has no name; the folder's name where not given.
    """
    table = _table(bundle, manifest)
    figures = (
        *_noise(manifest, table),
        _information(manifest, table),
        _losses(manifest),
        _validation(manifest),
        _by_step(manifest),
        _memory(manifest),
    )
    tables = (_parity(checks), *_held_out(manifest), *_measured(bench), _provenance(manifest), _files(manifest))
    source = str(manifest.source.get("name") or name or bundle.name)
    return Report(source, _facts(manifest), _trunk(manifest), figures, tables)


def _facts(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    parameters = sum(b.parameters for b in manifest.blocks)
    weights = sum(f.bytes for name, f in manifest.files.items() if name.endswith(".bin") and "/" not in name)
    said = [
        ("task", manifest.task),
        (
            "blocks",
            f"{len(manifest.blocks)}"
            + (f", applied {manifest.applications} times" if manifest.applications > 1 else ""),
        ),
        ("trunk", f"{parameters:,} parameters"),
        ("weights", format_bytes(weights)),
        ("context", manifest.context),
        ("trained", f"yes, tune {manifest.tune}" if manifest.trained else "no: the mode exact alone"),
        ("computes in", manifest.dtype),
        (
            "run does",
            f"{manifest.decoding.mode}"
            + (f", {manifest.decoding.steps} steps" if manifest.decoding.mode == "denoise" else ""),
        ),
    ]
    return tuple(said)


def _trunk(manifest: Manifest) -> tuple[Box, ...]:
    boxes = [Box("stem", -1, (format_bytes(manifest.stem.bytes),))]
    for block in manifest.blocks:
        lines = [f"{block.parameters:,} parameters", format_bytes(block.bytes)]
        if block.sigma:
            lines.append(f"{_level(manifest)} {number(block.sigma[0])} to {number(block.sigma[-1])}")
        names = tuple(block.units)
        boxes.append(Box(f"block {block.index}", block.index, tuple(lines), names[:FIRST], max(len(names) - FIRST, 0)))
    return (*boxes, Box("head", -1, (format_bytes(manifest.head.bytes),)))


def _level(manifest: Manifest) -> str:
    masked = manifest.target is not None and manifest.target.masking is not None
    return "share hidden" if masked else "sigma"


def _bands(edges: Sequence[float]) -> tuple[Band, ...]:
    return tuple(Band(f"block {b}", upper, lower, b) for b, (upper, lower) in enumerate(pairwise(edges)))


def _noise(manifest: Manifest, table: np.ndarray | None) -> tuple[Figure, ...]:
    """The densities the blocks are trained with, over their intervals; and the intervals of the other partition."""
    title = "Noise levels of the blocks"
    if manifest.target is None:
        return (
            Figure(title, "noise", None, "This network has no target to denoise, so its blocks have no noise levels."),
        )
    kind = str(manifest.schedule.get("partition"))
    densities = manifest.schedule.get("densities") or []
    lines = [_density(f"block {b}", schedule.density_from_json(d), b) for b, d in enumerate(densities)]
    masked = manifest.target.masking is not None
    chart = Chart(
        f"{title}: {kind}",
        "The density that each block's noise level is drawn from in training, over the interval it is run on.",
        "share of hidden tokens" if masked else "sigma",
        "density" if masked else "density in log sigma",
        tuple(lines),
        _bands(manifest.edges),
        log_x=not masked,
        zero=True,
    )
    note = "High noise belongs to the first layers. Training intervals overlap a little; runs use the shaded ones."
    found = [Figure(chart.title, "noise", chart, note)]
    other = _other(manifest, table, kind)
    if other is not None:
        found.append(other)
    return tuple(found)


def _other(manifest: Manifest, table: np.ndarray | None, kind: str) -> Figure | None:
    """The intervals of the partition that was not taken."""
    count = len(manifest.blocks)
    if manifest.target is None or manifest.target.kind in ("masked", "denoiser"):
        return None
    paper = schedule.PAPER
    density: Any
    normal = schedule.LogNormalDensity(paper.sigma_max, paper.sigma_min, paper.p_mean, paper.p_std)
    if kind == "equal-information":
        edges, density, name = schedule.equal_probability_edges(count), normal, "equal-probability"
        note = "The paper's: equal shares of a log-normal density of sigma, whatever the target is."
    elif table is not None and 1 < len(table) <= LARGE:
        edges, curve = schedule.equal_information_edges(table, count, samples=512)
        density, name = curve, "equal-information"
        note = "Equal shares of what z says of the target."
    else:
        return None
    chart = Chart(
        f"The other partition: {name}",
        "The noise intervals the blocks would have by the partition that was not taken.",
        "sigma",
        "density in log sigma",
        (_density("", density, 7, 4 * STRETCHES),),
        _bands(edges),
        log_x=True,
        zero=True,
    )
    return Figure(chart.title, "other", chart, note)


def _density(name: str, density: Any, kind: int, stretches: int = STRETCHES) -> Line:
    """Of the logarithm of the noise level (of the level itself, where it is uniform): how much of it lies in each of equal stretches."""
    u = np.linspace(0.0, 1.0 - 1e-9, 1001)
    levels = np.asarray(density.sigma(u), np.float64)
    uniform = isinstance(density, schedule.UniformDensity)
    at = np.sort(levels if uniform else np.log(np.maximum(levels, 1e-12)))
    ends = np.linspace(at[0], at[-1], stretches + 1)
    heights = np.diff(np.interp(ends, at, u)) / np.maximum(np.diff(ends), 1e-12)
    middles = (ends[:-1] + ends[1:]) / 2
    return Line(
        name, list(zip((middles if uniform else np.exp(middles)).tolist(), heights.tolist(), strict=True)), kind
    )


def _table(bundle: Path, manifest: Manifest) -> np.ndarray | None:
    """The table E [K, d] of a label target, where it can be told among the target graph's weights."""
    target = manifest.target
    if target is None or target.kind != "label":
        return None
    shapes = ((target.num_classes, target.dim), (target.dim, target.num_classes))
    for tensor in target.graph.tensors:
        if tensor.shape in shapes and tensor.dtype == "float32" and tensor.file is not None:
            try:
                path = checked_path(bundle, tensor.file, manifest.files)
            except DiffusionBlocksError:
                return None
            found = np.fromfile(path, np.float32, int(np.prod(tensor.shape)), offset=tensor.offset)
            found = found.reshape(tensor.shape)
            rows = found if tensor.shape == shapes[0] else found.T
            if np.allclose(np.square(rows).sum(1), 1, atol=1e-3):
                return np.asarray(rows)
    return None


def _information(manifest: Manifest, table: np.ndarray | None) -> Figure:
    """What z says of the target, by its noise level."""
    title, name = "What z says of the target", "information"
    if manifest.target is None or manifest.target.kind != "label":
        note = "The information of z is shown for classes and tokens; of numbers, images and hidden tokens less noise always says more."
        return Figure(title, name, None, note)
    densities = manifest.schedule.get("densities") or []
    curve: list[tuple[float, float]] = []
    if densities and densities[0].get("kind") == "information":
        curve = list(zip(densities[0]["sigmas"], densities[0]["shares"], strict=True))
    elif table is not None and len(table) <= LARGE:
        sigmas = np.geomspace(manifest.edges[-1], manifest.edges[0], 33)
        curve = list(zip(map(float, sigmas), map(float, schedule.information_share(table, sigmas, 512)), strict=True))
    if not curve:
        return Figure(title, name, None, "The table of targets is too large for the curve to be computed here.")
    shown = [(s, max(v, 0.0)) for s, v in curve]
    chart = Chart(
        title,
        "The mutual information of the noisy target and the class, as a share of all there is to know, over the noise level.",
        "sigma",
        "I(y; z) / log K",
        (Line("", shown, 7),),
        _bands(manifest.edges),
        log_x=True,
        zero=True,
    )
    return Figure(title, name, chart, "1: z tells the class; 0: z tells nothing.")


def _trainings(manifest: Manifest) -> list[Mapping[str, Any]]:
    return list((manifest.training or {}).get("blocks") or [])


def _losses(manifest: Manifest) -> Figure:
    title, name = "Loss of each block while it trained", "loss"
    lines = tuple(
        Line(f"block {log['block']}", _smoothed(log["step"], log["loss"]), int(log["block"]))
        for log in _trainings(manifest)
        if log.get("loss")
    )
    if not any(line.points for line in lines):
        return Figure(
            title, name, None, "The blocks are not trained." if not manifest.trained else "No losses are recorded."
        )
    chart = Chart(title, "The training loss over the updates, smoothed.", "update", "loss", lines)
    return Figure(title, name, chart, "Blocks have losses of their own noise levels: their heights do not compare.")


def _smoothed(steps: Sequence[float], losses: Sequence[float]) -> list[tuple[float, float]]:
    """Means over a fiftieth of the updates each."""
    count = min(len(losses), 200)
    if count == 0:
        return []
    groups = np.array_split(np.arange(len(losses)), count)
    return [(float(steps[g[-1]]), float(np.mean([losses[i] for i in g]))) for g in groups if len(g)]


MEASURES = ("accuracy", "loss", "cross_entropy", "squared_error", "explained")


def _measure(scores: Mapping[str, Any]) -> str:
    return next((m for m in MEASURES if m in scores), next(iter(scores)))


def _validation(manifest: Manifest) -> Figure:
    title, name = "Validation while training", "validation"
    lines: list[Line] = []
    measure = "score"
    for log in _trainings(manifest):
        for which, dashed in (("alone", False), ("chain", True)):
            found = [
                (float(v.get("updates", i)), v[which])
                for i, v in enumerate(log.get("validation") or [])
                if v.get(which)
            ]
            if found:
                measure = _measure(found[0][1])
                points = [(x, float(scores[measure])) for x, scores in found]
                lines.append(
                    Line(f"block {log['block']} {which}", points, int(log["block"]), marks=True, dashed=dashed)
                )
    if not lines:
        return Figure(
            title,
            name,
            None,
            "Nothing was measured while the blocks trained: dbconvert train --validate-every K does that.",
        )
    chart = Chart(
        title,
        "Measured on held-out rows by the sampler while each block trained.",
        "update",
        measure.replace("_", " "),
        tuple(lines),
    )
    return Figure(title, name, chart, "Alone: the block by itself from z = 0; chain: the blocks up to it.")


def _by_step(manifest: Manifest) -> Figure:
    title, name = "Every block alone, and the chain", "steps"
    last = [(int(log["block"]), log["validation"][-1]) for log in _trainings(manifest) if log.get("validation")]
    lines = []
    measure = "score"
    for which, kind in (("alone", 0), ("chain", 1)):
        found = [(b, v[which]) for b, v in last if v.get(which)]
        if found:
            measure = _measure(found[0][1])
            lines.append(
                Line(
                    which,
                    [(float(b + 1), float(s[measure])) for b, s in found],
                    kind,
                    marks=True,
                    dashed=which == "chain",
                )
            )
    if not lines:
        return Figure(
            title, name, None, "No block was measured by itself: dbconvert train --validate-every K does that."
        )
    chart = Chart(
        title,
        "The last measurement of each block alone, and of the chain up to it.",
        "step (block + 1)",
        measure.replace("_", " "),
        tuple(lines),
    )
    return Figure(title, name, chart, "")


def _memory(manifest: Manifest) -> Figure:
    """Weights and intermediate values, graph after graph, of one block at a time and of all at once: counted, not measured."""
    passes = _passes(manifest)
    whole = (
        sum({g.file: g.bytes for g in manifest.graphs() if g.file != "target.onnx"}.values())
        if not manifest.exact
        else sum(
            g.bytes
            for g in (manifest.stem, manifest.head, *(b.context for b in manifest.blocks if b.context is not None))
        )
    )
    one = [(float(i), float(g.bytes + g.row_bytes) / 2**20) for i, (_, g) in enumerate(passes)]
    one.append((float(len(passes)), one[-1][1]))
    everything = [(float(i), float(whole + g.row_bytes) / 2**20) for i, (_, g) in enumerate(passes)]
    everything.append((float(len(passes)), everything[-1][1]))
    chart = Chart(
        "Memory over a run",
        "Bytes of weights and intermediate values in memory for one row while the graphs run one after another, for one block at a time and for all at once.",
        "graph: " + ", ".join(name for name, _ in passes[:4]) + (" ..." if len(passes) > 4 else ""),
        "MiB",
        (Line("one block at a time", one, 0, steps=True), Line("all at once", everything, 7, steps=True, dashed=True)),
        zero=True,
    )
    share = max(y for _, y in one) / max(max(y for _, y in everything), 1e-9)
    note = f"Counted from the graphs, not measured: at most {number(100 * share)} % of all at once. Python and ONNX Runtime come on top; dbconvert report --bench measures."
    return Figure(chart.title, "memory", chart, note)


def _passes(manifest: Manifest) -> list[tuple[str, GraphRecord]]:
    """The graphs of one run, in order."""

    def of(block: BlockRecord) -> GraphRecord | None:
        return (
            block.block
            if manifest.decoding.mode == "denoise" and block.block is not None
            else block.context or block.block
        )

    found = [("stem", manifest.stem)]
    found += [(f"block {b.index}", g) for b in manifest.blocks if (g := of(b)) is not None]
    return [*found, ("head", manifest.head)]


def _parity(checks: Sequence[Mapping[str, Any]] | None) -> Table:
    rows = tuple((str(c["name"]), "ok" if c["ok"] else "FAILED", str(c["detail"])) for c in checks or ())
    note = "" if rows else "Not verified since it was written: dbconvert report does that."
    return Table("Parity with PyTorch", "parity", ("what", "", "result"), rows, note)


def _held_out(manifest: Manifest) -> tuple[Table, ...]:
    results = ((manifest.training or {}).get("held_out") or {}).get("results") or []
    if not results:
        return ()
    measures = [k for k in results[0] if k not in ("mode", "rows")]
    rows = tuple((str(r["mode"]), *(number(float(r[m])) for m in measures), f"{r['rows']:,}") for r in results)
    head = ("mode", *(m.replace("_", " ") for m in measures), "rows")
    return (Table("On rows that were not trained on", "held-out", head, rows),)


def _measured(bench: Mapping[str, Any] | None) -> tuple[Table, ...]:
    if bench is None:
        return ()
    rows = []
    for row in bench.get("rows", []):
        if row.get("missing") is not None:
            rows.append((str(row["row"]), str(row.get("batch", "")), "missing", "", str(row["missing"])))
        else:
            seconds, peak, ratio = row.get("seconds"), row.get("peak_bytes"), row.get("ratio")
            rows.append(
                (
                    str(row["row"]),
                    str(row.get("batch", "")),
                    "" if seconds is None else f"{1000 * seconds:.1f} ms",
                    "" if ratio is None else f"{ratio:.2f}",
                    "" if peak is None else format_bytes(peak),
                )
            )
    return (
        Table(
            "Measured on the machine that made this page",
            "bench",
            ("row", "batch", "time", "ratio", "peak memory"),
            tuple(rows),
        ),
    )


def _provenance(manifest: Manifest) -> Table:
    said: list[tuple[str, str]] = [
        (SOURCE.get(k, f"source {k}"), _text(v)) for k, v in manifest.source.items() if v is not None
    ]
    said += [(f"version of {name}", str(v)) for name, v in manifest.versions.items()]
    said += [("bundle format", str(manifest.format))]
    for log in _trainings(manifest)[:1]:
        options = log.get("options") or {}
        said += [(f"training: {k.replace('_', ' ')}", _text(v)) for k, v in options.items() if v not in (None, False)]
    command = (manifest.training or {}).get("command")
    if command:
        said.append(("trained by", str(command)))
    return Table("Where it comes from", "provenance", ("what", "value"), tuple(said))


SOURCE = {"command": "converted by"}


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _files(manifest: Manifest) -> Table:
    rows = tuple((name, format_bytes(f.bytes), f.sha256) for name, f in sorted(manifest.files.items()))
    return Table("Files and their SHA-256", "files", ("file", "size", "SHA-256"), rows)
