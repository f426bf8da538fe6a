"""Numbers to denoise: a regression's, or the network's own final features, standardised to EDM's spread of 0.5.

With the standardised y's spread s and ``c_skip = s^2 / (sigma^2 + s^2)`` (Karras et al. 2022):

- ``learned``: EDM's preconditioning, ``D = c_skip z + sigma / sqrt(sigma^2 + s^2) f``, where f, the head's own output, is EDM's F times s. The network must read z; the
  prediction is D.
- ``analytic``: for y | x ~ N(f(x), s^2) Bayes' rule gives ``D = c_skip z + (1 - c_skip) f``. Blocks do not read z (else f would make up for every error of s by adding multiples of
  z, which at inference is no noisy y: docs/design.md), and the prediction is f.

The loss is ``(D - y)^2`` with EDM's weight, ``(sigma^2 + s^2) / (sigma s)^2`` a sample; where f does not read z its mean over the noise is known, and is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.targets import Layout, Schedule, Target, Told, beside, layout_of, unfit
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.errors import BadInput

SPREAD = 0.5
"""sigma_data of EDM, for which the paper's noise levels are made."""


class FeatureTarget(Target):
    """y [N, *positions, d] with its ``mean`` [d] and ``scale`` [d] (buffers): ``(y - mean) / scale`` has the spread 0.5.

    ``each``: every channel has a scale of its own (a regression's, which may have other units), or all have one (features).
    """

    kind, measure, weight = "features", "squared_error", "edm"
    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layout: Layout, evidence: str, *, each: bool) -> None:
        super().__init__(layout, layout.channels, SPREAD, evidence)
        self.each, self.settled, self.reads_z = each, False, evidence == "learned"
        self.register_buffer("mean", torch.zeros(layout.channels))
        self.register_buffer("scale", torch.ones(layout.channels))

    def settle(self, y: torch.Tensor) -> None:
        """Take mean and scale from some rows of y, in the head's layout."""
        rows = self._rows(y).double().flatten(0, -2)  # [M, d]
        mean = rows.mean(0)
        deviation = (rows - mean).square().mean(0)
        deviation = deviation if self.each else deviation.mean().expand(self.dim)
        scale = deviation.sqrt() / SPREAD
        self.load(mean.float(), torch.where(scale > 1e-8, scale, torch.ones_like(scale)).float())

    def load(self, mean: torch.Tensor, scale: torch.Tensor) -> None:
        """Take what an earlier :meth:`settle` found; mean and scale [d]."""
        self.mean, self.scale, self.settled = mean.clone(), scale.clone(), True

    def _rows(self, y: torch.Tensor) -> torch.Tensor:
        """y with its channels last; one number a sample may come with or without a dimension of its own."""
        shape = self.layout.shape
        return self.layout.last(y if y.dim() == len(shape) + 1 else y.reshape(len(y), *shape))

    def as_target(self, y: torch.Tensor) -> torch.Tensor:
        return self._rows(y).float()

    def embedded(self, y: torch.Tensor) -> torch.Tensor:
        return (y - self.mean) / self.scale

    def denoised(self, f: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """D of z and f, both [N, *positions, d] and standardised."""
        skip = schedule.c_skip(beside(sigma, z), SPREAD)
        if self.evidence == "analytic":
            return skip * z + (1 - skip) * f
        return skip * z + schedule.c_out(beside(sigma, z), SPREAD) / SPREAD * f

    def losses(self, of: Told, weighting: str) -> torch.Tensor:
        standard, truth, sigma = self.embedded(self.layout.last(of.f)), self.embedded(of.y), of.sigma
        if self.reads_z:
            losses = (self.denoised(standard, of.z, sigma) - truth).square().flatten(1).mean(1)
        else:
            skip = schedule.c_skip(sigma, SPREAD)
            losses = (1 - skip).square() * (standard - truth).square().flatten(1).mean(1) + (skip * sigma).square()
        return losses if weighting == "none" else losses * schedule.edm_weight(sigma, SPREAD)

    def clean_losses(self, f: torch.Tensor, y: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
        error = self.embedded(self.layout.last(f)) - self.embedded(y)
        return error.square().flatten(1).mean(1) / SPREAD**2

    def forward(
        self, z: torch.Tensor, f: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        denoised = self.denoised(self.embedded(self.layout.last(f)), z, sigma)
        prediction = f if self.evidence == "analytic" else self.layout.back(denoised * self.scale + self.mean)
        return prediction, denoised, self.stepped(z, denoised, sigma, sigma_next)

    def read(self, f: torch.Tensor) -> torch.Tensor:
        return f

    def combined(self, predictions: torch.Tensor) -> torch.Tensor:
        return predictions.mean(0)

    def averaged(self, predictions: torch.Tensor) -> torch.Tensor:
        return predictions.mean(0)

    def row_losses(self, prediction: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        error = self.layout.last(prediction).double() - self._rows(y).double()
        return (error / self.scale.double() / SPREAD).square().flatten(1).mean(1)

    def scores(self, prediction: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        found, truth = self.layout.last(prediction).double(), self._rows(y).double()
        spread = (truth - truth.flatten(0, -2).mean(0)).square().flatten(0, -2).mean(0)  # [d]
        missed = (found - truth).square().flatten(0, -2).mean(0)
        weight = self.scale.double().square()
        explained = 1 - float((missed / weight).sum() / (spread / weight).sum().clamp(min=1e-300))
        return {"explained": explained, "squared_error": float(self.row_losses(prediction, y).mean())}

    def decided(self, f: torch.Tensor) -> torch.Tensor:
        return f

    def check(self, y: np.ndarray[Any, Any]) -> None:
        fits = y.shape[1:] in (self.layout.shape, *([self.positions] if self.dim == 1 else []))
        if not fits or y.dtype.kind not in "fiub":
            wanted = "N" + "".join(f", {n}" for n in self.layout.shape)
            raise unfit(
                f"have the shape {y.shape} and the type {y.dtype}", f"numbers [{wanted}], as the model's output"
            )
        if y.dtype.kind == "f" and not np.isfinite(y).all():
            raise BadInput("Some targets are NaN or infinity.", hint="Remove or repair those rows.")

    def partition_of(self, partition: str) -> str:
        return "equal-probability" if partition == "auto" else partition

    def scheduled(self, partition: str, count: int) -> Schedule:
        if partition == "equal-information":
            raise BadInput(
                "The partition equal-information is for classes: of numbers the less noisy z always says more.",
                hint="Use --partition equal-probability, the paper's.",
            )
        return self.paper(count)


def feature_target(head: GraphPiece, evidence: str, *, each: bool) -> FeatureTarget | None:
    """The target of a head whose first output is numbers; None where it is no floating-point tensor of fixed sizes."""
    layout = layout_of(head)
    return None if layout is None else FeatureTarget(layout, evidence, each=each)
