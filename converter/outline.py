"""A captured network cut between all of its units, plain and conditioned: what every division into blocks is added up from.

Requires: a captured graph with a trunk; its weights may be on the meta device. Ensures: the captured graph is unchanged. As a node belongs to the first cut it is an
ancestor of, the pieces of a block of several units are those of its units, one after another.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from diffusionblocks.converter import adaln, blocks
from diffusionblocks.converter.adapter import Adapter
from diffusionblocks.converter.analysis import no_trunk
from diffusionblocks.converter.capture import Captured, flatten
from diffusionblocks.converter.cut import GraphPiece, cut, cuts_of
from diffusionblocks.converter.graph import is_tensor, value
from diffusionblocks.converter.label_target import RANDOM_DIM
from diffusionblocks.converter.lowrank import add_low_rank
from diffusionblocks.converter.partition import Partition
from diffusionblocks.converter.residual import Found, find_trunk
from diffusionblocks.converter.targets import classifier_rows
from torch import fx, nn
from torch.utils import _pytree as pytree

Z_ROWS = 2
"""Dimensions of z: the batch and its coordinates."""


@dataclass(frozen=True)
class Target:
    """What the head predicts: ``classes`` K and dimension ``dim`` of the table E, None where it predicts no label a row; ``positions``: logits at
    each place of a sequence."""

    classes: int
    dim: int
    positions: bool


@dataclass(frozen=True)
class Outline:
    """``plain``: stem, units, head of the original; ``conditioned``: the units with AdaLN (and low-rank updates under ``tune`` lora), whose factors are made
    from :class:`Given`; ``factors``: of each unit; ``unit_parameters``: each unit's."""

    found: Found
    cuts: tuple[fx.Node, ...]
    plain: tuple[GraphPiece, ...]
    conditioned: tuple[GraphPiece, ...]
    factors: tuple[tuple[adaln.Factor, ...], ...]
    unit_parameters: tuple[int, ...]
    target: Target | None
    tune: str

    @property
    def count(self) -> int:
        """Number of units, L."""
        return len(self.found.trunk)

    def adapter(self, source: int, end: int) -> Adapter | None:
        """The learned map from the state that enters unit ``source`` to that which enters unit ``end``, None where they have one shape."""
        view, (a, b) = self.found.view, (self.cuts[source], self.cuts[end])
        shapes = tuple(value(a).shape[1:]), tuple(value(b).shape[1:])
        channels = adaln.stream_channel(view, a), adaln.stream_channel(view, b)
        if (shapes[0] == shapes[1] and channels[0] == channels[1]) or not all(
            isinstance(s, int) for s in sum(shapes, ())
        ):
            return None
        with torch.device("meta"):
            return Adapter(shapes[0], channels[0], shapes[1], channels[1])

    def conditioner(self, start: int, end: int) -> adaln.Conditioner | None:
        """The conditioner of a block of the units ``start`` to ``end`` (left out), None where there is no target."""
        if self.target is None:
            return None
        factors = [factor for of in self.factors[start:end] for factor in of]
        parameters = sum(p.numel() for p in parameters_of(self.plain[1 + start : 1 + end]).values())
        width = adaln.width_for(factors, self.target.dim, parameters)
        with torch.device("meta"):
            return adaln.Conditioner(self.target.dim, width, 1.0, factors)


class Given(nn.Module):
    """Stands for a unit's conditioner: gives its factors as parameters, each [N or 1, ..., C, ...] laid as it is."""

    def __init__(self, factors: tuple[adaln.Factor, ...]) -> None:
        super().__init__()
        self.factors = factors
        self.made: tuple[torch.Tensor, ...] = ()

    def forward(self, z: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.made


def outline(captured: Captured, tune: str) -> Outline:
    """Cut a captured network between all of its units.

    Raises:
        BadInput: it has no trunk.
        NotPerSample: a unit cannot be conditioned.
    """
    _settle(captured.graph)
    found = find_trunk(captured.graph)
    if not found.trunk:
        raise no_trunk(found)
    every = Partition((1,) * len(found.trunk), "explicit")
    cuts = cuts_of(found, every)
    plain = cut(captured.graph, cuts)
    target = target_of(plain[-1])
    sizes = tuple(sum(p.numel() for p in piece.module.parameters()) for piece in plain[1:-1])
    conditioned, factors = _conditioned(captured, every, target, sizes)
    for piece in conditioned:
        if tune == "lora":
            with torch.device("meta"):
                add_low_rank(piece.module)
        if tune == "block":
            blocks.set_batch_norm_training(piece.module, True)
    return Outline(found, cuts.nodes, plain, conditioned, factors, sizes, target, tune)


def _conditioned(
    captured: Captured, every: Partition, target: Target | None, sizes: tuple[int, ...]
) -> tuple[tuple[GraphPiece, ...], tuple[tuple[adaln.Factor, ...], ...]]:
    graph = flatten(captured.graph)
    again = find_trunk(graph)
    if target is None:
        return cut(graph, cuts_of(again, every))[1:-1], ((),) * len(again.trunk)
    cuts = cuts_of(again, every)
    with torch.device("meta"):
        names = adaln.insert(
            graph,
            again,
            [[unit] for unit in again.trunk],
            target_dim=target.dim,
            sigma_data=1.0,
            block_parameters=sizes,
            seed=0,
        )
    factors = tuple(_factors(graph.get_submodule(name)) for name in names)
    for name, of in zip(names, factors, strict=True):
        setattr(graph, name, Given(of))
    return cut(graph, cuts)[1:-1], factors


def _factors(conditioner: Any) -> tuple[adaln.Factor, ...]:
    """What a conditioner makes, in the order in which it gives them."""
    by_layout = [
        adaln.Factor(size, dim, rank, scales, samples, grid)
        for (rank, dim, scales, samples, grid), sizes in zip(conditioner.layouts, conditioner.sizes, strict=True)
        for size in sizes
    ]
    return tuple(by_layout[place] for place in conditioner.places)


def _settle(module: fx.GraphModule) -> None:
    """Let operators that name a device name the CPU, on whose rules pieces are measured, and drop checks of types, which may be others."""

    def there(leaf: Any) -> Any:
        return torch.device("cpu") if isinstance(leaf, torch.device) else "cpu" if leaf == "meta" else leaf

    for graph in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in list(graph.graph.nodes):
            node.args, node.kwargs = pytree.tree_map(there, (node.args, node.kwargs))
            if "_assert_tensor_metadata" in str(node.target) and not node.users:
                graph.graph.erase_node(node)
        graph.recompile()


def target_of(head: GraphPiece) -> Target | None:
    """What a head predicts: logits [N, K] or [N, ..., K] of its first output; None for anything else."""
    node = head.outputs[0]
    if not is_tensor(node) or not value(node).is_floating_point() or value(node).dim() < Z_ROWS:
        return None
    classes = value(node).shape[-1]
    if not isinstance(classes, int) or classes < 2 or (value(node).dim() > 3):
        return None
    rows = classifier_rows(head.module)
    dim = int(rows.shape[1]) if rows is not None and len(rows) == classes else RANDOM_DIM
    return Target(classes, dim, value(node).dim() > Z_ROWS)


def parameters_of(pieces: tuple[GraphPiece, ...]) -> dict[int, nn.Parameter]:
    """The parameters that pieces read, each once."""
    return {id(p): p for piece in pieces for p in piece.module.parameters()}


def buffers_of(pieces: tuple[GraphPiece, ...]) -> dict[int, torch.Tensor]:
    """The same for buffers."""
    return {id(b): b for piece in pieces for b in piece.module.buffers()}


def structure(piece: GraphPiece) -> tuple[Any, ...]:
    """What a piece computes, without the names of its nodes and weights: pieces of one structure allocate alike."""
    return _structure(piece.module)


def _structure(module: fx.GraphModule) -> tuple[Any, ...]:
    number: dict[fx.Node, str] = {}
    seen: dict[int, int] = {}
    lines: list[Any] = []
    for k, node in enumerate(module.graph.nodes):
        number[node] = f"%{k}"
        if node.op == "get_attr":
            held = operator.attrgetter(str(node.target))(module)
            what: Any = (seen.setdefault(id(held), len(seen)), *_kind(held))
        elif node.op == "call_module":
            what = _module_kind(module.get_submodule(str(node.target)))
        else:
            what = str(node.target) if node.op == "call_function" else ""
        lines.append((node.op, what, repr(fx.node.map_arg((node.args, node.kwargs), lambda n: _Named(number[n])))))
    return tuple(lines)


class _Named(str):
    """Text that is written without quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def _kind(held: Any) -> tuple[Any, ...]:
    if isinstance(held, fx.GraphModule):
        return _structure(held)
    return tuple(held.shape), held.stride(), held.dtype, isinstance(held, nn.Parameter)


def _module_kind(module: nn.Module) -> tuple[Any, ...]:
    own = module.factors if isinstance(module, Given) else ()
    return type(module).__name__, own, tuple(_kind(p) for p in module.parameters())
