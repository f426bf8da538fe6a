"""The folder of a training that is under way, ``train/run/`` in the bundle: one folder for a block, and what was trained when it is whole.

    block_02/identity.json           what must not change when the block's training goes on: options, data, versions, threads
    block_02/training.safetensors    where it stands
    block_02/trained.safetensors     what it became, with log.json beside it
    target.safetensors               mean and scale of a target of numbers, which all blocks share
    rank_1.json                      the process of a rank, and the blocks it was given

Blocks are never written by two processes at once, and every file is written whole or not at all, so a run that was killed anywhere goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusionblocks.converter import state as states
from diffusionblocks.converter.feature_target import FeatureTarget
from diffusionblocks.converter.mapped import apart, map_tensors, write_tensors
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.roster import Roster, is_alive, write_text
from diffusionblocks.converter.saved import read_json, read_safetensors
from diffusionblocks.converter.settle import load_target
from diffusionblocks.converter.train_options import BlockLog, TrainOptions
from diffusionblocks.runtime.errors import BadInput

FOLDER = "run"
TARGET = "target.safetensors"
IDENTITY, TRAINED, LOG = "identity.json", "trained.safetensors", "log.json"


def identity_of(options: TrainOptions, fingerprint: str, device: torch.device, ranks: int) -> dict[str, Any]:
    """What a block's training depends on beside the block: the same identity, the same bits."""
    return {
        **{f"option {name}": value for name, value in vars(options).items()},
        "data": fingerprint[:16],
        "torch": str(torch.__version__),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "ranks that share the block": ranks,
    }


@dataclass(frozen=True)
class Run:
    """``folder``: the bundle's ``train/run``; made where it is not there."""

    folder: Path

    def of(self, b: int) -> Path:
        """The folder of one block."""
        return self.folder / f"block_{b:02d}"

    def is_finished(self, b: int) -> bool:
        return (self.of(b) / LOG).is_file()

    def finished(self) -> list[int]:
        """Blocks that are trained and not in the bundle yet."""
        return sorted(int(p.parent.name.removeprefix("block_")) for p in self.folder.glob(f"block_*/{LOG}"))

    def begin(self, b: int, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        """Claim a block's folder, or go on in it.

        Raises:
            BadInput: it holds another training of the block; says what differs.
        """
        folder = self.of(b)
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        if (folder / IDENTITY).is_file():
            before = read_json(folder / IDENTITY)
            now = json.loads(json.dumps(identity))
            differ = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
            if differ:
                changes = "; ".join(f"{_spoken(k)} was {before.get(k)}, is {now.get(k)}" for k in differ[:4])
                raise BadInput(
                    f"Block {b} has a training under way that began otherwise: {changes}.",
                    hint="Give what it began with to go on, --merge to bring what is finished into the bundle, or --restart to begin the block anew.",
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / IDENTITY, json.dumps(identity, indent=1))

    def finish(self, b: int, network: ConvertedNetwork, record: BlockLog) -> None:
        """Write what a block became; its checkpoint and features are no longer needed."""
        folder = self.of(b)
        own = {name: tensor.detach() for name, tensor in network.own_tensors(b).items()}
        write_tensors(apart(own), folder / TRAINED)
        write_text(folder / LOG, json.dumps(record.to_json()))
        (folder / states.NAME).unlink(missing_ok=True)
        shutil.rmtree(folder / "features", ignore_errors=True)

    def settle(self, network: ConvertedNetwork, find: Callable[[], None]) -> None:
        """Give the target of numbers the mean and scale that the run has, or ``find`` them and keep them."""
        target = network.require_target()
        if not isinstance(target, FeatureTarget) or target.settled:
            return
        if not (self.folder / TARGET).is_file():
            find()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors({"mean": target.mean, "scale": target.scale}, self.folder / TARGET)
        load_target(network, self.folder / TARGET)

    def load(self, b: int, network: ConvertedNetwork) -> BlockLog:
        """Put what a block became into ``network``, mapped."""
        load_target(network, self.folder / TARGET)
        network.load_block_state(b, map_tensors(self.of(b) / TRAINED))
        network.trained[b] = True
        return BlockLog.from_json(read_json(self.of(b) / LOG))

    def gather(self, other: Path) -> list[int]:
        """Copy what was trained elsewhere: from another copy of the bundle, or the run folder in it; returns the blocks.

        Raises:
            BadInput: nothing is there.
        """
        source = next((p for p in (other / "train" / FOLDER, other) if any(p.glob(f"block_*/{LOG}"))), None)
        if source is None:
            raise BadInput(
                f"{other} holds no finished block.",
                hint="Give a copy of this bundle in which `dbconvert train --blocks` has finished.",
            )
        self._gather_target(source)
        found = Run(source).finished()
        for b in found:
            if not self.is_finished(b):
                part = self.folder / f".block_{b:02d}.{os.getpid()}"
                shutil.copytree(source / f"block_{b:02d}", part)
                shutil.rmtree(self.of(b), ignore_errors=True)
                part.rename(self.of(b))
        return found

    def _gather_target(self, source: Path) -> None:
        theirs, own = source / TARGET, self.folder / TARGET
        if not theirs.is_file():
            return
        if not own.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(theirs, own)
        (a, _), (b, _) = read_safetensors(theirs), read_safetensors(own)
        if any(not torch.allclose(a[n], b[n], rtol=1e-4, atol=1e-6) for n in a):
            raise BadInput(
                f"The targets of {source} have another mean and scale than those of {self.folder}: the blocks were trained on other data.",
                hint="Train all blocks on the same data.",
            )

    def updates(self, b: int) -> int:
        """At which update a block's checkpoint stands."""
        if not states.exists(self.of(b)):
            return 0
        return int(json.loads(read_safetensors(self.of(b) / states.NAME)[1]["about"])["updates"])

    def left(self, num_blocks: int) -> str:
        """One line on the blocks that are not trained yet, and where they stand; '' where there is none."""
        owners, lines = Roster(self.folder).owners(), []
        for b in [b for b in range(num_blocks) if not self.is_finished(b)]:
            rank, there = owners.get(b, (-1, False))
            who = "" if rank < 0 else f", rank {rank} is at work" if there else f", rank {rank} is gone"
            lines.append(f"block {b} (at update {self.updates(b)}{who})")
        return ", ".join(lines)

    def clear_litter(self) -> None:
        """Remove what processes that are gone left: weights at rest, half-written files."""
        for path in self.folder.glob("resting_*"):
            host, _, process = path.name.removeprefix("resting_").rpartition("_")
            if host == socket.gethostname() and not is_alive(int(process)):
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("block_*/.*.part"):
            process = path.name.split(".")[-2]
            if process.isdigit() and not is_alive(int(process)):
                path.unlink(missing_ok=True)

    def resting(self) -> Path:
        """The folder for weights of this process that are not in training."""
        return self.folder / f"resting_{socket.gethostname()}_{os.getpid()}"


def _spoken(key: str) -> str:
    return "--" + key.removeprefix("option ").replace("_", "-") if key.startswith("option ") else key
