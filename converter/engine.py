"""One block's training: its weights, gradients and moments are the only ones there are; it can be stopped at any update and goes on to the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusionblocks.converter import blocks as block_tools
from diffusionblocks.converter import state as states
from diffusionblocks.converter.dataset import Dataset
from diffusionblocks.converter.draws import Draw, draw, generator_of, shares, step_seed
from diffusionblocks.converter.feeding import FeatureCache, Feeder
from diffusionblocks.converter.mapped import release
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.objective import Objective
from diffusionblocks.converter.recompute import lean, recomputed
from diffusionblocks.converter.residence import Residence
from diffusionblocks.converter.room import enough
from diffusionblocks.converter.train_options import BlockLog, TrainOptions
from diffusionblocks.runtime.errors import BadInput
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from diffusionblocks.converter.train import Augment

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[int, int, int, float], None]
Validate = Callable[[int, int], dict[str, Any]]


@dataclass(frozen=True)
class Team:
    """The ranks that share a block: this one's place among them, and their process group."""

    rank: int = 0
    size: int = 1
    group: distributed.ProcessGroup | None = None


@dataclass(frozen=True)
class Keeping:
    """Where a block's training is kept (a folder), and every how many updates; ``every`` 0 keeps nothing."""

    folder: Path | None = None
    every: int = 0
    validate_every: int = 0


def train_block(
    network: ConvertedNetwork,
    b: int,
    data: Dataset,
    options: TrainOptions,
    residence: Residence,
    *,
    augment: Augment | None = None,
    progress: Progress | None = None,
    keeping: Keeping | None = None,
    team: Team | None = None,
    validate: Validate | None = None,
) -> BlockLog:
    """Train block b in place, from where ``keeping`` says it stood.

    Raises:
        BadInput: the loss is no number (names block, update and sigma), too little memory, or what is kept does not fit.
    """
    keeping, team = keeping or Keeping(), team or Team()
    with enough(network, b, options, residence.device):
        return _train(network, b, data, options, residence, keeping, team, augment, progress, validate)


def _train(
    network: ConvertedNetwork,
    b: int,
    data: Dataset,
    options: TrainOptions,
    residence: Residence,
    keeping: Keeping,
    team: Team,
    augment: Augment | None,
    progress: Progress | None,
    validate: Validate | None,
) -> BlockLog:
    modules = [module for _, module in network.own_modules(b)]
    trained = _trained(network, b)
    release(network.contexts[b].module.parameters())  # what was copied from there
    with residence.active(b), _batch_statistics(network, modules):
        optimizer = _optimizer(list(trained.values()), options)
        average = {n: p.detach().clone() for n, p in trained.items()} if options.ema else {}
        kept = states.BlockState(network.own_tensors(b), trained, optimizer, average)
        record = BlockLog(b, options, threads=torch.get_num_threads())
        record.trained_parameters = sum(p.numel() for p in trained.values())
        start = 0
        if keeping.folder is not None and states.exists(keeping.folder):
            about = kept.load(keeping.folder)
            start, record = int(about["updates"]), BlockLog.from_json(about["log"])
        feeder = Feeder(network, b, residence)
        cache = _cache(feeder, data, options, keeping, augment)
        objective = Objective(network, b, data, options, feeder, cache=cache, augment=augment)
        with _recomputed(network, b, options), torch.random.fork_rng(devices=_devices(residence.device)):
            loop = _Loop(objective, kept, record, residence.device, team)
            loop.run(start, keeping, progress, validate)
        record.training_bytes = _training_bytes(modules, optimizer)
        optimizer.zero_grad(set_to_none=True)
        for name, value in average.items():
            with torch.no_grad():
                trained[name].copy_(value)
    network.trained[b] = True
    return record


class _Loop:
    """The updates of one block."""

    def __init__(
        self, objective: Objective, kept: states.BlockState, record: BlockLog, device: torch.device, team: Team
    ) -> None:
        self.objective, self.kept, self.record, self.device, self.team = objective, kept, record, device, team
        self.options, self.b = objective.options, objective.b
        self.parameters = list(kept.trained.values())
        self.model: nn.Module = objective
        if team.size > 1:
            self.model = DistributedDataParallel(objective, process_group=team.group, gradient_as_bucket_view=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.options.precision == "fp16")  # type: ignore[attr-defined]
        self.sigma = torch.empty(0)

    def run(self, start: int, keeping: Keeping, progress: Progress | None, validate: Validate | None) -> None:
        options, record, began = self.options, self.record, time.monotonic() - self.record.seconds
        every = max(1, options.steps // 50)
        for step in range(start, options.steps):
            loss = self._update(step)
            if step % every == 0 or step == options.steps - 1:
                record.step.append(step)
                record.loss.append(loss)
                if progress is not None:
                    progress(self.b, step + 1, options.steps, loss)
            done = step + 1
            record.seconds = time.monotonic() - began
            if validate is not None and keeping.validate_every and done % keeping.validate_every == 0:
                record.validation.append({"updates": done, **validate(self.b, done)})
            if keeping.folder is not None and keeping.every and done % keeping.every == 0 and done < options.steps:
                self._keep(keeping.folder, done)
        record.seconds = time.monotonic() - began

    def _keep(self, folder: Path, updates: int) -> None:
        if self.team.rank == 0:
            self.kept.save(folder, {"updates": updates, "log": self.record.to_json()})

    def _update(self, step: int) -> float:
        """One update; the mean loss of this rank's samples."""
        options, network = self.options, self.objective.network
        levels = self.b + 1 if network.settings.context == "carry" else 1
        rows = len(self.objective.data)
        count = min(options.batch_size, rows)
        drawn = draw(
            generator_of(options.seed, self.b, step),
            rows=rows,
            batch=count,
            shape=self.objective.target.shape,
            choices=self.objective.target.choices,
            levels=levels,
        )
        torch.manual_seed(step_seed(options.seed, self.b, step, 1 + self.team.rank))
        optimizer = self.kept.optimizer
        for group in optimizer.param_groups:
            assert options.lr is not None
            group["lr"] = options.lr * warmup_cosine(step, options.steps)
        optimizer.zero_grad(set_to_none=True)
        parts = list(shares(count, parts=options.accumulate, rank=self.team.rank, ranks=self.team.size))
        total = sum(self._backward(step, drawn, of, count, last=of is parts[-1]) for of in parts)
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, options.clip)
        if not self.scaler.is_enabled() and not bool(torch.isfinite(norm)):
            raise NotFinite(self.b, step, "gradient", float(norm), self.sigma)
        self.scaler.step(optimizer)
        self.scaler.update()
        with torch.no_grad():
            for name, value in self.kept.average.items():
                value.lerp_(self.kept.trained[name], 1 - options.ema)
        return total / max(sum(of.stop - of.start for of in parts), 1)

    def _backward(self, step: int, drawn: Draw, of: slice, count: int, *, last: bool) -> float:
        alone = isinstance(self.model, DistributedDataParallel) and not last
        waiting = self.model.no_sync() if alone else nullcontext()  # type: ignore[operator]
        with waiting:
            with autocast(self.device, self.options.precision):
                losses, sigma = self.model(step, drawn, of)
            loss = losses.sum() / count * self.team.size  # the ranks' gradients are averaged
            self.sigma = sigma
            if not bool(torch.isfinite(loss)):
                at = (~torch.isfinite(losses)).nonzero().flatten()[:1]
                raise NotFinite(self.b, step, "loss", float(losses[at].sum().detach()), sigma[at])
            self.scaler.scale(loss).backward()
        return float(losses.detach().sum())


class NotFinite(BadInput):
    """A loss or gradient that is no number: ``sigma`` holds the noise levels of the samples it comes from."""

    def __init__(self, block: int, step: int, what: str, value: float, sigma: torch.Tensor) -> None:
        low, high = float(sigma.min()), float(sigma.max())
        at = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        super().__init__(
            f"The {what} of block {block} is {value} at update {step}, where sigma is {at}.",
            hint="Lower the learning rate (--lr) or train in float32 (--precision); the last checkpoint is kept.",
        )
        self.block, self.step, self.sigma = block, step, sigma


def autocast(device: torch.device, precision: str) -> Any:
    """Products in half precision, or nothing."""
    return torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else nullcontext()


def warmup_cosine(step: int, steps: int) -> float:
    """The factor of the peak rate: up in a tenth of the updates, then down to 0 along half a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))


def _trained(network: ConvertedNetwork, b: int) -> dict[str, nn.Parameter]:
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in network.own_modules(b)
        for name, parameter in block_tools.select_trainable(module, network.tune_of(prefix))
    }


def _optimizer(parameters: list[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    decayed = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    assert options.lr is not None
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, options.lr, weight_decay=options.weight_decay, fused=options.fused)


@contextmanager
def _batch_statistics(network: ConvertedNetwork, modules: list[Any]) -> Iterator[None]:
    own = network.settings.tune == "block"
    for module in modules if own else ():
        block_tools.set_batch_norm_training(module, True)
    try:
        yield
    finally:
        for module in modules if own else ():
            block_tools.set_batch_norm_training(module, False)


@contextmanager
def _recomputed(network: ConvertedNetwork, b: int, options: TrainOptions) -> Iterator[None]:
    """Block b meanwhile written so that it keeps less for its backward pass; with gradient checkpointing, where that is asked for."""
    plain = network.blocks[b]
    ends = [unit.add.name for unit in network.units_of(b)]
    module = recomputed(plain.module, ends) if options.checkpointing else lean(plain.module)
    network.blocks[b] = block_tools.Block(module, plain.sides, plain.units, plain.parameters)
    try:
        yield
    finally:
        network.blocks[b] = plain


def _cache(
    feeder: Feeder, data: Dataset, options: TrainOptions, keeping: Keeping, augment: Augment | None
) -> FeatureCache | None:
    if not options.cache_features:
        return None
    network = feeder.network
    changes = network.settings.context == "carry" or network.settings.ends == "own" or network.require_target().enters
    if changes or augment is not None or keeping.folder is None:
        raise BadInput(
            "What feeds this block changes from update to update, so it cannot be cached.",
            hint="--cache-features works with --context stem and frozen and --ends shared, without augmentation, where checkpoints are kept.",
        )
    folder = keeping.folder / "features"
    teacher = options.targets == "teacher"
    return FeatureCache(feeder, data, folder, teacher=teacher, device=feeder.residence.device)


def _devices(device: torch.device) -> list[int]:
    return [] if device.type == "cpu" else [device.index or 0]


def _training_bytes(modules: list[Any], optimizer: torch.optim.Optimizer) -> int:
    weights = {p for m in modules for p in m.parameters()}
    total = sum(p.numel() * p.element_size() for p in weights)
    total += sum(p.grad.numel() * p.grad.element_size() for p in weights if p.grad is not None)
    for state in optimizer.state.values():
        total += sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
    return total
