"""A converted network taken apart for export, and saved so that training can go on: recipe, original program, block weights."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from diffusionblocks.converter.analysis import analyse
from diffusionblocks.converter.exported import load_program
from diffusionblocks.converter.network import ConvertedNetwork, Env
from diffusionblocks.converter.settings import Settings
from diffusionblocks.export.bundle import BlockParts, NetworkParts, TargetParts
from diffusionblocks.export.graph import Piece
from diffusionblocks.runtime.errors import BundleError
from diffusionblocks.runtime.manifest import Decoding, TensorSpec

PROGRAM, RECIPE = "model.pt2", "recipe.json"
PROBE_ROWS = 4


def network_parts(
    network: ConvertedNetwork,
    *,
    decoding: Decoding | None = None,
    source: Mapping[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    training: dict[str, Any] | None = None,
    probe_inputs: Env | None = None,
) -> NetworkParts:
    """Pieces, names and metadata of a network, and what torch computes on a probe in both modes."""
    trained = all(network.trained) and network.target is not None
    exact = not network.settings.scratch
    chosen = default_decoding(network) if decoding is None else decoding
    example: Env = dict(zip(network.input_names, network.analysis.captured.example, strict=True))
    with torch.no_grad():
        blocks, env = _block_parts(network, example)
        head = _head_piece(network, env)
        outputs = network.exact(example)
    names = tuple(f"output_{i}" if i else "output" for i in range(len(outputs)))
    probe = _probe(network, example if probe_inputs is None else probe_inputs, chosen, names, trained, exact)
    return NetworkParts(
        stem=_stem_piece(network, example),
        head=Piece(head.module, head.inputs, names, head.example),
        blocks=tuple(blocks),
        target=_target_parts(network),
        inputs=tuple(_spec(name, tensor) for name, tensor in example.items()),
        outputs=tuple(_spec(name, tensor) for name, tensor in zip(names, outputs, strict=True)),
        task="classification" if network.target is not None else "features",
        context=network.settings.context,
        tune=network.settings.tune,
        trained=trained,
        exact=exact,
        schedule=_schedule(network),
        decoding=chosen,
        source=dict(source or {}),
        probe=probe,
        preprocessing=preprocessing,
        class_names=None if class_names is None else tuple(class_names),
        training=training,
    )


def default_decoding(network: ConvertedNetwork) -> Decoding:
    """``denoise`` in B steps from the mean for a trained network, ``exact`` otherwise; ``stem`` blocks are combined."""
    trained = all(network.trained) and network.target is not None
    read = "mean" if network.settings.context == "stem" else "last"
    return Decoding("denoise" if trained else "exact", "mean", read, network.num_blocks)


def _schedule(network: ConvertedNetwork) -> dict[str, Any]:
    return {
        "partition": network.settings.partition,
        "overlap": network.settings.overlap,
        "edges": [float(e) for e in network.edges],
        "densities": [density.to_json() for density in network.densities],
    }


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), ("batch", *(int(s) for s in tensor.shape[1:])))


def _stem_piece(network: ConvertedNetwork, example: Env, block: int | None = None) -> Piece:
    own = None if block is None else network.stems[block]
    piece = network.stem if own is None else own
    names = network.input_names_of(piece)
    return Piece(piece.module, names, network.output_names(piece), tuple(example[n] for n in names))


def _head_piece(network: ConvertedNetwork, env: Env, block: int | None = None) -> Piece:
    own = None if block is None else network.heads[block]
    piece = network.head if own is None else own
    names = network.input_names_of(piece)
    outputs = tuple(f"output_{i}" if i else "output" for i in range(len(piece.outputs)))
    return Piece(piece.module, names, outputs, tuple(env[n] for n in names))


def _block_parts(network: ConvertedNetwork, example: Env) -> tuple[list[BlockParts], Env]:
    """The blocks' pieces with an example each, and the values that reach the head."""
    env = dict(example)
    network.run_stem(env)
    stem_stream = env["stream"]
    target = network.target
    streams: list[torch.Tensor] = []
    pieces: list[tuple[Piece | None, Piece | None]] = []
    for b in range(network.num_blocks):
        piece = network.contexts[b]
        names = network.input_names_of(piece)
        context = Piece(piece.module, names, network.output_names(piece), tuple(env[n] for n in names))
        block = None
        if target is not None:
            part = network.blocks[b]
            stream = stem_stream if network.settings.context == "stem" else env["stream"]
            n = len(stream)
            values = (
                stream,
                *(env[s] for s in part.sides),
                torch.randn(n, target.dim),
                torch.full((n,), network.edges[b]),
            )
            names = ("stream", *part.sides, "z", "sigma")
            block = Piece(part.module, names, ("stream_out", *["stream_carry"] * part.carries), values)
        pieces.append((None if network.settings.scratch else context, block))
        network.run_context(env, b)
        streams.append(env["stream"])
    found = []
    for b, (original, block) in enumerate(pieces):
        own_head = network.heads[b] is not None
        found.append(
            BlockParts(
                units=tuple(u.name or u.add.name for u in network.units_of(b)),
                sigma=tuple(network.edges[b : b + 2]) if target is not None else (),
                context=original,
                block=block,
                stem=_stem_piece(network, example, b) if network.stems[b] is not None else None,
                head=_head_piece(network, env, b) if own_head else None,
                parameters=sum(p.numel() for p in network.contexts[b].module.parameters()),
            )
        )
    return found, env


def _target_parts(network: ConvertedNetwork) -> TargetParts | None:
    target = network.target
    if target is None:
        return None
    z, f = torch.randn(3, target.dim), torch.randn(3, target.num_classes)
    sigma = torch.full((3,), 0.5)
    names = ("z", "f", "sigma", "sigma_next")
    piece = Piece(target, names, ("prediction", "denoised", "z_next"), (z, f, sigma, sigma / 2))
    return TargetParts(piece, target.num_classes, target.dim, target.sigma_data, target.evidence)


def _probe(
    network: ConvertedNetwork, inputs: Env, decoding: Decoding, names: Sequence[str], trained: bool, exact: bool
) -> dict[str, np.ndarray[Any, Any]]:
    rows = {name: tensor[:PROBE_ROWS] for name, tensor in inputs.items()}
    arrays = {f"input.{name}": tensor.numpy() for name, tensor in rows.items()}
    if exact:
        arrays |= {f"exact.{n}": o.numpy() for n, o in zip(names, network.exact(rows), strict=True)}
    if trained:
        prediction = network.denoise(rows, steps=decoding.steps, start=decoding.start, read=decoding.read)
        arrays["denoise.prediction"] = prediction.numpy()
    return arrays


class _PatientWriter(io.BufferedWriter):
    """A file that keeps the first write error in ``error``: raised inside torch's archive writer it would end the process."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset if self.error is not None else super().seek(offset, whence)


def save_training(network: ConvertedNetwork, folder: Path) -> None:
    """Write ``model.pt2`` (the original program), ``block_NN.safetensors`` (what was trained) and ``recipe.json`` into ``folder``."""
    folder.mkdir()
    with _PatientWriter(io.FileIO(folder / PROGRAM, "w")) as file:
        torch.export.save(network.analysis.captured.program, file)  # type: ignore[arg-type]
        if file.error is not None:
            raise file.error
    for b in range(network.num_blocks if network.target is not None else 0):
        (folder / f"block_{b:02d}.safetensors").write_bytes(safetensors.torch.save(network.block_state(b)))
    recipe = {"settings": network.settings.to_json(), "trained": list(network.trained)}
    (folder / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


def load_training(folder: Path) -> ConvertedNetwork:
    """The network that :func:`save_training` wrote, ready to train on.

    Raises:
        BundleError: something is missing or does not fit.
    """
    missing = [n for n in (PROGRAM, RECIPE) if not (folder / n).is_file()]
    if missing:
        raise BundleError(
            f"The bundle holds no {', '.join(missing)} in {folder.name}/, so it cannot be trained further.",
            hint="Convert the model again.",
        )
    recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    settings = Settings.from_json(recipe["settings"])
    program = load_program(folder / PROGRAM)
    network = ConvertedNetwork(analyse(program, num_blocks=settings.num_blocks, split=settings.split), settings)
    for b in range(network.num_blocks if network.target is not None else 0):
        network.load_block_state(b, safetensors.torch.load_file(folder / f"block_{b:02d}.safetensors"))
    network.trained = [bool(t) for t in recipe["trained"]]
    return network
