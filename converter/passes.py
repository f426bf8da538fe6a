"""The passes of a network's pieces, each structure measured once: without gradients, and as training one block or all of the network runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusionblocks.converter import adaln, blocks
from diffusionblocks.converter.adapter import Adapter
from diffusionblocks.converter.capture import Captured
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.outline import Given, Outline, side_name, structure
from diffusionblocks.converter.targets import Target, Told
from diffusionblocks.converter.timeline import BATCHES, Layout, Pass, Recipe, Signature, measure
from torch import fx, nn
from torch.nn import functional as F

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Key = tuple[Any, ...]
Trained = Mapping[tuple[str, int], int]
"""Bytes of parameters, by whose copy of which they are."""


@dataclass(frozen=True, eq=False)
class Item:
    """One piece as it is run: its :class:`Pass`, what enters and leaves it by name, the parameters that are ``trained``, each with its bytes (which are those of its
    gradient), whether its inside is ``recomputed`` in the backward pass, and its ``factors``, each with its name among the inputs."""

    measured: Pass
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    trained: Trained
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
        self._units: dict[tuple[int, bool, bool, frozenset[str]], Item] = {}
        self._carried: dict[int, Item] = {}
        self._stems: dict[frozenset[str], tuple[GraphPiece, Item]] = {}
        self._chain: list[Layout] = []
        self._numbers: dict[tuple[Pass, int], tuple[int, int, int]] = {}
        self.layouts: dict[str, Layout] = {}
        for name, tensor in zip(captured.input_names, captured.example, strict=True):
            self.layouts[name] = Layout.dense(lambda n, t=tensor: (n, *t.shape[1:]), tensor.dtype)  # type: ignore[misc]
        self.inputs = tuple(captured.input_names)
        self.plain = [self._plain(k) for k in range(len(outlined.plain))]
        self._chain.append(self.layouts[STATE.format(0)])
        output = self.plain[-1].measured.outputs[0]
        self.layouts[TAUGHT] = Layout.dense(lambda n: (n, *output.small.shape[1:]), torch.float32)
        if outlined.target is not None:
            self.layouts |= _told(outlined.target, self.layouts[TAUGHT])

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
            {},
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

        return Layout.dense(lambda n: adaln.shape_of(factor, n), self.half or torch.float32)

    # -- in training ---------------------------------------------------------------------------------------------------------------

    def unit(self, k: int, *, first: bool, checkpointing: bool, graded: frozenset[str] = frozenset()) -> Item:
        """Unit k of a block in training: its first one, which reads a state without a gradient, or a later one; ``graded`` side values have one too."""
        key = (k, first, checkpointing, graded & set(input_names(self.outlined.conditioned[k], k + 1)))
        if key not in self._units:
            self._units[key] = self._unit(*key)
        return self._units[key]

    def _unit(self, k: int, first: bool, checkpointing: bool, graded: frozenset[str]) -> Item:
        piece = self.outlined.conditioned[k]
        names = input_names(piece, k + 1)
        trained = blocks.trainable_names(piece.module, self.outlined.settings.tune)
        state = self.layouts[names[0]] if first else self._state(k)
        entered = places_of(names, graded) | ({0} if not first or _apart(state) else set())
        recipe = Recipe(self.half, None, frozenset(trained), entered)
        measured = self._measure(piece, names, recipe, state)
        factors = _factors(piece, k)
        own = parameters(piece.module, trained)
        again = checkpointing and not moves_statistics(piece.module)
        return Item(measured, names + tuple(n for n, _ in factors), output_names(piece, k + 1), own, again, factors)

    def carried(self, k: int) -> Item:
        """Unit k with its conditioning, without gradients: one of a block before that which trains, in the context carry."""
        if k not in self._carried:
            piece = self.outlined.conditioned[k]
            names = input_names(piece, k + 1)
            measured = self._measure(piece, names, Recipe(self.half, None, recorded=False))
            factors = _factors(piece, k)
            made = output_names(piece, k + 1)
            self._carried[k] = Item(measured, names + tuple(n for n, _ in factors), made, {}, False, factors)
        return self._carried[k]

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
            measured, names, (made * len(measured.outputs))[: len(measured.outputs)], parameters(module, trained)
        )

    def head(
        self, *, trained: bool = False, taught: bool = False, clean: bool = False, graded: frozenset[str] = frozenset()
    ) -> Item:
        """The head with the loss of a block behind it; ``trained``: as the block's own, ``taught`` by the original's output, ``clean``: with the loss of f alone."""
        target = self.outlined.target
        extra = () if target is None else (LABELS, adaln.Z, adaln.SIGMA, *((TAUGHT,) if taught else ()))
        head = self.outlined.plain[-1].module
        loss = PlainLoss(head, target) if target is None else BlockLoss(head, target, clean)
        return self._ended(loss, extra, self._state(self.outlined.count), "own" if trained else None, graded)

    def plain_head(self, graded: frozenset[str] = frozenset()) -> Item:
        """The head with the loss of training end to end behind it."""
        target = self.outlined.target
        extra = () if target is None else (LABELS,)
        loss = PlainLoss(self.outlined.plain[-1].module, target)
        return self._ended(loss, extra, self.layouts[STATE.format(self.outlined.count)], "", graded)

    def _ended(
        self, loss: nn.Module, extra: tuple[str, ...], state: Layout, trained: str | None, graded: frozenset[str]
    ) -> Item:
        """``trained``: whose copy of the head, None where it is frozen."""
        piece = self.outlined.plain[-1]
        names = input_names(piece, len(self.outlined.plain) - 1)
        chosen = blocks.trainable_names(piece.module, "block") if trained is not None else set()
        layouts = [state, *(self.layouts[name] for name in (*names[1:], *extra))]
        entered = places_of(names, graded) | {0}
        recipe = Recipe(self.half, None, frozenset(f"head.{name}" for name in chosen), entered)
        key = (type(loss).__name__, trained is not None, tuple(layouts), entered)
        if key not in self._known:
            self._known[key] = measure(loss, layouts, recipe)
        return Item(self._known[key], names + extra, ("loss",), parameters(piece.module, chosen, trained or ""))

    def original(self, k: int, graded: frozenset[str] = frozenset()) -> Item:
        """Stem (k = 0) or a unit of the original, trained; ``graded`` side values have a gradient."""
        return self._trained(self.outlined.plain[k], k, graded)

    def own_stem(self, sides: frozenset[str]) -> tuple[GraphPiece, Item]:
        """A block's own stem, which makes these side values, and its pass."""
        if sides not in self._stems:
            piece = self.outlined.stem_of(sides)
            self._stems[sides] = piece, self._trained(piece, 0, frozenset(), "own")
        return self._stems[sides]

    def _trained(self, piece: GraphPiece, k: int, graded: frozenset[str], of: str = "") -> Item:
        names = input_names(piece, k)
        trained = blocks.trainable_names(piece.module, "block")
        entered = places_of(names, graded) | ({0} if k else set())
        recipe = Recipe(self.half, None, frozenset(trained), entered)
        own = parameters(piece.module, trained, of)
        return Item(self._measure(piece, names, recipe), names, output_names(piece, k), own)


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


class BlockLoss(nn.Module):
    """The head, and the target's loss of its first output; ``clean``: and of it without the evidence of z."""

    def __init__(self, head: fx.GraphModule, target: Target, clean: bool = False) -> None:
        super().__init__()
        self.head, self.target, self.clean = head, target, clean

    def forward(self, stream: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        sides = len(self.head.graph.find_nodes(op="placeholder")) - 1
        y, z, sigma, *taught = others[sides:]
        f = self.head(stream, *others[:sides])[0].float()
        losses = self.target.losses(Told(f, z, sigma, y, *taught), self.target.weight)
        if self.clean:
            losses = losses + self.target.clean_losses(f, y, taught[0] if taught else None)
        return losses.sum()


class PlainLoss(nn.Module):
    """The head, and what its first output is trained with end to end: cross-entropy of labels, or a mean square."""

    def __init__(self, head: fx.GraphModule, target: Target | None) -> None:
        super().__init__()
        self.head, self.target = head, target

    def forward(self, stream: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if self.target is None:
            return self.head(stream, *others)[0].float().square().mean()
        *sides, y = others
        f = self.head(stream, *sides)[0].float()
        if y.is_floating_point():
            return (f.flatten(1)[:, : y[0].numel()] - y.flatten(1)).square().mean()
        return F.cross_entropy(self.target.layout.last(f).flatten(0, -2), y.flatten())


STATE, FACTOR, LABELS, TAUGHT = "state {}", "factor ", "labels", "taught"


def _told(target: Target, output: Layout) -> dict[str, Layout]:
    """Layouts of what a target's loss is told beside the head's output: y, z and sigma."""
    made = []
    for k, n in enumerate(BATCHES):
        with torch.device("meta"):
            noise, sigma = torch.empty(n, *target.shape), torch.empty(n)
            f = torch.empty(output.at(k).shape)
            y = target.as_target(noise if target.denoiser is not None else target.decided(f))
            made.append([Signature.of(t) for t in (y, target.noisy(y, sigma, noise), sigma)])
    return {name: Layout(a, b) for name, a, b in zip((LABELS, adaln.Z, adaln.SIGMA), *made, strict=True)}


def _factors(piece: GraphPiece, k: int) -> tuple[tuple[str, adaln.Factor], ...]:
    """A conditioned unit's factors, each with its name among the inputs."""
    given = next((m for m in piece.module.modules() if isinstance(m, Given)), None)
    return tuple((f"{FACTOR}{k}.{i}", f) for i, f in enumerate(given.factors if given is not None else ()))


def places_of(names: Sequence[str], wanted: frozenset[str]) -> frozenset[int]:
    """The places of those of ``names`` that are wanted, of side values alone."""
    return frozenset(i for i, name in enumerate(names) if i and name in wanted)


def input_names(piece: GraphPiece, k: int) -> tuple[str, ...]:
    """Names of what enters piece k: ``state k - 1`` first (but for the stem), then side values."""
    names = [side_name(node) for node in piece.inputs]
    return tuple([STATE.format(k - 1), *names[1:]] if k else names)


def output_names(piece: GraphPiece, k: int) -> tuple[str, ...]:
    """Names of what leaves piece k: ``state k`` first, then side values."""
    return (STATE.format(k), *(side_name(node) for node in piece.outputs[1:]))


def parameters(module: nn.Module, names: frozenset[str] | set[str], of: str = "") -> Trained:
    """Those of a module's parameters, as ``of``'s copy of them."""
    return {(of, id(p)): p.numel() * p.element_size() for name, p in module.named_parameters() if name in names}


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
