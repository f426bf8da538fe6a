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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.budget import parse_bytes
from diffusionblocks.runtime.cached import bytes_kept, cached_of
from diffusionblocks.runtime.continuing import Continuing, exact_chain
from diffusionblocks.runtime.denoising import SOLVERS, Denoising, Guidance
from diffusionblocks.runtime.engine import Engine
from diffusionblocks.runtime.entering import blocks_of
from diffusionblocks.runtime.errors import BadInput, ClosedError
from diffusionblocks.runtime.hub import local_folder
from diffusionblocks.runtime.inputs import checked_inputs, checked_null
from diffusionblocks.runtime.manifest import BlockRecord, GraphRecord, Manifest, TargetRecord
from diffusionblocks.runtime.parts import bounds, joined, split
from diffusionblocks.runtime.plan import ALLOCATED, Load, Plan, plan
from diffusionblocks.runtime.predicting import Part, Predicting, averaged, combined
from diffusionblocks.runtime.sessions import Sessions
from diffusionblocks.runtime.unmasking import Unmasking
from numpy.typing import NDArray

Values = dict[str, Any]
AHEAD = 2
"""Graphs that are read from the disk ahead of the one that computes."""
Callback = Callable[[int, int, float, NDArray[np.float32]], None]


def open_bundle(
    path: str | Path,
    *,
    memory_budget: str | int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    prefetch: bool | None = None,
    mapped: bool = True,
    alone: bool = False,
) -> Bundle:
    """Open a bundle; nothing but its manifest is read until it runs.

    Args:
        path: the folder ``dbconvert`` wrote, or ``hf:ORG/NAME[@REVISION]`` of a Hugging Face Hub.
        memory_budget: bytes, or text such as ``"256MiB"``, for weights and the values computed from them. It decides what stays in memory: every block (faster, since
            ONNX Runtime then rearranges the weights once), or one at a time; and how many rows of a batch run together. Without it one block at a time, and the whole batch.
        device: ``cpu`` or ``cuda`` (refused where onnxruntime would fall back to the CPU).
        threads: threads of one operator; the machine's physical cores where not given.
        prefetch: whether the next block is read from the disk (on a GPU: copied to it) while one computes; where not given, if the budget has room for two.
        mapped: weights are mapped from their files; otherwise they are read, which is slower and survives a file that is cut off meanwhile.
        alone: nothing else in this process uses onnxruntime. All sessions then compute with the same threads, which is faster; sessions with threads of their own are refused by onnxruntime
            from then on.

    Raises:
        BundleError: no bundle, or one that is damaged or of another format.
        BudgetError: a budget below the largest graph (says the smallest that works).
        DeviceError: no such device.
    """
    folder = local_folder(path)
    manifest = manifests.read(folder)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    engine = Engine(device, threads=threads, limit=budget, alone=alone)
    sessions = Sessions(folder, manifest.files, (*manifest.graphs(), *manifest.cached_graphs()), engine, mapped=mapped)
    bundle = Bundle(folder, manifest, sessions, budget=budget, prefetch=prefetch)
    bundle.plan(manifest.graphs())
    return bundle


class Bundle:
    """An opened bundle; made by :func:`open_bundle`. Safe to call from several threads (calls take turns)."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        sessions: Sessions,
        *,
        budget: int | None = None,
        prefetch: bool | None = None,
    ) -> None:
        self.folder, self.manifest, self._sessions = folder, manifest, sessions
        self._budget, self._prefetch = budget, prefetch
        self._lock = threading.Lock()
        self._closed = False
        self.last_plan: Plan | None = None
        self.last_steps = 0

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of sessions, weights and threads, and refuse further runs; waits for a run that is under way."""
        with self._lock:
            self._closed = True
            self._sessions.close()

    def plan(self, records: Sequence[GraphRecord], together: Sequence[GraphRecord] = ()) -> Plan:
        """What is in memory while these graphs run, ``together`` beside each of them.

        Raises:
            BadInput: the budget is below the largest of them.
        """
        size = self._sessions.size
        loads = [Load(record.file, size(record), ALLOCATED * record.row_bytes) for record in records]
        split = all(spec.shape[:1] == ("batch",) for spec in self.manifest.outputs)
        beside = sum(map(size, together))
        return plan(loads, self._budget, together=beside, prefetch=self._prefetch, split=split)

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
        until: float | None = None,
        callback: Callback | None = None,
    ) -> NDArray[Any]:
        """Run the network on one batch.

        Args:
            inputs: array [N, ...] of the first input, or a dict by name.
            mode: ``exact`` (the original function) or ``denoise``; where not given, ``denoise`` if anything of the sampler is asked for
                (steps, start, read, average, until, callback), else the bundle's own default.
            steps: number of denoising steps, from 1.
            start: ``mean`` (z = 0) or ``noise`` (z = sigma_max eps, from ``seed``).
            read: the prediction of the ``last`` step, or the ``mean`` of the steps' predictions (of their log-probabilities).
            seed: seed of the noise; the same seed gives the same bits.
            average: number of noise draws whose predictions (their probabilities) are averaged.
            until: stop at the step where every row has a class of this probability; a row's prediction is that of the step where it had.
            callback: called after each step with (step, block, sigma, prediction), the mean over the draws.

        Returns:
            In ``exact`` the network's first output; in ``denoise`` float32 of the first output's shape: log-probabilities of labels (log-softmax) or of yes (log-sigmoid)
            where each class has its own answer, and numbers where the target is numbers.

        Raises:
            BadInput: inputs that do not fit (says what was expected), a mode the bundle does not have.
            BundleError: a file is missing, truncated or altered.
        """
        sampling = callback is not None or average > 1 or any(v is not None for v in (steps, start, read, until))
        chosen = mode or ("denoise" if sampling else self.manifest.decoding.mode)
        if chosen == "exact":
            return np.asarray(next(iter(self.run_all(inputs).values())))
        if chosen != "denoise":
            raise BadInput(f"The mode {chosen!r} is not known.", hint="Use exact or denoise.")
        target = self._require_denoise()
        if target.masking is not None:
            return self._filled_in(inputs, sampling and mode != "exact")
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
        if until is not None and (target.kind == "features" or not 0 < until <= 1):
            raise BadInput(f"until={until!r}.", hint="It is a probability above 0 and at most 1, of labels.")
        planned = schedule.sampling_steps(self.manifest.edges, decoding.steps if steps is None else steps)
        values = checked_inputs(self.manifest.inputs, inputs)
        with self._lock:
            self._require_open()
            predicting = Predicting(self.manifest, target, self._sessions)
            head = self.manifest.head
            made = self._begin(predicting.records(planned), (head, target.graph))
            parts = [
                Part(part, z)
                for k in range(average)
                for part, z in self._with_z(values, target, start, [seed, k], made.rows)
            ]
            told = None if callback is None else _of_draws(callback, average, target)
            predictions = predicting.run(parts, planned, until, told)
            self.last_steps = len(predictions)
        draws = np.split(combined(predictions, target, read, until), average)
        return averaged(draws, target)

    def run_all(self, inputs: Any) -> dict[str, NDArray[Any]]:
        """All outputs by name, in the mode ``exact``: stem, original blocks, head, one open at a time."""
        if not self.manifest.exact:
            raise BadInput(
                "This bundle does not hold the original network (it was trained from scratch), so it has no mode exact.",
                hint="Use --mode denoise.",
            )
        values = checked_inputs(self.manifest.inputs, inputs)
        blocks = [self._original(block) for block in self.manifest.blocks]
        chain = [self.manifest.stem, *blocks, self.manifest.head]
        with self._lock:
            self._require_open()
            parts = split(values, self._begin(chain).rows)
            for k, record in enumerate(chain):
                with self._sessions.opened(record) as graph:
                    self._sessions.next(*chain[k + 1 : k + 1 + AHEAD])
                    for i, part in enumerate(parts):
                        outputs = graph(part)
                        if record is self.manifest.head:
                            parts[i] = outputs
                        else:
                            part["stream"] = outputs.pop("stream_out")
                            part.update(outputs)
        return joined(parts)

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
        self._require_mode(chosen)
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
        planned = schedule.sampling_steps(manifest.edges, manifest.decoding.steps if steps is None else steps)
        with self._lock:
            self._require_open()
            denoising = Denoising(manifest, self._sessions, values, guided, original=chosen == "exact")
            made = self._begin(denoising.records(blocks_of(planned)), (manifest.stem, manifest.head, target.graph))
            return denoising.run(rows, planned, seed, solver, callback, made.rows)

    @contextmanager
    def unmasking(self, inputs: Any, mode: str | None = None) -> Iterator[tuple[Unmasking, int | None]]:
        """What fills in the hidden tokens of a masked language model's inputs, with the bundle taken for it meanwhile; and how many rows it may compute together.

        :func:`infilling.fill` and :func:`infilling.bound` are made of it.

        Raises:
            BadInput: no masked language model, a mode that is not there, inputs that do not fit.
        """
        target, manifest = self.manifest.target, self.manifest
        if target is None or target.masking is None:
            raise BadInput(
                f"This bundle is of the task {manifest.task}, not of a masked language model.",
                hint="Convert the model with --task mdm.",
            )
        chosen = mode or manifest.decoding.mode
        self._require_mode(chosen)
        values = checked_inputs(manifest.inputs, inputs)
        with self._lock:
            self._require_open()
            found = Unmasking(manifest, self._sessions, values, original=chosen == "exact")
            graphs = found.records([0] if chosen == "exact" else range(len(manifest.blocks)))
            made = self._begin(graphs, (manifest.stem, manifest.head, target.graph))
            yield found, made.rows

    @contextmanager
    def continuing(
        self, count: int, mode: str | None = None, *, steps: int | None = None, seed: int = 0
    ) -> Iterator[Continuing | None]:
        """The network on ``count`` texts that grow, with the bundle taken for it meanwhile; :func:`language.generate` is made of it.

        None where the bundle's graphs have no forms for new positions, or the memory budget has no room for what they keep.

        Raises:
            BadInput: no language model, or a mode that is not there.
        """
        manifest, target = self.manifest, self.manifest.target
        chosen = mode or manifest.decoding.mode
        self._require_mode(chosen)
        if target is None or manifest.stem.cached is None:
            yield None
            return
        plan = None
        if chosen == "denoise":
            plan = schedule.sampling_steps(manifest.edges, manifest.decoding.steps if steps is None else steps)
        with self._lock:
            self._require_open()
            passes = [(record, 1) for record in exact_chain(manifest)]
            if plan is not None:
                passes = Predicting(manifest, target, self._sessions).passes(plan)
            records = list({r.file: r for r in (cached_of(record).graph for record, _ in passes)}.values())
            together = [cached_of(record).graph for record in (manifest.head, target.graph)]
            made = self._begin(records, together if plan is not None else ())
            kept = bytes_kept(passes, manifest, count)
            if self._budget is not None and made.weights + kept > self._budget:
                found = None
            else:
                start = manifest.decoding.start
                found = Continuing(manifest, self._sessions, count, plan, made.rows, start=start, seed=seed)
                found.bytes = kept
            if found is not None:
                yield found
        if found is None:
            yield None

    def _filled_in(self, inputs: Any, sampling: bool) -> NDArray[np.float32]:
        if sampling:
            raise BadInput(
                "A masked language model's tokens are computed in one step each; its texts are sampled otherwise.",
                hint="Leave the sampler's options out, or use dbconvert generate (runtime.infilling.fill).",
            )
        with self.unmasking(inputs, "denoise") as (found, rows):
            return found.filled_in(rows)

    def _require_mode(self, chosen: str) -> None:
        missing = {"exact": not self.manifest.exact, "denoise": not self.manifest.trained}
        if missing.get(chosen, True):
            why = {
                "exact": ": the bundle does not hold the original network",
                "denoise": ": the blocks are not trained",
            }
            raise BadInput(
                f"The mode {chosen!r} is not there{why.get(chosen, '')}.",
                hint="Use the other --mode, or train the blocks." if chosen in why else "Use exact or denoise.",
            )

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("The bundle was closed.", hint="Open it again with open_bundle.")

    def _begin(self, records: Sequence[GraphRecord], together: Sequence[GraphRecord] = ()) -> Plan:
        self.last_plan, self.last_steps = self.plan(records, together), 0
        self._sessions.begin(self.last_plan, records)
        return self.last_plan

    def _require_denoise(self) -> TargetRecord:
        if self.manifest.target is None:
            raise BadInput("This network has no target, so it has no mode denoise.", hint="Use --mode exact.")
        if not self.manifest.trained:
            raise BadInput(
                "The blocks of this bundle are not trained, so it has no mode denoise.",
                hint="Train them with `dbconvert train BUNDLE --data D`, or use --mode exact.",
            )
        return self.manifest.target

    def _original(self, block: BlockRecord) -> GraphRecord:
        if block.context is None:
            raise BadInput(f"The bundle holds no original weights of block {block.index}.", hint="Use --mode denoise.")
        return block.context

    def _with_z(
        self, values: Values, target: TargetRecord, start: str, seed: list[int], rows: int | None
    ) -> list[tuple[Values, NDArray[np.float32]]]:
        """The batch in parts, each with its rows of z."""
        count = len(next(iter(values.values())))
        z = np.zeros((count, *target.shape), np.float32)
        if start == "noise":
            z = np.random.default_rng(seed).standard_normal((count, *target.shape), dtype=np.float32)
            z *= np.float32(self.manifest.edges[0])
        return list(zip(split(values, rows), (z[a:b] for a, b in bounds(count, rows)), strict=True))


def _of_draws(callback: Callback, average: int, target: TargetRecord) -> Callback:
    """The callback of a call, from predictions of all draws one after another."""

    def told(step: int, block: int, sigma: float, prediction: NDArray[np.float32]) -> None:
        callback(step, block, sigma, averaged(np.split(prediction, average), target))

    return told
