"""Fine-tuning: independence of blocks to the bit, the analytic evidence, data that is refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusionblocks.converter import convert, finetune, label_target, objective
from diffusionblocks.converter.blocks import trainable_names
from diffusionblocks.converter.dataset import ArrayDataset
from diffusionblocks.converter.draws import draw, generator_of
from diffusionblocks.converter.feeding import Feeder
from diffusionblocks.converter.label_target import LabelTarget
from diffusionblocks.converter.residence import Residence
from diffusionblocks.converter.train import TrainOptions, step_seed
from diffusionblocks.runtime.errors import BadInput
from torch import nn


def _hash(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    return digest.hexdigest()


def _train(model, digits, order, **settings):
    network = convert(model, input_shape=(64,), num_blocks=3, **settings)
    before = [_hash(network.block_state(b)) for b in range(3)]
    finetune(network, digits[0][:500], digits[1][:500], steps=6, batch_size=16, blocks=order)
    after = [_hash(network.block_state(b)) for b in range(3)]
    assert all(after[b] != before[b] for b in order)
    assert all(after[b] == before[b] for b in range(3) if b not in order)
    return after


@pytest.mark.parametrize("context", ["frozen", "stem"])
@pytest.mark.parametrize("tune", ["adaln", "lora", "block"])
def test_order_does_not_change_a_bit(trained_mlp, digits, context: str, tune: str) -> None:
    forward = _train(trained_mlp, digits, [0, 1, 2], context=context, tune=tune)
    assert _train(trained_mlp, digits, [2, 0, 1], context=context, tune=tune) == forward
    assert _train(trained_mlp, digits, [1], context=context, tune=tune)[1] == forward[1]


def test_from_scratch_blocks_own_stem_and_head(trained_mlp, digits) -> None:
    settings = {"context": "stem", "tune": "block", "scratch": True}
    forward = _train(trained_mlp, digits, [0, 1, 2], **settings)
    assert _train(trained_mlp, digits, [2, 1, 0], **settings) == forward
    network = convert(trained_mlp, input_shape=(64,), **settings)
    assert {n.split(".")[0] for n in network.block_state(0)} == {"block", "stem", "head"}


@pytest.mark.slow
def test_separate_processes_give_the_same_bits(program_file, data_file, tmp_path) -> None:
    import json
    import shutil

    def command(*args: str) -> None:
        program = [sys.executable, "-m", "diffusionblocks.converter", *args]
        subprocess.run(program, check=True, capture_output=True, text=True, env=None)

    common = ["--steps", "5", "--batch-size", "16", "--data", str(data_file)]
    whole, apart = tmp_path / "whole.dblocks", tmp_path / "apart.dblocks"
    command(str(program_file), "--out", str(apart), "--input-shape", "64")
    shutil.copytree(apart, whole)
    command("train", str(whole), *common)
    for block in ("2", "0", "1"):
        command("train", str(apart), "--blocks", block, *common)
    command("train", str(apart), "--merge")
    hashes = [json.loads((p / "manifest.json").read_text())["files"] for p in (whole, apart)]
    for b in range(3):
        name = f"train/block_{b:02d}.safetensors"
        assert hashes[0][name] == hashes[1][name]
        assert hashes[0][f"block_{b:02d}.bin"] == hashes[1][f"block_{b:02d}.bin"]


def test_training_leaves_the_original_alone(trained_mlp, digits) -> None:
    before = {k: v.clone() for k, v in trained_mlp.state_dict().items()}
    _train(trained_mlp, digits, [0, 1, 2], tune="block")
    assert all(torch.equal(before[k], v) for k, v in trained_mlp.state_dict().items())


def test_frozen_stays_near_the_original(trained_mlp, digits) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=3, context="frozen", tune="block")
    finetune(network, digits[0][:1400], digits[1][:1400], steps=60, lr=3e-4)
    x, y = torch.from_numpy(digits[0][1400:]), torch.from_numpy(digits[1][1400:])
    original = (network.exact(x)[0].argmax(-1) == y).float().mean()
    denoised = (network.denoise(x).argmax(-1) == y).float().mean()
    assert original > 0.9
    assert denoised > original - 0.03


def test_carry_refuses_a_block_before_its_predecessor(trained_mlp, digits) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=3, context="carry")
    with pytest.raises(BadInput, match="block 2 reads what block 0 makes"):
        finetune(network, digits[0], digits[1], steps=1, blocks=[2])


def test_analytic_evidence_is_the_exact_posterior() -> None:
    generator = torch.Generator().manual_seed(0)
    target = LabelTarget(torch.randn(4, 6, generator=generator), "analytic")
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    sigma, z = torch.tensor([0.7]), torch.randn(1, 6, generator=generator)
    density = torch.distributions.Normal(target.table, 0.7).log_prob(z).sum(-1)
    posterior = (prior + density).softmax(-1)
    found = target.training_logits(prior[None], z, sigma).softmax(-1)
    assert torch.allclose(found, posterior[None], atol=1e-5)
    assert torch.equal(LabelTarget(target.table, "learned").training_logits(prior[None], z, sigma), prior[None])


def test_prediction_reads_f_alone() -> None:
    target = LabelTarget(torch.eye(3), "analytic")
    f, z = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[9.0, 0.0, 0.0]])
    prediction, denoised, z_next = target(z, f, torch.tensor([0.5]), torch.tensor([0.0]))
    assert torch.equal(prediction, f.log_softmax(-1))
    assert denoised.argmax() == 0
    assert torch.allclose(z_next, denoised)


def test_edm_weighting_is_per_sample(trained_mlp, digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses (1, 0) at sigma (0.5, 5) give w(0.5) / 2; a weight that is broadcast to N x N would give the mean of both."""
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2)
    sigma = torch.tensor([0.5, 5.0])
    monkeypatch.setattr(objective, "sigma_of", lambda *args: sigma)
    monkeypatch.setattr(label_target.F, "cross_entropy", lambda *args, **kwargs: torch.tensor([1.0, 0.0]))
    data = ArrayDataset({network.input_names[0]: digits[0][:9]}, digits[1][:9])
    feeder = Feeder(network, 0, Residence(network, torch.device("cpu")))
    drawn = draw(generator_of(0, 0, 0), rows=9, batch=2, shape=network.require_target().shape)
    losses = []
    for weighting in ("none", "edm"):
        options = TrainOptions(batch_size=2, weighting=weighting)
        losses.append(float(objective.Objective(network, 0, data, options, feeder)(0, drawn, slice(0, 2))[0].mean()))
    data = network.require_target().sigma_data
    assert losses[0] == 0.5
    assert losses[1] == pytest.approx((0.5**2 + data**2) / (0.5 * data) ** 2 / 2, rel=1e-5)


def test_the_anchor_keeps_the_state_that_is_carried(trained_mlp, digits) -> None:
    """The distance of what block 0 passes on from the original's state, with and without the anchor, and the accuracy after it."""
    x, y = torch.from_numpy(digits[0][1400:]), torch.from_numpy(digits[1][1400:])
    distance, accuracy = [], []
    for anchor in (0.0, 3.0):
        network = convert(trained_mlp, input_shape=(64,), num_blocks=3, context="carry")
        finetune(network, digits[0][:1400], digits[1][:1400], steps=100, lr=1e-3, anchor=anchor)
        with torch.no_grad():
            env = network.inputs_env(x)
            network.run_stem(env)
            z, sigma = torch.zeros(len(x), network.require_target().dim), torch.full((len(x),), network.edges[0])
            _, carried = network.run_block(env, 0, z, sigma)
            network.run_context(env, 0)
            distance.append(float((carried - env["stream"]).square().mean() / env["stream"].var()))
        accuracy.append(float((network.denoise(x).argmax(-1) == y).float().mean()))
    assert distance[1] < 0.2 * distance[0]
    assert accuracy[1] > 0.9


def test_retraining_a_carried_block_says_which_are_stale(trained_mlp, digits, caplog: pytest.LogCaptureFixture) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=3, context="carry")
    finetune(network, digits[0][:100], digits[1][:100], steps=1)
    assert "train them again" not in caplog.text
    finetune(network, digits[0][:100], digits[1][:100], steps=1, blocks=[1])
    assert "Blocks 2 were trained on what earlier blocks made before" in caplog.text


@pytest.mark.parametrize(("context", "evidence", "lr"), [("frozen", "analytic", 3e-4), ("stem", "learned", 1e-3)])
def test_defaults_by_context(trained_mlp, digits, context: str, evidence: str, lr: float) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2, context=context)
    assert network.settings.evidence == evidence
    logs = finetune(network, digits[0][:50], digits[1][:50], steps=1, blocks=[0])
    assert logs[0].options.lr == lr
    other = convert(trained_mlp, input_shape=(64,), num_blocks=2, context=context, evidence="learned")
    assert other.settings.evidence == "learned"


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0.0}, {"anchor": -1.0}, {"weighting": "snr"}])
def test_options_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        TrainOptions(**wrong)


def test_step_seeds_differ() -> None:
    seeds = {step_seed(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)}
    assert len(seeds) == 81


def test_batch_norm_statistics_move_only_in_a_block_of_its_own(digits) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False, in_chans=1, num_classes=10).eval()
    images = np.repeat(np.repeat(digits[0][:64].reshape(-1, 1, 8, 8), 4, 2), 4, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for tune, moves in (("adaln", False), ("block", True)):
        network = convert(model, input_shape=(1, 32, 32), num_blocks=2, tune=tune)
        state = {k: v.clone() for k, v in network.blocks[0].module.state_dict().items()}
        finetune(network, images, digits[1][:64], steps=2, batch_size=8, blocks=[0])
        moved = [
            k
            for k, v in network.blocks[0].module.state_dict().items()
            if "running_mean" in k and not torch.equal(v, state[k])
        ]
        assert bool(moved) == moves
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def _spoil(x: np.ndarray, y: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = x[:20].copy(), y[:20].copy()
    if what == "NaN":
        x[3, 0] = np.nan
    elif what == "shape":
        x = x[:, :50]
    elif what == "classes":
        y[5] = 10
    elif what == "rows":
        y = y[:7]
    elif what == "type":
        y = y.astype(np.float32)
    return x, y


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("NaN", "1 of 20 rows"),
        ("shape", r"\(20, 50\)"),
        ("classes", "0 to 9"),
        ("rows", "7 labels"),
        ("type", "float32"),
    ],
)
def test_bad_data_is_refused(trained_mlp, digits, what: str, message: str) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2)
    with pytest.raises(BadInput, match=message):
        finetune(network, *_spoil(*digits, what), steps=1)


def test_a_table_that_no_gradient_reaches_is_not_trained() -> None:
    """Read under no_grad alone, as sinusoidal positions are."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scale = nn.Parameter(torch.randn(7, 16)), nn.Parameter(torch.ones(16))
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                positions = self.table.sin()
            return x + torch.relu(self.linear(x * self.scale + positions))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units, self.head = nn.Sequential(*(Positions() for _ in range(2))), nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.units(x).mean(1))

    network = convert(Net().eval(), input_shape=(7, 16), num_blocks=2, tune="block")
    names = trainable_names(network.blocks[1].module, "block")
    assert any(n.endswith("linear.weight") for n in names)
    assert any(n.endswith("scale") for n in names)
    assert not any(n.endswith("table") for n in names)


def test_a_group_norm_of_a_state_whose_channels_come_last_trains() -> None:
    """torch's own backward ends the process there, where the norm's input needs no gradient."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norms = (nn.Sequential(nn.GroupNorm(1, 8), nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in range(2))
            self.stem, self.units, self.head = nn.Linear(3, 8), nn.ModuleList(norms), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).permute(0, 3, 1, 2)
            for unit in self.units:
                x = x + unit(x)
            return self.head(x.mean((2, 3)))

    network = convert(Net().eval(), input_shape=(4, 4, 3), num_blocks=2, tune="block")
    images = np.random.default_rng(0).standard_normal((16, 4, 4, 3), np.float32)
    log = finetune(network, images, np.arange(16) % 5, steps=2)
    assert all(np.isfinite(record.loss).all() for record in log)


def test_a_block_has_weights_of_its_own_once_it_trains(trained_mlp) -> None:
    """Until then it reads the original's memory; training one leaves the original and the other blocks as they were."""
    model = trained_mlp
    before = [p.clone() for p in model.parameters()]
    network = convert(model, input_shape=(64,), num_blocks=3, tune="block")
    shared = {p.data_ptr() for p in model.parameters()}
    own = [{p.data_ptr() for p in b.module.parameters()} for b in network.blocks]
    assert all(of & shared for of in own)
    finetune(
        network,
        np.random.default_rng(0).standard_normal((32, 64), np.float32),
        np.zeros(32, np.int64),
        blocks=[1],
        steps=3,
    )
    assert not {p.data_ptr() for p in network.blocks[1].module.parameters()} & shared
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {p.data_ptr() for p in network.blocks[0].module.parameters()} & shared
