"""In-place operators made functional, so that what a piece of the graph computes does not depend on who ran before it.

``torch.export`` records ``x += f(x)`` as ``add_``, which overwrites a tensor that other pieces read too. Where the overwritten tensor has no other
name that is read later, the operator is replaced by its functional twin and later readers follow; otherwise (``x[:, 0] = 0``) the whole
program is functionalised by torch.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusionblocks.converter.graph import is_tensor, op_name, value
from torch import fx

IDENTITIES = frozenset({"dropout", "alpha_dropout", "feature_dropout", "contiguous", "to", "lift_fresh", "getitem"})
"""Operators that may return their input itself without saying so in their schema."""


class NotLocal(Exception):
    """An overwritten tensor is read under another name."""


def is_in_place(node: fx.Node) -> bool:
    """Whether an operator overwrites one of its inputs."""
    return node.op == "call_function" and bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def replace_in_place(graph: fx.Graph) -> int:
    """Replace the in-place operators of ``graph``; returns how many there were.

    Raises:
        NotLocal: a tensor is overwritten that is read under another name (a view or its base) afterwards.
    """
    roots: dict[fx.Node, fx.Node] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    count = 0
    for node in list(graph.nodes):
        if not is_in_place(node):
            roots[node] = roots[node.args[0]] if _may_alias(node) else node  # type: ignore[index]
            continue
        twin, target = _twin(node), node.args[0]
        if not isinstance(target, fx.Node) or twin is None or roots[target].op == "get_attr":
            raise NotLocal(f"{node.target} overwrites {target}")
        for other in [n for n, root in roots.items() if root is roots[target] and n is not target]:
            if any(order[user] > order[node] for user in other.users):
                raise NotLocal(f"{other} is read after {target} was overwritten by {node.target}")
        node.target = twin
        late = [user for user in target.users if user is not node and order[user] > order[node]]
        for user in late:
            user.replace_input_with(target, node)
        roots[node] = node
        count += 1
    return count


def replace_copies(graph: fx.Graph) -> None:
    """Write ``copy(x, y)``, which has no derivative, as y in x's type and shape."""
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.copy.default:
            continue
        target, source = node.args[:2]
        with graph.inserting_before(node):
            if value(source).dtype != value(target).dtype:
                kind = value(target).dtype
                source = graph.call_function(torch.ops.aten.to.dtype, (source, kind))
                source.meta["val"] = value(node.args[1]).to(kind)
        node.target, node.args, node.kwargs = torch.ops.aten.expand_as.default, (source, target), {}


def _may_alias(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node) or not (is_tensor(node) or _is_tuple(node)):
        return False
    schema = getattr(node.target, "_schema", None)
    says_so = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return says_so or op_name(node) in IDENTITIES


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(value(node), list | tuple)


def _twin(node: fx.Node) -> Any:
    """The operator that returns what this one writes; None where there is none or its result has another type."""
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    twin = getattr(packet, overload, None)
    if twin is None or not is_tensor(node) or not isinstance(node.args[0], fx.Node):
        return None
    types = {value(a).dtype for a in node.all_input_nodes if is_tensor(a)}
    return twin if len(types) == 1 and not twin._schema.is_mutable else None
