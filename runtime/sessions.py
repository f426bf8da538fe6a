"""The graphs of one bundle, opened after their files were checked, with an account of the weights open at once.

Three ways a graph is open: its structure's session, which stays, fed with its weights, which stay for the time of a ``with`` block; a session of its own with its weights inside, for that time (a graph
without a structure), or for good (where all graphs fit in the budget).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusionblocks.runtime.ahead import Ahead, lies_in_cache, read_ahead
from diffusionblocks.runtime.engine import Engine
from diffusionblocks.runtime.errors import BadInput, BundleError
from diffusionblocks.runtime.files import FileRecord, checked_path
from diffusionblocks.runtime.graphs import checked_graph
from diffusionblocks.runtime.manifest import GraphRecord
from diffusionblocks.runtime.plan import Plan
from diffusionblocks.runtime.slots import Filled, Slots
from diffusionblocks.runtime.weights import Buffers, Held

KEPT = 16
"""Sessions of structures that stay open; the one that was used longest ago makes room."""
Values = Mapping[str, Any]


class OpenGraph:
    """One graph with its session; ``bytes`` of graph and weights; ``held``: the weights, where the session takes them as inputs.

    Raises:
        BundleError: the graph has other inputs or outputs than the manifest says.
    """

    def __init__(
        self, record: GraphRecord, engine: Engine, session: Any, size: int, held: Held | Filled | None = None
    ) -> None:
        self.record, self.bytes, self.users = record, size, 0
        self._engine, self._session, self._held = engine, session, held
        fed, weights = held is not None, {} if held is None else held.arrays
        names = {f"in.{k}" if fed else name: name for k, name in enumerate(record.inputs)}
        self._outputs = [f"out.{k}" if fed else name for k, name in enumerate(record.outputs)]
        inputs, outputs = ({v.name for v in values} for values in (session.get_inputs(), session.get_outputs()))
        if not inputs <= set(names) | set(weights) or not set(self._outputs) <= outputs:
            raise BundleError(
                f"{record.file} has the inputs {sorted(inputs)} and outputs {sorted(outputs)}; the manifest says "
                f"{list(record.inputs)} and {list(record.outputs)}.",
                hint="Export the bundle again.",
            )
        self._names = {own: name for own, name in names.items() if own in inputs}
        kinds = {tensor.input: tensor.dtype for tensor in record.tensors}
        self._weights = {name: engine.fed(weight, kinds[name]) for name, weight in weights.items() if name in inputs}

    def __call__(self, values: Values) -> dict[str, Any]:
        """Run on the named values; returns the outputs by name."""
        absent = sorted(name for name in self._names.values() if name not in values)
        if absent:
            raise BundleError(
                f"{self.record.file} reads {', '.join(absent)}, which no graph before it makes.",
                hint="Export the bundle again.",
            )
        feed = {own: values[name] for own, name in self._names.items()} | self._weights
        try:
            results = self._engine.run(self._session, self._outputs, feed)
        except Exception as error:
            raise BadInput(
                f"{self.record.file} failed: {' '.join(str(error).split())[:300]}",
                hint="If this is for lack of memory, run smaller batches.",
            ) from error
        return dict(zip(self.record.outputs, results, strict=True))

    def release(self) -> None:
        """Let go of the weights."""
        self._weights = {}
        if self._held is not None:
            self._held.release()


class Sessions:
    """The graphs of one bundle; ``peak`` is the largest sum of bytes that was open at once. Not for several threads at a time.

    Args:
        folder: the bundle.
        files: its manifest's.
        records: all its graphs.
        engine: makes and runs sessions.
        mapped: weights are mapped; otherwise they are read.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, FileRecord],
        records: Sequence[GraphRecord],
        engine: Engine,
        *,
        mapped: bool = True,
    ) -> None:
        self.folder, self.files, self.engine = folder, files, engine
        self.open_bytes = self.peak = 0
        self._buffers = None if mapped else Buffers()
        self._users = Counter(record.structure for record in records)
        self._slots = Slots(engine) if engine.bound else None
        self._ahead = Ahead(self._prepared)
        self._plan = Plan("one", prefetch=False)
        self._structures: OrderedDict[str, Any] = OrderedDict()
        self._open: dict[str, OpenGraph] = {}

    def size(self, record: GraphRecord) -> int:
        """Bytes of a graph and of the weights it reads (its weights file may hold another graph's as well)."""
        return self.files[record.file].bytes + record.bytes

    def begin(self, plan: Plan, records: Sequence[GraphRecord]) -> None:
        """Before a call that uses ``records``: what stayed open from earlier calls, and has no room beside them, is closed."""
        names = {record.file for record in records}
        beside = sum(graph.bytes for name, graph in self._open.items() if name not in names)
        if plan.resident != "all" or plan.weights + beside > plan.limit:
            self._forget()
        self._plan, self.peak = plan, self.open_bytes

    def close(self) -> None:
        """Close every session and end the thread that reads ahead."""
        self._ahead.close()
        self._forget()
        self._structures.clear()
        if self._slots is not None:
            self._slots.clear()

    def fits(self, *records: GraphRecord) -> bool:
        """Whether these graphs may be open together."""
        return sum(map(self.size, records)) <= self._plan.limit

    def next(self, *records: GraphRecord | None) -> None:
        """Say which graphs will be needed next, in order, so that the first one's weights are copied to the device meanwhile, or all of them read from the disk."""
        if not self._plan.prefetch:
            return
        for record in records[:1] if self._slots is not None else records:
            if record is None or record.file in self._open:
                continue
            if self._slots is not None or not all(lies_in_cache(self.folder / name) for name in record.weight_files):
                self._ahead.start(record)

    def run(self, record: GraphRecord, parts: Sequence[Values]) -> list[dict[str, Any]]:
        """A graph's outputs on each part of a batch."""
        with self.opened(record) as graph:
            return [graph(part) for part in parts]

    @contextmanager
    def opened(self, record: GraphRecord) -> Iterator[OpenGraph]:
        """A graph, for the time of the ``with`` block; inside of it opening it again costs nothing."""
        graph = self._open.get(record.file)
        if graph is None:
            graph = self._open[record.file] = self._opening(record)
        graph.users += 1
        try:
            yield graph
        finally:
            graph.users -= 1
            if graph.users == 0 and self._plan.resident != "all":
                self._shut(graph)

    def _opening(self, record: GraphRecord) -> OpenGraph:
        ready = self._ahead.wait(record)
        size = self.size(record)
        self.open_bytes += size
        self.peak = max(self.peak, self.open_bytes)
        try:
            for name in record.weight_files:  # a structure has constants in them as well
                checked_path(self.folder, name, self.files)
            if not self._fed(record):
                path = checked_graph(self.folder, record.file, self.files)
                session = self.engine.session(path, inside=record.structure is not None)
                return OpenGraph(record, self.engine, session, size)
            session = self._structure(str(record.structure))
            return OpenGraph(record, self.engine, session, size, ready or self._loaded(record))
        except BaseException:
            self.open_bytes -= size
            raise

    def _fed(self, record: GraphRecord) -> bool:
        return record.structure is not None and self._plan.resident != "all"

    def _prepared(self, record: GraphRecord) -> Held | Filled | None:
        """In the thread that reads ahead: the weights on the device, or only in the system's cache."""
        if self._slots is not None and self._fed(record):
            return self._loaded(record)
        read_ahead(self.folder, record, self.files)
        return None

    def _loaded(self, record: GraphRecord) -> Held | Filled:
        held = Held(self.folder, record, self.files, self._buffers)
        if self._slots is None:
            return held
        filled = self._slots.filled(record, held.arrays)
        held.release()
        return filled

    def _structure(self, name: str) -> Any:
        if name not in self._structures:
            path = checked_graph(self.folder, name, self.files)
            if len(self._structures) == KEPT:
                self._structures.popitem(last=False)
            self._structures[name] = self.engine.session(path, often=self._users[name] > 1)
        self._structures.move_to_end(name)
        return self._structures[name]

    def _shut(self, graph: OpenGraph) -> None:
        del self._open[graph.record.file]
        self.open_bytes -= graph.bytes
        graph.release()

    def _forget(self) -> None:
        self._ahead.drop()
        for graph in list(self._open.values()):
            self._shut(graph)
