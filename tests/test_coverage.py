"""A fast part of the zoo through benchmarks/coverage.py: captured, counted, cut, conditioned, with gradients; some exported and run as well."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the zoo is a package of its own beside the script
_spec = importlib.util.spec_from_file_location("zoo_coverage", BENCHMARKS / "coverage.py")
assert _spec is not None
assert _spec.loader is not None
coverage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(coverage)
sys.path.remove(str(BENCHMARKS))

FAST = {
    "own": """nanogpt llama pre_norm post_norm sandwich_norm torch_seq2seq parallel_one_norm parallel_two_norms layer_scale
        stochastic_depth rezero gated_residual scaled_skip masked_encoder fixup inplace_resnet preact_resnet se_resnet convnext
        res2net repvgg audio_resnet residual_gru tabular unet dit looped dense_moe linear_attention two_towers siamese perceiver
        two_streams hourglass long_skip plain_mlp densenet many_outputs early_exit""",
    "timm": "test_byobnet test_efficientnet",
    "torchvision": "resnet18 vgg11",
    "transformers": "bert gpt2 t5 albert clip dbrx",
    "diffusers": "DiTTransformer2DModel UNet2DModel",
}
EXPORTED = [
    "nanogpt",
    "post_norm",
    "layer_scale",
    "masked_encoder",
    "fixup",
    "inplace_resnet",
    "res2net",
    "residual_gru",
    "unet",
    "dit",
    "looped",
    "siamese",
    "perceiver",
    "long_skip",
    "many_outputs",
    "early_exit",
    "gpt2",
    "test_byobnet",
    "UNet2DModel",
    "densenet",
]
LONG = ("own/long_skip", "diffusers/UNet2DModel")
QUICK = ("nanogpt", "post_norm", "fixup", "gpt2", "densenet")
"""Exported ones that ``make test`` has; the others are in ``make roads``."""
NAMES = [f"{family}/{name}" for family, names in FAST.items() for name in names.split()]


def _marks(name: str) -> list[pytest.MarkDecorator]:
    short = name.split("/")[1]
    if name in LONG:
        return [pytest.mark.slow]
    exported = short in EXPORTED and short not in QUICK
    return [pytest.mark.road] if exported or short in ("dbrx", "torch_seq2seq") else []


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _entry(name: str) -> object:
    return next(e for e in coverage.entries(name.split("/")[0]) if e.name == name)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", [pytest.param(n, marks=_marks(n)) for n in NAMES])
def test_architecture(name: str) -> None:
    for package in ("transformers", "diffusers"):
        if name.startswith(package):
            pytest.importorskip(package)
    entry, exported = _entry(name), name.split("/")[1] in EXPORTED
    result = coverage.one(entry, export=exported)
    assert coverage.verdict(entry, result if exported else result | {"onnx": 0.0}) == "exact", result


@pytest.mark.parametrize(
    ("column", "value"),
    [("branches", 5), ("cut", 1e-9), ("adaln", 1e-9), ("gradients", ["block 0: w"]), ("onnx", 1e-3), ("refused", "no")],
)
def test_one_wrong_column_is_not_exact(column: str, value: object) -> None:
    entry = _entry("own/nanogpt")
    good = {"branches": entry.branches, "cut": 0.0, "adaln": 0.0, "gradients": [], "onnx": 1e-6}
    assert coverage.verdict(entry, good) == "exact"
    assert coverage.verdict(entry, good | {column: value}) != "exact"


def test_the_subset_is_large_and_real() -> None:
    assert len(set(NAMES)) >= 40
    for family in FAST:
        assert {n for n in NAMES if n.startswith(f"{family}/")} <= {e.name for e in coverage.entries(family)}
