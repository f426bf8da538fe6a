"""Every architecture of the zoo captured, cut, conditioned, trained for one step and exported: what is exact, and what is refused and why.

    python benchmarks/coverage.py run                      # all families; resumable, one process a model
    python benchmarks/coverage.py run --family own timm    # some of them
    python benchmarks/coverage.py run --match bert         # names that hold a text
    python benchmarks/coverage.py report                   # the table, as Markdown
    python benchmarks/coverage.py collect                  # all results into benchmarks/coverage.json

A model's result is one JSON file in benchmarks/.cache/coverage; what was collected is not measured again (remove its line to do so). A model that takes
too long or too much memory is stopped and counted as such.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import resource
import time
from collections.abc import Iterator
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from coverage_model import Result, one
from zoo import FAMILIES, entries
from zoo.entry import Entry

HERE = Path(__file__).parent
CACHE, COLLECTED = HERE / ".cache" / "coverage", HERE / "coverage.json"
COLUMNS = ("captured", "branches", "cut", "adaln", "gradients", "onnx")
TOLERANCE = 1e-4
PRELOADED = (
    "torch.onnx",
    "onnxscript",
    "onnxruntime",
    "diffusionblocks.converter",
    "diffusionblocks.export",
    "diffusionblocks.runtime",
    "torchvision",
    "timm",
    "transformers",
    "diffusers",
)


def use_torchvision() -> None:
    """Make torchvision importable beside a CPU build of torch, as the converter does."""
    from diffusionblocks.converter.vision import ensure_torchvision

    ensure_torchvision()


def path_of(entry: Entry) -> Path:
    return CACHE / f"{entry.name.replace('/', '--')}.json"


def results() -> dict[str, Result]:
    """Every result so far by name: the collected ones, and those measured since."""
    found: dict[str, Result] = json.loads(COLLECTED.read_text()) if COLLECTED.exists() else {}
    for path in CACHE.glob("*.json"):
        said = re.sub(r"/[^\s\"]*site-packages/", "", path.read_text())  # where it is installed says nothing of a model
        found[path.stem.replace("--", "/", 1)] = json.loads(said)
    return found


def collect() -> None:
    """Write all results into one file, a line each."""
    lines = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in sorted(results().items())]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    COLLECTED.write_text(text)


def run(chosen: list[Entry], seconds: int, gibibytes: int, jobs: int) -> None:
    """Every entry without a result, each in a process of its own, forked from this one, which has imported what all need."""
    CACHE.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    use_torchvision()
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            import_module(name)
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    known = results()
    waiting = [e for e in chosen if e.name not in known]
    running: list[Running] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Running(waiting.pop(0), gibibytes))
        time.sleep(0.05)
        for one_of in list(running):
            if one_of.ended(seconds):
                running.remove(one_of)


class Running:
    """One entry at work in a process of its own; its last line of stderr says why it crashed."""

    def __init__(self, entry: Entry, gibibytes: int) -> None:
        self.entry, self.started = entry, time.monotonic()
        self.path = path_of(entry)
        self.log, self.part = self.path.with_suffix(".log"), self.path.with_suffix(".part")
        self.process = get_context("fork").Process(target=_child, args=(entry, self.part, self.log, gibibytes << 30))
        self.process.start()

    def ended(self, seconds: int) -> bool:
        spent = time.monotonic() - self.started
        if self.process.exitcode is None and spent < seconds:
            return False
        result: Result
        if self.process.exitcode is None:
            self.process.kill()
            result = {"crash": f"stopped after {seconds} s"}
        elif self.process.exitcode == 0:
            result = json.loads(self.part.read_text())
        else:
            tail = (self.log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            result = {"crash": f"exit {self.process.exitcode}: {tail[:300]}"}
        self.process.join()
        result = {"known": self.entry.branches, **result, "seconds": round(spent, 1)}
        self.part.write_text(json.dumps(result))
        self.part.replace(self.path)
        if "crash" not in result:
            self.log.unlink(missing_ok=True)
        print(f"{self.entry.name}: {verdict(self.entry, result)}", flush=True)
        return True


def _child(entry: Entry, part: Path, log: Path, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        part.write_text(json.dumps(one(entry)))


def verdict(entry: Entry, result: Result) -> str:
    """``exact``, or the first column that is not; ``refused`` where that was foreseen, or is said with a reason."""
    if "crash" in result:
        return f"crash: {result['crash']}"
    if "refused" in result:
        return f"refused{'' if entry.refused else ' (unforeseen)'}: {result['refused'].splitlines()[0][:200]}"
    if result["branches"] != entry.branches:
        return f"branches {result['branches']}, known {entry.branches}"
    if entry.branches == 0:
        return "exact"
    for column in ("cut", "adaln"):
        if result[column] != 0.0:
            return f"{column} differs by {result[column]:.1e}"
    if result["gradients"]:
        return f"no gradient: {', '.join(result['gradients'][:3])}"
    return "exact" if result["onnx"] <= TOLERANCE else f"onnx differs by {result['onnx']:.1e}"


def report(chosen: list[Entry]) -> Iterator[str]:
    """The table as Markdown, the counts first."""
    known = results()
    verdicts = {e.name: verdict(e, known[e.name]) for e in chosen if e.name in known}
    yield "| family | models | exact | refused with a reason | other |"
    yield "|---|---|---|---|---|"
    for family in FAMILIES:
        of = [v for name, v in verdicts.items() if name.startswith(f"{family}/")]
        exact, refused = sum(v == "exact" for v in of), sum(v.startswith("refused") for v in of)
        yield f"| {family} | {len(of)} | {exact} | {refused} | {len(of) - exact - refused} |"
    yield ""
    yield "| model | branches | from | result |"
    yield "|---|---|---|---|"
    for entry in chosen:
        if entry.name in verdicts:
            yield f"| {entry.name} | {entry.branches} | {entry.why} | {verdicts[entry.name]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report", "collect"))
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--match", default="", help="only names that hold this text")
    parser.add_argument("--seconds", type=int, default=600, help="limit of time a model")
    parser.add_argument("--gibibytes", type=int, default=16, help="limit of address space a model")
    parser.add_argument("--jobs", type=int, default=1, help="models at once")
    parser.add_argument("--every", type=int, default=1, help="only every n-th")
    given = parser.parse_args()
    chosen = [e for family in given.family for e in entries(family) if given.match in e.name][:: given.every]
    if given.command == "run":
        run(chosen, given.seconds, given.gibibytes, given.jobs)
    elif given.command == "collect":
        collect()
    else:
        print("\n".join(report(chosen)))


if __name__ == "__main__":
    main()
