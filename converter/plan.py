"""What fits a given memory: the number of blocks, the batch and the precision, from the architecture alone.

Memory falls as blocks become more and rises with the batch, so for every precision the batch is doubled while some division fits, and the fewest
blocks that fit there are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from diffusionblocks.converter.footprint import Bytes, Footprint, Running
from diffusionblocks.converter.outline import Outline, outline, parameters_of
from diffusionblocks.converter.page import counted
from diffusionblocks.converter.passes import Passes
from diffusionblocks.converter.settings import BLOCKS, Settings
from diffusionblocks.converter.train_options import PRECISIONS, TARGETS
from diffusionblocks.converter.weightless import Weightless, load_weightless
from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.errors import BadInput
from torch import nn
from torch.export import ExportedProgram

MOST = 1024
"""The largest batch that is tried where none is given."""


@dataclass(frozen=True)
class Division:
    """A network in ``blocks`` blocks of ``counts`` units, trained at a batch and a precision: ``largest`` is the block that needs most; ``fits`` the memory or not."""

    blocks: int
    counts: tuple[int, ...]
    batch: int
    precision: str
    largest: Bytes
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What fits ``memory`` bytes.

    ``recommended``: the fewest blocks that fit at the given batch, or at the largest; ``per_block``: its blocks one by one; ``divisions``: others
    at its batch and precision; ``end_to_end``: the original network trained whole at the same; ``running``: bytes of running it, by the type of its
    weights; ``notes``: what the numbers leave out or assume.
    """

    model: str
    memory: int
    task: str
    context: str
    tune: str
    ends: str
    new_labels: int
    recurrent: bool
    targets: str
    clean: float
    checkpointing: bool
    ema: bool
    ranks: int
    units: int
    parameters: int
    recommended: Division
    per_block: tuple[Bytes, ...]
    divisions: tuple[Division, ...]
    end_to_end: Bytes
    running: Mapping[str, Running]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One object of numbers and names; all sizes in bytes."""
        return asdict(replace(self, running=dict(self.running)))


def plan(
    model: str | nn.Module | ExportedProgram,
    memory: int,
    *,
    batch: int | None = None,
    task: str = "auto",
    context: str = "auto",
    tune: str = "block",
    ends: str = "auto",
    new_labels: int = 0,
    recurrent: bool = False,
    targets: str = "labels",
    clean: float = 0.0,
    precision: str | None = None,
    num_blocks: int | None = None,
    split: str = "units",
    checkpointing: bool = False,
    ema: bool = False,
    ranks: int = 1,
    input_shape: Sequence[int] | None = None,
    example: Mapping[str, torch.Tensor] | None = None,
    **loading: Any,
) -> Plan:
    """Plan the training and running of a model in ``memory`` bytes.

    Args:
        model: a path or spec, or a module.
        memory: bytes of the device.
        batch: samples of an update on the device; the largest power of two that fits (at most :data:`MOST`) where it is None.
        task, context, tune, ends, new_labels, recurrent: as for a conversion (:class:`Settings`). A task ``auto`` that ends in no row of logits is taken for ``lm`` where the network makes logits of tokens, else
            for ``features``. Training from scratch is planned by the context ``stem`` and the ends ``own``.
        targets: ``labels``, or ``teacher``, for which the original network is run too.
        clean: weight of a second loss, on f alone.
        precision: of the products; float32 and bf16 are both tried where it is None.
        num_blocks: B; the fewest that fit where it is None.
        split: what is equal in blocks, units or parameters.
        checkpointing: units compute their inside again in the backward pass.
        ema: averaged weights are kept.
        ranks: how many share a block, each with ``batch`` samples.
        input_shape, example, loading: see :func:`weightless.load_weightless`.

    Raises:
        BadInput: nothing fits (says the smallest memory that works), or the model cannot be captured.
    """
    if precision is not None and precision not in PRECISIONS:
        raise BadInput(f"precision is {precision!r}.", hint=f"Use one of: {', '.join(PRECISIONS)}.")
    if targets not in TARGETS:
        raise BadInput(f"targets is {targets!r}.", hint=f"Use one of: {', '.join(TARGETS)}.")
    for name, number in (("batch", batch), ("number of ranks", ranks)):
        if number is not None and number < 1:
            raise BadInput(f"The {name} is {number}.", hint="Give 1 or more.")
    mask_token = 0 if task == "mdm" else -1  # which one makes no difference here
    settings = Settings(
        num_blocks=num_blocks or BLOCKS,
        task=task,
        context=context,
        tune=tune,
        ends=ends,
        new_labels=new_labels,
        recurrent=recurrent,
        mask_token=mask_token,
    )
    settings.check_targets(targets)
    loaded = load_weightless(model, input_shape=input_shape, example=example, **loading)
    outlined = outline(loaded.captured, settings)
    options = {
        "checkpointing": checkpointing,
        "ema": ema,
        "taught": targets == "teacher",
        "clean": clean > 0,
        "ranks": ranks,
    }
    chosen = settings.num_blocks if recurrent else num_blocks
    search = _Search(loaded, outlined, memory, split, chosen, options)
    best = search.best(batch, (precision,) if precision else PRECISIONS[:2])
    footprint = search.footprint(best.precision)
    return Plan(
        model=loaded.name,
        memory=memory,
        task=outlined.settings.task,
        context=outlined.settings.context,
        tune=tune,
        ends=outlined.settings.ends,
        new_labels=new_labels,
        recurrent=recurrent,
        targets=targets,
        clean=clean,
        checkpointing=checkpointing,
        ema=ema,
        ranks=ranks,
        units=outlined.count,
        parameters=sum(p.numel() for p in parameters_of(outlined.plain).values()),
        recommended=best,
        per_block=tuple(footprint.block(best.counts, b, best.batch) for b in range(best.blocks)),
        divisions=tuple(search.around(best)),
        end_to_end=footprint.whole(best.batch),
        running=_running(loaded, outlined, footprint, best),
        notes=tuple(_notes(loaded, outlined, task)),
    )


class _Search:
    """Divisions of one network and what they need."""

    def __init__(
        self,
        loaded: Weightless,
        outlined: Outline,
        memory: int,
        split: str,
        num_blocks: int | None,
        options: Mapping[str, Any],
    ) -> None:
        self.loaded, self.outlined, self.memory, self.split, self.options = loaded, outlined, memory, split, options
        every = range(1, 2 if outlined.loop is not None else outlined.count + 1)
        self.choices = every if num_blocks is None else [num_blocks]
        self.most = every[-1]
        self._footprints: dict[str, Footprint] = {}
        self._divisions: dict[tuple[int, int, str], Division] = {}

    def footprint(self, precision: str) -> Footprint:
        if precision not in self._footprints:
            passes = Passes(self.loaded.captured, self.outlined, precision)
            self._footprints[precision] = Footprint(passes, **self.options)
        return self._footprints[precision]

    def division(self, blocks: int, batch: int, precision: str) -> Division:
        """What ``blocks`` blocks need.

        Raises:
            BadInput: there are fewer units, or the context cannot serve a block.
        """
        key = (blocks, batch, precision)
        if key not in self._divisions:
            counts = self.outlined.counts(blocks, self.split)
            footprint = self.footprint(precision)
            largest = max((footprint.block(counts, b, batch) for b in range(blocks)), key=lambda found: found.peak)
            self._divisions[key] = Division(blocks, counts, batch, precision, largest, largest.peak <= self.memory)
        return self._divisions[key]

    def best(self, batch: int | None, precisions: Sequence[str]) -> Division:
        """The fewest blocks that fit at the given or the largest batch, in the first precision where that is equal.

        Raises:
            BadInput: none fits.
        """
        found = [d for d in (self._fitting(batch, p) for p in precisions) if d is not None]
        if found:
            return min(found, key=lambda d: (-d.batch, d.blocks))
        raise self._refusal(batch or 1, precisions)

    def _fitting(self, batch: int | None, precision: str) -> Division | None:
        best, fewest = None, 0
        tried = [batch] if batch is not None else [1 << k for k in range(MOST.bit_length())]
        for n in tried:
            fitting = next((d for d in self._from(fewest, n, precision) if d.fits), None)
            if fitting is None:
                break
            best, fewest = fitting, self.choices.index(fitting.blocks)
        return best

    def _from(self, first: int, batch: int, precision: str) -> Iterator[Division]:
        """Divisions into more and more blocks, but for those that the context cannot serve."""
        refused: BadInput | None = None
        served = False
        for blocks in self.choices[first:]:
            try:
                found = self.division(blocks, batch, precision)
            except BadInput as error:
                refused = error
                continue
            served = True
            yield found
        if refused is not None and not served:
            raise refused

    def _refusal(self, batch: int, precisions: Sequence[str]) -> BadInput:
        """That nothing fits, and the smallest memory that works."""
        every = [d for precision in precisions for d in self._from(0, batch, precision)]
        least = min(every, key=lambda d: d.largest.peak)
        ways = [] if self.options["checkpointing"] else ["--checkpointing"]
        target, settings = self.outlined.target, self.outlined.settings
        ways += ["--tune adaln"] if settings.tune != "adaln" and not (target is not None and target.enters) else []
        ways += ["a smaller --batch"] if batch > 1 else []
        more = f" Or try {', '.join(ways)}." if ways else ""
        return BadInput(
            f"No division of {self.loaded.name} trains in {format_bytes(self.memory)} at a batch of {batch}.",
            hint=f"The smallest memory that works is {format_bytes(least.largest.peak)} ({least.largest.peak} bytes): {counted(least.blocks, 'block')} in "
            f"{least.precision}, most of it in the phase {least.largest.phase}.{more}",
        )

    def around(self, best: Division) -> Iterator[Division]:
        """Divisions to show: powers of two, and those beside the best."""
        wanted = {1 << k for k in range(self.most.bit_length())}
        wanted |= {best.blocks - 1, best.blocks, best.blocks + 1, self.most}
        for blocks in sorted(b for b in wanted if 1 <= b <= self.most):
            try:
                yield self.division(blocks, best.batch, best.precision)
            except BadInput:
                continue


def _running(loaded: Weightless, outlined: Outline, footprint: Footprint, best: Division) -> dict[str, Running]:
    full = footprint if footprint.passes.half is None else Footprint(Passes(loaded.captured, outlined))
    found = {"float32": full.running(best.counts, best.batch)}
    try:
        half = Footprint(Passes(loaded.captured, outlined, stored=torch.float16))
        found["float16"] = half.running(best.counts, best.batch)
    except RuntimeError:  # the network computes in one type with constants of another
        pass
    return found


def _notes(loaded: Weightless, outlined: Outline, task: str) -> Iterator[str]:
    yield "Not counted: a CUDA context, workspaces of its libraries, and what the allocator rounds up."
    if loaded.note is not None:
        yield loaded.note
    if outlined.target is None:
        yield "The first output is nothing a block can denoise: planned without conditioning, for a mean square."
    elif outlined.settings.task != task:
        what = "logits of tokens" if outlined.settings.task == "lm" else "no row of logits"
        yield f"The first output is {what}: planned for --task {outlined.settings.task}."
