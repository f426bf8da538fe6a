"""A label or token as the noisy row of one fixed table E.

E has unit-norm rows: the classifier's own where the head ends in a linear layer, else seeded random ones. It is never trained. With
``z = E_y + sigma eps`` independent of x given y, Bayes' rule gives ``p(y|x,z) ~ p(y|x) exp(<z,E_y>/sigma^2 - |E_y|^2/(2 sigma^2))``: the
analytic evidence is that exponent, added to the head's f ~ log p(y|x) in training and in the sampler, never in the prediction.

Where the original teaches, k is drawn from its q, ``z = E_k + sigma eps``, and by Bayes' rule the target is softmax(log q + evidence), in which z says the
same of k as it says to the block. The cross-entropy against it is least where f = log q up to a constant.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.targets import Layout, Schedule, Target, Told, beside, classifier_rows, layout_of, unfit
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.errors import BadInput
from torch.nn import functional as F

RANDOM_DIM = 64
IGNORED = -100
"""The label of a position that is not to be learned."""


class LabelTarget(Target):
    """The table E [K, d] (a buffer) of one of K classes a sample, or a position."""

    kind, measure = "label", "cross_entropy"
    table: torch.Tensor

    def __init__(self, table: torch.Tensor, evidence: str, layout: Layout | None = None) -> None:
        rows = F.normalize(table.detach().float(), dim=-1)
        sigma_data = rows.shape[1] ** -0.5 if rows.is_meta else float(rows.square().mean().sqrt())
        super().__init__(layout or Layout(len(rows), 1, ()), int(rows.shape[1]), sigma_data, evidence)
        self.register_buffer("table", rows)

    @property
    def num_classes(self) -> int:
        return int(self.table.shape[0])

    def as_target(self, y: torch.Tensor) -> torch.Tensor:
        return y.long()

    def embedded(self, y: torch.Tensor) -> torch.Tensor:
        if not self.positions:
            return self.table[y]
        return self.table[y.clamp(min=0)] * (y >= 0)[..., None]

    def drawn(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return picked(self.layout.last(f).log_softmax(-1), u)

    def training_logits(self, f: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """f [N, *positions, K] with the evidence of z added, where it is analytic."""
        return f if self.evidence == "learned" else f + self.evidence_of(z, sigma)

    def evidence_of(self, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What z [N, *positions, d] says of each class, log p(z | k) up to a constant, [N, *positions, K]."""
        variance = beside(sigma * sigma, z)
        return (z @ self.table.T - 0.5 * self.table.square().sum(-1)) / variance

    def losses(self, of: Told, weighting: str) -> torch.Tensor:
        believed = self.training_logits(self.layout.last(of.f), of.z, of.sigma)
        if of.taught is None:
            losses = _cross_entropy(believed, of.y)
        else:
            known = self.layout.last(of.taught).log_softmax(-1)
            truth = (known + self.evidence_of(of.z, of.sigma)).softmax(-1)
            losses = _mean(-(truth * believed.log_softmax(-1)).sum(-1))
        return losses * schedule.edm_weight(of.sigma, self.sigma_data) if weighting == "edm" else losses

    def clean_losses(self, f: torch.Tensor, y: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
        f = self.layout.last(f)
        if taught is None:
            return _cross_entropy(f, y)
        return _mean(-(self.layout.last(taught).softmax(-1) * f.log_softmax(-1)).sum(-1))

    def forward(
        self, z: torch.Tensor, f: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        f = self.layout.last(f)
        denoised = self.training_logits(f, z, sigma).softmax(-1) @ self.table
        return self.layout.back(f.log_softmax(-1)), denoised, self.stepped(z, denoised, sigma, sigma_next)

    def read(self, f: torch.Tensor) -> torch.Tensor:
        return self.layout.back(self.layout.last(f).log_softmax(-1))

    def combined(self, predictions: torch.Tensor) -> torch.Tensor:
        return self.read(predictions.mean(0))

    def averaged(self, predictions: torch.Tensor) -> torch.Tensor:
        return predictions.logsumexp(0) - math.log(len(predictions))

    def row_losses(self, prediction: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _cross_entropy(self.layout.last(prediction).double(), y.long())

    def scores(self, prediction: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        known = y.long() >= 0
        right = (self.layout.last(prediction).argmax(-1) == y)[known]
        return {
            "accuracy": float(right.double().mean()) if len(right) else 0.0,
            "cross_entropy": float(self.row_losses(prediction, y).mean()),
        }

    def decided(self, f: torch.Tensor) -> torch.Tensor:
        return self.layout.last(f).argmax(-1)

    def check(self, y: np.ndarray[Any, Any]) -> None:
        least = 0 if not self.positions else IGNORED
        if y.shape[1:] != self.positions or y.dtype.kind not in "iu":
            if not self.positions:
                raise BadInput(
                    f"The labels have the shape {y.shape} and the type {y.dtype}.",
                    hint="Give one integer a row, as y.",
                )
            raise unfit(
                f"have the shape {y.shape} and the type {y.dtype}",
                f"integers [N, {', '.join(map(str, self.positions))}], one class a position, {IGNORED} where none is to be learned",
            )
        low, high = int(y.min(initial=0)), int(y.max(initial=0))
        if (low < 0 and least == 0) or low < least or (y[y < 0] != IGNORED).any() or high >= self.num_classes:
            raise BadInput(
                f"The labels reach from {y.min()} to {y.max()}; the model has the classes 0 to {self.num_classes - 1}.",
                hint="Renumber the labels, give a model with as many outputs as there are classes, or convert with --new-labels K.",
            )

    def scheduled(self, partition: str, count: int) -> Schedule:
        return self.paper(count) if partition == "equal-probability" else self.informed(self.table, count)


def label_target(head: GraphPiece, evidence: str, seed: int, *, dense: bool = False) -> LabelTarget | None:
    """The target of a head whose first output is logits of more than one class: [N, K], or with ``dense`` also at every position; else None."""
    layout = layout_of(head)
    if layout is None or layout.axis is None or layout.channels < 2 or (layout.positions and not dense):
        return None
    rows = classifier_rows(head.module)
    if rows is None or len(rows) != layout.channels or not (rows.is_meta or bool((rows.norm(dim=-1) > 0).all())):
        rows = new_table(layout.channels, seed)
    return LabelTarget(rows.clone(), evidence, layout)


def new_table(classes: int, seed: int) -> torch.Tensor:
    """E for classes of which nothing is known: random rows [classes, 64]."""
    return torch.randn(classes, RANDOM_DIM, generator=torch.Generator().manual_seed(seed))


def picked(log_probabilities: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Classes [...] drawn from log-probabilities [..., K] by u [...] in [0, 1)."""
    cumulated = log_probabilities.double().exp().cumsum(-1)
    return (cumulated <= u[..., None] * cumulated[..., -1:]).sum(-1).clamp(max=log_probabilities.shape[-1] - 1)


def _cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[N, *positions, K] and labels [N, *positions] -> the mean over each sample's positions that have a label, [N]."""
    if y.dim() == 1:
        return F.cross_entropy(logits, y, reduction="none")
    losses = F.cross_entropy(logits.movedim(-1, 1), y, reduction="none", ignore_index=IGNORED).flatten(1)
    return losses.sum(1) / (y != IGNORED).flatten(1).sum(1).clamp(min=1)


def _mean(losses: torch.Tensor) -> torch.Tensor:
    """The mean over each sample's positions, [N]."""
    return losses if losses.dim() == 1 else losses.flatten(1).mean(1)
