"""Finding the residual units of a captured graph, and the trunks they form.

What is a unit by itself is told by ``units``; here those are left out that lie inside another unit's branch (nested), reach into one from outside (crossing), or
span several units (a long skip).

Units form trunks: a unit follows another where its fork is made from the other's sum without a unit between them (by a norm, a downsampling, a
concatenation, but not through a branch). So an encoder and the decoder that attends to it are two trunks, and so are two towers. Trunks
of which one depends on the other at most one way are divided one after another; a stream that is read and written beside a longer one (the text
of a two-stream diffusion transformer) stays beside it.

Requires: a flat captured graph, before decomposition. Ensures: changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

from diffusionblocks.converter.graph import GraphView, is_tensor, op_name, value
from diffusionblocks.converter.units import Refusal, Unit, linear_as_one, match, refusal
from torch import fx


@dataclass(frozen=True)
class Found:
    """What the finder saw: the trunks that can be divided, in order; streams beside them; every refused addition."""

    trunks: tuple[tuple[Unit, ...], ...]
    beside: tuple[tuple[Unit, ...], ...]
    refused: tuple[Refusal, ...]
    additions: int
    view: GraphView = field(repr=False, compare=False)

    @property
    def trunk(self) -> tuple[Unit, ...]:
        """All units that can be divided into blocks, first layers first."""
        return tuple(unit for trunk in self.trunks for unit in trunk)

    @property
    def branches(self) -> int:
        """Residual branches found, in the trunks and beside them."""
        return sum(len(unit.branches) for trunk in (*self.trunks, *self.beside) for unit in trunk)


def find_trunk(module: fx.GraphModule) -> Found:
    """Find the residual units of a flat captured graph and the trunks they form."""
    view = GraphView(module)
    units: dict[fx.Node, Unit] = {}
    refused: list[Refusal] = []
    additions = 0
    for node in view.nodes:
        if op_name(node) not in ("add", "addcmul") or not is_tensor(node) or not view.from_input[node]:
            continue
        additions += 1
        found = match(view, node, units)
        if isinstance(found, Unit):
            units[node] = found
        else:
            refused.append(found)
    crossing = _crossing(view, units)
    refused += [
        refusal(u.add, f"forks outside {crossing[u.add]}, inside which it is added")
        for u in units.values()
        if u.add in crossing
    ]
    units = {add: unit for add, unit in units.items() if add not in crossing}
    nested, long = _nesting(view, units)
    refused += [
        refusal(u.add, f"nested inside the branch of {nested[u.add]}") for u in units.values() if u.add in nested
    ]
    refused += [refusal(u.add, "a long skip over several units") for u in units.values() if u.add in long]
    top = [u for u in units.values() if u.add not in nested and u.add not in long]
    trunks, beside = _arrange(view, _trunks(view, _merge_parallel(view, top)))
    return Found(trunks, beside, tuple(refused), additions, view)


def _crossing(view: GraphView, units: dict[fx.Node, Unit]) -> dict[fx.Node, str]:
    """Sums that reach into another unit's branch from outside it, with that unit's name: a bias of the attention scores, which every layer adds.

    Units lie one in another or apart. Of two that cross the one with fewer operators between fork and sum is kept.
    """
    crossing: dict[fx.Node, str] = {}
    kept: list[tuple[Unit, int]] = []
    regions = [(u, view.region(u.fork, u.add) & ~(1 << view.index[u.add])) for u in units.values()]
    for unit, region in sorted(regions, key=lambda item: item[1].bit_count()):
        for other, outer in kept:
            if unit.fork is other.fork or "parallel" in (unit.kind, other.kind):
                continue
            into = outer >> view.index[unit.add] & 1 and not outer >> view.index[unit.fork] & 1
            out = region >> view.index[other.add] & 1 and not region >> view.index[other.fork] & 1
            if into or out:
                crossing[unit.add] = other.name or other.add.name
                break
        else:
            kept.append((unit, region))
    return crossing


def _nesting(view: GraphView, units: dict[fx.Node, Unit]) -> tuple[dict[fx.Node, str], set[fx.Node]]:
    """Units inside another unit's branch (with that unit's name), and long skips (outer adds that share an inner fork)."""
    inner: dict[fx.Node, list[Unit]] = {}
    for unit in units.values():
        region = view.region(unit.fork, unit.add) & ~(1 << view.index[unit.add])
        inner[unit.add] = [v for v in units.values() if v is not unit and region >> view.index[v.add] & 1]
    long = {
        u.add
        for u in units.values()
        if u.kind != "parallel" and any(_origin(v.fork) is _origin(u.fork) and not _is_part(v) for v in inner[u.add])
    }
    nested: dict[fx.Node, str] = {}
    for unit in units.values():
        if unit.add not in long and unit.kind != "parallel":
            nested.update({v.add: unit.name or unit.add.name for v in inner[unit.add]})
    return nested, long


def _origin(node: fx.Node) -> fx.Node:
    """What a copy or a cast is of."""
    while (
        op_name(node) in ("clone", "contiguous", "detach", "alias", "to", "_to_copy", "dropout")
        and len(node.all_input_nodes) == 1
    ):
        node = node.all_input_nodes[0]
    return node


def _is_part(unit: Unit) -> bool:
    """Whether the sum holds only a part of the fork: a slice or a chunk that an inner sum works on (Res2Net)."""
    return unit.kind != "projection" and str(value(unit.add).numel()) != str(value(unit.fork).numel())


def _merge_parallel(view: GraphView, units: list[Unit]) -> list[Unit]:
    """``(z + f(z)) + g(z)``: the inner unit joins the outer one, whose branches they both are."""
    outer = {u.fork: u for u in units if u.kind == "parallel"}
    merged = []
    for unit in units:
        wrap = outer.get(unit.fork)
        if wrap is None:
            merged.append(unit)
        elif unit is wrap:
            siblings = [u for u in units if u.fork is unit.fork]
            branches = linear_as_one(view, unit.fork, [b for u in siblings for b in u.branches])
            names = [u.name for u in siblings if u.name]
            merged.append(Unit(unit.add, unit.fork, branches, "parallel", unit.shape, "+".join(names)))
    return merged


def _trunks(view: GraphView, units: list[Unit]) -> list[tuple[Unit, ...]]:
    """The units as chains, each the one with most branches among those left."""
    before = _predecessors(view, units)
    left = sorted(units, key=lambda u: view.index[u.add])
    found = []
    while left:
        length: dict[fx.Node, int] = {}
        previous: dict[fx.Node, Unit | None] = {}
        for unit in left:
            at = max((p for p in before[unit.add] if p.add in length), key=lambda p: length[p.add], default=None)
            length[unit.add] = len(unit.branches) + (0 if at is None else length[at.add])
            previous[unit.add] = at
        step: Unit | None = max(left, key=lambda u: length[u.add])
        chain: list[Unit] = []
        while step is not None:
            chain.append(step)
            step = previous[step.add]
        found.append(tuple(chain[::-1]))
        taken = {u.add for u in chain}
        left = [u for u in left if u.add not in taken]
    return found


def _predecessors(view: GraphView, units: list[Unit]) -> dict[fx.Node, list[Unit]]:
    """For each unit's sum, the units whose sums its fork is made from without another unit between, in graph order."""
    sums = {unit.add: unit for unit in units}
    nearest: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in view.nodes:
        near: frozenset[fx.Node] = frozenset()
        for source in view.data_inputs(node):
            near |= frozenset([source]) if source in sums else nearest[source]
        nearest[node] = near
    found = {}
    for unit in units:
        near = frozenset([unit.fork]) if unit.fork in sums else nearest[unit.fork]
        found[unit.add] = [sums[n] for n in sorted(near, key=lambda n: view.index[n])]
    return found


def _inside(view: GraphView, trunk: Sequence[Unit]) -> int:
    """What a trunk's units compute between their forks and sums."""
    mask = 0
    for unit in trunk:
        mask |= view.region(unit.fork, unit.add)
    return mask


def _arrange(
    view: GraphView, trunks: list[tuple[Unit, ...]]
) -> tuple[tuple[tuple[Unit, ...], ...], tuple[tuple[Unit, ...], ...]]:
    """Trunks that can be divided one after another, in order, and those that lie beside a longer one."""

    def reads(trunk: tuple[Unit, ...], other: tuple[Unit, ...]) -> bool:
        return view.depends(trunk[-1].add, other[0].add)

    inside = {trunk: _inside(view, trunk) for trunk in trunks}

    def woven(trunk: tuple[Unit, ...], other: tuple[Unit, ...]) -> bool:
        """Whether each depends on what the other computes in its units (as two streams with one attention do)."""
        return any(view.ancestors[u.add] & inside[other] for u in trunk) and any(
            view.ancestors[u.add] & inside[trunk] for u in other
        )

    kept: list[tuple[Unit, ...]] = []
    beside: list[tuple[Unit, ...]] = []
    for trunk in trunks:
        fits = (len(trunk) > 1 or not kept) and not any(woven(trunk, other) for other in kept)
        (kept if fits else beside).append(trunk)
    order = TopologicalSorter(
        {i: [j for j in range(len(kept)) if j != i and reads(kept[i], kept[j])] for i in range(len(kept))}
    )
    try:
        ordered = [kept[i] for i in order.static_order()]
    except CycleError:
        ordered, beside = kept[:1], [*kept[1:], *beside]
    return tuple(ordered), tuple(beside)
