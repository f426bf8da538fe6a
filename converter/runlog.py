"""What a training reports while it runs: JSON lines in the run's folder, TensorBoard where it is asked for, bars on a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from diffusionblocks.converter.saved import import_package
from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.memory import peak_resident
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

EVERY = 1.0
"""Seconds between two lines on what is no terminal."""


class Bars:
    """A bar for each block on a terminal, and nothing elsewhere; called with (block, update, updates, loss[, bytes])."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.tasks = progress, dict[int, TaskID]()

    def __enter__(self) -> Bars:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, value, trace)

    def __call__(self, block: int, update: int, updates: int, loss: float, memory: int = 0) -> None:
        if block not in self.tasks:
            self.tasks[block] = self.progress.add_task("", total=updates)
        text = f"block {block}  loss {loss:.4f}" + (f"  {format_bytes(memory)}" if memory else "")
        self.progress.update(self.tasks[block], completed=update, description=text)


def bars(console: Console) -> Bars:
    """Progress of blocks in training: what is done, the loss, the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    return Bars(Progress(*columns, console=console, disable=not console.is_terminal))


class RunLog:
    """A context manager; :meth:`step` and :meth:`validation` are what training calls.

    One line of ``log.jsonl`` holds ``time``, ``block``, ``update``, ``loss``, ``memory`` (bytes), or ``validation``.
    """

    def __init__(
        self, folder: Path, console: Console, device: torch.device, *, name: str = "log", tensorboard: bool = False
    ) -> None:
        self.path, self.console, self.device = folder / f"{name}.jsonl", console, device
        self.board: Any = None
        if tensorboard:
            import_package("tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard" / name))  # type: ignore[no-untyped-call]
        self.bars = bars(console)
        self._stack, self._said = ExitStack(), 0.0

    def __enter__(self) -> RunLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._stack.enter_context(self.path.open("a", encoding="utf-8"))
        self._stack.enter_context(self.bars)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.board is not None:
            self.board.close()
        self._stack.close()

    def step(self, block: int, update: int, updates: int, loss: float) -> None:
        memory = memory_in_use(self.device)
        self._write({"block": block, "update": update, "loss": loss, "memory": memory})
        if self.board is not None:
            self.board.add_scalar(f"block_{block:02d}/loss", loss, update)
            self.board.add_scalar(f"block_{block:02d}/memory", memory, update)
        self.bars(block, update, updates, loss, memory)
        if not self.console.is_terminal and (update == updates or time.monotonic() - self._said > 10 * EVERY):
            self._said = time.monotonic()
            self.console.print(f"block {block}  loss {loss:.4f}  {format_bytes(memory)}  update {update} of {updates}")

    def validation(self, block: int, update: int, found: dict[str, Any]) -> None:
        self._write({"block": block, "update": update, "validation": found})
        for what in ("alone", "chain", "original"):
            scores = found.get(what)
            if scores is None:
                continue
            if self.board is not None:
                for name, value in scores.items():
                    self.board.add_scalar(f"block_{block:02d}/{what}_{name}", value, update)
            self.console.print(f"block {block} at update {update}, {what}: {spoken(scores)}")

    def _write(self, what: dict[str, Any]) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), **what}) + "\n")
        self._file.flush()


def spoken(scores: Mapping[str, float]) -> str:
    """A target's figures of merit for a person."""
    if "accuracy" in scores:
        return f"{100 * scores['accuracy']:.1f} %, {scores['cross_entropy']:.4f} nats"
    if "loss" in scores:
        return f"loss {scores['loss']:.4f}"
    return f"{100 * scores['explained']:.1f} % of the variance, squared error {scores['squared_error']:.4f}"


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most a GPU has held, or what the process holds of the machine's memory now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    except OSError:
        return peak_resident() or 0
    import os

    return int(pages) * os.sysconf("SC_PAGE_SIZE")
