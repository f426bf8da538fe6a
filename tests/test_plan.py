"""``dbconvert plan``: bytes from shapes alone against what torch keeps, makes and frees in a real update."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from diffusionblocks.converter import blocks, convert
from diffusionblocks.converter.capture import capture
from diffusionblocks.converter.footprint import Bytes, Footprint
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.outline import outline
from diffusionblocks.converter.passes import Passes
from diffusionblocks.converter.plan import Plan, plan
from diffusionblocks.converter.plan_cli import plan_command
from diffusionblocks.converter.plan_drawing import draw_plan
from diffusionblocks.converter.recompute import recomputed
from diffusionblocks.converter.timeline import Tracker
from diffusionblocks.converter.weightless import load_weightless
from diffusionblocks.runtime.errors import BadInput
from rich.console import Console
from torch import nn
from torch.nn import functional as F

BATCH = 5
"""Neither of the batches that pieces are measured at."""
SEVEN_BILLION = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


class Unit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    units = (Unit(48) for _ in range(6))
    return nn.Sequential(nn.Linear(64, 48), *units, nn.LayerNorm(48), nn.Linear(48, 10)).eval()


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10).eval()


def resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=10).eval()


MODELS = {"mlp": (mlp, (64,)), "vit": (vit, (3, 32, 32)), "resnet": (resnet, (3, 64, 64))}
BLOCKS = 2


@cache
def planned(name: str, tune: str, context: str, precision: str, checkpointing: bool = False) -> Footprint:
    make, shape = MODELS[name]
    captured = load_weightless(make(), input_shape=shape).captured
    passes = Passes(captured, outline(captured, tune), precision)
    return Footprint(passes, context=context, checkpointing=checkpointing)


def real(network: ConvertedNetwork, b: int, inputs: torch.Tensor, precision: str) -> dict[str, int]:
    """Bytes of block b's second update: the same kinds as in :class:`Bytes`."""
    target, module, n = network.require_target(), network.blocks[b].module, len(inputs)
    tune, context = network.settings.tune, network.settings.context
    parts = [p.module for p in (network.stem, *network.contexts, network.head)]
    everything = [*parts, *(block.module for block in network.blocks)]
    held = [*_held(everything), target.table]
    y, sigma, z = torch.zeros(n, dtype=torch.long), torch.full((n,), 0.5), torch.randn(n, target.dim)
    data = [inputs, y, sigma, z]
    with blocks.frozen(everything):
        trained = [p for _, p in blocks.select_trainable(module, tune)]
        blocks.set_batch_norm_training(module, tune == "block")
        held += _held([module])
        optimizer = torch.optim.AdamW(trained, fused=True)
        saved: dict[int, torch.UntypedStorage] = {}
        turn = 0

        def loss() -> torch.Tensor:
            nonlocal turn
            env = network.inputs_env(inputs)
            with torch.no_grad():
                network.run_stem(env)
                for a in range(b if context == "frozen" else 0):
                    network.run_context(env, a)
            turn = len(tracker.events)
            with _kept(saved):
                f, _ = network.run_block(env, b, z, sigma)
                return F.cross_entropy(target.training_logits(f.float(), z, sigma), y, reduction="none").sum()

        for step in range(2):
            optimizer.zero_grad(set_to_none=True)
            saved.clear()
            tracker = Tracker([*held, *data])
            with tracker:
                with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
                    made = loss()
                kept = sum(s.nbytes() for k, s in saved.items() if k not in _storages([*held, *data]))
                saved.clear()
                made.backward()
                tracker.stop()
            if step == 0:
                optimizer.step()
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        blocks.set_batch_norm_training(module, False)
    weights = _bytes(_held([module]))
    moments = _bytes(t for of in optimizer.state.values() for name, t in of.items() if name != "step")
    resident = _bytes([*_held([network.stem.module, network.head.module]), target.table])
    passing = max((_bytes(_held([c.module])) for c in network.contexts[:b] if context == "frozen"), default=0)
    peak = weights + moments + resident + _bytes(data) + max(_most(tracker, turn) + passing, _most(tracker))
    return {"weights": weights, "gradients": gradients, "moments": moments, "activations": kept, "peak": peak}


def _held(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    return list({id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values())


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors}


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _kept(saved: dict[int, torch.UntypedStorage]) -> Any:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _most(tracker: Tracker, turn: int | None = None) -> int:
    now = most = 0
    for index, made in tracker.events[:turn]:
        now += tracker.sizes[index] if made else -tracker.sizes[index]
        most = max(most, now)
    return most


@pytest.mark.road
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(("tune", "context"), [("block", "frozen"), ("adaln", "frozen"), ("lora", "stem")])
@pytest.mark.parametrize("name", MODELS)
def test_a_blocks_bytes_are_those_of_a_real_update(name: str, tune: str, context: str, precision: str) -> None:
    make, shape = MODELS[name]
    network = convert(make(), input_shape=shape, num_blocks=BLOCKS, tune=tune, context=context)
    inputs = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0))
    footprint = planned(name, tune, context, precision)
    for b in range(BLOCKS):
        expected = footprint.block(network.partition.counts, b, BATCH)
        found = real(network, b, inputs, precision)
        for kind in ("weights", "gradients", "moments"):
            assert getattr(expected, kind) == found[kind], kind
        exact = precision == "float32"
        assert expected.activations == pytest.approx(found["activations"], rel=0 if exact else 0.01)
        assert expected.peak == pytest.approx(found["peak"], rel=0.1)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_recomputed_units_keep_what_enters_them(precision: str) -> None:
    make, shape = MODELS["vit"]
    network = convert(make(), input_shape=shape, num_blocks=BLOCKS)
    inputs = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0))
    footprint = planned("vit", "block", "frozen", precision, checkpointing=True)
    for b, block in enumerate(network.blocks):
        ends = [unit.add.name for unit in network.units_of(b)]
        again = blocks.Block(recomputed(block.module, ends), block.sides, block.units, block.parameters)
        network.blocks[b] = again
        expected = footprint.block(network.partition.counts, b, BATCH)
        found = real(network, b, inputs, precision)
        assert (
            expected.activations
            < 0.5 * planned("vit", "block", "frozen", precision).block((4, 4), b, BATCH).activations
        )
        assert expected.activations == pytest.approx(found["activations"], rel=0.1)
        assert expected.peak == pytest.approx(found["peak"], rel=0.1)


@pytest.mark.road
@pytest.mark.parametrize("config", ["gpt2", "llama"])
def test_end_to_end_bytes_of_a_language_model_are_those_of_a_real_update(config: str) -> None:
    transformers = pytest.importorskip("transformers")
    if config == "gpt2":
        settings = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=100, use_cache=False)
        model = transformers.GPT2LMHeadModel(settings).eval()
    else:
        settings = transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=100
        )
        settings.use_cache = False
        model = transformers.LlamaForCausalLM(settings).eval()
    ids = torch.ones(BATCH, 24, dtype=torch.long)
    captured = capture(model, {"input_ids": ids})
    expected = Footprint(Passes(captured, outline(captured, "block"))).whole(BATCH)
    graph = capture(model, {"input_ids": ids}).graph
    trained = [p for p in graph.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    saved: dict[int, torch.UntypedStorage] = {}
    with _kept(saved):
        loss = F.cross_entropy(graph(ids)[0].flatten(0, -2), ids.flatten())
    kept = sum(s.nbytes() for k, s in saved.items() if k not in _storages([*_held([graph]), ids]))
    loss.backward()
    optimizer.step()
    assert expected.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert expected.moments == _bytes(t for of in optimizer.state.values() for name, t in of.items() if name != "step")
    assert _bytes(graph.parameters()) <= expected.weights <= _bytes(_held([graph]))  # some buffers are not read
    assert expected.activations == pytest.approx(kept, rel=0.02)


def test_the_recommended_division_fits_and_one_block_less_does_not() -> None:
    free = plan(vit(), 1 << 40, batch=BATCH, input_shape=(3, 32, 32), precision="float32")
    assert free.recommended.blocks == 1
    peaks = {d.blocks: d.largest.peak for d in free.divisions}
    memory = peaks[2]
    found = plan(vit(), memory, batch=BATCH, input_shape=(3, 32, 32), precision="float32")
    assert found.recommended.blocks == 2
    assert found.recommended.largest.peak <= memory < peaks[1]
    assert max(block.peak for block in found.per_block) == found.recommended.largest.peak
    assert [d.fits for d in found.divisions if d.blocks < 2] == [False]


def test_the_largest_batch_fits_and_twice_as_much_does_not() -> None:
    memory = 8 << 20
    found = plan(vit(), memory, input_shape=(3, 32, 32), precision="float32")
    assert found.recommended.largest.peak <= memory
    with pytest.raises(BadInput, match="No division"):
        plan(vit(), memory, batch=2 * found.recommended.batch, input_shape=(3, 32, 32), precision="float32")


def test_too_little_memory_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(BadInput) as refused:
        plan(mlp(), 1000, input_shape=(64,))
    assert refused.value.exit_code == 2
    assert refused.value.hint is not None
    least = int(refused.value.hint.partition("(")[2].partition(" bytes")[0])
    assert plan(mlp(), least, input_shape=(64,)).recommended.largest.peak == least
    with pytest.raises(BadInput):
        plan(mlp(), least - 1, input_shape=(64,))


def test_checkpointing_and_frozen_weights_need_less() -> None:
    def largest(**options: Any) -> Bytes:
        return plan(vit(), 1 << 40, batch=64, num_blocks=1, input_shape=(3, 32, 32), **options).recommended.largest

    plain = largest()
    assert largest(checkpointing=True).peak < plain.peak
    assert largest(tune="adaln").moments < largest(tune="lora").moments < plain.moments


def test_more_units_than_there_are_are_refused() -> None:
    with pytest.raises(BadInput, match="has 6 residual units"):
        plan(mlp(), 1 << 40, num_blocks=7, input_shape=(64,))


@pytest.mark.parametrize(
    ("name", "value"), [("context", "carry"), ("tune", "all"), ("precision", "int8"), ("batch", 0)]
)
def test_unknown_choices_are_refused(name: str, value: Any) -> None:
    with pytest.raises(BadInput, match=str(value)):
        plan(mlp(), 1 << 40, input_shape=(64,), **{name: value})


def test_running_one_block_needs_less_than_the_whole_and_halves_less_still() -> None:
    found = plan(vit(), 1 << 40, batch=1, num_blocks=4, input_shape=(3, 32, 32))
    running = found.running
    assert running["float32"].block < running["float32"].whole
    assert running["float16"].whole < 0.6 * running["float32"].whole


def invoke(*args: str) -> Any:
    return CliRunner().invoke(plan_command, list(args))


def test_the_command_prints_one_object_and_builds_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = nn.Parameter.__new__

    def watching(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        made.append("meta" if data is None else data.device.type)
        return original(cls, data, requires_grad)

    monkeypatch.setattr(nn.Parameter, "__new__", watching)
    result = invoke("timm:vit_tiny_patch16_224", "--memory", "2GiB", "--batch", "8", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["parameters"] == 5_717_416
    assert data["recommended"]["largest"]["peak"] <= 2 << 30
    assert data["notes"][1:] == []
    assert set(made) == {"meta"}


def test_the_tables_name_every_division() -> None:
    found = plan(vit(), 1 << 40, batch=4, input_shape=(3, 32, 32))
    console = Console(width=100, record=True, force_terminal=False)
    draw_plan(found, console)
    text = console.export_text()
    assert "end to end" in text
    assert all(f"\n  {d.blocks} " in text for d in found.divisions)


def test_a_model_that_needs_numbers_is_built_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asking.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Unit(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.f = nn.Linear(8, 8)\n        self.g = nn.Linear(8, 8)\n"
        "        self.scale = float(torch.ones(1))\n"
        "    def forward(self, x):\n        return x + self.scale * self.g(torch.relu(self.f(x)))\n"
        "def build():\n    return nn.Sequential(nn.Linear(4, 8), Unit(), Unit(), nn.Linear(8, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = plan("asking:build", 1 << 30, batch=4, input_shape=(4,))
    assert "could not be captured without weights" in " ".join(found.notes)


@pytest.mark.slow
def test_seven_billion_parameters_are_planned_without_one_of_them(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_BILLION))
    started = time.monotonic()
    loaded = load_weightless(str(tmp_path), input_shape=(2048,))
    assert loaded.note is None
    assert all(p.is_meta for p in loaded.captured.graph.parameters())
    found: Plan = plan(str(tmp_path), 80 << 30, batch=1, input_shape=(2048,), precision="bf16")
    assert time.monotonic() - started < 60
    assert found.parameters == 6_738_415_616
    assert found.recommended.largest.peak <= 80 << 30 < found.end_to_end.peak
    assert _decreasing([d.largest.peak for d in found.divisions])


def _decreasing(values: Sequence[int]) -> bool:
    return all(a >= b for a, b in pairwise(values))
