"""torchvision's classification architectures, their residual branches counted from the stage tables in its source."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.entry import Entry


def T(name: str, branches: int, why: str, size: int = 64, **options: Any) -> Entry:
    """One registered torchvision model with ten classes and square images of ``size``."""

    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=10, **options).eval()

    return Entry(f"torchvision/{name}", build, lambda b: {"x": torch.randn(b, 3, size, size)}, branches, why)


def blocks(name: str, *depths: int, kind: str = "blocks", each: int = 1, size: int = 64, **options: Any) -> Entry:
    """A model whose every block has ``each`` residual branches."""
    per = f" x {each}" if each > 1 else ""
    return T(name, each * sum(depths), f"{'+'.join(map(str, depths))} {kind}{per}", size, **options)


def regnet(name: str, *depths: int) -> Entry:
    """RegNet: a bottleneck block a layer, with a projection shortcut where the shape changes."""
    return blocks(name, *depths, kind="bottlenecks")


def mbconv(name: str, *repeats: int, kept: tuple[int, ...] = ()) -> Entry:
    """Inverted residual stages: a stage's first block changes the shape (no skip), except in the stages ``kept``."""
    skips = [n if i in kept else n - 1 for i, n in enumerate(repeats)]
    return T(name, sum(skips), f"{'+'.join(map(str, skips))} inverted residuals with a skip")


CONCATENATION = "concatenation only"
PLAIN = "no skips"
LAYERS = "layers (attn, mlp)"

ENTRIES: tuple[Entry, ...] = (
    T("alexnet", 0, PLAIN),
    *(T(name, 0, PLAIN) for name in ("vgg11", "vgg13_bn", "vgg16")),
    *(T(name, 0, CONCATENATION) for name in ("squeezenet1_0", "squeezenet1_1")),
    *(T(name, 0, CONCATENATION) for name in ("densenet121", "densenet161", "densenet169", "densenet201")),
    T("googlenet", 0, CONCATENATION, init_weights=False, aux_logits=False),
    T("inception_v3", 0, CONCATENATION, 96, init_weights=False, aux_logits=False),
    *(
        T(f"shufflenet_v2_{width}", 0, "channel split and concatenation")
        for width in ("x0_5", "x1_0", "x1_5", "x2_0")
    ),
    blocks("resnet18", 2, 2, 2, 2, kind="basic blocks"),
    blocks("resnet34", 3, 4, 6, 3, kind="basic blocks"),
    blocks("resnet50", 3, 4, 6, 3, kind="bottlenecks"),
    blocks("resnet101", 3, 4, 23, 3, kind="bottlenecks"),
    blocks("resnet152", 3, 8, 36, 3, kind="bottlenecks"),
    blocks("resnext50_32x4d", 3, 4, 6, 3, kind="bottlenecks"),
    blocks("resnext101_32x8d", 3, 4, 23, 3, kind="bottlenecks"),
    blocks("wide_resnet50_2", 3, 4, 6, 3, kind="bottlenecks"),
    regnet("regnet_x_400mf", 1, 2, 7, 12),
    regnet("regnet_x_800mf", 1, 3, 7, 5),
    regnet("regnet_x_1_6gf", 2, 4, 10, 2),
    regnet("regnet_x_3_2gf", 2, 6, 15, 2),
    regnet("regnet_x_8gf", 2, 5, 15, 1),
    regnet("regnet_x_16gf", 2, 6, 13, 1),
    regnet("regnet_y_400mf", 1, 3, 6, 6),
    regnet("regnet_y_800mf", 1, 3, 8, 2),
    regnet("regnet_y_1_6gf", 2, 6, 17, 2),
    regnet("regnet_y_3_2gf", 2, 5, 13, 1),
    regnet("regnet_y_8gf", 2, 4, 10, 1),
    regnet("regnet_y_16gf", 2, 4, 11, 1),
    mbconv("mobilenet_v2", 1, 2, 3, 4, 3, 3, 1),
    mbconv("mobilenet_v3_large", 1, 2, 3, 4, 2, 3, kept=(0,)),
    mbconv("mobilenet_v3_small", 1, 2, 3, 2, 3),
    *(mbconv(f"mnasnet{width}", 3, 3, 3, 2, 4, 1) for width in ("0_5", "0_75", "1_0", "1_3")),
    mbconv("efficientnet_b0", 1, 2, 2, 3, 3, 4, 1),
    mbconv("efficientnet_b1", 2, 3, 3, 4, 4, 5, 2),
    mbconv("efficientnet_b2", 2, 3, 3, 4, 4, 5, 2),
    mbconv("efficientnet_b3", 2, 3, 3, 5, 5, 6, 2),
    mbconv("efficientnet_b4", 2, 4, 4, 6, 6, 8, 2),
    mbconv("efficientnet_b5", 3, 5, 5, 7, 7, 9, 3),
    mbconv("efficientnet_b6", 3, 6, 6, 8, 8, 11, 3),
    mbconv("efficientnet_v2_s", 2, 4, 4, 6, 9, 15, kept=(0,)),
    mbconv("efficientnet_v2_m", 3, 5, 5, 7, 14, 18, 5, kept=(0,)),
    blocks("convnext_tiny", 3, 3, 9, 3),
    blocks("convnext_small", 3, 3, 27, 3),
    blocks("convnext_base", 3, 3, 27, 3),
    blocks("swin_t", 2, 2, 6, 2, kind=LAYERS, each=2),
    blocks("swin_s", 2, 2, 18, 2, kind=LAYERS, each=2),
    blocks("swin_v2_t", 2, 2, 6, 2, kind=LAYERS, each=2),
    blocks("swin_v2_s", 2, 2, 18, 2, kind=LAYERS, each=2),
    blocks("vit_b_16", 12, kind=LAYERS, each=2, image_size=64),
    blocks("vit_b_32", 12, kind=LAYERS, each=2, image_size=64),
    blocks("maxvit_t", 2, 2, 5, 2, kind="layers (MBConv, window attn, mlp, grid attn, mlp)", each=5, size=224),
)
