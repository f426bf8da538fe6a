"""The loss of a block's samples: against the data's targets, or against the original network's own output (``teacher``), as the target defines it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusionblocks.converter.dataset import Dataset
from diffusionblocks.converter.draws import Draw, generator_of, sigma_of, tied_chain
from diffusionblocks.converter.feeding import TEACHER, FeatureCache, Feeder
from diffusionblocks.converter.network import ConvertedNetwork, Env
from diffusionblocks.converter.targets import Told
from diffusionblocks.converter.train_options import TrainOptions
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusionblocks.converter.train import Augment


DROPPED = 0.1
"""Share of samples without their class, where a class stands for none."""


class Objective(nn.Module):
    """Losses of block b's samples; what it trains are the block's own modules, as submodules.

    ``forward(step, drawn)`` -> losses [n] and sigma [n] of some of an update's samples.
    """

    def __init__(
        self,
        network: ConvertedNetwork,
        b: int,
        data: Dataset,
        options: TrainOptions,
        feeder: Feeder,
        *,
        cache: FeatureCache | None = None,
        augment: Augment | None = None,
    ) -> None:
        super().__init__()
        self.own = nn.ModuleList(module for _, module in network.own_modules(b))
        self._network = (network,)
        self.b, self.data, self.options, self.feeder = b, data, options, feeder
        self.cache, self.augment = cache, augment
        self.target = network.require_target()

    @property
    def network(self) -> ConvertedNetwork:
        return self._network[0]

    def forward(self, step: int, drawn: Draw, of: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            step: the update, for what augmentation draws.
            drawn: the draws of the whole update.
            of: which of its samples.
        """
        device, options = self.feeder.residence.device, self.options
        part = drawn.part(of)
        env, y = self._rows(step, drawn, of, device)
        sigma = sigma_of(self.network.densities[self.b], part.u[-1]).to(device)  # [n]
        taught = None
        if self.target.enters:
            y = self.target.from_inputs(env)
            z = self.target.noisy(y, sigma, part.noise[-1].to(device))
            env = self.target.entered(self._dropped(env, part.choice), z, sigma)
            if options.targets == "teacher":
                taught = self.feeder.original(env).float()
        elif options.targets == "teacher":
            taught = (env.pop(TEACHER) if TEACHER in env else self.feeder.original(env)).float()
            y = self.target.drawn(taught, part.choice.to(device))
        assert y is not None
        if not self.target.enters:
            z = self.target.noisy(y, sigma, part.noise[-1].to(device))  # [n, *positions, d]
        original = self._anchor(env)
        chain = tied_chain(self.network.densities, part, z, sigma) if self.network.settings.context == "carry" else ()
        if self.cache is None:
            self.feeder.feed(env, chain)
        f, carried = self.network.run_block(env, self.b, z, sigma)
        f = f.float()
        losses = self.target.losses(Told(f, z, sigma, y, taught), options.weighting)
        if options.clean:
            losses = losses + options.clean * self.target.clean_losses(f, y, taught)
        if carried is not None and original is not None:
            losses = losses + options.anchor * _distance(carried.float(), original.float())
        return losses, sigma

    def _anchor(self, env: Env) -> torch.Tensor | None:
        """The original's state after a block that carries, to which its own is held; made before the block's, so that nothing lies beside the weights that pass for it."""
        if not (self.network.blocks[self.b].carries and self.options.anchor):
            return None
        return self.feeder.state_after(self.network.inputs_env(env))

    def _rows(self, step: int, drawn: Draw, of: slice, device: torch.device) -> tuple[Env, torch.Tensor | None]:
        """The model's inputs (or what is cached of them) and the targets of some of an update's samples."""
        if self.cache is not None:
            rows = drawn.rows[of]
            needs = self.options.targets == "labels"
            return self.cache.env(rows, device), self._targets(rows).to(device) if needs else None
        if self.augment is None:
            batch = self.data.batch(drawn.rows[of].tolist())
            inputs = batch.inputs
        else:  # drawn for the whole update, so that it does not depend on how the update is divided
            batch = self.data.batch(drawn.rows.tolist())
            first = self.network.input_names[0]
            generator = generator_of(self.options.seed + 1, self.b, step)
            inputs = {**batch.inputs, first: self.augment(batch.inputs[first], generator)}
            inputs = {name: tensor[of] for name, tensor in inputs.items()}
        env = {name: tensor.to(device) for name, tensor in self.network.inputs_env(inputs).items()}
        y = batch.targets
        if y is not None and self.augment is not None:
            y = y[of]
        known = y is not None and self.options.targets == "labels"
        return env, self.target.as_target(y.to(device)) if known and y is not None else None

    def _dropped(self, env: Env, choice: torch.Tensor) -> Env:
        """The inputs with the class of none in place of the class, in a share of the samples, so that the block knows what guidance leads away from."""
        if self.options.null < 0:
            return env
        example = zip(self.network.input_names, self.network.analysis.captured.example, strict=True)
        own = self.target.denoiser
        labels = [
            n for n, t in example if t.dim() == 1 and not t.is_floating_point() and n not in (own.input, own.time)
        ]
        drop = (choice < DROPPED).to(next(iter(env.values())).device)
        return {**env, **{n: torch.where(drop, torch.full_like(env[n], self.options.null), env[n]) for n in labels}}

    def _targets(self, rows: torch.Tensor) -> torch.Tensor:
        found = self.data.batch(rows.tolist()).targets
        assert found is not None
        return self.target.as_target(found)


def _distance(state: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over the original's variance (0-d)."""
    return F.mse_loss(state, original) / original.var().clamp_min(1e-12)
