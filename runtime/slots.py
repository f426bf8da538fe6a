"""Places for weights on a device: taken once, filled in place, and free again when a graph is closed. While one block computes the next one fills another, so there are two for each
structure that several blocks share."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from diffusionblocks.runtime.engine import Engine
from diffusionblocks.runtime.errors import DeviceError
from diffusionblocks.runtime.manifest import GraphRecord
from numpy.typing import NDArray


class Slots:
    """Memory for weights on the engine's device, by structure."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._free: dict[str | None, list[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self.made = 0

    def filled(self, record: GraphRecord, weights: Mapping[str, NDArray[Any]]) -> Filled:
        """Copy a graph's weights to the device.

        Raises:
            DeviceError: there is no room for them.
        """
        with self._lock:
            free = self._free.setdefault(record.structure, [])
            values = free.pop() if free else None
        try:
            if values is None:
                self.made += 1
                values = {t.input: self._engine.empty(t.shape, t.dtype) for t in record.tensors}
            for name, value in values.items():
                if weights[name].size:
                    value.update_inplace(weights[name])
        except Exception as error:
            raise DeviceError(
                f"The weights of {record.file} cannot be placed on {self._engine.device}: {' '.join(str(error).split())[:300]}",
                hint="If this is for lack of memory, convert with more blocks, or use --no-prefetch, which has one block there at a time.",
            ) from error
        return Filled(self, record.structure, values)

    def clear(self) -> None:
        """Give the memory of free places back."""
        with self._lock:
            self._free.clear()

    def give(self, structure: str | None, values: dict[str, Any]) -> None:
        """A place that is no longer read from."""
        with self._lock:
            self._free.setdefault(structure, []).append(values)


class Filled:
    """A graph's weights on the device, by input name (``arrays``), until :meth:`release`."""

    def __init__(self, slots: Slots, structure: str | None, values: dict[str, Any]) -> None:
        self._slots, self._structure, self.arrays = slots, structure, values

    def release(self) -> None:
        """Let go of the place."""
        self._slots.give(self._structure, self.arrays)
        self.arrays = {}
