"""What ``dbconvert inspect`` shows: the trunk, its blocks, side inputs, and what was refused and why."""

from __future__ import annotations

from typing import Any

from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.residual import Found
from diffusionblocks.runtime.budget import format_bytes
from rich.console import Console
from rich.table import Table


def describe(name: str, network: ConvertedNetwork) -> dict[str, Any]:
    """The object ``inspect --json`` prints."""
    found = network.analysis.found
    units = [
        {"name": u.name, "kind": u.kind, "shape": list(u.shape), "branches": len(u.branches), "parameters": p}
        for u, p in zip(found.trunk, network.analysis.unit_parameters, strict=True)
    ]
    stages: list[dict[str, Any]] = []
    for unit in units:
        if stages and stages[-1]["shape"] == unit["shape"]:
            stages[-1]["units"] += 1
        else:
            stages.append({"shape": unit["shape"], "units": 1})
    blocks = []
    for b in range(network.num_blocks):
        parameters = sum(p.numel() for p in network.contexts[b].module.parameters())
        size = sum(p.numel() * p.element_size() for p in network.contexts[b].module.parameters())
        sigma = [network.edges[b], network.edges[b + 1]] if network.edges else None
        names = [u.name or u.add.name for u in network.units_of(b)]
        blocks.append({"units": names, "parameters": parameters, "bytes": size, "sigma": sigma})
    sides = sorted({n for c in network.contexts for n in network.input_names_of(c)[1:]})
    return {
        "model": {"name": name, "inputs": list(network.input_names), "parameters": _total(network)},
        "units": units,
        "stages": stages,
        "blocks": blocks,
        "partition": {"rule": network.partition.rule, "remainder": network.partition.remainder},
        "side_inputs": sides,
        "refused": refusals(found),
    }


def refusals(found: Found) -> list[dict[str, Any]]:
    """Every refused addition with its reason, module and nodes."""
    return [{"reason": r.reason, "module": r.module, "nodes": list(r.nodes)} for r in found.refused]


def _total(network: ConvertedNetwork) -> int:
    return sum(p.numel() for p in network.analysis.captured.graph.parameters())


def draw(data: dict[str, Any], console: Console) -> None:
    """The same as tables."""
    model = data["model"]
    console.print(
        f"[bold]{model['name']}[/bold]: {model['parameters']:,} parameters, {len(data['units'])} residual units"
    )
    for stage in data["stages"]:
        console.print(f"  {stage['units']} units of shape {'x'.join(map(str, stage['shape']))}")
    table = Table("block", "units", "parameters", "bytes", "sigma (upper to lower)")
    for b, block in enumerate(data["blocks"]):
        sigma = "-" if block["sigma"] is None else f"{block['sigma'][0]:.4g} to {block['sigma'][1]:.4g}"
        table.add_row(str(b), _short(block["units"]), f"{block['parameters']:,}", format_bytes(block["bytes"]), sigma)
    console.print(table)
    if data["partition"]["remainder"] and data["partition"]["rule"] == "units":
        console.print(
            f"{data['partition']['remainder']} units remain after an equal division: spread over the first blocks."
        )
    if data["side_inputs"]:
        console.print(f"Side inputs of the blocks: {', '.join(data['side_inputs'])}")
    for refusal in data["refused"]:
        where = refusal["module"] or "(top)"
        console.print(f"[dim]refused {refusal['nodes'][0]} in {where}: {refusal['reason']}[/dim]")


def _short(names: list[str]) -> str:
    return f"{names[0]} ... {names[-1]} ({len(names)})" if len(names) > 3 else ", ".join(names)
