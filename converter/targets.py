"""What a block denoises: a label, as the noisy row of one fixed table E.

E has unit-norm rows: the classifier's own where the head ends in a linear layer, else seeded random ones. It is never trained. With
``z = E_y + sigma eps`` independent of x given y, Bayes' rule gives ``p(y|x,z) ~ p(y|x) exp(<z,E_y>/sigma^2 - |E_y|^2/(2 sigma^2))``: the
analytic evidence is that exponent, added to the head's f ~ log p(y|x) in training and in the sampler, never in the prediction.
"""

from __future__ import annotations

import torch
from diffusionblocks.converter.graph import is_tensor, op_name, value
from diffusionblocks.converter.units import TRANSPARENT
from diffusionblocks.runtime import schedule
from torch import fx, nn
from torch.nn import functional as F

RANDOM_DIM = 64


class LabelTarget(nn.Module):
    """The table E [K, d] (a buffer), and one sampling step.

    ``forward(z [N,d], f [N,K], sigma [N], sigma_next [N])`` -> log-softmax(f) [N,K], D [N,d], the next z [N,d].
    """

    table: torch.Tensor

    def __init__(self, table: torch.Tensor, evidence: str) -> None:
        super().__init__()
        self.register_buffer("table", F.normalize(table.detach().float(), dim=-1))
        self.evidence = evidence
        self.sigma_data = float(self.table.square().mean().sqrt())

    @property
    def num_classes(self) -> int:
        return int(self.table.shape[0])

    @property
    def dim(self) -> int:
        return int(self.table.shape[1])

    def noisy(self, labels: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """``z = E_y + sigma eps``; labels [N], sigma [N], noise [N, d] -> [N, d]."""
        return self.table[labels] + sigma[:, None] * noise

    def training_logits(self, f: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """f [N, K] with the evidence of z [N, d] added, where it is analytic."""
        if self.evidence == "learned":
            return f
        variance = (sigma * sigma)[:, None]
        return f + (z @ self.table.T - 0.5 * self.table.square().sum(-1)) / variance

    def forward(
        self, z: torch.Tensor, f: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        denoised = self.training_logits(f, z, sigma).softmax(-1) @ self.table
        z_next = schedule.euler_step(z, denoised, sigma[:, None], sigma_next[:, None])
        return f.log_softmax(-1), denoised, z_next


def classifier_rows(head: fx.GraphModule) -> torch.Tensor | None:
    """Weight [K, d] of the linear layer that makes the head's first output, None where it does not end in one."""
    output = next(n for n in head.graph.nodes if n.op == "output")
    node = output.args[0][0]
    while op_name(node) in TRANSPARENT and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if op_name(node) != "linear" or node.args[1].op != "get_attr":
        return None
    return head.get_parameter(str(node.args[1].target)).detach()


def label_table(head: fx.GraphModule, seed: int) -> torch.Tensor | None:
    """E for a head whose first output is [N, K] floating-point logits, K > 1; None for any other head."""
    output = next(n for n in head.graph.nodes if n.op == "output").args[0][0]
    if not isinstance(output, fx.Node) or not is_tensor(output) or value(output).dim() != 2:
        return None
    classes = value(output).shape[1]
    if not isinstance(classes, int):  # each row with each other, as two towers compare them: as many as rows
        return None
    if classes < 2 or not value(output).is_floating_point():
        return None
    rows = classifier_rows(head)
    if rows is not None and len(rows) == classes and bool((rows.norm(dim=-1) > 0).all()):
        return rows.clone()
    return torch.randn(classes, RANDOM_DIM, generator=torch.Generator().manual_seed(seed))
