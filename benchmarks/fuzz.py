"""Damaged inputs for every reader, and commands that are killed at random times; counts as JSON.

    python benchmarks/fuzz.py inputs --count 100000 --out fuzz-inputs.json
    python benchmarks/fuzz.py kills --count 200 --out fuzz-kills.json

Both go on from what is in the JSON file, with the same seed. Input number n of a target is drawn from the seed ``SEED:TARGET:n``, so that each can be made again:
``python benchmarks/fuzz.py input --target npz --number 17``. Readers run in processes of their own, so that one that dies is counted and the rest go on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
SHARES = {
    "manifest": 24,
    "layout": 12,
    "graph": 12,
    "text": 2,
    "names": 4,
    "npy": 10,
    "npz": 10,
    "inputs": 4,
    "safetensors": 6,
    "checkpoint": 3,
    "pickle": 5,
    "legacy": 3,
    "program": 2,
    "session": 1,
    "command": 1,
    "recipe": 1,
}
"""Hundredths of the inputs, by target."""
CHUNK, PATIENCE = 1000, 120.0
"""Inputs a process, and the seconds after which a process that reads one input is killed."""


def work(target: str, first: int, last: int, seed: int, seeds: Path, scratch: Path) -> None:
    """Read inputs ``first`` to ``last``, one line of JSON each on stdout."""
    sys.path.insert(0, str(TESTS))
    import fuzzing

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    chosen = fuzzing.targets(seeds, scratch)[target]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # native libraries write there
    for data in chosen.valid:  # which also imports what is imported late
        chosen.read(data)
    print(json.dumps({"ready": target}), file=out, flush=True)
    with fuzzing.guarded(scratch):
        for number in range(first, last):
            data = chosen.make(random.Random(f"{seed}:{target}:{number}"))
            start = time.perf_counter()
            found = fuzzing.outcome_of(chosen.read, data)
            line = {
                "number": number,
                "kind": found.kind,
                "detail": found.detail,
                "seconds": time.perf_counter() - start,
            }
            print(json.dumps(line), file=out, flush=True)


def inputs(count: int, seed: int, out: Path) -> int:
    """Read inputs of every target; returns how many failed."""
    done = load(out, seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        seeds = Path(place) / "seeds"
        make = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import fuzzing; from pathlib import Path; fuzzing.make_seeds(Path({str(seeds)!r}))"
        subprocess.run([sys.executable, "-c", make], check=True)
        for target, share in SHARES.items():
            row = done["targets"].setdefault(
                target,
                {"tried": 0, "read": 0, "refused": 0, "crash": 0, "hang": 0, "memory": 0, "outside": 0, "failures": []},
            )
            while row["tried"] < count * share // sum(SHARES.values()):
                last = min(row["tried"] + CHUNK, count * share // sum(SHARES.values()))
                _chunk(target, row, last, seed, seeds, Path(place) / target)
                done["tried"] = sum(r["tried"] for r in done["targets"].values())
                done["failed"] = {
                    k: sum(r[k] for r in done["targets"].values()) for k in ("crash", "hang", "memory", "outside")
                }
                save(out, done)
                print(f"{done['tried']} tried, {target} {row['tried']}, {done['failed']}", flush=True)
    return sum(done["failed"].values())


def _chunk(target: str, row: dict[str, Any], last: int, seed: int, seeds: Path, scratch: Path) -> None:
    args = [sys.executable, __file__, "work", "--target", target, "--first", str(row["tried"]), "--last", str(last)]
    args += ["--seed", str(seed), "--seeds", str(seeds), "--scratch", str(scratch)]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    if not process.stdout.readline():
        sys.exit(f"The process that reads {target} did not start.")
    watch = subprocess_watch(process)
    for text in process.stdout:
        watch.seen()
        line = json.loads(text)
        row["tried"], row[line["kind"]] = line["number"] + 1, row[line["kind"]] + 1
        row["slowest"] = max(row.get("slowest", 0.0), line["seconds"])
        if line["kind"] not in ("read", "refused"):
            row["failures"].append(line)
    process.wait()
    watch.end()
    if row["tried"] < last:  # it died at the next one
        kind = "hang" if watch.killed else "crash"
        row["failures"].append(
            {"number": row["tried"], "kind": kind, "detail": f"the process ended with {process.returncode}"}
        )
        row["tried"], row[kind] = row["tried"] + 1, row[kind] + 1


class subprocess_watch:
    """Kills a process that says nothing for too long."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        import threading

        self.process, self.killed, self._last, self._ended = (
            process,
            False,
            time.monotonic() + PATIENCE,
            threading.Event(),
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def seen(self) -> None:
        self._last = time.monotonic()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(1):
            if time.monotonic() - self._last > PATIENCE:
                self.killed = True
                self.process.kill()
                return


def kills(count: int, seed: int, out: Path) -> int:
    """Kill a conversion, one that replaces a bundle, and a training at random times; returns how many left something else than a whole bundle or none."""
    sys.path.insert(0, str(TESTS))
    from faulting import JOBS, Server

    done = load(out, seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as place, Server(Path(place)) as server:
        spans = {job: server.run(job).seconds for job in JOBS}
        for number in range(done.get("tried", 0), count):
            draw = random.Random(f"{seed}:kill:{number}")
            job = JOBS[number % len(JOBS)]
            found = server.killed_and_again(job, after=draw.random() * spans[job] * 1.05)
            row = done["targets"].setdefault(
                job,
                {
                    "tried": 0,
                    "ended before": 0,
                    "whole": 0,
                    "absent": 0,
                    "broken": 0,
                    "rerun completes": 0,
                    "litter left": 0,
                    "failures": [],
                },
            )
            row["tried"] += 1
            row["ended before"] += not found.killed
            row[found.state] += 1
            row["rerun completes"] += found.again
            row["litter left"] += bool(found.litter)
            if not found.ok:
                row["failures"].append({"number": number, **vars(found)})
            done["tried"] = number + 1
            done["failed"] = sum(len(r["failures"]) for r in done["targets"].values())
            save(out, done)
            print(f"{done['tried']} killed, {done['failed']} failed", flush=True)
    return int(done["failed"])


def load(out: Path, seed: int) -> dict[str, Any]:
    done: dict[str, Any] = (
        json.loads(out.read_text()) if out.exists() else {"seed": seed, "tried": 0, "failed": {}, "targets": {}}
    )
    if done["seed"] != seed:
        sys.exit(f"{out} has the seed {done['seed']}: give another --out, or --seed {done['seed']}.")
    return done


def save(out: Path, done: dict[str, Any]) -> None:
    part = out.with_suffix(".part")
    part.write_text(json.dumps(done, indent=1) + "\n")
    part.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("inputs", "kills", "input", "work"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--target", choices=tuple(SHARES))
    parser.add_argument("--number", type=int, default=0)
    for name in ("--first", "--last"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    for name in ("--seeds", "--scratch"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "work":
        work(given.target, given.first, given.last, given.seed, given.seeds, given.scratch)
    elif given.what == "input":
        sys.path.insert(0, str(TESTS))
        import fuzzing

        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            fuzzing.make_seeds(Path(place) / "seeds")
            work(
                given.target, given.number, given.number + 1, given.seed, Path(place) / "seeds", Path(place) / "scratch"
            )
    else:
        out = given.out or Path(f"fuzz-{given.what}.json")
        sys.exit(1 if (inputs if given.what == "inputs" else kills)(given.count, given.seed, out) else 0)


if __name__ == "__main__":
    main()
