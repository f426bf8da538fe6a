"""Whole real architectures: units found, the converted network equal to the original to the bit, with the AdaLN inserted."""

from __future__ import annotations

import pytest
import torch
from diffusionblocks.converter import convert
from diffusionblocks.converter.adaln import Conditioner
from diffusionblocks.converter.blocks import CONDITIONING
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import open_bundle
from torch import nn


class Encoder(nn.Module):
    """torch's own TransformerEncoder between an embedding and a classifier."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.embed = nn.Linear(12, 32)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def _timm(name: str, **options: object):
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return build


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
# name: (constructor, input shape, units known from the configuration)
ZOO = {
    "vit": (_timm("vit_tiny_patch16_224", **SMALL_VIT), (3, 32, 32), 8),
    "deit": (_timm("deit_tiny_patch16_224", **SMALL_VIT), (3, 32, 32), 8),
    "deit-distilled": (_timm("deit_tiny_distilled_patch16_224", **SMALL_VIT), (3, 32, 32), 8),
    "resnet18": (_timm("resnet18", num_classes=7), (3, 64, 64), 8),
    "resnet50": (_timm("resnet50", num_classes=7), (3, 64, 64), 16),
    "convnext": (_timm("convnext_atto", num_classes=7), (3, 64, 64), 12),
    "swin": (
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=56,
            embed_dim=24,
            depths=(2, 2, 2),
            num_heads=(2, 2, 2),
            num_classes=7,
        ),
        (3, 56, 56),
        12,
    ),
    "mixer": (_timm("mixer_s32_224", img_size=64, num_classes=7), (3, 64, 64), 16),
    "encoder-pre-norm": (lambda: Encoder(norm_first=True), (7, 12), 8),
    "encoder-post-norm": (lambda: Encoder(norm_first=False), (7, 12), 8),
}


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = ZOO[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.3)  # zero-initialised gates and layer scales would hide errors
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize(("context", "tune"), [("frozen", "adaln"), ("stem", "lora"), ("carry", "block")])
def test_converted_equals_original_to_the_bit(name: str, context: str, tune: str) -> None:
    model, shape, units = _build(name), ZOO[name][1], ZOO[name][2]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    network = convert(model, input_shape=shape, num_blocks=3, context=context, tune=tune)
    assert len(network.analysis.found.trunk) == units
    assert sum(network.partition.counts) == units
    for batch in (1, 5):
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = model(x)
        assert torch.equal(network.exact(x)[0], expected)
        z, sigma = torch.randn(batch, network.target.dim), torch.rand(batch) + 0.1
        env = network.inputs_env(x)
        network.run_stem(env)
        if context != "stem":
            for b, block in enumerate(network.blocks):
                assert torch.equal(_state(network, env, b, z, sigma), _after(network, env, b)), f"block {b}"
                assert block.units
            assert torch.equal(network.run_head(env, env["stream"])[0], expected)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}


def _state(network, env, b, z, sigma) -> torch.Tensor:
    """The DiffusionBlock's own state, before any readout."""
    block = network.blocks[b]
    body = block.module.get_submodule("body")
    by_name = {"adaln_z": z, "adaln_sigma": sigma}
    placeholders = [str(n.target) for n in body.graph.nodes if n.op == "placeholder"][1:]
    sides = iter(block.sides)
    values = [by_name[p] if p in by_name else env[next(sides)] for p in placeholders]
    with torch.no_grad():
        return body(env["stream"], *values)[0]


def _after(network, env, b) -> torch.Tensor:
    with torch.no_grad():
        network.run_context(env, b)
    return env["stream"]


@pytest.mark.road
@pytest.mark.parametrize("name", ZOO)
def test_conditioning_trains_and_stays_small(name: str) -> None:
    network = convert(_build(name), input_shape=ZOO[name][1], num_blocks=3, tune="adaln")
    x = torch.randn(3, *ZOO[name][1])
    for b, block in enumerate(network.blocks):
        conditioning = {
            n: p
            for n, p in block.module.named_parameters()
            if any(part.startswith(CONDITIONING) for part in n.split("."))
        }
        assert sum(p.numel() for p in conditioning.values()) <= max(0.05 * block.parameters, _smallest(network, block))
        with torch.no_grad():
            for p in conditioning.values():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        env = network.inputs_env(x)
        with torch.no_grad():
            network.run_stem(env)
            for a in range(b):
                network.run_context(env, a)
        f, _ = network.run_block(env, b, torch.randn(3, network.target.dim), torch.rand(3) + 0.1)
        f.square().mean().backward()
        dead = [n for n, p in conditioning.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
        assert not dead
        conditioner = _conditioner(block)
        parts = conditioner.projection.weight.grad.split(conditioner.rows)
        assert all(bool(part.abs().sum() > 0) for part in parts)


def _smallest(network, block) -> int:
    """Parameters of the narrowest conditioning (width 1), where 5 % of a tiny block is less than that."""
    return _conditioner(block).projection.out_features * 2 + 17 + 2 + network.target.dim


def _conditioner(block) -> Conditioner:
    return next(m for m in block.module.modules() if isinstance(m, Conditioner))


def test_unit_names_are_module_names() -> None:
    network = convert(_build("vit"), input_shape=(3, 32, 32), num_blocks=2)
    assert network.blocks[0].units == ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")


@pytest.mark.road
@pytest.mark.parametrize("name", ["vit", pytest.param("swin", marks=pytest.mark.slow), "resnet18"])
def test_the_bundle_is_the_original(name: str, tmp_path) -> None:
    """Class tokens that are expanded to the batch, windows and batch norms, exported together and run at other batch sizes."""
    model, shape = _build(name), ZOO[name][1]
    export_bundle(convert(model, input_shape=shape, num_blocks=2), tmp_path / "b")
    with open_bundle(tmp_path / "b") as bundle, torch.no_grad():
        for batch in (1, 5):
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
            expected = model(x)
            got = torch.from_numpy(bundle.run(x.numpy(), mode="exact"))
            assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
