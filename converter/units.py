"""What one addition of a captured graph is: a residual unit, with its fork, skip and branches, or none and why.

Patterns, for a tensor ``z`` (the fork) that reaches both operands of one addition::

    z + f(z)            identity skip (through dropout, reshapes and other layout changes)
    z + f(z) + g(z)     parallel branches: the outer addition's skip is itself a unit; one fork, two branches
    z + (f(z) + g(z))   one unit with two branches, where one module adds all three (linear ones, such as the kernels of a reparameterised
                        convolution, are one branch together)
    a*z + f(z)          scaled skip (a learned or constant factor)
    p(z) + f(z)         projected skip: at most one convolution or matrix product with parameters, fewer than in the branch, which is not linear
    z + gamma*f(z), norm(z + f(z)), act(z + f(z)) are the first pattern: what scales the branch lies in it (also as addcmul), what follows is not asked.

An addition is no unit (it becomes a :class:`Refusal` with its reason) when an operand is broadcast (a bias, a shift, a
position table), when it shifts what is scaled by a sibling of the shift (a modulation), when both operands do not fork from one tensor, when the branch holds no parameter (rotary embeddings),
when it lies inside another unit's branch (nested), reaches into one from outside (crossing), or spans several units (a long skip).

Requires: a flat captured graph, before decomposition. Ensures: changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffusionblocks.converter.graph import GraphView, is_tensor, module_path, op_name, shape_of, value
from torch import fx

TRANSPARENT = frozenset(
    [
        "clone",
        "contiguous",
        "detach",
        "alias",
        "to",
        "_to_copy",
        "dropout",
        "feature_dropout",
        "native_dropout",
        "view",
        "reshape",
        "_unsafe_view",
        "permute",
        "transpose",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "tensor_split",
        "movedim",
        "roll",
        "type_as",
        "expand",
        "getitem",
        "div",
        "t",
        "narrow",
        "pad",
        "constant_pad_nd",
    ]
)
ACTIVATIONS = frozenset({"relu", "silu"})
POOLING = frozenset({"avg_pool1d", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "max", "amax", "mean"})
PROJECTING = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "linear",
        "batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "native_layer_norm",
        "native_group_norm",
        "cudnn_batch_norm",
        "layer_norm",
        "group_norm",
        "rms_norm",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "cat",
        "bernoulli",
        *POOLING,
    ]
)
CHOOSING = frozenset(
    ["slice", "select", "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "narrow", "getitem"]
)
SINGLE_MIXERS = frozenset(["conv1d", "conv2d", "conv3d", "convolution", "linear"])
LINEAR = (
    TRANSPARENT
    | SINGLE_MIXERS
    | {"batch_norm", "_native_batch_norm_legit_no_training", "add", "sub", "neg", "sum", "mean", "cat"}
    | {"avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d"}
)
RANK = {"identity": 0, "parallel": 1, "scale": 2, "projection": 3}


@dataclass(frozen=True)
class Unit:
    """One residual unit: ``add`` joins ``skip`` and ``branches``, which all come from ``fork``.

    ``kind`` of skip: identity, parallel, scale or projection; ``shape`` of the sum, batch first ("batch", ...); ``name``: the
    outermost module that holds what the branches compute.
    """

    add: fx.Node
    fork: fx.Node
    branches: tuple[fx.Node, ...]
    kind: str
    shape: tuple[int | str, ...]
    name: str


@dataclass(frozen=True)
class Refusal:
    """Why an addition is not a unit of the trunk: a reason and the nodes (with their modules) it concerns."""

    reason: str
    nodes: tuple[str, ...]
    module: str


def refusal(node: fx.Node, reason: str, *others: fx.Node) -> Refusal:
    """Why ``node`` is no unit of a trunk."""
    return Refusal(reason, (node.name, *(n.name for n in others)), module_path(node))


def match(view: GraphView, node: fx.Node, units: dict[fx.Node, Unit]) -> Unit | Refusal:
    """What the addition ``node`` is; ``units`` are those found before it in the graph."""
    operands = [a for a in _operands(node) if isinstance(a, fx.Node) and is_tensor(a) and _may_fork(view, a)]
    if len(operands) != 2:
        return refusal(node, "one operand does not depend on the input (a bias or a table is added)")
    if operands[0] is operands[1]:
        return refusal(node, "both operands are the same tensor")
    if not value(node).is_floating_point() or value(node).dim() < 2:
        return refusal(node, "not a floating-point tensor with a batch and channels")
    shape = shape_of(node)
    if any(shape_of(o) != shape for o in operands):
        return refusal(node, "an operand is broadcast (a shift, not a residual)", *operands)
    if _is_modulation(view, *operands) or _is_modulation(view, *operands[::-1]):
        return refusal(node, "a modulation: its scale and its shift are made of one tensor", *operands)
    best: tuple[tuple[int, int], Unit] | None = None
    parameterless = False
    for skip, branch in (operands, operands[::-1]):
        for fork, kind, mixed in _sources(view, skip, units):
            if fork is branch or fork.op == "get_attr" or not view.depends(branch, fork):
                continue
            region = view.region(fork, branch)
            if not region & view.parametrised:
                parameterless = True
                continue
            mixers = (region & view.mixing).bit_count()
            if kind in ("projection", "scale") and (mixers <= mixed or (mixed and _is_linear(view, region))):
                break  # what lies further back is no fork: both operands come from this tensor
            rank = (RANK[kind], -view.index[fork])
            if best is None or rank < best[0]:
                branches = _branches(view, fork, branch, units, module_path(node))
                unit = Unit(node, fork, branches, kind, shape, _name(view, region))
                best = (rank, unit)
            break
    if best is not None:
        return best[1]
    if parameterless:
        return refusal(node, "the branch holds no parameter", *operands)
    return refusal(node, "the operands do not fork from one tensor by an identity or a small projection", *operands)


def _is_modulation(view: GraphView, scaled: fx.Node, shift: fx.Node) -> bool:
    """Whether ``scaled + shift`` is u * (1 + scale) + shift with scale and shift chosen from, or projected from, one tensor (one for every position)."""
    if op_name(scaled) != "mul":
        return False
    made = _made_from(view, shift)
    factors = [n for n in view.data_inputs(scaled) if is_tensor(n)]
    return len(factors) == 2 and any(made & _made_from(view, factor) for factor in factors)


def _made_from(view: GraphView, node: fx.Node) -> set[fx.Node]:
    """The tensors of which ``node`` is a part, or one projection, but for additions of constants, scales by numbers and changes of layout."""
    found: set[fx.Node] = set()
    made, mixers = False, 0
    while True:
        name, inputs = op_name(node), view.data_inputs(node)
        parted = name in CHOOSING
        mixers += name in SINGLE_MIXERS
        if (
            len(inputs) != 1
            or mixers > 1
            or not (parted or name in SINGLE_MIXERS or name in TRANSPARENT or name in ("add", "mul"))
        ):
            return found
        made |= parted or name in SINGLE_MIXERS
        node = inputs[0]
        if made and is_tensor(node):
            found.add(node)


def _operands(node: fx.Node) -> Sequence[Any]:
    """Both sides of a sum; of z + gamma * f in one operator the factor of full shape that is no plain weight."""
    if op_name(node) == "add":
        return node.args[:2]
    factors = [a for a in node.args[1:3] if isinstance(a, fx.Node) and a.op != "get_attr" and is_tensor(a)]
    full = [a for a in factors if shape_of(a) == shape_of(node)]
    return [node.args[0], *full[-1:]]


def _may_fork(view: GraphView, node: fx.Node) -> bool:
    """What depends on the input, and learned latents: a parameter that was expanded to the batch and is added once (a bias is added in every layer)."""
    if view.from_input[node]:
        return True
    return view.is_parameter[node] and node.op != "get_attr" and sum(op_name(u) == "add" for u in node.users) == 1


def _sources(view: GraphView, skip: fx.Node, units: dict[fx.Node, Unit]) -> Iterator[tuple[fx.Node, str, int]]:
    """Walk back from a skip operand over what a skip may hold, yielding each tensor passed, the skip's kind there and its mixing operators."""
    node, kind, mixers = skip, "identity", 0
    while True:
        if is_tensor(node):
            yield node, kind, mixers
        name, inputs = op_name(node), view.data_inputs(node)
        if node in units:
            if kind != "identity":
                return  # a skip that holds a projection and a whole unit, or two units, is a path of its own
            node, kind = units[node].fork, "parallel"
            continue
        if name == "cat" and len(inputs) > 1:
            pooled = {_before_pooling(view, n) for n in inputs}
            inputs = list(pooled) if len(pooled) == 1 else inputs
        if len(inputs) != 1:
            return
        if name in POOLING and is_tensor(node) and shape_of(node) == shape_of(inputs[0]):
            return  # a maximum over each neighbourhood is no skip, other than one for each stride
        if name in PROJECTING:
            learned = view.mixing >> view.index[node] & 1  # which the kernel of a blur is not
            mixers += name in SINGLE_MIXERS and learned == 1
            if mixers > 1:
                return
            kind = "projection"
        elif name in ACTIVATIONS:
            kind = "projection"
        elif name == "mul":
            kind = "scale" if kind == "identity" else kind
        elif name != "add" and name not in TRANSPARENT:
            return
        node = inputs[0]


def _before_pooling(view: GraphView, node: fx.Node) -> fx.Node:
    """The tensor that ``node`` pools; maxima and means of one tensor side by side are a pooling of it."""
    while op_name(node) in POOLING | TRANSPARENT and len(view.data_inputs(node)) == 1:
        node = view.data_inputs(node)[0]
    return node


def _branches(
    view: GraphView, fork: fx.Node, branch: fx.Node, units: dict[fx.Node, Unit], module: str
) -> tuple[fx.Node, ...]:
    """Expand a sum of branches, seeing through dropout and scales: ``f(z) + g(z)`` gives both, where the module that adds them adds the skip as well.

    (What a layer adds inside itself, such as experts and a shared expert, is one branch.)
    """
    found, stack = [], [branch]
    while stack:
        node = stack.pop()
        terms = _terms(view, fork, _unscaled(view, fork, node), units, module)
        if terms and all(view.depends(t, fork) and view.region(fork, t) & view.mixing for t in terms):
            stack += terms
        else:
            found.append(node)
    return linear_as_one(view, fork, sorted(found, key=lambda n: view.index[n]))


def _unscaled(view: GraphView, fork: fx.Node, node: fx.Node) -> fx.Node:
    """What a branch is before dropout, a layer scale or gate (a tensor that does not depend on the fork), and a division among several streams."""
    while True:
        if op_name(node) in ("dropout", "clone", "to", "_to_copy") and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
            continue
        if op_name(node) == "getitem" and op_name(node.all_input_nodes[0]) == "split_with_sizes":
            node = node.all_input_nodes[0].all_input_nodes[0]
            continue
        made = [n for n in node.all_input_nodes if is_tensor(n) and view.depends(n, fork)]
        factors = [a for a in node.args[:2] if isinstance(a, fx.Node) and is_tensor(a)]
        if op_name(node) != "mul" or len(factors) != 2 or len(made) != 1 or made[0] is fork:
            return node
        node = made[0]


def _terms(view: GraphView, fork: fx.Node, node: fx.Node, units: dict[fx.Node, Unit], module: str) -> list[fx.Node]:
    """The branches that ``node`` adds, in ``module``: two, or more that are stacked first; none where it is no such sum."""
    if node in units or module_path(node) != module:
        return []
    if op_name(node) == "add":
        terms = view.data_inputs(node)
        return terms if len(terms) == 2 else []
    stacked = node.args[0] if op_name(node) == "sum" else None
    if not isinstance(stacked, fx.Node) or op_name(stacked) != "stack" or node.args[1:2] != ([0],):
        return []
    return list(stacked.args[0]) if stacked.args[1:] in ((), (0,)) else []  # type: ignore[arg-type]


def linear_as_one(view: GraphView, fork: fx.Node, branches: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Of several linear branches, whose sum is one linear map, the one with most mixing operators (the last of those) stands for all."""
    linear = [b for b in branches if _is_linear(view, view.region(fork, b))]
    kept = max(linear, key=lambda b: ((view.region(fork, b) & view.mixing).bit_count(), view.index[b]), default=None)
    return tuple(b for b in branches if b is kept or b not in linear)


def _is_linear(view: GraphView, region: int) -> bool:
    """Whether what a region computes is a linear map of what enters it."""
    nodes = view.members(region)
    inside = set(nodes)
    return all(
        op_name(n) in LINEAR or (op_name(n) == "mul" and sum(i in inside for i in n.all_input_nodes) < 2)
        for n in nodes
        if is_tensor(n) or isinstance(value(n), list | tuple)
    )


def _name(view: GraphView, region: int) -> str:
    """Common prefix of the modules of the branch's mixing (else parametrised) operators."""
    nodes = view.members(region & view.mixing) or view.members(region & view.parametrised)
    paths = [path.split(".") for path in map(module_path, nodes) if path]
    if not paths:
        return ""
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
