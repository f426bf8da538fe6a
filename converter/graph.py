"""Reading a captured graph: operator names, reachability, which nodes depend on the input and which hold parameters."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

NORMS = frozenset({"layer_norm", "native_layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"})
MIXERS = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "conv_transpose1d",
        "conv_transpose2d",
        "linear",
        "addmm",
        "mm",
        "matmul",
        "bmm",
        "baddbmm",
        "einsum",
        "embedding",
        "scaled_dot_product_attention",
    ]
)
"""Operators that mix positions or channels: what a projection or a residual branch is made of."""


def op_name(node: fx.Node) -> str:
    """Name of a node's ATen operator without overload and in-place mark (``add``, ``layer_norm``); '' for other nodes."""
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    return name[:-1] if name.endswith("_") and not name.startswith("_") else name


def value(node: fx.Node) -> Any:
    """The example value recorded at capture (a fake tensor, a symbolic size, a tuple)."""
    return node.meta.get("val")


def is_tensor(node: fx.Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def shape_of(node: fx.Node) -> tuple[int | str, ...]:
    """Shape with symbolic sizes as text: the batch is 'batch' when it leads."""
    return tuple(s if isinstance(s, int) else ("batch" if i == 0 else str(s)) for i, s in enumerate(value(node).shape))


def module_path(node: fx.Node) -> str:
    """Dotted name of the innermost module the node came from ('' at the top)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else entry for entry in stack.values()]
    path = str(paths[-1]) if paths else ""
    for prefix in ("L['self'].", "L['self']"):
        path = path.removeprefix(prefix)
    return path


def bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class GraphView:
    """Indices and bit sets over the nodes of one graph; valid until the graph is changed.

    ``ancestors[n]``/``descendants[n]`` include ``n`` and go through tensors (and tuples of tensors) only, never through
    sizes: a shape computed from a tensor is no data dependency.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        self.ancestors: dict[fx.Node, int] = {}
        self.from_input: dict[fx.Node, bool] = {}
        self.is_parameter: dict[fx.Node, bool] = {}
        self.parametrised = 0
        self.mixing = 0
        for i, node in enumerate(self.nodes):
            sources = [n for n in node.all_input_nodes if is_tensor(n) or isinstance(value(n), list | tuple)]
            mask = 1 << i
            for source in sources:
                mask |= self.ancestors[source]
            self.ancestors[node] = mask
            self.from_input[node] = node.op == "placeholder" or any(self.from_input[s] for s in sources)
            self.is_parameter[node] = (node.op == "get_attr" and node.target in parameters) or (
                not self.from_input[node] and any(self.is_parameter[n] for n in node.all_input_nodes)
            )
            if (
                node.op == "call_function"
                and self.from_input[node]
                and any(self.is_parameter[n] for n in node.all_input_nodes)
            ):
                self.parametrised |= 1 << i
                if op_name(node) in MIXERS:
                    self.mixing |= 1 << i
        self.descendants: dict[fx.Node, int] = {}
        for i in reversed(range(len(self.nodes))):
            node = self.nodes[i]
            mask = 1 << i
            for user in node.users:
                if op_name(user) != "sym_size":
                    mask |= self.descendants[user]
            self.descendants[node] = mask

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        return bool(self.ancestors[node] >> self.index[on] & 1)

    def region(self, fork: fx.Node, end: fx.Node) -> int:
        """Nodes on a path from ``fork`` (left out) to ``end`` (included)."""
        return self.ancestors[end] & self.descendants[fork] & ~(1 << self.index[fork])

    def members(self, mask: int) -> list[fx.Node]:
        return [self.nodes[i] for i in bits(mask)]

    def data_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Tensor (or tuple) inputs that depend on the model's input."""
        return [
            n
            for n in node.all_input_nodes
            if self.from_input[n] and (is_tensor(n) or isinstance(value(n), list | tuple))
        ]
