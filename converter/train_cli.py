"""The command ``dbconvert train``, and what ``dbconvert convert --data`` shares with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from diffusionblocks.converter import terminal
from diffusionblocks.converter.options import parse_counts, train_options
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.hub import is_hub_name
from rich.console import Console


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--data", metavar="DATA", help="What to train on: see docs/training.md for the kinds.")
@click.option("--blocks", metavar="0,2", help="Blocks to train; gather them with --merge.  [default: all, gathered]")
@click.option("--merge", is_flag=True, help="Bring the blocks that are finished into the bundle; trains nothing.")
@click.option(
    "--from",
    "sources",
    multiple=True,
    type=click.Path(exists=True, file_okay=False),
    metavar="COPY",
    help="With --merge: copies of BUNDLE in which other blocks were trained.",
)
@click.option("--restart", is_flag=True, help="Begin the blocks anew instead of going on.")
@click.option(
    "--save-every", type=click.IntRange(1), default=200, show_default=True, help="Updates between checkpoints."
)
@click.option(
    "--validate-every",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="K",
    help="Updates between validations on the held-out rows: the block alone, and the chain up to it.",
)
@click.option(
    "--cache-features", is_flag=True, help="Compute what feeds a block once for each row, and keep it on disk."
)
@click.option("--threads", type=click.IntRange(1), help="Threads; the same number gives the same bits.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard logs too.")
@click.option("--json", "as_json", is_flag=True, help="What the bundle is then, as one JSON object on stdout.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all that is drawn.")
@train_options
def train(bundle: str, data: str | None, merge: bool, sources: Sequence[str], as_json: bool, **options: Any) -> None:
    """Fine-tune the blocks of BUNDLE, each by itself, and refresh it; goes on where it was stopped.

    \b
    Examples:
    dbconvert train model.dblocks --data train.npz
    dbconvert train model.dblocks --data images/ --blocks 2 && dbconvert train model.dblocks --merge
    torchrun --nproc-per-node 2 --no-python dbconvert train model.dblocks --data train.npz
    """
    if is_hub_name(bundle):
        raise BadInput(
            f"{bundle} is only read: it cannot be trained.", hint=f"Fetch it first: dbconvert pull {bundle} FOLDER."
        )
    from diffusionblocks.converter.ranks import Place, in_own_session

    folder, console = Path(bundle), terminal.console()
    if merge or sources:
        _told(folder, _merge(folder, data, [Path(s) for s in sources], options, console), as_json)
        return
    if data is None:
        raise BadInput("There is nothing to train on.", hint="Give --data, or --merge to gather what was trained.")
    in_own_session(Place.here(), folder / "train" / "run")
    from diffusionblocks.converter.train_options import TrainOptions
    from diffusionblocks.converter.training_run import Plan, train_bundle
    from diffusionblocks.runtime import manifest as manifests

    blocks = options.pop("blocks")
    plan = Plan(
        blocks=None if blocks is None else parse_counts(blocks),
        **{
            k: options.pop(k)
            for k in ("holdout", "save_every", "validate_every", "device", "threads", "restart", "tensorboard")
        },
    )
    skip_bad, tokenizer = options.pop("skip_bad"), options.pop("tokenizer")
    training = TrainOptions(**options)
    teacher = training.targets == "teacher"

    manifest = manifests.read(folder)

    def open_data(network: Any) -> Any:
        return data_for(
            network,
            data,
            manifest.preprocessing,
            skip_bad=skip_bad,
            labelled=not teacher,
            tokenizer=tokenizer_of(manifest.preprocessing, folder, tokenizer),
            class_names=manifest.class_names,
        )

    outcome = train_bundle(folder, open_data, training, plan, console)
    if outcome is not None:
        _told(folder, refresh(folder, outcome, console), as_json)


def _told(folder: Path, report: Any, as_json: bool) -> None:
    if as_json:
        from diffusionblocks.converter.summary import summary

        click.echo(json.dumps(summary(folder, report), indent=1))


def _merge(folder: Path, data: str | None, sources: Sequence[Path], options: dict[str, Any], console: Console) -> Any:
    import numpy as np
    from diffusionblocks.converter.measure import split_rows
    from diffusionblocks.converter.runs import Run
    from diffusionblocks.converter.training_run import gather, open_for_training

    manifest, network = open_for_training(folder)
    run = Run(folder / "train" / "run")
    for source in sources:
        run.gather(source)
    rows = (
        None
        if data is None
        else data_for(
            network,
            data,
            manifest.preprocessing,
            skip_bad=options["skip_bad"],
            labelled=options["targets"] == "labels",
        )
    )
    held = np.arange(0) if rows is None else split_rows(len(rows), options["holdout"], options["seed"])[1]
    report = refresh(folder, gather(folder, network, manifest, rows, held, console), console)
    left = run.left(network.num_blocks) if not all(network.trained) else ""
    if left:
        console.print(f"Left to train: {left}.")
    return report


def data_for(
    network: Any,
    data: str,
    preprocessing: dict[str, Any] | None,
    *,
    skip_bad: bool,
    labelled: bool,
    tokenizer: Path | None = None,
    class_names: Sequence[str] | None = None,
) -> Any:
    """The data of ``--data`` for a network, every row read once and checked against it."""
    from diffusionblocks.converter.bad_rows import check_targets
    from diffusionblocks.converter.dataset import ArrayDataset
    from diffusionblocks.converter.images_data import NoisyImages, wanted_inputs
    from diffusionblocks.converter.open_data import open_data
    from diffusionblocks.converter.parts import input_specs
    from diffusionblocks.converter.token_target import NextTokens
    from diffusionblocks.converter.train import check_data

    target = network.require_target()
    specs, label = input_specs(network), None
    if target.denoiser is not None:
        specs, label = wanted_inputs(network, specs)
    if target.enters:
        labelled = label is not None
    rows: Any = open_data(
        data,
        specs,
        preprocessing,
        skip_bad=skip_bad,
        labelled=labelled and not target.causal,
        windows=target.of_text,
        tokenizer=tokenizer,
        class_names=class_names,
    )
    if target.denoiser is not None:
        return NoisyImages(rows, network, label)
    if target.causal and labelled:
        rows = NextTokens(rows, network.input_names[0])
    if isinstance(rows, ArrayDataset):
        check_data(network, rows.inputs, rows.targets if labelled else None, finite=False)
    elif labelled:
        check_targets(rows, target)
    return rows


def tokenizer_of(preprocessing: Mapping[str, Any] | None, bundle: Path, given: str | None = None) -> Path | None:
    """The tokenizer that is given, or the one that came with the model: a path, of a bundle relative to it."""
    stored = (preprocessing or {}).get("tokenizer")
    if given is not None:
        return Path(given)
    return None if stored is None else bundle / str(stored)  # an absolute path stays what it is


def example_rows(data: str) -> dict[str, Any] | None:
    """Rows of a file of arrays, which tell the shapes of a model's inputs; None for other data."""
    from diffusionblocks.converter import data as arrays

    path = Path(data)
    if not path.is_file() or path.suffix not in (".npz", ".npy"):
        return None
    found = arrays.read_arrays(path)
    found.pop("y", None)
    return found or None


def refresh(folder: Path, outcome: Any, console: Console) -> Any:
    """Export the bundle again with what was trained; the report of its checks."""
    from diffusionblocks.converter.exporting import export_network
    from diffusionblocks.converter.licences import FOLDER, licence_files
    from diffusionblocks.converter.training_run import keep_logs
    from diffusionblocks.runtime import manifest as manifests

    manifest = manifests.read(folder)
    if outcome.comparison is not None:
        console.print(outcome.comparison.describe())
    return export_network(
        outcome.network,
        folder,
        console,
        source=manifest.source,
        preprocessing=manifest.preprocessing,
        class_names=outcome.class_names,
        training=outcome.record | terminal.command(),
        decoding=outcome.decoding,
        dtype=manifest.dtype,
        force=True,
        extra=lambda part: keep_logs(folder, part),
        licence=licence_files(folder / FOLDER),
    )
