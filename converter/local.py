"""What lies beside the trunk for one layer alone: its modulation from a timestep, its keys and values of another input, its share of position biases.

Pattern: nodes that depend on an input but not on the trunk's state, joined to each other, with weights that nothing else reads, whose results few neighbouring units (at most half of
all), or the head alone, read. They belong to those, with their weights; what more of the network reads (the timestep's embedding) belongs to the stem.

Requires: a trunk found in a captured graph. Ensures: changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusionblocks.converter.graph import GraphView, bits
from torch import fx


@dataclass(frozen=True)
class Local:
    """``nodes`` that the units ``first`` to ``last`` alone read (the head is the unit behind the last); ``reads``: the names of the parameters and constants they compute with."""

    nodes: frozenset[fx.Node]
    first: int
    last: int
    reads: frozenset[str]


def local_parts(view: GraphView, homes: Mapping[fx.Node, int], starts: Sequence[fx.Node], units: int) -> list[Local]:
    """The parts of a network that few of its units read.

    Args:
        view: the graph.
        homes: of each node the unit whose state it is the first to be needed for, -1 for the stem, ``units`` for the head.
        starts: what enters each trunk.
        units: how many there are.
    """
    spans = _spans(view, homes, starts)
    near = {n for n, (first, last) in spans.items() if first == last or 2 * (last - first + 1) <= units}
    first_name: dict[int, str] = {}
    parameters = {
        name: first_name.setdefault(id(p), name) for name, p in view.module.named_parameters(remove_duplicate=False)
    }
    reads = {node: _reads(view, node) for node in view.nodes if view.from_input[node]}
    readers: dict[str, set[fx.Node]] = {}
    for node, names in reads.items():
        for name in names & parameters.keys():
            readers.setdefault(parameters[name], set()).add(node)
    found = []
    for nodes in _alone(view, near, list(readers.values())):
        first, last = min(spans[n][0] for n in nodes), max(spans[n][1] for n in nodes)
        read = frozenset(name for node in nodes for name in reads[node])
        if read & parameters.keys() and (first == last or 2 * (last - first + 1) <= units):
            found.append(Local(frozenset(nodes), first, last, read))
    return sorted(found, key=lambda part: (part.first, part.last, min(view.index[n] for n in part.nodes)))


def _spans(view: GraphView, homes: Mapping[fx.Node, int], starts: Sequence[fx.Node]) -> dict[fx.Node, tuple[int, int]]:
    """The first and the last unit that reads a node beside the trunk; none for what the stem reads, or nobody, such as a size of it that the stem's shapes are made with."""
    inside = before = 0
    for start in starts:
        inside |= view.descendants[start]
        before |= view.ancestors[start]
    spans: dict[fx.Node, tuple[int, int]] = {}
    for node in reversed(view.nodes):
        place = 1 << view.index[node]
        if node.op != "call_function" or not view.from_input[node] or (inside | before) & place or homes[node] < 0:
            continue
        beside = [u for u in node.users if u.op != "output" and not inside >> view.index[u] & 1]
        if node.users and all(u in spans for u in beside):
            reached = [spans[u] if u in spans else (homes[u], homes[u]) for u in node.users]
            spans[node] = min(a for a, _ in reached), max(b for _, b in reached)
    return spans


def _reads(view: GraphView, node: fx.Node) -> frozenset[str]:
    """Names of the parameters and constants that a node computes with."""
    weights = [n for n in node.all_input_nodes if not view.from_input[n]]
    held = [view.nodes[i] for weight in weights for i in bits(view.ancestors[weight])]
    return frozenset(str(n.target) for n in held if n.op == "get_attr")


def _alone(view: GraphView, near: set[fx.Node], readers: Sequence[set[fx.Node]]) -> list[set[fx.Node]]:
    """Groups of nodes between which values pass, without nodes whose weights another group, or something else, reads too."""
    while True:
        groups = _joined(near)
        group = {node: g for g, nodes in enumerate(groups) for node in nodes}
        shared = {node for of in readers if len({group.get(node) for node in of}) > 1 for node in of}
        if not shared & near:
            return groups
        before = 0
        for node in shared & near:  # with all that they read: the stem reads no block
            before |= view.ancestors[node]
        near = {node for node in near if not before >> view.index[node] & 1}


def _joined(nodes: set[fx.Node]) -> list[set[fx.Node]]:
    """Groups of nodes between which values pass."""
    groups: list[set[fx.Node]] = []
    left = set(nodes)
    while left:
        group, stack = set[fx.Node](), [left.pop()]
        while stack:
            node = stack.pop()
            group.add(node)
            for other in (*node.all_input_nodes, *node.users):
                if other in left:
                    left.remove(other)
                    stack.append(other)
        groups.append(group)
    return groups
