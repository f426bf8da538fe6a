"""Fine-tuning, one block at a time: its parameters, gradients and optimizer state are the only ones there are.

Every draw of a step (batch, augmentation, sigma, noise, dropout) comes from a generator seeded by (seed, block, step, rank), so that a block's weights
do not depend on when, where or after which other block it is trained: in the contexts ``stem`` and ``frozen`` training in any order, or in
separate processes, gives the same bits (same processor model, versions and thread count). In ``carry`` a block reads what the trained
blocks before it made, with tied noise ``z_{b-1} = z_b + sqrt(s_{b-1}^2 - s_b^2) eps'``, so blocks are trained first to last.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter import blocks as block_tools
from diffusionblocks.converter.network import ConvertedNetwork, Env
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.errors import BadInput
from torch import nn
from torch.nn import functional as F

log = logging.getLogger(__name__)

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
Progress = Callable[[int, int, int, float], None]


@dataclass(frozen=True)
class TrainOptions:
    """How every block is trained.

    ``weighting``: ``none`` or ``edm`` (per sample); ``lr`` peaks after a short warm-up, then decays to 0: 1e-3 where it is None and the context
    is ``stem``, whose blocks move further from the original, else 3e-4; ``anchor``: in the context ``carry``,
    weight of the passed-on state's squared distance from the original's, relative to the latter's variance.
    """

    steps: int = 2000
    batch_size: int = 64
    lr: float | None = None
    weight_decay: float = 0.01
    clip: float = 1.0
    weighting: str = "none"
    anchor: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or (self.lr is not None and not self.lr > 0):
            raise BadInput(
                f"steps {self.steps}, batch size {self.batch_size}, learning rate {self.lr}.",
                hint="Each must be positive; to convert without training leave --data out.",
            )
        if not self.anchor >= 0:
            raise BadInput(f"The anchor is {self.anchor}.", hint="Give 0 (no anchor) or more.")
        if self.weighting not in ("none", "edm"):
            raise BadInput(f"weighting is {self.weighting!r}.", hint="Use none or edm.")


@dataclass
class BlockLog:
    """What training one block took and measured: ``loss[i]`` at ``step[i]``, parameters trained, bytes of weights with gradients and Adam's moments."""

    block: int
    options: TrainOptions
    seconds: float = 0.0
    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    trained_parameters: int = 0
    training_bytes: int = 0


def check_data(network: ConvertedNetwork, inputs: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Refuse data that cannot train this network.

    Raises:
        BadInput: names, shapes, NaN, or labels outside the classes, each with what was expected.
    """
    target = network.require_target()
    specs = dict(zip(network.input_names, network.analysis.captured.example, strict=True))
    if set(inputs) != set(specs):
        raise BadInput(
            f"The data has the inputs {', '.join(sorted(inputs))}; the model takes {', '.join(specs)}.",
            hint="Name the arrays of the .npz after forward's arguments (x stands for the first), and the labels y.",
        )
    for name, array in inputs.items():
        if tuple(array.shape[1:]) != tuple(specs[name].shape[1:]):
            raise BadInput(
                f"The data's {name} has the shape {tuple(array.shape)}; the model takes "
                f"(N, {', '.join(map(str, specs[name].shape[1:]))}).",
                hint="Resize the data, or convert with the --input-shape it has.",
            )
        if len(array) != len(labels):
            raise BadInput(
                f"The data has {len(array)} rows of {name} and {len(labels)} labels.", hint="They must be as many."
            )
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            bad = int((~np.isfinite(array.reshape(len(array), -1))).any(1).sum())
            raise BadInput(f"{bad} of {len(array)} rows of {name} hold NaN or infinity.", hint="Remove or repair them.")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise BadInput(
            f"The labels have the shape {labels.shape} and the type {labels.dtype}.",
            hint="Give one integer a row, as y.",
        )
    if len(labels) == 0:
        raise BadInput("The data is empty.", hint="Give at least one row.")
    if labels.min() < 0 or labels.max() >= target.num_classes:
        raise BadInput(
            f"The labels reach from {labels.min()} to {labels.max()}; the model has the classes 0 to {target.num_classes - 1}.",
            hint="Renumber the labels, or give a model with as many outputs as there are classes.",
        )


def finetune(
    network: ConvertedNetwork,
    inputs: Any,
    labels: Any,
    *,
    blocks: Sequence[int] | None = None,
    augment: Augment | None = None,
    progress: Progress | None = None,
    options: TrainOptions | None = None,
    **fields: Any,
) -> list[BlockLog]:
    """Train blocks one after another on labelled data (in place).

    Args:
        network: what ``convert`` returned.
        inputs: array or tensor [M, ...] of the model's first input, or a dict by argument name.
        labels: integers [M].
        blocks: which blocks, all in order by default.
        augment: ``augment(batch, generator)`` for the first input; must draw from the generator only.
        progress: called with (block, step, steps, loss).
        options: :class:`TrainOptions`, or its fields as keywords (``steps=500, lr=1e-3``).

    Raises:
        BadInput: data that does not fit the network, or blocks it does not have.
    """
    chosen = options if options is not None else TrainOptions(**fields)
    if chosen.lr is None:
        chosen = replace(chosen, lr=1e-3 if network.settings.context == "stem" else 3e-4)
    arrays = inputs if isinstance(inputs, dict) else {network.input_names[0]: inputs}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    arrays = {k: a.astype(np.float32) if a.dtype == np.float64 else a for k, a in arrays.items()}
    y = np.asarray(labels)
    check_data(network, arrays, y)
    order = list(range(network.num_blocks)) if blocks is None else list(blocks)
    if any(b not in range(network.num_blocks) for b in order):
        raise BadInput(
            f"Blocks {', '.join(map(str, order))} were asked for; there are 0 to {network.num_blocks - 1}.",
            hint="Give --blocks within that range.",
        )
    if network.settings.context == "carry":
        for b in order:
            late = [
                a
                for a in range(b)
                if not network.trained[a] and order.index(b) < (order.index(a) if a in order else 10**9)
            ]
            if late:
                raise BadInput(
                    f"In the context carry block {b} reads what block {late[0]} makes, which is not trained yet.",
                    hint="Train the blocks in order, first to last.",
                )
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    targets = torch.from_numpy(y.astype(np.int64))
    parts = (network.stem, *network.contexts, network.head)
    with block_tools.frozen([*(part.module for part in parts), *(block.module for block in network.blocks)]):
        logs = [_train_block(network, b, tensors, targets, chosen, augment, progress) for b in order]
    if network.settings.context == "carry":
        stale = [b for b in range(min(order, default=0), network.num_blocks) if network.trained[b] and b not in order]
        if stale:
            log.warning(
                "Blocks %s were trained on what earlier blocks made before: train them again.",
                ", ".join(map(str, stale)),
            )
    return logs


def step_seed(seed: int, block: int, step: int, rank: int = 0) -> int:
    """A seed that depends on (seed, block, step, rank) alone, by hash."""
    digest = hashlib.sha256(f"{seed}/{block}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _train_block(
    network: ConvertedNetwork,
    b: int,
    inputs: Env,
    labels: torch.Tensor,
    options: TrainOptions,
    augment: Augment | None,
    progress: Progress | None,
) -> BlockLog:
    started = time.monotonic()
    modules = _own_modules(network, b)
    parameters = [p for m in modules for _, p in block_tools.select_trainable(m, network.settings.tune)]
    decayed = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    assert options.lr is not None
    optimizer = torch.optim.AdamW(groups, options.lr, weight_decay=options.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(options.steps))
    record = BlockLog(b, options, trained_parameters=sum(p.numel() for p in parameters))
    every = max(1, options.steps // 50)
    own = network.settings.tune == "block"
    if own:
        for m in modules:
            block_tools.set_batch_norm_training(m, True)
    try:
        with torch.random.fork_rng(devices=[]):
            for step in range(options.steps):
                generator = torch.Generator().manual_seed(step_seed(options.seed, b, step))
                torch.manual_seed(step_seed(options.seed, b, step, 1))
                loss = _loss(network, b, inputs, labels, options, augment, generator)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, options.clip)
                optimizer.step()
                scheduler.step()
                if step % every == 0 or step == options.steps - 1:
                    record.step.append(step)
                    record.loss.append(float(loss.detach()))
                    if progress is not None:
                        progress(b, step + 1, options.steps, record.loss[-1])
    finally:
        if own:
            for m in modules:
                block_tools.set_batch_norm_training(m, False)
        record.training_bytes = _training_bytes(modules, optimizer)
        optimizer.zero_grad(set_to_none=True)
    if not np.isfinite(record.loss[-1]):
        raise BadInput(
            f"The loss of block {b} is {record.loss[-1]} after {options.steps} steps.",
            hint="Lower the learning rate (--lr).",
        )
    network.trained[b] = True
    record.seconds = time.monotonic() - started
    return record


def _own_modules(network: ConvertedNetwork, b: int) -> list[Any]:
    """The modules whose weights block b may change: its own, and its copies of stem and head where it has them."""
    return [module for _, module in network.own_modules(b)]


def _training_bytes(modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    weights = {p for m in modules for p in m.parameters()}
    total = sum(p.numel() * p.element_size() for p in weights)
    total += sum(p.grad.numel() * p.grad.element_size() for p in weights if p.grad is not None)
    for state in optimizer.state.values():
        total += sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
    return total


def _warmup_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1.0 + float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))

    return factor


def _loss(
    network: ConvertedNetwork,
    b: int,
    inputs: Env,
    labels: torch.Tensor,
    options: TrainOptions,
    augment: Augment | None,
    generator: torch.Generator,
) -> torch.Tensor:
    target = network.require_target()
    n = min(options.batch_size, len(labels))
    rows = torch.randint(len(labels), (n,), generator=generator)
    batch = {name: tensor[rows] for name, tensor in inputs.items()}
    if augment is not None:
        first = network.input_names[0]
        batch[first] = augment(batch[first], generator)
    y = labels[rows]
    sigma = _draw_sigma(network, b, n, generator)  # [N]
    z = target.noisy(y, sigma, torch.randn(n, target.dim, generator=generator))  # [N, d]
    env = network.inputs_env(batch)
    _prefix(network, b, env, z, sigma, generator)
    f, carried = network.run_block(env, b, z, sigma)
    losses = F.cross_entropy(target.training_logits(f.float(), z, sigma), y, reduction="none")  # [N]
    if options.weighting == "edm":
        losses = losses * schedule.edm_weight(sigma, target.sigma_data)
    if carried is None or not options.anchor:
        return losses.mean()
    return losses.mean() + options.anchor * _distance(carried, _original_state(network, b, batch))


def _original_state(network: ConvertedNetwork, b: int, batch: Env) -> torch.Tensor:
    """The original network's state after block b."""
    env = network.inputs_env(batch)
    with torch.no_grad():
        network.run_stem(env)
        for a in range(b + 1):
            network.run_context(env, a)
    return env["stream"]


def _distance(state: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over the original's variance (0-d)."""
    return F.mse_loss(state, original) / original.var().clamp_min(1e-12)


def _draw_sigma(network: ConvertedNetwork, b: int, n: int, generator: torch.Generator) -> torch.Tensor:
    u = torch.rand(n, generator=generator, dtype=torch.float64).numpy()
    return torch.from_numpy(np.asarray(network.densities[b].sigma(u), dtype=np.float32))


def _prefix(
    network: ConvertedNetwork, b: int, env: Env, z: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator
) -> None:
    """Put block b's context into ``env``, without a gradient but through a stem of its own."""
    with torch.set_grad_enabled(network.stems[b] is not None):
        network.run_stem(env, b)
    if network.settings.context == "stem":
        return
    with torch.no_grad():
        if network.settings.context == "frozen":
            for a in range(b):
                network.run_context(env, a)
            return
        chain = [(z, sigma)]
        for a in reversed(range(b)):
            after, at = chain[0]
            before = torch.maximum(_draw_sigma(network, a, len(at), generator), at)
            noise = torch.randn(after.shape, generator=generator)
            chain.insert(0, (after + (before * before - at * at).clamp(min=0).sqrt()[:, None] * noise, before))
        for a in range(b):
            _, carried = network.run_block(env, a, *chain[a])
            network.advance(env, a, carried)
