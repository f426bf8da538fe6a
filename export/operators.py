"""ONNX forms of operators that torch's own exporter lacks, for ``torch.onnx.export(custom_translation_table=...)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20
from torch._ops import OpOverload

op: Any = opset20


def grouped_product(rows: Any, weight: Any, offsets: Any, *_: Any) -> Any:
    """Products of groups of rows with a matrix each, as mixtures of experts compute them: rows [S, K], weight [E, K, N], offsets [E] -> [S, N].

    Group e is the rows from ``offsets[e - 1]`` to ``offsets[e]``; an empty group is an empty product. Each matrix is read once, in place.
    """
    if len(weight.shape) != 3 or len(rows.shape) != 2:
        raise ValueError("a grouped product of other shapes than [S, K] with [E, K, N]")
    ends = op.Cast(offsets, to=7)  # int64, as Slice reads
    start = op.Constant(value_ints=[0])
    products = []
    for e in range(int(weight.shape[0])):
        end = op.Gather(ends, op.Constant(value_ints=[e]), axis=0)
        matrix = op.Gather(weight, op.Constant(value_int=e), axis=0)
        products.append(op.MatMul(op.Slice(rows, start, end, op.Constant(value_ints=[0])), matrix))
        start = end
    return op.Concat(*products, axis=0)


NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("aten", "_grouped_mm"): grouped_product,
    ("transformers", "grouped_mm_fallback"): grouped_product,
}
"""The translations by an operator's namespace and name."""


def translations() -> dict[OpOverload | Callable[..., Any], Callable[..., Any]]:
    """The translations of those operators that are registered."""
    found: dict[OpOverload | Callable[..., Any], Callable[..., Any]] = {}
    for (namespace, name), translation in NAMES.items():
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:
            found[packet.default] = translation
    return found
