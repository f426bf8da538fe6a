"""Examples of every value that passes between the pieces of a network, made without computing it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from diffusionblocks.converter.blank import blank
from torch._subclasses.fake_tensor import FakeTensorMode

if TYPE_CHECKING:
    from diffusionblocks.converter.network import ConvertedNetwork, Env

log = logging.getLogger(__name__)


def examples(network: ConvertedNetwork, example: Env) -> tuple[list[Env], tuple[torch.Tensor, ...]]:
    """Blank tensors of the shapes that an example takes through a network.

    Returns what is known before block 0, before block 1, ..., behind the last (the state as ``stream``), and the network's outputs. Where an operator
    cannot be run on shapes alone the network is run on the example itself.
    """
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad():
            passed, outputs = _pass(network, {name: mode.from_tensor(t) for name, t in example.items()})
        return [{name: _blank(t) for name, t in env.items()} for env in passed], tuple(map(_blank, outputs))
    except Exception as error:
        log.debug("shapes are computed on the example: %s", error)
    with torch.no_grad():
        return _pass(network, dict(example))


def _pass(network: ConvertedNetwork, env: Env) -> tuple[list[Env], tuple[torch.Tensor, ...]]:
    network.run_stem(env)
    passed = [dict(env)]
    for b in range(network.num_blocks):
        network.run_context(env, b)
        passed.append(dict(env))
    return passed, network.run_head(env, env["stream"])


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    """There are some for each block: a copy of each would be more than a block."""
    return blank([int(s) for s in tensor.shape], tensor.dtype)
