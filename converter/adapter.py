"""Learned entries and readouts: a linear map between two stream shapes (pooling over positions, 1x1 projection of channels).

A block whose state has another shape than the stem's (context ``stem``) or than what the head reads gets one. Pooling is the adaptive
average over the positions of each axis, written as constant matrices, so that it exports for any pair of sizes.
"""

from __future__ import annotations

import torch
from torch import nn


def adaptive_pool_matrix(inputs: int, outputs: int) -> torch.Tensor:
    """Row o averages the inputs floor(o*I/O) .. ceil((o+1)*I/O): the rule of ``adaptive_avg_pool1d``; [outputs, inputs]."""
    matrix = torch.zeros(outputs, inputs)
    for o in range(outputs):
        start, end = o * inputs // outputs, -((-(o + 1) * inputs) // outputs)
        matrix[o, start:end] = 1.0 / (end - start)
    return matrix


class Adapter(nn.Module):
    """Maps [N, ..source..] to [N, ..target..]; ``*_channel`` is the channel dimension in the batched shape.

    Position axes are matched one to one where both sides have as many, else flattened to one. Channels are projected by one linear layer,
    initialised to the identity on the channels both sides have.
    """

    def __init__(
        self, source: tuple[int, ...], source_channel: int, target: tuple[int, ...], target_channel: int
    ) -> None:
        super().__init__()
        self.source_channel, self.target_channel, self.target = source_channel, target_channel, target
        source_axes = [s for d, s in enumerate(source, 1) if d != source_channel]
        target_axes = [s for d, s in enumerate(target, 1) if d != target_channel]
        self.flat = len(source_axes) != len(target_axes)
        if self.flat:
            source_axes, target_axes = [_product(source_axes)], [_product(target_axes)]
        self.target_axes = [s for d, s in enumerate(target, 1) if d != target_channel]
        self.pooled = [i for i, (a, b) in enumerate(zip(source_axes, target_axes, strict=True)) if a != b]
        for i in self.pooled:
            self.register_buffer(f"pool_{i}", adaptive_pool_matrix(source_axes[i], target_axes[i]).T, persistent=False)
        inputs, outputs = source[source_channel - 1], target[target_channel - 1]
        self.projection = nn.Linear(inputs, outputs)
        with torch.no_grad():
            nn.init.eye_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
            if outputs > inputs:
                nn.init.xavier_uniform_(self.projection.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(self.source_channel, -1)  # [N, *positions, channels]
        if self.flat:
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        for i in self.pooled:
            x = (x.transpose(i + 1, -1) @ getattr(self, f"pool_{i}")).transpose(i + 1, -1)
        x = self.projection(x)
        if self.flat:
            x = x.reshape(x.shape[0], *self.target_axes, x.shape[-1])
        return x.movedim(-1, self.target_channel)


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


class Rows(nn.Module):
    """[N, R, ...] as [N x R, ...] (``fold``), or back: where a state has its positions as rows of the batch and another has not."""

    def __init__(self, rows: int, *, fold: bool) -> None:
        super().__init__()
        self.rows, self.fold = rows, fold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1) if self.fold else x.unflatten(0, (-1, self.rows))
