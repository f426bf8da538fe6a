"""Several labels a sample (multi-label): for each of K classes one of two numbers, +a where it holds and -a where not.

The classes are independent given x, so that Bayes' rule adds to the log-odds f_k what z says of each: ``log p(z_k | +a) - log p(z_k | -a) = 2 a z_k / sigma^2``.
With a = 1/sqrt(K) a sample of y has norm 1, as a row of a label's table has.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.targets import Layout, Schedule, Target, Told, beside, layout_of, unfit
from diffusionblocks.runtime import schedule
from torch.nn import functional as F


class BitTarget(Target):
    """K answers yes or no, z [N, K]."""

    kind, measure = "bits", "cross_entropy"

    def __init__(self, layout: Layout, evidence: str) -> None:
        self.size = layout.channels**-0.5
        super().__init__(layout, layout.channels, self.size, evidence)

    @property
    def num_classes(self) -> int:
        return self.dim

    @property
    def choices(self) -> tuple[int, ...]:
        return (*self.positions, self.dim)

    def as_target(self, y: torch.Tensor) -> torch.Tensor:
        return self._rows(y).float()

    def _rows(self, y: torch.Tensor) -> torch.Tensor:
        return self.layout.last(y) if y.dim() == len(self.layout.shape) + 1 else y[..., None]

    def embedded(self, y: torch.Tensor) -> torch.Tensor:
        return self.size * (2 * y - 1)

    def drawn(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return (u < self.layout.last(f).double().sigmoid()).float()

    def evidence_of(self, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What z says for each class against its contrary, in log-odds like z."""
        return 2 * self.size * z / beside(sigma * sigma, z)

    def training_logits(self, f: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Log-odds f with the evidence of z added, where it is analytic."""
        return f if self.evidence == "learned" else f + self.evidence_of(z, sigma)

    def losses(self, of: Told, weighting: str) -> torch.Tensor:
        believed, truth = self.training_logits(self.layout.last(of.f), of.z, of.sigma), of.y
        if of.taught is not None:
            truth = (self.layout.last(of.taught) + self.evidence_of(of.z, of.sigma)).sigmoid()
        losses = _binary(believed, truth)
        return losses * schedule.edm_weight(of.sigma, self.sigma_data) if weighting == "edm" else losses

    def clean_losses(self, f: torch.Tensor, y: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
        return _binary(self.layout.last(f), y if taught is None else self.layout.last(taught).sigmoid())

    def forward(
        self, z: torch.Tensor, f: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        odds = self.training_logits(self.layout.last(f), z, sigma)
        denoised = self.size * torch.tanh(odds / 2)
        return F.logsigmoid(f), denoised, self.stepped(z, denoised, sigma, sigma_next)

    def read(self, f: torch.Tensor) -> torch.Tensor:
        return F.logsigmoid(f)

    def combined(self, predictions: torch.Tensor) -> torch.Tensor:
        return F.logsigmoid(predictions.double().sub(_missed(predictions)).mean(0)).float()

    def averaged(self, predictions: torch.Tensor) -> torch.Tensor:
        return predictions.logsumexp(0) - math.log(len(predictions))

    def row_losses(self, prediction: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        held = self.layout.last(prediction).double()
        missed = _missed(held)
        truth = self.as_target(y).double()
        return -(truth * held + (1 - truth) * missed).flatten(1).mean(1)

    def scores(self, prediction: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        held = self.layout.last(prediction).exp() > 0.5
        return {
            "accuracy": float((held == (self.as_target(y) > 0.5)).double().mean()),
            "cross_entropy": float(self.row_losses(prediction, y).mean()),
        }

    def decided(self, f: torch.Tensor) -> torch.Tensor:
        return (f > 0).float()

    def check(self, y: np.ndarray[Any, Any]) -> None:
        fits = y.shape[1:] in (self.layout.shape, *([self.positions] if self.dim == 1 else []))
        if not fits or not bool(((y == 0) | (y == 1)).all()):
            wanted = "N" + "".join(f", {n}" for n in self.layout.shape)
            raise unfit(
                f"have the shape {y.shape} and values from {y.min(initial=0)} to {y.max(initial=0)}",
                f"0 and 1, [{wanted}], one answer a class",
            )

    def scheduled(self, partition: str, count: int) -> Schedule:
        return (
            self.paper(count)
            if partition == "equal-probability"
            else self.informed(torch.tensor([[self.size], [-self.size]]), count)
        )


def bit_target(head: GraphPiece, evidence: str) -> BitTarget | None:
    """The target of a head whose first output is log-odds; None where it is no floating-point tensor of fixed sizes."""
    layout = layout_of(head)
    return None if layout is None else BitTarget(layout, evidence)


def _missed(held: torch.Tensor) -> torch.Tensor:
    """log(1 - p) of log p, in float64."""
    return torch.log(-torch.expm1(held.double().clamp(max=-1e-12)))


def _binary(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean of each sample's cross-entropies, [N]."""
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none").flatten(1).mean(1)
