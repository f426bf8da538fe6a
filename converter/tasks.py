"""What a network's first output is, by its task, and so what its blocks denoise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusionblocks.converter.bit_target import bit_target
from diffusionblocks.converter.cut import GraphPiece
from diffusionblocks.converter.denoiser_target import denoiser_target
from diffusionblocks.converter.feature_target import feature_target
from diffusionblocks.converter.label_target import LabelTarget, label_target, new_table
from diffusionblocks.converter.masked_target import masked_target
from diffusionblocks.converter.settings import Settings
from diffusionblocks.converter.targets import Layout, Target, classifier_rows
from diffusionblocks.converter.token_target import token_target
from diffusionblocks.runtime.errors import BadInput

WANTED = {
    "classification": "logits of two or more classes, [N, K] or also at every position",
    "multi-label": "log-odds, [N, K]",
    "regression": "numbers of a fixed shape behind the batch",
    "features": "numbers of a fixed shape behind the batch",
    "lm": "logits of the next token at every position, [N, T, K]",
    "mdm": "logits of every token of its first input [N, T], [N, T, K]",
}


def target_of_task(
    head: GraphPiece, settings: Settings, names: Sequence[str], example: Sequence[torch.Tensor]
) -> Target | None:
    """The target of a head of a network with inputs of these ``names``; None where the task is ``auto`` and the head's first output is no row of logits.

    Raises:
        BadInput: the first output is not what the task needs.
    """
    task = settings.task
    target: Target | None
    if task == "diffusion":
        assert settings.denoiser is not None
        return denoiser_target(head, names, example, settings.denoiser)
    if task in ("auto", "classification"):
        target = label_target(head, settings.evidence, settings.seed, dense=task != "auto")
    elif task == "mdm":
        target = masked_target(head, names, example, settings.mask_token)
    elif task == "lm":
        target = token_target(head, settings.evidence, settings.seed)
    elif task == "multi-label":
        target = bit_target(head, settings.evidence)
    else:
        target = feature_target(head, settings.evidence, each=task == "regression")
    if target is None and task != "auto":
        raise BadInput(
            f"The task {task} needs a first output of {WANTED[task]}; this model's has another shape.",
            hint="Give another --task, or wrap the model so that its first output is that.",
        )
    return target


def new_labels_target(head: GraphPiece, target: Target | None, settings: Settings) -> LabelTarget:
    """The target of classes the original does not know.

    Raises:
        BadInput: the head does not end in a linear layer that makes a row of logits.
    """
    if not isinstance(target, LabelTarget) or target.positions or classifier_rows(head.module) is None:
        raise BadInput(
            "New labels need a network whose first output is made by a linear layer, a row of logits a sample.",
            hint="Replace the model's last layer yourself, and convert that.",
        )
    table = new_table(settings.new_labels, settings.seed)
    return LabelTarget(table, settings.evidence, Layout(settings.new_labels, 1, ()))
