"""One DiffusionBlock as a GraphModule: entry, the units with their AdaLN, readout; and who owns which weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusionblocks.converter import adaln
from diffusionblocks.converter.adapter import Adapter, Rows
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.graph import op_name
from torch import fx, nn

CONDITIONING = "conditioner_"
BORROWED = "diffusionblocks_borrowed"
TUNES = ("adaln", "lora", "block")


@dataclass(frozen=True)
class Block:
    """``module(stream, *sides, z, sigma)`` -> (readout,) or, where it carries, (readout, raw state).

    ``sides``: names of the side values, in order; ``units``: module names; ``parameters``: of the original units.
    """

    module: fx.GraphModule
    sides: tuple[str, ...]
    units: tuple[str, ...]
    parameters: int

    @property
    def carries(self) -> bool:
        output = next(n for n in self.module.graph.nodes if n.op == "output")
        return len(output.args[0]) == 2


def compose(
    piece: GraphPiece,
    names: Sequence[str],
    entry: Adapter | Rows | None,
    readout: Adapter | Rows | None,
    *,
    carries: bool,
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Wrap a cut piece: placeholders ``stream``, its side values, ``z``, ``sigma``; returns the module and the side names.

    ``names[i]`` is the name of the piece's i-th input; z and sigma are told by :data:`adaln.Z` and :data:`adaln.SIGMA`.
    """
    root = nn.Module()
    root.body = piece.module
    graph = fx.Graph()
    stream = graph.placeholder("stream")
    sides = tuple(n for n in names[1:] if n not in (adaln.Z, adaln.SIGMA))
    env = {name: graph.placeholder(f"side_{i}") for i, name in enumerate(sides)}
    env[adaln.Z], env[adaln.SIGMA] = graph.placeholder("z"), graph.placeholder("sigma")
    if entry is not None:
        root.entry = entry
        stream = graph.call_module("entry", (stream,))
    outputs = graph.call_module("body", (stream, *(env[n] for n in names[1:])))
    state = graph.call_function(_first, (outputs,))
    result = state
    if readout is not None:
        root.readout = readout
        result = graph.call_module("readout", (state,))
    graph.output((result, state) if carries else (result,))
    return fx.GraphModule(root, graph), sides


def _first(values: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return values[0]


def set_apart(module: fx.GraphModule) -> None:
    """Replace every parameter by one of its own on the same storage, so that the model it came from keeps its own flags.

    ``requires_grad`` stays as it is: torch folds some products otherwise where it is not set, which shows in the last bit, even without gradients.
    """
    for tensor, owner, name in list(_held(module)):
        if isinstance(tensor, nn.Parameter):
            setattr(owner, name, nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad))


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No gradients for the parameters of ``modules`` meanwhile; whoever trains some of them says so by :func:`select_trainable`."""
    flags = {p: p.requires_grad for m in modules for p in m.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _held(module: fx.GraphModule) -> Iterator[tuple[Any, nn.Module, str]]:
    """What a graph reads of its module: each with its owner and its name there."""
    for target in sorted({str(n.target) for n in module.graph.nodes if n.op == "get_attr"}):
        path, _, name = target.rpartition(".")
        owner = module.get_submodule(path)
        yield getattr(owner, name), owner, name


def own_copy(piece: GraphPiece) -> GraphPiece:
    """The piece with parameters and buffers of its own, trainable."""
    module = fx.GraphModule(piece.module, piece.module.graph)
    _replace_parameters(module, copy=True)
    return GraphPiece(module, piece.inputs, piece.outputs)


def borrowed_copy(piece: GraphPiece) -> GraphPiece:
    """The piece with parameters of its own on the original's memory: :func:`select_trainable` gives them memory of their own."""
    module = fx.GraphModule(piece.module, piece.module.graph)
    _replace_parameters(module, copy=False)
    module.meta[BORROWED] = True
    return GraphPiece(module, piece.inputs, piece.outputs)


def own_memory(module: nn.Module) -> None:
    """Give every :func:`borrowed_copy` in ``module`` memory of its own, so that it may be written to."""
    for graph in _graphs(module):
        if graph.meta.pop(BORROWED, False):
            _replace_parameters(graph, copy=True)


def _replace_parameters(module: fx.GraphModule, *, copy: bool) -> None:
    for tensor, owner, name in list(_held(module)):
        if isinstance(tensor, nn.Parameter):
            data = tensor.detach().clone() if copy else tensor.detach()
            setattr(owner, name, nn.Parameter(data, requires_grad=data.is_floating_point()))
        elif copy and isinstance(tensor, torch.Tensor):
            setattr(owner, name, tensor.detach().clone())


def differentiable(tensor: torch.Tensor) -> torch.Tensor:
    """A block's input while it trains: with a gradient of its own where its channels come last.

    torch's backward of a group norm ends the process where its input lies so and needs no gradient (seen in torch 2.13).
    """
    apart = tensor.dim() > 3 and not tensor.is_contiguous() and tensor.is_floating_point() and not tensor.requires_grad
    return tensor.detach().requires_grad_() if apart and torch.is_grad_enabled() else tensor


def select_trainable(module: nn.Module, tune: str) -> list[tuple[str, nn.Parameter]]:
    """Mark and list the parameters that ``tune`` trains, on memory of the block's own where that is everything."""
    if tune == "block":
        own_memory(module)
    wanted = trainable_names(module, tune)
    chosen = []
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            chosen.append((name, parameter))
    return chosen


def trainable_names(module: nn.Module, tune: str) -> set[str]:
    """Names of the parameters that ``tune`` trains: the conditioning, entry and readout always; low-rank updates; everything a gradient reaches."""
    names = set()
    fixed = {f"{path}.{n}".removeprefix(".") for path, m in module.named_modules() for n in _without_gradient(m)}
    for name, parameter in module.named_parameters():
        if name in fixed:
            continue
        parts = name.split(".")
        conditioning = any(part.startswith(CONDITIONING) for part in parts) or parts[0] in ("entry", "readout")
        low_rank = any(part.startswith("low_rank_") for part in parts)
        if parameter.is_floating_point() and (conditioning or tune == "block" or (tune == "lora" and low_rank)):
            names.add(name)
    return names


def _without_gradient(module: nn.Module) -> Iterator[str]:
    """Parameters that a graph reads under no_grad or detached only, such as a table of positions."""
    for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
        if node.op == "get_attr" and node.users and all(map(_stops_gradient, node.users)):
            yield str(node.target)


def _stops_gradient(node: fx.Node) -> bool:
    return op_name(node) == "detach" or ("set_grad_enabled" in str(node.target) and node.args[0] is False)


def set_batch_norm_training(module: fx.GraphModule, training: bool) -> int:
    """Let the batch norms of a block's own copy use (and move) batch statistics; returns how many there are."""
    count = 0
    for graph in _graphs(module):
        changed = 0
        for node in graph.graph.nodes:
            if op_name(node) == "batch_norm":
                args = list(node.args)
                args[5] = training
                node.args = tuple(args)
                changed += 1
        if changed:
            graph.recompile()
        count += changed
    return count


def _graphs(module: nn.Module) -> Iterator[fx.GraphModule]:
    return (m for m in module.modules() if isinstance(m, fx.GraphModule))
