"""Stems and heads of the blocks' own: they start as the original's, train with their block alone, and leave the original as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusionblocks.converter import convert, finetune, load_network, save_network
from diffusionblocks.converter.engine import _trained
from diffusionblocks.converter.parts import load_training, save_training
from diffusionblocks.converter.settings import Settings
from diffusionblocks.export import export_bundle
from diffusionblocks.export.verify import verify_bundle
from diffusionblocks.runtime import open_bundle
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
