"""The command ``dbconvert run``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from diffusionblocks.converter.terminal import console
from diffusionblocks.runtime.errors import BadInput, printable
from diffusionblocks.runtime.hub import local_folder
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from diffusionblocks.converter.run_images import Answer

SHOWN = 20
"""Answers in a table."""

SAMPLING = ("count", "solver", "guidance", "null")


@click.command()
@click.argument("bundle", type=click.Path())
@click.option(
    "--input",
    "input_",
    type=click.Path(),
    metavar="X.npy",
    help="Inputs, .npy or .npz; or an image, or a folder of images.",
)
@click.option("--output", required=True, type=click.Path(), metavar="Y.npy", help="Where the result is written.")
@click.option(
    "--mode",
    type=click.Choice(["exact", "denoise"]),
    help="Default: denoise if --steps, --start, --read, --average or --until is given, else the bundle's own.",
)
@click.option("--steps", type=int, metavar="N", help="Denoising steps. Default: the bundle's own.")
@click.option("--start", type=click.Choice(["mean", "noise"]), help="Where z starts.")
@click.option("--read", type=click.Choice(["last", "mean"]), help="Prediction of the last step, or of all.")
@click.option("--average", type=int, default=1, show_default=True, help="Noise draws to average.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Of a diffusion model: how many to sample.")
@click.option(
    "--solver",
    type=click.Choice(["euler", "heun"]),
    default="euler",
    show_default=True,
    help="Of a diffusion model.",
)
@click.option(
    "--guidance",
    type=float,
    default=1.0,
    show_default=True,
    help="Of a diffusion model: scale of guidance; 1 for none.",
)
@click.option(
    "--null",
    multiple=True,
    metavar="NAME=K|FILE.npz",
    help="Of a diffusion model: the condition that guidance leads away from.",
)
@click.option(
    "--until",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="P",
    help="Stop at the step where every row has a class of this probability.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--memory-budget",
    metavar="256MiB",
    help="For weights and what is computed from them: decides how many blocks stay in memory, and how many rows run together. Default: one block, all rows.",
)
@click.option(
    "--prefetch/--no-prefetch",
    default=None,
    help="Read the next block from the disk while one computes. Default: if the budget has room for two.",
)
@click.option("--mmap/--no-mmap", "mapped", default=True, help="Map weights, or read them (slower). Default: map.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads. Default: the physical cores.")
@click.option(
    "--json", "as_json", is_flag=True, help="What was written and what it took, as one JSON object on stdout."
)
@click.pass_obj
def run(
    alone: bool | None,
    /,
    bundle: str,
    input_: str | None,
    output: str,
    device: str,
    memory_budget: str | None,
    prefetch: bool | None,
    mapped: bool,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run BUNDLE on X, one block in memory at a time unless a budget has room for more; or sample from a diffusion model, X its conditions.

    \b
    Examples:
    dbconvert run model.dblocks --input x.npy --output y.npy --mode denoise --steps 6
    dbconvert run model.dblocks --input x.npy --output y.npy --mode exact --memory-budget 256MiB
    dbconvert run model.dblocks --input photos/ --output y.npy
    dbconvert run dit.dblocks --input classes.npz --output images.npy --guidance 2 --null class_labels=10
    dbconvert run unconditional.dblocks --count 16 --output images.npy --solver heun
    """
    bundle = str(local_folder(bundle))
    import numpy as np
    from diffusionblocks.converter import data as arrays
    from diffusionblocks.converter.run_images import answers, image_batches, image_files
    from diffusionblocks.runtime.budget import format_bytes
    from diffusionblocks.runtime.bundle import open_bundle
    from diffusionblocks.runtime.memory import peak_resident

    files = None if input_ is None else image_files(input_)
    inputs = {} if input_ is None or files is not None else arrays.read_arrays(input_)
    options["null"] = _null(options["null"])
    screen = console()
    given: dict[str, Any] = {"memory_budget": memory_budget, "device": device, "threads": threads, "prefetch": prefetch}
    with open_bundle(bundle, mapped=mapped, alone=bool(alone), **given) as opened:
        target = opened.manifest.target
        own = None if target is None else target.denoiser
        if own is not None and not {own.input, own.time, "x"} & set(inputs):
            told = []
            result = opened.sample(inputs, **{k: options[k] for k in ("mode", "steps", "seed", *SAMPLING)})
        else:
            odd = [k for k in SAMPLING if options.pop(k) not in (None, "euler", 1.0, {})]
            if odd:
                raise BadInput(
                    f"--{odd[0]} is for sampling from a diffusion model.",
                    hint="Leave it out, or leave the noisy input out of --input.",
                )
            if input_ is None:
                raise BadInput("There is nothing to run on.", hint="Give --input X.npy, or images.")
            batches = [inputs] if files is None else image_batches(files, opened.manifest)
            result = np.concatenate([opened.run(batch, **options) for batch in batches])
            told = [] if files is None else answers(result, files, opened.manifest, below=Path(input_))
        screen.print(f"Plan: {opened.last_plan}")
        counted = {"rows": int(result.shape[0]), "steps": opened.last_steps, "weight_bytes": opened.peak_weight_bytes}
        steps = f" in {opened.last_steps} steps" if opened.last_steps else ""
        screen.print(
            f"{result.shape[0]} rows{steps}; at most {format_bytes(opened.peak_weight_bytes)} of graphs and weights open at once"
        )
    peak = peak_resident()
    if peak is not None:
        screen.print(f"Peak of resident memory, Python and ONNX Runtime included: {format_bytes(peak)}")
    arrays.write_npy(output, result)
    _show(told, screen)
    if as_json:
        shape = {"shape": list(result.shape), "dtype": str(result.dtype)}
        click.echo(
            json.dumps({"output": output, **shape, **counted, "resident_bytes": peak, **_as_json(told)}, indent=1)
        )


def _as_json(told: Sequence[Answer]) -> dict[str, Any]:
    return {"answers": [asdict(answer) for answer in told]} if told else {}


def _show(told: Sequence[Answer], screen: Console) -> None:
    """The first answers as a table; all of them are in the output, and in ``--json``."""
    if not told:
        return
    table = Table(box=None, header_style="bold")
    for name in ("image", "class", "probability", "then"):
        table.add_column(name, justify="right" if name == "probability" else "left")
    for answer in told[:SHOWN]:
        pairs = list(zip(answer.classes, answer.probabilities, strict=True))
        then = ", ".join(f"{name} {p:.2f}" for name, p in pairs[1:])
        table.add_row(*map(printable, (answer.file, answer.classes[0], f"{answer.probabilities[0]:.2f}", then)))
    screen.print(table)
    if len(told) > SHOWN:
        screen.print(f"and {len(told) - SHOWN} more, see --json")


def _null(said: Sequence[str]) -> dict[str, Any]:
    """``NAME=K`` and files as conditions by name.

    Raises:
        BadInput: neither.
    """
    from diffusionblocks.converter import data as arrays

    found: dict[str, Any] = {}
    for text in said:
        name, equals, number = text.partition("=")
        if not equals:
            found |= arrays.read_arrays(text)
        elif number.lstrip("-").isdigit():
            found[name] = int(number)
        else:
            raise BadInput(f"--null {text} is no NAME=K.", hint="Write it like class_labels=10, or give a .npz.")
    return found
