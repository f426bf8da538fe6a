"""A masked diffusion language model's own tokens as z: the model fills in hidden tokens, and every block owns an equal decrement of the share that is hidden.

The first block owns the most hidden. A token is hidden with the probability t, each by itself; the loss is the continuous-time ELBO of the linear schedule (MD4: Shi, Han, Wang, Doucet,
Titsias 2024), ``E_t [1/t sum over hidden tokens of -log p]``, whose mean over the blocks bounds the nats of a text. There is no noise level beside the tokens, which show t themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.graph import op_name, value
from diffusionblocks.converter.targets import Layout, Schedule, Target, Told, layout_of, unfit
from diffusionblocks.converter.texts import MASK
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.errors import BadInput
from torch import fx
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusionblocks.converter.network import ConvertedNetwork, Env


@dataclass(frozen=True)
class Masking:
    """``token`` stands for a hidden one in the input ``input``; ``mask``: the input that is 0 where a position is left out, '' where there is none."""

    token: int
    input: str
    mask: str = ""


class MaskedTarget(Target):
    """z int64 [N, T]: tokens, some of them hidden; y int64 [N, T], where -1 - k is a token k that is neither hidden nor learned."""

    kind, measure, weight = "masked", "loss", "elbo"

    def __init__(self, layout: Layout, masking: Masking) -> None:
        super().__init__(layout, layout.positions[0], 1.0, "learned")
        self.masking = masking

    @property
    def positions(self) -> tuple[int, ...]:
        return ()

    @property
    def num_classes(self) -> int:
        return self.layout.channels

    def from_inputs(self, env: Env) -> torch.Tensor:
        tokens = self.as_target(env[self.masking.input])
        left_out = tokens == self.masking.token
        if self.masking.mask:
            left_out = left_out | (env[self.masking.mask] == 0)
        return torch.where(left_out, -1 - tokens, tokens)

    def as_target(self, y: torch.Tensor) -> torch.Tensor:
        return y.long()

    def embedded(self, y: torch.Tensor) -> torch.Tensor:
        return torch.where(y < 0, -1 - y, y)

    def noisy(self, y: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Tokens of y [N, T], hidden where the normal distribution function of the noise [N, T] is below sigma [N]."""
        hidden = (torch.special.ndtr(noise) < sigma[:, None]) & (y >= 0)
        return torch.where(hidden, self.masking.token, self.embedded(y))

    def entered(self, env: Env, z: torch.Tensor, sigma: torch.Tensor) -> Env:
        return {**env, self.masking.input: z.to(env[self.masking.input].dtype)}

    def log_probabilities(self, f: torch.Tensor) -> torch.Tensor:
        """Of each token at every position, [N, T, K]; none is hidden."""
        f = self.layout.last(f)
        if self.masking.token < self.layout.channels:
            never = torch.arange(self.layout.channels, device=f.device) == self.masking.token
            f = f.masked_fill(never, -torch.inf)
        return f.log_softmax(-1)

    def losses(self, of: Told, weighting: str) -> torch.Tensor:
        hidden, known = of.z == self.masking.token, of.y >= 0
        hidden = hidden & known
        log = self.log_probabilities(of.f)
        if of.taught is None:
            wrong = -log.gather(-1, of.y.clamp(min=0)[..., None])[..., 0]  # [N, T]
        else:
            truth = self.log_probabilities(of.taught).exp()
            wrong = -(truth * log.nan_to_num(neginf=0.0)).sum(-1)
        total = torch.where(hidden, wrong, torch.zeros_like(wrong)).sum(-1)
        if weighting == "none":
            return total / hidden.sum(-1).clamp(min=1)
        return total / known.sum(-1).clamp(min=1) / of.sigma

    def clean_losses(self, f: torch.Tensor, y: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
        raise BadInput("A masked language model has no prediction without z.", hint="Leave --clean out.")

    def forward(
        self, z: torch.Tensor, f: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return (self.read(f),)

    def read(self, f: torch.Tensor) -> torch.Tensor:
        return self.layout.back(self.log_probabilities(f))

    def combined(self, predictions: torch.Tensor) -> torch.Tensor:
        return predictions[-1]

    def averaged(self, predictions: torch.Tensor) -> torch.Tensor:
        return predictions.logsumexp(0) - float(np.log(len(predictions)))

    def row_losses(self, prediction: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        wrong = F.cross_entropy(
            self.layout.last(prediction).double().movedim(-1, 1), y.long().clamp(min=0), reduction="none"
        )
        return torch.where(y >= 0, wrong, torch.zeros_like(wrong)).sum(-1) / (y >= 0).sum(-1).clamp(min=1)

    def scores(self, prediction: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        return {"loss": float(self.row_losses(prediction, y).mean())}

    def decided(self, f: torch.Tensor) -> torch.Tensor:
        return self.log_probabilities(f).argmax(-1)

    def check(self, y: np.ndarray[Any, Any]) -> None:
        if y.shape[1:] != self.shape or y.dtype.kind not in "iu":
            raise unfit(f"have the shape {y.shape} and the type {y.dtype}", f"tokens, integers [N, {self.dim}]")

    def partition_of(self, partition: str) -> str:
        return "equal-decrements"

    def scheduled(self, partition: str, count: int) -> Schedule:
        if partition != "auto":
            raise BadInput(
                f"The partition {partition} divides noise levels; a masked language model has shares of hidden tokens.",
                hint="Leave --partition out: blocks get equal decrements of that share.",
            )
        return schedule.masked_edges(count), schedule.UniformDensity

    def interval(self, upper: float, lower: float, overlap: float, edges: Sequence[float]) -> tuple[float, float]:
        return schedule.widen(upper, lower, overlap, edges[0], edges[-1], linear=True)


def masked_target(
    head: GraphPiece, names: Sequence[str], example: Sequence[torch.Tensor], token: int
) -> MaskedTarget | None:
    """The target of a head whose first output is logits [N, T, K] of a network with inputs of these names, the first of them tokens [N, T]; None for any other."""
    layout, first = layout_of(head), example[0]
    if layout is None or layout.axis != 2 or len(layout.positions) != 1 or layout.channels < 2:
        return None
    if first.is_floating_point() or tuple(first.shape[1:]) != layout.positions:
        return None
    return MaskedTarget(layout, Masking(token, names[0], MASK if MASK in names else ""))


def check_masked(network: ConvertedNetwork) -> None:
    """Refuse a hidden token that the network has no embedding for, and a network that only looks back.

    Raises:
        BadInput: with what was seen.
    """
    masking = network.require_target().masking
    captured = network.analysis.captured
    rows = _embedded(captured.graph, masking.input)
    if masking.token < 0 or (rows is not None and masking.token >= rows):
        raise BadInput(
            f"The hidden token is {masking.token}; the model has {'' if rows is None else f'embeddings for 0 to {rows - 1}' if rows else 'none'}.",
            hint="Give --mask-token K, a token the model knows and no text holds.",
        )
    example: Env = dict(zip(network.input_names, captured.example, strict=True))
    inputs = {name: tensor[: captured.rows].clone() for name, tensor in example.items()}
    length = inputs[masking.input].shape[1]
    before = network.exact(inputs)[0]
    inputs[masking.input][:, -1] = masking.token
    after = network.exact(inputs)[0]
    moved = (after - before)[:, :-1].abs().amax() if length > 1 else before.new_ones(())
    if not bool(moved > 0):
        raise BadInput(
            "The task mdm is for models that read a text to both sides; in this model no token changes a prediction before it.",
            hint="Use --task lm for a causal language model.",
        )


def _embedded(graph: fx.GraphModule, name: str) -> int | None:
    """The rows of the embedding that an input of this name is looked up in; None where none is seen."""
    for node in graph.graph.nodes:
        if op_name(node) == "embedding":
            source = node.args[1]
            while isinstance(source, fx.Node) and source.op != "placeholder" and len(source.all_input_nodes) == 1:
                source = source.all_input_nodes[0]
            if isinstance(source, fx.Node) and source.op == "placeholder" and str(source.target) == name:
                return int(value(node.args[0]).shape[0])
    return None
