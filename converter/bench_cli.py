"""The command ``dbconvert bench``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from diffusionblocks.converter.terminal import console
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.hub import local_folder

PACKAGES = ("diffusionblocks", "numpy", "onnxruntime", "onnxruntime-gpu", "onnx", "torch", "accelerate")


@click.command("bench")
@click.argument("bundle", type=click.Path())
@click.option("--batch", multiple=True, type=click.IntRange(1), metavar="N", help="Repeatable.  [default: 1 and 8]")
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Runs of each row after the first."
)
@click.option("--threads", type=click.IntRange(1), help="Threads of every row.  [default: each row's own]")
@click.option(
    "--cold/--warm", default=False, help="Also run with nothing in the system's cache of files.  [default: warm only]"
)
@click.option("--rows", multiple=True, metavar="whole,block", help="Some of the rows.  [default: all]")
@click.option("--input", "input_", type=click.Path(), metavar="X.npy", help="Inputs, .npy or .npz.  [default: random]")
@click.option("--model", metavar="MODEL", help="The original, as `dbconvert convert` takes it: for torch, accelerate.")
@click.option("--arch", metavar="SPEC", help="Architecture, where MODEL is a file of weights.")
@click.option("--trust", multiple=True, metavar="PACKAGE", help="A package whose classes a pickled MODEL may name.")
@click.option("--allow-pickle", is_flag=True, help="Load pickles unchecked.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="After which a row without an answer is given up.",
)
@click.option("--plot", type=click.Path(), metavar="FILE.png", help="Draw times and peak memory (needs matplotlib).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, sizes in bytes.")
def bench(
    bundle: str,
    batch: tuple[int, ...],
    rows: tuple[str, ...],
    input_: str | None,
    plot: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare ways of running BUNDLE (mode exact) in time and memory, each a process of its own, all taking turns.

    The rows are whole (all blocks in one session of ONNX Runtime; needs onnx), block (this runtime, one block at a time), resident (this
    runtime, all blocks in memory), sessions (a session per block, opened and closed), torch (the original model; needs --model) and
    accelerate (its offload to the disk; needs --model). The processes live side by side: their memory must fit together.

    \b
    Examples:
    dbconvert bench model.dblocks
    dbconvert bench model.dblocks --model model.pt --batch 1 --threads 4 --json
    dbconvert bench model.dblocks --rows whole,block --cold --plot bench.png
    """
    bundle = str(local_folder(bundle))
    from diffusionblocks.converter import bench_drawing
    from diffusionblocks.converter.bench import Request, compare

    screen = console()
    if plot is not None:
        _check_plot(Path(plot))
        bench_drawing.pyplot()
    request = Request(
        Path(bundle),
        rows=_rows(rows),
        batches=tuple(dict.fromkeys(batch)) or Request.batches,
        input=None if input_ is None else Path(input_),
        **options,
    )
    if screen.is_terminal and not screen.quiet:
        with screen.status("starting") as status:
            result = compare(request, status.update)
    else:
        result = compare(request)
    if plot is not None:
        bench_drawing.plot_comparison(result, Path(plot))
    if as_json:
        head = {"bundle": bundle, "machine": machine(), "versions": versions()}
        asked = {"rounds": request.rounds, "threads": request.threads}
        click.echo(json.dumps(head | asked | result.to_json(), indent=1, allow_nan=False))
    else:
        bench_drawing.draw_comparison(result, screen)


def _rows(said: Sequence[str]) -> tuple[str, ...]:
    """The names of rows, in the order of the table.

    Raises:
        BadInput: no such row.
    """
    from diffusionblocks.converter.bench import ROWS

    names = [name.strip() for text in said for name in text.split(",")]
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise BadInput(f"There is no row {unknown[0]!r}.", hint=f"Choose from: {', '.join(ROWS)}.")
    return tuple(name for name in ROWS if not names or name in names)


def _check_plot(path: Path) -> None:
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir() or path.is_dir():
        raise BadInput(f"--plot {path} is no .png in a folder that exists.", hint="Write it like --plot bench.png.")


def machine() -> dict[str, Any]:
    """The processor's name, how many cores this process may use, and bytes of memory, as far as the system says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory: int | None = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = None
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": named[0] if named else platform.processor(), "cores": cores, "memory": memory}


def versions() -> dict[str, str]:
    """Of Python, the system and the packages that compute, where they are installed."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
