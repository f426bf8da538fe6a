"""The command ``dbconvert``. Data goes to stdout, progress and tables to stderr; exit 0 done, 1 failed check, 2 wrong use or refused."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from diffusionblocks.runtime.errors import BadInput, DiffusionBlocksError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

F = TypeVar("F", bound=Callable[..., Any])
COMMANDS = ("convert", "inspect", "train", "run", "verify")
NEEDS = {"torch": "convert", "onnx": "convert", "onnxscript": "convert", "safetensors": "convert", "timm": "timm"}


class DefaultGroup(click.Group):
    """``dbconvert MODEL ...`` is ``dbconvert convert MODEL ...``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*COMMANDS, "--help", "--version", "-h"):
            args = ["convert", *args]
        return super().parse_args(ctx, args)


def _console() -> Console:
    return Console(stderr=True, highlight=False)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; errors a user can mend are printed without a traceback."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # torch's own, about things a user cannot mend
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        code = cli.main(args=None if args is None else list(args), prog_name="dbconvert", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show(file=sys.stderr)
        sys.exit(2)
    except DiffusionBlocksError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        extra = NEEDS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        click.echo(
            f'Error: {error.name} is not installed.\nInstall it: pip install "diffusionblocks[{extra}]"', err=True
        )
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("Stopped.", err=True)
        sys.exit(130)


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
            "--arch", metavar="SPEC", help="Architecture of a file of weights: timm:NAME or package.module:factory."
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
            type=click.Choice(["equal-information", "equal-probability"]),
            default="equal-information",
            show_default=True,
            help="How the noise range is divided.",
        ),
        click.option(
            "--tune",
            type=click.Choice(["adaln", "lora", "block"]),
            default="block",
            show_default=True,
            help="What is trained.",
        ),
        click.option(
            "--context",
            type=click.Choice(["frozen", "carry", "stem"]),
            default="frozen",
            show_default=True,
            help="What a block knows of the input.",
        ),
        click.option("--num-blocks", "-B", type=int, default=3, show_default=True, help="Number of blocks."),
    ):
        command = option(command)
    return command


def train_options(command: F) -> F:
    """How blocks are trained."""
    for option in (
        click.option(
            "--weighting",
            type=click.Choice(["none", "edm"]),
            default="none",
            show_default=True,
            help="Loss weight of a sample.",
        ),
        click.option(
            "--anchor",
            type=float,
            default=3.0,
            show_default=True,
            help="With --context carry: weight of keeping the state that the next block expects.",
        ),
        click.option("--lr", type=float, help="Peak learning rate.  [default: 1e-3 with --context stem, else 3e-4]"),
        click.option("--batch-size", type=int, default=64, show_default=True, help="Samples an update."),
        click.option("--steps", type=int, default=2000, show_default=True, help="Updates of each block."),
    ):
        command = option(command)
    return command


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
@click.option(
    "--data", type=click.Path(), metavar="FILE", help=".npz with the inputs and labels y: fine-tune the blocks."
)
@block_options
@train_options
@click.option(
    "--scratch",
    is_flag=True,
    help="MODEL is not trained: give every block copies of stem and head, and keep no original (with --context stem).",
)
@click.option("--force", is_flag=True, help="Replace BUNDLE if it exists.")
@click.option("--deploy", is_flag=True, help="Leave out what further training needs.")
def convert(
    model: str,
    out: str,
    data: str | None,
    force: bool,
    deploy: bool,
    steps: int,
    batch_size: int,
    lr: float | None,
    anchor: float,
    weighting: str,
    **options: Any,
) -> None:
    """Convert MODEL (fine-tune when --data is given), export and verify.

    \b
    Example: dbconvert convert timm:resnet18 --out r18.dblocks --num-blocks 4
    """
    from diffusionblocks.converter import data as arrays
    from diffusionblocks.converter.train import TrainOptions, check_data, finetune

    if Path(out).exists() and not force:
        raise BadInput(f"{out} exists already.", hint="Give another --out, or --force to replace it.")
    training = TrainOptions(
        steps=steps, batch_size=batch_size, lr=lr, anchor=anchor, weighting=weighting, seed=options["seed"]
    )
    labelled = None if data is None else arrays.read_labelled(data)
    source, network = _converted(model, options, None if labelled is None else labelled[0])
    console = _console()
    console.print(network.partition.describe())
    record: dict[str, Any] | None = None
    probe = None
    if labelled is not None:
        inputs = arrays.name_first(labelled[0], network.input_names[0])
        check_data(network, inputs, labelled[1])
        with _progress(console) as bars:
            logs = finetune(network, inputs, labelled[1], options=training, progress=_on_step(bars))
        record = _record(logs)
        probe = _rows(inputs)
    _export(network, out, source.to_json(), force, deploy, record, source.preprocessing, probe, console)
    if record is None:
        console.print("The blocks are not trained: the bundle runs in the mode exact. Give --data to fine-tune.")


def _converted(model: str, options: dict[str, Any], data: Any = None) -> tuple[Any, Any]:
    """The loaded source and the converted network; the input's shape from options, data, or the source."""
    import torch
    from diffusionblocks.converter import data as arrays
    from diffusionblocks.converter.load import load_model
    from diffusionblocks.converter.network import convert as convert_network

    choice = {k: options.pop(k) for k in ("arch", "trust", "allow_pickle", "input_shape", "example")}
    source = load_model(model, arch=choice["arch"], trust=choice["trust"], allow_pickle=choice["allow_pickle"])
    shape = parse_shape(choice["input_shape"]) if choice["input_shape"] else None
    example: Any = None
    if choice["example"]:
        example = {k: torch.from_numpy(v) for k, v in arrays.read_arrays(choice["example"]).items()}
    elif shape is None and data is not None:
        example = {k: torch.from_numpy(v[:3]) for k, v in data.items()}
    if example is not None:
        example = {k: v.float() if v.dtype == torch.float64 else v for k, v in example.items()}
        example = tuple(example.values()) if set(example) == {"x"} else example
    settings = dict(options)
    split = settings.get("split", "units")
    if split not in ("units", "parameters"):
        settings["split"] = _counts(split)
        settings["num_blocks"] = len(settings["split"])
    return source, convert_network(source.model, example, input_shape=shape or source.input_shape, **settings)


def _counts(text: str) -> tuple[int, ...]:
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


def _rows(inputs: Any) -> Any:
    import torch

    return {k: torch.from_numpy(v[:4].astype("float32") if v.dtype.kind == "f" else v[:4]) for k, v in inputs.items()}


def _record(logs: Any, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the manifest says of the training: one entry a block, the latest."""
    import torch

    blocks = [
        {
            "block": r.block,
            "seconds": round(r.seconds, 3),
            "loss": r.loss,
            "step": r.step,
            "trained_parameters": r.trained_parameters,
            "training_bytes": r.training_bytes,
            "options": vars(r.options),
            "threads": torch.get_num_threads(),
        }
        for r in logs
    ]
    kept = [b for b in (before or {}).get("blocks", []) if b["block"] not in {r.block for r in logs}]
    return {"blocks": sorted(kept + blocks, key=lambda b: b["block"])}


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _on_step(bars: Progress) -> Callable[[int, int, int, float], None]:
    tasks: dict[int, Any] = {}

    def update(block: int, step: int, steps: int, loss: float) -> None:
        if block not in tasks:
            tasks[block] = bars.add_task("", total=steps)
        bars.update(tasks[block], completed=step, description=f"block {block}  loss {loss:.4f}")

    return update


def _export(
    network: Any,
    out: str,
    source: dict[str, Any],
    force: bool,
    deploy: bool,
    record: Any,
    preprocessing: Any,
    probe: Any,
    console: Console,
) -> None:
    from diffusionblocks.converter.parts import network_parts, save_training
    from diffusionblocks.export.bundle import export_bundle
    from diffusionblocks.export.verify import verify_bundle

    parts = network_parts(network, source=source, training=record, preprocessing=preprocessing, probe_inputs=probe)
    extra = None if deploy else lambda folder: save_training(network, folder / "train")
    with console.status("exporting") as status:
        folder = export_bundle(
            parts, out, force=force, extra=extra, progress=lambda name: status.update(f"exporting {name}")
        )
    report = verify_bundle(folder)
    for check in report.checks:
        console.print(f"{'ok ' if check.ok else 'FAILED'} {check.name}: {check.detail}")
    report.raise_for_failures()
    console.print(f"Wrote {folder}")


@cli.command()
@model_options
@block_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def inspect(as_json: bool, model: str, **options: Any) -> None:
    """Show MODEL's residual units, blocks and side inputs, and why parts of the graph are refused.

    \b
    Example: dbconvert inspect timm:swin_tiny_patch4_window7_224 --json
    """
    from diffusionblocks.converter.inspect import describe, draw

    source, network = _converted(model, options)
    data = describe(source.name, network)
    if as_json:
        click.echo(json.dumps(data, indent=1))
    else:
        draw(data, _console())


@cli.command()
@click.argument("bundle", type=click.Path())
@click.option("--data", required=True, type=click.Path(), metavar="FILE", help=".npz with the inputs and labels y.")
@click.option("--blocks", metavar="0,2", help="Blocks to train, all by default.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all that is drawn.")
@train_options
def train(bundle: str, data: str, blocks: str | None, seed: int, **options: Any) -> None:
    """Fine-tune the blocks of BUNDLE and refresh it.

    \b
    Example: dbconvert train model.dblocks --data train.npz --blocks 2
    """
    from diffusionblocks.converter import data as arrays
    from diffusionblocks.converter.parts import load_training
    from diffusionblocks.converter.train import TrainOptions, finetune
    from diffusionblocks.runtime import manifest as manifests
    from diffusionblocks.runtime.files import checked_path

    folder = Path(bundle)
    manifest = manifests.read(folder)
    for name in manifest.files:
        if name.startswith("train/"):
            checked_path(folder, name, manifest.files)
    labelled, y = arrays.read_labelled(data)
    training = TrainOptions(seed=seed, **options)
    network = load_training(folder / "train")
    inputs = arrays.name_first(labelled, network.input_names[0])
    chosen = None if blocks is None else list(_counts(blocks))
    console = _console()
    with _progress(console) as bars:
        logs = finetune(network, inputs, y, blocks=chosen, options=training, progress=_on_step(bars))
    _export(
        network,
        bundle,
        manifest.source,
        True,
        False,
        _record(logs, manifest.training),
        manifest.preprocessing,
        _rows(inputs),
        console,
    )


@cli.command()
@click.argument("bundle", type=click.Path())
@click.option("--input", "input_", required=True, type=click.Path(), metavar="X.npy", help="Inputs, .npy or .npz.")
@click.option("--output", required=True, type=click.Path(), metavar="Y.npy", help="Where the result is written.")
@click.option("--mode", type=click.Choice(["exact", "denoise"]), help="Default: the bundle's own.")
@click.option("--steps", type=int, metavar="N", help="Denoising steps. Default: the bundle's own.")
@click.option("--start", type=click.Choice(["mean", "noise"]), help="Where z starts.")
@click.option("--read", type=click.Choice(["last", "mean"]), help="Prediction of the last step, or of all.")
@click.option("--average", type=int, default=1, show_default=True, help="Noise draws to average.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--memory-budget", metavar="256MiB", help="Bound on the graphs and weights open at once.")
def run(bundle: str, input_: str, output: str, device: str, memory_budget: str | None, **options: Any) -> None:
    """Run BUNDLE on X, one block in memory at a time.

    \b
    Example: dbconvert run model.dblocks --input x.npy --output y.npy --mode denoise --steps 6
    """
    from diffusionblocks.converter import data as arrays
    from diffusionblocks.runtime.budget import format_bytes
    from diffusionblocks.runtime.bundle import open_bundle

    inputs = arrays.read_arrays(input_)
    with open_bundle(bundle, memory_budget=memory_budget, device=device) as opened:
        result = opened.run(inputs, **options)
        _console().print(
            f"{result.shape[0]} rows; at most {format_bytes(opened.peak_weight_bytes)} of graphs and weights open at once"
        )
    arrays.write_npy(output, result)


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
    from diffusionblocks.export.verify import VerifyReport, verify_bundle

    report = verify_bundle(bundle)
    if model is not None:
        from diffusionblocks.converter.compare import compare_with_model

        report = VerifyReport((*report.checks, *compare_with_model(Path(bundle), model, **options)))
    if as_json:
        click.echo(json.dumps([vars(c) for c in report.checks], indent=1))
    console = _console()
    for check in report.checks:
        console.print(f"{'ok ' if check.ok else 'FAILED'} {check.name}: {check.detail}")
    report.raise_for_failures()
