"""Commands in processes that are killed, or meet a full disk or a read error, at a place that is chosen; and what is left afterwards.

One process imports everything and forks for each command, so that a fault costs no start of Python. Places are counted by Python's audit events: a file opened for writing, renamed, removed, a
folder made or removed, below the folder of the job. A limit on the size of files stands for a full disk in the midst of a file, in native code as well.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JOBS = ("convert", "replace", "train")
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"}


@dataclass(frozen=True)
class Done:
    """How a command ended: exit code (minus the signal), what it said, the number of places where it changed (``writes``) or read (``reads``) files, seconds."""

    code: int
    said: str
    writes: int
    reads: int
    seconds: float


@dataclass(frozen=True)
class After:
    """What a fault left: the bundle ``whole``, ``absent`` or ``broken``; whether the rerun completed; hidden folders that stay beside the bundle after that.

    ``had``: there was one before, which must be whole (the older one or the new one).
    """

    had: bool
    killed: bool
    code: int
    said: str
    state: str
    again: bool
    litter: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return (
            self.state in (("whole",) if self.had else ("whole", "absent"))
            and self.again
            and not self.litter
            and "Traceback" not in self.said
        )


class Server:
    """The process that forks; ``folder`` is its own. Every job has a folder in it, with the bundle ``out.dblocks``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self, job: str, *, fresh: bool = True, **fault: Any) -> Done:
        """Run a job; ``fault``: ``kill``, ``full`` or ``unreadable`` with the number of the place, ``after`` seconds, or ``limit`` bytes of a file."""
        if fresh:
            prepared(self.folder, job)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"job": job, **fault}) + "\n")
        self.process.stdin.flush()
        return Done(**json.loads(self.process.stdout.readline()))

    def killed_and_again(self, job: str, **fault: Any) -> After:
        """Run a job with a fault, look at what is left, and run it again without one."""
        done = self.run(job, **fault)
        bundle = self.folder / job / "out.dblocks"
        state = state_of(bundle)
        again = True
        if done.code != 0:
            if job == "convert" and state == "whole":  # which it would refuse to write over
                shutil.rmtree(bundle)
            again = self.run(job, fresh=False).code == 0 and state_of(bundle) == "whole"
        litter = sorted(p.name for p in bundle.parent.iterdir() if p.name.startswith("."))
        litter += sorted(str(p.relative_to(bundle)) for p in bundle.rglob(".*"))
        return After(job != "convert", done.code == -signal.SIGKILL, done.code, done.said, state, again, litter)


def prepared(folder: Path, job: str) -> Path:
    """A job's folder as it was before anything ran; returns its bundle."""
    place = folder / job
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if job != "convert":
        shutil.copytree(folder / "model.dblocks", place / "out.dblocks")
    return place / "out.dblocks"


def state_of(bundle: Path) -> str:
    """``absent``, ``whole`` (every file has its size and hash, and none is more), or ``broken``."""
    from diffusionblocks.runtime import manifest as manifests
    from diffusionblocks.runtime.errors import BundleError
    from diffusionblocks.runtime.files import checked_path

    if not os.path.lexists(bundle):
        return "absent"
    try:
        files = manifests.read(bundle).files
        for name in files:
            checked_path(bundle, name, files, again=True)
    except BundleError:
        return "broken"
    there = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()} - {
        "manifest.json",
        "report.html",
    }
    return "whole" if {n for n in there if not n.startswith("train/run/")} == set(files) else "broken"


# The process that forks


def _serve(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import fuzzing
    import numpy as np

    if not (folder / "train.npz").exists():
        if not (folder / "model.dblocks").exists():
            fuzzing.make_seeds(folder)
        rows = np.random.default_rng(0)
        np.savez(folder / "train.npz", x=rows.standard_normal((40, 4)).astype(np.float32), y=rows.integers(0, 3, 40))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    graphs: dict[str, list[Any]] = {}
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        same = "convert" if told["job"] == "replace" else told["job"]  # they export the same graphs
        if same not in graphs:
            graphs[same] = _recorded(folder, same)
            prepared(folder, told["job"])
        print(json.dumps(_forked(folder, told, graphs[same])), file=out, flush=True)


def _arguments(folder: Path, job: str) -> list[str]:
    bundle = folder / job / "out.dblocks"
    if job == "train":
        return [
            "train",
            str(bundle),
            "--data",
            str(folder / "train.npz"),
            "--steps",
            "3",
            "--batch-size",
            "8",
            "--save-every",
            "1",
            "--threads",
            "1",
        ]
    return [str(folder / "model.pt2"), "--out", str(bundle), "--num-blocks", "2", *["--force"] * (job == "replace")]


def _recorded(folder: Path, job: str) -> list[Any]:
    """Run a job here, without onnxruntime, and keep the graphs that torch exports: they take most of the time and write nothing, so the children need not make them again."""
    from diffusionblocks.converter import exporting
    from diffusionblocks.converter.cli import main
    from diffusionblocks.export import graph, verify

    made: list[Any] = []
    before = graph._export, exporting.verify_bundle

    def export(*args: Any) -> Any:
        made.append(before[0](*args))
        return made[-1]

    graph._export, exporting.verify_bundle = export, lambda _: verify.VerifyReport(())
    place = prepared(folder, job)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            main(_arguments(folder, job))
    except SystemExit as end:
        if end.code:
            raise RuntimeError(said.getvalue()) from None
    finally:
        graph._export, exporting.verify_bundle = before
    assert place.exists()
    return made


def _forked(folder: Path, told: dict[str, Any], graphs: list[Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(folder, told, writing, iter(graphs))
    os.close(writing)
    with os.fdopen(reading) as file:
        lines = [json.loads(line) for line in file]
    _, status = os.waitpid(child, 0)
    said = lines[-1] if lines else {"said": "", "writes": 0, "reads": 0}
    return {"code": os.waitstatus_to_exitcode(status), **said, "seconds": time.perf_counter() - start}


def _child(folder: Path, told: dict[str, Any], writing: int, graphs: Iterator[Any]) -> None:
    from diffusionblocks.converter.cli import main
    from diffusionblocks.export import graph

    graph._export = lambda *_: next(graphs)
    said, code, counts = io.StringIO(), 70, {"writes": 0, "reads": 0}
    place = str(folder / told["job"]) + os.sep

    def audit(event: str, args: tuple[Any, ...]) -> None:
        kind = _kind(event, args, place)
        if kind is None:
            return
        counts[kind] += 1
        if kind == "writes" and counts[kind] == told.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "writes" and event in ("open", "os.mkdir") and counts[kind] >= told.get("full", 1 << 60):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[0])
        if kind == "reads" and counts[kind] == told.get("unreadable"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), args[0])

    try:
        if "limit" in told:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (told["limit"], told["limit"]))
        if "after" in told:
            threading.Timer(told["after"], lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        sys.addaudithook(audit)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            main(_arguments(folder, told["job"]))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 71
    except BaseException:
        import traceback

        said.write(traceback.format_exc())
    os.write(writing, json.dumps({"said": said.getvalue()[-3000:], **counts}).encode() + b"\n")
    os._exit(code)


def _kind(event: str, args: tuple[Any, ...], place: str) -> str | None:
    paths = (
        [os.path.abspath(os.fsdecode(a)) for a in args[:2] if isinstance(a, str | bytes)]
        if event == "open" or event in CHANGES
        else []
    )
    if not any((path + os.sep).startswith(place) for path in paths[: 2 if event == "os.rename" else 1]):
        return None
    if event in CHANGES:
        return "writes"
    mode, flags = args[1], args[2] or 0
    if isinstance(mode, str):
        return "writes" if any(letter in mode for letter in "wax+") else "reads"
    return "writes" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "reads"


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
