"""Which additions are residual units, one spelling a case, each with the number of its branches; and which only look like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusionblocks.converter.capture import capture
from diffusionblocks.converter.residual import Found, find_trunk
from torch import nn

C = 8
Forward = Callable[["Layers", torch.Tensor], torch.Tensor]


class Layers(nn.Module):
    """A few layers on [N, 8, 6, 6] and one spelling of what is done with them."""

    def __init__(self, spelling: Forward) -> None:
        super().__init__()
        self.spelling = spelling
        self.stem, self.norm, self.norm2 = nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.a, self.b, self.c = (nn.Conv2d(C, C, 3, padding=1) for _ in range(3))
        self.thick = nn.Conv2d(C, C, 1)
        self.thin = nn.Conv2d(C // 2, C // 2, 3, padding=1)
        self.up = nn.ConvTranspose2d(C, C, 2, stride=2)
        self.gamma = nn.Parameter(torch.ones(C, 1, 1))
        self.register_buffer("blur", torch.full((C, 1, 3, 3), 1 / 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spelling(self, self.stem(x))


def _found(spelling: Forward) -> Found:
    return find_trunk(capture(Layers(spelling).eval(), input_shape=(3, 6, 6)).graph)


def _mlp(m: Layers, z: torch.Tensor) -> torch.Tensor:
    return m.b(torch.relu(m.a(z)))


def _res2net(m: Layers, z: torch.Tensor) -> torch.Tensor:
    """The inner sum joins a chunk of z with what another chunk became: it is the branch's own, and the outer sum a unit."""
    left, right = m.a(z).chunk(2, dim=1)
    return z + m.b(torch.cat([left, m.thin(left) + right], dim=1))


def _two_streams(m: Layers, z: torch.Tensor) -> torch.Tensor:
    """Two branches are added for two streams together, of which each gets its part."""
    both = torch.cat([z, torch.tanh(z)], dim=2)
    part, _ = (_mlp(m, both) + m.thick(torch.relu(m.c(both)))).split([6, 6], dim=2)
    return z + m.gamma * part


def _blurred(m: Layers, z: torch.Tensor) -> torch.Tensor:
    return nn.functional.conv2d(z, m.blur, padding=1, groups=C)


UNITS: dict[str, tuple[Forward, int]] = {
    "identity": (lambda m, z: z + _mlp(m, z), 1),
    "identity, linear branch": (lambda m, z: z + m.a(z), 1),
    "addcmul": (lambda m, z: torch.addcmul(z, m.gamma, _mlp(m, z)), 1),
    "two branches": (lambda m, z: z + _mlp(m, z) + torch.relu(m.c(z)), 2),
    "a sum of branches": (lambda m, z: z + (_mlp(m, z) + m.thick(torch.relu(m.c(z)))), 2),
    "a scaled sum of branches": (lambda m, z: z + m.gamma * (_mlp(m, z) + m.thick(torch.relu(m.c(z)))), 2),
    "a sum of experts times a number": (lambda m, z: z + 0.5 * (_mlp(m, z) + m.thick(torch.relu(m.c(z)))), 1),
    "a sum of branches for two streams": (_two_streams, 2),
    "a stack of branches": (
        lambda m, z: z + torch.stack([_mlp(m, z), m.thick(torch.relu(m.c(z))), torch.tanh(m.a(z))]).sum(0),
        3,
    ),
    "a sum over positions": (lambda m, z: z + torch.stack([_mlp(m, z), m.c(z)], dim=-1).sum(-1), 1),
    "a skip of maxima beside means": (
        lambda m, z: torch.cat([z[:, :4].amax(2, True), z[:, :4].mean(2, True)], 1) + _mlp(m, z).amax(2, True),
        1,
    ),
    "an upsampled, projected skip": (lambda m, z: m.c(m.up(z)) + m.b(torch.relu(m.a(torch.relu(m.up(z))))), 1),
    "projected skip": (lambda m, z: m.c(z) + _mlp(m, z), 1),
    "a blurred, projected skip": (lambda m, z: m.thick(_blurred(m, z)) + m.b(_blurred(m, torch.relu(m.a(z)))), 1),
    "a norm for a skip": (lambda m, z: m.norm(z) + m.norm2(m.a(z)), 1),
    "kernels of one convolution": (lambda m, z: m.norm(z) + m.a(z) + m.b(z) + m.c(z), 1),
    "a gate made from the fork": (lambda m, z: z + torch.sigmoid(m.c(z)) * _mlp(m, z), 1),
    "chunks inside the branch": (_res2net, 1),
    "chunks of the fork itself": (
        lambda m, z: z + m.b(torch.cat([z[:, :4], m.thin(z[:, :4]) + z[:, 4:]], dim=1)),
        1,
    ),
}


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_with_its_branches(name: str) -> None:
    spelling, branches = UNITS[name]
    found = _found(spelling)
    assert [len(u.branches) for u in found.trunk] == [branches], found.refused


def _modulated(m: Layers, z: torch.Tensor) -> torch.Tensor:
    """Scale and shift of every position are halves of one tensor, and what is scaled comes from that tensor too."""
    scale, shift = torch.cat([z, torch.relu(z)], dim=1).chunk(2, dim=1)
    return m.norm(m.a(z)) * (1 + scale) + shift


NO_UNITS: dict[str, tuple[Forward, str]] = {
    "two linear layers": (lambda m, z: m.a(z) + m.b(z), "do not fork"),
    "a sum of linear layers": (lambda m, z: m.a(z) + m.b(z) + m.c(z), "do not fork"),
    "no layer in the branch": (lambda m, z: z + torch.sin(z), "no parameter"),
    "a broadcast shift": (lambda m, z: z + m.a(z).mean((2, 3), keepdim=True), "broadcast"),
    "a bias": (lambda m, z: z + m.gamma, "does not depend"),
    "a scale and its shift": (_modulated, "modulation"),
    "a skip of two tensors side by side": (
        lambda m, z: torch.cat([z[:, :4], torch.tanh(m.a(z))[:, :4]], 1) + torch.tanh(m.b(torch.relu(m.c(z)))),
        "do not fork",
    ),
    "a skip of two projections": (lambda m, z: m.thick(m.c(z)) + _mlp(m, torch.relu(m.a(z))), "do not fork"),
    "two nonlinear layers": (lambda m, z: torch.tanh(m.a(z)) + _mlp(m, z), "do not fork"),
}


@pytest.mark.parametrize("name", NO_UNITS)
def test_no_unit_and_the_reason(name: str) -> None:
    spelling, reason = NO_UNITS[name]
    found = _found(spelling)
    assert found.trunk == ()
    assert any(reason in r.reason for r in found.refused), found.refused


def test_a_skip_through_a_whole_unit_and_an_activation_is_none() -> None:
    """HRNet's fusion of two streams: only the unit of the first stream is one."""

    def fused(m: Layers, z: torch.Tensor) -> torch.Tensor:
        return torch.relu(z + _mlp(m, z)) + m.norm2(m.a(torch.relu(m.c(z))))

    found = _found(fused)
    assert len(found.trunk) == found.branches == 1


def test_what_a_layer_adds_inside_itself_is_one_branch() -> None:
    """Experts and a shared expert are summed by the layer that holds them; attention and MLP by the module that adds the skip."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert, self.shared = (nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Linear(C, C)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.expert(x) + self.shared(x)

    class Layer(nn.Module):
        def __init__(self, inside: bool) -> None:
            super().__init__()
            self.inside, self.both = inside, Shared()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (self.both(x) if self.inside else self.both.expert(x) + self.both.shared(x))

    for inside, branches in ((True, 1), (False, 2)):
        graph = capture(nn.Sequential(nn.Linear(4, C), Layer(inside), Layer(inside)).eval(), input_shape=(4,)).graph
        assert [len(u.branches) for u in find_trunk(graph).trunk] == [branches, branches]


def test_a_long_skip_through_a_copy_is_a_long_skip() -> None:
    def skipped(m: Layers, z: torch.Tensor) -> torch.Tensor:
        kept = z.clone()
        z = z + _mlp(m, z)
        z = z + torch.relu(m.c(z))
        return z + kept

    found = _found(skipped)
    assert len(found.trunk) == 2
    assert any("long skip" in r.reason for r in found.refused)


def test_learned_latents_are_a_fork() -> None:
    """Expanded to the batch they start a trunk like an embedding; the cut network is the original to the bit."""
    from diffusionblocks.converter import convert

    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(4, C))
            self.read = nn.Linear(C, C)
            self.norm, self.mlp, self.head = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.latents.expand(x.shape[0], -1, -1)
            z = z + (self.read(self.norm(z)) @ x.transpose(1, 2)).softmax(-1) @ x
            z = z + torch.relu(self.mlp(z))
            return self.head(z.mean(1))

    model = Latents().eval()
    network = convert(model, input_shape=(7, C), num_blocks=2)
    assert len(network.analysis.found.trunk) == 2
    for batch in (1, 5):
        x = torch.randn(batch, 7, C)
        with torch.no_grad():
            assert torch.equal(network.exact(x)[0], model(x))


def test_a_bias_that_every_layer_adds_to_its_scores_is_no_unit() -> None:
    """The bias (made from the input, or learned) reaches into each layer from outside; only the layers' own sums are units."""

    class Biased(nn.Module):
        def __init__(self, learned: bool) -> None:
            super().__init__()
            self.values, self.mlps = (nn.ModuleList(nn.Linear(C, C) for _ in range(3)) for _ in range(2))
            self.table = nn.Parameter(torch.randn(7, 7))
            self.position, self.learned = nn.Linear(C, 7), learned

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = self.table.expand(x.shape[0], 7, 7) if self.learned else self.position(x)
            for value, mlp in zip(self.values, self.mlps, strict=True):
                scores = x @ x.transpose(1, 2) + bias
                x = x + value(scores.softmax(-1) @ x)
                x = x + torch.relu(mlp(x))
            return x

    for learned in (True, False):
        found = find_trunk(capture(Biased(learned).eval(), input_shape=(7, C)).graph)
        assert found.branches == len(found.trunk) == 6
