"""Control flow that depends on the data: where a model decides by the values of its tensors, and what of it can be passed over.

``torch.export`` cannot capture ``if x.sum() > 0``. Where a model applies the layers of one ModuleList one after another, such decisions may lie between
the layers (an early exit, a check of convergence): then the network is the chain of all its layers, and the decisions are taken as they fell on
the example. A decision inside a layer, before the first or behind the last belongs to what is to be captured: the model is refused, with
the line. A decision on a tensor that does not come from the input (``is this mask causal?``) always falls alike and is no obstacle. Nor is one that only
saves work (``if not mask.any(): mask = None``): the model that always does the work computes the same to the bit, and is what is captured.

Requires: a model that runs on the example. Ensures: the model as it was.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)
READS = (
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__contains__,
    torch.Tensor.item,
)
TORCH = str(Path(torch.__file__).parent)
Place = tuple[str, int]
Arguments = tuple[Sequence[torch.Tensor], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Decision:
    """A tensor read as a number by ``file:line``; ``where``: ``stem``, ``layer K``, ``between`` layers or ``head``; ``constant``: not of the input."""

    file: str
    line: int
    where: str
    value: bool | int | float
    constant: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.where if self.where != 'between' else 'between the layers'})"


@dataclass(frozen=True)
class Chain:
    """The layers of the ModuleList ``name``, each applied once, in order; ``decisions`` in the order they were taken."""

    name: str
    layers: int
    decisions: tuple[Decision, ...]

    @property
    def between(self) -> tuple[Decision, ...]:
        """The decisions on the input that lie between the layers."""
        return tuple(d for d in self.decisions if d.where == "between" and not d.constant)

    @property
    def replayable(self) -> tuple[Decision, ...]:
        """Those, and what always falls alike."""
        return tuple(d for d in self.decisions if d.constant or d.where == "between")

    def note(self) -> str:
        """What a conversion along the layers means for the user."""
        return (
            f"The model decides by the values of its tensors between the layers of {self.name} ({_lines(self.between)}): it is converted as the chain of "
            f"all {self.layers} layers, as it went on the example. On inputs for which it would decide otherwise the converted network differs."
        )


def chain_of(model: nn.Module, arguments: Arguments) -> Chain | None:
    """The largest ModuleList whose layers the model applies once each, in order; None where there is none."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    for name, layers in sorted(lists, key=lambda item: -sum(p.numel() for p in item[1].parameters())):
        decisions = _as_a_chain(model, layers, arguments)
        if decisions is not None:
            return Chain(name, len(layers), decisions)
    return None


def _as_a_chain(model: nn.Module, layers: nn.ModuleList, arguments: Arguments) -> tuple[Decision, ...] | None:
    """What the model decides while it applies each of the layers once, in order; None where it does not."""
    calls: list[int] = []
    with _watched(layers, calls) as state:
        decisions = _read(model, arguments, lambda: _where(state, len(layers)))
    if calls != list(range(len(layers))):
        return None
    between = {(d.file, d.line) for d in decisions if d.where == "between"}
    loop = [d for d in decisions if d.where == "head" and (d.file, d.line) in between]  # behind the last layer
    return tuple(replace(d, where="between") if d in loop else d for d in decisions)


def _read(model: nn.Module, arguments: Arguments, where: Callable[[], str]) -> list[Decision]:
    return _run(model, arguments, where)[0]


def _run(model: nn.Module, arguments: Arguments, where: Callable[[], str]) -> tuple[list[Decision], list[torch.Tensor]]:
    """What the model decides, and computes."""
    args = [a.clone() for a in arguments[0]]
    kwargs = {name: tensor.clone() for name, tensor in arguments[1].items()}
    derived = _Derived([*args, *kwargs.values()])
    with _Reader(where, derived) as reader, derived, torch.no_grad():
        made = model(*args, **kwargs)
    return reader.decisions, [t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]


def explain(decisions: Sequence[Decision]) -> str:
    """Where the decisions lie, as a part of a message."""
    return f"it decides by the values of its tensors at {_lines(decisions)}"


def _lines(decisions: Sequence[Decision]) -> str:
    lines = list(dict.fromkeys(map(str, decisions)))
    return ", ".join(lines[:4]) + (f" and {len(lines) - 4} more" if len(lines) > 4 else "")


def decisions_of(model: nn.Module, arguments: Arguments) -> tuple[Decision, ...]:
    """Every place of the model that reads a tensor as a number on the example."""
    return tuple(_read(model, arguments, lambda: "forward"))


def idle(model: nn.Module, arguments: Arguments, decisions: Sequence[Decision]) -> dict[Place, bool]:
    """Where the model decides by yes or no and one answer is right for every input, and that answer.

    It is right where the model itself gives it, and makes no difference where the model gives the other: that is tried on the example and on others made of it.
    """
    found: dict[Place, bool] = {}
    places = {(d.file, d.line): d for d in decisions if type(d.value) is bool}
    for (place, first), answer in itertools.product(places.items(), (True, False)):
        if place not in found and _is_right(model, arguments, place, answer):
            log.warning(
                "The model decides by the values of its tensors at %s, which makes no difference: converted as if it were always %s.",
                first,
                answer,
            )
            found[place] = answer
    return found


def _is_right(model: nn.Module, arguments: Arguments, place: Place, answer: bool) -> bool:
    for number, other in enumerate(_others(arguments)):
        same = _same_with(model, other, place, answer)
        if same is False or (same is None and number == 0):
            return False
    return True


def _same_with(model: nn.Module, arguments: Arguments, place: Place, answer: bool) -> bool | None:
    """Whether the model computes the same if it always decides so; None where it does so anyway, or takes no such inputs."""
    try:
        decisions, expected = _run(model, arguments, lambda: "")
        if all(d.value is answer for d in decisions if (d.file, d.line) == place):
            return None
    except Exception:
        return None
    try:
        with replayed(model, (), {place: answer}):
            got = _run(model, arguments, lambda: "")[1]
    except Exception:
        return False
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _others(arguments: Arguments) -> Iterator[Arguments]:
    """The example, and others: integers of its range drawn again; real numbers shuffled, negated, made larger and smaller, and with noise."""
    yield arguments
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: torch.Tensor, scale: float, noise: float) -> torch.Tensor:
        flat = tensor.flatten()
        if not len(flat):
            return tensor
        if not tensor.is_floating_point():
            values = flat[torch.randint(len(flat), (len(flat),), generator=generator)]
        else:
            spread = noise * flat.square().mean().sqrt()
            added = spread * torch.randn(flat.shape, generator=generator).to(flat)
            values = (flat[torch.randperm(len(flat), generator=generator)] + added) * scale
        return values.reshape(tensor.shape)

    args, kwargs = arguments
    for scale, noise in itertools.product((1.0, -1.0, 100.0, 0.01), (0.0, 0.5, 2.0)):
        yield (
            tuple(drawn(a, scale, noise) for a in args),
            {name: drawn(t, scale, noise) for name, t in kwargs.items()},
        )


@contextmanager
def replayed(
    model: nn.Module, decisions: Sequence[Decision], always: Mapping[Place, bool] | None = None
) -> Iterator[None]:
    """While it is open, the model decides as it did on the example, and at some places ``always`` alike, whatever its tensors hold."""
    answers: dict[Place, list[Any]] = {}
    for decision in decisions:
        answers.setdefault((decision.file, decision.line), []).append(decision.value)
    mode = _Replay(answers, always or {})
    handle = model.register_forward_pre_hook(lambda *_: mode.begin())
    try:
        with mode:
            yield
    finally:
        handle.remove()


@dataclass
class _State:
    """How many layers have been entered and left so far, and which one runs."""

    left: int = 0
    inside: int | None = None


@contextmanager
def _watched(layers: nn.ModuleList, calls: list[int]) -> Iterator[_State]:
    state = _State()

    def enter(k: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls.append(k)
            state.inside = k

        return hook

    def leave(*_: Any) -> None:
        state.inside, state.left = None, state.left + 1

    handles = [layer.register_forward_pre_hook(enter(k)) for k, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()


def _where(state: _State, count: int) -> str:
    if state.inside is not None:
        return f"layer {state.inside}"
    if state.left == 0:
        return "stem"
    return "head" if state.left == count else "between"


class _Derived(TorchDispatchMode):
    """Knows the tensors that are computed from given ones, by their memory; keeps them alive, so that no memory is used twice."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.kept = list(tensors)
        self.memory = {t.untyped_storage().data_ptr() for t in tensors}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(t in self for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)):
            made = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.kept += made
            self.memory |= {t.untyped_storage().data_ptr() for t in made if t.numel()}
        return result


class _Reader(TorchFunctionMode):
    """Records every tensor that is read as a number, by the line outside torch that led to it."""

    def __init__(self, where: Callable[[], str], derived: _Derived) -> None:
        super().__init__()
        self.where, self.derived, self.decisions = where, derived, list[Decision]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_read(func):
            self.decisions.append(Decision(*_place(), self.where(), result, constant=args[0] not in self.derived))
        return result


class _Replay(TorchFunctionMode):
    """Answers such reads as they were answered before."""

    def __init__(self, answers: Mapping[Place, Sequence[Any]], always: Mapping[Place, bool]) -> None:
        super().__init__()
        self.answers, self.always, self.used = answers, always, dict[Place, int]()

    def begin(self) -> None:
        self.used.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_read(func):
            place = _place()
            if place in self.always:
                return self.always[place]
            k = self.used.get(place, 0)
            if k < len(self.answers.get(place, ())):
                self.used[place] = k + 1
                return self.answers[place][k]
        return func(*args, **(kwargs or {}))


def _is_read(func: Any) -> bool:
    return func in READS


def _place() -> Place:
    """File and line of the nearest caller outside torch and this module."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(TORCH)
    ):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
