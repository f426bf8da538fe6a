"""One architecture of the zoo through every column of the coverage table: captured, counted, cut, conditioned, with gradients, exported and run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from diffusionblocks.converter import adaln
from diffusionblocks.converter.adaln import Conditioner
from diffusionblocks.converter.analysis import divide
from diffusionblocks.converter.blocks import CONDITIONING, differentiable, own_copy, select_trainable
from diffusionblocks.converter.capture import capture, flatten
from diffusionblocks.converter.cut import cut, cuts_of
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.residual import find_trunk
from diffusionblocks.converter.settings import Settings
from diffusionblocks.export import export_bundle
from diffusionblocks.export.graph import Exporter, Piece
from diffusionblocks.export.pairs import as_pair
from diffusionblocks.runtime import open_bundle
from diffusionblocks.runtime.errors import BadInput
from torch.utils import _pytree as pytree
from zoo.entry import Entry

BATCHES, BLOCKS, TARGET_DIM = (1, 5), 3, 16
SORTED = 1e-2
"""A difference of one block above it is looked into: its rows may be in another order."""
Result = dict[str, Any]


def one(entry: Entry, export: bool = True) -> Result:
    """All columns of one model (but ``onnx`` without ``export``); a refusal by the converter is recorded with its message, anything else is a crash."""
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(0)
    result: Result = {"known": entry.branches, "why": entry.why}
    model = entry.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a branch that starts at zero passes no gradient on
                parameter.normal_(std=0.02)
    inputs = {batch: _seeded(entry.inputs, batch) for batch in (3, *BATCHES)}
    with torch.no_grad():
        expected = {b: [t.clone() for t in _leaves(model(**_copies(inputs[b])))] for b in BATCHES}
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
    with torch.random.fork_rng():
        torch.manual_seed(batch)
        return make(batch)


def _copies(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in inputs.items()}


def _leaves(output: Any) -> list[Any]:
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

    def start(self, inputs: dict[str, Any]) -> dict[str, Any]:
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
        values = self.start(inputs)
        with torch.no_grad():
            for piece in (self.stem, *self.blocks):
                self.step(piece, values)
            return self.step(self.head, values)

    def without_gradient(self, inputs: dict[str, Any]) -> list[str]:
        """Trained parameters that get no gradient in a block's own copy, and conditioning whose gradient is zero."""
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
            results = own.module(*(differentiable(values[name].detach()) for name in self.names(piece)))
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
    found = 0.0
    streams = {batch: conditioned.start(_copies(values)) for batch, values in inputs.items()}
    for values in streams.values():
        with torch.no_grad():
            for piece in (conditioned.stem, *conditioned.blocks):
                conditioned.step(piece, values)
    values = streams[max(streams)]
    pieces = [_piece(conditioned, block, values) for block in conditioned.blocks]
    export = Exporter()
    export.prepare(pieces)
    sessions = [_session(export(piece)) for piece in pieces]
    for session, piece, block in zip(sessions, pieces, conditioned.blocks, strict=True):
        for values in streams.values():
            feed = dict(zip(piece.inputs, (values[n] for n in conditioned.names(block)), strict=True))
            found = max(found, _relative(_run(session, feed), [as_pair(values[n.name]) for n in block.outputs]))
    if found <= SORTED:
        return found
    pieces.append(_piece(conditioned, conditioned.head, streams[max(streams)]))
    sessions.append(_session(export(pieces[-1])))
    return max(_in_sequence(conditioned, sessions, pieces, _copies(of)) for of in inputs.values())


def _piece(conditioned: Conditioned, part: Any, values: dict[str, Any]) -> Piece:
    """A block or the head, its inputs and outputs numbered."""
    names, network = conditioned.names(part), conditioned.network
    plain = tuple(f"in_{i}" for i in range(len(names))), tuple(f"out_{i}" for i in range(len(part.outputs)))
    fixed = network.fixed_outputs(part, plain[1])
    return Piece(part.module, *plain, tuple(values[n] for n in names), network.axes_of(part), fixed)


def _in_sequence(conditioned: Conditioned, sessions: list[Any], pieces: list[Piece], inputs: dict[str, Any]) -> float:
    """What all come to, each fed by those before it: torch sorts equal numbers in any order, so that a block alone may have its rows in another."""
    expected, values = conditioned(_copies(inputs)), conditioned.start(inputs)
    with torch.no_grad():
        conditioned.step(conditioned.stem, values)
    got: list[Any] = []
    for session, piece, part in zip(sessions, pieces, (*conditioned.blocks, conditioned.head), strict=True):
        got = _run(session, dict(zip(piece.inputs, (values[n] for n in conditioned.names(part)), strict=True)))
        values |= {n.name: value for n, value in zip(part.outputs, got, strict=True)}
    return _relative(got, [as_pair(value) for value in expected])


def _session(model: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: Any, feed: dict[str, Any]) -> list[Any]:
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
