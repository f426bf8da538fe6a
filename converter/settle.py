"""The mean and scale of a target of numbers, found once before any block is trained: all blocks share them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusionblocks.converter.dataset import Dataset
from diffusionblocks.converter.feature_target import FeatureTarget
from diffusionblocks.converter.feeding import Feeder
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.residence import Residence
from diffusionblocks.converter.saved import read_safetensors
from diffusionblocks.converter.train_options import TrainOptions

ROWS, CHUNK = 2048, 64


def settle(network: ConvertedNetwork, data: Dataset, options: TrainOptions, residence: Residence) -> None:
    """Find a target's mean and scale on up to 2,048 rows, spread evenly; nothing where it has none, or has them already."""
    target = network.require_target()
    if not isinstance(target, FeatureTarget) or target.settled:
        return
    rows = np.unique(np.linspace(0, len(data) - 1, min(ROWS, len(data))).astype(np.int64))
    feeder, found = Feeder(network, 0, residence), []
    for start in range(0, len(rows), CHUNK):
        batch = data.batch(rows[start : start + CHUNK].tolist())
        if options.targets == "labels" and batch.targets is not None:
            found.append(batch.targets.float())
            continue
        with residence.passing(network.stem.module, network.head.module):
            env = {name: t.to(residence.device) for name, t in network.inputs_env(batch.inputs).items()}
            found.append(feeder.original(env).float().cpu())
    target.settle(torch.cat(found))


def load_target(network: ConvertedNetwork, path: Path) -> None:
    """Give the target the mean and scale of a file, where there is one."""
    target = network.target
    if isinstance(target, FeatureTarget) and path.is_file():
        tensors, _ = read_safetensors(path)
        target.load(tensors["mean"], tensors["scale"])
