"""What feeds a block in training: the stem's output, the original's state at its depth, or what the trained blocks before it make; streamed, block by block."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.dataset import Dataset
from diffusionblocks.converter.network import ConvertedNetwork, Env
from diffusionblocks.converter.residence import Residence
from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.errors import BadInput

log = logging.getLogger(__name__)

STREAM, TEACHER = "stream", "teacher"
CHUNK = 64
"""Rows that are computed together when features are cached."""

Chain = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Feeder:
    """Makes block b's inputs of the model's, one earlier block on the device at a time."""

    def __init__(self, network: ConvertedNetwork, b: int, residence: Residence) -> None:
        self.network, self.b, self.residence = network, b, residence

    def original(self, env: Env) -> torch.Tensor:
        """The original network's first output [N, ...] on the model's inputs; leaves block b's original state in ``env``."""
        network = self.network
        with torch.no_grad(), self._original_ends():
            network.run_stem(env)
            ahead = dict(env)
            for a in range(network.num_blocks):
                if a == self.b and network.settings.context == "frozen":
                    env.update(ahead)
                self._original_block(ahead, a)
            return network.run_head(ahead, ahead[STREAM])[0]

    def _original_ends(self) -> AbstractContextManager[None]:
        """The original's stem and head where the block is, meanwhile, if the block has its own and they are elsewhere."""
        network, b = self.network, self.b
        ends = ((network.stem, network.stems[b]), (network.head, network.heads[b]))
        return self.residence.passing(*(piece.module for piece, own in ends if own is not None))

    def state_after(self, inputs: Env) -> torch.Tensor:
        """The original network's state after block b."""
        env = dict(inputs)
        with torch.no_grad():
            self.network.run_stem(env)
            for a in range(self.b + 1):
                self._original_block(env, a)
        return env[STREAM]

    def feed(self, env: Env, chain: Chain = ()) -> None:
        """Put what block b reads into ``env``, without a gradient but through a stem of its own.

        Args:
            env: the model's inputs, or what :meth:`original` left of them.
            chain: z [N, d] and sigma [N] of the blocks before, in the context ``carry``.
        """
        network, context = self.network, self.network.settings.context
        if STREAM in env and context != "carry" and network.stems[self.b] is None:
            return
        with torch.set_grad_enabled(network.stems[self.b] is not None and torch.is_grad_enabled()):
            network.run_stem(env, self.b)
        if context == "stem":
            return
        with torch.no_grad():
            for a in range(self.b):
                if context == "frozen":
                    self._original_block(env, a)
                else:
                    also = [piece.module] if len((piece := network.contexts[a]).outputs) > 1 else []
                    with self.residence.passing(network.blocks[a].module, *also):
                        network.advance(env, a, network.carried(env, a, *chain[a]))

    def _original_block(self, env: Env, a: int) -> None:
        with self.residence.passing(self.network.contexts[a].module):
            self.network.run_context(env, a)


class FeatureCache:
    """Block b's inputs for every row of a dataset, and the original's predictions where they are the targets, on disk.

    Only where they depend on the row alone: in the contexts ``stem`` and ``frozen``, without augmentation, and with the original's stem.
    """

    def __init__(
        self, feeder: Feeder, data: Dataset, folder: Path, *, teacher: bool, device: torch.device, rows: int = CHUNK
    ) -> None:
        """Compute and write what is not there yet.

        Raises:
            BadInput: values without the batch in front, or too little space on the disk; tells the size.
        """
        self.folder = folder
        if (folder / "whole").is_file():
            self.arrays = {p.stem: np.load(p, mmap_mode="r") for p in sorted(folder.glob("*.npy"))}
            return
        shutil.rmtree(folder, ignore_errors=True)
        first = self._values(feeder, data, range(min(2, len(data))), teacher, device)
        size = self._check(first, len(data), folder)
        log.warning("Features of block %d: %s on disk (%d rows).", feeder.b, format_bytes(size), len(data))
        folder.mkdir(parents=True)
        self.arrays = {
            name: np.lib.format.open_memmap(
                folder / f"{name}.npy", "w+", _numpy(value).dtype, (len(data), *value.shape[1:])
            )
            for name, value in first.items()
        }
        for start in range(0, len(data), rows):
            chosen = range(start, min(start + rows, len(data)))
            for name, value in self._values(feeder, data, chosen, teacher, device).items():
                self.arrays[name][start : chosen.stop] = _numpy(value)
        for array in self.arrays.values():
            array.flush()
        (folder / "whole").touch()

    def env(self, rows: torch.Tensor, device: torch.device) -> Env:
        """The values of these rows by name, on the device."""
        return {name: torch.from_numpy(np.array(a[rows.numpy()])).to(device) for name, a in self.arrays.items()}

    @staticmethod
    def _values(feeder: Feeder, data: Dataset, rows: range, teacher: bool, device: torch.device) -> Env:
        network = feeder.network
        env = {n: t.to(device) for n, t in network.inputs_env(data.batch(list(rows)).inputs).items()}
        with torch.no_grad():
            made = {TEACHER: feeder.original(env)} if teacher else {}
            feeder.feed(env)
        head = network.heads[feeder.b] or network.head
        wanted = {STREAM, *network.blocks[feeder.b].sides, *network.input_names_of(head)[1:]}
        return {n: t.cpu() for n, t in {**env, **made}.items() if n in wanted or n in made}

    @staticmethod
    def _check(first: Env, count: int, folder: Path) -> int:
        odd = sorted(
            n for n, t in first.items() if t.dim() == 0 or len(t) != min(2, count) or t.dtype == torch.bfloat16
        )
        if odd:
            raise BadInput(
                f"{', '.join(odd)} cannot be cached: the batch is not its first dimension, or its numbers are bfloat16.",
                hint="Train without --cache-features.",
            )
        size = sum(t[:1].nbytes * count for t in first.values())
        place = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(place).free
        if size > free:
            raise BadInput(
                f"The features need {format_bytes(size)} on disk; {format_bytes(free)} are free in {place}.",
                hint="Free some space, or train without --cache-features.",
            )
        return size


def _numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return np.asarray(tensor.numpy())
