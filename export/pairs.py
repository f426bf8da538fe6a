"""Complex tensors as pairs of real ones: ONNX Runtime has none, and torch's exporter knows only a few of their operators.

Requires: operators of a torch.fx graph, with every complex tensor as its real and imaginary part. Ensures: the same up to rounding. Operators without a form
here (Fourier transforms) are left to torch's exporter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
LINEAR = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "permute",
        "transpose",
        "t",
        "movedim",
        "slice",
        "select",
        "index",
        "index_select",
        "gather",
        "split",
        "split_with_sizes",
        "unsafe_split",
        "chunk",
        "unbind",
        "cat",
        "stack",
        "repeat",
        "flatten",
        "unflatten",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "lift_fresh_copy",
        "neg",
        "roll",
        "flip",
        "sum",
        "mean",
        "cumsum",
        "where",
        "zeros_like",
    ]
)
"""Operators that act on real and imaginary part alike."""
BILINEAR = frozenset({"mul", "multiply", "mm", "bmm", "matmul", "einsum"})
MAKERS = frozenset({"view_as_complex", "complex", "polar"})


class Parts(NamedTuple):
    """A complex tensor by its real and imaginary part."""

    re: torch.Tensor
    im: torch.Tensor


def makes_complex(node: fx.Node) -> bool:
    """Whether an operator makes complex tensors (Fourier transforms aside: what transforms to frequencies and back needs no pairs)."""
    return op_name(node.target) in MAKERS or any(
        isinstance(a, torch.dtype) and a.is_complex for a in (*node.args, *node.kwargs.values())
    )


def op_name(target: Any) -> str:
    """Name of an ATen operator without overload and in-place mark; '' or another text for other targets."""
    name = getattr(target, "__name__", str(target)).split(".")[0]
    return name[:-1] if name.endswith("_") else name


def as_pair(tensor: torch.Tensor) -> torch.Tensor:
    """[...] complex as [..., 2] real, in the same memory; a real tensor as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def parts_of(pair: torch.Tensor) -> Parts:
    return Parts(pair[..., 0], pair[..., 1])


def joined(value: Any) -> Any:
    return torch.stack([value.re, value.im], dim=-1) if isinstance(value, Parts) else as_pair(value)


def _is_parts(value: Any) -> bool:
    return isinstance(value, Parts)


def on_parts(target: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator on complex tensors in parts (or one that makes such); NotImplemented where none is concerned."""
    name = op_name(target)
    concerned = any(map(_is_parts, pytree.tree_leaves((args, kwargs), is_leaf=_is_parts)))
    if name in FORMS and (name in MAKERS or concerned):
        return FORMS[name](*args, **kwargs)
    if name in ("to", "_to_copy"):
        return _cast(target, args, kwargs)
    if not concerned:
        return NotImplemented
    if name in LINEAR:
        return _linear(target, args, kwargs)
    if name in BILINEAR:
        return _bilinear(target, args, kwargs)
    args, kwargs = pytree.tree_map(_whole, (args, kwargs), is_leaf=_is_parts)
    return pytree.tree_map(split, target(*args, **kwargs))


def _whole(value: Any) -> Any:
    return torch.complex(value.re, value.im) if isinstance(value, Parts) else value


def split(value: Any) -> Any:
    return parts_of(torch.view_as_real(value)) if isinstance(value, torch.Tensor) and value.is_complex() else value


def _both(args: Any, choose: Callable[[Any], Any]) -> Any:
    return pytree.tree_map(choose, args, is_leaf=_is_parts)


def _linear(target: Any, args: Any, kwargs: Any) -> Any:
    """An operator that acts on both parts alike; real operands of a sum of complex ones (``cat``) have imaginary part 0."""
    mixed = op_name(target) in ("cat", "stack", "where")

    def imaginary(value: Any) -> Any:
        if isinstance(value, Parts):
            return value.im
        numbers = mixed and isinstance(value, torch.Tensor) and value.is_floating_point()
        return torch.zeros_like(value) if numbers else value

    re = target(*_both(args, lambda v: v.re if isinstance(v, Parts) else v), **kwargs)
    im = target(*_both(args, imaginary), **kwargs)
    return Parts(re, im) if isinstance(re, torch.Tensor) else [Parts(a, b) for a, b in zip(re, im, strict=True)]


def _bilinear(target: Any, args: Any, kwargs: Any) -> Any:
    places = [
        i for i, leaf in enumerate(pytree.tree_leaves(args, is_leaf=_is_parts)) if not isinstance(leaf, str | None)
    ][:2]
    leaves, spec = pytree.tree_flatten(args, is_leaf=_is_parts)

    def product(left: Any, right: Any) -> Any:
        given = list(leaves)
        given[places[0]], given[places[1]] = left, right
        return target(*pytree.tree_unflatten(given, spec), **kwargs)

    (a, b), (c, d) = (_pair_of(leaves[i]) for i in places)
    if d is None:
        return Parts(product(a, c), product(b, c))
    if b is None:
        return Parts(product(a, c), product(a, d))
    return Parts(product(a, c) - product(b, d), product(a, d) + product(b, c))


def _pair_of(value: Any) -> tuple[Any, Any]:
    """Real and imaginary part of an operand, the latter None where the operand is real."""
    if isinstance(value, Parts):
        return value.re, value.im
    return (value.real, value.imag) if isinstance(value, complex) else (value, None)


def _cast(target: Any, args: Any, kwargs: Any) -> Any:
    types = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)]
    wanted = types[0] if types else None
    value = args[0]
    if isinstance(value, Parts):
        if wanted is None or wanted in REAL:
            real = value.re.dtype if wanted is None else REAL[wanted]
            return Parts(value.re.to(real), value.im.to(real))
        return value.re.to(wanted)
    if wanted in REAL:
        real_part = value.to(REAL[wanted])
        return Parts(real_part, torch.zeros_like(real_part))
    return target(*args, **kwargs)


def _sum(sign: int) -> Callable[..., Any]:
    def form(left: Any, right: Any, alpha: float = 1) -> Parts:
        parts: list[Any] = [0 if v is None else v for v in (*_pair_of(left), *_pair_of(right))]
        times: Any = sign * alpha
        re = parts[0] + (parts[2] if times == 1 else times * parts[2])
        im = parts[1] + (parts[3] if times == 1 else times * parts[3])
        return Parts(re, im.expand_as(re) if im.shape != re.shape else im)

    return form


def _div(left: Any, right: Any) -> Parts:
    (a, b), (c, d) = _pair_of(left), _pair_of(right)
    b = torch.zeros_like(a) if b is None else b
    if d is None:
        return Parts(a / c, b / c)
    size = c * c + d * d
    return Parts((a * c + b * d) / size, (b * c - a * d) / size)


def _exp(value: Parts) -> Parts:
    size = value.re.exp()
    return Parts(size * value.im.cos(), size * value.im.sin())


def _same(value: Any) -> Any:
    return value


def _conjugate(value: Parts) -> Parts:
    return Parts(value.re, -value.im)


FORMS: dict[str, Callable[..., Any]] = {
    "view_as_complex": lambda pair: parts_of(pair),
    "view_as_real": lambda value: torch.stack([value.re, value.im], dim=-1),
    "complex": lambda re, im: Parts(*torch.broadcast_tensors(re, im)),
    "polar": lambda size, angle: Parts(size * angle.cos(), size * angle.sin()),
    "real": lambda value: value.re,
    "imag": lambda value: value.im,
    "abs": lambda value: (value.re * value.re + value.im * value.im).sqrt(),
    "angle": lambda value: torch.atan2(value.im, value.re),
    "conj": _conjugate,
    "_conj": _conjugate,
    "conj_physical": _conjugate,
    "resolve_conj": _same,
    "resolve_neg": _same,
    "exp": _exp,
    "add": _sum(1),
    "sub": _sum(-1),
    "div": _div,
}
"""Other operators on complex tensors."""
