"""What ``dbconvert inspect`` does: the road of a conversion up to its blocks, and, where it ends early, what was found by then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from diffusionblocks.converter import describe
from diffusionblocks.converter.analysis import divide, no_trunk
from diffusionblocks.converter.capture import Captured, capture
from diffusionblocks.converter.cut import cut
from diffusionblocks.converter.failure import place_of, quiet, trace_error
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.residual import find_trunk
from diffusionblocks.converter.settings import Settings
from diffusionblocks.converter.source import Source
from diffusionblocks.runtime.errors import BadInput, DiffusionBlocksError
from torch import nn

SCHEMA = 1
"""Version of the object that ``inspect --json`` prints: docs/inspect.schema.json."""
STAGES = ("load", "capture", "find", "partition", "cut", "condition")


@dataclass(frozen=True)
class Request:
    """A loaded model, the inputs to capture it with, and how it shall be divided."""

    source: Source
    example: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None
    input_shape: Sequence[int] | None
    settings: Settings


@dataclass(frozen=True)
class Inspection:
    """``data``: what ``inspect --json`` prints; ``error``: why the model cannot be converted, None where it can."""

    data: dict[str, Any]
    error: DiffusionBlocksError | None


def inspect(name: str, load: Callable[[], Request]) -> Inspection:
    """Go the road of a conversion until it ends.

    Args:
        name: MODEL as it was given, until its source names it.
        load: reads the model; what it refuses is the stage ``load``.
    """
    data: dict[str, Any] = {"schema": SCHEMA, "model": {"name": name}}
    stage, request = "load", None
    try:
        request = load()
        settings = request.settings
        data["model"] = describe.model_part(request.source.name, request.source.model)
        stage = "capture"
        captured = _captured(request)
        data["model"] |= describe.captured_part(captured, data["model"]["parameters"])
        stage = "find"
        found = find_trunk(captured.graph)
        data |= describe.found_part(found)
        if not found.trunk:
            raise _short(no_trunk(found))
        stage = "partition"
        analysis = divide(captured, num_blocks=settings.num_blocks, split=settings.split, recurrent=settings.recurrent)
        stage = "cut"
        data |= describe.divided_part(analysis, cut(captured.graph, analysis.cuts), data["units"])
        stage = "condition"
        data["schedule"] = _schedule(ConvertedNetwork(analysis, _lightest(settings)), data["blocks"])
    except DiffusionBlocksError as error:
        place = _place(request, error) if stage == "capture" and request is not None else None
        data["error"] = {"stage": stage, "message": error.message, "hint": error.hint, "place": place}
        return Inspection(data, error)
    return Inspection(data, None)


def _lightest(settings: Settings) -> Settings:
    """The settings with the fewest weights of its own a block can have."""
    return settings if settings.task in ("diffusion", "mdm") else replace(settings, tune="adaln")


def _captured(request: Request) -> Captured:
    with quiet():
        return capture(request.source.model, request.example, input_shape=request.input_shape)


def _short(error: BadInput) -> BadInput:
    """Without the refused additions, which are listed by themselves."""
    return BadInput(error.message.partition("\n")[0], hint=error.hint)


def _schedule(network: ConvertedNetwork, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """The edges of the noise intervals, or why there are none; and, in ``blocks``, the interval of each."""
    reason = None
    try:
        network.require_target()
    except BadInput as error:
        reason = error.message
    edges = list(network.edges)
    for block, interval in zip(blocks, pairwise(edges), strict=bool(edges)):
        block["sigma"] = list(interval)
    return {"partition": network.noise_partition, "edges": edges or None, "reason": reason}


def _place(request: Request, error: DiffusionBlocksError) -> dict[str, Any] | None:
    """Where in the model a capture failed; capturing keeps no traceback of an export that failed, so it is made to fail again."""
    model = request.source.model
    if not isinstance(model, nn.Module):
        return None
    found = place_of(error, model)
    again = None if found else trace_error(model, request.example, request.input_shape)
    return found if again is None else place_of(again, model)
