"""Running a bundle: the network in the memory of one block.

>>> from diffusionblocks.runtime import open_bundle
>>> with open_bundle("model.dblocks", memory_budget="150MiB") as bundle:  # x: float32 [3, ...]
...     logits = bundle.run(x, mode="exact")  # the original network's output, [3, K]
...     log_probabilities = bundle.run(x, mode="denoise", steps=6)  # float32 [3, K]
>>> logits.shape == log_probabilities.shape
True
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.budget import parse_bytes
from diffusionblocks.runtime.denoising import SOLVERS, Denoising, Guidance
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.inputs import checked_inputs, checked_null
from diffusionblocks.runtime.manifest import GraphRecord, Manifest, TargetRecord
from diffusionblocks.runtime.sessions import OpenGraph, Sessions, as_float32
from numpy.typing import NDArray

Values = dict[str, Any]
Callback = Callable[[int, int, float, NDArray[np.float32]], None]


def open_bundle(
    path: str | Path, *, memory_budget: str | int | None = None, device: str = "cpu", threads: int | None = None
) -> Bundle:
    """Open a bundle; nothing but its manifest is read until it runs.

    Args:
        path: the folder ``dbconvert`` wrote.
        memory_budget: bytes, or text such as ``"256MiB"``: bounds the graphs and weights that are open at once.
        device: ``cpu`` or ``cuda`` (refused where onnxruntime would fall back to the CPU).
        threads: threads of one operator; onnxruntime's default where not given.

    Raises:
        BundleError: no bundle, or one that is damaged or of another format.
        BadInput: a budget below the largest graph (says the smallest that works), no such device.
    """
    folder = Path(path)
    manifest = manifests.read(folder)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    sessions = Sessions(folder, manifest.files, device=device, threads=threads, budget=budget)
    sessions.check_budget(manifest.graphs())
    return Bundle(folder, manifest, sessions)


class Bundle:
    """An opened bundle; made by :func:`open_bundle`. Safe to call from several threads (calls take turns)."""

    def __init__(self, folder: Path, manifest: Manifest, sessions: Sessions) -> None:
        self.folder, self.manifest, self._sessions = folder, manifest, sessions
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Refuse further runs."""
        self._closed = True

    @property
    def peak_weight_bytes(self) -> int:
        """The most bytes of graphs and weights that were open at once in the last run."""
        return self._sessions.peak

    def run(
        self,
        inputs: Any,
        mode: str | None = None,
        *,
        steps: int | None = None,
        start: str | None = None,
        read: str | None = None,
        seed: int = 0,
        average: int = 1,
        callback: Callback | None = None,
    ) -> NDArray[Any]:
        """Run the network on one batch.

        Args:
            inputs: array [N, ...] of the first input, or a dict by name.
            mode: ``exact`` (the original function) or ``denoise``; where not given, ``denoise`` if anything of the sampler is asked for
                (steps, start, read, average, callback), else the bundle's own default.
            steps: number of denoising steps, from 1.
            start: ``mean`` (z = 0) or ``noise`` (z = sigma_max eps, from ``seed``).
            read: the prediction of the ``last`` step, or the ``mean`` of the steps' predictions (of their log-probabilities).
            seed: seed of the noise; the same seed gives the same bits.
            average: number of noise draws whose predictions (their probabilities) are averaged.
            callback: called after each step with (step, block, sigma, prediction).

        Returns:
            In ``exact`` the network's first output; in ``denoise`` float32 of the first output's shape: log-probabilities of labels (log-softmax) or of yes (log-sigmoid)
            where each class has its own answer, and numbers where the target is numbers.

        Raises:
            BadInput: inputs that do not fit (says what was expected), a mode the bundle does not have.
            BundleError: a file is missing, truncated or altered.
        """
        sampling = callback is not None or average > 1 or any(v is not None for v in (steps, start, read))
        chosen = mode or ("denoise" if sampling else self.manifest.decoding.mode)
        if chosen == "exact":
            return np.asarray(next(iter(self.run_all(inputs).values())))
        if chosen != "denoise":
            raise BadInput(f"The mode {chosen!r} is not known.", hint="Use exact or denoise.")
        target = self._require_denoise()
        if target.denoiser is not None:
            raise BadInput(
                "This is a diffusion model: its input is the noise itself.",
                hint="Sample from it: Bundle.sample, or dbconvert run with its conditions as --input, or --count.",
            )
        decoding = self.manifest.decoding
        start, read = start or decoding.start, read or decoding.read
        if start not in ("mean", "noise") or read not in ("last", "mean"):
            raise BadInput(f"start={start!r}, read={read!r}.", hint="start is mean or noise, read is last or mean.")
        if average < 1 or (average > 1 and start == "mean"):
            raise BadInput(f"average={average} with start={start!r}.", hint="Averaging needs start=noise.")
        plan = schedule.sampling_steps(self.manifest.edges, decoding.steps if steps is None else steps)
        values = self._inputs(inputs)
        with self._lock:
            self._begin()
            draws = [self._denoise(target, values, plan, start, read, [seed, k], callback) for k in range(average)]
        if average == 1:
            return draws[0]
        return np.stack(draws).mean(axis=0) if target.kind == "features" else _log_mean_exp(np.stack(draws))

    def run_all(self, inputs: Any) -> dict[str, NDArray[Any]]:
        """All outputs by name, in the mode ``exact``: stem, original blocks, head, one open at a time."""
        if not self.manifest.exact:
            raise BadInput(
                "This bundle does not hold the original network (it was trained from scratch), so it has no mode exact.",
                hint="Use --mode denoise.",
            )
        values = self._inputs(inputs)
        with self._lock:
            self._begin()
            self._pass(self.manifest.stem, values)
            for block in self.manifest.blocks:
                self._context(block.index, values)
            with self._sessions.opened(self.manifest.head) as head:
                return head(values)

    def sample(
        self,
        conditions: Mapping[str, Any] | None = None,
        *,
        count: int | None = None,
        mode: str | None = None,
        steps: int | None = None,
        solver: str = "euler",
        guidance: float = 1.0,
        null: Mapping[str, Any] | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> NDArray[np.float32]:
        """Sample from a diffusion model.

        Args:
            conditions: what the network takes beside its noisy input and its time, such as classes or text embeddings, [N, ...] by name.
            count: how many to sample, N where there are no conditions.
            mode: ``denoise``, a block in memory for all steps that are its own, or ``exact``, the whole network at every step.
            steps: number of steps, from 1.
            solver: ``euler``, or ``heun`` with two evaluations a step.
            guidance: scale of classifier-free guidance, 1 for none.
            null: the conditions without a class or text, away from which guidance leads: [1, ...] or [N, ...] by name.
            seed: of the noise; the same seed gives the same bits.
            callback: called after each step with (step, block, sigma, D).

        Returns:
            D of the last step, float32 [N, ...] as the network's noisy input.

        Raises:
            BadInput: no diffusion model, conditions that do not fit, guidance without ``null``.
        """
        target, manifest = self.manifest.target, self.manifest
        if target is None or target.denoiser is None:
            raise BadInput("This is no diffusion model, so there is nothing to sample.", hint="Use run.")
        chosen = mode or manifest.decoding.mode
        if chosen not in ("exact", "denoise") or (chosen == "denoise" and not manifest.trained):
            raise BadInput(
                f"The mode {chosen!r} is not there{'' if chosen != 'denoise' else ': the blocks are not trained'}.",
                hint="Use --mode exact, or train the blocks.",
            )
        if solver not in SOLVERS:
            raise BadInput(f"The solver {solver!r} is not known.", hint=f"Use one of: {', '.join(SOLVERS)}.")
        own = target.denoiser
        specs = tuple(s for s in manifest.inputs if s.name not in (own.input, own.time))
        values = checked_inputs(specs, dict(conditions or {})) if specs else {}
        rows = len(next(iter(values.values()))) if values else count
        if rows is None or rows < 1 or (count is not None and count != rows):
            raise BadInput(
                f"{count} samples were asked for{f', with conditions for {rows}' if values else ''}.",
                hint="Give as many as there are rows of conditions, or count alone where the network takes none.",
            )
        guided = Guidance(guidance, checked_null(specs, null or {}, rows))
        if guidance != 1.0 and not guided.null:
            raise BadInput(
                "Guidance leads away from the network without a condition, and null says no such condition.",
                hint="Give null, such as class_labels=10 where 10 is the class of no class.",
            )
        plan = schedule.sampling_steps(manifest.edges, manifest.decoding.steps if steps is None else steps)
        with self._lock:
            self._begin()
            denoising = Denoising(manifest, self._sessions, values, guided, original=chosen == "exact")
            return denoising.run(rows, plan, seed, solver, callback)

    def _begin(self) -> None:
        if self._closed:
            raise BadInput("The bundle was closed.", hint="Open it again with open_bundle.")
        self._sessions.peak = self._sessions.open_bytes

    def _require_denoise(self) -> TargetRecord:
        if self.manifest.target is None:
            raise BadInput("This network has no target, so it has no mode denoise.", hint="Use --mode exact.")
        if not self.manifest.trained:
            raise BadInput(
                "The blocks of this bundle are not trained, so it has no mode denoise.",
                hint="Train them with `dbconvert train BUNDLE --data D`, or use --mode exact.",
            )
        return self.manifest.target

    def _pass(self, record: GraphRecord, values: Values) -> None:
        """Run a stem or context: its outputs join ``values``, the main one as ``stream``."""
        with self._sessions.opened(record) as graph:
            outputs = graph(values)
        values["stream"] = outputs.pop("stream_out")
        values.update(outputs)

    def _context(self, index: int, values: Values) -> None:
        record = self.manifest.blocks[index].context
        if record is None:
            raise BadInput(f"The bundle holds no original weights of block {index}.", hint="Use --mode denoise.")
        self._pass(record, values)

    def _denoise(
        self,
        target: TargetRecord,
        inputs: Values,
        plan: tuple[schedule.Step, ...],
        start: str,
        read: str,
        seed: list[int],
        callback: Callback | None,
    ) -> NDArray[np.float32]:
        values = dict(inputs)
        n = len(next(iter(values.values())))
        z = np.zeros((n, *target.shape), np.float32)
        if start == "noise":
            z = np.random.default_rng(seed).standard_normal((n, *target.shape), dtype=np.float32)
            z *= np.float32(self.manifest.edges[0])
        predictions: list[NDArray[np.float32]] = []
        carried: Any = None
        for index in sorted({step.block for step in plan}):
            self._enter(index, values, carried)
            record = self.manifest.blocks[index]
            if record.block is None:
                raise BadInput(f"The bundle holds no trained block {index}.", hint="Use --mode exact.")
            head_record = record.head or self.manifest.head
            with ExitStack() as kept, self._sessions.opened(record.block) as block:
                resident = self._sessions.fits(record.block, head_record, target.graph)
                head = kept.enter_context(self._sessions.opened(head_record)) if resident else None
                sampler = kept.enter_context(self._sessions.opened(target.graph)) if resident else None
                for step in (s for s in plan if s.block == index):
                    sigma = np.full(n, step.sigma, np.float32)
                    outputs = block({**values, "z": z, "sigma": sigma})
                    carried = outputs.get("stream_carry")
                    f = self._call(head, head_record, {**values, "stream": outputs["stream_out"]})[
                        head_record.outputs[0]
                    ]
                    feed = {
                        "z": z,
                        "f": as_float32(f),
                        "sigma": sigma,
                        "sigma_next": np.full(n, step.sigma_next, np.float32),
                    }
                    result = self._call(sampler, target.graph, feed)
                    z = result["z_next"]
                    predictions.append(result["prediction"])
                    if callback is not None:
                        callback(len(predictions) - 1, index, step.sigma, result["prediction"])
        return predictions[-1] if read == "last" else _combined(np.stack(predictions), target)

    def _call(self, graph: OpenGraph | None, record: GraphRecord, values: Values) -> dict[str, Any]:
        if graph is not None:
            return graph(values)
        with self._sessions.opened(record) as opened:
            return opened(values)

    def _enter(self, index: int, values: Values, carried: Any) -> None:
        """Bring ``values['stream']`` to what block ``index`` reads in this bundle's context."""
        context = self.manifest.context
        if index == 0 or context == "stem":
            self._pass(self.manifest.blocks[index].stem or self.manifest.stem, values)
            return
        record = self.manifest.blocks[index - 1].context
        if context == "frozen" or (record is not None and len(record.outputs) > 1):
            self._context(index - 1, values)
        if context == "carry":
            values["stream"] = carried

    def _inputs(self, inputs: Any) -> Values:
        return checked_inputs(self.manifest.inputs, inputs)


def _combined(predictions: NDArray[np.float32], target: TargetRecord) -> NDArray[np.float32]:
    """The steps' predictions [S, N, ...] as one [N, ...]: the mean of numbers or log-odds, the normalised mean of log-probabilities."""
    if target.kind == "features":
        return predictions.mean(axis=0)
    if target.kind == "bits":
        log = predictions.astype(np.float64)
        odds = (log - np.log(-np.expm1(np.minimum(log, -1e-12)))).mean(axis=0)
        return np.asarray(-np.logaddexp(0.0, -odds), np.float32)
    mean = predictions.mean(axis=0, dtype=np.float64)
    top = mean.max(target.axis, keepdims=True)
    return np.asarray(mean - np.log(np.exp(mean - top).sum(target.axis, keepdims=True)) - top, np.float32)


def _log_mean_exp(logs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log of the mean probability over the first axis; [S, N, K] -> [N, K]."""
    top = logs.max(axis=0)
    return np.asarray(top + np.log(np.exp(logs - top).mean(axis=0)), np.float32)
