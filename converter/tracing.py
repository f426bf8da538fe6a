"""What a model does besides computing, which disturbs its export.

Libraries ask ``torch.compiler.is_exporting()`` to build a mask, say, that they leave out otherwise. What they then compute may differ from the model that
the user has, at least in the last digits; :func:`watched` tells whether one asks, :func:`unnoticed` lets it compute as always. :func:`settled` bears a
forward that moves its modules to the type they have, one that returns objects which are no tensors, and a loop over the places where a vector is not zero
(the experts that have tokens), which becomes one over all.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils import _pytree as pytree

QUESTIONS = ("is_exporting", "is_compiling", "is_dynamo_compiling")
MOST = 1024
"""Places that a loop is written out for."""


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collects the modules outside torch that ask meanwhile whether they are exported."""
    asking: list[str] = []

    def listening(answer: Callable[[], bool]) -> Callable[[], bool]:
        def listen() -> bool:
            caller = str(sys._getframe(1).f_globals.get("__name__"))
            if caller.partition(".")[0] != "torch":
                asking.append(caller)
            return answer()

        return listen

    with ExitStack() as stack:
        for name in QUESTIONS:
            stack.enter_context(patch.object(torch.compiler, name, listening(getattr(torch.compiler, name))))
        yield asking


@contextmanager
def unnoticed(tensors: bool = False) -> Iterator[None]:
    """Whoever asks meanwhile is told that nothing is exported; with ``tensors`` also transformers' models that ask a tensor whether it has values."""
    with ExitStack() as stack:
        for name in QUESTIONS:
            stack.enter_context(patch.object(torch.compiler, name, lambda: False))
        asked = sys.modules.get("transformers.utils.import_utils")
        if tensors and hasattr(asked, "is_fake_tensor"):
            stack.enter_context(patch.object(asked, "is_fake_tensor", lambda _: False))
        yield


@contextmanager
def settled(model: nn.Module, without: int = 0) -> Iterator[None]:
    """``module.to(...)`` changes nothing where the module is so already, and objects in the model's output that are no tensors are left out.

    A loop over the places of a vector that are not zero is one over all but the last ``without`` (a place for tokens of no expert, at which the loop would fail).
    """
    move, forward = nn.Module.to, model.forward

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        there = all(
            device in (None, t.device) and (dtype in (None, t.dtype) or not t.is_floating_point()) for t in tensors
        )
        return module if there and layout is None else move(module, *args, **kwargs)

    def plain(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map(_known, forward(*args, **kwargs))

    def nonzero(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = count(tensor, *args, **kwargs)
        many = tensor.shape[0] if tensor.dim() == 1 else None
        if (
            isinstance(many, int)
            and many <= MOST
            and isinstance(found, torch.Tensor)
            and isinstance(found.shape[0], torch.SymInt)
        ):
            found.candidates = many  # type: ignore[attr-defined]
        return found

    def every(tensor: torch.Tensor) -> Iterator[Any]:
        candidates = tensor.__dict__.get("candidates")
        return iterate(tensor) if candidates is None else iter([Hit([i]) for i in range(candidates - without)])

    count, iterate = torch.Tensor.nonzero, torch.Tensor.__iter__
    hits = patch.multiple(torch.Tensor, nonzero=nonzero, __iter__=every)
    sqrt = patch.object(torch.SymFloat, "sqrt", torch.sym_sqrt, create=True)  # numpy asks a number for it
    with hits, sqrt, patch.object(nn.Module, "to", to), patch.object(model, "forward", functools.wraps(forward)(plain)):
        yield


class Hit(list[int]):
    """One row of ``nonzero()`` of a vector, as a loop over them reads it: [i]."""

    def item(self) -> int:
        return self[0]

    __int__ = __index__ = squeeze = item


def _known(leaf: Any) -> Any:
    return leaf if isinstance(leaf, torch.Tensor | int | float | bool | str | None) else None
