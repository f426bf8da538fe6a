"""``dbconvert inspect`` as text: the trunk from stem to head, what crosses its cuts, what was refused; from the object of ``--json`` alone.

``z + attention(z)`` is a unit: the skip (``z``, ``a z`` where it is scaled, ``p(z)`` where it is projected) and its branches' kinds. The stream's shape stands
where it changes. Runs of equal units are folded: the first ones, a count, the last ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from diffusionblocks.converter.describe import same_stage
from diffusionblocks.converter.page import Page, counted, join, shape
from rich.console import Console

SKIPS = {"identity": "z", "parallel": "z", "scale": "a z", "projection": "p(z)"}
LEGEND = {"scale": "a z: a scaled skip", "projection": "p(z): a skip by a convolution, linear layer, norm or pooling"}
DOING = {
    "load": "reading the model",
    "capture": "capturing the model's graph",
    "find": "looking for the trunk",
    "partition": "dividing the trunk into blocks",
    "cut": "cutting the graph",
    "condition": "conditioning the blocks",
}
LONGEST_PERIOD, FEWEST_HIDDEN = 8, 3
FIRST = 3
"""How many of a list are named; ``--json`` has all."""


def draw(data: dict[str, Any], console: Console) -> None:
    """Draw what ``inspect`` found."""
    page = Page(console, max((u["parameters"] for u in _sized(data)), default=0))
    model = data["model"]
    page.line(model["name"], style="bold")
    page.text(_summary(data))
    _fit(page, data.get("units", []))
    if "blocks" in data:
        _network(page, data)
    elif data.get("units"):
        page.line()
        _units(page, data, data["units"], None)
    if "error" in data and "operators" in data:
        page.list("operators", [f"{count} x {name}" for name, count in data["operators"].items()], 3 * FIRST)
    elif "error" in data and "layers" in model:
        page.list("layers", [f"{count} x {name}" for name, count in model["layers"].items()], 3 * FIRST)
    _beside(page, data.get("beside", []))
    _shared(page, data.get("shared", []))
    _refused(page, data.get("refused", []))
    if "error" in data:
        _stopped(page, data["error"])


def _fit(page: Page, units: Sequence[dict[str, Any]]) -> None:
    page.fit([unit["name"] for unit in units], [formula(unit) for unit in units])


def _sized(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [u for u in [data["model"], *data.get("blocks", []), *data.get("units", [])] if "parameters" in u]


def _summary(data: dict[str, Any]) -> str:
    model, parts = data["model"], []
    if "parameters" in model:
        parts.append(f"{model['parameters']:,} parameters")
    if model.get("unused_parameters"):
        parts.append(f"{model['unused_parameters']:,} more that its output does not need")
    if "units" in data:
        parts.append(f"{len(data['units'])} residual units of {data['additions']} additions")
    if len(data.get("trunks", [])) > 1:
        parts.append(f"{len(data['trunks'])} trunks")
    if data.get("loop"):
        loop = data["loop"]
        parts.append(f"recurrent depth: {counted(loop['units'], 'unit')} applied {loop['applications']} times")
    if "partition" in data:
        counts = data["partition"]["counts"]
        sizes = [counts[0]] if len(set(counts)) == 1 else counts
        units = f"{join(map(str, sizes))} unit{'s' * (max(counts) > 1)}"
        parts.append(f"{counted(len(counts), 'block')} of {units}")
    return ", ".join(parts)


def _network(page: Page, data: dict[str, Any]) -> None:
    model = data["model"]
    page.line()
    page.heading()
    for name, size in zip(model["inputs"], model["input_shapes"], strict=True):
        page.row("", f"{name} {shape(size)}")
    page.piece("stem", data["outside"]["stem"])
    at: Any = None
    for b, block in enumerate(data["blocks"]):
        units = [u for u in data["units"] if u["block"] == b]
        sigma = "" if block["sigma"] is None else f"sigma {block['sigma'][0]:.3g} to {block['sigma'][1]:.3g}"
        page.piece(f"block {b}   {counted(len(units), 'unit')}", block, sigma)
        _sides(page, data, f"block {b}")
        at = _units(page, data, units, at)
    page.piece("head", data["outside"]["head"])
    _sides(page, data, "head")
    for size in model["output_shapes"][:FIRST]:
        page.row("", shape(size))
    if len(model["output_shapes"]) > FIRST:
        page.row("", f"and {counted(len(model['output_shapes']) - FIRST, 'more output')}")
    notes = list(model["notes"])
    notes += [text for kind, text in LEGEND.items() if any(u["kind"] == kind for u in data["units"])]
    if data["partition"]["remainder"] and data["partition"]["rule"] == "units":
        left = counted(data["partition"]["remainder"], "unit")
        notes.append(f"{left} left over by an equal division: spread over the first blocks.")
    if data.get("schedule", {}).get("reason"):
        notes.append(f"No noise intervals: {data['schedule']['reason']}")
    page.notes(notes)


def _sides(page: Page, data: dict[str, Any], reader: str) -> None:
    sides = [s for s in data["side_values"] if reader in s["read_by"]]
    for side in sides[:FIRST]:
        maker = side["made_by"] if side["made_by"].startswith("block") else f"the {side['made_by']}"
        via = f" ({side['via']})" if side["via"] else ""
        text = f"{side['name']} {shape(side['shape'])} from {maker}"
        module = f": {side['module']}" if side["module"] else ""
        page.row("│  ← ", text + module + via if page.room("│  ← ") >= len(text + module + via) else text + via)
    if len(sides) > FIRST:
        page.row("│  ← ", f"and {len(sides) - FIRST} more")


def _units(page: Page, data: dict[str, Any], units: Sequence[dict[str, Any]], at: Any) -> Any:
    """Rows of units; ``at`` is the stream's shape before them, the result that after them."""
    trunks = data["trunks"]
    for row in folded(units):
        if isinstance(row, str):
            page.row("┊  ", row, style="dim")
            continue
        first = next(u for u in data["units"] if u["trunk"] == row["trunk"])
        if len(trunks) > 1 and row is first:
            trunk = trunks[row["trunk"]]
            page.row("◇ ", f"trunk {trunk['name'] or row['trunk']}, {counted(trunk['units'], 'unit')}")
        at = _stream(page, at, row["fork_shape"])
        page.unit(row["name"], formula(row), row["parameters"])
        at = _stream(page, at, row["shape"])
    return at


def _stream(page: Page, before: Any, after: Any) -> Any:
    """A row with the stream's shape where it changes."""
    if before is not None and same_stage(before, after):
        return before
    page.row("│ ", shape(after), style="dim")
    return after


def formula(unit: dict[str, Any]) -> str:
    """``z + attention(z) + mlp(z)``."""
    kinds = Counter(unit["branch_kinds"])
    terms = [f"{'' if count == 1 else f'{count} '}{kind}(z)" for kind, count in kinds.items()]
    return " + ".join([SKIPS.get(unit["kind"], "z"), *terms])


def folded(units: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any] | str]:
    """Units, or what is said instead of those between the first and the last of a run of equal ones."""
    keys = [_key(unit) for unit in units]
    i = 0
    while i < len(units):
        period, times = max(
            ((p, _repeats(keys, i, p)) for p in range(1, LONGEST_PERIOD + 1)), key=lambda run: (run[0] * (run[1] - 2), -run[0])
        )  # fmt: skip
        hidden = period * (times - 2)
        if hidden < FEWEST_HIDDEN:
            yield units[i]
            i += 1
            continue
        yield from units[i : i + period]
        between = units[i + period : i + period + hidden]
        these = "this one" if period == 1 else "these"
        yield f"{hidden} more like {these}: {between[0]['name']} to {between[-1]['name']}"
        yield from units[i + period + hidden : i + period * times]
        i += period * times


def _key(unit: dict[str, Any]) -> tuple[Any, ...]:
    name = re.sub(r"\d+", "#", unit["name"])
    return (name, unit["kind"], unit["branch_kinds"], unit["fork_shape"], unit["shape"], unit["parameters"])


def _repeats(keys: Sequence[tuple[Any, ...]], start: int, period: int) -> int:
    times = 1
    pattern = keys[start : start + period]
    while len(pattern) == period and keys[start + times * period : start + (times + 1) * period] == pattern:
        times += 1
    return times


def _beside(page: Page, streams: Sequence[dict[str, Any]]) -> None:
    for stream in streams:
        name = f" in {stream['name']}" if stream["name"] else ""
        page.line()
        page.text(
            f"Beside the trunk: {counted(len(stream['units']), 'unit')}{name}, not cut for themselves", style="bold"
        )
        _fit(page, stream["units"])
        for row in folded(stream["units"]):
            if isinstance(row, str):
                page.row("┊  ", row, style="dim")
            else:
                page.unit(row["name"], formula(row), row["parameters"])


def _shared(page: Page, shared: Sequence[dict[str, Any]]) -> None:
    for group in shared:
        names = page.first(group["names"], FIRST)
        page.line()
        page.text(f"Shared by {join(group['places'])}: {group['parameters']:,} parameters", style="bold")
        page.text(names, indent=2)


def _refused(page: Page, refused: Sequence[dict[str, Any]]) -> None:
    """Refused additions by reason, those of one wording together, the most frequent first."""
    if not refused:
        return
    groups: dict[str, list[dict[str, Any]]] = {}
    for refusal in refused:
        groups.setdefault(re.sub(r"\d+", "*", refusal["reason"]), []).append(refusal)
    page.line()
    page.text(f"{counted(len(refused), 'addition')} refused as a unit of the trunk", style="bold")
    ordered = sorted(groups.values(), key=len, reverse=True)
    for group in ordered[: 2 * FIRST]:
        page.text(f"{len(group)} x {group[0]['reason']}", indent=2)
        places = [f"{r['nodes'][0]} in {r['module'] or 'the top module'}" for r in group]
        page.text(page.first(places, FIRST), indent=6, style="dim")
        if group[0]["advice"]:
            page.text(group[0]["advice"], indent=6, style="dim")
    if len(ordered) > 2 * FIRST:
        page.text(f"and {counted(len(ordered) - 2 * FIRST, 'more reason')}", indent=2)


def _stopped(page: Page, error: dict[str, Any]) -> None:
    page.line()
    page.text(f"Stopped while {DOING[error['stage']]} (stage {error['stage']})", style="bold")
    place = error["place"]
    if place is not None:
        page.text(f"in {place['module'] or 'the top module'} ({place['type']}):", indent=2)
        page.unbroken(f"{place['file']}, line {place['line']}", indent=6)
        page.text(place["code"], indent=6)
