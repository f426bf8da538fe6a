"""Bytes on the device while a block trains, while the whole network trains end to end, and while it runs; from shapes alone.

While block b trains these are alive: its weights (of its own stem and head too), Adam's two moments of what is trained, averages where they are kept, the frozen stem and head (and the target's
table), the batch; then, one after another, what each step of an update adds::

    teacher      targets teacher: one original block's weights (and stem and head, where a block has its own) and its forward pass without a gradient
    stem         the shared stem's forward pass without a gradient
    prefix       context frozen or carry: one earlier block's weights, with its conditioning in carry, and its forward pass without a gradient
    anchor       context carry: one original block's weights and its forward pass without a gradient
    forward      what autograd keeps of the block's own stem and the units so far, and the passing values of one unit
    head         what autograd keeps of the block, and head and loss forward and backward
    backward     what is kept of the units before, one unit's backward pass, gradients of those behind
    update       all gradients (AdamW is fused: nothing passes)

Ranks that share a block hold its gradients in buckets, all the time. With gradient checkpointing a unit keeps its inputs alone, and its backward pass begins with its forward pass (``recompute`` divides at the sums and not at the
forks, so that what it keeps of transitions between units differs from ``activations`` a little; the peak does not). ``peak`` is the largest of these. What torch takes
for itself (a CUDA context, workspaces of its libraries, the allocator's rounding) is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusionblocks.converter import adaln
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.outline import buffers_of, parameters_of, side_name
from diffusionblocks.converter.passes import FACTOR, LABELS, STATE, TAUGHT, Item, Passes
from diffusionblocks.runtime.errors import BadInput
from torch import nn


@dataclass(frozen=True)
class Bytes:
    """One block in training (units ``start`` to ``end``, left out), or the whole network: bytes of each kind and the ``peak``, which is in ``phase``.

    ``weights``: the block's own, frozen ones among them; ``resident``: frozen stem, head and table; ``passing``: the largest other block that
    passes through; ``average``: averaged weights; ``activations``: what autograd keeps of block, head and loss together.
    """

    start: int
    end: int
    weights: int
    resident: int
    passing: int
    gradients: int
    moments: int
    average: int
    data: int
    activations: int
    peak: int
    phase: str

    @property
    def learning(self) -> int:
        """Gradients, moments and averages."""
        return self.gradients + self.moments + self.average

    @property
    def state(self) -> int:
        """Weights, gradients, moments and averages."""
        return self.weights + self.learning


@dataclass(frozen=True)
class Running:
    """Bytes of running the original network: ``block`` with one block on the device at a time, ``whole`` with all."""

    block: int
    whole: int


class Footprint:
    """Bytes of one network in one precision, for any division and batch."""

    def __init__(
        self,
        passes: Passes,
        *,
        checkpointing: bool = False,
        ema: bool = False,
        taught: bool = False,
        clean: bool = False,
        ranks: int = 1,
    ) -> None:
        """
        Args:
            passes: the measured network.
            checkpointing: whether a unit's inside is computed again in the backward pass.
            ema: whether averaged weights are kept.
            taught: whether the original's output is the target.
            clean: whether there is a second loss of f alone.
            ranks: how many share a block.
        """
        self.passes, self.checkpointing, self.ema = passes, checkpointing, ema
        self.taught, self.clean, self.shared = taught, clean, ranks > 1
        self.outlined = passes.outlined
        settings, plain = self.outlined.settings, self.outlined.plain
        self.context, self.own_ends = settings.context, settings.ends == "own"
        self.own_head = self.own_ends or bool(settings.new_labels)
        self._ends = _bytes_of((plain[0], plain[-1]))
        shared = (*(() if self.own_ends else plain[:1]), *(() if self.own_head else plain[-1:]))
        self._resident = self._table() + _bytes_of(shared)
        self._early = {*passes.inputs, *passes.plain[0].outputs}
        self._beside = {side_name(node) for part in self.outlined.cuts.local for node in part.nodes}
        self._weights: dict[tuple[int, int], int] = {}

    def block(self, counts: Sequence[int], b: int, batch: int) -> Bytes:
        """Training block b of the division into ``counts`` units, on a batch of ``batch`` samples.

        Raises:
            BadInput: in the context stem it reads what earlier blocks make.
        """
        of = spans(counts)
        start, end = of[b]
        items, weights = self._items(start, end)
        trained = _trained(items)
        weights, trained, frozen = self._moved(counts, start, end, weights, trained)
        resident = self._resident + frozen
        average = trained if self.ema else 0
        anchored = self.context == "carry" and b < len(counts) - 1
        data = self._data(batch, b, end if anchored else None)
        base = weights + 2 * trained + average + resident + data + (trained if self.shared else 0)
        phases = {} if self.own_ends else {"stem": base + self._forward(0, batch)}
        passing = [0]

        def through(name: str, sizes: Iterable[tuple[int, int]], held: int = 0) -> None:
            for size, work in sizes:
                passing.append(size)
                phases[name] = max(phases.get(name, 0), base + held + size + work)

        originals = [(self._plain_bytes(a, e), max(self._forward(1 + k, batch) for k in range(a, e))) for a, e in of]
        if self.context == "frozen":
            through("prefix", originals[:b])
        if self.context == "carry":
            through("prefix", (self._carried(a, e, batch) for a, e in of[:b]))
        if anchored:
            through("anchor", originals[: b + 1])
        if self.taught:
            ends = self._ends if self.own_ends else 0
            held = self._state(start, batch) if self.context == "frozen" and b else 0
            around = [self._forward(k, batch) for k in (0, len(self.outlined.plain) - 1)]
            through("teacher", [(ends + size, work) for size, work in originals], held)
            through("teacher", [(ends, work) for work in around], held)
        ledger = _Ledger(self.passes, items, batch, buckets=self.shared)
        phases |= {name: base + extra for name, extra in ledger.phases().items()}
        phases["update"] = base + (0 if self.shared else trained)
        phase = max(phases, key=lambda name: phases[name])
        return Bytes(
            *(start, end, weights, resident, max(passing), trained, 2 * trained, average, data, ledger.kept),
            *(phases[phase], phase),
        )

    def whole(self, batch: int) -> Bytes:
        """Training the original network end to end on a batch of ``batch`` samples."""
        count, passes, plain = self.outlined.count, self.passes, self.outlined.plain
        stem = passes.original(0)
        graded, units = _graded(stem), list[Item]()
        for k in range(1, count + 1):
            units.append(replace(passes.original(k, graded), recomputed=self.checkpointing))
            graded |= _graded(units[-1])
        weights, data = _bytes_of(plain), self._inputs(batch, *([LABELS] if self.outlined.target is not None else []))
        items = [stem, *units, passes.plain_head(graded)]
        trained = _trained(items)
        average = trained if self.ema else 0
        base = weights + 2 * trained + average + data
        ledger = _Ledger(passes, items, batch)
        phases = {name: base + extra for name, extra in ledger.phases().items()} | {"update": base + trained}
        phase = max(phases, key=lambda name: phases[name])
        return Bytes(0, count, weights, 0, 0, trained, 2 * trained, average, data, ledger.kept, phases[phase], phase)

    def running(self, counts: Sequence[int], batch: int) -> Running:
        """Running the original on a batch, divided into blocks of ``counts`` units."""
        plain, stored = self.outlined.plain, self.passes.stored
        itemsize = None if stored is None else stored.itemsize
        peaks = [self._forward(k, batch) for k in range(len(plain))]
        bounds = [(0, 1), *((1 + a, 1 + e) for a, e in spans(counts)), (len(plain) - 1, len(plain))]
        block = max(_bytes_of(plain[a:e], itemsize) + max(peaks[a:e]) for a, e in bounds)
        data = self._inputs(batch)
        return Running(block + data, _bytes_of(plain, itemsize) + max(peaks) + data)

    def _items(self, start: int, end: int) -> tuple[list[Item], int]:
        """What a block's update runs, in order, and the bytes of the block's own weights."""
        passes, outlined, own = self.passes, self.outlined, self.own_ends
        entry = passes.adapter(0, start, trained_before=own) if self.context == "stem" else None
        readout = passes.adapter(end, outlined.count, trained_before=True)
        conditioner = passes.conditioner(start, end)
        stem, stem_bytes = self._own_stem(start, end, start if entry is None else 0) if own else ([], 0)
        graded, units = _graded(*stem), list[Item]()
        for k in range(start, end):
            first = k == start and entry is None and not own
            units.append(passes.unit(k, first=first, checkpointing=self.checkpointing, graded=graded))
            graded |= _graded(units[-1])
        if self.context == "stem":
            self._check_sides(units, start)
        added = [a for a in (conditioner, entry, readout) if a is not None]
        weights = self._own_bytes(start, end) + stem_bytes + (_bytes_of(outlined.plain[-1:]) if self.own_head else 0)
        weights += sum(_module_bytes(module) for module, _ in added)
        before = [*stem] if conditioner is None else [*stem, replace(conditioner[1], recomputed=self.checkpointing)]
        before += [] if entry is None else [entry[1]]
        after = [] if readout is None else [readout[1]]
        head = passes.head(trained=self.own_head, taught=self.taught, clean=self.clean, graded=graded)
        return [*before, *units, *after, head], weights

    def _moved(self, counts: Sequence[int], start: int, end: int, weights: int, trained: int) -> tuple[int, int, int]:
        """Weights and trained parameters of a block, and what is frozen of the stem, where blocks divide layers: what such a layer reads beside the trunk was counted with its first unit,
        and is the stem's, or that of every block which reads it where they have stems of their own."""
        frozen = 0
        for part, parameters, size in self.outlined.divided(counts):
            held = start <= part.first < end
            wanted = self.own_ends and start <= part.last and part.first < end
            tuned = self.outlined.settings.tune == "block"
            weights += size * (wanted - held)
            trained += parameters * (wanted - (held and tuned))
            frozen += 0 if self.own_ends else size
        return weights, trained, frozen

    def _own_stem(self, start: int, end: int, leads: int) -> tuple[list[Item], int]:
        """A block's own stem, whose state enters unit ``leads``, and its weights' bytes."""
        pieces = (*self.outlined.conditioned[start:end], self.outlined.plain[-1])
        read = frozenset(side_name(n) for piece in pieces for n in piece.inputs[1:])
        piece, item = self.passes.own_stem(read & frozenset(self.passes.plain[0].outputs))
        return [replace(item, outputs=(STATE.format(leads), *item.outputs[1:]))], _bytes_of((piece,))

    def _own_bytes(self, start: int, end: int) -> int:
        return _bytes_of(self.outlined.conditioned[start:end])

    def _carried(self, start: int, end: int, batch: int) -> tuple[int, int]:
        """The weights of an earlier block with its conditioning, and its forward peak."""
        passes = self.passes
        conditioner, readout = (
            passes.conditioner(start, end),
            passes.adapter(end, self.outlined.count, trained_before=True),
        )
        added = [a for a in (conditioner, readout) if a is not None]
        weights = self._own_bytes(start, end) + sum(_module_bytes(module) for module, _ in added)
        units = [passes.carried(k) for k in range(start, end)]
        factors = sum(passes.factor(f).bytes.at(batch) for unit in units for _, f in unit.factors)
        works = [self._read(unit, batch) + passes.numbers(unit, batch)[1] for unit in units]
        works += [passes.numbers(item, batch)[1] for _, item in added]
        return weights, factors + max(works)

    def _check_sides(self, units: Sequence[Item], start: int) -> None:
        made = self._early | self._beside | {name for unit in units for name in unit.outputs}
        read = {name for unit in units for name in unit.inputs[1:] if name.startswith("side ")}
        if read - made:
            raise BadInput(
                f"Unit {start} needs {', '.join(sorted(read - made))} from an earlier block, which the context stem does not run.",
                hint="Use --context frozen.",
            )

    def _table(self) -> int:
        target = self.outlined.target
        return 0 if target is None else _module_bytes(target)

    def _data(self, batch: int, b: int = 0, anchor: int | None = None) -> int:
        """The model's inputs, z and sigma (in carry those of the ``b`` blocks before too), the targets, and the original's state at unit ``anchor``, which the block's own is held to."""
        target = self.outlined.target
        names: list[str] = []
        if target is not None:
            noisy = [adaln.Z, adaln.SIGMA]
            names += [LABELS, *noisy * (1 + (b if self.context == "carry" else 0))]
            names += [adaln.Z] if target.enters else []  # as the model takes it
            names += [TAUGHT] if self.taught else []
        return self._inputs(batch, *names) + (0 if anchor is None else self._state(anchor, batch))

    def _inputs(self, batch: int, *also: str) -> int:
        """The model's inputs, and other values."""
        return sum(self.passes.layouts[name].bytes.at(batch) for name in (*self.passes.inputs, *also))

    def _state(self, k: int, batch: int) -> int:
        """The original's state that enters unit k."""
        return self.passes.layouts[STATE.format(k)].bytes.at(batch)

    def _forward(self, k: int, batch: int) -> int:
        """The forward peak of a plain piece, with the values it reads."""
        item = self.passes.plain[k]
        return self._read(item, batch) + self.passes.numbers(item, batch)[1]

    def _read(self, item: Item, batch: int) -> int:
        """The values a piece reads, inputs of the model and factors left out."""
        left_out = {*self.passes.inputs, *(name for name, _ in item.factors)}
        return sum(self.passes.layouts[n].bytes.at(batch) for n in item.inputs if n not in left_out)

    def _plain_bytes(self, start: int, end: int) -> int:
        """The weights of an original block."""
        if (start, end) not in self._weights:
            self._weights[start, end] = _bytes_of(self.outlined.plain[1 + start : 1 + end])
        return self._weights[start, end]


class _Ledger:
    """What autograd keeps of items that are run one after another, at one batch, and what passes meanwhile."""

    def __init__(self, passes: Passes, items: Sequence[Item], batch: int, *, buckets: bool = False) -> None:
        """``buckets``: gradients are counted elsewhere."""
        self.passes, self.items, self.batch, self.buckets = passes, items, batch, buckets
        self._made = {n: of for i in items for n, of in zip(i.outputs, i.measured.outputs, strict=True)}
        self.entering: list[int] = []
        self.between: list[int] = []
        self.inside: list[int] = []
        counted: set[str] = set()
        values = inside = 0
        for item in items:
            places = range(len(item.inputs)) if item.recomputed else item.measured.kept_inputs
            entering = {item.inputs[k] for k in places}
            leaving = {item.outputs[k] for k in item.measured.kept_outputs if not item.recomputed}
            values += sum(self._value(name) for name in entering - counted) + self._factors(item, entering)
            self.entering.append(values)
            counted |= entering
            values += sum(self._value(name) for name in leaving - counted)
            counted |= leaving
            inside += 0 if item.recomputed else passes.numbers(item, batch)[0]
            self.between.append(values)
            self.inside.append(inside)

    @property
    def kept(self) -> int:
        """All that autograd keeps at the end of the forward pass."""
        return self.between[-1] + self.inside[-1]

    def phases(self) -> dict[str, int]:
        """The most bytes beside what is always there, in the forward pass, at the head, and in the backward pass."""
        forward, backward, behind = [], [], dict[tuple[str, int], int]()
        for k in reversed(range(len(self.items))):
            item = self.items[k]
            _, there, back = self.passes.numbers(item, self.batch)
            before = self.between[k - 1] + self.inside[k - 1] if k else 0
            forward.append(before + self._value(item.inputs[0]) + there)
            inside = self.inside[k - 1] if k else 0
            backward.append(
                self.entering[k] + inside + sum(behind.values()) + (max(there, back) if item.recomputed else back)
            )
            behind |= {} if self.buckets else item.trained
        return {
            "forward": max(forward[1:], default=0),
            "head": max(forward[0], backward[0]),
            "backward": max(backward[1:], default=0),
        }

    def _value(self, name: str) -> int:
        """Bytes of a value that passes between items; none for what is counted elsewhere: data, and factors."""
        if name in self.passes.inputs or name in (adaln.Z, adaln.SIGMA, LABELS, TAUGHT) or name.startswith(FACTOR):
            return 0
        return (self._made.get(name) or self.passes.layouts[name]).bytes.at(self.batch)

    def _factors(self, item: Item, names: Iterable[str]) -> int:
        """Bytes of a unit's factors that are kept: those of one layout lie in one tensor."""
        kept = {factor.layout for name, factor in item.factors if name in set(names)}
        return sum(self.passes.factor(f).bytes.at(self.batch) for _, f in item.factors if f.layout in kept)


def spans(counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Start and end of each of the blocks of ``counts`` units."""
    starts = [sum(counts[:b]) for b in range(len(counts))]
    return tuple((start, start + count) for start, count in zip(starts, counts, strict=True))


def _graded(*items: Item) -> frozenset[str]:
    """The values that items make with a gradient."""
    return frozenset(item.outputs[k] for item in items for k in item.measured.graded)


def _trained(items: Iterable[Item]) -> int:
    """Bytes of all parameters that items train, each once."""
    return sum({key: size for item in items for key, size in item.trained.items()}.values())


def _module_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _bytes_of(pieces: tuple[GraphPiece, ...], itemsize: int | None = None) -> int:
    """Bytes of the parameters and buffers that pieces read, each once; those of floating point with ``itemsize`` bytes a number, where it is given."""
    held: list[torch.Tensor] = [*parameters_of(pieces).values(), *buffers_of(pieces).values()]
    return sum(t.numel() * (itemsize if itemsize and t.is_floating_point() else t.element_size()) for t in held)
