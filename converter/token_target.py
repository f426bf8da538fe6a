"""The next token at every position of a causal language model: z at position t is the noisy row of the token at t + 1.

z is injected per position by AdaLN, so that no mask is rewritten and the sequence is not doubled: z_t reaches the positions from t on alone, which is where the true token t + 1 is
known or is being told. A unit whose state has no such positions, or a network in which a token changes what comes before it, would tell the answer, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.dataset import Batch, Dataset, Wrapped
from diffusionblocks.converter.label_target import IGNORED, LabelTarget, label_target
from diffusionblocks.converter.texts import MASK
from diffusionblocks.runtime.errors import BadInput

if TYPE_CHECKING:
    from diffusionblocks.converter.network import ConvertedNetwork

TOLERANCE = 1e-4


class TokenTarget(LabelTarget):
    """A label at every position of [N, T], E the rows of the classifier or seeded random ones."""

    causal = True


def token_target(head: GraphPiece, evidence: str, seed: int) -> TokenTarget | None:
    """The target of a head whose first output is logits [N, T, K]; None for any other."""
    found = label_target(head, evidence, seed, dense=True)
    if found is None or len(found.positions) != 1 or found.layout.axis != 2:
        return None
    return TokenTarget(found.table, evidence, found.layout)


def check_causal(network: ConvertedNetwork) -> None:
    """Refuse a network whose inputs are no tokens, or in which the last token changes the predictions before it.

    Raises:
        BadInput: with what was seen.
    """
    captured, length = network.analysis.captured, network.require_target().positions[0]
    tokens = captured.example[0]
    if tokens.is_floating_point() or tuple(tokens.shape[1:]) != (length,):
        raise BadInput(
            f"The task lm needs tokens [N, T] as the first input and logits [N, T, K] as the first output; this model takes {tokens.dtype} {list(tokens.shape)} and "
            f"makes logits of {length} positions.",
            hint="Give another --task; for a class of a whole text classification.",
        )
    example: dict[str, torch.Tensor] = dict(zip(network.input_names, captured.example, strict=True))
    inputs = {name: tensor[: captured.rows].clone() for name, tensor in example.items()}
    before = network.exact(inputs)[0]
    first = network.input_names[0]
    inputs[first][:, -1] = (inputs[first][:, -1] + 1) % network.require_target().num_classes
    after = network.exact(inputs)[0]
    moved = (after - before)[:, :-1].abs().amax() if length > 1 else before.new_zeros(())
    if bool(moved > TOLERANCE * before.abs().amax()):
        raise BadInput(
            f"The task lm is for causal language models; in this model the last token changes predictions before it (by up to {float(moved):.2g}).",
            hint="Use --task classification for labels at every position, or features to learn the model's own output.",
        )


class NextTokens(Wrapped):
    """A dataset of tokens whose targets are the next tokens: :data:`IGNORED` at the end of a window, and where the mask leaves the next token out."""

    def __init__(self, data: Dataset, tokens: str) -> None:
        """
        Args:
            data: has the input ``tokens``, integers [N, T], and perhaps ``attention_mask``.
        """
        super().__init__(data, "next")
        self.tokens = tokens

    def batch(self, rows: Sequence[int]) -> Batch:
        """As the dataset's, with targets int64 [N, T]."""
        inputs = self.data.batch(rows).inputs
        targets = inputs[self.tokens].long().roll(-1, 1)
        targets[:, -1] = IGNORED
        mask = inputs.get(MASK)
        if mask is not None:
            targets[:, :-1][mask[:, 1:] == 0] = IGNORED
        return Batch(inputs, targets)
