"""The command ``dbconvert``. Data goes to stdout, progress and tables to stderr; exit 0 done, 1 failed check, 2 wrong use or refused."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from diffusionblocks.converter import terminal
from diffusionblocks.converter.bench_cli import bench
from diffusionblocks.converter.completion_cli import completion
from diffusionblocks.converter.doctor_cli import doctor
from diffusionblocks.converter.generate_cli import generate
from diffusionblocks.converter.hub_cli import pull, push
from diffusionblocks.converter.options import (
    NEW_LABELS,
    block_options,
    model_options,
    parse_counts,
    parse_shape,
    train_options,
)
from diffusionblocks.converter.plan_cli import plan_command
from diffusionblocks.converter.report_cli import report
from diffusionblocks.converter.run_cli import run
from diffusionblocks.converter.score_cli import score
from diffusionblocks.converter.train_cli import train
from diffusionblocks.runtime.errors import BadInput, DiffusionBlocksError, printable
from diffusionblocks.runtime.hub import local_folder
from diffusionblocks.runtime.installing import install
from rich.console import Console

WINDOW = 256
"""Tokens of a text that a language model is converted for, where nothing is said."""
NEEDS = {
    "torch": "convert",
    "onnx": "convert",
    "onnxscript": "convert",
    "safetensors": "convert",
    "jinja2": "convert",
    "timm": "timm",
}


class DefaultGroup(click.Group):
    """``dbconvert MODEL ...`` is ``dbconvert convert MODEL ...``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[terminal.ARGUMENTS] = tuple(args)
        own = {name for option in self.get_params(ctx) for name in option.opts}
        place = next((i for i, arg in enumerate(args) if arg not in own), len(args))
        if place < len(args) and args[place] not in self.commands:
            args = [*args[:place], "convert", *args[place:]]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands, and files, since a MODEL may stand in a command's place."""
        found = super().shell_complete(ctx, incomplete)
        return found or [CompletionItem(incomplete, type="file")]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; errors a user can mend are printed without a traceback."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # torch's own, about things a user cannot mend
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        given = None if args is None else list(args)
        alone = args is None  # the process is this command's
        code = cli.main(args=given, prog_name="dbconvert", standalone_mode=False, obj=alone)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show(file=sys.stderr)
        sys.exit(2)
    except DiffusionBlocksError as error:
        click.echo(f"Error: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        extra = NEEDS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        click.echo(f"Error: {error.name} is not installed.\nInstall it: {install(extra)}", err=True)
        sys.exit(2)
    except OSError as error:
        click.echo(f"Error: {printable(str(error))}\nMend that, then give the same command again.", err=True)
        sys.exit(2)
    except MemoryError as error:
        click.echo(f"Error: There was too little memory. {printable(str(error))}\nRun fewer rows at once.", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("Stopped.", err=True)
        sys.exit(130)


@click.group(cls=DefaultGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="diffusionblocks")
def cli() -> None:
    """Convert a trained residual network into AdaLN-conditioned DiffusionBlocks, one ONNX block per denoising step.

    \b
    dbconvert model.pt --input-shape 3x224x224 --out model.dblocks
    dbconvert model.pt --out model.dblocks --data train.npz
    dbconvert run model.dblocks --input x.npy --output y.npy
    """


@cli.command()
@model_options
@click.option("--out", required=True, type=click.Path(), metavar="BUNDLE", help="The folder to write.")
@click.option("--data", metavar="DATA", help="Fine-tune the blocks on it: see docs/training.md for the kinds.")
@block_options
@train_options
@click.option(
    "--scratch",
    is_flag=True,
    help="MODEL is not trained: give every block copies of stem and head, and keep no original (with --context stem).",
)
@NEW_LABELS
@click.option("--force", is_flag=True, help="Replace BUNDLE if it exists.")
@click.option("--deploy", is_flag=True, help="Leave out what further training needs.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "fp32", "fp16"]),
    default="float32",
    show_default=True,
    help="What the exported graphs compute in; float16 has half the bytes, and is meant for GPUs.",
)
@click.option("--json", "as_json", is_flag=True, help="What was made, as one JSON object on stdout.")
def convert(
    model: str, out: str, data: str | None, force: bool, deploy: bool, dtype: str, as_json: bool, **options: Any
) -> None:
    """Convert MODEL (fine-tune when --data is given), export and verify.

    \b
    Example: dbconvert convert timm:resnet18 --out r18.dblocks --num-blocks 4
    """
    from diffusionblocks.converter.exporting import export_network
    from diffusionblocks.converter.network import with_any_target
    from diffusionblocks.converter.train_cli import data_for, example_rows, tokenizer_of
    from diffusionblocks.converter.train_options import TrainOptions

    if Path(out).exists() and not force:
        raise BadInput(f"{out} exists already.", hint="Give another --out, or --force to replace it.")
    holdout, device, skip_bad = (options.pop(k) for k in ("holdout", "device", "skip_bad"))
    tokenizer = options["tokenizer"]
    chosen = {k: options.pop(k) for k in set(options) & {f.name for f in fields(TrainOptions)} - {"seed"}}
    training = TrainOptions(seed=options["seed"], **chosen)
    own = options["task"] == "diffusion"  # whose data is not what the model takes
    source, network = _converted(model, options, None if data is None or own else example_rows(data))
    console = terminal.console()
    if data is not None and training.targets == "teacher":
        network = with_any_target(network)
    console.print(network.partition.describe())
    trained: dict[str, Any] = {}
    class_names = None
    if data is not None:
        rows = data_for(
            network,
            data,
            source.preprocessing,
            skip_bad=skip_bad,
            labelled=training.targets == "labels",
            tokenizer=tokenizer_of(source.preprocessing, Path(), tokenizer),
        )
        class_names = rows.class_names
        trained = _fine_tuned(network, rows, training, holdout, device, console)
    report = export_network(
        network,
        Path(out),
        console,
        source=source.to_json() | terminal.command(),
        preprocessing=_with_given(source.preprocessing, tokenizer),
        class_names=class_names,
        force=force,
        deploy=deploy,
        dtype=dtype.replace("fp", "float"),
        licence=source.licence_files,
        **trained,
    )
    if data is None:
        console.print("The blocks are not trained: the bundle runs in the mode exact. Give --data to fine-tune.")
    if as_json:
        from diffusionblocks.converter.summary import summary

        click.echo(json.dumps(summary(Path(out), report), indent=1))


def _with_given(preprocessing: dict[str, Any] | None, tokenizer: str | None) -> dict[str, Any] | None:
    """The preprocessing with the tokenizer that was given, which the bundle keeps."""
    if tokenizer is None:
        return preprocessing
    from diffusionblocks.converter.preprocessing import Preprocessing

    return {**(preprocessing or Preprocessing().to_json()), "tokenizer": str(Path(tokenizer).resolve())}


def _denoiser(model: str, options: dict[str, Any]) -> Any:
    """What the options, or the pipeline's own scheduler, say of a diffusion model; None for another task."""
    said, scheduler = options.pop("parameterisation"), options.pop("scheduler")
    if options["task"] != "diffusion":
        if said or scheduler:
            raise BadInput("--parameterisation and --scheduler are for diffusion models.", hint="Add --task diffusion.")
        return None
    from diffusionblocks.converter.denoiser_target import Denoiser
    from diffusionblocks.converter.scheduler import NAME, read_scheduler

    folder = Path(model.removeprefix("diffusers:"))
    if scheduler is None and said != "edm" and (folder / "scheduler" / NAME).is_file():
        scheduler = str(folder)
    return Denoiser(said or "eps") if scheduler is None else read_scheduler(Path(scheduler), said)


def _converted(model: str, options: dict[str, Any], data: Any = None) -> tuple[Any, Any]:
    """The loaded source and the converted network."""
    from diffusionblocks.converter.network import convert as convert_network

    source, example, shape, settings = _loaded(model, options, data)
    return source, convert_network(source.model, example, input_shape=shape, **settings)


def _loaded(model: str, options: dict[str, Any], data: Any = None) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The loaded source, its example inputs, their shape (from options, data, or the source), and the settings."""
    import torch
    from diffusionblocks.converter import data as arrays
    from diffusionblocks.converter.load import load_model
    from diffusionblocks.converter.texts import mask_token_of
    from diffusionblocks.converter.train_cli import tokenizer_of

    options["denoiser"] = _denoiser(model, options)
    mask_token, tokenizer, window = options.pop("mask_token"), options.pop("tokenizer", None), options.pop("window")
    choice = {k: options.pop(k) for k in ("arch", "trust", "allow_pickle", "input_shape", "example")}
    source = load_model(model, arch=choice["arch"], trust=choice["trust"], allow_pickle=choice["allow_pickle"])
    shape = parse_shape(choice["input_shape"]) if choice["input_shape"] else None
    example: Any = None
    if choice["example"] and window is not None:
        raise BadInput("Both --example and --window say how long a text is.", hint="Give one of them.")
    if choice["example"]:
        example = {k: torch.from_numpy(v) for k, v in arrays.read_arrays(choice["example"]).items()}
    elif shape is None and data is not None:
        example = {k: torch.from_numpy(v[:3]) for k, v in data.items()}
    elif shape is None and (made := _window(source, options["task"], window)) is not None:
        example = made
    elif shape is None and source.no_example is not None:
        raise source.no_example
    elif shape is None and source.example is not None:
        example = dict(source.example)
    if example is not None:
        example = {k: v.float() if v.dtype == torch.float64 else v for k, v in example.items()}
        example = tuple(example.values()) if set(example) == {"x"} else example
    settings = dict(options)
    settings["mask_token"] = mask_token_of(
        mask_token, settings["task"], tokenizer_of(source.preprocessing, Path(), tokenizer)
    )
    split = settings.get("split", "units")
    if split not in ("units", "parameters"):
        settings["split"] = parse_counts(split)
        settings["num_blocks"] = len(settings["split"])
    return source, example, shape or source.input_shape, settings


def _window(source: Any, task: str, window: int | None) -> Any:
    """Example texts of a length that was asked for, or that a language model is to have; None for other models.

    Raises:
        BadInput: the length was asked for, and there are no texts.
    """
    from diffusionblocks.converter.hugging import example_of, takes_tokens

    if source.kind == "transformers" and takes_tokens(source.model) and (window or task in ("lm", "mdm")):
        return example_of(source.model, window or WINDOW)
    if window is not None:
        raise BadInput(
            "--window is for models of transformers that take tokens.",
            hint="Give --example FILE.npz, with arrays of the length that you want.",
        )
    return None


def _fine_tuned(
    network: Any, data: Any, training: Any, holdout: float, device: str, console: Console
) -> dict[str, Any]:
    """Train on all but the held-out rows, then compare the modes on those; what the export is to know."""
    import torch
    from diffusionblocks.converter.dataset import Subset
    from diffusionblocks.converter.measure import choose, compare_rows, split_rows, too_few_held
    from diffusionblocks.converter.parts import default_decoding
    from diffusionblocks.converter.runlog import bars
    from diffusionblocks.converter.train import finetune
    from diffusionblocks.converter.training_run import record_of

    kept, held = split_rows(len(data), holdout, training.seed)
    if holdout and not len(held):
        console.print(too_few_held(len(data)))
    with bars(console) as progress:
        logs = finetune(network, Subset(data, kept), options=training, progress=progress, device=device)
    record, decoding = record_of(logs), default_decoding(network)
    if len(held):
        comparison = compare_rows(network, Subset(data, held), decoding)
        console.print(comparison.describe())
        record["held_out"], decoding = comparison.to_json(), choose(decoding, comparison)
    record |= terminal.command()
    probe = data.batch(range(min(4, len(data)))).inputs
    assert all(isinstance(t, torch.Tensor) for t in probe.values())
    return {"training": record, "decoding": decoding, "probe": probe}


@cli.command()
@model_options
@block_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, also where MODEL is refused.")
def inspect(as_json: bool, model: str, **options: Any) -> None:
    """Draw MODEL's trunk: units, blocks, noise intervals, side inputs, and what is refused and why.

    Where MODEL cannot be converted, what was found until then, where it stopped, and what can be done.

    \b
    Example: dbconvert inspect timm:swin_tiny_patch4_window7_224 --json
    """
    from diffusionblocks.converter.drawing import draw
    from diffusionblocks.converter.inspect import Request, inspect
    from diffusionblocks.converter.settings import Settings

    def load() -> Request:
        source, example, shape, settings = _loaded(model, options)
        return Request(source, example, shape, Settings.from_json(settings))

    found = inspect(model, load)
    if as_json:
        click.echo(json.dumps(found.data, indent=1))
    else:
        draw(found.data, terminal.console())
    if found.error is not None:
        raise found.error


cli.add_command(plan_command)
cli.add_command(train)


cli.add_command(run)
cli.add_command(generate)
cli.add_command(score)
cli.add_command(bench)
cli.add_command(report)
cli.add_command(doctor)
cli.add_command(push)
cli.add_command(pull)
cli.add_command(completion)


@cli.command()
@click.argument("bundle", type=click.Path())
@click.argument("model", required=False)
@click.option("--arch", metavar="SPEC", help="Architecture of a file of weights.")
@click.option("--trust", multiple=True, metavar="PACKAGE", help="A package whose classes a pickled MODEL may name.")
@click.option("--allow-pickle", is_flag=True, help="Load pickles unchecked.")
@click.option("--json", "as_json", is_flag=True, help="The checks as JSON on stdout.")
def verify(bundle: str, model: str | None, as_json: bool, **options: Any) -> None:
    """Check BUNDLE's hashes, shapes and numbers; with MODEL, the mode exact against it on new inputs.

    \b
    Example: dbconvert verify model.dblocks model.pt
    """
    bundle = str(local_folder(bundle, training=True))
    from diffusionblocks.export.verify import VerifyReport, verify_bundle

    report = verify_bundle(bundle)
    if model is not None:
        from diffusionblocks.converter.compare import compare_with_model

        report = VerifyReport((*report.checks, *compare_with_model(Path(bundle), model, **options)))
    if as_json:
        click.echo(json.dumps([vars(c) for c in report.checks], indent=1))
    console = terminal.console()
    for check in report.checks:
        console.print(printable(f"{'ok ' if check.ok else 'FAILED'} {check.name}: {check.detail}"))
    report.raise_for_failures()


terminal.with_quiet(cli)
