"""A converted network as one module of torch, and its folder: graphs of the pieces without weights, and a state dict in safetensors.

Requires: a :class:`ConvertedNetwork`. Ensures: what is read again needs neither the original's classes nor a conversion, computes the same numbers, has the same
names in its state dict, and executes nothing that the folder says (:func:`load_program` checks each graph).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.exported import load_program
from diffusionblocks.converter.mapped import apart, write_tensors
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.parts import SAME, save_bare, without_weights
from diffusionblocks.converter.saved import one_line, read_json, read_safetensors
from diffusionblocks.export.bundle import NetworkParts, building
from diffusionblocks.export.graph import Piece
from diffusionblocks.export.replacing import replace
from diffusionblocks.export.weights import identity
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.errors import BadInput, BundleError
from torch import fx, nn
from torch.export import Dim, ExportedProgram

FORMAT = 1
PLAN, STATE = "network.json", "model.safetensors"
NAME = re.compile(r"target|(stem|head)(_\d{2,})?|(context|block)_\d{2,}")


@dataclass(frozen=True)
class PartNames:
    """Names of what a part reads and makes; ``stream`` and ``stream_out`` are the trunk's state."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How the parts of a :class:`BlockNetwork` work together.

    ``kind``: of the target (see the manifest's), None where there is none; ``shape``: of one sample of z; ``axis``: the prediction's dimension of classes;
    ``edges``: of the blocks' noise intervals, descending.
    """

    format: int
    inputs: tuple[str, ...]
    parts: dict[str, PartNames]
    blocks: int
    context: str
    kind: str | None
    shape: tuple[int, ...]
    axis: int
    edges: tuple[float, ...]
    start: str
    read: str
    steps: int


class BlockNetwork(nn.Module):
    """A converted network as a module: its parts (``stem``, ``context_00``, ``block_00``, ..., ``head``, ``target``) are submodules of ``parts``.

    Examples:
        >>> import torch
        >>> from diffusionblocks.converter import load_network  # doctest: +SKIP
        >>> module = load_network("model.network")  # doctest: +SKIP
        >>> logits = module(torch.randn(5, 3, 224, 224))[0]  # doctest: +SKIP
    """

    def __init__(self, plan: Plan, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.plan = plan
        self.parts = nn.ModuleDict(dict(parts))

    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The original function: the model's inputs, batch first, by place or by name; all its outputs.

        Raises:
            BadInput: the network was trained from scratch and keeps no original.
        """
        env = self._env(inputs, named)
        if "context_00" not in self.parts:
            raise BadInput("The network was trained from scratch: there is no original.", hint="Call denoise.")
        self._run("stem", env)
        for b in range(self.plan.blocks):
            self._run(f"context_{b:02d}", env)
        return self._outputs("head", env)

    def apply_block(
        self, index: int, z: torch.Tensor, sigma: torch.Tensor, *inputs: torch.Tensor, **named: torch.Tensor
    ) -> torch.Tensor:
        """f of one DiffusionBlock, with gradients: z [N, *shape], sigma [N], and the model's inputs; its context is run without gradients.

        With the context ``carry`` the blocks before it see the same z and sigma.
        """
        env, carried = self._env(inputs, named), None
        with torch.no_grad():
            for b in range(0 if self.plan.context != "stem" else index, index + 1):
                self._enter(env, b, carried)
                if b < index:
                    carried = self._block(env, b, z, sigma)[1] if self.plan.context == "carry" else None
        return self._block(env, index, z, sigma)[0]

    @torch.no_grad()
    def denoise(
        self,
        *inputs: torch.Tensor,
        steps: int | None = None,
        start: str | None = None,
        read: str | None = None,
        seed: int = 0,
        **named: torch.Tensor,
    ) -> torch.Tensor:
        """Euler steps on the probability-flow ODE, block after block; the prediction in float32, as the bundle's runtime gives it.

        Args:
            inputs: the model's inputs, batch first.
            steps: number of denoising steps.
            start: ``mean`` (z = 0) or ``noise`` (z = sigma_max eps from ``seed``).
            read: the prediction of the ``last`` step, or the ``mean`` of the steps'.

        Raises:
            BadInput: there is no target, or one that another sampler is for.
        """
        plan = self.plan
        if plan.kind not in ("label", "bits", "features"):
            raise BadInput(
                "There is no label or number to denoise in this network."
                if plan.kind is None
                else "Diffusion models and masked language models have samplers of their own.",
                hint="Call the module for the original function, apply_block for one block, or open the bundle with diffusionblocks.runtime.",
            )
        env, carried, at = self._env(inputs, named), None, -1
        first = next(iter(env.values()))
        count, device = len(first), first.device
        z = torch.zeros(count, *plan.shape, device=device)
        if (start or plan.start) == "noise":
            noise = np.random.default_rng([seed, 0]).standard_normal((count, *plan.shape), dtype=np.float32)
            z = torch.from_numpy(noise).to(device) * plan.edges[0]
        predictions: list[torch.Tensor] = []
        for step in schedule.sampling_steps(plan.edges, steps or plan.steps):
            while at < step.block:
                self._enter(env, at + 1, carried)
                at, carried = at + 1, None
            sigma, after = (torch.full((count,), s, device=device) for s in (step.sigma, step.sigma_next))
            f, carried = self._block(env, step.block, z, sigma)
            prediction, _, z = self.parts["target"](z, f.float(), sigma, after)
            predictions.append(prediction)
        if (read or plan.read) == "last":
            return predictions[-1]
        mean = torch.stack(predictions)
        if plan.kind == "features":
            return mean.mean(0)
        if plan.kind == "bits":
            log = mean.double()
            return nn.functional.logsigmoid((log - torch.log(-torch.expm1(log.clamp(max=-1e-12)))).mean(0)).float()
        return mean.mean(0).log_softmax(plan.axis)

    def _env(self, inputs: tuple[torch.Tensor, ...], named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        env = dict(zip(self.plan.inputs, inputs, strict=False)) | dict(named)
        if set(env) != set(self.plan.inputs) or len(inputs) > len(self.plan.inputs):
            raise BadInput(
                f"The network takes {', '.join(self.plan.inputs)}; given were {len(inputs)} by place and {', '.join(named) or 'none'} by name.",
                hint="Give each input once.",
            )
        return env

    def _run(self, part: str, env: dict[str, torch.Tensor]) -> None:
        for name, value in zip(self.plan.parts[part].outputs, self._outputs(part, env), strict=True):
            env["stream" if name == "stream_out" else name] = value

    def _outputs(self, part: str, env: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(self.parts[part](*(env[name] for name in self.plan.parts[part].inputs)))

    def _own(self, part: str, block: int) -> str:
        own = f"{part}_{block:02d}"
        return own if own in self.parts else part

    def _enter(self, env: dict[str, torch.Tensor], block: int, carried: torch.Tensor | None) -> None:
        """Bring ``env['stream']`` to what ``block`` reads in this network's context, from what the block before read."""
        if block == 0 or self.plan.context == "stem":
            self._run(self._own("stem", block), env)
            return
        before = f"context_{block - 1:02d}"
        if carried is None or len(self.plan.parts[before].outputs) > 1:
            self._run(before, env)
        if carried is not None:
            env["stream"] = carried

    def _block(
        self, env: Mapping[str, torch.Tensor], block: int, z: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        made = self._outputs(f"block_{block:02d}", {**env, "z": z, "sigma": sigma})
        head = self._outputs(self._own("head", block), {**env, "stream": made[0]})
        return head[0], made[1] if len(made) > 1 else None


def module_of(network: ConvertedNetwork) -> BlockNetwork:
    """The network as a module; it shares its weights."""
    return _module_of(network.parts())


def _module_of(parts: NetworkParts) -> BlockNetwork:
    pieces = dict(_pieces(parts))
    target, decoding = parts.target, parts.decoding
    plan = Plan(
        FORMAT,
        tuple(spec.name for spec in parts.inputs),
        {name: PartNames(piece.inputs, piece.outputs) for name, piece in pieces.items()},
        len(parts.blocks),
        parts.context,
        None if target is None else target.kind,
        () if target is None else (*target.positions, target.dim),
        1 if target is None else target.axis,
        tuple(parts.schedule["edges"]),
        decoding.start,
        decoding.read,
        decoding.steps,
    )
    return BlockNetwork(plan, {name: piece.module for name, piece in pieces.items()}).eval()


def _pieces(parts: NetworkParts) -> Iterator[tuple[str, Piece]]:
    yield "stem", parts.stem
    for b, block in enumerate(parts.blocks):
        own = (("stem", block.stem), ("context", block.context), ("block", block.block), ("head", block.head))
        yield from ((f"{name}_{b:02d}", piece) for name, piece in own if piece is not None)
    yield "head", parts.head
    if parts.target is not None:
        yield "target", parts.target.piece


def save_network(network: ConvertedNetwork, folder: str | Path) -> Path:
    """Write a network's module: ``model.safetensors``, its state dict, each distinct tensor once; ``NAME.pt2``, the graph of each part without weights; ``network.json``.

    Raises:
        BadInput: the folder exists, or cannot be written; nothing half-written is left.
    """
    target = Path(folder)
    if target.exists():
        raise BadInput(f"{target} exists already.", hint="Give another folder.")
    parts = network.parts()
    with building(target, "network") as made:
        _write(_module_of(parts).plan, dict(_pieces(parts)), made)
        os.chmod(made, 0o755)
        replace(made, target)
    return target


def _write(plan: Plan, pieces: Mapping[str, Piece], folder: Path) -> None:
    weights: dict[str, torch.Tensor] = {}
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for part, piece in pieces.items():
        program = _program(piece)
        for name, tensor in program.state_dict.items():
            place, key = identity(tensor), f"parts.{part}.{name}"
            if place in first and tensor.numel():
                same[key] = first[place]
            else:
                first[place], weights[key] = key, tensor.detach()
        save_bare(without_weights(program)[0], folder / f"{part}.pt2")
    write_tensors(apart(weights), folder / STATE, {SAME: json.dumps(same)})
    (folder / PLAN).write_text(json.dumps(asdict(plan), indent=1) + "\n", encoding="utf-8")


def _program(piece: Piece) -> ExportedProgram:
    batch = Dim("batch", min=1, max=2**16)
    axes = piece.axes or tuple({0: 1} for _ in piece.example)
    shapes = tuple({d: batch if times == 1 else times * batch for d, times in of.items()} for of in axes)
    module = piece.module.eval()
    example = tuple(
        e.detach().clone() for e in piece.example
    )  # objects of their own: torch takes one twice for one input
    return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)


def load_network(folder: str | Path) -> BlockNetwork:
    """The module that :func:`save_network` wrote, in eval mode on the CPU.

    Raises:
        BundleError: a file is missing, damaged or does not fit.
        BadInput: a graph holds what is refused.
    """
    path = Path(folder)
    missing = [name for name in (PLAN, STATE) if not (path / name).is_file()]
    if missing:
        raise BundleError(f"{path} holds no {', '.join(missing)}: it is no saved network.", hint="Save it again.")
    try:
        plan = _read_plan(read_json(path / PLAN))
        state, metadata = read_safetensors(path / STATE)
        same = dict(json.loads(metadata.get(SAME, "{}")))
        parameters: dict[str, torch.Tensor] = {}
        parts = {name: _part(path, name, state, same, parameters) for name in plan.parts}
        unread = sorted(set(state) - set(parameters))
        if unread:
            raise BundleError(f"{STATE} holds {', '.join(unread[:4])}, which no part has.", hint="Save it again.")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise BundleError(
            f"What is in {path} does not fit together: {type(error).__name__}: {one_line(error)}", hint="Save it again."
        ) from error
    return BlockNetwork(plan, parts).eval()


def _read_plan(said: dict[str, Any]) -> Plan:
    if said.get("format") != FORMAT:
        raise BundleError(
            f"The saved network has the format {said.get('format')!r}; this version reads {FORMAT}.",
            hint="Save it again with this version, or install the version that wrote it.",
        )
    names = {
        str(name): PartNames(tuple(of["inputs"]), tuple(of["outputs"])) for name, of in dict(said.pop("parts")).items()
    }
    wrong = [name for name in names if not NAME.fullmatch(name)]
    if wrong:
        raise BundleError(f"The saved network has a part {wrong[0]!r}, which is none.", hint="Save it again.")
    lists = {key: tuple(value) for key, value in said.items() if isinstance(value, list)}
    plan = Plan(parts=names, **{**said, **lists})
    needed = {"stem", "head", *(f"context_{b:02d}" for b in range(plan.blocks) if "context_00" in names)}
    if not needed <= set(names) or (plan.kind is not None and len(plan.edges) != plan.blocks + 1):
        raise BundleError("The saved network lacks a part or an edge.", hint="Save it again.")
    return plan


def _part(
    folder: Path, name: str, state: Mapping[str, torch.Tensor], same: Mapping[str, str], made: dict[str, torch.Tensor]
) -> nn.Module:
    """One part with its weights; ``made``: the tensors of ``state`` that parts hold, so that one of several parts stays one."""
    path = folder / f"{name}.pt2"
    if not path.is_file():
        raise BundleError(f"{folder} holds no {path.name}.", hint="Save it again.")
    program = load_program(path)
    own = program.state_dict
    for key in list(own):
        source = same.get(f"parts.{name}.{key}", f"parts.{name}.{key}")
        if source not in state or state[source].shape != own[key].shape or state[source].dtype != own[key].dtype:
            raise BundleError(f"{STATE} does not hold {source} as {path.name} reads it.", hint="Save it again.")
        if source not in made:
            blank, tensor = (
                own[key],
                state[source].clone(),
            )  # in memory of its own: products depend on how it is aligned
            made[source] = nn.Parameter(tensor, blank.requires_grad) if isinstance(blank, nn.Parameter) else tensor
        own[key] = made[source]
    module = program.module(check_guards=False)
    plain = fx.GraphModule(module, module.graph)
    for buffer, tensor in list(plain.named_buffers()):
        if buffer not in own:  # a table that can be computed, which a state dict leaves out
            owner, _, leaf = buffer.rpartition(".")
            plain.get_submodule(owner).register_buffer(leaf, tensor, persistent=False)
    return plain
