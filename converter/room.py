"""Whether there is memory for a block's training: said before it begins, and where it runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusionblocks.converter.blocks import trainable_names
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.train_options import TrainOptions
from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.errors import BadInput

WAYS = (
    "Convert into more blocks (--num-blocks), train less of them (--tune adaln), or give a smaller --batch-size, --accumulate or --checkpointing; "
    "`dbconvert plan MODEL --memory SIZE` says what fits."
)


def learning_bytes(network: ConvertedNetwork, b: int, options: TrainOptions) -> int:
    """Bytes of a block's weights, of the gradients, moments and averages of those that are trained, and of the stem and head beside it."""
    total = 0
    for prefix, module in network.own_modules(b):
        wanted = trainable_names(module, network.tune_of(prefix))
        for name, parameter in module.named_parameters():
            total += parameter.nbytes * (4 + bool(options.ema) if name in wanted else 1)
    beside = (p.module for p, o in ((network.stem, network.stems[b]), (network.head, network.heads[b])) if o is None)
    return total + sum(p.nbytes for module in beside for p in module.parameters())


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found.split()[1]) * 1024


@contextmanager
def enough(network: ConvertedNetwork, b: int, options: TrainOptions, device: torch.device) -> Iterator[None]:
    """Refuse a block whose weights, gradients and moments alone do not fit; name the need where memory runs out.

    Raises:
        BadInput: too little memory.
    """
    needed, free = learning_bytes(network, b, options), free_memory(device)
    text = f"Block {b} needs {format_bytes(needed)} for its weights, gradients and Adam's moments, and its activations on top"
    if free is not None and needed > free:
        raise BadInput(f"{text}; {format_bytes(free)} are free on {device}.", hint=WAYS)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise BadInput(f"{text}: there was too little memory on {device}.", hint=WAYS) from error
    except RuntimeError as error:  # what torch raises on a CPU
        if "can't allocate memory" not in str(error):
            raise
        raise BadInput(f"{text}: there was too little memory on {device}.", hint=WAYS) from error
