"""One way of running a bundle, in a process of its own: it does what it is told by lines on stdin, and answers each with a line of JSON.

``open`` opens and runs once and keeps the output, ``run`` runs, ``release`` closes what holds the bundle's files, ``cold`` opens what was released and runs.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.converter.data import read_arrays
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime.bundle import open_bundle
from diffusionblocks.runtime.errors import DiffusionBlocksError
from diffusionblocks.runtime.memory import peak_resident, restart_peak

EVERYTHING = 1 << 50
"""A memory budget that holds every block."""
Values = dict[str, Any]


class Way(ABC):
    """A way of running. Making it imports what it needs; ``settings`` are :func:`diffusionblocks.converter.bench.settings_of`'s."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.threads = settings, settings["threads"]
        self.folder = Path(settings["bundle"])
        self.manifest = manifests.read(self.folder)

    def open(self) -> None:  # noqa: B027
        """Open what stays open between runs; nothing, if nothing does."""

    @abstractmethod
    def run(self, inputs: Values) -> Any:
        """The network's first output, an array."""

    def release(self) -> None:  # noqa: B027
        """Close what keeps the bundle's files in memory; nothing, if nothing does."""


class Blocks(Way):
    """This runtime, a block at a time."""

    budget: int | None = None

    def open(self) -> None:
        self.bundle = open_bundle(self.folder, memory_budget=self.budget, threads=self.threads, alone=True)

    def run(self, inputs: Values) -> Any:
        return self.bundle.run(inputs, mode="exact")


class Resident(Blocks):
    """This runtime with all blocks in memory."""

    budget = EVERYTHING

    def release(self) -> None:
        self.bundle.close()


class Sessions(Way):
    """A session of ONNX Runtime for each graph, opened and closed at each."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.ort = importlib.import_module("onnxruntime")

    def options(self) -> Any:
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        return options

    def run(self, inputs: Values) -> Any:
        contexts = [block.context for block in self.manifest.blocks if block.context is not None]
        values = dict(inputs)
        for record in (self.manifest.stem, *contexts, self.manifest.head):
            path = str(self.folder / record.file)
            session = self.ort.InferenceSession(path, self.options(), providers=["CPUExecutionProvider"])
            feed = {v.name: values[v.name] for v in session.get_inputs()}
            made = dict(zip(record.outputs, session.run(list(record.outputs), feed), strict=True))
            del session
            if record is self.manifest.head:
                return made[record.outputs[0]]
            values["stream"] = made.pop("stream_out")
            values |= made
        raise AssertionError


class Whole(Sessions):
    """All of the network in one session."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        importlib.import_module("onnx")
        from diffusionblocks.export.whole import whole_graph

        self.join = whole_graph
        self.session: Any = None

    def open(self) -> None:
        options = self.options()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        graph = self.join(self.folder, self.manifest).SerializeToString()
        self.session = self.ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Values) -> Any:
        feed = {v.name: inputs[v.name] for v in self.session.get_inputs()}
        return self.session.run([self.manifest.outputs[0].name], feed)[0]

    def release(self) -> None:
        self.session = None
        gc.collect()


class Eager(Way):
    """PyTorch itself, the original model."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.torch = importlib.import_module("torch")
        if self.threads is not None:
            self.torch.set_num_threads(self.threads)
        from diffusionblocks.converter.load import load_model

        self.load = load_model
        package = settings["model"].partition(":")[0]
        with contextlib.suppress(ImportError, ValueError):  # what is wrong with it, load_model says
            if not Path(settings["model"]).exists():
                importlib.import_module(package)

    def open(self) -> None:
        chosen = {k: self.settings[k] for k in ("arch", "trust", "allow_pickle")}
        model: Any = self.load(self.settings["model"], **chosen).model
        self.model = model.eval() if isinstance(model, self.torch.nn.Module) else model.module()

    def run(self, inputs: Values) -> Any:
        tensors = {name: self.torch.from_numpy(value) for name, value in inputs.items()}
        with self.torch.no_grad():
            made = self.model(*tensors.values()) if len(tensors) == 1 else self.model(**tensors)
        leaves = self.torch.utils._pytree.tree_leaves(made)
        return next(v for v in leaves if isinstance(v, self.torch.Tensor)).numpy()


class Offloaded(Eager):
    """The original model with its weights on the disk, by Hugging Face's accelerate. It builds the model and writes the weights when it opens, which its peak of memory includes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.accelerate = importlib.import_module("accelerate")

    def open(self) -> None:
        super().open()
        folder = Path(self.settings["scratch"]) / "offload"
        self.accelerate.disk_offload(self.model, str(folder), offload_buffers=True)
        gc.collect()


WAYS: dict[str, Callable[[dict[str, Any]], Way]] = {
    "whole": Whole,
    "block": Blocks,
    "resident": Resident,
    "sessions": Sessions,
    "torch": Eager,
    "accelerate": Offloaded,
}


def settle() -> None:
    """Wait until no thread of this process computes: those of ONNX Runtime spin for a while after a run, which would slow the row whose turn is next."""
    for _ in range(100):
        before = time.process_time()
        time.sleep(0.02)
        if time.process_time() - before < 0.002:
            return


def reason_of(error: BaseException) -> str:
    """An error in a line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = error.message if isinstance(error, DiffusionBlocksError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


def serve(settings: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer lines of stdin until it ends or something fails."""
    way = WAYS[settings["row"]](settings)
    inputs = read_arrays(settings["inputs"])
    gc.collect()
    restart_peak()
    base = peak_resident()
    answer({"ready": True})
    released = False
    for line in sys.stdin:
        told = line.strip()
        if told == "release":
            way.release()
            gc.collect()
            released = type(way).release is not Way.release
            answer({})
            continue
        start = time.perf_counter()
        if told == "open" or released:
            way.open()
            released = False
        output = way.run(inputs)
        seconds = time.perf_counter() - start
        peak = peak_resident()
        if told == "open":
            np.save(settings["output"], output)
        settle()
        answer({"seconds": seconds, "peak": None if base is None or peak is None else max(0, peak - base)})
        del output


def main() -> None:
    """The process: its only argument is the settings as JSON. What libraries print goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        serve(json.loads(sys.argv[1]), answer)
    except BrokenPipeError:
        pass
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            answer({"failed": reason_of(error)})


if __name__ == "__main__":
    main()
