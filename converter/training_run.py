"""``dbconvert train``: the blocks of a bundle trained from where each stands, each in its folder, and brought into the bundle when all are."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusionblocks.converter.dataset import Dataset, Subset
from diffusionblocks.converter.engine import Keeping, Team, train_block
from diffusionblocks.converter.mapped import give_back_large
from diffusionblocks.converter.measure import Comparison, choose, compare_rows, split_rows, too_few_held
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.parts import default_decoding, load_training
from diffusionblocks.converter.ranks import Place, Share, shares_of
from diffusionblocks.converter.residence import Residence, device_of
from diffusionblocks.converter.roster import Roster, is_alive
from diffusionblocks.converter.runlog import RunLog
from diffusionblocks.converter.runs import FOLDER, Run, identity_of
from diffusionblocks.converter.settle import settle
from diffusionblocks.converter.train import TrainOptions, check_order, only_what_trains, settled
from diffusionblocks.converter.train_options import BlockLog
from diffusionblocks.converter.validate import Validator
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.files import checked_path
from diffusionblocks.runtime.manifest import Decoding, Manifest
from rich.console import Console
from torch import distributed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is asked of a training beside how a block is trained.

    ``blocks``: None for all; ``save_every``, ``validate_every``: updates, 0 for never; ``holdout``: share of the rows; ``threads``: None for the process's own.
    """

    blocks: tuple[int, ...] | None = None
    holdout: float = 0.05
    save_every: int = 200
    validate_every: int = 0
    device: str = "cpu"
    threads: int | None = None
    restart: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class Outcome:
    """What goes into the refreshed bundle: the network, what the manifest says of its training, and how ``run`` decodes by default."""

    network: ConvertedNetwork
    record: dict[str, Any]
    decoding: Decoding
    comparison: Comparison | None
    class_names: tuple[str, ...] | None = None


Open = Callable[[ConvertedNetwork], Dataset]


def open_for_training(bundle: Path) -> tuple[Manifest, ConvertedNetwork]:
    """A bundle's manifest, and its network with the weights on disk, after what is in ``train/`` was checked.

    Raises:
        BundleError: no bundle, or one that cannot be trained.
    """
    manifest = manifests.read(bundle)
    there = {path.relative_to(bundle).as_posix() for path in (bundle / "train").glob("*") if not path.is_dir()}
    for name in sorted(there | {name for name in manifest.files if name.startswith("train/")}):
        checked_path(bundle, name, manifest.files)
    return manifest, load_training(bundle / "train")


def train_bundle(bundle: Path, open_data: Open, options: TrainOptions, plan: Plan, console: Console) -> Outcome | None:
    """Train this process's share of a bundle's blocks.

    Returns what the bundle is to be refreshed with, where this process is the one to do it: all blocks were asked for, and this was the last to finish.

    Raises:
        BadInput: data, blocks or a training under way that do not fit; a loss that is no number.
    """
    with _threads(plan.threads):
        return _train(bundle, open_data, options, plan, console)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(bundle: Path, open_data: Open, options: TrainOptions, plan: Plan, console: Console) -> Outcome | None:
    manifest, network = open_for_training(bundle)
    options = settled(network, options)
    place, run = Place.here(), Run(bundle / "train" / FOLDER)
    wanted = list(range(network.num_blocks)) if plan.blocks is None else list(dict.fromkeys(plan.blocks))
    share = _share(network, run, wanted, place)
    for b in run.finished():
        if not (plan.restart and b in wanted):
            run.load(b, network)
    if place.world == 1 or not share.blocks:
        check_order(network, [b for b in wanted if not run.is_finished(b)])
    data = open_data(network)
    kept, held = split_rows(len(data), plan.holdout, options.seed)
    rows, held_rows = Subset(data, kept), Subset(data, held)
    if plan.holdout and not len(held) and place.rank == 0:
        console.print(too_few_held(len(data)))
    Roster(run.folder).register(place.rank, share.blocks)
    run.clear_litter()
    device = device_of(_local(plan.device, place))
    if device.type == "cpu":
        give_back_large()
    with _resting(run) as resting, _team(share, place, device, shared=place.world > len(wanted)) as team:
        residence = Residence(network, device, resting)
        run.settle(network, lambda: settle(network, rows, options, residence))
        name = "log" if place.world == 1 else f"rank_{place.rank}"
        log_of = RunLog(run.folder, console, device, name=name, tensorboard=plan.tensorboard)
        with log_of as reports, only_what_trains(network):
            validator = Validator(network, held_rows, residence)
            for b in share.blocks:
                if team.rank == 0:
                    run.begin(b, identity_of(options, rows.fingerprint, device, team.size), restart=plan.restart)
                if team.group is not None:
                    distributed.barrier(team.group)
                if run.is_finished(b):
                    console.print(f"Block {b} is trained already.")
                    continue

                def validate(b: int, update: int) -> dict[str, Any]:
                    found = validator(b)
                    reports.validation(b, update, found)
                    return found

                keeping = Keeping(run.of(b), plan.save_every, plan.validate_every if len(held) else 0)
                record = train_block(
                    network,
                    b,
                    rows,
                    options,
                    residence,
                    progress=reports.step if team.rank == 0 else None,
                    keeping=keeping,
                    team=team,
                    validate=validate if team.rank == 0 else None,
                )
                if team.rank == 0:
                    run.finish(b, network, record)
                    run.load(
                        b, network
                    )  # from where a run that goes on reads it: products depend on the place of a weight
                residence.put_away(b)
    return _after(bundle, run, network, data, held, plan, place, manifest, console)


def _share(network: ConvertedNetwork, run: Run, wanted: Sequence[int], place: Place) -> Share:
    if place.world == 1:
        return Share(tuple(wanted), (0,))
    if network.settings.context == "carry" and len(wanted) > 1:
        raise BadInput(
            "In the context carry a block reads what the blocks before it make, so blocks are not trained side by side.",
            hint="Train it without torchrun, or give ranks one block at a time: --blocks 0, then 1, ....",
        )
    return shares_of(wanted, place.world)[place.rank]


def _local(device: str, place: Place) -> str:
    return f"cuda:{place.local}" if device == "cuda" and place.world > 1 else device


@contextmanager
def _resting(run: Run) -> Iterator[Path]:
    folder = run.resting()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _team(share: Share, place: Place, device: torch.device, *, shared: bool) -> Iterator[Team]:
    """The ranks of this block; a process group only where blocks are ``shared``."""
    if not shared:
        yield Team()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    try:
        group = distributed.new_group(list(share.ranks), use_local_synchronization=True)
        yield Team(share.ranks.index(place.rank), len(share.ranks), group)
    except RuntimeError as error:  # what torch raises where a peer is gone
        raise BadInput(
            f"Rank {place.rank} lost the ranks it shares block {share.blocks[0]} with: {' '.join(str(error).split())[:160]}",
            hint="The same command goes on from the last checkpoint.",
        ) from error
    finally:
        distributed.destroy_process_group()


def _after(
    bundle: Path,
    run: Run,
    network: ConvertedNetwork,
    data: Dataset,
    held: Any,
    plan: Plan,
    place: Place,
    manifest: Manifest,
    console: Console,
) -> Outcome | None:
    left = run.left(network.num_blocks)
    if plan.blocks is not None:
        rest = f" Not trained: {left}." if left else ""
        console.print(
            f"Finished here: {_list(run.finished())}.{rest} `dbconvert train {bundle} --merge` brings what is finished into the bundle."
        )
        return None
    if left:
        console.print(
            f"Left to train: {left}. Whoever finishes last refreshes the bundle; if none is at work, the same command goes on."
        )
        return None
    if not _first_to_merge(run):
        return None
    return gather(bundle, network, manifest, data, held, console)


def _first_to_merge(run: Run) -> bool:
    """Whether this process is the one that refreshes the bundle: the claim of one that is gone is taken over."""
    path = run.folder / "merging"
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(str(os.getpid()))
            return True
        except FileExistsError:
            text = path.read_text(encoding="utf-8").strip()
            if text.isdigit() and is_alive(int(text)):
                return False
            path.unlink(missing_ok=True)
    return False


def gather(
    bundle: Path,
    network: ConvertedNetwork,
    manifest: Manifest,
    data: Dataset | None,
    held: Any,
    console: Console,
) -> Outcome:
    """What is finished in a bundle's run folder, put into its network; the modes compared where rows were held out."""
    run = Run(bundle / "train" / FOLDER)
    finished = run.finished()
    if not finished:
        raise BadInput(
            "Nothing is finished that could be brought into the bundle.",
            hint=f"Train first: dbconvert train {bundle} --data D --blocks 0.",
        )
    logs = [run.load(b, network) for b in finished]
    record = record_of(logs, manifest.training)
    decoding, comparison = default_decoding(network), None
    if data is not None and len(held) and all(network.trained):
        comparison = compare_rows(network, Subset(data, held), decoding)
        record["held_out"], decoding = comparison.to_json(), choose(decoding, comparison)
    elif manifest.training is not None and "held_out" in manifest.training:
        record["held_out"], decoding = manifest.training["held_out"], manifest.decoding
    return Outcome(network, record, decoding, comparison, _names(network, manifest, data))


def _names(network: ConvertedNetwork, manifest: Manifest, data: Dataset | None) -> tuple[str, ...] | None:
    """The bundle's class names, or the data's where they name every class."""
    found = None if data is None else data.class_names
    if manifest.class_names or found is None or network.target is None:
        return manifest.class_names
    return tuple(found) if len(found) == network.target.num_classes else None


def record_of(logs: Sequence[BlockLog], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the manifest says of the training: one entry a block, the latest."""
    kept = [b for b in (before or {}).get("blocks", []) if b["block"] not in {r.block for r in logs}]
    return {"blocks": sorted([*kept, *(r.to_json() for r in logs)], key=lambda b: int(b["block"]))}


def keep_logs(bundle: Path, folder: Path) -> None:
    """Copy the logs of a bundle's trainings into the folder that takes its place, and checkpoints of blocks that are not finished."""
    source, run = bundle / "train" / "logs", Run(bundle / "train" / FOLDER)
    if source.is_dir():
        shutil.copytree(source, folder / "train" / "logs")
    names = [*run.folder.glob("*.jsonl"), *run.folder.glob("tensorboard")]
    for path in names:
        target = folder / "train" / "logs" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            with target.open("ab") as file:
                file.write(path.read_bytes())
    for path in run.folder.glob("block_*"):
        if not (path / "log.json").is_file():
            shutil.copytree(path, folder / "train" / FOLDER / path.name)


def _list(blocks: Sequence[int]) -> str:
    return ", ".join(f"block {b}" for b in blocks) or "nothing"
