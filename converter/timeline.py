"""What one piece of a network allocates while it is computed and differentiated, found on fake tensors: no number is computed, no memory is used.

A piece is run twice, at two batches. Every storage it makes has a size that is affine in the batch, and they are made and freed in the same order (but for
what autocast drops together), so that the sequence can be replayed at any batch: ``forward_peak`` and ``backward_peak`` are the most bytes alive at once. What autograd keeps is what
``saved_tensors_hooks`` is shown, each storage once, parameters left out.

Requires: a module of tensors, shapes of its inputs. Ensures: the module is unchanged.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)

BATCHES = (2, 4)
"""Batches at which a piece is run."""


class Affine(NamedTuple):
    """``const + slope * n`` bytes at a batch of n."""

    const: float
    slope: float

    def at(self, n: int) -> int:
        return round(self.const + self.slope * n)

    @classmethod
    def through(cls, small: int, large: int) -> Affine:
        """The line through the sizes at the two :data:`BATCHES`."""
        slope = (large - small) / (BATCHES[1] - BATCHES[0])
        return cls(small - slope * BATCHES[0], slope)


@dataclass(frozen=True)
class Signature:
    """Layout of a tensor at one batch."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Signature:
        return cls(tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())), tensor.dtype)

    @property
    def bytes(self) -> int:
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        return torch.empty_strided(self.shape, self.stride, device="meta").is_contiguous()

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


@dataclass(frozen=True)
class Layout:
    """Layout of a value at both :data:`BATCHES`."""

    small: Signature
    large: Signature

    @property
    def bytes(self) -> Affine:
        return Affine.through(self.small.bytes, self.large.bytes)

    def at(self, k: int) -> Signature:
        return (self.small, self.large)[k]

    @classmethod
    def dense(cls, shape: Callable[[int], Sequence[int]], dtype: torch.dtype) -> Layout:
        """Contiguous, of ``shape(batch)``."""
        sizes = [torch.empty(tuple(shape(n)), dtype=dtype, device="meta") for n in BATCHES]
        return cls(Signature.of(sizes[0]), Signature.of(sizes[1]))


@dataclass(frozen=True)
class Recipe:
    """How a piece is run.

    ``autocast``: the type of its products, None for none; ``store``: the type its weights and inputs are stored in, None for their own;
    ``trained``: names of the parameters that get a gradient; ``entered``: whether its inputs of floating point do;
    ``recorded``: whether autograd records at all.
    """

    autocast: torch.dtype | None = None
    store: torch.dtype | None = None
    trained: frozenset[str] = frozenset()
    entered: frozenset[int] = frozenset()
    recorded: bool = True


class Tracker(TorchDispatchMode):
    """The storages that operators make, in order, and when each is freed."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.events: list[tuple[int, bool]] = []
        self.sizes: list[int] = []
        self.alive: dict[int, int] = {t.untyped_storage()._cdata: -1 for t in known}
        self._refs: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        index = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.alive[key] = index
        self.events.append((index, True))

        def freed(_: Any) -> None:
            self.events.append((index, False))
            self.alive.pop(key, None)
            self._refs.pop(index, None)

        self._refs[index] = weakref.ref(storage, freed)

    def stop(self) -> None:
        """See nothing from here on."""
        self._refs.clear()


@dataclass(frozen=True, eq=False)
class Pass:
    """One piece computed and, where it was recorded, differentiated.

    ``outputs``: layouts; ``events``: (storage, made or freed) in order, the first ``turn`` of them forward; ``sizes`` of the storages;
    ``kept``: those autograd keeps, but for inputs and outputs, of which ``kept_inputs`` and ``kept_outputs`` tell the places; ``out``: storages of outputs,
    ``kept_out``: those of them that autograd keeps; ``graded``: places of outputs that have a gradient.
    """

    outputs: tuple[Layout, ...]
    events: tuple[tuple[int, bool], ...]
    turn: int
    sizes: tuple[Affine, ...]
    kept: frozenset[int]
    kept_inputs: frozenset[int]
    kept_outputs: frozenset[int]
    out: frozenset[int]
    kept_out: frozenset[int]
    graded: frozenset[int]

    def kept_bytes(self, n: int) -> int:
        """What autograd keeps at a batch of n, inputs and outputs left out."""
        return sum(self.sizes[i].at(n) for i in self.kept)

    def forward_peak(self, n: int) -> int:
        """The most bytes made and not yet freed while it is computed, outputs among them."""
        return self._peak(self.events[: self.turn], n, frozenset())[0]

    def backward_peak(self, n: int) -> int:
        """The most bytes alive while it is differentiated: what is still kept (outputs too), gradients of its parameters and inputs, and what passes."""
        left_out = self.out - self.kept_out
        _, alive = self._peak(self.events[: self.turn], n, left_out)
        return alive + self._peak(self.events[self.turn :], n, left_out)[0]

    def _peak(self, events: Sequence[tuple[int, bool]], n: int, left_out: frozenset[int]) -> tuple[int, int]:
        now = most = 0
        for index, made in events:
            if index not in left_out:
                now += self.sizes[index].at(n) if made else -self.sizes[index].at(n)
                most = max(most, now)
        return most, now


class _End(torch.autograd.Function):
    """What comes behind a piece: gives it a gradient that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.signature = Signature.of(tensor)
        return tensor.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return ctx.signature.empty()


@dataclass
class _Run:
    """A pass at one batch."""

    outputs: list[Signature]
    tracker: Tracker
    turn: int
    kept: set[int]
    kept_inputs: set[int]
    kept_outputs: set[int]
    out: set[int]
    kept_out: set[int]
    graded: set[int]


def measure(module: nn.Module, inputs: Sequence[Layout], recipe: Recipe) -> Pass:
    """Run ``module`` on fake tensors of these layouts.

    Raises:
        RuntimeError: an operator that cannot be run on shapes alone (as torch says it).
    """
    small, large = (_run(module, [layout.at(k) for layout in inputs], recipe) for k in range(len(BATCHES)))
    if [made for _, made in small.tracker.events] != [made for _, made in large.tracker.events]:
        log.debug("what a piece allocates depends on the batch beyond its size: all is taken to grow with it")
        sizes = [Affine(0.0, size / BATCHES[1]) for size in large.tracker.sizes]
    else:
        sizes = [Affine.through(a, b) for a, b in zip(small.tracker.sizes, large.tracker.sizes, strict=True)]
    return Pass(
        tuple(Layout(a, b) for a, b in zip(small.outputs, large.outputs, strict=True)),
        tuple(large.tracker.events),
        large.turn,
        tuple(sizes),
        frozenset(large.kept),
        frozenset(large.kept_inputs),
        frozenset(large.kept_outputs),
        frozenset(large.out),
        frozenset(large.kept_out),
        frozenset(large.graded),
    )


def _run(module: nn.Module, signatures: Sequence[Signature], recipe: Recipe) -> _Run:
    with FakeTensorMode():
        held = _fakes(module, recipe)
        inputs = [_stored(signature, recipe).empty() for signature in signatures]
        for k in recipe.entered:
            inputs[k].requires_grad_(inputs[k].is_floating_point())
        known = {t.untyped_storage()._cdata for t in held.values()}
        places = {t.untyped_storage()._cdata: k for k, t in enumerate(inputs)}
        saved: list[torch.UntypedStorage] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor.untyped_storage())
            return tensor

        tracker = Tracker([*held.values(), *inputs])
        products = nullcontext() if recipe.autocast is None else torch.autocast("cpu", recipe.autocast)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.set_grad_enabled(recipe.recorded), tracker, hooks:
            with products:
                made = torch.func.functional_call(module, held, tuple(inputs))
                made = made if isinstance(made, tuple) else (made,)
            turn = len(tracker.events)
            ends = {t.untyped_storage()._cdata: k for k, t in enumerate(made)}
            stored = {storage._cdata for storage in saved} - known
            saved.clear()
            run = _Run(
                [Signature.of(t) for t in made],
                tracker,
                turn,
                {
                    tracker.alive[key]
                    for key in stored
                    if key in tracker.alive and key not in ends and key not in places
                },
                {places[key] for key in stored if key in places},
                {ends[key] for key in stored if key in ends and key not in places},
                {tracker.alive[key] for key in ends if tracker.alive.get(key, -1) >= 0},
                {tracker.alive[key] for key in stored if key in ends and tracker.alive.get(key, -1) >= 0},
                {k for k, t in enumerate(made) if t.requires_grad},
            )
            end = _End.apply(made[0]) if made[0].requires_grad else None
            del made
            if end is not None:
                end.backward()
            tracker.stop()
    return run


def _stored(signature: Signature, recipe: Recipe) -> Signature:
    if recipe.store is None or not signature.dtype.is_floating_point:
        return signature
    return Signature(signature.shape, signature.stride, recipe.store)


def _fakes(module: nn.Module, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Fake tensors in the places of a module's parameters and buffers, tied ones one."""
    made: dict[int, torch.Tensor] = {}
    names: dict[str, torch.Tensor] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) not in made:
            fake = _stored(Signature.of(tensor), recipe).empty()
            made[id(tensor)] = fake
        if name in recipe.trained:
            made[id(tensor)].requires_grad_()
        names[name] = made[id(tensor)]
    return names
