"""Whether a captured graph holds for every number of rows, and not only for as many as the example has.

torch.export follows the branch that the example takes (``if x.shape[0] > 2``) and keeps the condition as a guard, which the flat graph leaves out. A guard
on the batch is harmless where both branches compute the same, so the model and the graph are compared on a number of rows at which it fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusionblocks.runtime.errors import BadInput
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

ROWS = (*range(2, 17), 17, 33, 65, 1)
"""Numbers of rows that guards are asked about; a limit beyond them is not seen. One comes last: torch.export always treats it apart."""


class _Sized:
    """Stands for an input of which a guard asks the size."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def size(self) -> tuple[int, ...]:
        return self.shape


def check_rows(
    model: nn.Module, program: ExportedProgram, graph: nn.Module, values: Mapping[str, torch.Tensor], positional: bool
) -> None:
    """Refuse a graph of a model that decides by the number of rows.

    Args:
        values: the example by name, in the order of the graph's inputs; ``positional``: whether the model takes it in that order, or by name.

    Raises:
        BadInput: with the guard, and a number of rows at which the graph is wrong.
    """
    for guard, rows in _broken(program, values):
        inputs = {n: t[torch.arange(rows) % t.shape[0]] for n, t in values.items()}
        with torch.no_grad():
            try:
                expected = model(*inputs.values()) if positional else model(**inputs)
            except Exception:
                continue  # the model itself does not take this many
            try:
                got = graph(*(t.clone() for t in inputs.values()))
            except Exception:
                got = ()  # a number of rows is written in the graph
        wanted = [x for x in pytree.tree_leaves(expected) if isinstance(x, torch.Tensor)]
        if not got or not all(same(a, b) for a, b in zip(got, wanted, strict=False)):
            raise BadInput(
                f"The model treats a batch of {rows} otherwise than one of {len(next(iter(values.values())))}: the graph would hold only "
                f"where {guard}.",
                hint="Write what depends on the number of rows (x.shape[0]) without a branch.",
            )


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs agree to a ten-thousandth of the largest finite number in ``b``."""
    finite = b[b.isfinite()].abs() if b.is_floating_point() or b.is_complex() else torch.ones(())
    scale = float(finite.max()) if finite.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=max(1e-4 * scale, 1e-12), equal_nan=True)


def _broken(program: ExportedProgram, values: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, int]]:
    """Guards that do not hold for every number of rows, each with the first at which it does not."""
    for guard in getattr(program, "_guards_code", None) or ():
        for rows in ROWS:
            sizes: dict[str, Any] = {n: _Sized((rows, *t.shape[1:])) for n, t in values.items()}
            try:
                holds = eval(guard, {"__builtins__": {}, "L": sizes})  # torch's own text, of a program exported here
            except Exception:
                break
            if not holds:
                yield re.sub(r"L\['(\w+)'\]\.size\(\)", r"\1.shape", str(guard)), rows
                break
