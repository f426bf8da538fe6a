"""Recurrent depth: units that are applied again and again with the same weights (ALBERT, looped and Huginn-style transformers).

Pattern: in one trunk units u_0 ... u_(p-1), u_0 ... u_(p-1), ..., each reading the very parameters of the one p places before it, at least twice. Of several the longest is taken,
and of those the shortest period. What stands before is the stem's, what stands behind the head's.

Requires: a trunk found in a captured graph. Ensures: changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffusionblocks.converter.graph import GraphView
from diffusionblocks.converter.residual import Found
from diffusionblocks.converter.units import Unit
from diffusionblocks.runtime.errors import BadInput


@dataclass(frozen=True)
class Loop:
    """``period`` units from the ``first``-th of all trunks' on, applied ``count`` times."""

    first: int
    period: int
    count: int

    @property
    def units(self) -> int:
        """Of all applications together."""
        return self.period * self.count


def loop_of(found: Found) -> Loop | None:
    """The loop of a network, None where no weights are applied again."""
    best: Loop | None = None
    before = 0
    for trunk in found.trunks:
        reads = [_reads(found.view, unit) for unit in trunk]
        for period in range(1, len(trunk) // 2 + 1):
            same = [bool(reads[i]) and reads[i] == reads[i + period] for i in range(len(trunk) - period)]
            start = 0
            while start < len(same):
                run = next((i for i in range(start, len(same)) if not same[i]), len(same)) - start
                count = run // period + 1
                if count > 1 and (best is None or period * count > best.units):
                    best = Loop(before + start, period, count)
                start += run + 1
        before += len(trunk)
    return best


def looped(found: Found) -> tuple[Found, Loop]:
    """What was found with the loop as its only trunk, and the loop.

    Raises:
        BadInput: there is none.
    """
    loop = loop_of(found)
    if loop is None:
        raise BadInput(
            f"Recurrent depth needs units that are applied again with the same weights; each of the {len(found.trunk)} units of this model has its own.",
            hint="Leave --recurrent out, and divide the trunk into blocks.",
        )
    return only(found, loop), loop


def only(found: Found, loop: Loop) -> Found:
    """What was found with the loop as its only trunk."""
    return replace(found, trunks=(found.trunk[loop.first : loop.first + loop.units],))


def _reads(view: GraphView, unit: Unit) -> frozenset[tuple[int, tuple[int, ...]]]:
    """The parameters in a unit, by their place in memory."""
    nodes = view.members(view.region(unit.fork, unit.add))
    names = {
        str(n.target) for node in nodes for n in node.all_input_nodes if n.op == "get_attr" and view.is_parameter[n]
    }
    parameters = [view.module.get_parameter(name) for name in names]
    return frozenset((p.data_ptr() or id(p), tuple(p.shape)) for p in parameters)
