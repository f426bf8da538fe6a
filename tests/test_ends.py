"""Stems and heads of the blocks' own: they start as the original's, train with their block alone, and leave the original as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusionblocks.converter import convert, finetune, load_network, save_network
from diffusionblocks.converter.engine import _trained
from diffusionblocks.converter.feeding import Feeder
from diffusionblocks.converter.parts import load_training, save_training
from diffusionblocks.converter.residence import Residence
from diffusionblocks.converter.settings import Settings
from diffusionblocks.export import export_bundle
from diffusionblocks.export.verify import verify_bundle
from diffusionblocks.runtime import manifest, open_bundle
from diffusionblocks.runtime.errors import BadInput

SETTINGS = {"input_shape": (64,), "num_blocks": 2, "context": "stem"}


def test_blocks_with_ends_of_their_own_start_as_the_original(trained_mlp, digits) -> None:
    x = torch.from_numpy(digits[0][:5])
    shared, own = (convert(trained_mlp, ends=ends, **SETTINGS) for ends in ("shared", "own"))
    assert torch.equal(own.denoise(x), shared.denoise(x))
    with torch.no_grad():
        assert torch.equal(own.exact(x)[0], trained_mlp(x))
    of_original = {p.data_ptr() for p in own.stem.module.parameters()}
    assert of_original == {p.data_ptr() for p in own.stems[0].module.parameters()}  # no memory until they train


def test_they_train_with_their_block_and_leave_the_original_alone(trained_mlp, digits, tmp_path: Path) -> None:
    x = torch.from_numpy(digits[0][:5])
    network = convert(trained_mlp, ends="own", **SETTINGS)
    before = network.block_state(0)
    other = network.block_state(1)
    finetune(network, digits[0][:500], digits[1][:500], steps=5, blocks=[0])
    after = network.block_state(0)
    for part in ("stem.", "head.", "block."):
        assert any(not torch.equal(after[n], before[n]) for n in before if n.startswith(part)), part
    assert all(torch.equal(t, other[n]) for n, t in network.block_state(1).items())
    with torch.no_grad():
        assert torch.equal(network.exact(x)[0], trained_mlp(x))
    finetune(network, digits[0][:500], digits[1][:500], steps=5, blocks=[1])
    folder = export_bundle(network, tmp_path / "own.dblocks")
    assert {"stem.onnx", "stem_00.onnx", "stem_01.onnx", "head.onnx", "head_01.onnx"} <= {p.name for p in folder.rglob("*.onnx")}  # fmt: skip
    assert verify_bundle(folder).ok
    with open_bundle(folder) as bundle:
        np.testing.assert_allclose(bundle.run(x.numpy(), "exact"), network.exact(x)[0].numpy(), atol=1e-5)
        for read in ("last", "mean"):
            want = network.denoise(x, read=read).numpy()
            np.testing.assert_allclose(bundle.run(x.numpy(), "denoise", read=read), want, atol=1e-4)
    save_training(network, tmp_path / "train")
    again = load_training(tmp_path / "train")
    assert torch.equal(again.denoise(x), network.denoise(x))
    module = load_network(save_network(network, tmp_path / "network"))
    with torch.no_grad():
        assert torch.equal(module(x)[0], trained_mlp(x))
    assert torch.equal(module.denoise(x, read="mean"), network.denoise(x, read="mean"))


def test_shared_ends_are_not_trained(trained_mlp) -> None:
    shared, own = (convert(trained_mlp, ends=ends, tune="adaln", **SETTINGS) for ends in ("shared", "own"))
    assert not any(n.startswith(("stem.", "head.")) for n in _trained(shared, 0))
    ends = {n for n in _trained(own, 0) if n.startswith(("stem.", "head."))}
    assert ends == {n for n in own.block_state(0) if n.startswith(("stem.", "head."))} != set()


@pytest.mark.parametrize("tune", ["adaln", "lora", "block"])
def test_a_head_for_new_labels_trains_whatever_else_does(trained_mlp, digits, tune: str) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2, new_labels=10, tune=tune)
    before = network.block_state(0)
    finetune(network, digits[0][:200], digits[1][:200], steps=3, blocks=[0])
    heads = {n: t for n, t in network.block_state(0).items() if n.startswith("head.")}
    assert heads
    assert any(not torch.equal(t, before[n]) for n, t in heads.items())


def test_settings_of_older_bundles_mean_what_they_meant() -> None:
    for scratch, ends in ((False, "shared"), (True, "own")):
        settings = Settings(context="stem", scratch=scratch)
        assert settings.ends == ends
        older = {k: v for k, v in settings.to_json().items() if k != "ends"}
        assert Settings.from_json(older) == settings == Settings.from_json(settings.to_json())


@pytest.mark.parametrize(
    ("fields", "way"),
    [
        ({"ends": "own"}, "--context stem"),
        ({"ends": "own", "context": "carry"}, "--ends shared"),
        ({"ends": "shared", "context": "stem", "scratch": True}, "--ends own"),
        ({"ends": "both"}, "shared, own"),
    ],
)
def test_ends_that_cannot_be_are_refused(fields: dict[str, str], way: str) -> None:
    with pytest.raises(BadInput) as caught:
        Settings(**fields)
    assert way in (caught.value.hint or "")


@pytest.fixture
def modulated() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 4, "sample_size": 8}
    model = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=10, dropout=0.0).eval()
    steps, labels = torch.tensor([3.0, 7.0]), torch.tensor([1, 2])
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": steps, "class_labels": labels}


def test_a_stem_of_a_blocks_own_makes_what_that_block_reads(modulated, tmp_path: Path) -> None:
    """Where blocks divide layers, the stem makes the modulation of every layer: other blocks' are not this one's to hold."""
    model, example = modulated
    network = convert(model, example, num_blocks=8, task="diffusion")
    layers = [{name.split(".")[1] for name, _ in own.module.named_parameters() if ".norm1.linear" in name} for own in network.stems]  # fmt: skip
    assert layers == [{"0"}, {"0"}, {"1"}, {"1"}, {"2"}, {"2"}, {"3"}, {"3"}]
    whole = sum(p.numel() for p in network.stem.module.parameters())
    assert all(sum(p.numel() for p in own.module.parameters()) < whole / 2 for own in network.stems)
    z, sigma = torch.randn(2, *network.require_target().shape), torch.full((2,), 0.5)
    for b in range(8):
        states = []
        for own in (b, None):
            env = network.inputs_env(example)
            network.run_stem(env, own)
            with torch.no_grad():
                states.append(network.run_block(env, b, z, sigma)[0])
        assert torch.equal(*states)
    network.trained = [True] * 8
    folder = export_bundle(network, tmp_path / "own.dblocks")
    records = manifest.read(folder)
    assert all(b.stem is not None and b.stem.bytes < records.stem.bytes / 2 for b in records.blocks)
    assert verify_bundle(folder).ok


def test_a_teacher_has_its_own_ends_where_a_block_has_others(modulated, monkeypatch) -> None:
    """Where the block trains the original's stem and head are not, so that they are brought there."""
    model, example = modulated
    network = convert(model, example, num_blocks=2, task="diffusion")
    residence = Residence(network, torch.device("cpu"))
    passing, brought = residence.passing, []

    def watched(*modules: torch.nn.Module) -> AbstractContextManager[None]:
        brought.extend(modules)
        return passing(*modules)

    monkeypatch.setattr(residence, "passing", watched)
    with torch.no_grad():
        taught = Feeder(network, 1, residence).original(network.inputs_env(example))
        assert torch.equal(taught, model(**example, return_dict=False)[0])
    wanted = [network.stem, network.head, *network.contexts]
    assert {id(piece.module) for piece in wanted} == {id(module) for module in brought}
