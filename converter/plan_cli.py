"""The command ``dbconvert plan``."""

from __future__ import annotations

import json
from typing import Any

import click
from diffusionblocks.converter.options import (
    CHECKPOINTING,
    CLEAN,
    CONTEXT,
    ENDS,
    NEW_LABELS,
    RECURRENT,
    TARGETS,
    TASK,
    TUNE,
    model_options,
    parse_shape,
)
from diffusionblocks.converter.terminal import console
from diffusionblocks.runtime.budget import parse_bytes


@click.command("plan")
@model_options
@click.option("--memory", required=True, metavar="24GiB", help="Memory of the device.")
@click.option("--batch", type=click.IntRange(1), help="Samples of an update on the device.  [default: as many as fit]")
@click.option("--num-blocks", "-B", type=click.IntRange(1), help="Number of blocks.  [default: the fewest that fit]")
@TASK
@CONTEXT
@ENDS
@TUNE
@NEW_LABELS
@RECURRENT
@TARGETS
@CLEAN
@click.option(
    "--precision",
    type=click.Choice(["float32", "bf16", "fp16"]),
    help="What products are computed in.  [default: float32 or bf16, whichever lets more fit]",
)
@CHECKPOINTING
@click.option("--ema", is_flag=True, help="Keep averaged weights.")
@click.option(
    "--ranks",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Ranks of torchrun that share a block, each with --batch samples.",
)
@click.option(
    "--split", type=click.Choice(["units", "parameters"]), default="units", show_default=True, help="What is equal."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, all sizes in bytes.")
def plan_command(
    model: str, memory: str, as_json: bool, input_shape: str | None, example: str | None, **options: Any
) -> None:
    """What of MODEL fits a memory: blocks, batch, precision, and the bytes of training and running, from its architecture alone.

    Of a folder that transformers or diffusers saved the config is read and no weights. --input-shape 2048 is 2,048 tokens for a language model.

    \b
    Example: dbconvert plan timm:vit_large_patch16_224 --memory 8GiB --batch 16
    """
    from diffusionblocks.converter.plan import plan

    arrays: Any = None
    if example is not None:
        import torch
        from diffusionblocks.converter import data

        arrays = {name: torch.from_numpy(array) for name, array in data.read_arrays(example).items()}
    shape = parse_shape(input_shape) if input_shape else None
    found = plan(model, parse_bytes(memory), input_shape=shape, example=arrays, **options)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    else:
        from diffusionblocks.converter.plan_drawing import draw_plan

        draw_plan(found, console())
