"""The command ``dbconvert``. Data goes to stdout, progress and tables to stderr; exit 0 done, 1 failed check, 2 wrong use or refused."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from diffusionblocks.converter.options import block_options, model_options, parse_counts, parse_shape, train_options
from diffusionblocks.runtime.errors import BadInput, DiffusionBlocksError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

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
    holdout: float,
    **options: Any,
) -> None:
    """Convert MODEL (fine-tune when --data is given), export and verify.

    \b
    Example: dbconvert convert timm:resnet18 --out r18.dblocks --num-blocks 4
    """
    from diffusionblocks.converter import data as arrays
    from diffusionblocks.converter.train import TrainOptions, check_data

    if Path(out).exists() and not force:
        raise BadInput(f"{out} exists already.", hint="Give another --out, or --force to replace it.")
    training = TrainOptions(
        steps=steps, batch_size=batch_size, lr=lr, anchor=anchor, weighting=weighting, seed=options["seed"]
    )
    labelled = None if data is None else arrays.read_labelled(data)
    source, network = _converted(model, options, None if labelled is None else labelled[0])
    console = _console()
    console.print(network.partition.describe())
    outcome = _Outcome()
    if labelled is not None:
        inputs = arrays.name_first(labelled[0], network.input_names[0])
        check_data(network, inputs, labelled[1])
        outcome = _fine_tuned(network, inputs, labelled[1], training, holdout, None, {}, console)
    _export(network, out, source.to_json(), force, deploy, outcome, source.preprocessing, console)
    if outcome.record is None:
        console.print("The blocks are not trained: the bundle runs in the mode exact. Give --data to fine-tune.")


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

    choice = {k: options.pop(k) for k in ("arch", "trust", "allow_pickle", "input_shape", "example")}
    source = load_model(model, arch=choice["arch"], trust=choice["trust"], allow_pickle=choice["allow_pickle"])
    shape = parse_shape(choice["input_shape"]) if choice["input_shape"] else None
    example: Any = None
    if choice["example"]:
        example = {k: torch.from_numpy(v) for k, v in arrays.read_arrays(choice["example"]).items()}
    elif shape is None and data is not None:
        example = {k: torch.from_numpy(v[:3]) for k, v in data.items()}
    elif shape is None and source.no_example is not None:
        raise source.no_example
    elif shape is None and source.example is not None:
        example = dict(source.example)
    if example is not None:
        example = {k: v.float() if v.dtype == torch.float64 else v for k, v in example.items()}
        example = tuple(example.values()) if set(example) == {"x"} else example
    settings = dict(options)
    split = settings.get("split", "units")
    if split not in ("units", "parameters"):
        settings["split"] = parse_counts(split)
        settings["num_blocks"] = len(settings["split"])
    return source, example, shape or source.input_shape, settings


@dataclass(frozen=True)
class _Outcome:
    """What training leaves behind for the bundle: its record, a few rows to probe with, and how ``run`` decodes by default."""

    record: dict[str, Any] | None = None
    probe: Any = None
    decoding: Any = None


def _fine_tuned(
    network: Any,
    inputs: Any,
    labels: Any,
    training: Any,
    holdout: float,
    blocks: Any,
    before: dict[str, Any],
    console: Console,
) -> _Outcome:
    """Train on all but the held-out rows, then compare the modes on those."""
    from diffusionblocks.converter.measure import choose, compare_modes, split_rows
    from diffusionblocks.converter.parts import default_decoding
    from diffusionblocks.converter.train import check_data, finetune

    check_data(network, inputs, labels)
    kept, held = split_rows(len(labels), holdout, training.seed)
    with _progress(console) as bars:
        rows = {name: array[kept] for name, array in inputs.items()}
        logs = finetune(network, rows, labels[kept], blocks=blocks, options=training, progress=_on_step(bars))
    record, decoding = _record(logs, before), default_decoding(network)
    if len(held) and all(network.trained):
        values = {name: a[held].astype("float32") if a.dtype == "float64" else a[held] for name, a in inputs.items()}
        comparison = compare_modes(network, values, labels[held], decoding)
        console.print(comparison.describe())
        record["held_out"], decoding = comparison.to_json(), choose(decoding, comparison)
    return _Outcome(record, _rows(inputs), decoding)


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
    outcome: _Outcome,
    preprocessing: Any,
    console: Console,
) -> None:
    from diffusionblocks.converter.parts import network_parts, save_training
    from diffusionblocks.export.bundle import export_bundle
    from diffusionblocks.export.verify import verify_bundle

    parts = network_parts(
        network,
        decoding=outcome.decoding,
        source=source,
        training=outcome.record,
        preprocessing=preprocessing,
        probe_inputs=outcome.probe,
    )
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
        draw(found.data, _console())
    if found.error is not None:
        raise found.error


@cli.command()
@click.argument("bundle", type=click.Path())
@click.option("--data", required=True, type=click.Path(), metavar="FILE", help=".npz with the inputs and labels y.")
@click.option("--blocks", metavar="0,2", help="Blocks to train, all by default.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all that is drawn.")
@train_options
def train(bundle: str, data: str, blocks: str | None, seed: int, holdout: float, **options: Any) -> None:
    """Fine-tune the blocks of BUNDLE and refresh it.

    \b
    Example: dbconvert train model.dblocks --data train.npz --blocks 2
    """
    from diffusionblocks.converter import data as arrays
    from diffusionblocks.converter.parts import load_training
    from diffusionblocks.converter.train import TrainOptions
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
    chosen = None if blocks is None else list(parse_counts(blocks))
    console = _console()
    outcome = _fine_tuned(network, inputs, y, training, holdout, chosen, manifest.training or {}, console)
    _export(network, bundle, manifest.source, True, False, outcome, manifest.preprocessing, console)


@cli.command()
@click.argument("bundle", type=click.Path())
@click.option("--input", "input_", required=True, type=click.Path(), metavar="X.npy", help="Inputs, .npy or .npz.")
@click.option("--output", required=True, type=click.Path(), metavar="Y.npy", help="Where the result is written.")
@click.option(
    "--mode",
    type=click.Choice(["exact", "denoise"]),
    help="Default: denoise if --steps, --start, --read or --average is given, else the bundle's own.",
)
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
