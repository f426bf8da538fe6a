"""Fine-tuning, one block at a time: its parameters, gradients and optimizer state are the only ones there are.

Every draw of a step (batch, augmentation, sigma, noise, dropout) comes from a generator seeded by (seed, block, step, rank), so that a block's weights
do not depend on when, where or after which other block it is trained: in the contexts ``stem`` and ``frozen`` training in any order, or in
separate processes, gives the same bits (same processor model, versions and thread count). In ``carry`` a block reads what the trained
blocks before it made, with tied noise ``z_{b-1} = z_b + sqrt(s_{b-1}^2 - s_b^2) eps'``, so blocks are trained first to last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter import blocks as block_tools
from diffusionblocks.converter.dataset import ArrayDataset, Dataset
from diffusionblocks.converter.draws import step_seed
from diffusionblocks.converter.engine import Progress, train_block
from diffusionblocks.converter.images_data import NoisyImages, wanted_inputs
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.parts import input_specs
from diffusionblocks.converter.residence import Residence, device_of
from diffusionblocks.converter.settle import settle
from diffusionblocks.converter.stored import check_inputs
from diffusionblocks.converter.token_target import NextTokens
from diffusionblocks.converter.train_options import BlockLog, TrainOptions
from diffusionblocks.runtime.errors import BadInput

__all__ = ["BlockLog", "TrainOptions", "check_data", "check_order", "finetune", "settled", "step_seed"]

log = logging.getLogger(__name__)

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def check_data(
    network: ConvertedNetwork, inputs: dict[str, np.ndarray], labels: np.ndarray | None, *, finite: bool = True
) -> None:
    """Refuse arrays that cannot train this network; ``labels`` None where they are not needed, ``finite`` False where
    NaN is looked for elsewhere.

    Raises:
        BadInput: names, shapes, NaN, or targets that do not fit, each with what was expected.
    """
    target = network.require_target()
    specs = dict(zip(network.input_names, network.analysis.captured.example, strict=True))
    if set(inputs) != set(specs):
        raise BadInput(
            f"The data has the inputs {', '.join(sorted(inputs))}; the model takes {', '.join(specs)}.",
            hint="Name the arrays of the .npz after forward's arguments (x stands for the first), and the labels y.",
        )
    for name, array in inputs.items():
        if tuple(array.shape[1:]) != tuple(specs[name].shape[1:]):
            raise BadInput(
                f"The data's {name} has the shape {tuple(array.shape)}; the model takes "
                f"(N, {', '.join(map(str, specs[name].shape[1:]))}).",
                hint="Resize the data, or convert with the --input-shape it has.",
            )
        if labels is not None and len(array) != len(labels):
            raise BadInput(
                f"The data has {len(array)} rows of {name} and {len(labels)} labels.", hint="They must be as many."
            )
        if finite and np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            bad = int((~np.isfinite(array.reshape(len(array), -1))).any(1).sum())
            raise BadInput(f"{bad} of {len(array)} rows of {name} hold NaN or infinity.", hint="Remove or repair them.")
    if not len(next(iter(inputs.values()))):
        raise BadInput("The data is empty.", hint="Give at least one row.")
    if labels is not None:
        target.check(labels)


def finetune(
    network: ConvertedNetwork,
    inputs: Any,
    labels: Any = None,
    *,
    blocks: Sequence[int] | None = None,
    augment: Augment | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
    options: TrainOptions | None = None,
    **fields: Any,
) -> list[BlockLog]:
    """Train blocks one after another (in place).

    Args:
        network: what ``convert`` returned.
        inputs: array or tensor [M, ...] of the model's first input, a dict by argument name, or a :class:`dataset.Dataset`.
        labels: the targets [M, ...], such as integers [M]; None with ``targets="teacher"``, or where a dataset holds them.
        blocks: which blocks, all in order by default.
        augment: ``augment(batch, generator)`` for the first input; must draw from the generator only.
        progress: called with (block, step, steps, loss).
        device: where the block in training is, such as ``cuda``.
        options: :class:`TrainOptions`, or its fields as keywords (``steps=500, lr=1e-3``).

    Raises:
        BadInput: data that does not fit the network, or blocks it does not have.
    """
    chosen = settled(network, options if options is not None else TrainOptions(**fields))
    data = _dataset(network, inputs, labels, needed=chosen.targets == "labels")
    order = list(range(network.num_blocks)) if blocks is None else list(blocks)
    check_order(network, order)
    residence = Residence(network, device_of(device))
    settle(network, data, chosen, residence)
    with only_what_trains(network):
        logs = [train_block(network, b, data, chosen, residence, augment=augment, progress=progress) for b in order]
    if network.settings.context == "carry":
        stale = [b for b in range(min(order, default=0), network.num_blocks) if network.trained[b] and b not in order]
        if stale:
            log.warning(
                "Blocks %s were trained on what earlier blocks made before: train them again.",
                ", ".join(map(str, stale)),
            )
    return logs


def settled(network: ConvertedNetwork, options: TrainOptions) -> TrainOptions:
    """The options with the rate and weighting that suit the network, where none is given.

    Raises:
        BadInput: the original is to teach, and there is none.
    """
    network.settings.check_targets(options.targets)
    if options.null >= 0 and network.require_target().denoiser is None:
        raise BadInput(
            "A class that stands for none is for diffusion models.",
            hint="Leave --null out, or convert with --task diffusion.",
        )
    lr, weighting = options.lr, options.weighting
    if lr is None:
        lr = 1e-3 if network.settings.context == "stem" else 3e-4
    if weighting == "auto":
        weighting = network.require_target().weight
    elif (weighting == "edm") == (network.require_target().masking is not None) and weighting != "none":
        raise BadInput(
            f"The weighting {weighting}: EDM's is for noise levels, the ELBO's for a masked language model's shares of hidden tokens.",
            hint="Leave --weighting out, or give none.",
        )
    return replace(options, lr=lr, weighting=weighting)


def only_what_trains(network: ConvertedNetwork) -> Any:
    """No gradients meanwhile but for what a block in training owns."""
    parts = (network.stem, *network.contexts, network.head)
    return block_tools.frozen([*(part.module for part in parts), *(block.module for block in network.blocks)])


def check_order(network: ConvertedNetwork, order: Sequence[int]) -> None:
    """Refuse blocks that there are not, or that would be trained before what they read.

    Raises:
        BadInput: says which.
    """
    if any(b not in range(network.num_blocks) for b in order):
        raise BadInput(
            f"Blocks {', '.join(map(str, order))} were asked for; there are 0 to {network.num_blocks - 1}.",
            hint="Give --blocks within that range.",
        )
    for place, b in enumerate(order if network.settings.context == "carry" else ()):
        late = [a for a in range(b) if not network.trained[a] and a not in order[:place]]
        if late:
            raise BadInput(
                f"In the context carry block {b} reads what block {late[0]} makes, which is not trained yet.",
                hint="Train the blocks in order, first to last.",
            )


def _dataset(network: ConvertedNetwork, inputs: Any, labels: Any, *, needed: bool) -> Dataset:
    if hasattr(inputs, "batch") and hasattr(inputs, "fingerprint"):
        data: Dataset = inputs
        return data
    arrays = inputs if isinstance(inputs, dict) else {network.input_names[0]: inputs}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    arrays = {k: a.astype(np.float32) if a.dtype == np.float64 else a for k, a in arrays.items()}
    y = None if labels is None else np.asarray(labels)
    if network.require_target().denoiser is not None:
        return _images(network, arrays, y)
    if network.require_target().masking is not None:
        check_data(network, arrays, None)
        return ArrayDataset(arrays, None)
    if y is None and needed and network.require_target().causal:
        check_data(network, arrays, None)
        return NextTokens(ArrayDataset(arrays, None), network.input_names[0])
    if y is None and needed:
        raise BadInput("The data has no labels.", hint='Give them, or targets="teacher" to learn from the original.')
    network.require_target()
    check_data(network, arrays, y)
    return ArrayDataset(arrays, y)


def _images(network: ConvertedNetwork, arrays: dict[str, np.ndarray], y: np.ndarray | None) -> Dataset:
    """Images and conditions by name; the class of an image by its input's name or as labels."""
    wanted, label = wanted_inputs(network, input_specs(network))
    first = network.require_target().denoiser.input
    given = {
        (first if name == network.input_names[0] and first not in arrays else name): a for name, a in arrays.items()
    }
    labels = given.pop(label, y) if label is not None else None
    check_inputs(given, wanted)
    return NoisyImages(ArrayDataset(given, labels), network, label)
