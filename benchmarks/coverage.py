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
import importlib.util
import json
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from zoo import FAMILIES, entries
from zoo.entry import Entry

HERE = Path(__file__).parent
CACHE, COLLECTED = HERE / ".cache" / "coverage", HERE / "coverage.json"
BATCHES, BLOCKS, TARGET_DIM = (1, 5), 3, 16
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
Result = dict[str, Any]


def use_torchvision() -> None:
    """Make torchvision importable beside a CPU build of torch, as the tests do."""
    spec = importlib.util.spec_from_file_location("shim", HERE.parent / "tests" / "torchvision_shim.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ensure_torchvision()


# --- one model ---


def one(entry: Entry, export: bool = True) -> Result:
    """All columns of one model (but ``onnx`` without ``export``); a refusal by the converter is recorded with its message, anything else is a crash."""
    import torch
    from diffusionblocks.converter.analysis import divide
    from diffusionblocks.converter.capture import capture
    from diffusionblocks.converter.network import ConvertedNetwork
    from diffusionblocks.converter.residual import find_trunk
    from diffusionblocks.converter.settings import Settings
    from diffusionblocks.runtime.errors import BadInput

    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(0)
    result: Result = {"known": entry.branches, "why": entry.why}
    model = entry.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a branch that starts at zero passes no gradient on
                parameter.normal_(std=0.02)
    inputs = {batch: _seeded(lambda n: entry.inputs(n), batch) for batch in (3, *BATCHES)}
    with torch.no_grad():
        expected = {b: [_clone(t) for t in _leaves(model(**_copies(inputs[b])))] for b in BATCHES}
    try:
        result["parameters"] = sum(p.numel() for p in model.parameters())
        captured = capture(model, inputs[3])
        found = find_trunk(captured.graph)
        result |= {"captured": True, "branches": found.branches, "units": len(found.trunk)}
        if entry.branches == 0:
            return result
        blocks = max(1, min(BLOCKS, len(found.trunk)))
        network = ConvertedNetwork(divide(captured, num_blocks=blocks), Settings(num_blocks=blocks))
        result["cut"] = max(_difference(network.exact(_copies(inputs[b])), expected[b]) for b in BATCHES)
        conditioned = Conditioned(network)
        result["adaln"] = max(_difference(conditioned(_copies(inputs[b])), expected[b]) for b in BATCHES)
        result["gradients"] = conditioned.without_gradient(_copies(inputs[3]))
        if export:
            result["onnx"] = _onnx(network, conditioned, {b: inputs[b] for b in BATCHES}, expected)
    except BadInput as error:
        result["refused"] = str(error)
    return result


def _seeded(make: Callable[[int], Any], batch: int) -> Any:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(batch)
        return make(batch)


def _copies(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in inputs.items()}


def _clone(tensor: Any) -> Any:
    return tensor.clone()


def _leaves(output: Any) -> list[Any]:
    import torch
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _difference(got: Any, expected: list[Any]) -> float:
    """Largest absolute difference over all outputs (infinite where their number or shapes differ)."""
    if len(got) != len(expected) or any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True) if a.numel()]
    return max((_largest(a, b) for a, b in pairs), default=0.0)


def _largest(a: Any, b: Any) -> float:
    left = (a - b).abs()[~((a == b) | (a.isnan() & b.isnan()))]
    return float(left.nan_to_num(nan=float("inf")).max()) if left.numel() else 0.0


class Conditioned:
    """The network's blocks with AdaLN inserted, whatever its outputs are: a noisy target [N, 16] beside each block's inputs."""

    def __init__(self, network: Any) -> None:
        from diffusionblocks.converter import adaln
        from diffusionblocks.converter.capture import flatten
        from diffusionblocks.converter.cut import cut, cuts_of
        from diffusionblocks.converter.residual import find_trunk

        self.network = network
        graph = flatten(network.analysis.captured.graph)
        found = find_trunk(graph)
        where = cuts_of(found, network.partition)
        starts = zip(network.partition.starts, network.partition.counts, strict=True)
        sizes = [sum(p.numel() for p in c.module.parameters()) for c in network.contexts]
        groups = [found.trunk[start : start + count] for start, count in starts]
        adaln.insert(graph, found, groups, target_dim=TARGET_DIM, sigma_data=0.25, block_parameters=sizes, seed=0)
        pieces = cut(graph, where)
        self.blocks, self.head, self.stem = pieces[1:-1], pieces[-1], pieces[0]

    def names(self, piece: Any) -> list[str]:
        return [str(n.target) if n.op == "placeholder" else n.name for n in piece.inputs]

    def axes(self, piece: Any) -> tuple[dict[int, int], ...]:
        from diffusionblocks.converter.graph import value
        from diffusionblocks.converter.samples import axes_or_first, batch_symbols

        symbols = batch_symbols(self.network.analysis.captured.graph.graph.nodes)
        return tuple(axes_or_first(value(n).shape, symbols) for n in piece.inputs)

    def rows(self, piece: Any) -> list[bool]:
        """Whether each output of a piece has a batch."""
        from diffusionblocks.converter.graph import value
        from diffusionblocks.converter.samples import axes_or_first

        return [bool(axes_or_first(value(n).shape, frozenset())) for n in piece.outputs]

    def start(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        n = len(next(iter(inputs.values())))
        generator = torch.Generator().manual_seed(n)
        noise = {
            "adaln_z": torch.randn(n, TARGET_DIM, generator=generator),
            "adaln_sigma": torch.rand(n, generator=generator) + 0.1,
        }
        values = {name: inputs[name] for name in self.network.input_names}
        return values | noise

    def step(self, piece: Any, values: dict[str, Any]) -> tuple[Any, ...]:
        results = piece.module(*(values[name] for name in self.names(piece)))
        values |= {n.name: r for n, r in zip(piece.outputs, results, strict=True)}
        return tuple(results)

    def __call__(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        import torch

        values = self.start(inputs)
        with torch.no_grad():
            for piece in (self.stem, *self.blocks):
                self.step(piece, values)
            return self.step(self.head, values)

    def without_gradient(self, inputs: dict[str, Any]) -> list[str]:
        """Trained parameters that get no gradient in a block's own copy, and conditioning whose gradient is zero."""
        import torch
        from diffusionblocks.converter.adaln import Conditioner
        from diffusionblocks.converter.blocks import CONDITIONING, own_copy, select_trainable

        values = self.start(inputs)
        missing: list[str] = []
        with torch.no_grad():
            self.step(self.stem, values)
        for b, piece in enumerate(self.blocks):
            own = own_copy(piece)
            chosen = select_trainable(own.module, "block")
            with torch.no_grad():
                for name, parameter in chosen:
                    if any(part.startswith(CONDITIONING) for part in name.split(".")):
                        parameter.add_(0.02 * torch.randn(parameter.shape))
            results = own.module(*(values[name].detach() for name in self.names(piece)))
            wanted = [r for r in results if r.is_floating_point() and r.requires_grad]
            torch.stack([r.float().square().mean() for r in wanted]).sum().backward()
            rows = next(m.rows for m in own.module.modules() if isinstance(m, Conditioner))
            for name, parameter in chosen:
                conditioning = any(part.startswith(CONDITIONING) for part in name.split("."))
                made = parameter.grad
                parts = () if made is None else made.split(rows) if ".projection." in name and conditioning else (made,)
                if made is None or (conditioning and not all(bool(part.abs().sum() > 0) for part in parts)):
                    missing.append(f"block {b}: {name}")
            with torch.no_grad():
                self.step(piece, values)
        return missing


def _onnx(network: Any, conditioned: Conditioned, inputs: dict[int, Any], expected: dict[int, list[Any]]) -> float:
    """Largest difference of the exported bundle and of each exported conditioned block, relative to torch's largest value."""
    import numpy as np
    import torch
    from diffusionblocks.converter.adaln import Conditioner
    from diffusionblocks.export import export_bundle
    from diffusionblocks.runtime import open_bundle

    found = 0.0
    with torch.no_grad():
        for module in (*(b.module for b in network.blocks), *(b.module for b in conditioned.blocks)):
            for conditioner in [m for m in module.modules() if isinstance(m, Conditioner)]:
                for parameter in conditioner.parameters():  # zero at first: z and sigma would not show
                    parameter.add_(0.02 * torch.randn(parameter.shape))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export_bundle(network, Path(folder) / "b")
        with open_bundle(Path(folder) / "b", threads=1) as bundle:
            for batch, values in inputs.items():
                got = bundle.run_all({k: values[k].numpy() for k in network.input_names})
                found = max(found, _relative([torch.from_numpy(np.asarray(v)) for v in got.values()], expected[batch]))
        if network.target is not None:
            return max(found, _own_blocks(network, Path(folder) / "b", inputs))
    return max(found, _conditioned_blocks(conditioned, inputs))


def _own_blocks(network: Any, bundle: Path, inputs: dict[int, Any]) -> float:
    """The bundle's DiffusionBlocks, each on the original's state."""
    import onnx
    import torch

    found, sessions = 0.0, [_session(onnx.load(p)) for p in sorted(bundle.glob("block_*.onnx"))]
    for batch, values in inputs.items():
        env = network.inputs_env(_copies(values))
        network.run_stem(env)
        z, sigma = torch.randn(batch, network.target.dim), torch.rand(batch) + 0.1
        for b, (session, block) in enumerate(zip(sessions, network.blocks, strict=True)):
            names = ("stream", *block.sides, "z", "sigma")
            feed = dict(zip(names, (env["stream"], *(env[s] for s in block.sides), z, sigma), strict=True))
            found = max(found, _relative(_run(session, feed)[:1], list(block.module(*feed.values()))[:1]))
            network.run_context(env, b)
    return found


def _conditioned_blocks(conditioned: Conditioned, inputs: dict[int, Any]) -> float:
    """Blocks with AdaLN of a network that has no label to denoise."""
    import torch
    from diffusionblocks.export.graph import Exporter, Piece
    from diffusionblocks.export.pairs import as_pair

    found = 0.0
    streams = {batch: conditioned.start(_copies(values)) for batch, values in inputs.items()}
    for values in streams.values():
        with torch.no_grad():
            for piece in (conditioned.stem, *conditioned.blocks):
                conditioned.step(piece, values)
    pieces = []
    for block in conditioned.blocks:
        names, outputs = conditioned.names(block), [n.name for n in block.outputs]
        plain = tuple(f"in_{i}" for i in range(len(names))), tuple(f"out_{i}" for i in range(len(outputs)))
        example = tuple(streams[max(streams)][n] for n in names)
        fixed = tuple(f"out_{i}" for i, n in enumerate(outputs) if not conditioned.rows(block)[i])
        pieces.append((Piece(block.module, *plain, example, conditioned.axes(block), fixed), names, outputs))
    export = Exporter()
    export.prepare([piece for piece, _, _ in pieces])
    for piece, names, outputs in pieces:
        session = _session(export(piece))
        for values in streams.values():
            got = _run(session, dict(zip(piece.inputs, (values[n] for n in names), strict=True)))
            found = max(found, _relative(got, [as_pair(values[n]) for n in outputs]))
    return found


def _session(model: Any) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: Any, feed: dict[str, Any]) -> list[Any]:
    import torch
    from diffusionblocks.export.pairs import as_pair

    wanted = {i.name for i in session.get_inputs()}
    return [
        torch.from_numpy(r)
        for r in session.run(None, {k: as_pair(v.detach()).numpy() for k, v in feed.items() if k in wanted})
    ]


def _relative(got: list[Any], expected: list[Any]) -> float:
    if len(got) != len(expected):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        finite = b.double()[b.double().isfinite()]
        scale = max(float(finite.abs().max()) if finite.numel() else 0.0, 1e-12)
        worst = max(worst, _difference([a], [b]) / scale)
    return worst


# --- all models ---


def path_of(entry: Entry) -> Path:
    return CACHE / f"{entry.name.replace('/', '--')}.json"


def results() -> dict[str, Result]:
    """Every result so far by name: the collected ones, and those measured since."""
    found: dict[str, Result] = json.loads(COLLECTED.read_text()) if COLLECTED.exists() else {}
    for path in CACHE.glob("*.json"):
        found[path.stem.replace("--", "/", 1)] = json.loads(path.read_text())
    return found


def collect() -> None:
    """Write all results into one file, a line each."""
    lines = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in sorted(results().items())]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    COLLECTED.write_text(re.sub(r"/[^\s\"]*site-packages/", "", text))


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
