"""What two pieces have in common: a module with its weights as inputs, and a text that is equal for modules of one structure.

Requires: modules that are torch.fx graphs or built of plain attributes. Ensures: modules with equal texts compute the same function of
their inputs and weights, so that one exported graph serves both, each with its own weights.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.memory_format, torch.layout)


class WeightsAsInputs(nn.Module):
    """``forward(*inputs, *weights)`` of a module, its own weights replaced by the given ones.

    ``names``: the weights' names, in order: every parameter and buffer the module holds, each distinct tensor once.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = tuple(weights_of(module))
        self._module = [module]  # a list, so that its weights are not this module's

    def forward(self, *values: torch.Tensor) -> Any:
        count = len(values) - len(self.names)
        return functional_call(
            self._module[0], dict(zip(self.names, values[count:], strict=True)), values[:count], tie_weights=True
        )


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each distinct tensor under its first name, in an order that depends on the structure alone."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def structure_of(module: nn.Module) -> str | None:
    """A text equal for modules of one structure; None where it cannot be told (attributes that are not plain data)."""
    weights = weights_of(module)
    numbers = {id(tensor): i for i, tensor in enumerate(weights.values())}
    held = [f"{t.dtype} {tuple(t.shape)}" for t in weights.values()]  # also those that a graph does not read
    try:
        return "\n".join([*held, *_describe(module, numbers)])
    except _Opaque:
        return None


class _Opaque(Exception):
    """An attribute that is no plain data."""


def _describe(module: nn.Module, numbers: dict[int, int]) -> Iterator[str]:
    yield (
        f"module {type(module).__module__}.{type(module).__qualname__}"
        if not isinstance(module, fx.GraphModule)
        else "graph"
    )
    if isinstance(module, fx.GraphModule):
        yield from _describe_graph(module, numbers)
        return
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield f"{name}: {_tensor(tensor, numbers)}"
    for name, attribute in sorted(vars(module).items()):
        if not name.startswith("_") and name != "training":  # what is exported is in eval mode
            yield f"{name} = {_plain(attribute)}"
    for name, child in module.named_children():
        yield f"child {name}"
        yield from _describe(child, numbers)


def _describe_graph(module: fx.GraphModule, numbers: dict[int, int]) -> Iterator[str]:
    order: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        order[node] = len(order)
        if node.op == "placeholder":
            yield "placeholder"
        elif node.op == "get_attr":
            yield f"get_attr {_tensor(operator.attrgetter(str(node.target))(module), numbers)}"
        else:
            arguments = _plain((node.args, dict(node.kwargs)), order)
            yield f"{node.op} {_target(node)} {arguments}"
            if node.op == "call_module":
                yield from _describe(module.get_submodule(str(node.target)), numbers)


def _target(node: fx.Node) -> str:
    if node.op == "call_module":
        return ""
    if node.op == "call_function":
        return f"{getattr(node.target, '__module__', '')}.{node.target}" if callable(node.target) else str(node.target)
    return str(node.target)


def _tensor(value: Any, numbers: dict[int, int]) -> str:
    if not isinstance(value, torch.Tensor) or id(value) not in numbers:
        raise _Opaque
    return f"weight {numbers[id(value)]} {value.dtype} {tuple(value.shape)} {value.requires_grad}"


def _plain(value: Any, order: Mapping[fx.Node, int] | None = None) -> str:
    """Plain data as text, a node by its position in ``order``."""
    if value is None or value is Ellipsis or isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, fx.Node) and order is not None:
        return f"%{order[value]}"
    if isinstance(value, slice):
        return f"slice{_plain((value.start, value.stop, value.step), order)}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_plain(item, order) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_plain(item, order)}" for key, item in value.items()) + "}"
    raise _Opaque
