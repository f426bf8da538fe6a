"""Denoising a target of labels or numbers: the blocks one after another, each in memory for all steps that are its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.cached import Caches, cached_of
from diffusionblocks.runtime.engine import as_array, as_float32
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import BlockRecord, GraphRecord, Manifest, TargetRecord
from diffusionblocks.runtime.sessions import Sessions
from numpy.typing import NDArray

if TYPE_CHECKING:
    from diffusionblocks.runtime.bundle import Callback

Floats = NDArray[np.float32]


@dataclass
class Part:
    """Some rows of the batch: their values by name, z, and what a ``carry`` block made for the next one."""

    values: dict[str, Any]
    z: Any
    carried: Any = None
    predictions: list[Floats] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(next(iter(self.values.values())))


class Predicting:
    """The sampler of one call; ``caches``: it computes new positions of a text only, by what is kept of those before."""

    def __init__(
        self, manifest: Manifest, target: TargetRecord, sessions: Sessions, caches: Caches | None = None
    ) -> None:
        self.manifest, self.target, self.sessions, self.caches = manifest, target, sessions, caches

    def records(self, plan: Sequence[schedule.Step]) -> list[GraphRecord]:
        """The graphs that a plan uses, each once."""
        return list({record.file: record for record, _ in self.passes(plan)}.values())

    def passes(self, plan: Sequence[schedule.Step]) -> list[tuple[GraphRecord, int]]:
        """The graphs of a plan in their order, and how often each runs; a graph comes again where it serves another block."""
        found: list[tuple[GraphRecord, int]] = []
        for index in _blocks(plan):
            block, steps = self.manifest.blocks[index], sum(step.block == index for step in plan)
            before = self._context(index)
            found += [(before, 1)] if before is not None else []
            found += [(_trained(block), steps), (block.head or self.manifest.head, steps), (self.target.graph, steps)]
        return found

    def run(
        self, parts: Sequence[Part], plan: Sequence[schedule.Step], until: float | None, callback: Callback | None
    ) -> list[Floats]:
        """The prediction of every step that was made, each [N, ...] over all parts; fewer than ``plan`` where every row's probability reached ``until``."""
        made: list[Floats] = []
        order = _blocks(plan)
        reached: NDArray[np.bool_] | None = None
        for k, index in enumerate(order):
            block = _trained(self.manifest.blocks[index])
            self._enter(index, parts, block)
            following = self._following(order[k + 1 :])
            head = self.manifest.blocks[index].head or self.manifest.head
            with ExitStack() as kept:
                kept.enter_context(self.sessions.opened(self._form(block)))
                self.sessions.next(None if following is None else self._form(following))
                if self.sessions.fits(*map(self._form, (block, head, self.target.graph))):
                    kept.enter_context(self.sessions.opened(self._form(head)))
                    kept.enter_context(self.sessions.opened(self._form(self.target.graph)))
                for step in (s for s in plan if s.block == index):
                    made.append(self._step(block, head, parts, step, len(made)))
                    if callback is not None:
                        callback(len(made) - 1, index, step.sigma, made[-1])
                    if until is not None:
                        sure = _sure(made[-1], self.target, until)
                        reached = sure if reached is None else reached | sure
                        if reached.all():
                            return made
        return made

    def _form(self, record: GraphRecord) -> GraphRecord:
        """The graph that is opened."""
        return record if self.caches is None else cached_of(record).graph

    def _ran(self, record: GraphRecord, feeds: Sequence[Mapping[str, Any]], place: Hashable) -> list[dict[str, Any]]:
        """A graph's outputs on every part; ``place``: the pass or step."""
        with self.sessions.opened(self._form(record)) as graph:
            if self.caches is None:
                return [graph(feed) for feed in feeds]
            own = cached_of(record)
            return [self.caches.run(graph, own, feed, (place, k)) for k, feed in enumerate(feeds)]

    def _step(
        self, block: GraphRecord, head: GraphRecord, parts: Sequence[Part], step: schedule.Step, number: int
    ) -> Floats:
        levels = [np.full(part.rows, step.sigma, np.float32) for part in parts]
        values = [{**part.values, "z": part.z, "sigma": sigma} for part, sigma in zip(parts, levels, strict=True)]
        outputs = self._ran(block, values, number)
        ends = self._ran(
            head,
            [{**part.values, "stream": out["stream_out"]} for part, out in zip(parts, outputs, strict=True)],
            number,
        )
        feeds = [
            {
                "z": part.z,
                "f": _float32(end[head.outputs[0]]),
                "sigma": sigma,
                "sigma_next": np.full(part.rows, step.sigma_next, np.float32),
            }
            for part, end, sigma in zip(parts, ends, levels, strict=True)
        ]
        predictions = []
        for part, out, result in zip(parts, outputs, self._ran(self.target.graph, feeds, number), strict=True):
            part.carried, part.z = out.get("stream_carry"), result["z_next"]
            predictions.append(as_array(result["prediction"]))
        return np.concatenate(predictions) if len(parts) > 1 else predictions[0]

    def _context(self, index: int) -> GraphRecord | None:
        """What makes a block's stream, or values beside it: the stem, or the original block before it."""
        block = self.manifest.blocks[index]
        if index == 0 or self.manifest.context == "stem":
            return block.stem or self.manifest.stem
        record = self.manifest.blocks[index - 1].context
        if self.manifest.context == "carry":
            return record if record is not None and len(record.outputs) > 1 else None
        if record is None:
            raise BadInput(f"The bundle holds no original weights of block {index - 1}.", hint="Export it again.")
        return record

    def _following(self, order: Sequence[int]) -> GraphRecord | None:
        """The graph that is opened first after a block, of those still to come."""
        return (self._context(order[0]) or self.manifest.blocks[order[0]].block) if order else None

    def _enter(self, index: int, parts: Sequence[Part], block: GraphRecord) -> None:
        """Bring every part's ``stream`` to what block ``index`` reads in this bundle's context."""
        record = self._context(index)
        if record is not None:
            with self.sessions.opened(self._form(record)):
                self.sessions.next(self._form(block))
                for part, outputs in zip(
                    parts, self._ran(record, [part.values for part in parts], ("context", index)), strict=True
                ):
                    part.values["stream"] = outputs.pop("stream_out")
                    part.values.update(outputs)
        if self.manifest.context == "carry" and index > 0:
            for part in parts:
                part.values["stream"] = part.carried


def _blocks(plan: Sequence[schedule.Step]) -> list[int]:
    return sorted({step.block for step in plan})


def _trained(block: BlockRecord) -> GraphRecord:
    if block.block is None:
        raise BadInput(f"The bundle holds no trained block {block.index}.", hint="Use --mode exact.")
    return block.block


def _float32(value: Any) -> Any:
    """Float32, without a copy from the device where it is that already."""
    on_device = not isinstance(value, np.ndarray) and value.data_type() == "tensor(float)"
    return value if on_device else as_float32(value)


def _sure(prediction: Floats, target: TargetRecord, until: float) -> NDArray[np.bool_]:
    """Rows whose every answer has at least the probability ``until``."""
    p = np.exp(prediction.astype(np.float64))
    sure = np.maximum(p, 1 - p).min(target.axis) if target.kind == "bits" else p.max(target.axis)
    return np.asarray(sure.reshape(len(sure), -1).min(1) >= until)


def combined(predictions: Sequence[Floats], target: TargetRecord, read: str, until: float | None) -> Floats:
    """The steps' predictions as one: the last, or the mean; with ``until``, of each row's steps up to the one that reached it."""
    if until is None:
        return predictions[-1] if read == "last" else _mean(np.stack(predictions), target)
    ends = np.full(len(predictions[0]), len(predictions) - 1)
    for k in reversed(range(len(predictions))):
        ends[_sure(predictions[k], target, until)] = k
    result = np.empty_like(predictions[0])
    for k in np.unique(ends):
        rows = ends == k
        taken = np.stack([p[rows] for p in predictions[: k + 1]])
        result[rows] = taken[-1] if read == "last" else _mean(taken, target)
    return result


def _mean(predictions: Floats, target: TargetRecord) -> Floats:
    """The steps' predictions [S, N, ...] as one [N, ...]: the mean of numbers or log-odds, the normalised mean of log-probabilities."""
    if target.kind == "features":
        return np.asarray(predictions.mean(axis=0))
    if target.kind == "bits":
        log = predictions.astype(np.float64)
        odds = (log - np.log(-np.expm1(np.minimum(log, -1e-12)))).mean(axis=0)
        return np.asarray(-np.logaddexp(0.0, -odds), np.float32)
    mean = predictions.mean(axis=0, dtype=np.float64)
    top = mean.max(target.axis, keepdims=True)
    return np.asarray(mean - np.log(np.exp(mean - top).sum(target.axis, keepdims=True)) - top, np.float32)


def averaged(draws: Sequence[Floats], target: TargetRecord) -> Floats:
    """The mean of draws: of numbers, or of probabilities; each [N, ...]."""
    if len(draws) == 1:
        return draws[0]
    if target.kind == "features":
        return np.asarray(np.stack(draws).mean(axis=0))
    logs = np.stack(draws)
    top = logs.max(axis=0)
    return np.asarray(top + np.log(np.exp(logs - top).mean(axis=0)), np.float32)
