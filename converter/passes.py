"""The passes of a network's pieces, each structure measured once: without gradients, and as training one block or all of the network runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusionblocks.converter import adaln, blocks
from diffusionblocks.converter.adapter import Adapter
from diffusionblocks.converter.capture import Captured
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.outline import Given, Outline, Target, structure
from diffusionblocks.converter.timeline import Layout, Pass, Recipe, measure
from torch import fx, nn
from torch.nn import functional as F

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Key = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Item:
    """One piece as it is run: its :class:`Pass`, what enters and leaves it by name, the ``trained`` parameters' bytes (which are those of their
    gradients), whether its inside is ``recomputed`` in the backward pass, and its ``factors``, each with its name among the inputs."""

    measured: Pass
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    trained: int
    recomputed: bool = False
    factors: tuple[tuple[str, adaln.Factor], ...] = ()


class Passes:
    """Measures pieces in one ``precision`` (of autocast; stored weights and inputs stay as they are), or ``stored`` in a type without autocast."""

    def __init__(
        self, captured: Captured, outlined: Outline, precision: str = "float32", stored: torch.dtype | None = None
    ) -> None:
        self.outlined, self.precision, self.stored = outlined, precision, stored
        self.half = DTYPES.get(precision)
        self._known: dict[Key, Pass] = {}
        self._structures: dict[int, int] = {}
        self._numbered: dict[Key, int] = {}
        self._units: dict[tuple[int, bool, bool], Item] = {}
        self._chain: list[Layout] = []
        self._numbers: dict[tuple[Pass, int], tuple[int, int, int]] = {}
        self.layouts: dict[str, Layout] = {}
        for name, tensor in zip(captured.input_names, captured.example, strict=True):
            self.layouts[name] = Layout.dense(lambda n, t=tensor: (n, *t.shape[1:]), tensor.dtype)  # type: ignore[misc]
        target = outlined.target
        dim = 1 if target is None else target.dim
        self.layouts[adaln.Z] = Layout.dense(lambda n: (n, dim), torch.float32)
        self.layouts[adaln.SIGMA] = Layout.dense(lambda n: (n,), torch.float32)
        self.inputs = tuple(captured.input_names)
        self.plain = [self._plain(k) for k in range(len(outlined.plain))]
        self._chain.append(self.layouts[STATE.format(0)])
        positions = self.plain[-1].measured.outputs[0].small.shape[1:-1]
        self.layouts[LABELS] = Layout.dense(lambda n: (n, *positions), torch.int64)

    def numbers(self, item: Item, n: int) -> tuple[int, int, int]:
        """Bytes kept, the forward and the backward peak of a piece at a batch of n."""
        measured = item.measured
        if (measured, n) not in self._numbers:
            found = measured.kept_bytes(n), measured.forward_peak(n), measured.backward_peak(n)
            self._numbers[measured, n] = found
        return self._numbers[measured, n]

    # -- without gradients ---------------------------------------------------------------------------------------------------------

    def _plain(self, k: int) -> Item:
        """Stem (k = 0), a unit or the head without gradients; what it makes joins ``layouts``, its state as ``state k``."""
        piece = self.outlined.plain[k]
        names = input_names(piece, k)
        item = Item(
            self._measure(piece, names, Recipe(self.half, self.stored, recorded=False)),
            names,
            output_names(piece, k),
            0,
        )
        for name, layout, node in zip(item.outputs, item.measured.outputs, piece.outputs, strict=True):
            self.layouts[name] = layout
            self.layouts.setdefault(side_name(node), layout)
        return item

    def _measure(self, piece: GraphPiece, names: Sequence[str], recipe: Recipe, state: Layout | None = None) -> Pass:
        given = next((m for m in piece.module.modules() if isinstance(m, Given)), None)
        layouts = [self.layouts[name] for name in names]
        if state is not None:
            layouts[0] = state
        factors = [] if given is None else [self.factor(f) for f in given.factors]
        entered = recipe.entered | frozenset(
            range(len(layouts), len(layouts) + len(factors)) if recipe.recorded else ()
        )
        trained = frozenset(f"module.{name}" for name in recipe.trained)
        recipe = Recipe(recipe.autocast, recipe.store, trained, entered, recipe.recorded)
        flags = tuple(name in trained for name, _ in Framed(piece.module, given).named_parameters())
        key = (self._structure(piece), tuple(layouts), tuple(factors), flags, entered, recipe.recorded)
        if key not in self._known:
            self._known[key] = measure(Framed(piece.module, given), [*layouts, *factors], recipe)
        return self._known[key]

    def _structure(self, piece: GraphPiece) -> int:
        if id(piece) not in self._structures:
            self._structures[id(piece)] = self._numbered.setdefault(structure(piece), len(self._numbered))
        return self._structures[id(piece)]

    def factor(self, factor: adaln.Factor) -> Layout:
        """Layout of what a conditioner makes."""

        def shape(n: int) -> list[int]:
            sizes = [1] * factor.rank
            sizes[factor.dim], sizes[factor.samples.dim] = factor.size, factor.samples.repeat * n
            return sizes

        return Layout.dense(shape, self.half or torch.float32)

    # -- in training ---------------------------------------------------------------------------------------------------------------

    def unit(self, k: int, *, first: bool, checkpointing: bool) -> Item:
        """Unit k of a block in training: its first one, which reads a state without a gradient, or a later one."""
        if (k, first, checkpointing) not in self._units:
            self._units[k, first, checkpointing] = self._unit(k, first, checkpointing)
        return self._units[k, first, checkpointing]

    def _unit(self, k: int, first: bool, checkpointing: bool) -> Item:
        piece = self.outlined.conditioned[k]
        names = input_names(piece, k + 1)
        trained = blocks.trainable_names(piece.module, self.outlined.tune)
        state = self.layouts[names[0]] if first else self._state(k)
        enters = not first or _apart(state)
        recipe = Recipe(self.half, None, frozenset(trained), frozenset([0]) if enters else frozenset())
        measured = self._measure(piece, names, recipe, state)
        given = next((m for m in piece.module.modules() if isinstance(m, Given)), None)
        factors = tuple((f"{FACTOR}{k}.{i}", f) for i, f in enumerate(given.factors if given is not None else ()))
        own = parameter_bytes(piece.module, trained)
        again = checkpointing and not moves_statistics(piece.module)
        return Item(measured, names + tuple(n for n, _ in factors), output_names(piece, k + 1), own, again, factors)

    def _state(self, k: int) -> Layout:
        """Layout of the state that enters unit k behind conditioned units."""
        for j in range(len(self._chain), k + 1):
            self._chain.append(self.unit(j - 1, first=False, checkpointing=False).measured.outputs[0])
        return self._chain[k]

    def conditioner(self, start: int, end: int) -> tuple[adaln.Conditioner, Item] | None:
        """The conditioner of a block of these units, and its pass."""
        module = self.outlined.conditioner(start, end)
        return None if module is None else (module, self._whole(module, (adaln.Z, adaln.SIGMA), (f"{FACTOR}all",)))

    def adapter(self, source: int, end: int, *, trained_before: bool) -> tuple[Adapter, Item] | None:
        """The entry or readout between the states that enter these units, and its pass."""
        module = self.outlined.adapter(source, end)
        if module is None:
            return None
        entered = frozenset([0]) if trained_before else frozenset()
        return module, self._whole(module, (STATE.format(source),), (f"adapted {source} {end}",), entered)

    def _whole(
        self, module: nn.Module, names: tuple[str, ...], made: tuple[str, ...], entered: frozenset[int] = frozenset()
    ) -> Item:
        trained = frozenset(name for name, _ in module.named_parameters())
        layouts = tuple(self.layouts[name] for name in names)
        key = (
            type(module).__name__,
            tuple(tuple(p.shape) for p in module.parameters()),
            layouts,
            entered,
            _said(module),
        )
        if key not in self._known:
            self._known[key] = measure(module, layouts, Recipe(self.half, None, trained, entered))
        measured = self._known[key]
        return Item(
            measured, names, (made * len(measured.outputs))[: len(measured.outputs)], parameter_bytes(module, trained)
        )

    def head(self, *, trained: bool = False, analytic: bool = True) -> Item:
        """The head with the loss behind it."""
        piece = self.outlined.plain[-1]
        names = input_names(piece, len(self.outlined.plain) - 1)
        target = self.outlined.target
        loss = Loss(piece.module, target, analytic=analytic and not trained)
        chosen = blocks.trainable_names(piece.module, "block") if trained else set()
        extra = (LABELS, adaln.Z, adaln.SIGMA) if target is not None else ()
        state = self._state(self.outlined.count) if not trained else self.layouts[names[0]]
        layouts = [state, *(self.layouts[name] for name in (*names[1:], *extra))]
        recipe = Recipe(self.half, None, frozenset(f"head.{name}" for name in chosen), frozenset([0]))
        key = ("loss", trained, analytic, tuple(layouts))
        if key not in self._known:
            self._known[key] = measure(loss, layouts, recipe)
        return Item(self._known[key], names + extra, ("loss",), parameter_bytes(piece.module, chosen))

    def original(self, k: int) -> Item:
        """Stem (k = 0) or a unit of the original in training end to end."""
        piece = self.outlined.plain[k]
        names = input_names(piece, k)
        trained = blocks.trainable_names(piece.module, "block")
        recipe = Recipe(self.half, None, frozenset(trained), frozenset([0]) if k else frozenset())
        return Item(
            self._measure(piece, names, recipe), names, output_names(piece, k), parameter_bytes(piece.module, trained)
        )


class Framed(nn.Module):
    """A piece whose factors are given as its last inputs."""

    def __init__(self, module: fx.GraphModule, given: Given | None) -> None:
        super().__init__()
        self.module, self._given = module, (given,)

    def forward(self, *inputs: torch.Tensor) -> Any:
        (given,) = self._given
        if given is None:
            return self.module(*inputs)
        count = len(given.factors)
        given.made = inputs[len(inputs) - count :]
        try:
            return self.module(*inputs[: len(inputs) - count])
        finally:
            given.made = ()


class Loss(nn.Module):
    """The head, and the loss of its first output: cross-entropy of each row (with the evidence of z), of each position, or a mean square."""

    def __init__(self, head: fx.GraphModule, target: Target | None, *, analytic: bool) -> None:
        super().__init__()
        self.head, self.target, self.analytic = head, target, analytic and target is not None and not target.positions
        if self.analytic and target is not None:
            self.register_buffer("table", torch.empty(target.classes, target.dim, device="meta"))

    def forward(self, stream: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if self.target is None:
            f = self.head(stream, *others)[0]
            return f.float().square().mean()
        *sides, labels, z, sigma = others
        f = self.head(stream, *sides)[0].float()
        if self.analytic:
            table: Any = self.table
            f = f + (z @ table.T - 0.5 * table.square().sum(-1)) / (sigma * sigma)[:, None]
        return F.cross_entropy(f.flatten(0, -2), labels.flatten(), reduction="none").sum()


STATE, FACTOR, LABELS = "state {}", "factor ", "labels"


def input_names(piece: GraphPiece, k: int) -> tuple[str, ...]:
    """Names of what enters piece k: ``state k - 1`` first (but for the stem), then side values."""
    names = [side_name(node) for node in piece.inputs]
    return tuple([STATE.format(k - 1), *names[1:]] if k else names)


def output_names(piece: GraphPiece, k: int) -> tuple[str, ...]:
    """Names of what leaves piece k: ``state k`` first, then side values."""
    return (STATE.format(k), *(side_name(node) for node in piece.outputs[1:]))


def side_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "placeholder" else f"side {node.name}"


def parameter_bytes(module: nn.Module, names: frozenset[str] | set[str]) -> int:
    """Bytes of those of a module's parameters, each once."""
    return sum(p.numel() * p.element_size() for name, p in module.named_parameters() if name in names)


def moves_statistics(module: fx.GraphModule) -> bool:
    """Whether a batch norm in it moves its statistics, so that it is not computed twice."""
    return any(
        "batch_norm" in str(n.target) and n.args[5] is True for n in module.graph.nodes if n.op == "call_function"
    )


def _apart(state: Layout) -> bool:
    """Whether :func:`blocks.differentiable` gives such a state a gradient."""
    return len(state.small.shape) > 3 and not state.small.contiguous


def _said(module: nn.Module) -> Any:
    return tuple(map(str, vars(module).get("layouts", ()))) + tuple(map(str, (b.shape for b in module.buffers())))
