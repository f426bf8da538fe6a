"""The engine's options: parts of a batch, recomputed activations, half precision, averaged weights, cached features, the original as teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusionblocks.converter import convert, finetune, room
from diffusionblocks.converter.dataset import ArrayDataset
from diffusionblocks.converter.draws import draw, generator_of, shares, tied_chain
from diffusionblocks.converter.engine import Keeping, train_block
from diffusionblocks.converter.feeding import FeatureCache, Feeder
from diffusionblocks.converter.label_target import picked
from diffusionblocks.converter.mapped import is_mapped
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.objective import Objective
from diffusionblocks.converter.parts import load_training, save_training
from diffusionblocks.converter.recompute import Recomputed, lean, modulated, recomputed
from diffusionblocks.converter.residence import Residence, device_of
from diffusionblocks.converter.train import only_what_trains, settled
from diffusionblocks.converter.train_options import TrainOptions
from diffusionblocks.runtime.errors import BadInput
from torch import nn

CPU = torch.device("cpu")


def _trained(
    model: nn.Module, digits, *, context: str = "frozen", tune: str = "block", **options
) -> dict[str, torch.Tensor]:
    network = convert(model, input_shape=(64,), num_blocks=3, context=context, tune=tune)
    finetune(network, digits[0][:300], digits[1][:300], steps=5, batch_size=16, blocks=[1], **options)
    return network.block_state(1)


def _close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 2e-5) -> bool:
    return all(torch.allclose(t, b[n], atol=tolerance, rtol=1e-3) for n, t in a.items())


def test_a_batch_in_parts_is_the_same_update(trained_mlp, digits) -> None:
    whole = _trained(trained_mlp, digits)
    assert _close(_trained(trained_mlp, digits, accumulate=3), whole)
    assert not _close(_trained(trained_mlp, digits, seed=1), whole)
    assert not _close(_trained(trained_mlp, digits, accumulate=1, lr=1e-3), whole)


def test_shares_cover_the_batch() -> None:
    for count, parts, ranks in ((16, 3, 1), (10, 1, 3), (7, 2, 2), (1, 4, 1)):
        found = [s for r in range(ranks) for s in shares(count, parts=parts, rank=r, ranks=ranks)]
        assert [i for s in found for i in range(s.start, s.stop)] == list(range(count))


@pytest.mark.parametrize("tune", ["block", "adaln", "lora"])
def test_recomputed_activations_give_the_same_bits(trained_mlp, digits, tune: str) -> None:
    plain = _trained(trained_mlp, digits, tune=tune)
    again = _trained(trained_mlp, digits, tune=tune, checkpointing=True)
    assert all(torch.equal(t, again[n]) for n, t in plain.items())


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def test_recomputed_keeps_the_states_between_units_alone(trained_mlp) -> None:
    layers = list(trained_mlp.children())
    network = convert(nn.Sequential(*layers[:-2], Mean(), *layers[-2:]).eval(), input_shape=(20, 64), num_blocks=2)
    block, ends = network.blocks[0].module, [u.add.name for u in network.units_of(0)]
    thin = recomputed(block, ends)
    stretches = [m for m in thin.modules() if isinstance(m, Recomputed)]
    assert len(stretches) >= len(ends)
    x = (torch.randn(32, 20, 32), torch.randn(32, network.require_target().dim), torch.rand(32) + 0.1)

    def kept(module: nn.Module) -> int:
        found: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(*x)
        return sum(size for place, size in found.items() if place not in own)

    assert kept(thin) < 0.5 * kept(block)


def test_a_lean_block_keeps_no_norms_output(trained_mlp) -> None:
    """The same outputs and gradients to the bit; about one tensor of the state's size less for each unit."""
    layers = list(trained_mlp.children())
    network = convert(nn.Sequential(*layers[:-2], Mean(), *layers[-2:]).eval(), input_shape=(20, 64), num_blocks=2)
    block = network.blocks[0].module
    thin = lean(block)
    targets = [n.target for n in thin.get_submodule("body").graph.nodes]
    assert targets.count(modulated) == 3
    for parameter in block.parameters():
        parameter.requires_grad_(True)
    nn.init.normal_(block.get_submodule("body").conditioner_00.projection.weight, std=0.1)
    x = (torch.randn(32, 20, 32), torch.randn(32, network.require_target().dim), torch.rand(32) + 0.1)
    gradients, sizes = [], []
    for module in (block, thin):
        kept: dict[int, int] = {}

        def pack(t: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            (out,) = module(*x)
        gradients.append(torch.autograd.grad(out.square().sum(), list(block.parameters())))
        sizes.append(sum(kept.values()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert sizes[0] - sizes[1] > 2.5 * x[0].nbytes
    with torch.no_grad():
        assert torch.equal(block(*x)[0], thin(*x)[0])


def test_a_batch_norm_is_left_alone() -> None:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.relu(self.linear(self.norm(x)))

    network = convert(nn.Sequential(Unit(), Unit(), nn.Linear(16, 4)).eval(), input_shape=(16,), num_blocks=1)
    body = lean(network.blocks[0].module).get_submodule("body")
    assert modulated not in [n.target for n in body.graph.nodes]


def test_batch_norms_that_move_are_not_computed_twice() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False, in_chans=1, num_classes=10).eval()
    images = np.random.default_rng(0).standard_normal((32, 1, 32, 32), np.float32)
    states = []
    for checkpointing in (False, True):
        network = convert(model, input_shape=(1, 32, 32), num_blocks=2)
        finetune(network, images, np.arange(32) % 10, steps=2, batch_size=8, blocks=[0], checkpointing=checkpointing)
        states.append(network.block_state(0))
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near(trained_mlp, digits, precision: str) -> None:
    full, half = _trained(trained_mlp, digits), _trained(trained_mlp, digits, precision=precision)
    assert all(t.dtype == torch.float32 for t in half.values() if t.is_floating_point())
    assert _close(half, full, 5e-3)
    assert any(not torch.equal(t, full[n]) for n, t in half.items())


def test_averaged_weights_are_kept(trained_mlp, digits) -> None:
    """The average of three updates' weights by hand, from runs that end after 1 and 2 of them."""
    states = []
    network = convert(trained_mlp, input_shape=(64,), num_blocks=3, tune="adaln")
    states.append(network.block_state(1))
    data = ArrayDataset({network.input_names[0]: digits[0][:300]}, digits[1][:300])
    options = settled(network, TrainOptions(steps=3, batch_size=16))
    with only_what_trains(network):
        train_block(
            network,
            1,
            data,
            options,
            Residence(network, CPU),
            progress=lambda *_: states.append(network.block_state(1)),
        )
    expected = states[0]
    for after in states[1:4]:
        expected = {n: torch.lerp(t, after[n], 1 - 0.6) for n, t in expected.items()}
    averaged = convert(trained_mlp, input_shape=(64,), num_blocks=3, tune="adaln")
    finetune(averaged, digits[0][:300], digits[1][:300], steps=3, batch_size=16, blocks=[1], ema=0.6)
    assert _close(averaged.block_state(1), expected, 1e-7)
    assert not _close(averaged.block_state(1), states[3], 1e-7)


def test_unfused_updates_stay_near(trained_mlp, digits) -> None:
    assert _close(_trained(trained_mlp, digits, fused=False), _trained(trained_mlp, digits))


def test_the_clean_loss_and_the_weighting_change_the_update(trained_mlp, digits) -> None:
    plain = _trained(trained_mlp, digits)
    assert not _close(_trained(trained_mlp, digits, clean=1.0), plain)
    assert not _close(_trained(trained_mlp, digits, weighting="edm"), plain)


@pytest.mark.parametrize(("context", "teacher"), [("frozen", False), ("frozen", True), ("stem", False)])
def test_cached_features_stay_near_streamed_ones(
    trained_mlp, digits, tmp_path: Path, context: str, teacher: bool
) -> None:
    states = []
    for cached in (False, True):
        network = convert(trained_mlp, input_shape=(64,), num_blocks=3, context=context)
        options = TrainOptions(
            steps=4, batch_size=16, cache_features=cached, targets="teacher" if teacher else "labels"
        )
        data = ArrayDataset({network.input_names[0]: digits[0][:300]}, None if teacher else digits[1][:300])
        with only_what_trains(network):
            keeping = Keeping(tmp_path / str(cached), 2)
            train_block(network, 2, data, settled(network, options), Residence(network, CPU), keeping=keeping)
        states.append(network.block_state(2))
    assert _close(*states)


def test_features_that_change_are_not_cached(trained_mlp, digits, tmp_path: Path) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=3, context="carry")
    data = ArrayDataset({network.input_names[0]: digits[0][:30]}, digits[1][:30])
    options = settled(network, TrainOptions(steps=1, cache_features=True))
    with pytest.raises(BadInput, match="cannot be cached"):
        train_block(network, 0, data, options, Residence(network, CPU), keeping=Keeping(tmp_path))


def test_features_that_do_not_fit_the_disk(
    trained_mlp, digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 1000))
    network = convert(trained_mlp, input_shape=(64,), num_blocks=3)
    data = ArrayDataset({network.input_names[0]: digits[0][:300]}, digits[1][:300])
    feeder = Feeder(network, 1, Residence(network, CPU))
    with pytest.raises(BadInput, match=r"need 37\.5 KiB on disk; 1000 B are free"):
        FeatureCache(feeder, data, tmp_path / "features", teacher=False, device=CPU)
    assert not (tmp_path / "features").exists()


def test_the_teacher_is_learned_without_labels(trained_mlp, digits) -> None:
    """Block 0 of the chain, from data without labels, comes near to the original's decisions."""
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2)
    x = torch.from_numpy(digits[0][1400:])
    original = network.exact(x)[0].argmax(-1)

    def agreement() -> float:
        return float((network.denoise(x, steps=1).argmax(-1) == original).float().mean())

    before = agreement()
    finetune(network, digits[0][:1400], steps=150, lr=1e-3, targets="teacher")
    assert before < 0.97
    assert agreement() > 0.98


def test_the_teachers_target_is_the_posterior_given_z(trained_mlp, digits) -> None:
    """Where f is log q, the loss is the entropy of softmax(log q + evidence), which is its least."""
    network = convert(trained_mlp, input_shape=(64,), num_blocks=1)
    data = ArrayDataset({network.input_names[0]: digits[0][:50]}, None)
    options = settled(network, TrainOptions(batch_size=20, targets="teacher"))
    feeder = Feeder(network, 0, Residence(network, CPU))
    target = network.require_target()
    drawn = draw(generator_of(0, 0, 0), rows=50, batch=20, shape=target.shape)
    losses, sigma = Objective(network, 0, data, options, feeder)(0, drawn, slice(0, 20))
    q = network.exact(torch.from_numpy(digits[0][:50])[drawn.rows])[0].log_softmax(-1)
    z = target.noisy(picked(q, drawn.choice), sigma, drawn.noise[-1])
    posterior = (q + target.evidence_of(z, sigma)).log_softmax(-1)
    assert torch.allclose(losses, -(posterior.exp() * posterior).sum(-1), atol=1e-5)


def test_classes_are_drawn_by_their_probability() -> None:
    q = torch.tensor([0.1, 0.0, 0.6, 0.3]).log().expand(4000, 4)
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.bincount(picked(q, u), minlength=4) / 4000
    assert torch.allclose(found, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.03)
    assert found[1] == 0


def test_a_teacher_needs_an_original(trained_mlp, digits) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2, context="stem", scratch=True)
    with pytest.raises(BadInput, match="no original to learn from"):
        finetune(network, digits[0], targets="teacher", steps=1)
    with pytest.raises(BadInput, match="no labels"):
        finetune(convert(trained_mlp, input_shape=(64,)), digits[0], steps=1)


def test_tied_noise_adds_no_evidence() -> None:
    """z of an earlier block is z of the later one and independent noise: its sigma is the larger."""

    class Density:
        def sigma(self, u: np.ndarray) -> np.ndarray:
            return 2.0 + u

    drawn = draw(torch.Generator().manual_seed(0), rows=9, batch=6, shape=(4,), levels=3)
    z, sigma = torch.randn(6, 4), torch.full((6,), 0.5)
    (z0, s0), (z1, s1) = tied_chain([Density(), Density()], drawn, z, sigma)
    assert bool((s0 >= s1).all() and (s1 >= sigma).all())
    assert torch.allclose(z1, z + (s1**2 - sigma**2).sqrt()[:, None] * drawn.noise[1])
    assert torch.allclose(z0, z1 + (s0**2 - s1**2).clamp(min=0).sqrt()[:, None] * drawn.noise[0])


def test_weights_lie_on_disk_until_they_train(trained_mlp, digits, tmp_path: Path) -> None:
    """The network of a saved training holds nothing in memory but what trains, and gives it back afterwards."""
    save_training(convert(trained_mlp, input_shape=(64,), num_blocks=3), tmp_path / "train")
    network = load_training(tmp_path / "train")
    residence = Residence(network, CPU, tmp_path / "resting")

    def in_memory(network: ConvertedNetwork, b: int) -> list[str]:
        return [n for n, p in network.blocks[b].module.named_parameters() if not is_mapped(p)]

    assert [in_memory(network, b) for b in range(3)] == [[], [], []]
    data = ArrayDataset({network.input_names[0]: digits[0][:100]}, digits[1][:100])
    seen: list[int] = []
    with only_what_trains(network):
        train_block(
            network,
            1,
            data,
            settled(network, TrainOptions(steps=1)),
            residence,
            progress=lambda *_: seen.extend(len(in_memory(network, b)) for b in range(3)),
        )
    assert (seen[0], seen[2]) == (0, 0)
    assert seen[1] > 0
    state = network.block_state(1)
    residence.put_away(1)
    assert in_memory(network, 1) == []
    assert all(torch.equal(t, network.block_state(1)[n]) for n, t in state.items())


def test_an_unknown_device() -> None:
    with pytest.raises(BadInput, match="no device"):
        device_of("cuda:77")


@pytest.mark.parametrize(
    "wrong", [{"accumulate": 65}, {"ema": 1.0}, {"clean": -1.0}, {"precision": "int8"}, {"targets": "none"}]
)
def test_options_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        TrainOptions(**wrong)  # type: ignore[arg-type]


def test_too_little_memory_says_what_one_block_needs(trained_mlp, digits, monkeypatch: pytest.MonkeyPatch) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2)
    options = settled(network, TrainOptions(steps=1, batch_size=4))
    needed = room.learning_bytes(network, 0, options)
    log = finetune(network, digits[0][:20], digits[1][:20], steps=1, batch_size=4, blocks=[0])[0]
    beside = sum(p.nbytes for part in (network.stem, network.head) for p in part.module.parameters())
    assert needed == pytest.approx(log.training_bytes + beside, abs=400)  # Adam's numbers of updates
    with monkeypatch.context() as patch:
        patch.setattr(room, "free_memory", lambda _: needed - 1)
        with pytest.raises(BadInput, match=r"Block 0 needs [\d.]+ KiB for its weights.*are free on cpu") as refusal:
            finetune(network, digits[0][:20], digits[1][:20], steps=1, batch_size=4, blocks=[0])
    assert "dbconvert plan" in str(refusal.value)

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes.")

    monkeypatch.setattr("diffusionblocks.converter.engine._Loop._update", full)
    with pytest.raises(BadInput, match="there was too little memory on cpu"):
        finetune(network, digits[0][:20], digits[1][:20], steps=1, batch_size=4, blocks=[0])


@pytest.mark.gpu
@pytest.mark.parametrize("context", ["stem", "frozen", "carry"])
def test_a_gpu_trains_as_the_cpu_does(trained_mlp, digits, context: str) -> None:
    """The same draws; the same updates but for rounding; only the block in training on the device."""
    states = []
    for device in ("cpu", "cuda"):
        network = convert(trained_mlp, input_shape=(64,), num_blocks=3, context=context)
        finetune(network, digits[0][:300], digits[1][:300], steps=5, batch_size=16, device=device)
        states.append([network.block_state(b) for b in range(3)])
        assert all(p.device.type == "cpu" for b in network.blocks for p in b.module.parameters())
    assert all(_close(a, b, 1e-4) for a, b in zip(*states, strict=True))
