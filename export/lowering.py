"""A graph in terms that have an ONNX form which ONNX Runtime computes: what torch's exporter leaves out, or writes so that it cannot be run.

While a piece is exported, its graph is run node by node; operators with an entry in :data:`FORMS` are replaced, and complex tensors are pairs of real ones
(``pairs``), in memory [..., 2] where they enter or leave a piece or are weights.

Requires: a torch.fx graph whose nodes have examples (``meta["val"]``). Ensures: the same function up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusionblocks.export.pairs import joined, makes_complex, on_parts, op_name, parts_of, split
from torch import fx, nn
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.nn import functional as F
from torch.utils import _pytree as pytree


def lowered(module: nn.Module, example: Sequence[torch.Tensor]) -> nn.Module:
    """``module``, or where it needs it, one of the same weights that computes the same in other operators."""
    if not isinstance(module, fx.GraphModule):
        return module
    held = (*example, *module.parameters(), *module.buffers())
    if any(t.is_complex() for t in held) or any(_concerned(graph) for graph in module.modules()):
        return Lowered(module, tuple(e.is_complex() for e in example))
    return module


def _concerned(module: nn.Module) -> bool:
    nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
    return any(
        n.op == "call_function" and (makes_complex(n) or _form_of(n.target, n.args, n.kwargs) is not None)
        for n in nodes
    )


class Lowered(nn.Module):
    """``inner`` in operators that can be exported; ``complex_inputs[i]`` says that its i-th input is complex."""

    def __init__(self, inner: fx.GraphModule, complex_inputs: tuple[bool, ...]) -> None:
        super().__init__()
        self.inner, self.complex_inputs = inner, complex_inputs
        held = (*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False))
        self.complex_weights = tuple(name for name, tensor in held if tensor.is_complex())

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = [parts_of(v) if pair else v for v, pair in zip(values, self.complex_inputs, strict=True)]
        outputs = _Interpreter(self.inner, self.complex_weights).run(*inputs)
        return tuple(joined(value) for value in outputs)


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, complex_weights: tuple[str, ...]) -> None:
        super().__init__(module)
        self.complex_weights = complex_weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return parts_of(value) if target in self.complex_weights else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        inner = self.fetch_attr(target)
        if not isinstance(inner, fx.GraphModule):
            return super().call_module(target, args, kwargs)
        weights = tuple(n.removeprefix(f"{target}.") for n in self.complex_weights if n.startswith(f"{target}."))
        return _Interpreter(inner, weights).run(*args)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if op_name(target) == "getitem":
            return args[0][args[1]]
        result = on_parts(target, args, kwargs)
        if result is not NotImplemented:
            return result
        form = _form_of(target, args, kwargs)
        return form(*args, **kwargs) if form is not None else pytree.tree_map(split, target(*args, **kwargs))


def _form_of(target: Any, args: Sequence[Any], kwargs: Any) -> Callable[..., Any] | None:
    """The form to write an operator in; None where the exporter's own will do."""
    name, examples = op_name(target), [_example(a) for a in args]
    for applies, form in FORMS.get(name, ()):
        if applies(*examples):
            return form
    if target in STABLE:
        return STABLE[target]
    if _is_almost_neutral(name, *examples[:2]):
        return _with_vector(target)
    floats = [e.dtype for e in examples if isinstance(e, torch.Tensor) and e.is_floating_point()]
    computes = name not in MOVING and isinstance(target, OpOverload)
    return _in_single(target) if computes and floats and all(t == torch.bfloat16 for t in floats) else None


def _example(value: Any) -> Any:
    return value.meta.get("val") if isinstance(value, fx.Node) else value


def _is_bool(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, *rest: Any, **options: Any
) -> torch.Tensor:
    """Attention of other than four dimensions [..., L, C], with those in front in one."""
    front = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(*front, *tensor.shape[-2:]).reshape(-1, 1, *tensor.shape[-2:])

    mask = None if attn_mask is None else flat(attn_mask) if attn_mask.dim() > 2 else attn_mask
    return F.scaled_dot_product_attention(flat(q), flat(k), flat(v), mask, *rest, **options).reshape(
        *front, q.shape[-2], v.shape[-1]
    )


def _attention_to_nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Attention without keys: zeros [..., L, C]."""
    return q.new_zeros((*q.shape[:-1], v.shape[-1]))


def _sort(tensor: torch.Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """A stable sort; ONNX's TopK, which a plain one becomes, leaves equal elements in their order."""
    return torch.sort(tensor, dim, descending)


def _argsort(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
    order: torch.Tensor = _sort(tensor, **options)[1]
    return order


def _in_single(target: Any) -> Callable[..., Any]:
    """An operator on bfloat16, which ONNX Runtime has few of on a CPU, computed in float32 and rounded, as torch does."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value

    def narrow(value: Any) -> Any:
        return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def form(*args: Any, **kwargs: Any) -> Any:
        wanted = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
        result = target(*pytree.tree_map(wide, args), **pytree.tree_map(wide, kwargs))
        return result if wanted not in (None, torch.bfloat16) else pytree.tree_map(narrow, result)

    return form


def _empty(tensor: torch.Tensor, *size: Any) -> torch.Tensor:
    """Another shape of a tensor without elements, which ONNX's Reshape cannot be told by -1."""
    made: torch.Tensor = tensor.new_zeros(size[0] if isinstance(size[0], list | tuple) else size)
    return made


def _is_almost_neutral(name: str, one: Any = None, other: Any = None) -> bool:
    """A sum with a number close to 0 or a product with one close to 1: onnxscript's optimizer takes a scalar there for neutral and leaves it out."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, float) or not one.is_floating_point():
        return False
    return (name in ("add", "sub") and 0 < abs(other) < 1e-7) or (name in ("mul", "div") and 0 < abs(other - 1) < 1e-4)


def _with_vector(target: Any) -> Callable[..., Any]:
    """The number as a vector of one, which is not a scalar."""
    return lambda one, other, **kwargs: target(one, one.new_full((1,), other), **kwargs).reshape(one.shape)


def _where(condition: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A choice between truth values, which ONNX Runtime has no Where for."""
    return (condition & one) | (~condition & other)


def _masked_fill(tensor: torch.Tensor, mask: torch.Tensor, value: Any) -> torch.Tensor:
    return tensor | mask if bool(value) else tensor & ~mask


def _convolution_of_each(
    tensor: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: Any = 1,
) -> torch.Tensor:
    """A convolution with as many groups as samples, each with a kernel of its own: [1, G C, H, W], [G O, C, h, w] -> [1, G O, H', W'] as a product a group."""
    channels, *kernel = weight.shape[1:]
    made = weight.shape[0] // groups
    how = tuple(kernel), tuple(dilation), tuple(padding), tuple(stride)
    columns = F.unfold(tensor.reshape(groups, channels, *tensor.shape[2:]), *how)
    products = weight.reshape(groups, made, -1) @ columns  # [G, O, H' W']
    places = zip(tensor.shape[2:], kernel, stride, padding, dilation, strict=True)
    size = [(n + 2 * pad - step * (k - 1) - 1) // by + 1 for n, k, by, pad, step in places]
    result = products.reshape(1, weight.shape[0], *size)
    return result if bias is None else result + bias[:, None, None]


def _lies_otherwise(tensor: Any, *_: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and list(_memory_order(tensor)) != list(range(tensor.dim()))


def _memory_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions from the outermost to the innermost in memory."""
    strides = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in tensor.stride()]
    return sorted(range(tensor.dim()), key=lambda d: -strides[d])


def _as_strided(tensor: torch.Tensor, *where: Any) -> torch.Tensor:
    """Steps through a tensor's memory; ONNX's form takes the tensor to lie in the order of its dimensions."""
    return tensor.permute(_memory_order(tensor)).contiguous().as_strided(*where)


def _ends_by_value(tensor: Any, dim: Any = 0, start: Any = None, end: Any = None, step: int = 1) -> bool:
    unbacked = isinstance(end, torch.SymInt) and free_unbacked_symbols(end)
    return bool(unbacked) and (start is None or start == 0) and step == 1


def _first_rows(tensor: torch.Tensor, dim: int, start: Any, end: Any, *_: Any) -> torch.Tensor:
    """A slice up to a number that was computed, which torch's own decomposition takes constants for."""
    return tensor.index_select(dim, torch.arange(end, device=tensor.device))


def _tells_empty(tensor: Any, size: Any = (), *_: Any) -> bool:
    return isinstance(size, list | tuple) and any(isinstance(n, int) and n == 0 for n in size)


STABLE: dict[Any, Callable[..., Any]] = {torch.ops.aten.sort.stable: _sort, torch.ops.aten.argsort.stable: _argsort}
MOVING = frozenset(
    [
        *(
            "to",
            "_to_copy",
            "type_as",
            "clone",
            "contiguous",
            "alias",
            "detach",
            "dropout",
            "native_dropout",
            "lift_fresh_copy",
        ),
        *(
            "view",
            "_unsafe_view",
            "reshape",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "permute",
            "transpose",
            "t",
            "movedim",
        ),
        *(
            "expand",
            "expand_as",
            "repeat",
            "repeat_interleave",
            "slice",
            "select",
            "narrow",
            "split",
            "split_with_sizes",
            "chunk",
            "unbind",
        ),
        *(
            "tensor_split",
            "cat",
            "stack",
            "gather",
            "index",
            "index_select",
            "embedding",
            "sym_size",
            "unfold",
            "as_strided",
        ),
        *("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"),
    ]
)
"""Operators that compute nothing, which ONNX Runtime has for every type."""
FORMS: dict[str, tuple[tuple[Callable[..., bool], Callable[..., Any]], ...]] = {
    "as_strided": ((_lies_otherwise, _as_strided),),
    "conv2d": (
        (
            lambda *args: isinstance(args[6] if len(args) > 6 else 1, torch.SymInt) and not isinstance(args[4], str),
            _convolution_of_each,
        ),
    ),
    "slice": ((_ends_by_value, _first_rows),),
    "view": ((_tells_empty, _empty),),
    "reshape": ((_tells_empty, _empty),),
    "scaled_dot_product_attention": (
        (lambda q, k, *_: k is not None and 0 in k.shape[-2:-1], _attention_to_nothing),
        (lambda q, *_: q is not None and q.dim() != 4, _attention),
    ),
    "mul": ((lambda one, other=None, *_: _is_bool(one) and _is_bool(other), torch.logical_and),),
    "where": ((lambda _, one=None, other=None: _is_bool(one) and _is_bool(other), _where),),
    "masked_fill": (
        (lambda tensor, _, value=None: _is_bool(tensor) and isinstance(value, bool | int | float), _masked_fill),
    ),
}
"""By an operator's name: when it needs another form (by the examples of its arguments), and that form."""
