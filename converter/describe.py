"""The parts of what ``inspect --json`` prints (docs/inspect.md), each made as soon as it is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

from diffusionblocks.converter.analysis import Analysis
from diffusionblocks.converter.capture import Captured
from diffusionblocks.converter.crossings import shared_weights, side_name, side_values, size_of
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.graph import GraphView, op_name, shape_of
from diffusionblocks.converter.kinds import branch_kinds
from diffusionblocks.converter.loop import loop_of
from diffusionblocks.converter.residual import Found
from diffusionblocks.converter.units import Unit
from torch import nn
from torch.export import ExportedProgram

ADVICE = (
    (
        "do not fork",
        "If it is a residual, let its skip be the fork itself, or at most one convolution or linear layer of it.",
    ),
    ("long skip", "It stays where it is; what it adds crosses the cuts as a side input."),
    ("nested", "It stays whole inside that unit."),
    ("broadcast", "If it is a residual, give both operands one shape."),
)
"""What a user can do about a refused addition, by a word of its reason."""


def model_part(name: str, model: nn.Module | ExportedProgram) -> dict[str, Any]:
    """What is known of a model that is loaded: its parameters, and how many layers of each class it has."""
    leaves = model.modules() if isinstance(model, nn.Module) else []
    layers = Counter(type(m).__name__ for m in leaves if next(m.children(), None) is None)
    return {
        "name": name,
        **size_of(dict(enumerate(model.parameters()))),
        "layers": dict(sorted(layers.items(), key=lambda item: (-item[1], item[0]))),
    }


def captured_part(captured: Captured, loaded: int) -> dict[str, Any]:
    """What the graph adds to that: inputs, outputs, and the parameters that it reads of the ``loaded`` ones."""
    graph, size = captured.graph.graph, size_of(dict(enumerate(captured.graph.parameters())))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in graph.nodes if node.op == "output")
    return {
        **size,
        "unused_parameters": max(loaded - size["parameters"], 0),
        "inputs": list(captured.input_names),
        "input_shapes": [list(shape_of(node)) for node in inputs],
        "output_shapes": [list(shape_of(node)) for node in output.args[0]],
        "notes": list(captured.notes),
    }


def found_part(found: Found) -> dict[str, Any]:
    """Operators, units, trunks, streams beside them, stages, and every refused addition."""
    operators = Counter(filter(None, map(op_name, found.view.nodes)))
    units = [_unit(found.view, u) | {"trunk": t, "block": None} for t, us in enumerate(found.trunks) for u in us]
    stages: list[dict[str, Any]] = []
    for unit in units:
        if stages and stages[-1]["trunk"] == unit["trunk"] and same_stage(stages[-1]["shape"], unit["shape"]):
            stages[-1]["units"] += 1
        else:
            stages.append({"shape": unit["shape"], "units": 1, "trunk": unit["trunk"]})
    return {
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "additions": found.additions,
        "units": units,
        "trunks": [{"name": common_prefix([u.name for u in us]), "units": len(us)} for us in found.trunks],
        "beside": [
            {"name": common_prefix([u.name for u in us]), "units": [_unit(found.view, u) for u in us]}
            for us in found.beside
        ],
        "stages": stages,
        "loop": _loop(found),
        "refused": [
            {"reason": r.reason, "module": r.module, "nodes": list(r.nodes), "advice": advice(r.reason)}
            for r in found.refused
        ],
    }


def _loop(found: Found) -> dict[str, Any] | None:
    loop = loop_of(found)
    return None if loop is None else {"first": loop.first, "units": loop.period, "applications": loop.count}


def _unit(view: GraphView, unit: Unit) -> dict[str, Any]:
    return {
        "name": unit.name or unit.add.name,
        "node": unit.add.name,
        "kind": unit.kind,
        "branches": len(unit.branches),
        "branch_kinds": list(branch_kinds(view, unit)),
        "fork_shape": list(shape_of(unit.fork)),
        "shape": list(unit.shape),
        **_unit_size(view, unit),
    }


def _unit_size(view: GraphView, unit: Unit) -> dict[str, int]:
    nodes = view.members(view.region(unit.fork, unit.add))
    read = {
        str(n.target) for node in nodes for n in node.all_input_nodes if n.op == "get_attr" and view.is_parameter[n]
    }
    return size_of({id(p): p for p in map(view.module.get_parameter, sorted(read))})


def common_prefix(names: Sequence[str]) -> str:
    """The module that holds all of the named ones, '' for the top."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    shared: list[str] = []
    for level in parts:
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def same_stage(a: Sequence[int | str], b: Sequence[int | str]) -> bool:
    """Whether two shapes differ in their layout at most: ``[batch, 56, 56, 96]`` and ``[batch, 3136, 96]``."""
    if len(a) == len(b):
        return list(a) == list(b)
    counts = [prod(size for size in shape if isinstance(size, int)) for shape in (a, b)]
    symbols = [sorted(size for size in shape if isinstance(size, str)) for shape in (a, b)]
    return counts[0] == counts[1] and symbols[0] == symbols[1] and bool({a[1], a[-1]} & {b[1], b[-1]})


def advice(reason: str) -> str | None:
    """What a user can do about an addition refused for ``reason``, None where there is nothing to do."""
    return next((text for word, text in ADVICE if word in reason), None)


def divided_part(analysis: Analysis, pieces: Sequence[GraphPiece], units: list[dict[str, Any]]) -> dict[str, Any]:
    """Blocks, what lies outside of them, side inputs, shared weights; and, in ``units``, the block of each."""
    divided, total = analysis.partition, max(sum(p.numel() for p in analysis.captured.graph.parameters()), 1)
    units = units if analysis.loop is None else units[analysis.loop.first :]
    blocks = []
    for b, (start, count) in enumerate(zip(divided.starts, divided.counts, strict=True)):
        for unit in units[start : start + count]:
            unit["block"] = b
        blocks.append(
            {
                "units": [unit["name"] for unit in units[start : start + count]],
                **_piece_size(pieces[b + 1], total),
                "sigma": None,
                "stream": [list(shape_of(node)) for node in analysis.cuts.nodes[b : b + 2]],
                "side_inputs": [side_name(node) for node in pieces[b + 1].inputs[1:]],
            }
        )
    sides = side_values(analysis.found, pieces)
    return {
        "blocks": blocks,
        "partition": {"rule": divided.rule, "remainder": divided.remainder, "counts": list(divided.counts)},
        "outside": {"stem": _piece_size(pieces[0], total), "head": _piece_size(pieces[-1], total)},
        "side_inputs": sorted({name for block in blocks for name in block["side_inputs"]}),
        "side_values": sides,
        "shared": shared_weights(pieces),
    }


def _piece_size(piece: GraphPiece, total: int) -> dict[str, Any]:
    size = size_of(dict(enumerate(piece.module.parameters())))
    return {**size, "share": size["parameters"] / total}
