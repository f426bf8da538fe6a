"""The parent's side of a process that runs one row of ``dbconvert bench``."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


class WorkerFailed(Exception):
    """A row cannot be run, and why, in a line."""


class Worker:
    """A process of :mod:`diffusionblocks.converter.bench_worker`.

    Args:
        settings: what it is told when it starts.
        log: the file that gets what it prints.
        timeout: seconds that an answer may take.
    """

    def __init__(self, settings: dict[str, Any], log: Path, timeout: float) -> None:
        self.log, self.timeout = log, timeout
        self._lines: queue.Queue[str | None] = queue.Queue()
        command = [sys.executable, "-m", "diffusionblocks.converter.bench_worker", json.dumps(settings)]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, told: str | None) -> dict[str, Any]:
        """Tell the process something (None: nothing), and wait for its answer.

        Raises:
            WorkerFailed: it says that it failed, it ended, or it takes too long.
        """
        assert self._process.stdin is not None
        if told is not None:
            with contextlib.suppress(OSError):  # it has ended: the reader says so
                self._process.stdin.write(told + "\n")
                self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=self.timeout)
        except queue.Empty:
            raise WorkerFailed(f"no answer in {self.timeout:g} s (--timeout)") from None
        if line is None:
            raise WorkerFailed(self._ended())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise WorkerFailed(answer["failed"])
        return answer

    def _ended(self) -> str:
        self._process.kill()  # it has closed its output, so it is ending anyway
        code = self._process.wait()
        printed = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = f": {printed[-1].strip()[:200]}" if printed else ""
        memory = ", perhaps for lack of memory" if code == -9 and not last else ""
        return f"its process ended with code {code}{memory}{last}"

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._reader.join(timeout=5)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # what was not yet written to a process that is gone
                stream.close()
