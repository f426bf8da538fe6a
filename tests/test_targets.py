"""Targets beside labels of a sample: features, numbers, several labels, classes at every position; in the network, on disk and in the runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.bit_target import BitTarget
from diffusionblocks.converter.cli import main
from diffusionblocks.converter.feature_target import SPREAD, FeatureTarget
from diffusionblocks.converter.grid import Grid, grid_of, resampled
from diffusionblocks.converter.label_target import IGNORED, LabelTarget
from diffusionblocks.converter.mapped import write_tensors
from diffusionblocks.converter.measure import compare_modes
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.parts import default_decoding, load_training, save_training
from diffusionblocks.converter.samples import Samples
from diffusionblocks.converter.targets import Layout, Told
from diffusionblocks.export import export_bundle
from diffusionblocks.export.verify import verify_bundle
from diffusionblocks.runtime import open_bundle
from diffusionblocks.runtime.errors import BadInput
from torch import nn
from torch.nn import functional as F

SIDE = 8


class Unit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Mixing(Unit):
    """A unit that mixes the tokens of [N, T, width] too."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__(width)
        self.mix, self.before = nn.Linear(tokens, tokens), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.before(x).transpose(1, 2)).transpose(1, 2)
        return super().forward(x)


class ConvUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.norm1(self.conv1(x))))


class Rows(nn.Module):
    """Digits [N, 64] as eight tokens of eight pixels -> [N, 8, outputs]."""

    def __init__(self, outputs: int, width: int = 24) -> None:
        super().__init__()
        self.enter = nn.Linear(SIDE, width)
        self.units = nn.Sequential(*(Mixing(width, SIDE) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.units(self.enter(x.reshape(-1, SIDE, SIDE)))))


class Pixels(nn.Module):
    """Digits [N, 64] -> logits of three classes for each of 8 x 8 pixels, by units on 4 x 4."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, width, 2, stride=2)
        self.units = nn.Sequential(*(ConvUnit(width) for _ in range(4)))
        self.head = nn.ConvTranspose2d(width, 3, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.units(self.enter(x.reshape(-1, 1, SIDE, SIDE)))))


def mlp(*head: nn.Module, width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), *(Unit(width) for _ in range(6)), nn.LayerNorm(width), *head).eval()


def fitted(model: nn.Module, x: np.ndarray, y: np.ndarray, loss: Any, updates: int = 150) -> nn.Module:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.from_numpy(x[:1400]), torch.from_numpy(y[:1400])
    for _ in range(updates):
        rows = torch.randint(1400, (64,), generator=generator)
        optimizer.zero_grad()
        loss(model(a[rows]), b[rows]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def tasks(digits: tuple[np.ndarray, np.ndarray]) -> dict[str, tuple[nn.Module, np.ndarray]]:
    """For each task a network trained on digits, and its targets."""
    x, labels = digits
    attributes = np.stack([labels % 2, labels > 4, np.isin(labels, (0, 6, 8, 9))], 1).astype(np.int64)
    image = x.reshape(-1, SIDE, SIDE)
    weight = image + 0.3
    numbers = np.stack([(labels / 2).astype(np.float32), 100 * weight.mean((1, 2))], 1).astype(np.float32)
    pixels = ((image > 0).astype(np.int64) + (image > 0.5)).astype(np.int64)
    rows = (image > 0).sum(2).astype(np.int64)  # bright pixels of each row, 0 to 8
    torch.manual_seed(0)
    return {
        "features": (mlp(), np.zeros(0)),
        "regression": (fitted(mlp(nn.Linear(32, 2)), x, numbers, lambda f, y: F.mse_loss(f[:, 0], y[:, 0]) + F.mse_loss(f[:, 1], y[:, 1]) / 100), numbers),
        "number": (fitted(mlp(nn.Linear(32, 1), nn.Flatten(0)), x, numbers[:, 0], F.mse_loss), numbers[:, 0]),
        "multi-label": (fitted(mlp(nn.Linear(32, 3)), x, attributes.astype(np.float32), F.binary_cross_entropy_with_logits), attributes),
        "pixels": (fitted(Pixels(), x, pixels, F.cross_entropy), pixels),
        "rows": (fitted(Rows(9), x, rows, lambda f, y: F.cross_entropy(f.movedim(-1, 1), y)), rows),
        "tokens": (Rows(5).eval(), np.zeros(0)),
    }  # fmt: skip


NAMES = {"pixels": "classification", "rows": "classification", "number": "regression", "tokens": "features"}
SHAPES = {"features": (32,), "regression": (2,), "number": (1,), "multi-label": (3,), "pixels": (8, 8, 3), "rows": (8, 24), "tokens": (8, 5)}  # fmt: skip
DIM = {"pixels": 64}


def converted(tasks: Any, name: str, **settings: Any) -> ConvertedNetwork:
    return convert(tasks[name][0], input_shape=(64,), num_blocks=2, task=NAMES.get(name, name), **settings)


@pytest.mark.road
@pytest.mark.parametrize("name", SHAPES)
def test_an_untrained_network_is_the_original_and_its_blocks_too(tasks, digits, name: str) -> None:
    """The head behind the last block is the original's output to the bit, for any z at any place."""
    network = converted(tasks, name)
    target, x = network.require_target(), torch.from_numpy(digits[0][:5])
    assert (*target.positions, target.dim if name not in DIM else 3) == SHAPES[name]
    with torch.no_grad():
        expected = tasks[name][0](x)
    assert torch.equal(network.exact(x)[0], expected)
    env = network.inputs_env(x)
    network.run_stem(env)
    network.run_context(env, 0)
    with torch.no_grad():
        f, _ = network.run_block(env, 1, torch.randn(5, *target.shape), torch.rand(5) + 0.1)
    assert torch.equal(f, expected)


@pytest.mark.road
@pytest.mark.parametrize("name", SHAPES)
def test_fine_tuned_blocks_answer_in_torch_and_in_the_runtime(tasks, digits, tmp_path: Path, name: str) -> None:
    """No worse than the original by more than a tenth of what is to be explained; ONNX equal to torch."""
    model, y = tasks[name]
    x, taught = digits[0], not len(y)
    network = converted(tasks, name)
    finetune(network, x[:1400], None if taught else y[:1400], steps=60, targets="teacher" if taught else "labels")
    held = {network.input_names[0]: x[1400:]}
    found = compare_modes(network, held, None if taught else y[1400:], default_decoding(network))
    scores = {r.mode: r.scores for r in found.results}
    figure = "accuracy" if "accuracy" in scores["denoise"] else "explained"
    assert scores["denoise"][figure] > (1.0 if taught else scores["exact"][figure]) - 0.1
    folder = export_bundle(network, tmp_path / "model.dblocks")
    report = verify_bundle(folder)
    assert report.ok, report
    assert {c.name for c in report.checks} >= {"denoise", "exact.output"}
    rows = torch.from_numpy(x[1400:1405])
    with open_bundle(folder) as bundle:
        for options in ({}, {"read": "mean"}, {"steps": 5}, {"start": "noise", "average": 3}):
            want = network.denoise(rows, **options).numpy()
            got = bundle.run(rows.numpy(), "denoise", **options)
            assert got.shape == tuple(model(rows).shape) == want.shape
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, atol=2e-4 * max(1.0, float(np.abs(want).max())))


def test_z_moves_the_prediction_at_its_own_position(tasks) -> None:
    """In a trained conditioner the rows' factors differ where z does, and only there."""
    network = converted(tasks, "rows", context="stem")
    block = network.blocks[0].module
    conditioner = next(m for m in block.modules() if hasattr(m, "projection"))
    nn.init.normal_(conditioner.projection.weight, std=0.1)
    z = torch.zeros(2, *network.require_target().shape)
    moved = z.clone()
    moved[:, 3] = torch.randn(z.shape[-1])
    with torch.no_grad():
        a, b = (conditioner(v, torch.full((2,), 0.5)) for v in (z, moved))
    for one, other in zip(a, b, strict=True):
        differ = (one != other).flatten(2).any(-1).any(0)
        assert differ.tolist() == [i == 3 for i in range(SIDE)]


@pytest.mark.parametrize(
    ("shape", "dim", "positions", "expected"),
    [
        ((3, 16, 64), 2, (16,), Grid((16,), ((1, 16),))),
        ((3, 64, 4, 4), 1, (8, 8), Grid((4, 4), ((2, 4), (3, 4)))),
        ((3, 16, 64), 2, (28, 28), Grid((4, 4), ((1, 16),))),
        ((3, 7, 7, 64), 3, (49,), Grid((49,), ((1, 7), (2, 7)))),
        ((3, 12, 2, 64), 3, (12,), Grid((12,), ((1, 12),))),
        ((3, 12, 12, 64), 3, (12,), None),
        ((3, 17, 64), 2, (16,), None),
        ((3, 64, 3, 3), 1, (8, 8), None),
        ((3, 64), 1, (8, 8), None),
        ((3, 16, 64), 2, (), None),
    ],
    ids=[
        "tokens",
        "pooled",
        "patches",
        "image",
        "heads",
        "two that might be",
        "class token",
        "uneven",
        "pooled state",
        "no positions",
    ],
)
def test_positions_are_matched_or_left(shape: Any, dim: int, positions: Any, expected: Grid | None) -> None:
    assert grid_of(shape, dim, Samples(0), positions) == expected


def test_positions_of_another_layout_of_samples_are_left() -> None:
    assert grid_of((48, 16, 64), 2, Samples(0, 16), (16,)) is None


def test_positions_may_be_rows_of_the_batch() -> None:
    """[N, T, C] as [N x T, C], one sample after another or tiled; rows in another order are not taken for positions."""
    values = torch.randn(3, 4, 5)
    assert torch.equal(Grid((4,)).along(values, 1, 2, Samples(0, 4)), values.reshape(12, 5))
    tiled = Grid((4,), (), tiled=True).along(values, 1, 2, Samples(0, 4, tiled=True))
    assert torch.equal(tiled, values.transpose(0, 1).reshape(12, 5))

    class Rowwise(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.enter, self.head, self.turned = nn.Linear(8, 16), nn.Linear(16, 5), turned
            self.units = nn.ModuleList(Unit(16) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.enter(x)
            h = (h.unflatten(1, (2, 3)).transpose(1, 2) if self.turned else h).reshape(-1, 16)
            for unit in self.units:
                h = unit(h)
            return self.head(h).reshape(-1, 6, 5)

    for turned, expected in ((False, Grid((6,))), (True, None)):
        network = convert(Rowwise(turned).eval(), input_shape=(6, 8), num_blocks=2, task="classification")
        conditioner = next(m for m in network.blocks[0].module.modules() if hasattr(m, "layouts"))
        assert {layout[4] for layout in conditioner.layouts} == {expected}


def test_resampling_means_and_repeats() -> None:
    values = torch.arange(8.0).reshape(1, 4, 2, 1)
    assert resampled(values, (4, 2), (2, 2)).flatten().tolist() == [1, 2, 5, 6]
    assert resampled(values, (4, 2), (4, 4)).flatten().tolist()[:4] == [0, 0, 1, 1]
    assert resampled(values, (4, 2), (4, 2)) is values


def test_a_grid_lays_positions_and_channels() -> None:
    values = torch.randn(3, 4, 4, 5)
    assert torch.equal(Grid((4, 4), ((2, 4), (3, 4))).along(values, 1, 4, Samples(0)), values.permute(0, 3, 1, 2))
    assert Grid((4, 4), ((1, 16),)).along(values, 2, 3, Samples(0)).shape == (3, 16, 5)
    assert Grid((4,), ((2, 4),)).along(values[:, 0], 3, 4, Samples(0)).shape == (3, 1, 4, 5)


def test_an_answer_given_z_is_the_exact_posterior() -> None:
    """Bayes' rule by the densities of z, for a class of two."""
    target = BitTarget(Layout(4, 1, ()), "analytic")
    sigma, z = torch.tensor([0.7]), torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    prior = torch.tensor([[0.1, 0.5, 0.8, 0.99]])
    yes, no = (torch.distributions.Normal(s * target.size, 0.7).log_prob(z).exp() for s in (1, -1))
    posterior = prior * yes / (prior * yes + (1 - prior) * no)
    found = target.training_logits(prior.logit(), z, sigma).sigmoid()
    assert torch.allclose(found, posterior, atol=1e-5)
    assert torch.equal(BitTarget(Layout(4, 1, ()), "learned").training_logits(prior, z, sigma), prior)


@pytest.mark.parametrize("evidence", ["analytic", "learned"])
def test_the_least_loss_of_numbers_is_the_posterior_mean(evidence: str) -> None:
    """y ~ N(0, 0.5^2) without x: the best f gives D = E[y | z], and nothing near it a smaller loss."""
    target = FeatureTarget(Layout(1, 1, ()), evidence, each=True)
    generator = torch.Generator().manual_seed(0)
    y = SPREAD * torch.randn(200_000, 1, generator=generator)
    sigma = torch.full((len(y),), 0.8)
    z = target.noisy(y, sigma, torch.randn(y.shape, generator=generator))
    best = SPREAD**2 / (SPREAD**2 + 0.8**2) * z
    unit = target.denoised(torch.ones(1, 1), torch.zeros(1, 1), sigma[:1])
    f = (best - target.denoised(torch.zeros(1, 1), z, sigma)) / unit
    assert torch.allclose(target.denoised(f, z, sigma), best, atol=1e-5)
    losses = [float(target.losses(Told(f + shift, z, sigma, y), "edm").mean()) for shift in (-0.1, 0.0, 0.1)]
    assert losses[1] < min(losses[0], losses[2])
    assert losses[1] == pytest.approx(1.0, rel=0.02)  # EDM's weight makes the loss 1 at every sigma


def test_numbers_are_standardised_and_given_back(digits, tasks) -> None:
    """Channels of a regression each by themselves, features by one scale; the prediction is in the data's units."""
    y = torch.from_numpy(tasks["regression"][1][:1400])
    for each in (True, False):
        target = FeatureTarget(Layout(2, 1, ()), "learned", each=each)
        target.settle(y)
        spread = target.embedded(y).std(0, correction=0)
        assert float(spread.square().mean()) == pytest.approx(SPREAD**2, rel=1e-3)
        assert torch.allclose(spread, torch.full((2,), SPREAD), rtol=1e-3) == each
        sigma = torch.full((1400,), 1e-4)
        prediction, _, _ = target(target.embedded(y), y, sigma, sigma)
        assert torch.allclose(prediction, y, atol=1e-2)


def test_a_constant_number_has_a_scale() -> None:
    target = FeatureTarget(Layout(2, 1, ()), "learned", each=True)
    target.settle(torch.tensor([[3.0, 1.0], [3.0, 2.0]]))
    assert torch.isfinite(target.embedded(torch.tensor([[3.0, 1.5]]))).all()


def test_positions_without_a_label_teach_nothing(tasks, digits) -> None:
    target = converted(tasks, "rows").require_target()
    assert isinstance(target, LabelTarget)
    y = torch.from_numpy(tasks["rows"][1][:4]).clone()
    y[:, 5:] = IGNORED
    f, sigma = torch.randn(4, 8, 9), torch.full((4,), 0.5)
    noise = torch.zeros(4, *target.shape)
    other = f.clone()
    other[:, 5:] += torch.randn(4, 3, 9)
    z = target.noisy(y, sigma, noise)
    assert torch.equal(z[:, 5:], noise[:, 5:])
    assert torch.equal(target.losses(Told(f, z, sigma, y), "none"), target.losses(Told(other, z, sigma, y), "none"))
    assert target.scores(f, y) == target.scores(other, y)


def test_mean_and_scale_are_kept_with_the_network(tasks, digits, tmp_path: Path) -> None:
    network = converted(tasks, "regression")
    finetune(network, digits[0][:200], tasks["regression"][1][:200], steps=2)
    save_training(network, tmp_path / "train")
    again = load_training(tmp_path / "train").require_target()
    target = network.require_target()
    assert isinstance(target, FeatureTarget)
    assert isinstance(again, FeatureTarget)
    assert again.settled
    assert torch.equal(again.mean, target.mean)
    assert torch.equal(again.scale, target.scale)


REFUSED = {
    "shape": ("regression", np.zeros((1797, 3), np.float32), r"shape \(1797, 3\).*\[N, 2\]"),
    "NaN": ("regression", np.full((1797, 2), np.nan, np.float32), "NaN or infinity"),
    "no answers": ("multi-label", np.full((1797, 3), 2), r"values from 0 to 2.*0 and 1, \[N, 3\]"),
    "one answer": ("multi-label", np.zeros(1797, np.int64), r"\[N, 3\]"),
    "one class a sample": ("rows", np.zeros(1797, np.int64), r"integers \[N, 8\]"),
    "class": ("rows", np.full((1797, 8), 9), "from 9 to 9; the model has the classes 0 to 8"),
    "not the mark": ("rows", np.full((1797, 8), -1), "from -1 to -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_do_not_fit_are_refused(tasks, digits, name: str) -> None:
    task, y, text = REFUSED[name]
    with pytest.raises(BadInput, match=text):
        finetune(converted(tasks, task), digits[0], y, steps=1)


def test_a_task_needs_its_output(tasks) -> None:
    with pytest.raises(BadInput, match="task classification needs a first output of logits of two or more classes"):
        convert(tasks["number"][0], input_shape=(64,), num_blocks=2, task="classification")
    with pytest.raises(BadInput, match="equal-information is for classes"):
        converted(tasks, "regression", partition="equal-information")
    with pytest.raises(BadInput, match="task is 'lottery'"):
        convert(tasks["number"][0], input_shape=(64,), num_blocks=2, task="lottery")
    assert convert(tasks["number"][0], input_shape=(64,), num_blocks=2).target is None  # auto


def test_new_labels_need_classes_of_a_sample(tasks) -> None:
    for name in ("rows", "regression"):
        with pytest.raises(BadInput, match="New labels need"):
            converted(tasks, name, new_labels=3)


@pytest.mark.road
def test_an_embedding_model_learns_from_itself_by_the_command(digits, tmp_path: Path) -> None:
    """timm's ViT without a classifier; unlabelled images; trained in two processes' worth of commands, then run."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "in_chans": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options).eval()
    torch.save(model, tmp_path / "model.pt")
    images = np.kron(digits[0][:300].reshape(-1, 1, 8, 8), np.ones((1, 1, 2, 2), np.float32))
    np.savez(tmp_path / "x.npz", x=images)
    np.save(tmp_path / "probe.npy", images[:3])
    bundle = str(tmp_path / "model.dblocks")

    def command(*arguments: str) -> None:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        assert end.value.code == 0

    command(str(tmp_path / "model.pt"), "--trust", "timm", "--out", bundle, "--task", "features", "--input-shape", "1x16x16", "-B", "2")  # fmt: skip
    train = ("train", bundle, "--data", str(tmp_path / "x.npz"), "--targets", "teacher", "--steps", "20", "--batch-size", "8", "--quiet")  # fmt: skip
    for b in "01":
        command(*train, "--blocks", b)
    command("train", bundle, "--merge", "--data", str(tmp_path / "x.npz"), "--targets", "teacher", "--holdout", "0.1")  # fmt: skip
    manifest = json.loads((Path(bundle) / "manifest.json").read_text())
    assert manifest["task"] == "features"
    assert manifest["target"]["kind"] == "features"
    assert manifest["trained"]
    assert manifest["decoding"]["mode"] == "exact"  # nothing is nearer to the original than itself
    command("run", bundle, "--input", str(tmp_path / "probe.npy"), "--output", str(tmp_path / "y.npy"), "--mode", "denoise")  # fmt: skip
    with torch.no_grad():
        expected = model(torch.from_numpy(images[:3])).numpy()
    got = np.load(tmp_path / "y.npy")
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < np.abs(expected).mean()


@pytest.mark.road
def test_an_encoder_learns_its_own_states_where_nothing_else_is_said(digits, tmp_path: Path) -> None:
    """[N, T, C] is no row of logits, so with a teacher the task is features; with labels it is refused with the ways out."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True) for _ in range(4)]
    torch.save(nn.Sequential(nn.Linear(8, 16), *layers).eval(), tmp_path / "model.pt")
    x = digits[0][:60].reshape(-1, 8, 8)
    np.savez(tmp_path / "x.npz", x=x)
    np.savez(tmp_path / "xy.npz", x=x, y=digits[1][:60])
    common = [
        str(tmp_path / "model.pt"),
        "--out",
        str(tmp_path / "m"),
        "--input-shape",
        "8x8",
        "-B",
        "2",
        "--steps",
        "2",
    ]
    with pytest.raises(SystemExit) as end:
        main([*common, "--data", str(tmp_path / "x.npz"), "--targets", "teacher"])
    assert end.value.code == 0
    assert json.loads((tmp_path / "m" / "manifest.json").read_text())["target"]["positions"] == [8]
    with pytest.raises(SystemExit) as end:
        main([*common, "--data", str(tmp_path / "xy.npz"), "--force"])
    assert end.value.code == 2


def test_blocks_trained_to_other_means_are_not_gathered(tasks, digits, tmp_path: Path) -> None:
    """A copy of the bundle whose blocks learned other numbers: its mean and scale differ, and so the merge is refused; of the same data it is taken."""
    from diffusionblocks.converter.runs import Run

    network = converted(tasks, "regression")
    run = Run(tmp_path / "a")
    target = network.require_target()
    assert isinstance(target, FeatureTarget)
    run.settle(network, lambda: target.settle(torch.from_numpy(tasks["regression"][1])))
    (tmp_path / "b" / "block_01").mkdir(parents=True)
    (tmp_path / "b" / "block_01" / "log.json").write_text("{}")
    write_tensors({"mean": target.mean, "scale": target.scale * 1.00001}, tmp_path / "b" / "target.safetensors")
    assert run.gather(tmp_path / "b") == [1]
    write_tensors({"mean": target.mean, "scale": target.scale * 2}, tmp_path / "b" / "target.safetensors")
    with pytest.raises(BadInput, match="another mean and scale"):
        run.gather(tmp_path / "b")
