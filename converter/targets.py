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
        return f if self.evidence == "learned" else f + self.evidence_of(z, sigma)

    def evidence_of(self, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What z [N, d] says of each class, log p(z | k) up to a constant, [N, K]."""
        variance = (sigma * sigma)[:, None]
        return (z @ self.table.T - 0.5 * self.table.square().sum(-1)) / variance

    def forward(
        self, z: torch.Tensor, f: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        denoised = self.training_logits(f, z, sigma).softmax(-1) @ self.table
        z_next = schedule.euler_step(z, denoised, sigma[:, None], sigma_next[:, None])
        return f.log_softmax(-1), denoised, z_next


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


def new_table(classes: int, seed: int) -> torch.Tensor:
    """E for classes of which nothing is known: random rows [classes, 64]."""
    return torch.randn(classes, RANDOM_DIM, generator=torch.Generator().manual_seed(seed))


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
    return new_table(classes, seed)
