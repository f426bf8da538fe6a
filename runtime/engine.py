"""ONNX Runtime itself: sessions with the options that serve blocks, on a CPU or a device, and values on it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.runtime.errors import BadInput, BundleError, DeviceError, FallbackError
from diffusionblocks.runtime.installing import install
from diffusionblocks.runtime.threads import cores
from numpy.typing import NDArray

try:
    import onnxruntime as ort
except ImportError:
    ort = None

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
BFLOAT16 = 16
"""ONNX's number of bfloat16, which NumPy does not have."""


class Engine:
    """Makes and runs sessions.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: threads of one operator; the physical cores where not given.
        limit: the most bytes that ONNX Runtime's own allocator takes on the device.
        bound: values stay where the session makes them (always so on a device).
        alone: nothing else in this process uses onnxruntime, so that all sessions may compute with the same threads.

    Raises:
        BadInput: onnxruntime is not installed.
        DeviceError: it has no such device.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        threads: int | None = None,
        limit: int | None = None,
        bound: bool = False,
        alone: bool = False,
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise DeviceError(f"The device {device!r} is not known.", hint="Use cpu or cuda.")
        if ort is None:
            raise BadInput(
                "onnxruntime is not installed.",
                hint=f"Install it: {install('cpu')} or, for a GPU, {install('gpu')}",
            )
        if device == "cuda" and CUDA not in ort.get_available_providers():
            raise _no_cuda(DeviceError, "this onnxruntime has no CUDA provider")
        self.device, self.limit, self.alone = device, limit, alone
        self.threads = cores() if threads is None else threads
        self.bound = bound or device != "cpu"

    def session(self, path: Path, *, often: bool = False, inside: bool = False) -> Any:
        """A session of one graph.

        Args:
            path: the graph.
            often: several blocks run by it, one after another: its threads wait for the next by spinning, and it keeps the memory of its intermediate values.
            inside: its weights are inside, transposed where torch holds them so: products take the transpose in, which is quicker than to carry it out once.

        Raises:
            BundleError: onnxruntime does not open it.
            FallbackError: it fell back to the CPU.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(often)))
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if _shared_arena():
            options.add_session_config_entry("session.use_env_allocators", "1")
        else:
            options.enable_cpu_mem_arena = often
        if self.alone and _shared_threads(self.threads):
            options.use_per_session_threads = False
        else:  # whose spinning ends with the run, or it takes the cores from the next session's
            options.add_session_config_entry("session.force_spinning_stop", "1")
            options.intra_op_num_threads = self.threads
        options.enable_mem_pattern = False  # a second block of memory beside what the first run took
        try:
            session = ort.InferenceSession(
                str(path), options, providers=self._providers(), disabled_optimizers=["ConstantFolding"] * inside
            )
        except Exception as error:
            raise BundleError(
                f"{path.name} cannot be opened by onnxruntime {ort.__version__}: {' '.join(str(error).split())[:300]}",
                hint="Export the bundle again, or upgrade onnxruntime.",
            ) from error
        if self.device == "cuda" and session.get_providers()[0] != CUDA:
            raise _no_cuda(FallbackError, f"onnxruntime fell back to {session.get_providers()[0]}")
        return session

    def run(self, session: Any, outputs: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        """A session's outputs: arrays, or values on the device."""
        if not self.bound:
            return list(session.run(outputs, feed))
        binding = session.io_binding()
        for name, value in feed.items():
            if isinstance(value, ort.OrtValue):
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in outputs:
            binding.bind_output(name, self.device)
        session.run_with_iobinding(binding)
        return list(binding.get_outputs())

    def fed(self, weight: Any, dtype: str) -> Any:
        """A weight as a session takes it: NumPy has no bfloat16, whose bits come as uint16."""
        if dtype != "bfloat16" or not isinstance(weight, np.ndarray):
            return weight
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(weight, BFLOAT16)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A value on the device, to be filled by ``update_inplace``."""
        kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, self.device, 0)

    def _providers(self) -> list[Any]:
        if self.device == "cpu":
            return [CPU]
        options: dict[str, Any] = {"arena_extend_strategy": "kSameAsRequested"}
        if self.limit is not None:
            options["gpu_mem_limit"] = self.limit
        return [(CUDA, options), CPU]


@cache
def _shared_threads(count: int) -> bool:
    """Have all sessions of the process compute with the same threads: onnxruntime then refuses sessions with threads of their own. False where it cannot, or has another number of them already."""
    try:
        ort.set_global_thread_pool_sizes(count, 1)
    except Exception:
        return False
    return True


@cache
def _shared_arena() -> bool:
    """Have all sessions that ask for it take memory on the CPU from one place, which is the process's: sessions with places of their own each keep what their largest run took.

    False where onnxruntime has no such place, or the process has one already.
    """
    try:
        where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(
            where, ort.OrtArenaCfg({"arena_extend_strategy": 1})
        )  # as much as is asked for
    except Exception:
        return False
    return True


def as_array(value: Any) -> NDArray[Any]:
    """An output as an array, copied from the device where it lies there."""
    return value if isinstance(value, np.ndarray) else np.asarray(value.numpy())


def as_float32(value: Any) -> NDArray[np.float32]:
    """An output as a contiguous float32 array."""
    return np.ascontiguousarray(as_array(value), dtype=np.float32)


def _no_cuda(kind: type[DeviceError], found: str) -> DeviceError:
    installed = sorted(
        d.metadata["Name"]
        for d in importlib.metadata.distributions()
        if (d.metadata["Name"] or "").startswith("onnxruntime")
    )
    both = len(installed) > 1
    return kind(
        f"CUDA was asked for, but {found} (installed: {', '.join(installed) or 'nothing'}).",
        hint="onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then install one: "
        f"pip uninstall -y onnxruntime onnxruntime-gpu; {install('gpu')}"
        if both
        else f"Install it with: pip uninstall -y onnxruntime; {install('gpu')} (CUDA 13), or use --device cpu.",
    )
