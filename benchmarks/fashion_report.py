"""The tables of the Fashion-MNIST benchmark, as Markdown, from its cached measurements."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from fashion_variants import BLOCKS, FINETUNE, FINETUNE_STEM, SEEDS, selection_variants, test_variants

CACHE = Path(__file__).parent / ".cache"
RESULTS = Path(__file__).parent / "fashion_mnist.json"
Result = dict[str, Any]


@cache
def stored() -> dict[str, Result]:
    """The measurements that were collected into one file."""
    found: dict[str, Result] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def cached(name: str) -> Result | None:
    """A measurement of this machine, else the collected one."""
    path = CACHE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else stored().get(name)


def collect(names: Sequence[str]) -> None:
    """Write every measurement there is into one file, with seven digits."""
    found = {name: result for name in names if (result := cached(name)) is not None}
    lines = [f"{json.dumps(name)}: {json.dumps(_rounded(result))}" for name, result in found.items()]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def cell(values: list[dict[str, float]]) -> str:
    """Mean over the seeds: accuracy in % (largest deviation from it), cross-entropy in nats, ECE in %."""
    a, c, e = (np.array([v[k] for v in values]) for k in ("accuracy", "cross_entropy", "ece"))
    spread = f" ±{100 * abs(a - a.mean()).max():.2f}" if len(values) > 1 else ""
    return f"{100 * a.mean():.2f}{spread}, {c.mean():.4f}, {100 * e.mean():.1f}"


def report(kinds: list[str], controls: Sequence[str]) -> None:
    """Print the tables of each kind of network; ``controls`` names the rows without a diffusion part."""
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}"
    print(f"{versions}; one thread a process\n\nCells: accuracy %, cross-entropy (nats), ECE %.")
    for kind in kinds:
        print(f"\n## {kind}: held-out images, one seed\n")
        _report_selection(kind)
        print(f"\n## {kind}: test images, {len(SEEDS)} seeds\n")
        _report_test(kind, controls)


def _report_selection(kind: str) -> None:
    base = cached(f"{kind}-0-end-to-end")
    if base:
        print(f"End to end: {cell([base['held-out']])}\n")
    heads = [f"{n}, {read}" for n in (1, 3, 6, 12) for read in ("last", "mean")]
    print("| variant (start z = 0) | " + " | ".join(heads) + " | best from noise |")
    print("|---" * (len(heads) + 2) + "|")
    for v in selection_variants(kind):
        result = cached(f"{kind}-0-select-{v.name}")
        if result is None:
            continue
        table = result["decodings"]
        cells = [
            cell([table[f"{n}-mean"][r] if r == "mean" else table[f"{n}-mean"]["steps"][-1]])
            for n in (1, 3, 6, 12)
            for r in ("last", "mean")
        ]
        noisy = [m for n in (1, 3, 6, 12) for m in (table[f"{n}-noise"]["mean"], table[f"{n}-noise"]["steps"][-1])]
        best = min(noisy, key=lambda m: m["cross_entropy"])
        print(f"| {v.title} | " + " | ".join(cells) + f" | {cell([best])} |")


def _report_test(kind: str, controls: Sequence[str]) -> None:
    print("| row | after step 1 | after step 2 | after step 3 | mean of the steps |")
    print("|---|---|---|---|---|")

    def row(title: str, names: list[str], path: Callable[[Result], Result]) -> None:
        results = [path(r) for r in map(cached, names) if r is not None]
        if not results:
            return
        if len(results) < len(names):
            title += f" ({len(results)} of {len(names)} seeds)"
        count = len(results[0]["steps"])
        cells = [cell([r["steps"][k] for r in results]) for k in range(count)] + ["-"] * (3 - count)
        last = cell([r["mean"] for r in results]) if "mean" in results[0] else "-"
        print(f"| {title} | {' | '.join(cells)} | {last} |")

    def seeds(tail: str) -> list[str]:
        return [f"{kind}-{s}-{tail}" for s in SEEDS]

    row("end to end", seeds("end-to-end"), lambda r: {"steps": [r["test"]]})
    for n in (FINETUNE, FINETUNE_STEM):
        row(f"the original trained on for {n} updates", seeds(f"trained-on-{n}"), lambda r: {"steps": [r["test"]]})
    for v in test_variants():
        row(f"{v.title}; zero updates", seeds(f"test-{v.name}"), lambda r: r["zero"])
        row(v.title, seeds(f"test-{v.name}"), lambda r: r["decodings"][f"{BLOCKS}-mean"])
        row(f"{v.title}; from noise", seeds(f"test-{v.name}"), lambda r: r["decodings"][f"{BLOCKS}-noise"])
    for c in controls:
        row(f"control, no z, no AdaLN: {c}", seeds(f"control-{c}"), lambda r: r)
    print()
    for v in test_variants():
        result = cached(f"{kind}-0-test-{v.name}")
        if result and "bundle" in result:
            print(
                f"- bundle against torch, {v.title}: {json.dumps(result['bundle'])}; training bytes {result['training_bytes']}"
            )
