"""Loops over the samples as operators on all of them.

A forward that goes through its samples (``[self.patches(x) for x in batch]``) leaves one copy of its operators for each in the graph. :func:`roll` finds what gathers them again
(cat, stack, pad_sequence) and, where each sample took the same way, puts one way for all in its place: the same operators with a dimension in front. What depends on no input is computed
before (:func:`settle`), so that tables and sizes of each sample are constants.

Requires: a flat graph without in-place operators, of a fixed number of rows. Ensures: the same function of those rows, but for the last digits of a matrix product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusionblocks.converter.graph import op_name
from torch import fx, nn

aten = torch.ops.aten
Rows = tuple[fx.Node, ...]
TAKEN = (aten.unbind.int, aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)
SIZES = frozenset(["view", "reshape", "_unsafe_view", "expand"])
AXES = frozenset(
    ["slice", "select", "transpose", "flatten", "chunk", "split", "split_with_sizes", "softmax", "_softmax"]
)
SAME = frozenset(["linear", "layer_norm", "pad", "constant_pad_nd", "to", "clone", "contiguous", "gelu", "silu"])
DATA = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class NotAlike(Exception):
    """The samples do not take the same way."""


def settle(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> None:
    """Compute what depends on neither inputs nor parameters, and the sizes of all tensors (in place); every node's ``meta["rows"]`` is its shape then.

    Raises:
        NotAlike: a size depends on the values of an input.
    """
    fixed: set[fx.Node] = set()
    for node in module.graph.nodes:
        computed = node.op == "call_function" and not _draws(node) and all(n in fixed for n in node.all_input_nodes)
        if computed or (node.op == "get_attr" and not isinstance(_attribute(module, node), nn.Parameter)):
            fixed.add(node)
    for node in list(module.graph.nodes):
        if (
            node.op == "call_function"
            and node not in fixed
            and any(tag in DATA for tag in getattr(node.target, "tags", ()))
        ):
            raise NotAlike(f"{node.format_node()} depends on the values of the input")
    values = _Values(module, fixed).of(inputs)
    for node in list(module.graph.nodes):
        value = values.get(node)
        if isinstance(value, int | float | bool):
            node.replace_all_uses_with(value)  # type: ignore[arg-type]
        elif node in fixed and node.op != "get_attr" and isinstance(value, torch.Tensor):
            users = [user for user in node.users if user not in fixed]
            if users:
                constant = _constant(module, value, node)
                for user in users:
                    user.replace_input_with(node, constant)
        shape = value.shape if isinstance(value, torch.Tensor) else value
        if isinstance(shape, torch.Size):
            node.meta["rows"] = tuple(shape)
    module.graph.eliminate_dead_code()


def roll(module: fx.GraphModule, rows: int) -> None:
    """Put one way for all samples in the place of ``rows`` equal ones (in place)."""
    rolling = _Rolling(module, rows)
    for node in list(module.graph.nodes):
        if node.target in (aten.cat.default, aten.stack.default, aten.pad_sequence.default):
            rolling.gather(node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


class _Values(fx.Interpreter):
    """What every node computes: of a tensor that depends on the inputs its shape alone, so that no more is held than the model itself would."""

    def __init__(self, module: fx.GraphModule, kept: set[fx.Node]) -> None:
        super().__init__(module)
        self.kept, self.found = kept, dict[fx.Node, Any]()

    def of(self, inputs: Sequence[torch.Tensor]) -> dict[fx.Node, Any]:
        with torch.no_grad():
            self.run(*inputs)
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.kept or isinstance(value, int | float | bool):
            self.found[n] = value
        elif isinstance(value, torch.Tensor):
            self.found[n] = value.shape
        return value


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(module)


def _constant(module: fx.GraphModule, value: torch.Tensor, before: fx.Node) -> fx.Node:
    k = 0
    while hasattr(module, f"settled_{k}"):
        k += 1
    module.register_buffer(f"settled_{k}", value.detach().clone(), persistent=False)
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(f"settled_{k}")
    node.meta = {**before.meta, "rows": tuple(value.shape)}
    return node


class _Rolling:
    """Ways of ``rows`` samples through a graph, and the one for all that was made of each."""

    def __init__(self, module: fx.GraphModule, rows: int) -> None:
        self.module, self.rows, self.made = module, rows, dict[Rows, fx.Node]()

    def gather(self, node: fx.Node) -> None:
        """Replace what joins the samples, if it does."""
        args: Sequence[Any] = node.args
        parts, rest, padded = args[0], args[1:], node.target is aten.pad_sequence.default
        if not isinstance(parts, list | tuple) or len(parts) != self.rows or len(set(parts)) == 1:
            return
        if (rest[:1] != (True,)) if padded else (rest[:1] not in ((), (0,))):
            return  # the samples lie elsewhere
        self.before = node
        try:
            if len({_shape(p) for p in parts}) > 1:
                return
            joined = self.joined(tuple(parts))
        except NotAlike:
            return
        if node.target is aten.cat.default:
            count, *others = _shape(parts[0])
            shape = [self.rows * count, *others]
            joined = self.call(aten.reshape.default, (joined, shape), node, shape)
        node.replace_all_uses_with(joined)

    def joined(self, parts: Rows) -> fx.Node:
        """[samples, *shape of one], of the samples' nodes."""
        if parts not in self.made:
            self.made[parts] = self.source(parts) or self.operator(parts)
        return self.made[parts]

    def source(self, parts: Rows) -> fx.Node | None:
        """What the samples were taken from, if it is one tensor with all in order."""
        first = parts[0]
        if len(set(parts)) == 1:
            new = self.call(aten.unsqueeze.default, (first, 0), first, (1, *_shape(first)))
            return self.call(aten.expand.default, (new, [self.rows, *_shape(first)]), first)
        if all(p.op == "get_attr" for p in parts):
            tensors = [_attribute(self.module, p) for p in parts]
            if any(isinstance(t, nn.Parameter) or t.shape != tensors[0].shape for t in tensors):
                raise NotAlike("parameters of different samples")
            return _constant(self.module, torch.stack(tensors), self.before)
        owners = {p.args[0] for p in parts if p.op == "call_function" and p.args}
        owner = owners.pop() if len(owners) == 1 else None
        if not isinstance(owner, fx.Node) or len({p.target for p in parts}) > 1:
            return None
        numbered = [_place(p) for p in parts] == list(range(self.rows))
        if first.target is operator.getitem:
            whole = owner.args[0]
            if owner.target not in TAKEN or not isinstance(whole, fx.Node) or not numbered or _axis(owner):
                return None
            if owner.target is aten.unbind.int:
                return whole if _shape(whole)[0] == self.rows else None
            return self.folded(whole, parts)
        if not numbered or not _shape(owner) or _shape(owner)[0] != self.rows:
            return None
        return owner if first.target is aten.select.int else self.folded(owner, parts)

    def folded(self, whole: fx.Node, parts: Rows) -> fx.Node | None:
        """[samples x count, ...] as [samples, count, ...]."""
        shape = _shape(parts[0])
        if _shape(whole) != (self.rows * shape[0], *shape[1:]) or len({_shape(p) for p in parts}) > 1:
            return None
        return self.call(aten.reshape.default, (whole, [self.rows, *shape]), parts[0])

    def operator(self, parts: Rows) -> fx.Node:
        """The operator that all samples go through, with a dimension in front."""
        first = parts[0]
        alike = all(p.op == "call_function" and p.target == first.target and p.kwargs == first.kwargs for p in parts)
        if not alike or any(isinstance(leaf, fx.Node) for leaf in first.kwargs.values()):
            raise NotAlike(f"{first.format_node()} of other samples is something else")
        if first.target is operator.getitem and len({p.args[1] for p in parts}) == 1:
            many = self.operator(tuple(p.args[0] for p in parts))  # type: ignore[misc]
            return self.call(operator.getitem, (many, first.args[1]), first)
        args = tuple(self.argument(same) for same in zip(*(p.args for p in parts), strict=True))
        return self.call(first.target, self.shifted(first, args), first)

    def argument(self, same: tuple[Any, ...]) -> Any:
        """One argument of all samples: what is no node has to be the same."""
        if all(isinstance(a, fx.Node) for a in same):
            weight = same[0].op == "get_attr" and len(set(same)) == 1
            return same[0] if weight else self.joined(same)
        if isinstance(same[0], list | tuple) and len({len(a) for a in same}) == 1:
            return [self.argument(item) for item in zip(*same, strict=True)]
        if any(a != same[0] for a in same):
            raise NotAlike(f"{same} differ")
        return same[0]

    def shifted(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """An operator's arguments for one dimension more."""
        name = op_name(node)
        source = node.args[0][0] if isinstance(node.args[0], list | tuple) else node.args[0]
        rank = len(_shape(source))  # type: ignore[arg-type]
        if name in SIZES and (name != "expand" or len(args[1]) == rank):
            return (args[0], [self.rows, *args[1]])
        if name == "repeat" and len(args[1]) == rank:
            return (args[0], [1, *args[1]])
        if name == "permute":
            return (args[0], [0, *(d % rank + 1 for d in args[1])])
        if name in ("unsqueeze", "stack"):
            return (args[0], (args[1] if len(args) > 1 else 0) % (rank + 1) + 1)
        if name == "cat":
            return (args[0], (args[1] if len(args) > 1 else 0) % rank + 1)
        if name in AXES:
            return self.moved(node, args, rank)
        if name in SAME or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            ranks = {
                len(_shape(a)) for a in node.args if isinstance(a, fx.Node) and "rows" in a.meta and a.op != "get_attr"
            }
            if len(ranks) == 1:
                return args
        raise NotAlike(f"{node.format_node()} has no form for all samples")

    def moved(self, node: fx.Node, args: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
        """Arguments that hold dimensions by their names in the operator's schema."""
        named = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(named, args, strict=False))
        for argument in node.target._schema.arguments:  # type: ignore[union-attr]
            if argument.name in ("dim", "dim0", "dim1", "start_dim", "end_dim") and argument.name not in node.kwargs:
                axis = given.get(argument.name, argument.default_value)
                given[argument.name] = axis % rank + 1
        return tuple(given.get(a.name, a.default_value) for a in node.target._schema.arguments if not a.kwarg_only)  # type: ignore[union-attr]

    def call(
        self, target: Callable[..., Any] | str, args: tuple[Any, ...], like: fx.Node, shape: Sequence[int] | None = None
    ) -> fx.Node:
        """An operator in front of what joins the samples, that stands for ``like`` of each; ``shape``: of its result, where that is not [samples, *shape of ``like``]."""
        with self.module.graph.inserting_before(self.before):
            node = self.module.graph.call_function(target, args, dict(like.kwargs) if target is like.target else {})  # type: ignore[arg-type]
        node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
        if shape is not None or "rows" in like.meta:
            node.meta["rows"] = (self.rows, *_shape(like)) if shape is None else tuple(shape)
        return node


def _shape(node: fx.Node) -> tuple[int, ...]:
    try:
        return node.meta["rows"]  # type: ignore[no-any-return]
    except KeyError:
        raise NotAlike(f"{node} is no tensor") from None


def _place(node: fx.Node) -> int | None:
    """Which sample a node takes of a tensor's first dimension."""
    args: Sequence[Any] = node.args
    if node.target is operator.getitem:
        return args[1] if isinstance(args[1], int) else None
    if node.target is aten.select.int:
        return args[2] if args[1] == 0 and isinstance(args[2], int) else None
    if node.target is aten.slice.Tensor and len(args) == 4 and args[1] == 0 and isinstance(args[2], int):
        return args[2] if args[3] == args[2] + 1 else None
    return None


def _axis(node: fx.Node) -> int:
    args: Sequence[Any] = node.args
    place = 1 if node.target is aten.unbind.int else 2
    return int(args[place]) if len(args) > place else int(node.kwargs.get("dim", 0))  # type: ignore[arg-type]
