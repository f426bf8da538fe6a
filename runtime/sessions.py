"""ONNX Runtime sessions of a bundle's graphs, opened after their files were checked, with an account of the weights open at once."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.errors import BadInput, BundleError
from diffusionblocks.runtime.files import FileRecord, checked_path
from diffusionblocks.runtime.manifest import GraphRecord

try:
    import onnxruntime as ort
except ImportError:
    ort = None

PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


@dataclass
class OpenGraph:
    """One graph with its session; ``bytes`` of graph and weights on disk."""

    record: GraphRecord
    session: Any
    bytes: int

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run on the named values; returns the outputs by name."""
        wanted = {i.name for i in self.session.get_inputs()}
        feed = {name: values[name] for name in self.record.inputs if name in wanted}
        try:
            results = self.session.run(list(self.record.outputs), feed)
        except Exception as error:
            raise BadInput(
                f"{self.record.file} failed: {' '.join(str(error).split())[:300]}",
                hint="If this is for lack of memory, run smaller batches.",
            ) from error
        return dict(zip(self.record.outputs, results, strict=True))


class Sessions:
    """Opens the graphs of one bundle; ``peak`` is the largest sum of bytes that was open at once."""

    def __init__(
        self, folder: Path, files: Mapping[str, FileRecord], *, device: str, threads: int | None, budget: int | None
    ) -> None:
        if device not in PROVIDERS:
            raise BadInput(f"The device {device!r} is not known.", hint="Use cpu or cuda.")
        self.folder, self.files, self.device, self.threads, self.budget = folder, files, device, threads, budget
        self.open_bytes = self.peak = 0
        if ort is None:
            raise BadInput(
                "onnxruntime is not installed.",
                hint='Install it: pip install "diffusionblocks[cpu]" or, for a GPU, pip install "diffusionblocks[gpu]".',
            )
        if device == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
            raise _no_cuda("this onnxruntime has no CUDA provider")

    def size(self, record: GraphRecord) -> int:
        """Bytes of a graph and of the weights it reads (its weights file may hold another graph's as well)."""
        return self.files[record.file].bytes + record.bytes

    def check_budget(self, records: Sequence[GraphRecord]) -> None:
        """Refuse a budget below the largest graph.

        Raises:
            BadInput: with the smallest budget that works.
        """
        largest = max(records, key=self.size)
        if self.budget is not None and self.size(largest) > self.budget:
            raise BadInput(
                f"The memory budget of {format_bytes(self.budget)} is below {largest.file}, the largest graph of this bundle.",
                hint=f"Give --memory-budget {self.size(largest)} ({format_bytes(self.size(largest))}) or more, or convert with more blocks.",
            )

    def fits(self, *records: GraphRecord) -> bool:
        """Whether these graphs may be open together."""
        return self.budget is None or sum(map(self.size, records)) <= self.budget

    @contextmanager
    def opened(self, record: GraphRecord) -> Iterator[OpenGraph]:
        """A graph's session, for the time of the ``with`` block."""
        path = checked_path(self.folder, record.file, self.files)
        for name in record.weight_files:
            checked_path(self.folder, name, self.files)
        size = self.size(record)
        self.open_bytes += size
        self.peak = max(self.peak, self.open_bytes)
        try:
            graph = OpenGraph(record, self._session(path), size)
            names = {i.name for i in graph.session.get_inputs()}, [o.name for o in graph.session.get_outputs()]
            if not names[0] <= set(record.inputs) or not set(record.outputs) <= set(names[1]):
                raise BundleError(
                    f"{record.file} has the inputs {sorted(names[0])} and outputs {names[1]}; the manifest says "
                    f"{list(record.inputs)} and {list(record.outputs)}.",
                    hint="Export the bundle again.",
                )
            yield graph
        finally:
            self.open_bytes -= size

    def _session(self, path: Path) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            session = ort.InferenceSession(str(path), options, providers=PROVIDERS[self.device])
        except Exception as error:
            raise BundleError(
                f"{path.name} cannot be opened by onnxruntime {ort.__version__}: {' '.join(str(error).split())[:300]}",
                hint="Export the bundle again, or upgrade onnxruntime.",
            ) from error
        if self.device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise _no_cuda(f"onnxruntime fell back to {session.get_providers()[0]}")
        return session


def _no_cuda(found: str) -> BadInput:
    installed = sorted(
        d.metadata["Name"]
        for d in importlib.metadata.distributions()
        if (d.metadata["Name"] or "").startswith("onnxruntime")
    )
    both = len(installed) > 1
    return BadInput(
        f"CUDA was asked for, but {found} (installed: {', '.join(installed) or 'nothing'}).",
        hint="onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then install one: "
        'pip uninstall -y onnxruntime onnxruntime-gpu; pip install "diffusionblocks[gpu]"'
        if both
        else 'Install it with: pip uninstall -y onnxruntime; pip install "diffusionblocks[gpu]" (CUDA 13), or use --device cpu.',
    )


def as_float32(array: Any) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(array, dtype=np.float32)
