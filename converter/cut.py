"""Cutting a captured graph along its trunk into stem, blocks and head, each a GraphModule that shares the parameters.

A node belongs to the first cut it is an ancestor of. What depends on the input but not on the trunk (masks, position tables made from
the input) goes to the stem, but for what a layer alone makes of it with its own weights (``local``); what does not depend on the input at all is computed again in every piece that needs it;
sizes are read again from a tensor that enters the piece. A tensor that crosses a cut beside the trunk's state is a side value: an explicit
input of the piece that needs it and an output of the piece that makes it.

Where one trunk ends and another begins (a decoder behind its encoder, a second tower), the cut lies at the second one's first fork, and the first
one's end crosses it as a side value.

Requires: a flat graph, cut nodes in the order of the trunks. Ensures: run in sequence the pieces compute what the graph computes,
operator for operator.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd
from typing import Any

import torch
from diffusionblocks.converter.graph import GraphView, is_tensor, op_name, value
from diffusionblocks.converter.local import Local, local_parts
from diffusionblocks.converter.partition import Partition
from diffusionblocks.converter.residual import Found
from diffusionblocks.converter.samples import as_text, batch_axes, batch_symbols, multiple
from diffusionblocks.converter.units import Unit
from diffusionblocks.runtime.errors import BadInput
from torch import fx


@dataclass(frozen=True)
class GraphPiece:
    """A piece: ``module`` takes the values of ``inputs`` (nodes of the whole graph) and returns those of ``outputs``.

    The first input of a block or head and the first output of a stem or block is the stream; others are side values.
    """

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Cuts:
    """Where a network is divided: ``nodes[k]`` is the state that enters block k (the last one leaves the last block); ``ends[k]`` are the
    ends of the trunks that are whole by then; ``starts`` is what enters each trunk; ``local``: what one layer alone reads, and ``kept`` those of its nodes that stay with it."""

    nodes: tuple[fx.Node, ...]
    ends: tuple[tuple[fx.Node, ...], ...]
    starts: tuple[fx.Node, ...]
    local: tuple[Local, ...] = ()
    kept: frozenset[fx.Node] = frozenset()


def cuts_of(found: Found, partition: Partition, *, outlined: bool = False) -> Cuts:
    """The B + 1 places where the trunks are cut: into block 0, between blocks, and behind the last.

    Between two units the cut lies at the later one's fork, so that what stands between them (a norm or activation after the sum, a
    downsampling) ends the earlier block. Behind the last unit the same tail is looked for, so that all blocks end alike.

    What units of one block alone read stays there; with ``outlined`` also what units of two read, with the first of them.
    """
    where = _places(found, partition)
    every = _places(found, Partition((1,) * len(found.trunk), "explicit"))
    return _with_local(where, found, every, None if outlined else _bounds(partition))


def _bounds(partition: Partition) -> list[tuple[int, int]]:
    """First and last unit of each block, and the head as the unit behind the last."""
    of = list(zip(partition.starts, partition.counts, strict=True))
    units = sum(partition.counts)
    return [*((start, start + count - 1) for start, count in of), (units, units)]


def _with_local(where: Cuts, found: Found, every: Cuts, bounds: Sequence[tuple[int, int]] | None) -> Cuts:
    homes = {node: home - 1 for node, home in _homes(found.view, every).items()}
    local = tuple(local_parts(found.view, homes, where.starts, len(found.trunk)))
    staying = [p for p in local if bounds is None or any(a <= p.first and p.last <= b for a, b in bounds)]
    return replace(where, local=local, kept=frozenset(node for part in staying for node in part.nodes))


def _places(found: Found, partition: Partition) -> Cuts:
    trunk = found.trunk
    home = {unit.add: t for t, units in enumerate(found.trunks) for unit in units}
    lasts = [units[-1].add for units in found.trunks]
    nodes = [trunk[start].fork for start in partition.starts]
    ends = [tuple(lasts[: home[trunk[start].add]]) for start in partition.starts]
    starts = tuple(units[0].fork for units in found.trunks)
    return Cuts((*nodes, _last_cut(found.view, trunk)), (*ends, tuple(lasts[:-1])), starts)


def cuts_around(found: Found, period: int) -> Cuts:
    """The places before and behind the first ``period`` units of a trunk that repeats them."""
    trunk = found.trunk
    where = Cuts((trunk[0].fork, _last_cut(found.view, trunk, period)), ((), ()), (trunk[0].fork,))
    every = _places(found, Partition((1,) * len(trunk), "explicit"))
    return _with_local(where, found, every, [(0, period - 1), (period, len(trunk))])


def _last_cut(view: GraphView, trunk: Sequence[Unit], count: int | None = None) -> fx.Node:
    """The place behind the ``count`` first units, all where it is not given."""
    tails = [_tail(before.add, after.fork) for before, after in pairwise(trunk)]
    last = trunk[(count or len(trunk)) - 1].add
    for tail in sorted({t for t in tails if t}, key=lambda t: (-tails.count(t), t)):
        node, matched = last, True
        for name in tail:
            users = [u for u in node.users if is_tensor(u)]
            if len(users) != 1 or op_name(users[0]) != name or view.data_inputs(users[0]) != [node]:
                matched = False
                break
            node = users[0]
        if matched and str(value(node).numel()) == str(value(last).numel()):
            return node
    return last


def _tail(start: fx.Node, end: fx.Node) -> tuple[str, ...]:
    """Operator names on the single path from ``start`` to ``end`` (at most three), () where there is none."""
    names: list[str] = []
    node = end
    while node is not start:
        inputs = [n for n in node.all_input_nodes if is_tensor(n) and n.op != "get_attr"]
        if len(inputs) != 1 or len(names) == 3:
            return ()
        names.append(op_name(node))
        node = inputs[0]
    return tuple(names[::-1])


def cut(module: fx.GraphModule, where: Cuts) -> tuple[GraphPiece, ...]:
    """Cut ``module`` into ``len(where.nodes) + 1`` pieces: stem, the blocks, head."""
    view = GraphView(module)
    output = view.nodes[-1]
    cuts = where.nodes
    owner = _owners(view, where)
    count = len(cuts) + 1
    bodies: list[set[fx.Node]] = []
    inputs: list[list[fx.Node]] = []
    for k in range(count):
        roots = [n for n in view.nodes if owner[n] == k and n.op not in ("placeholder", "output", "get_attr")]
        if k == count - 1:
            roots += output.all_input_nodes
        else:
            roots.append(cuts[k])
        body, needs = _closure(view, roots, owner, k, cuts)
        bodies.append(body)
        ordered = sorted(needs, key=lambda n: view.index[n])
        if k > 0:
            ordered = [cuts[k - 1], *(n for n in ordered if n is not cuts[k - 1])]
        inputs.append(ordered)
    pieces = []
    for k in range(count):
        later = {n for needs in inputs[k + 1 :] for n in needs}
        if k == count - 1:
            outputs = [n for n in output.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
        else:
            again = {
                n for needs in inputs[k + 2 :] for n in needs
            }  # a state that is read again later crosses as a side value too
            made = [
                n
                for n in view.nodes
                if n in (again if n is cuts[k] else later) and owner[n] == k and n.op != "placeholder"
            ]
            outputs = [cuts[k], *made]
        body = bodies[k] | {n for n in outputs if n.op == "get_attr"}
        pieces.append(_piece(module, view, body, inputs[k], outputs))
    return tuple(pieces)


def narrowed(piece: GraphPiece, wanted: Container[fx.Node]) -> GraphPiece:
    """The piece with its stream and those of its side values alone that are ``wanted``, and what they are made of."""
    graph = fx.Graph()
    made: Any = graph.graph_copy(piece.module.graph, {})
    kept = [i for i, node in enumerate(piece.outputs) if not i or node in wanted]
    graph.output(tuple(made[i] for i in kept))
    graph.eliminate_dead_code()
    used = []
    for node, source in zip(graph.find_nodes(op="placeholder"), piece.inputs, strict=True):
        if node.users:
            used.append(source)
        else:
            graph.erase_node(node)
    return GraphPiece(fx.GraphModule(piece.module, graph), tuple(used), tuple(piece.outputs[i] for i in kept))


def _homes(view: GraphView, where: Cuts) -> dict[fx.Node, int]:
    """The first cut each node is an ancestor of, one more than there are for those of none."""
    owner: dict[fx.Node, int] = {}
    for k, node in enumerate(where.nodes):
        stack = [node, *where.ends[k]]
        while stack:
            n = stack.pop()
            if n not in owner:
                owner[n] = k
                stack += n.all_input_nodes
    for node in view.nodes:
        owner.setdefault(node, len(where.nodes))
    return owner


def _owners(view: GraphView, where: Cuts) -> dict[fx.Node, int]:
    owner = _homes(view, where)
    for node in view.nodes:
        home = owner[node]
        inside = any(node is not start and view.depends(node, start) for start in where.starts)
        if home and view.from_input[node] and not inside and node not in where.kept and _hoistable(view, node):
            owner[node] = 0
    for node in view.nodes:
        if op_name(node) == "getitem":
            owner[node] = owner[node.all_input_nodes[0]]
    return owner


def _hoistable(view: GraphView, node: fx.Node) -> bool:
    """Whether a node off the trunk may move to the stem: all but conditioning, whose inputs only the blocks have."""
    mask = view.ancestors[node]
    return node.op != "output" and not any(
        n.op == "placeholder" and str(n.target).startswith("adaln_") and mask >> i & 1 for i, n in enumerate(view.nodes)
    )


def _closure(
    view: GraphView, roots: Sequence[fx.Node], owner: dict[fx.Node, int], k: int, cuts: Sequence[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes that piece k computes, and those it takes as inputs."""
    body: set[fx.Node] = set()
    needs: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in body or node in needs:
            continue
        free = (
            not view.from_input[node] and node.op != "placeholder" and node not in cuts
        )  # learned latents may be a cut
        if node.op == "placeholder" or (owner[node] != k and is_tensor(node) and not free):
            needs.add(node)
        else:
            body.add(node)
            if not (k > 0 and op_name(node) == "sym_size"):
                stack += node.all_input_nodes
    return body, needs


def _piece(
    module: fx.GraphModule, view: GraphView, body: set[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]
) -> GraphPiece:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in view.nodes:
        if node not in body or node in env:
            continue
        if op_name(node) == "sym_size" and node.all_input_nodes[0] not in env:
            env[node] = _size(graph, node, inputs, env, view)
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
            _say_size(env[node])
    graph.output(tuple(env[n] for n in outputs))
    piece = fx.GraphModule(module, graph)
    piece.graph.eliminate_dead_code()
    piece = fx.GraphModule(piece, piece.graph)  # again, so that it holds what it reads and nothing else
    return GraphPiece(piece, tuple(inputs), tuple(outputs))


def _say_size(node: fx.Node) -> None:
    """Let a reshape to ``[N, -1, 8]`` say the number that is the same in every batch: the N of another input is no reason for torch to know it."""
    known = value(node).shape if op_name(node) == "reshape" and len(node.args) > 1 else ()
    if not all(isinstance(size, int) for size in known):
        sizes = [n if s == -1 and isinstance(n, int) else s for s, n in zip(node.args[1], known, strict=True)]  # type: ignore[arg-type]
        node.args = (node.args[0], sizes, *node.args[2:])


def _size(
    graph: fx.Graph, node: fx.Node, inputs: Sequence[fx.Node], env: dict[fx.Node, fx.Node], view: GraphView
) -> fx.Node:
    wanted = value(node)
    symbols = batch_symbols(view.nodes)
    written = as_text(wanted, symbols)
    for source in inputs:
        for d, size in enumerate(value(source).shape):
            if as_text(size, symbols) == written:
                size_node = graph.call_function(torch.ops.aten.sym_size.int, (env[source], d))
                size_node.meta = dict(node.meta)
                return size_node
    times = multiple(wanted, symbols)
    for source in inputs if times else ():
        for d, rows in batch_axes(value(source).shape, symbols).items():
            whole = graph.call_function(torch.ops.aten.sym_size.int, (env[source], d))
            whole.meta = {"val": value(source).shape[d]}
            common = gcd(times, rows)
            made = whole if rows == common else graph.call_function(operator.floordiv, (whole, rows // common))
            made.meta = {"val": value(source).shape[d] // (rows // common)}
            made = made if times == common else graph.call_function(operator.mul, (made, times // common))
            made.meta = dict(node.meta)
            return made
    raise BadInput(
        f"The size {wanted} that {node.name} reads cannot be told from what enters the block.",
        hint="Export the model with that size fixed, or make it an input of the block.",
    )
