"""A comparison as a table, and as a picture."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusionblocks.converter.bench import ROWS, Comparison, Row
from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.errors import BadInput
from rich import box
from rich.console import Console
from rich.table import Table

COLUMNS: dict[str, Callable[[Row], str]] = {
    "time": lambda row: _seconds(row.seconds),
    "ratio": lambda row: "" if row.ratio is None else f"{row.ratio:.2f}",
    "first run": lambda row: _seconds(row.first_seconds),
    "peak memory": lambda row: "" if row.peak_bytes is None else format_bytes(row.peak_bytes),
    "difference": lambda row: "" if row.difference is None else f"{row.difference:.1e}",
}


def draw_comparison(result: Comparison, console: Console) -> None:
    """Print a table for each batch."""
    columns = dict(COLUMNS)
    if any(row.cold_seconds is not None for row in result.rows):
        columns["cold"] = lambda row: _seconds(row.cold_seconds)
    for batch in dict.fromkeys(row.batch for row in result.rows):
        rows = [row for row in result.rows if row.batch == batch]
        base = next((row.row for row in rows if row.missing is None), "")
        title = f"batch {batch}; ratio and difference are to {base}" if base else f"batch {batch}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, safe_box=console.options.ascii_only)
        table.add_column("row", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            if row.missing is None:
                table.add_row(row.row, *(cell(row) for cell in columns.values()))
            else:
                table.add_row(row.row, "missing", style="dim")
        console.print(table)
        for row in rows:
            if row.missing is not None:
                console.print(f"  {row.row}: missing: {row.missing}", style="dim", markup=False)
    for name in dict.fromkeys(row.row for row in result.rows if row.missing is None):
        console.print(f"  {name}: {ROWS[name]}", style="dim")
    if result.read_seconds is not None:
        console.print(f"reading all weights from the disk, nothing else: {_seconds(result.read_seconds)}")
    for note in result.notes:
        console.print(note)


def pyplot() -> Any:
    """matplotlib, drawing to files.

    Raises:
        BadInput: it is not installed.
    """
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise BadInput("--plot needs matplotlib.", hint="Install it: pip install matplotlib") from error


def plot_comparison(result: Comparison, path: Path) -> None:
    """Two bar charts, time and peak memory of each row, a colour for each batch.

    Raises:
        BadInput: matplotlib is not installed, or the file cannot be written.
    """
    drawing = pyplot()
    there = [row for row in result.rows if row.missing is None]
    names, batches = list(dict.fromkeys(r.row for r in there)), list(dict.fromkeys(r.batch for r in there))
    figure, (left, right) = drawing.subplots(1, 2, figsize=(11, 1.2 + 0.35 * len(names) * (1 + len(batches)) / 2))
    parts: list[tuple[Any, str, Callable[[Row], float]]] = [
        (left, "time of a run (s)", lambda row: row.seconds or 0.0),
        (right, "peak memory (MiB)", lambda row: (row.peak_bytes or 0) / 2**20),
    ]
    high = 0.8 / len(batches)
    for axis, label, value in parts:
        for k, batch in enumerate(batches):
            rows = [row for row in there if row.batch == batch]
            places = [names.index(row.row) + (k - (len(batches) - 1) / 2) * high for row in rows]
            bars = axis.barh(places, [value(row) for row in rows], height=high, label=f"batch {batch}")
            axis.bar_label(bars, fmt=lambda v: f"{v:.0f}" if v >= 100 else f"{v:.3g}", padding=2, fontsize=8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.margins(x=0.15)
    if len(batches) > 1:
        right.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.tight_layout()
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error}", hint="Give a --plot that you may write to.") from error
    finally:
        drawing.close(figure)


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.2f} s"
