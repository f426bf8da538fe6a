"""What a block denoises: y, as the noisy ``z = y + sigma eps``, per sample or at every position of a sequence or an image.

- ``label`` (``label_target``): one of K classes or tokens, y a row of a fixed table E.
- ``bits`` (``bit_target``): any of K classes, y one of two numbers for each.
- ``features`` (``feature_target``): numbers, such as the network's own final features.

f is the head's first output, in the head's own layout; z is [N, *positions, d].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.graph import is_tensor, op_name, value
from diffusionblocks.converter.units import TRANSPARENT
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.errors import BadInput
from torch import fx, nn

Schedule = tuple[tuple[float, ...], Callable[[float, float], Any]]
"""Edges, descending, and what makes the training density between two noise levels."""


@dataclass(frozen=True)
class Layout:
    """Where things lie in the head's first output: channels (classes, features) along ``axis``, None where a sample is one number; all other
    dimensions but the first are positions of these sizes."""

    channels: int
    axis: int | None
    positions: tuple[int, ...]

    def last(self, f: torch.Tensor) -> torch.Tensor:
        """f with its channels last, [N, *positions, channels]."""
        if self.axis is None:
            return f.unsqueeze(-1)
        return f if self.axis == len(self.positions) + 1 else f.movedim(self.axis, -1)

    def back(self, f: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`last`."""
        if self.axis is None:
            return f.squeeze(-1)
        return f if self.axis == len(self.positions) + 1 else f.movedim(-1, self.axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample of the head's first output."""
        if self.axis is None:
            return ()
        sizes = list(self.positions)
        sizes.insert(self.axis - 1, self.channels)
        return tuple(sizes)


@dataclass(frozen=True)
class Told:
    """What a loss is computed of: f in the head's layout, z, sigma [N], y as :meth:`Target.as_target` gives it, and the original network's output where it teaches."""

    f: torch.Tensor
    z: torch.Tensor
    sigma: torch.Tensor
    y: torch.Tensor
    taught: torch.Tensor | None = None


class Target(nn.Module, ABC):
    """One sampling step, and everything training asks of a target.

    ``forward(z [N, *positions, d], f, sigma [N], sigma_next [N])`` -> the prediction in f's layout, D like z, the next z.
    """

    kind: str
    measure: str
    """Which of :meth:`scores` is the mean of :meth:`row_losses`."""
    denoiser: Any = None
    """What a diffusion model says of its own noisy input, where z is that."""
    masking: Any = None
    """What a masked language model says of its own tokens, where z is those."""
    weight = "none"
    """What the weighting ``auto`` stands for."""
    reads_z = True
    """Whether blocks are conditioned on z beside its noise level."""
    causal = False
    """Whether z of a position must not reach those before it."""

    def __init__(self, layout: Layout, dim: int, sigma_data: float, evidence: str) -> None:
        super().__init__()
        self.layout, self.dim, self.sigma_data, self.evidence = layout, dim, sigma_data, evidence

    @property
    def positions(self) -> tuple[int, ...]:
        return self.layout.positions

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample of z."""
        return (*self.positions, self.dim)

    @property
    def num_classes(self) -> int:
        """K; 0 where the target is no class."""
        return 0

    @property
    def choices(self) -> tuple[int, ...]:
        """How many uniform numbers a sample needs for :meth:`drawn`, as a shape."""
        return self.positions

    def noisy(self, y: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """``z = y + sigma eps``; y as :meth:`as_target` gives it, sigma [N], noise [N, *positions, d]."""
        return self.embedded(y) + beside(sigma, noise) * noise

    def stepped(
        self, z: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
    ) -> torch.Tensor:
        """One Euler step."""
        return schedule.euler_step(z, denoised, beside(sigma, z), beside(sigma_next, z))

    @property
    def enters(self) -> bool:
        """Whether z is an input of the network's own, so that it gets no other conditioning and the inputs tell y."""
        return self.denoiser is not None or self.masking is not None

    @property
    def of_text(self) -> bool:
        """Whether data are windows of a text, which are their own targets."""
        return self.causal or self.masking is not None

    def entered(self, env: Any, z: torch.Tensor, sigma: torch.Tensor) -> Any:
        """The network's inputs at z and sigma: themselves, where z is no input of its own."""
        return env

    def from_inputs(self, env: Any) -> torch.Tensor:
        """y by the network's inputs, where z is one of them."""
        raise NotImplementedError

    def interval(self, upper: float, lower: float, overlap: float, edges: Sequence[float]) -> tuple[float, float]:
        """The noise levels a block between two edges is trained on."""
        return schedule.widen(upper, lower, overlap, edges[0], edges[-1])

    @abstractmethod
    def as_target(self, y: torch.Tensor) -> torch.Tensor:
        """y of the data in the type it is computed with."""

    @abstractmethod
    def embedded(self, y: torch.Tensor) -> torch.Tensor:
        """y as what is denoised, [N, *positions, d]."""

    def drawn(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """y by the original network's own output: itself, or drawn by u [N, *choices] in [0, 1) where it is a distribution."""
        return self.layout.last(f)

    @abstractmethod
    def losses(self, of: Told, weighting: str) -> torch.Tensor:
        """Losses [N] of f given z."""

    @abstractmethod
    def clean_losses(self, f: torch.Tensor, y: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
        """Losses [N] of f alone."""

    @abstractmethod
    def read(self, f: torch.Tensor) -> torch.Tensor:
        """The prediction that the original network's output is."""

    @abstractmethod
    def combined(self, predictions: torch.Tensor) -> torch.Tensor:
        """The predictions of several steps [S, N, ...] as one."""

    @abstractmethod
    def averaged(self, predictions: torch.Tensor) -> torch.Tensor:
        """The predictions of several draws of noise [S, N, ...] as one."""

    @abstractmethod
    def row_losses(self, prediction: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What a prediction is wrong by, [N] in float64."""

    @abstractmethod
    def scores(self, prediction: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        """Figures of merit for people and logs."""

    @abstractmethod
    def decided(self, f: torch.Tensor) -> torch.Tensor:
        """y as the original network's output has it, where the data has none."""

    @abstractmethod
    def check(self, y: np.ndarray[Any, Any]) -> None:
        """Refuse targets that do not fit.

        Raises:
            BadInput: says what was expected.
        """

    def partition_of(self, partition: str) -> str:
        """The partition that ``auto`` stands for."""
        return "equal-information" if partition == "auto" else partition

    @abstractmethod
    def scheduled(self, partition: str, count: int) -> Schedule:
        """Noise levels between ``count`` blocks; ``partition``: ``auto``, ``equal-information`` or ``equal-probability``."""

    def paper(self, count: int) -> Schedule:
        """The paper's partition."""
        paper = schedule.PAPER

        def between(upper: float, lower: float) -> Any:
            return schedule.LogNormalDensity(upper, lower, paper.p_mean, paper.p_std)

        return schedule.equal_probability_edges(count), between

    def informed(self, table: torch.Tensor, count: int) -> Schedule:
        """Equal shares of what z says of y, for the rows of ``table`` [K, d]."""
        edges, curve = schedule.equal_information_edges(table.numpy(), count)
        return edges, curve.between


CHUNK, LARGE = 256, 1 << 24


def chunk_of(target: Target) -> int:
    """How many rows' predictions are held at once."""
    classes = max(target.num_classes, 1) if target.kind == "label" else 1
    return max(1, min(CHUNK, LARGE // max(math.prod(target.layout.shape), math.prod(target.positions) * classes)))


def averaged(scores: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The scores of several chunks of rows, weighted by their number of rows."""
    total = sum(n for n, _ in scores)
    return {name: sum(n * of[name] for n, of in scores) / total for name in scores[0][1]}


def beside(sigma: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """sigma [N] so that it broadcasts over z [N, ...]."""
    for _ in range(z.dim() - 1):
        sigma = sigma[..., None]
    return sigma


def layout_of(head: GraphPiece) -> Layout | None:
    """The layout of a head's first output; None where it is no floating-point tensor with a batch in front and all other sizes fixed."""
    node = head.outputs[0]
    if not is_tensor(node) or not value(node).is_floating_point() or not value(node).dim():
        return None
    sizes = tuple(value(node).shape[1:])
    if isinstance(value(node).shape[0], int) or not all(isinstance(s, int) for s in sizes):
        return None
    if not sizes:
        return Layout(1, None, ())
    axis = _channel_axis(node)
    return Layout(sizes[axis - 1], axis, (*sizes[: axis - 1], *sizes[axis:]))


def _channel_axis(node: fx.Node) -> int:
    """The dimension of classes or features: behind a convolution the second, behind a linear layer the last; else by the number of dimensions."""
    rank = int(value(node).dim())
    source = node
    while True:
        name = op_name(source)
        if name.startswith(("conv", "upsample", "pixel_shuffle")) or name in ("batch_norm", "group_norm"):
            return 1
        if name in ("linear", "addmm", "layer_norm", "rms_norm"):
            return rank - 1
        keeps = torch.Tag.pointwise in getattr(source.target, "tags", ()) or name in TRANSPARENT
        inputs = [n for n in source.all_input_nodes if is_tensor(n) and value(n).dim() == rank]
        if not keeps or not inputs:
            return 1 if rank > 3 else rank - 1
        source = inputs[0]


def classifier_rows(head: fx.GraphModule) -> torch.Tensor | None:
    """Weight [K, d] of the linear layer that makes the head's first output, None where it does not end in one."""
    node = _classifier(head)
    return None if node is None else head.get_parameter(str(node.args[1].target)).detach()  # type: ignore[union-attr]


def renew_classifier(head: fx.GraphModule, classes: int, seed: int) -> bool:
    """Give the head's last linear layer fresh weights for another number of classes; False where it does not end in one."""
    node = _classifier(head)
    if node is None:
        return False
    names = [str(a.target) for a in node.args[1:] if isinstance(a, fx.Node)]
    fresh = nn.Linear(int(head.get_parameter(names[0]).shape[1]), classes)
    nn.init.normal_(fresh.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(fresh.bias)
    for name, parameter in zip(names, (fresh.weight, fresh.bias), strict=False):
        path, _, last = name.rpartition(".")
        setattr(head.get_submodule(path), last, nn.Parameter(parameter.detach().clone()))
    return True


def _classifier(head: fx.GraphModule) -> fx.Node | None:
    """The linear layer that makes the head's first output."""
    output = next(n for n in head.graph.nodes if n.op == "output")
    node = output.args[0][0]
    while op_name(node) in TRANSPARENT and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node if op_name(node) == "linear" and node.args[1].op == "get_attr" else None


def unfit(what: str, expected: str) -> BadInput:
    """A refusal of targets that do not fit."""
    return BadInput(f"The targets {what}; expected {expected}.", hint="Give them as y (docs/training.md).")
