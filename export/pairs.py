"""Complex tensors as pairs of real ones: ONNX Runtime has none, and torch's exporter knows only a few of their operators.

While a piece is exported its graph is run node by node, with every complex tensor as its real and imaginary part. What enters or leaves a piece is
[..., 2] real. Operators without a form here (Fourier transforms) are left to torch's exporter.

Requires: a torch.fx graph. Ensures: an exported graph equal to the torch.fx graph up to rounding, without complex inputs, weights and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
LINEAR = frozenset(
    "view reshape _unsafe_view unsqueeze squeeze expand expand_as permute transpose t movedim slice select index index_select gather split "
    "split_with_sizes unsafe_split chunk unbind cat stack repeat flatten unflatten clone contiguous detach alias lift_fresh_copy neg roll flip sum mean "
    "cumsum where zeros_like".split()
)
"""Operators that act on real and imaginary part alike."""
BILINEAR = frozenset({"mul", "multiply", "mm", "bmm", "matmul", "einsum"})
MAKERS = frozenset({"view_as_complex", "complex", "polar"})


class Parts(NamedTuple):
    """A complex tensor by its real and imaginary part."""

    re: torch.Tensor
    im: torch.Tensor


def has_complex(module: nn.Module, example: tuple[torch.Tensor, ...]) -> bool:
    """Whether a graph takes, holds or makes complex tensors (one that only transforms to frequencies and back does not)."""
    if not isinstance(module, fx.GraphModule):
        return False
    held = (*example, *module.parameters(), *module.buffers())
    return any(t.is_complex() for t in held) or any(_name(node.target) in MAKERS or _casts(node) for node in module.graph.nodes)


def _name(target: Any) -> str:
    name = getattr(target, "__name__", str(target)).split(".")[0]
    return name[:-1] if name.endswith("_") else name


def _casts(node: fx.Node) -> bool:
    return any(isinstance(a, torch.dtype) and a.is_complex for a in (*node.args, *node.kwargs.values()))


def as_pair(tensor: torch.Tensor) -> torch.Tensor:
    """[...] complex as [..., 2] real, in the same memory; a real tensor as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class OnPairs(nn.Module):
    """A graph that takes, holds and gives pairs where ``inner`` does complex tensors; ``complex_inputs[i]`` says so of the i-th input."""

    def __init__(self, inner: fx.GraphModule, complex_inputs: tuple[bool, ...]) -> None:
        super().__init__()
        self.inner, self.complex_inputs = inner, complex_inputs
        held = (*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False))
        self.complex_weights = tuple(name for name, tensor in held if tensor.is_complex())

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = [_parts(v) if pair else v for v, pair in zip(values, self.complex_inputs, strict=True)]
        outputs = _Interpreter(self.inner, self.complex_weights).run(*inputs)
        return tuple(_stack(value) for value in outputs)


def _parts(pair: torch.Tensor) -> Parts:
    return Parts(pair[..., 0], pair[..., 1])


def _stack(value: Any) -> Any:
    return torch.stack([value.re, value.im], dim=-1) if isinstance(value, Parts) else as_pair(value)


def _is_parts(value: Any) -> bool:
    return isinstance(value, Parts)


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, complex_weights: tuple[str, ...]) -> None:
        super().__init__(module)
        self.complex_weights = complex_weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return _parts(value) if target in self.complex_weights else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = _name(target)
        if name == "getitem":
            return args[0][args[1]]
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_parts)
        if name in FORMS and (name in MAKERS or any(map(_is_parts, leaves))):
            return FORMS[name](*args, **kwargs)
        if name in ("to", "_to_copy"):
            return _cast(target, args, kwargs)
        if any(map(_is_parts, leaves)):
            if name in LINEAR:
                return _linear(target, args, kwargs)
            if name in BILINEAR:
                return _bilinear(target, args, kwargs)
            args, kwargs = pytree.tree_map(_whole, (args, kwargs), is_leaf=_is_parts)
        return pytree.tree_map(_split, super().call_function(target, args, kwargs))


def _whole(value: Any) -> Any:
    return torch.complex(value.re, value.im) if isinstance(value, Parts) else value


def _split(value: Any) -> Any:
    return _parts(torch.view_as_real(value)) if isinstance(value, torch.Tensor) and value.is_complex() else value


def _both(args: Any, choose: Callable[[Any], Any]) -> Any:
    return pytree.tree_map(choose, args, is_leaf=_is_parts)


def _linear(target: Any, args: Any, kwargs: Any) -> Any:
    """An operator that acts on both parts alike; real operands of a sum of complex ones (``cat``) have imaginary part 0."""
    mixed = _name(target) in ("cat", "stack", "where")

    def imaginary(value: Any) -> Any:
        if isinstance(value, Parts):
            return value.im
        numbers = mixed and isinstance(value, torch.Tensor) and value.is_floating_point()
        return torch.zeros_like(value) if numbers else value

    re = target(*_both(args, lambda v: v.re if isinstance(v, Parts) else v), **kwargs)
    im = target(*_both(args, imaginary), **kwargs)
    return Parts(re, im) if isinstance(re, torch.Tensor) else [Parts(a, b) for a, b in zip(re, im, strict=True)]


def _operands(args: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(args, is_leaf=_is_parts) if isinstance(leaf, torch.Tensor | Parts | complex | float | int)]


def _bilinear(target: Any, args: Any, kwargs: Any) -> Any:
    places = [i for i, leaf in enumerate(pytree.tree_leaves(args, is_leaf=_is_parts)) if not isinstance(leaf, str | None)][:2]
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
        (a, b), (c, d) = _pair_of(left), _pair_of(right)
        a, b, c, d = ((0 if v is None else v) for v in (a, b, c, d))
        times = sign * alpha
        re, im = a + times * c if times != 1 else a + c, b + times * d if times != 1 else b + d
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
    "view_as_complex": lambda pair: _parts(pair),
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
