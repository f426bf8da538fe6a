"""Options that several commands share, and the small languages they are written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from diffusionblocks.runtime.errors import BadInput

F = TypeVar("F", bound=Callable[..., Any])


TUNE = click.option(
    "--tune",
    type=click.Choice(["adaln", "lora", "block"]),
    default="block",
    show_default=True,
    help="What is trained.",
)
ENDS = click.option(
    "--ends",
    type=click.Choice(["auto", "shared", "own"]),
    default="auto",
    show_default=True,
    help="own: every block trains a copy of stem and head too (with --context stem); auto: own for diffusion models and with --scratch, else shared.",
)
CONTEXT = click.option(
    "--context",
    type=click.Choice(["auto", "frozen", "carry", "stem"]),
    default="auto",
    show_default=True,
    help="What a block knows of the input; auto: stem for diffusion and masked language models and new labels, else frozen.",
)
TASK = click.option(
    "--task",
    type=click.Choice(["auto", "classification", "multi-label", "regression", "features", "lm", "mdm", "diffusion"]),
    default="auto",
    show_default=True,
    help="What MODEL's first output is; auto: a row of numbers is taken for logits.",
)
TARGETS = click.option(
    "--targets",
    type=click.Choice(["labels", "teacher"]),
    default="labels",
    show_default=True,
    help="Learn the data's labels, or the original network's predictions, which needs none.",
)
NEW_LABELS = click.option(
    "--new-labels",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="The data has K classes that MODEL did not learn: every block has a head of its own for them.",
)
RECURRENT = click.option(
    "--recurrent",
    is_flag=True,
    help="Units that MODEL applies again with the same weights are one block: trained in one pass, applied --steps times.",
)
CLEAN = click.option(
    "--clean",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Weight of a second loss, on the prediction without the noisy target's evidence.",
)
CHECKPOINTING = click.option(
    "--checkpointing",
    is_flag=True,
    help="Keep the state between units alone and compute the rest again: less memory, more time.",
)


def model_options(command: F) -> F:
    """MODEL and how it is read."""
    for option in (
        click.option("--allow-pickle", is_flag=True, help="Load pickles unchecked: they can execute anything."),
        click.option(
            "--trust", multiple=True, metavar="PACKAGE", help="A package whose classes a pickled MODEL may name."
        ),
        click.option("--example", type=click.Path(), metavar="FILE", help="Example inputs, .npy or .npz."),
        click.option("--input-shape", metavar="3x224x224", help="Shape of the input, batch left out."),
        click.option(
            "--arch",
            metavar="SPEC",
            help="Architecture of a file of weights: timm:NAME, torchvision:NAME, transformers:FOLDER or package.module:factory.",
        ),
        click.argument("model"),
    ):
        command = option(command)
    return command


def block_options(command: F) -> F:
    """How the trunk is divided and what the blocks are."""
    for option in (
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of all that is drawn."),
        click.option(
            "--split", default="units", metavar="units|parameters|4,4,2", show_default=True, help="What is equal."
        ),
        click.option("--overlap", type=float, default=0.05, show_default=True, help="Widening of training intervals."),
        click.option(
            "--evidence",
            type=click.Choice(["auto", "analytic", "learned"]),
            default="auto",
            show_default=True,
            help="How z informs D; auto: learned with --context stem, else analytic.",
        ),
        click.option(
            "--partition",
            type=click.Choice(["auto", "equal-information", "equal-probability"]),
            default="auto",
            show_default=True,
            help="How the noise range is divided; auto: equal-information for classes, else equal-probability.",
        ),
        TUNE,
        ENDS,
        CONTEXT,
        click.option(
            "--window",
            type=click.IntRange(2),
            metavar="T",
            help="Tokens of a text, of a model of transformers. [default: 256 with --task lm and mdm, or the most that the model takes]",
        ),
        click.option(
            "--mask-token",
            metavar="K|TEXT",
            help="With --task mdm: the token that stands for a hidden one.  [default: the tokenizer's own]",
        ),
        click.option(
            "--scheduler",
            type=click.Path(exists=True),
            metavar="FILE",
            help="With --task diffusion: scheduler_config.json of diffusers.  [default: the pipeline's own]",
        ),
        click.option(
            "--parameterisation",
            type=click.Choice(["eps", "v", "x0", "edm"]),
            help="With --task diffusion: what the model's output means.  [default: as the scheduler says]",
        ),
        TASK,
        RECURRENT,
        click.option("--num-blocks", "-B", type=int, default=3, show_default=True, help="Number of blocks."),
    ):
        command = option(command)
    return command


def train_options(command: F) -> F:
    """How blocks are trained; the fields of ``TrainOptions``, ``holdout``, ``device`` and ``skip_bad``."""
    for option in (
        click.option(
            "--skip-bad",
            is_flag=True,
            help="Leave out rows that cannot be read, or hold NaN, instead of refusing the data.",
        ),
        click.option(
            "--tokenizer",
            type=click.Path(exists=True),
            metavar="FOLDER",
            help="For texts: tokenizer.json, or a folder of transformers.  [default: the model's own]",
        ),
        click.option(
            "--device", default="cpu", show_default=True, help="Where the block in training is: cpu, cuda, cuda:1."
        ),
        click.option(
            "--ema",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.0,
            show_default=True,
            help="Decay of averaged weights, which are kept in the end; 0 for none.",
        ),
        CHECKPOINTING,
        click.option(
            "--accumulate",
            type=int,
            default=1,
            show_default=True,
            metavar="N",
            help="Compute an update's batch in N parts.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["float32", "bf16", "fp16"]),
            default="float32",
            show_default=True,
            help="What products are computed in; weights and moments stay float32.",
        ),
        CLEAN,
        click.option(
            "--null",
            type=int,
            default=-1,
            metavar="K",
            help="Of a diffusion model: the class that stands for none, which a tenth of the samples get.",
        ),
        TARGETS,
        click.option(
            "--weighting",
            type=click.Choice(["auto", "none", "edm"]),
            default="auto",
            show_default=True,
            help="Loss weight of a sample; auto: edm for numbers, none for classes.",
        ),
        click.option(
            "--anchor",
            type=float,
            default=3.0,
            show_default=True,
            help="With --context carry: weight of keeping the state that the next block expects.",
        ),
        click.option(
            "--holdout",
            type=click.FloatRange(0, 0.5),
            default=0.05,
            show_default=True,
            help="Share of the data that is not trained on but decides which mode run uses by default; at most 2,000 rows.",
        ),
        click.option("--lr", type=float, help="Peak learning rate.  [default: 1e-3 with --context stem, else 3e-4]"),
        click.option("--batch-size", type=int, default=64, show_default=True, help="Samples an update."),
        click.option("--steps", type=int, default=2000, show_default=True, help="Updates of each block."),
    ):
        command = option(command)
    return command


def parse_counts(text: str) -> tuple[int, ...]:
    """``4,4,2`` as (4, 4, 2).

    Raises:
        BadInput: anything else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise BadInput(
            f"The split {text!r} is not known.", hint="Use units, parameters, or counts such as 4,4,2."
        ) from error


def parse_shape(text: str) -> tuple[int, ...]:
    """``3x224x224`` as (3, 224, 224).

    Raises:
        BadInput: anything else.
    """
    parts = text.lower().split("x")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise BadInput(f"The input shape {text!r} cannot be read.", hint="Write it like 3x224x224, the batch left out.")
    return tuple(int(p) for p in parts)
