"""Recurrent depth: units applied again with the same weights are found, are one block, trained in one pass, applied any number of times, stored once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.analysis import analyse
from diffusionblocks.converter.capture import capture
from diffusionblocks.converter.cli import main
from diffusionblocks.converter.graph import op_name
from diffusionblocks.converter.loop import Loop, loop_of
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.residual import find_trunk
from diffusionblocks.converter.training_run import open_for_training
from diffusionblocks.export import export_bundle
from diffusionblocks.export.verify import verify_bundle
from diffusionblocks.runtime import open_bundle
from diffusionblocks.runtime.errors import BadInput, BundleError
from torch import nn
from torch.nn import functional as F

WIDTH, LENGTH, TOKENS = 16, 8, 12


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Attention(nn.Module):
    """A causal unit on [N, T, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Looped(nn.Module):
    """[N, 64] -> [N, 10]: ``before`` units of their own, ``period`` units ``count`` times, ``behind`` units of their own."""

    def __init__(self, *, before: int = 0, period: int = 1, count: int = 4, behind: int = 0, inputs: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(inputs, WIDTH)
        self.before, self.core, self.behind = (
            nn.Sequential(*(Unit() for _ in range(n))) for n in (before, period, behind)
        )
        self.count, self.norm, self.head = count, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(self.stem(x))
        for _ in range(self.count):
            x = self.core(x)
        return self.head(self.norm(self.behind(x)))


class Huginn(nn.Module):
    """Tokens [N, 8] -> logits [N, 8, 12]: a prelude, a core that reads its state and the prelude's output at every application, a coda (Geiping et al. 2025)."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.position = nn.Embedding(TOKENS, WIDTH), nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.prelude, self.coda = nn.Sequential(Attention(), Unit()), nn.Sequential(Attention(), Unit())
        self.adapter, self.core = nn.Linear(2 * WIDTH, WIDTH), nn.Sequential(Attention(), Unit())
        self.count, self.norm, self.head = count, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        e = self.prelude(self.embedding(tokens) + self.position)
        s = torch.zeros_like(e)
        for _ in range(self.count):
            s = self.core(self.adapter(torch.cat([s, e], -1)))
        return self.head(self.norm(self.coda(s)))


def albert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=TOKENS,
        embedding_size=WIDTH,
        hidden_size=WIDTH,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        num_labels=4,
    )
    return transformers.AlbertForSequenceClassification(config)


TEXT = (torch.arange(3 * LENGTH).reshape(3, LENGTH) % TOKENS,)
CASES: dict[str, tuple[Any, tuple[torch.Tensor, ...], Loop | None]] = {
    "one unit": (Looped, (torch.randn(3, 64),), Loop(0, 1, 4)),
    "two units": (lambda: Looped(period=2, count=3), (torch.randn(3, 64),), Loop(0, 2, 3)),
    "with units around": (lambda: Looped(before=2, period=2, count=3, behind=1), (torch.randn(3, 64),), Loop(2, 2, 3)),
    "Huginn": (Huginn, TEXT, Loop(2, 2, 5)),
    "ALBERT": (albert, TEXT, Loop(0, 2, 5)),
    "own weights": (lambda: Looped(before=4, period=1, count=1), (torch.randn(3, 64),), None),
}


@pytest.mark.parametrize("case", CASES)
def test_loops_are_found(case: str):
    make, example, expected = CASES[case]
    assert loop_of(find_trunk(capture(make().eval(), example).graph)) == expected


def test_weights_that_come_back_without_a_period_are_no_loop():
    class Back(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Unit(), Unit(), Unit()
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.a(self.c(self.b(self.a(x)))))

    assert loop_of(find_trunk(capture(Back().eval(), (torch.randn(3, WIDTH),)).graph)) is None


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][2]])
def test_the_original_is_kept_to_the_bit_and_one_application_is_the_block(case: str):
    make, example, loop = CASES[case]
    model = make().eval()
    task = "lm" if case == "Huginn" else "auto"
    network = convert(model, example, recurrent=True, task=task)
    assert network.num_blocks == 1
    with torch.no_grad():
        out = model(*example)
    assert torch.equal(network.exact(example)[0], out if isinstance(out, torch.Tensor) else out.logits)
    assert len(network.units_of(0)) == loop.period
    linear = {
        part: sum(op_name(n) == "linear" for n in module.graph.nodes)
        for part, module in (("block", network.blocks[0].module.body), ("whole", network.contexts[0].module))
    }
    between = (loop.count - 1) * (case == "Huginn")  # the adapter, which the block reads once, in the stem
    assert linear["whole"] == loop.count * linear["block"] + between
    assert {p.data_ptr() for n, p in network.blocks[0].module.named_parameters() if "conditioner" not in n} <= {
        p.data_ptr() for p in network.contexts[0].module.parameters()
    }


def test_one_application_is_the_network_that_applies_it_once():
    """Untrained, a step of the block is the stem, the core once, the head."""
    looped, once = Looped(period=2, count=4), Looped(period=2, count=1)
    once.load_state_dict(looped.state_dict())
    network = convert(looped.eval(), (torch.randn(3, 64),), recurrent=True)
    x = torch.randn(4, 64)
    with torch.no_grad():
        expected = once(x).log_softmax(-1)
    assert torch.equal(network.denoise(x, steps=1), expected)


def trained(tmp: Path, digits: tuple[np.ndarray, np.ndarray]) -> tuple[ConvertedNetwork, Path]:
    network = convert(Looped(period=1, count=6).eval(), (torch.randn(3, 64),), recurrent=True, scratch=True)
    finetune(network, digits[0][:1400], digits[1][:1400], steps=300, lr=5e-3)
    return network, export_bundle(network, tmp / "looped.dblocks")


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]
) -> tuple[ConvertedNetwork, Path]:
    return trained(tmp_path_factory.mktemp("recurrent"), digits)


@pytest.mark.road
def test_one_pass_training_learns_and_any_number_of_applications_runs(made: Any, digits: Any):
    network, bundle = made
    x, y = digits[0][1400:], digits[1][1400:]
    with open_bundle(bundle) as opened:
        assert opened.manifest.decoding.steps == opened.manifest.applications == 6
        for steps in (1, 6, 15):
            found = opened.run(x, "denoise", steps=steps)
            assert (found.argmax(-1) == y).mean() > 0.85
            assert np.allclose(found, network.denoise(torch.from_numpy(x), steps=steps).numpy(), atol=1e-4)
        assert not np.array_equal(opened.run(x, "denoise", steps=1), opened.run(x, "denoise", steps=15))


@pytest.mark.road
def test_weights_are_in_the_bundle_once(tmp_path: Path):
    sizes = []
    for count in (2, 4):
        network = convert(Looped(period=2, count=count).eval(), (torch.randn(3, 64),), recurrent=True, tune="adaln")
        out = export_bundle(network, tmp_path / str(count))
        assert verify_bundle(out).ok
        sizes.append(sum(f.stat().st_size for f in out.glob("*.bin")))
    assert sizes[0] == sizes[1]


@pytest.mark.road
def test_training_goes_on_from_the_bundle(made: Any, tmp_path: Path, digits: Any):
    network, _ = made
    from diffusionblocks.converter.parts import save_training

    out = export_bundle(network, tmp_path / "b", extra=lambda folder: save_training(network, folder / "train"))
    _, again = open_for_training(out)
    assert again.analysis.loop == network.analysis.loop
    x = torch.from_numpy(digits[0][:5])
    assert torch.allclose(again.denoise(x, steps=3), network.denoise(x, steps=3), atol=1e-5)  # weights lie elsewhere


@pytest.mark.road
def test_no_token_is_told_before_it_comes(tmp_path: Path):
    network = convert(Huginn().eval(), TEXT, recurrent=True, task="lm")
    data = np.random.default_rng(0).integers(0, TOKENS, (64, LENGTH))
    finetune(network, data, steps=5, batch_size=16)
    out = export_bundle(network, tmp_path / "b")
    assert verify_bundle(out).ok
    with open_bundle(out) as opened:
        before = opened.run(data[:4], "denoise", steps=4)
        for place in range(1, LENGTH):
            other = data[:4].copy()
            other[:, place] = (other[:, place] + 1) % TOKENS
            after = opened.run(other, "denoise", steps=4)
            assert np.allclose(after[:, :place], before[:, :place], atol=1e-5)
            assert not np.allclose(after[:, place:], before[:, place:], atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path: Path):
    example = (torch.randn(3, 64),)
    with pytest.raises(BadInput, match="each of the 4 units of this model has its own"):
        analyse(Looped(before=4, count=1, period=0).eval(), example, recurrent=True)
    for settings in ({"context": "frozen"}, {"num_blocks": 2}, {"task": "mdm", "mask_token": 3}, {"task": "diffusion"}):
        with pytest.raises(BadInput, match="the loop is one block"):
            convert(Looped().eval(), example, recurrent=True, **settings)


def test_a_manifest_with_a_loop_of_several_blocks_is_refused(made: Any, tmp_path: Path):
    manifest = json.loads((made[1] / "manifest.json").read_text())
    manifest["applications"] = 0
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="0 applications of 1 blocks"):
        open_bundle(tmp_path)


def test_inspect_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    program = torch.export.export(
        Looped(before=1, period=2, count=3).eval(), (torch.randn(3, 64),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, "looped.pt2")
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "looped.pt2", "--json"])
    assert stopped.value.code == 0
    data = json.loads(capsys.readouterr().out)
    assert data["loop"] == {"first": 1, "units": 2, "applications": 3}
    with pytest.raises(SystemExit):
        main(["inspect", "looped.pt2", "--recurrent"])
    drawn = capsys.readouterr().err
    assert "recurrent depth: 2 units applied 3 times" in " ".join(drawn.split())
