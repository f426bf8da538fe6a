"""What a residual branch computes, told from its operators alone (never from the names of modules or models).

The region of a branch is what lies between its fork and its end. The first line that holds gives the kind:

    attention    a fused attention, or a softmax between two products of activations, or one that weighs sampled positions
    experts      a top-k, and rows picked or placed by it
    recurrent    a scan, a cumulative sum or product, an LSTM; or three additions in a row, each of a product with the one before
    attention    a product of two activations that leads to another one (linear attention)
    fourier      a Fourier transform
    convolution  a convolution with a kernel larger than one
    mlp          linear layers and convolutions with a kernel of one
    pooling      a pooling
    norm         a norm
    other        anything else

An attention whose queries and keys do not both come from the fork is a cross-attention.

Requires: a view of a captured graph. Ensures: changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusionblocks.converter.graph import MIXERS, NORMS, GraphView, op_name, value
from diffusionblocks.converter.units import Unit
from torch import fx

KINDS = (
    "attention",
    "cross-attention",
    "experts",
    "recurrent",
    "fourier",
    "convolution",
    "mlp",
    "pooling",
    "norm",
    "other",
)
PICKING = frozenset(
    [
        "index",
        "index_select",
        "index_put",
        "index_add",
        "gather",
        "scatter",
        "scatter_add",
        "one_hot",
        "bincount",
        "histc",
        "nonzero",
        "where",
        "eq",
        "_grouped_mm",
    ]
)
SCANNING = frozenset(
    [
        "cumsum",
        "cumprod",
        "logcumsumexp",
        "scan",
        "associative_scan",
        "while_loop",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
    ]
)
PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "mm", "einsum"])
SOFTMAX = frozenset(["softmax", "_softmax", "_safe_softmax"])
CASTS = frozenset(["to", "_to_copy", "type_as", "clone", "contiguous"])
STEPS = 3
"""Additions in a row, each of a product with the one before, that make an unrolled recurrence."""


def branch_kinds(view: GraphView, unit: Unit) -> tuple[str, ...]:
    """The kind of each of a unit's branches, one of :data:`KINDS`."""
    return tuple(branch_kind(view, unit.fork, branch) for branch in unit.branches)


def branch_kind(view: GraphView, fork: fx.Node, branch: fx.Node) -> str:
    """The kind of what ``branch`` computes from ``fork``."""
    region = view.members(view.region(fork, branch))
    names = {op_name(node) for node in region}
    products = [node for node in region if len(_factors(view, node)) == 2]
    compared = _compared(view, region, products)
    if compared is None and "topk" in names and names & PICKING:
        return "experts"
    if compared is None and (names & SCANNING or _unrolled(view, region)):
        return "recurrent"
    if compared is None:
        compared = next((_factors(view, p) for i, p in enumerate(products) if _feeds(view, p, products[i + 1 :])), None)
    if compared is not None:
        return "attention" if all(view.depends(n, fork) for n in compared) else "cross-attention"
    if any("fft" in name for name in names):
        return "fourier"
    kernels = [value(node.all_input_nodes[1]).shape[2:] for node in region if op_name(node).startswith("conv")]
    if any(size != 1 for kernel in kernels for size in kernel):
        return "convolution"
    if kernels or names & MIXERS:
        return "mlp"
    if any("pool" in name for name in names):
        return "pooling"
    return "norm" if names & NORMS else "other"


def _factors(view: GraphView, node: fx.Node) -> list[fx.Node]:
    """The two activations whose matrix product ``node`` is; [] for anything else."""
    if op_name(node) not in PRODUCTS:
        return []
    factors = view.data_inputs(node)[1:] if op_name(node) == "baddbmm" else view.data_inputs(node)
    return factors if len(factors) == 2 else []


def _compared(view: GraphView, region: Sequence[fx.Node], products: Sequence[fx.Node]) -> list[fx.Node] | None:
    """What an attention by softmax compares (queries and keys); None where the region holds none."""
    for node in region:
        if "attention" in op_name(node):
            return [n for n in node.args[:2] if isinstance(n, fx.Node)]
    for weights in (node for node in region if op_name(node) in SOFTMAX):
        before = [p for p in products if view.depends(weights, p)]
        if before and any(view.depends(p, weights) for p in products):
            return _factors(view, before[-1])
        if any("grid_sampl" in op_name(node) for node in region):
            return [weights]
    return None


def _feeds(view: GraphView, product: fx.Node, later: Sequence[fx.Node]) -> bool:
    return any(view.depends(node, product) for node in later)


def _unrolled(view: GraphView, region: Sequence[fx.Node]) -> bool:
    """Whether the region holds ``h = a * h + b`` three times in a row, with tensors a and b."""
    steps: dict[fx.Node, int] = {}
    for node in region:
        if op_name(node) == "add" and len(view.data_inputs(node)) == 2:
            products = [p for p in map(_uncast, node.all_input_nodes) if op_name(p) == "mul"]
            states = [_uncast(factor) for product in products for factor in product.all_input_nodes]
            steps[node] = 1 + max((steps.get(state, 0) for state in states), default=0)
    return max(steps.values(), default=0) >= STEPS


def _uncast(node: fx.Node) -> fx.Node:
    while op_name(node) in CASTS:
        node = node.all_input_nodes[0]
    return node
