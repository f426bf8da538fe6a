"""Ways of running a bundle, compared in one run: each is a process of its own, and the processes take turns, in an order that alternates by round."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from diffusionblocks.converter.bench_cold import Cold
from diffusionblocks.converter.bench_process import Worker, WorkerFailed
from diffusionblocks.converter.data import read_arrays
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime.errors import BadInput, CheckFailed
from diffusionblocks.runtime.inputs import checked_inputs
from diffusionblocks.runtime.manifest import TensorSpec

ROWS = {
    "whole": "all blocks in one session of ONNX Runtime",
    "block": "this runtime, one block at a time",
    "resident": "this runtime, all blocks in memory",
    "sessions": "a session of ONNX Runtime per block",
    "torch": "PyTorch, the original model",
    "accelerate": "accelerate's offload to the disk, built in memory first",
}
OF_MODEL = ("torch", "accelerate")
COLD_RUNS = 3
Array = np.ndarray[Any, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is compared: see the options of ``dbconvert bench``; ``timeout`` are the seconds that one answer of a row may take."""

    bundle: Path
    rows: tuple[str, ...] = tuple(ROWS)
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    threads: int | None = None
    cold: bool = False
    input: Path | None = None
    model: str | None = None
    arch: str | None = None
    trust: tuple[str, ...] = ()
    allow_pickle: bool = False
    timeout: float = 600.0


@dataclass
class Row:
    """One way at one batch: median ``seconds`` of a run, ``ratio`` to the first row there is (median over the rounds), seconds of the first run with opening, peak
    bytes of resident memory above what the imports took, the largest ``difference`` of the output from that first row's relative to its largest magnitude, seconds
    of a run with nothing in the system's cache of files; or why it is ``missing``."""

    row: str
    batch: int
    seconds: float | None = None
    ratio: float | None = None
    first_seconds: float | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    cold_seconds: float | None = None
    missing: str | None = None


@dataclass
class Comparison:
    """The rows, in order of batch; ``read_seconds``: of reading all weights from the disk, one file after another; ``notes``: what the user must know."""

    rows: list[Row] = field(default_factory=list)
    read_seconds: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "read_seconds": self.read_seconds, "notes": self.notes}


def compare(request: Request, progress: Progress = lambda text: None) -> Comparison:
    """Run every row at every batch.

    Args:
        request: what is compared.
        progress: told what is done now.

    Raises:
        BadInput: the bundle does not hold the original network, or the inputs do not fit.
        BundleError: no bundle.
        CheckFailed: no row could be run.
    """
    manifest = manifests.read(request.bundle)
    if not manifest.exact:
        raise BadInput(
            "This bundle holds no original network (it was trained from scratch), so there is nothing to compare.",
            hint="bench compares the mode exact. Give a bundle that was converted without --scratch.",
        )
    given = None if request.input is None else checked_inputs(manifest.inputs, read_arrays(request.input))
    result = Comparison()
    cold = Cold(request.bundle, manifest) if request.cold else None
    for batch in request.batches:
        with tempfile.TemporaryDirectory(prefix="dbconvert-bench-") as scratch:
            inputs = given or random_inputs(manifest.inputs, batch)
            inputs = {name: value[np.arange(batch) % len(value)] for name, value in inputs.items()}
            np.savez(Path(scratch) / "inputs.npz", **inputs)
            result.rows += _Turns(request, batch, Path(scratch), cold, progress).rows()
    if cold is not None:
        result.read_seconds, result.notes = cold.read_seconds, cold.notes
    if all(row.missing for row in result.rows):
        reasons = "\n".join(sorted({f"{row.row}: {row.missing}" for row in result.rows}))
        raise CheckFailed("None of the rows could be run.", hint=reasons)
    return result


def random_inputs(specs: Sequence[TensorSpec], batch: int) -> dict[str, Array]:
    """Normal numbers; 0 and 1 where the type is of integers, but for a mask, which is ones.

    Raises:
        BadInput: a type NumPy does not have, a size that is not known.
    """
    generator, made = np.random.default_rng(0), {}
    for spec in specs:
        shape = (batch, *(size for size in spec.shape[1:] if isinstance(size, int)))
        if spec.dtype == "bfloat16" or len(shape) != len(spec.shape):
            raise BadInput(f"No random values for {spec.name}, {spec.dtype} {spec.shape}.", hint="Give --input FILE.")
        dtype = np.dtype(spec.dtype)
        if dtype.kind == "f":
            made[spec.name] = generator.standard_normal(shape).astype(dtype)
        elif dtype.kind == "b" or "mask" in spec.name:
            made[spec.name] = np.ones(shape, dtype)
        else:
            made[spec.name] = generator.integers(0, 2, shape).astype(dtype)
    return made


class _Turns:
    """The rows of one batch."""

    def __init__(self, request: Request, batch: int, scratch: Path, cold: Cold | None, progress: Progress) -> None:
        self.request, self.scratch, self.cold = request, scratch, cold
        self.progress, self.batch = progress, batch
        self.all = {name: Row(name, batch) for name in request.rows}
        self.workers: dict[str, Worker] = {}
        self.times: dict[str, list[float]] = {name: [] for name in request.rows}

    def rows(self) -> list[Row]:
        """Every row, measured; no process is left afterwards, whatever happens."""
        try:
            for name in self.all:
                self._start(name)
            for name in list(self.workers):
                self._ask(name, None)
            for name in list(self.workers):
                found = self._ask(name, "open")
                if found:
                    self.all[name].first_seconds = found["seconds"]
            self._compare_outputs()
            for k in range(self.request.rounds):
                for name in self._order(k):
                    found = self._ask(name, "run", f"round {k + 1} of {self.request.rounds}")
                    if found:
                        self.times[name].append(found["seconds"])
                        self.all[name].peak_bytes = found["peak"]
            if self.cold is not None and self.cold.possible:
                self._run_cold(self.cold)
        finally:
            for worker in self.workers.values():
                worker.end()
        self._summarise()
        return list(self.all.values())

    def _start(self, name: str) -> None:
        if name in OF_MODEL and self.request.model is None:
            self.all[name].missing = "give --model, the original model"
            return
        settings = settings_of(self.request, name, self.scratch)
        self.workers[name] = Worker(settings, self.scratch / f"{name}.log", self.request.timeout)

    def _order(self, k: int) -> list[str]:
        names = list(self.workers)
        return names if k % 2 == 0 else names[::-1]

    def _ask(self, name: str, told: str | None, what: str | None = None) -> dict[str, Any] | None:
        """A row's answer; None where it failed, which its ``missing`` says then."""
        self.progress(f"batch {self.batch}: {name}, {what or told or 'start'}")
        try:
            return self.workers[name].ask(told)
        except WorkerFailed as error:
            self.workers.pop(name).end()
            self.all[name] = Row(name, self.batch, missing=str(error))
            return None

    def _compare_outputs(self) -> None:
        """Set ``difference`` of each row; one whose output cannot be compared is missing."""
        outputs = {name: np.load(self.scratch / f"{name}.npy") for name in self.workers}
        first = next(iter(outputs.values()), None)
        for name, output in outputs.items():
            assert first is not None
            found = difference(first, output)
            if found is None:
                self.workers.pop(name).end()
                reason = f"its output, {output.dtype} {list(output.shape)}, is not comparable with {dict(enumerate(outputs))[0]}'s, {first.dtype} {list(first.shape)}"
                self.all[name] = Row(name, self.batch, missing=reason)
            else:
                self.all[name].difference = found

    def _run_cold(self, cold: Cold) -> None:
        """Runs with no file in the cache, when no process has one mapped."""
        names = [name for name in self.workers if name not in OF_MODEL]
        found: dict[str, list[float]] = {name: [] for name in names}
        for k in range(min(COLD_RUNS, self.request.rounds)):
            for name in names:
                if name in self.workers:
                    self._ask(name, "release")
            if not cold.read():
                return
            for name in [n for n in self._order(k) if n in names]:
                if not cold.drop():
                    return
                answer = self._ask(name, "cold", "with nothing in the cache")
                if answer:
                    found[name].append(answer["seconds"])
                    self._ask(name, "release")
        for name, seconds in found.items():
            if seconds and name in self.workers:
                self.all[name].cold_seconds = median(seconds)

    def _summarise(self) -> None:
        there = [name for name, row in self.all.items() if row.missing is None]
        for name in there:
            pairs = zip(self.times[name], self.times[there[0]], strict=True)
            self.all[name].seconds = median(self.times[name])
            self.all[name].ratio = median(own / base for own, base in pairs)


def settings_of(request: Request, row: str, scratch: Path) -> dict[str, Any]:
    """What a row's process is told when it starts."""
    kept = {k: getattr(request, k) for k in ("threads", "model", "arch", "trust", "allow_pickle")}
    paths = {"inputs": scratch / "inputs.npz", "output": scratch / f"{row}.npy", "scratch": scratch}
    told = kept | {"row": row, "bundle": str(request.bundle.resolve())} | {k: str(v) for k, v in paths.items()}
    return dict(json.loads(json.dumps(told)))


def difference(first: Array, other: Array) -> float | None:
    """The largest difference relative to the largest magnitude of ``first``; None where shapes or places without a number differ."""
    if first.shape != other.shape:
        return None
    a, b = (np.asarray(v, np.float64) for v in (first, other))
    finite = np.isfinite(a)
    if (finite != np.isfinite(b)).any():
        return None
    if not finite.any():
        return 0.0
    return float(np.abs(a - b)[finite].max() / (np.abs(a[finite]).max() or 1.0))
