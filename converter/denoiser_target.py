"""A diffusion model's own noisy input as z: the model keeps its conditioning, and every block is a denoiser of its own noise levels, between the model's stem and head.

The loss is ``(D - y)^2`` with the weight under which it is the plain mean square of the model's own output (for ``edm`` EDM's), against an image, or against the original's D at the
same z where that teaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.targets import Layout, Schedule, Target, Told, beside, layout_of, unfit
from diffusionblocks.runtime import parameterisation, schedule
from diffusionblocks.runtime.errors import BadInput

if TYPE_CHECKING:
    from diffusionblocks.converter.network import Env

TIMES = ("timestep", "timesteps", "t", "time", "times", "noise_labels", "c_noise", "sigma", "sigmas")
"""Names that a model's time goes by."""


@dataclass(frozen=True)
class Denoiser:
    """What a diffusion model's output means; ``sigmas``: the noise levels of its time steps, ascending, none for ``edm``.

    ``input`` and ``time``: names of its noisy input and its time; '' where they are to be told by names and shapes.
    """

    parameterisation: str = "eps"
    sigmas: tuple[float, ...] = ()
    input: str = ""
    time: str = ""

    def __post_init__(self) -> None:
        if self.parameterisation not in parameterisation.KINDS:
            raise BadInput(
                f"The parameterisation {self.parameterisation!r} is not known.",
                hint=f"Use one of: {', '.join(parameterisation.KINDS)}.",
            )
        if self.parameterisation != "edm" and len(self.sigmas) < 2:
            raise BadInput(
                f"A model of the parameterisation {self.parameterisation} needs the noise levels of its time steps.",
                hint="Give --scheduler FILE, a scheduler_config.json of diffusers, or --parameterisation edm for a model that takes log(sigma) / 4.",
            )


class DenoiserTarget(Target):
    """z [N, *shape], laid as the model's noisy input; f may have further channels behind (a learned variance), which are left out."""

    kind, measure, weight = "denoiser", "loss", "edm"

    def __init__(self, layout: Layout, shape: tuple[int, ...], denoiser: Denoiser, time_dtype: torch.dtype) -> None:
        super().__init__(layout, shape[-1], parameterisation.SIGMA_DATA, "learned")
        self._shape, self.denoiser, self.time_dtype = shape, denoiser, time_dtype

    @property
    def positions(self) -> tuple[int, ...]:
        return self._shape[:-1]

    @property
    def choices(self) -> tuple[int, ...]:
        return ()

    def entered(self, env: Env, z: torch.Tensor, sigma: torch.Tensor) -> Env:
        """``env`` with the model's input and time at z [N, *shape] and sigma [N]."""
        own = self.denoiser
        times = parameterisation.time_of(own.parameterisation, sigma.detach().cpu().numpy(), own.sigmas)
        dtype = str(self.time_dtype).removeprefix("torch.")
        time = torch.from_numpy(parameterisation.as_time(times, dtype)).to(z.device)
        return {
            **env,
            own.input: beside(parameterisation.input_scale(own.parameterisation, sigma), z) * z,
            own.time: time,
        }

    def denoised(self, f: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """D of the model's output."""
        part = f[:, : self._shape[0]] if f.shape[1] != self._shape[0] else f
        found: torch.Tensor = parameterisation.denoised(self.denoiser.parameterisation, z, part, beside(sigma, z))
        return found

    def as_target(self, y: torch.Tensor) -> torch.Tensor:
        return y.float()

    def embedded(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def from_inputs(self, env: Env) -> torch.Tensor:
        return self.as_target(env[self.denoiser.input])

    def losses(self, of: Told, weighting: str) -> torch.Tensor:
        truth = of.y if of.taught is None else self.denoised(of.taught, of.z, of.sigma)
        losses = (self.denoised(of.f, of.z, of.sigma) - truth).square().flatten(1).mean(1)
        return (
            losses
            if weighting == "none"
            else losses * parameterisation.weight(self.denoiser.parameterisation, of.sigma)
        )

    def clean_losses(self, f: torch.Tensor, y: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
        raise BadInput("A diffusion model has no prediction without z.", hint="Leave --clean out.")

    def forward(
        self, z: torch.Tensor, f: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        denoised = self.denoised(f, z, sigma)
        return denoised, denoised, self.stepped(z, denoised, sigma, sigma_next)

    def read(self, f: torch.Tensor) -> torch.Tensor:
        return f

    def combined(self, predictions: torch.Tensor) -> torch.Tensor:
        return predictions[-1]

    def averaged(self, predictions: torch.Tensor) -> torch.Tensor:
        return predictions.mean(0)

    def row_losses(self, prediction: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (prediction.double() - y.double()).square().flatten(1).mean(1)

    def scores(self, prediction: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        return {"loss": float(self.row_losses(prediction, y).mean())}

    def decided(self, f: torch.Tensor) -> torch.Tensor:
        return f

    def check(self, y: np.ndarray[Any, Any]) -> None:
        if y.shape[1:] != self._shape or y.dtype.kind != "f":
            raise unfit(
                f"have the shape {y.shape} and the type {y.dtype}", f"images [N, {', '.join(map(str, self._shape))}]"
            )

    def partition_of(self, partition: str) -> str:
        return "equal-probability" if partition == "auto" else partition

    def scheduled(self, partition: str, count: int) -> Schedule:
        """Equal shares of the noise levels the model was trained on: uniform over its time steps, or EDM's log-normal."""
        if partition == "equal-information":
            raise BadInput(
                "The partition equal-information is for classes: of an image the less noisy z always says more.",
                hint="Use --partition equal-probability.",
            )
        if self.denoiser.parameterisation == "edm":
            return self.paper(count)
        sigmas = self.denoiser.sigmas
        shares = tuple(1 - i / (len(sigmas) - 1) for i in range(len(sigmas)))
        logs = np.log(sigmas)
        at = np.linspace(len(sigmas) - 1, 0, count + 1)
        edges = tuple(float(e) for e in np.exp(np.interp(at, np.arange(len(sigmas)), logs)))
        return edges, schedule.InformationDensity(edges[0], edges[-1], sigmas, shares).between


def denoiser_target(
    head: GraphPiece, names: Sequence[str], example: Sequence[torch.Tensor], denoiser: Denoiser
) -> DenoiserTarget:
    """The target of a diffusion model with inputs of these names.

    Raises:
        BadInput: no noisy input of the output's shape, or no time; names what there is.
    """
    layout, inputs = layout_of(head), dict(zip(names, example, strict=True))
    said = ", ".join(f"{n} {str(t.dtype).removeprefix('torch.')} {list(t.shape[1:])}" for n, t in inputs.items())
    output = None if layout is None else layout.shape
    noisy = [n for n, t in inputs.items() if t.is_floating_point() and output and _fits(tuple(t.shape[1:]), output)]
    times = [n for n, t in inputs.items() if t.dim() == 1]
    z = denoiser.input or (noisy[0] if noisy else "")
    named = [n for n in times if n in TIMES]
    floats = [n for n in times if inputs[n].is_floating_point()]
    time = denoiser.time or next(iter(named or (floats if len(floats) == 1 else [])), "")
    if z not in noisy or time not in times or layout is None:
        raise BadInput(
            f"The task diffusion needs a noisy input of the output's shape and a time [N]; this model takes {said} and makes {list(output or ())}.",
            hint="Name its arguments after those of diffusers (sample or hidden_states, timestep), or give another --task.",
        )
    own = Denoiser(denoiser.parameterisation, denoiser.sigmas, z, time)
    return DenoiserTarget(layout, tuple(inputs[z].shape[1:]), own, inputs[time].dtype)


def _fits(shape: tuple[int, ...], output: tuple[int, ...]) -> bool:
    """Whether an input may be denoised by an output: of its shape, or with twice its channels."""
    return len(shape) > 1 and shape[1:] == output[1:] and output[0] in (shape[0], 2 * shape[0])
