"""What a captured graph computes of constants alone, computed once: tables of frequencies, orthogonal weights.

ONNX Runtime's exp may differ from torch's in the last digit, which a sine of a thousand times that frequency makes a difference in the fourth; and some
operators (a QR decomposition) have no ONNX form, though all they read is weights.

Requires: a flat captured graph with examples. Ensures: the same function to the bit; what was folded is a buffer, equal ones are one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from diffusionblocks.converter.graph import is_tensor, op_name, value
from torch import fx

LARGEST = 1 << 16
"""Elements of a table that is worth storing."""
ROUNDED = frozenset(
    [
        *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "pow", "sqrt", "rsqrt", "reciprocal", "div"),
        *("sin", "cos", "tan", "tanh", "sigmoid"),
    ]
)
"""Operators whose last digit depends on the library."""
DECOMPOSITIONS = frozenset(
    [
        *("linalg_qr", "linalg_svd", "linalg_eigh", "linalg_cholesky", "linalg_cholesky_ex"),
        *("linalg_inv", "linalg_inv_ex", "inverse", "linalg_solve", "linalg_solve_ex"),
        *("linalg_matrix_exp", "matrix_exp", "linalg_householder_product"),
    ]
)
"""Operators without an ONNX form that are used to make weights of weights."""


def fold(module: fx.GraphModule) -> None:
    """Replace by buffers what is computed of constants by :data:`ROUNDED` operators, or of weights by a decomposition; and by numbers quotients of
    sizes that are equal in every batch (in place)."""
    for node in list(module.graph.nodes):
        number = _equal_in_every_batch(value(node)) if node.op == "call_function" else None
        if number is not None:
            node.replace_all_uses_with(number)  # type: ignore[arg-type]
    plain = _made_of(module, weights=False)
    rounded = _reaching(plain, ROUNDED)
    weights = _made_of(module, weights=True)
    decomposed = _reaching(weights, DECOMPOSITIONS) if any(op_name(n) in DECOMPOSITIONS for n in weights) else set()
    tables = [n for n in _in_order(weights) if _is_table(n) and ((n in plain and n in rounded) or n in decomposed)]
    found = [n for n in tables if any(u not in (decomposed if n in decomposed else plain) for u in n.users)]
    known: dict[fx.Node, Any] = {}
    names: dict[tuple[Any, ...], str] = {}
    for node in found:
        tensor = _computed(module, node, known).detach().clone()
        key = (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        if key not in names:
            names[key] = _free(module)
            module.register_buffer(names[key], tensor, persistent=False)
        with module.graph.inserting_before(node):
            table = module.graph.get_attr(names[key])
        table.meta = dict(node.meta)
        node.replace_all_uses_with(table)


def _equal_in_every_batch(size: Any) -> float | None:
    """A symbolic number that is no whole one and is the same whatever the batch."""
    if not isinstance(size, torch.SymFloat):
        return None
    expression = size.node.expr
    found = {expression.subs(dict.fromkeys(expression.free_symbols, batch)) for batch in (3, 5, 7)}
    return float(found.pop()) if len(found) == 1 else None


def _made_of(module: fx.GraphModule, *, weights: bool) -> set[fx.Node]:
    """Nodes that depend on no input and no size of one (nor, without ``weights``, on weights), and are the same every time."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        made = node.op == "call_function" and not drawn and all(n in found for n in node.all_input_nodes)
        if made or (weights and node.op == "get_attr"):
            found.add(node)
    return found


def _reaching(nodes: set[fx.Node], names: frozenset[str]) -> set[fx.Node]:
    """Those of ``nodes`` that are made by one of these operators, at last or before."""
    found: set[fx.Node] = set()
    for node in _in_order(nodes):
        if op_name(node) in names or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _in_order(nodes: set[fx.Node]) -> list[fx.Node]:
    return [n for n in next(iter(nodes)).graph.nodes if n in nodes] if nodes else []


def _is_table(node: fx.Node) -> bool:
    if node.op != "call_function" or not is_tensor(node) or not value(node).is_floating_point():
        return False
    shape = value(node).shape
    return all(isinstance(s, int) for s in shape) and 0 < value(node).numel() <= LARGEST


def _computed(module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of a node that depends on no input."""
    stack = [node]
    while stack:
        last = stack[-1]
        missing = [n for n in last.all_input_nodes if n not in known]
        if missing and last.op != "get_attr":
            stack += missing
            continue
        stack.pop()
        with torch.no_grad():
            if last.op == "get_attr":
                known[last] = operator.attrgetter(str(last.target))(module)
            else:
                args, kwargs = fx.node.map_arg((last.args, last.kwargs), lambda n: known[n])
                known[last] = last.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]


def _free(module: fx.GraphModule) -> str:
    k = 0
    while hasattr(module, f"folded_{k}"):
        k += 1
    return f"folded_{k}"
