"""What of a network is in memory at a time, under a budget: all blocks, two with the next one read meanwhile, or one; and how many rows of a batch together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.errors import BudgetError

WHAT = {"all": "all blocks stay in memory", "two": "two blocks in memory", "one": "one block in memory"}
ALLOCATED = 3
"""Memory that ONNX Runtime takes for intermediate values, over what is alive of them at once: measured (docs/benchmarks.md)."""


@dataclass(frozen=True)
class Load:
    """One graph: the bytes of its weights and its file, and those of its intermediate values for one row of the batch."""

    file: str
    weights: int
    row: int


@dataclass(frozen=True)
class Plan:
    """``resident``: ``all``, ``two`` or ``one``; ``prefetch``: whether the next block's weights are read while one computes; ``rows``: how many rows run together
    (None: all); ``weights``: the bytes of the graphs that are open at once; ``limit``: what they may be at most."""

    resident: str
    prefetch: bool
    rows: int | None = None
    weights: int = 0
    limit: int = 0

    def __str__(self) -> str:
        ahead = ", the next one read meanwhile" if self.prefetch and self.resident != "all" else ""
        rows = "" if self.rows is None else f", at most {self.rows} rows at a time"
        return f"{WHAT[self.resident]}{ahead}: {format_bytes(self.weights)} of weights{rows}"


def plan(
    loads: Sequence[Load], budget: int | None, *, together: int = 0, prefetch: bool | None = None, split: bool = True
) -> Plan:
    """Decide what stays in memory.

    Args:
        loads: the graphs a call uses, each once.
        budget: bytes of weights and intermediate values; None for one block at a time without a bound.
        together: bytes of the graphs that are open beside a block's.
        prefetch: read the next block's weights while one computes; where not given, where the budget has room for two.
        split: whether the batch may be divided.

    Raises:
        BudgetError: a budget below the largest graph and one row (says the smallest that works).
    """
    largest = max(loads, key=lambda load: load.weights + load.row)
    most, row = max(load.weights for load in loads), max(load.row for load in loads)
    if budget is None:
        return Plan("one", True if prefetch is None else prefetch, None, most + together, most + together)
    need = largest.weights + largest.row
    if need > budget:
        raise BudgetError(
            f"The memory budget of {format_bytes(budget)} is below {largest.file}, the largest graph of this bundle.",
            hint=f"Give --memory-budget {need} ({format_bytes(need)}) or more, or convert with more blocks.",
        )
    total = sum(load.weights for load in loads)
    alone = most + together if most + together + row <= budget else most
    for resident, weights in (("all", total), ("two", 2 * most + together), ("one", alone)):
        if weights + row <= budget or resident == "one":
            rows = max(1, (budget - weights) // row) if row and split else None
            ahead = resident == "two" if prefetch is None else prefetch
            limit = budget if resident == "all" or rows is None else weights
            return Plan(resident, ahead and resident != "all", rows, weights, limit)
    raise AssertionError
