"""What it costs to feed a session its weights: products with constant weights against weights as inputs, and ways to bring a block's bytes into memory.

    python benchmarks/feeding.py products     # [M, K] x [K, N] as in a ViT-L's block, twelve weights in turn, so that they come from memory
    python benchmarks/feeding.py loading      # a file of 50 MB: mapped, touched, read into a buffer that is used again; written in pieces of 2 MiB and of 1 MB

Each row is the median of rounds in which the ways take turns.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

WEIGHTS, ROUNDS = 12, 7
SHAPES = ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024))


def session_of(
    nodes: list[Any], inputs: dict[str, list[int]], outputs: dict[str, list[int]], constants: Any = ()
) -> Any:
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in d.items()] for d in (inputs, outputs)]
    graph = helper.make_graph(nodes, "product", *values, list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def products(rows: int) -> None:
    draw = np.random.default_rng(0)
    totals = dict.fromkeys(("constant", "input", "transposed"), 0.0)
    for k, n in SHAPES:
        x = draw.standard_normal((1, rows, k), np.float32)
        weights = [draw.standard_normal((k, n), np.float32) for _ in range(WEIGHTS)]
        names = [f"w{i}" for i in range(WEIGHTS)]
        constant = session_of(
            [helper.make_node("MatMul", ["x", w], [f"y{w}"]) for w in names],
            {"x": [1, rows, k]},
            {f"y{w}": [1, rows, n] for w in names},
            [numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True)],
        )
        plain = session_of(
            [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [1, rows, k], "w": [k, n]}, {"y": [1, rows, n]}
        )
        turned = session_of(
            [helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["y"])],
            {"x": [1, rows, k], "w": [n, k]},
            {"y": [1, rows, n]},
        )
        stored = [np.ascontiguousarray(w.T) for w in weights]
        ways: dict[str, Callable[[], object]] = {
            "constant": lambda s=constant, x=x: s.run(None, {"x": x}),
            "input": lambda s=plain, x=x, ws=weights: [s.run(None, {"x": x, "w": w}) for w in ws],
            "transposed": lambda s=turned, x=x, ws=stored: [s.run(None, {"x": x, "w": w}) for w in ws],
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, run in ways.items():
                time.sleep(0.05)  # the threads of the session before stop spinning
                start = time.perf_counter()
                run()
                times[way].append((time.perf_counter() - start) / WEIGHTS)
        found = {way: median(seconds[1:]) for way, seconds in times.items()}
        totals = {way: total + found[way] for way, total in totals.items()}
        print(f"  {rows} x {k} x {n}: " + ", ".join(f"{way} {1e3 * s:.2f} ms" for way, s in found.items()))
    base = totals["constant"]
    print(f"{rows} rows, sum of the four: " + ", ".join(f"{way} {total / base:.2f}" for way, total in totals.items()))


def loading() -> None:
    size = 50 << 20
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for piece, said in ((2 << 20, "2 MiB"), (10**6, "1 MB")):
            path = Path(folder) / "weights.bin"
            with path.open("wb", buffering=0) as file:
                for start in range(0, size, piece):
                    file.write(b"\1" * min(piece, size - start))
            buffer = np.frombuffer(mmap.mmap(-1, size), np.uint8)
            buffer[::4096] = 0
            ways: dict[str, Callable[[], object]] = {
                "mapped, every page touched": lambda p=path: mapped(p)[::4096].max(),
                "read into a buffer": lambda p=path, b=buffer: read(p, b),
            }
            for way, bring in ways.items():
                times = []
                for _ in range(ROUNDS):
                    start = time.perf_counter()
                    bring()
                    times.append(time.perf_counter() - start)
                print(f"written in pieces of {said}, {way}: {1e3 * median(times):.2f} ms")


def mapped(path: Path) -> np.ndarray[Any, Any]:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def read(path: Path, buffer: np.ndarray[Any, Any]) -> None:
    with path.open("rb", buffering=0) as file:
        file.readinto(buffer.data)  # type: ignore[arg-type]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["products", "loading"])
    parser.add_argument("--rows", type=int, nargs="*", default=[4, 64, 197, 1576])
    given = parser.parse_args()
    if given.what == "loading":
        loading()
    else:
        for rows in given.rows:
            products(rows)
