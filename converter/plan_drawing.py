"""A plan as tables."""

from __future__ import annotations

from diffusionblocks.converter.footprint import Bytes
from diffusionblocks.converter.page import counted
from diffusionblocks.converter.plan import Plan
from diffusionblocks.runtime.budget import format_bytes
from rich import box
from rich.console import Console
from rich.table import Table

COLUMNS = {"weights": "weights", "gradients, moments": "learning", "activations": "activations", "peak": "peak"}


def draw_plan(result: Plan, console: Console) -> None:
    """Print what is recommended, then other divisions, the recommended one's blocks, and running."""
    best = result.recommended
    console.print(result.model, style="bold")
    console.print(
        f"{result.parameters:,} parameters, {counted(result.units, 'residual unit')}, {format_bytes(result.memory)}"
    )
    console.print(
        f"{counted(best.blocks, 'block')} at a batch of {best.batch} in {best.precision}: at most {format_bytes(best.largest.peak)}",
        style="bold",
    )
    table = _table(console, f"training, {_training(result)}: the largest block", "blocks")
    for division in result.divisions:
        style = "bold" if division.blocks == best.blocks else "" if division.fits else "dim"
        table.add_row(str(division.blocks), *_sizes(division.largest), "yes" if division.fits else "no", style=style)
    fits = "yes" if result.end_to_end.peak <= result.memory else "no"
    table.add_row("end to end", *_sizes(result.end_to_end), fits)
    console.print(table)
    table = _table(console, f"the {counted(best.blocks, 'block')}", "block (units)")
    alike: dict[tuple[object, ...], list[int]] = {}
    for b, block in enumerate(result.per_block):
        alike.setdefault((block.end - block.start, *_sizes(block), block.phase), []).append(b)
    for (units, *cells), places in alike.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        table.add_row(f"{places[0]}{more} ({units})", *map(str, cells))
    console.print(table)
    for dtype, running in result.running.items():
        one, whole = format_bytes(running.block), format_bytes(running.whole)
        console.print(f"running in {dtype}, batch {best.batch}: {one} one block at a time, {whole} all at once")
    for note in result.notes:
        console.print(note, style="dim")


def _training(result: Plan) -> str:
    """How the blocks are trained, as far as it is not the default."""
    said = [f"task {result.task}"] if result.task != "auto" else []
    said += [f"context {result.context}", f"tune {result.tune}"]
    said += [f"ends {result.ends}"] if result.ends == "own" else []
    said += [f"{result.new_labels} new labels"] if result.new_labels else []
    said += ["recurrent"] if result.recurrent else []
    said += [f"targets {result.targets}"] if result.targets == "teacher" else []
    said += [f"clean {result.clean:g}"] if result.clean else []
    said += [name for name in ("checkpointing", "ema") if getattr(result, name)]
    said += [f"{result.ranks} ranks a block"] if result.ranks > 1 else []
    return ", ".join(said)


def _table(console: Console, title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, safe_box=console.options.ascii_only)
    table.add_column(first, no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits" if first == "blocks" else "peak in", no_wrap=True)
    return table


def _sizes(found: Bytes) -> list[str]:
    return [format_bytes(getattr(found, name)) for name in COLUMNS.values()]
