"""A model captured, its trunk found and divided: what ``inspect`` shows and a conversion starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusionblocks.converter.capture import Captured, capture
from diffusionblocks.converter.cut import Cuts, cuts_of
from diffusionblocks.converter.graph import GraphView, op_name
from diffusionblocks.converter.loop import Loop, looped
from diffusionblocks.converter.partition import Partition, partition
from diffusionblocks.converter.residual import Found, find_trunk
from diffusionblocks.converter.units import Unit
from diffusionblocks.runtime.errors import BadInput
from torch import nn
from torch.export import ExportedProgram


@dataclass(frozen=True)
class Analysis:
    """A captured model, its trunk and how it is divided: what ``inspect`` shows and ``convert`` starts from.

    ``loop``: of a network that is converted as one of recurrent depth: the trunk is that loop, and one block.
    """

    captured: Captured
    found: Found
    partition: Partition
    unit_parameters: tuple[int, ...]
    cuts: Cuts
    loop: Loop | None = None


def analyse(
    model: nn.Module | ExportedProgram,
    example: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    num_blocks: int = 3,
    split: str | Sequence[int] = "units",
    recurrent: bool = False,
) -> Analysis:
    """Capture a model, find its trunk and divide it; ``recurrent``: its loop, undivided.

    Raises:
        BadInput: the model cannot be captured, has no residual chain, or fewer units than blocks.
    """
    captured = capture(model, example, input_shape=input_shape)
    return divide(captured, num_blocks=num_blocks, split=split, recurrent=recurrent)


def divide(
    captured: Captured, *, num_blocks: int = 3, split: str | Sequence[int] = "units", recurrent: bool = False
) -> Analysis:
    """Find a captured model's trunk and divide it; see :func:`analyse`."""
    found = find_trunk(captured.graph)
    if not found.trunk:
        raise no_trunk(found)
    if recurrent:
        found, loop = looped(found)
        whole = Partition((loop.units,), "recurrent")
        parameters = tuple(_unit_parameters(found.view, unit) for unit in found.trunk)
        return Analysis(captured, found, whole, parameters, cuts_of(found, whole), loop)
    parameters = tuple(_unit_parameters(found.view, unit) for unit in found.trunk)
    divided = partition(parameters, num_blocks, split)
    return Analysis(captured, found, divided, parameters, cuts_of(found, divided))


def no_trunk(found: Found) -> BadInput:
    """The refusal of a model without a residual chain: what was looked at, and why each addition was not a unit."""
    concatenations = sum(op_name(n) == "cat" for n in found.view.nodes)
    convolutions = sum(op_name(n).startswith("conv") for n in found.view.nodes)
    reasons: dict[str, int] = {}
    for refusal in found.refused:
        reasons[refusal.reason] = reasons.get(refusal.reason, 0) + 1
    lines = [f"{count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1])]
    seen = f"{found.additions} additions, {concatenations} concatenations, {convolutions} convolutions"
    hint = "Plain chains (VGG) and networks joined by concatenation (DenseNet) have no residual stream to divide."
    if found.additions:
        hint += (
            " Where an addition is meant as a residual connection, write it as z + f(z): both operands of one shape, one of them z itself or at "
            "most one convolution or linear layer of it. `dbconvert inspect` lists every addition with its module and why it was refused."
        )
    return BadInput(
        f"This model has no chain of residual units z + f(z). Found: {seen}."
        + ("".join(f"\n  refused: {line}" for line in lines)),
        hint=hint,
    )


def _unit_parameters(view: GraphView, unit: Unit) -> int:
    nodes = view.members(view.region(unit.fork, unit.add))
    names = {
        str(n.target) for node in nodes for n in node.all_input_nodes if n.op == "get_attr" and view.is_parameter[n]
    }
    return sum(view.module.get_parameter(name).numel() for name in names)
