"""A converted network taken apart for export, and saved so that training can go on: recipe, original program, block weights."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.analysis import analyse
from diffusionblocks.converter.exported import load_program
from diffusionblocks.converter.feature_target import FeatureTarget
from diffusionblocks.converter.generation import generate
from diffusionblocks.converter.mapped import apart, as_mapped, map_tensors, write_tensors
from diffusionblocks.converter.network import ConvertedNetwork, Env
from diffusionblocks.converter.saved import one_line, read_json, read_safetensors
from diffusionblocks.converter.settings import Settings
from diffusionblocks.converter.settle import load_target
from diffusionblocks.converter.shapes import examples
from diffusionblocks.converter.targets import Target
from diffusionblocks.export.bundle import BlockParts, NetworkParts, TargetParts
from diffusionblocks.export.graph import Piece
from diffusionblocks.export.weights import identity
from diffusionblocks.runtime.errors import BundleError
from diffusionblocks.runtime.manifest import Decoding, DenoiserRecord, MaskingRecord, TensorSpec
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

PROGRAM, WEIGHTS, RECIPE, TARGET = "model.pt2", "weights.safetensors", "recipe.json", "target.safetensors"
SAME = "same"
"""Key of a file's metadata: names of weights that are another one."""
PROBE_ROWS = 4
STEPS = 8
"""Steps a block of a diffusion model takes by default."""


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
    captured = network.analysis.captured
    example: Env = dict(zip(network.input_names, captured.example, strict=True))
    passed, outputs = examples(network, example)
    blocks = _block_parts(network, example, passed)
    head = _head_piece(network, passed[-1])
    names = tuple(f"output_{i}" if i else "output" for i in range(len(outputs)))
    rows = {name: t[: captured.rows] for name, t in example.items()} if probe_inputs is None else probe_inputs
    known = captured.expected if probe_inputs is None and exact else ()
    probe = _probe(network, rows, chosen, names, trained, exact, known)
    return NetworkParts(
        stem=_stem_piece(network, example),
        head=replace(head, outputs=names),
        blocks=tuple(blocks),
        target=_target_parts(network),
        inputs=input_specs(network),
        outputs=tuple(
            _spec(name, tensor, of) for name, tensor, of in zip(names, outputs, network.output_axes(), strict=True)
        ),
        task=_task(network),
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
        applications=1 if network.analysis.loop is None else network.analysis.loop.count,
    )


def _task(network: ConvertedNetwork) -> str:
    if network.settings.task != "auto":
        return network.settings.task
    return "classification" if network.target is not None else "features"


def input_specs(network: ConvertedNetwork) -> tuple[TensorSpec, ...]:
    """The network's inputs, as the manifest says them."""
    example = zip(network.input_names, network.analysis.captured.example, strict=True)
    return tuple(_spec(name, tensor) for name, tensor in example)


def default_decoding(network: ConvertedNetwork) -> Decoding:
    """``denoise`` in B steps from the mean for a trained network, ``exact`` otherwise; ``stem`` blocks are combined. A diffusion model takes more, from noise."""
    trained = all(network.trained) and network.target is not None
    mode = "denoise" if trained else "exact"
    if network.target is not None and network.target.enters:
        return Decoding(mode, "noise", "last", STEPS * network.num_blocks)
    if network.analysis.loop is not None:
        return Decoding(mode, "mean", "last", network.analysis.loop.count)
    read = "mean" if network.settings.context == "stem" else "last"
    return Decoding(mode, "mean", read, network.num_blocks)


def _schedule(network: ConvertedNetwork) -> dict[str, Any]:
    return {
        "partition": network.noise_partition,
        "overlap": network.settings.overlap,
        "edges": [float(e) for e in network.edges],
        "densities": [density.to_json() for density in network.densities],
    }


def _spec(name: str, tensor: torch.Tensor, batch: Container[int] = (0,)) -> TensorSpec:
    """A tensor with a batch at the dimensions ``batch``."""
    shape = tuple("batch" if d in batch else int(size) for d, size in enumerate(tensor.shape))
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), shape)


def _stem_piece(network: ConvertedNetwork, example: Env, block: int | None = None) -> Piece:
    own = None if block is None else network.stems[block]
    piece = network.stem if own is None else own
    names = network.input_names_of(piece)
    return Piece(
        piece.module,
        names,
        network.output_names(piece),
        tuple(example[n] for n in names),
        network.axes_of(piece),
        network.fixed_outputs(piece),
    )


def _head_piece(network: ConvertedNetwork, env: Env, block: int | None = None) -> Piece:
    own = None if block is None else network.heads[block]
    piece = network.head if own is None else own
    names = network.input_names_of(piece)
    outputs = tuple(f"output_{i}" if i else "output" for i in range(len(piece.outputs)))
    fixed = network.fixed_outputs(piece, outputs)
    return Piece(piece.module, names, outputs, tuple(env[n] for n in names), network.axes_of(piece), fixed)


def _block_parts(network: ConvertedNetwork, example: Env, passed: Sequence[Env]) -> list[BlockParts]:
    """The blocks' pieces with an example of their inputs each; ``passed[b]`` is what is known before block b."""
    target, found = network.target, []
    count = len(next(iter(example.values())))
    entered = network.axes_of(network.contexts[0])
    sides = network.side_axes()
    for b, env in enumerate(passed[:-1]):
        piece = network.contexts[b]
        names = network.input_names_of(piece)
        axes = network.axes_of(piece)
        example_of = tuple(env[n] for n in names)
        fixed = network.fixed_outputs(piece)
        context = Piece(piece.module, names, network.output_names(piece), example_of, axes, fixed)
        block = None
        if target is not None:
            part = network.blocks[b]
            stream = passed[0]["stream"] if network.settings.context == "stem" else env["stream"]
            noise = _example_z(target, count), torch.full((count,), network.edges[b])
            names = ("stream", *part.sides, "z", "sigma")
            values = (stream, *(env[s] for s in part.sides), *noise)
            block = Piece(
                part.module,
                names,
                ("stream_out", *["stream_carry"] * part.carries),
                values,
                (
                    entered[0] if network.settings.context == "stem" else axes[0],
                    *(sides[s] for s in part.sides),
                    {0: 1},
                    {0: 1},
                ),
            )
        found.append(
            BlockParts(
                units=tuple(u.name or u.add.name for u in network.units_of(b)),
                sigma=tuple(network.edges[b : b + 2]) if target is not None else (),
                context=None if network.settings.scratch else context,
                block=block,
                stem=_stem_piece(network, example, b) if network.stems[b] is not None else None,
                head=_head_piece(network, passed[-1], b) if network.heads[b] is not None else None,
                parameters=sum(p.numel() for p in piece.module.parameters()),
            )
        )
    return found


def _target_parts(network: ConvertedNetwork) -> TargetParts | None:
    target = network.target
    if target is None:
        return None
    layout = target.layout
    shape = layout.shape if target.num_classes in (0, layout.channels) else (target.num_classes,)  # else of new labels
    z, f = _example_z(target, 3), torch.randn(3, *shape)
    sigma, own, masking = torch.full((3,), 0.5), target.denoiser, target.masking
    names = ("z", "f", "sigma", "sigma_next")
    outputs = ("prediction", "denoised", "z_next") if masking is None else ("prediction",)
    piece = Piece(target, names, outputs, (z, f, sigma, sigma / 2))
    return TargetParts(
        piece,
        target.kind,
        target.num_classes,
        target.dim,
        target.sigma_data,
        target.evidence,
        target.positions,
        layout.axis or 0,
        None if own is None else DenoiserRecord(own.parameterisation, own.input, own.time, own.sigmas),
        None if masking is None else MaskingRecord(masking.token, masking.input, masking.mask),
    )


def _example_z(target: Target, count: int) -> torch.Tensor:
    if target.masking is not None:
        return torch.full((count, *target.shape), target.masking.token)
    return torch.randn(count, *target.shape)


def _probe(
    network: ConvertedNetwork,
    inputs: Env,
    decoding: Decoding,
    names: Sequence[str],
    trained: bool,
    exact: bool,
    known: Sequence[torch.Tensor],
) -> dict[str, np.ndarray[Any, Any]]:
    """A few rows and what the network makes of them; ``known``: what the original model itself made of them, where that is known."""
    rows = {name: tensor[:PROBE_ROWS] for name, tensor in inputs.items()}
    masking = None if network.target is None else network.target.masking
    if masking is not None:  # a row for every block
        known = ()
        chosen = torch.arange(network.num_blocks) % len(rows[masking.input])
        rows = {name: tensor[chosen] for name, tensor in rows.items()}
        rows[masking.input] = _hidden(rows[masking.input], masking.token)
    arrays = {f"input.{name}": tensor.numpy() for name, tensor in rows.items()}
    if exact:
        outputs = known or network.exact(rows)
        arrays |= {f"exact.{n}": o.numpy() for n, o in zip(names, outputs, strict=True)}
    if trained and network.require_target().denoiser is not None:
        own = network.require_target().denoiser
        conditions = {n: t for n, t in rows.items() if n not in (own.input, own.time)}
        made = generate(network, conditions, count=PROBE_ROWS, steps=decoding.steps)
        arrays["denoise.prediction"] = made.numpy()
    elif trained:
        prediction = network.denoise(rows, steps=decoding.steps, start=decoding.start, read=decoding.read)
        arrays["denoise.prediction"] = prediction.numpy()
    return arrays


def _hidden(tokens: torch.Tensor, token: int) -> torch.Tensor:
    """Tokens [B, T] of which row b has the share in the middle of block b's hidden, spread evenly."""
    count, length = tokens.shape
    shares = 1 - (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    places = torch.arange(length, dtype=torch.float64)
    return torch.where(((places + 1) * shares).floor() > (places * shares).floor(), token, tokens)


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
    """Write what further training needs into ``folder``.

    ``model.pt2``: the original program, its weights apart in ``weights.safetensors``, so that they can be mapped; ``block_NN.safetensors``: what was trained;
    ``target.safetensors``: mean and scale of a target of numbers; ``recipe.json``.
    """
    folder.mkdir()
    bare, weights, same = without_weights(network.analysis.captured.program)
    save_bare(bare, folder / PROGRAM)
    write_tensors(weights, folder / WEIGHTS, {SAME: json.dumps(same)})
    for b in [b for b, trained in enumerate(network.trained) if trained]:
        write_tensors(apart(_detached(network.own_tensors(b))), folder / f"block_{b:02d}.safetensors")
    if isinstance(network.target, FeatureTarget) and network.target.settled:
        write_tensors({"mean": network.target.mean, "scale": network.target.scale}, folder / TARGET)
    recipe = {"settings": network.settings.to_json(), "trained": list(network.trained)}
    (folder / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


def save_bare(program: ExportedProgram, path: Path) -> None:
    """Write a program that :func:`without_weights` gave.

    Raises:
        OSError: it cannot be written.
    """
    with _PatientWriter(io.FileIO(path, "w")) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that hold one number for all
        torch.export.save(program, file)  # type: ignore[arg-type]
        if file.error is not None:
            raise file.error


def _detached(tensors: Env) -> Env:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def without_weights(program: ExportedProgram) -> tuple[ExportedProgram, Env, dict[str, str]]:
    """The program with one zero in each weight's place and a plain tuple for its output, the weights by name, and names of weights that are another one."""
    bare, state, weights = copy.copy(program), dict(program.state_dict), {}
    same: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in program.state_dict.items():
        if not tensor.is_contiguous() or tensor.numel() < 2:
            continue
        place = identity(tensor)
        if place in first:
            same[name] = first[place]
        else:
            first[place], weights[name] = name, tensor.detach()
        blank = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        is_parameter = isinstance(tensor, nn.Parameter)
        state[name] = nn.Parameter(blank, requires_grad=tensor.requires_grad) if is_parameter else blank
    bare._state_dict = state  # the copy's own
    bare._module_call_graph = _with_plain_output(program.module_call_graph)
    return bare, apart(weights), same


def _with_plain_output(entries: Sequence[Any]) -> list[Any]:
    """The calls of a program whose own gives a tuple: a process that knows no class of transformers or diffusers cannot read one that gives such."""
    first, *others = entries
    if first.signature is None:
        return list(entries)
    plain = pytree.tree_structure(tuple(range(first.signature.out_spec.num_leaves)))
    return [replace(first, signature=replace(first.signature, out_spec=plain)), *others]


def load_training(folder: Path) -> ConvertedNetwork:
    """The network that :func:`save_training` wrote, ready to train on; its weights stay on disk until they are read.

    Raises:
        BundleError: something is missing or does not fit.
    """
    missing = [n for n in (PROGRAM, RECIPE) if not (folder / n).is_file()]
    if missing:
        raise BundleError(
            f"The bundle holds no {', '.join(missing)} in {folder.name}/, so it cannot be trained further.",
            hint="Convert the model again.",
        )
    try:
        return _load_training(folder, read_json(folder / RECIPE))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise BundleError(
            f"What is in {folder} does not fit together: {type(error).__name__}: {one_line(error)}",
            hint="Copy the bundle again, or convert the model again.",
        ) from error


def _load_training(folder: Path, recipe: dict[str, Any]) -> ConvertedNetwork:
    settings = Settings.from_json(recipe["settings"])
    program = load_program(folder / PROGRAM)
    if (folder / WEIGHTS).is_file():
        _fill(program, folder / WEIGHTS)
    found = analyse(program, num_blocks=settings.num_blocks, split=settings.split, recurrent=settings.recurrent)
    network = ConvertedNetwork(found, settings)
    load_target(network, folder / TARGET)
    network.trained = [bool(t) for t in recipe["trained"]]
    for b in [b for b, trained in enumerate(network.trained) if trained]:
        network.load_block_state(b, map_tensors(folder / f"block_{b:02d}.safetensors"))
    return network


def _fill(program: ExportedProgram, path: Path) -> None:
    """Put mapped weights into a program that was saved without them."""
    weights, metadata = read_safetensors(path)
    as_mapped(weights)
    same: dict[str, str] = json.loads(metadata.get(SAME, "{}"))
    state, made = program.state_dict, dict[str, torch.Tensor]()
    absent = sorted(n for n in {*weights, *same} if n not in state or same.get(n, n) not in weights)
    if absent:
        raise BundleError(f"{path.name} does not fit the program beside it: {', '.join(absent[:4])}.")
    for name in [*weights, *same]:
        source, blank = same.get(name, name), state[name]
        if source not in made:
            tensor = weights[source]
            made[source] = (
                nn.Parameter(tensor, requires_grad=blank.requires_grad) if isinstance(blank, nn.Parameter) else tensor
            )
        state[name] = made[source]
