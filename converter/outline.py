"""A captured network cut between all of its units, plain and conditioned: what every division into blocks is added up from.

Requires: a captured graph with a trunk; its weights may be on the meta device. Ensures: the captured graph is unchanged. As a node belongs to the first cut it is an
ancestor of, the pieces of a block of several units are those of its units, one after another. What a layer of several units reads beside the trunk stays with the first of them (``Cuts.local``).
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from diffusionblocks.converter import adaln, blocks
from diffusionblocks.converter.adapter import Adapter
from diffusionblocks.converter.analysis import no_trunk
from diffusionblocks.converter.capture import Captured, flatten
from diffusionblocks.converter.cut import Cuts, GraphPiece, cut, cuts_of, narrowed
from diffusionblocks.converter.graph import value
from diffusionblocks.converter.local import Local
from diffusionblocks.converter.loop import Loop, looped, only
from diffusionblocks.converter.lowrank import add_low_rank
from diffusionblocks.converter.partition import Partition, partition
from diffusionblocks.converter.residual import Found, find_trunk
from diffusionblocks.converter.settings import Settings
from diffusionblocks.converter.targets import Target, renew_classifier
from diffusionblocks.converter.tasks import new_labels_target, target_of_task
from diffusionblocks.converter.token_target import token_target
from diffusionblocks.runtime.errors import BadInput
from torch import fx, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Outline:
    """``plain``: stem, units, head of the original; ``conditioned``: the units with AdaLN (and low-rank updates under ``tune`` lora), whose factors are made
    from :class:`Given`; ``factors``: of each unit; ``unit_parameters``: each unit's; ``target``: what blocks denoise, on the meta device; ``settings`` with
    the task that ``auto`` is taken for; ``loop``: of recurrent depth, whose applications are the units. With new labels the head makes those."""

    found: Found
    cuts: Cuts
    plain: tuple[GraphPiece, ...]
    conditioned: tuple[GraphPiece, ...]
    factors: tuple[tuple[adaln.Factor, ...], ...]
    unit_parameters: tuple[int, ...]
    target: Target | None
    settings: Settings
    loop: Loop | None

    @property
    def count(self) -> int:
        """Number of units, L."""
        return len(self.found.trunk)

    def counts(self, blocks: int, split: str) -> tuple[int, ...]:
        """Units of each of so many blocks: of recurrent depth those of one application.

        Raises:
            BadInput: there are fewer units than blocks.
        """
        return (self.loop.period,) if self.loop is not None else partition(self.unit_parameters, blocks, split).counts

    def divided(self, counts: Sequence[int]) -> tuple[tuple[Local, int, int], ...]:
        """What layers read that these blocks divide, which their stem makes; with the bytes of its parameters, and of these and its constants."""
        ends = list(accumulate(counts))
        of = [p for p in self.cuts.local if bisect_right(ends, p.first) != bisect_right(ends, p.last)]
        return tuple((part, *self._sizes(part)) for part in of)

    def _sizes(self, part: Local) -> tuple[int, int]:
        held = {id(t): t for t in (operator.attrgetter(name)(self.found.view.module) for name in part.reads)}
        parameters = [t.nbytes for t in held.values() if isinstance(t, nn.Parameter)]
        return sum(parameters), sum(t.nbytes for t in held.values())

    def stem_of(self, sides: Container[str]) -> GraphPiece:
        """The stem as a block of its own has it that reads these side values, by :func:`side_name`."""
        return narrowed(self.plain[0], {n for n in self.plain[0].outputs[1:] if side_name(n) in sides})

    def adapter(self, source: int, end: int) -> Adapter | None:
        """The learned map from the state that enters unit ``source`` to that which enters unit ``end``, None where they have one shape."""
        view, (a, b) = self.found.view, (self.cuts.nodes[source], self.cuts.nodes[end])
        shapes = tuple(value(a).shape[1:]), tuple(value(b).shape[1:])
        channels = adaln.stream_channel(view, a), adaln.stream_channel(view, b)
        if (shapes[0] == shapes[1] and channels[0] == channels[1]) or not all(
            isinstance(s, int) for s in sum(shapes, ())
        ):
            return None
        with torch.device("meta"):
            return Adapter(shapes[0], channels[0], shapes[1], channels[1])

    def conditioner(self, start: int, end: int) -> adaln.Conditioner | None:
        """The conditioner of a block of the units ``start`` to ``end`` (left out), None where there is no target, or one that enters by the model's own input."""
        target = self.target
        if target is None or target.enters:
            return None
        factors = [factor for of in self.factors[start:end] for factor in of]
        parameters = sum(p.numel() for p in parameters_of(self.plain[1 + start : 1 + end]).values())
        width = adaln.width_for(factors, target.dim, parameters)
        with torch.device("meta"):
            return adaln.Conditioner(target.dim, width, 1.0, factors, target.positions, target.reads_z)


class Given(nn.Module):
    """Stands for a unit's conditioner: gives its factors as parameters, each [N or 1, ..., C, ...] laid as it is."""

    def __init__(self, factors: tuple[adaln.Factor, ...]) -> None:
        super().__init__()
        self.factors = factors
        self.made: tuple[torch.Tensor, ...] = ()

    def forward(self, z: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.made


def outline(captured: Captured, settings: Settings) -> Outline:
    """Cut a captured network between all of its units.

    Args:
        captured: the network; its weights may be on the meta device.
        settings: what it is to be converted with; ``num_blocks`` and ``split`` are not read. A task ``auto`` that ends in no row of logits is taken for ``lm`` where the
            network makes logits of tokens, else for ``features``.

    Raises:
        BadInput: it has no trunk, or no loop, or its output does not fit the task.
        NotPerSample: a unit cannot be conditioned.
    """
    _settle(captured.graph)
    found = find_trunk(captured.graph)
    if not found.trunk:
        raise no_trunk(found)
    found, loop = looped(found) if settings.recurrent else (found, None)
    every = Partition((1,) * len(found.trunk), "explicit")
    cuts = cuts_of(found, every, outlined=True)
    plain = cut(captured.graph, cuts)
    target, settings = _target(plain, captured, settings)
    if settings.new_labels:
        plain = (*plain[:-1], _for_new_labels(plain[-1], settings.new_labels))
    tune = settings.tune
    sizes = tuple(sum(p.numel() for p in piece.module.parameters()) for piece in plain[1:-1])
    conditioned, factors = _conditioned(captured, every, target, sizes, loop)
    for piece in conditioned:
        if tune == "lora":
            with torch.device("meta"):
                add_low_rank(piece.module)
        if tune == "block":
            blocks.set_batch_norm_training(piece.module, True)
    return Outline(found, cuts, plain, conditioned, factors, sizes, target, settings, loop)


def _for_new_labels(head: GraphPiece, classes: int) -> GraphPiece:
    """The head with a last layer for so many classes, as every block gets a copy of it."""
    own = blocks.borrowed_copy(head)
    with torch.device("meta"):
        renew_classifier(own.module, classes, 0)
    return own


def _conditioned(
    captured: Captured, every: Partition, target: Target | None, sizes: tuple[int, ...], loop: Loop | None
) -> tuple[tuple[GraphPiece, ...], tuple[tuple[adaln.Factor, ...], ...]]:
    graph = flatten(captured.graph)
    again = find_trunk(graph) if loop is None else only(find_trunk(graph), loop)
    if target is None or target.enters:
        return cut(graph, cuts_of(again, every, outlined=True))[1:-1], ((),) * len(again.trunk)
    cuts = cuts_of(again, every, outlined=True)
    with torch.device("meta"):
        names = adaln.insert(
            graph,
            again,
            [[unit] for unit in again.trunk],
            target_dim=target.dim,
            positions=target.positions,
            every_position=target.causal,
            reads_z=target.reads_z,
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


def _target(plain: tuple[GraphPiece, ...], captured: Captured, settings: Settings) -> tuple[Target | None, Settings]:
    """What blocks denoise, on the meta device, and the settings with its task; None where the head's first output is nothing of the kind, or reads what only later units make."""
    head, early = plain[-1], {id(n) for n in plain[0].outputs}
    if any(n.op != "placeholder" and id(n) not in early for n in head.inputs[1:]):
        return None, settings
    names, example = captured.input_names, captured.example
    target = target_of_task(head, settings, names, example)
    if target is None:
        tokens = not example[0].is_floating_point() and token_target(head, settings.evidence, settings.seed) is not None
        settings = replace(settings, task="lm" if tokens else "features")
        try:
            target = target_of_task(head, settings, names, example)
        except BadInput:  # numbers of no fixed shape
            return None, settings
    if settings.new_labels:
        target = new_labels_target(head, target, settings)
    return (None if target is None else target.to("meta")), settings


def side_name(node: fx.Node) -> str:
    """The name of a side value between pieces, or of an input of the model."""
    return str(node.target) if node.op == "placeholder" else f"side {node.name}"


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
