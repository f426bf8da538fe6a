"""``dbconvert plan``: bytes from shapes alone against what torch keeps, makes and frees in a real update."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from diffusionblocks.converter import blocks, convert
from diffusionblocks.converter.capture import capture
from diffusionblocks.converter.dataset import ArrayDataset
from diffusionblocks.converter.draws import draw, generator_of
from diffusionblocks.converter.engine import Team, train_block
from diffusionblocks.converter.feeding import Feeder
from diffusionblocks.converter.footprint import Bytes, Footprint
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.objective import Objective
from diffusionblocks.converter.outline import outline
from diffusionblocks.converter.passes import Passes
from diffusionblocks.converter.plan import Plan, plan
from diffusionblocks.converter.plan_cli import plan_command
from diffusionblocks.converter.plan_drawing import draw_plan
from diffusionblocks.converter.recompute import recomputed
from diffusionblocks.converter.residence import Residence
from diffusionblocks.converter.settings import Settings
from diffusionblocks.converter.timeline import Tracker
from diffusionblocks.converter.train import settled
from diffusionblocks.converter.train_options import TrainOptions
from diffusionblocks.converter.weightless import load_weightless
from diffusionblocks.runtime.errors import BadInput
from rich.console import Console
from torch import distributed, nn
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
    passes = Passes(captured, outline(captured, Settings(tune=tune, context=context)), precision)
    return Footprint(passes, checkpointing=checkpointing)


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


def real_update(network: ConvertedNetwork, b: int, data: ArrayDataset, options: TrainOptions) -> dict[str, int]:
    """Bytes of block b's second update as the engine makes it, with all that feeds the block."""
    target, settings = network.require_target(), network.settings
    own = [(prefix, module) for prefix, module in network.own_modules(b)]
    shared = [p.module for p, o in ((network.stem, network.stems[b]), (network.head, network.heads[b])) if o is None]
    contexts = [piece.module for piece in network.contexts]
    others = [network.stem.module, network.head.module, *contexts, *(block.module for block in network.blocks)]
    batch = data.batch(range(BATCH))
    given = [*batch.inputs.values(), *([] if batch.targets is None else [batch.targets])]
    data.batch = lambda rows: batch  # type: ignore[method-assign]
    objective = Objective(network, b, data, options, Feeder(network, b, Residence(network, torch.device("cpu"))))
    run_block, tracker, turn = network.run_block, Tracker([]), 0

    def marked(*args: Any) -> Any:
        nonlocal turn
        turn = len(tracker.events)
        return run_block(*args)

    network.run_block = marked  # type: ignore[method-assign]
    levels = b + 1 if settings.context == "carry" else 1
    drawn = draw(
        generator_of(0, b, 0), rows=BATCH, batch=BATCH, shape=target.shape, choices=target.choices, levels=levels
    )
    with blocks.frozen([*others, *(module for _, module in own)]):
        trained = [p for prefix, m in own for _, p in blocks.select_trainable(m, network.tune_of(prefix))]
        held = [*_held([*others, *(module for _, module in own)]), *_held([target]), *given]
        optimizer = torch.optim.AdamW(trained, fused=True)
        saved: dict[int, torch.UntypedStorage] = {}
        for step in range(2):
            optimizer.zero_grad(set_to_none=True)
            saved.clear()
            tracker = Tracker(held)
            with tracker:
                with _kept(saved):
                    losses, _ = objective(0, drawn, slice(0, BATCH))
                kept = sum(s.nbytes() for k, s in saved.items() if k not in _storages(held))
                saved.clear()
                losses.sum().backward()
                tracker.stop()
            if step == 0:
                optimizer.step()
    weights = _bytes(_held([module for _, module in own]))
    moments = _bytes(t for of in optimizer.state.values() for name, t in of.items() if name != "step")
    others_passing = [_bytes(_held([m])) for m in _passing(network, b, options)]
    still = weights + moments + _bytes(_held([*shared, target])) + _bytes(given)
    peak = still + max(_most(tracker, turn) + max(others_passing, default=0), _most(tracker))
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    return {"weights": weights, "gradients": gradients, "moments": moments, "activations": kept, "peak": peak}


def _passing(network: ConvertedNetwork, b: int, options: TrainOptions) -> list[nn.Module]:
    """What is on the device for a while before block b computes."""
    originals = [piece.module for piece in network.contexts]
    if options.targets == "teacher":
        return originals
    if network.settings.context == "carry":
        return [*(block.module for block in network.blocks[:b]), *originals[: b + 1]]
    return originals[:b] if network.settings.context == "frozen" else []


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


def language_model() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_embd": 48, "n_head": 4, "vocab_size": 100, "n_positions": 24, "use_cache": False}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=False)).eval()
    return model, {"example": {"input_ids": torch.ones(2, 24, dtype=torch.long)}}


def bidirectional() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.BertConfig(**sizes, vocab_size=100, max_position_embeddings=24)
    return transformers.BertForMaskedLM(config).eval(), {"example": {"input_ids": torch.ones(2, 24, dtype=torch.long)}}


def diffusion_model() -> tuple[nn.Module, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "num_layers": 4, "sample_size": 8}
    model = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=10, dropout=0.0).eval()
    example = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3.0, 7.0]),
        "class_labels": torch.tensor([1, 2]),
    }
    return model, {"example": example}


class Looped(nn.Module):
    """A stem, two units applied four times, each reading what the stem made too, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inject = nn.Linear(64, 48), nn.Linear(48, 48)
        self.first, self.second = Unit(48), Unit(48)
        self.head = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.stem(x)
        state = torch.zeros_like(made)
        for _ in range(4):
            state = state + self.first.mlp(self.first.norm(state) + self.inject(made))
            state = self.second(state)
        return self.head(state)


def looped() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Looped().eval(), {"input_shape": (64,)}


def pictures() -> tuple[nn.Module, dict[str, Any]]:
    return vit(), {"input_shape": (3, 32, 32)}


@pytest.mark.road
@pytest.mark.parametrize(
    ("make", "settings", "options"),
    [
        (pictures, {"context": "carry"}, {}),
        (pictures, {"context": "stem", "ends": "own"}, {}),
        (pictures, {"context": "frozen"}, {"targets": "teacher"}),
        (pictures, {"context": "stem", "ends": "own"}, {"targets": "teacher"}),
        (pictures, {"context": "stem", "task": "features"}, {}),
        (pictures, {"context": "frozen", "task": "multi-label"}, {}),
        (language_model, {"task": "lm"}, {}),
        (language_model, {"task": "lm", "context": "stem", "ends": "own"}, {}),
        (bidirectional, {"task": "mdm", "mask_token": 99}, {}),
        (bidirectional, {"task": "classification"}, {}),
        (pictures, {"new_labels": 7}, {}),
        (pictures, {"new_labels": 7, "context": "stem", "ends": "own"}, {"clean": 1.0}),
        (pictures, {"new_labels": 7, "context": "carry"}, {}),
        (pictures, {"context": "frozen"}, {"clean": 1.0, "targets": "teacher"}),
        (looped, {"recurrent": True}, {}),
        (looped, {"recurrent": True, "ends": "own"}, {"clean": 1.0}),
        (looped, {"context": "frozen"}, {}),
        (diffusion_model, {"task": "diffusion"}, {}),
        (diffusion_model, {"task": "diffusion", "tune": "lora", "ends": "shared"}, {"targets": "teacher"}),
    ],
)
def test_every_way_of_training_takes_the_bytes_that_are_planned(
    make: Callable[[], tuple[nn.Module, dict[str, Any]]], settings: dict[str, Any], options: dict[str, Any]
) -> None:
    model, inputs = make()
    network = convert(model, **inputs, num_blocks=1 if settings.get("recurrent") else BLOCKS, **settings)
    captured = load_weightless(model, **inputs).captured
    outlined = outline(captured, network.settings)
    taught, clean = options.get("targets") == "teacher", bool(options.get("clean"))
    footprint = Footprint(Passes(captured, outlined), taught=taught, clean=clean)
    for b in range(network.num_blocks):
        expected = footprint.block(outlined.counts(network.num_blocks, "units"), b, BATCH)
        found = real_update(network, b, rows_for(network), TrainOptions(batch_size=BATCH, **options))
        for kind in ("weights", "gradients", "moments"):
            assert getattr(expected, kind) == found[kind], kind
        exact = network.settings.context != "carry" and not network.require_target().enters
        assert expected.activations == pytest.approx(found["activations"], rel=0.002 if exact else 0.03)
        assert expected.peak == pytest.approx(found["peak"], rel=0.1)


@pytest.mark.road
@pytest.mark.parametrize("ends", ["own", "shared"])
@pytest.mark.parametrize("count", [3, 8])
def test_layers_that_blocks_divide_keep_their_modulation_in_the_stem(count: int, ends: str) -> None:
    model, inputs = diffusion_model()  # of four layers, two units each
    network = convert(model, **inputs, num_blocks=count, task="diffusion", ends=ends)
    captured = load_weightless(model, **inputs).captured
    outlined = outline(captured, network.settings)
    footprint = Footprint(Passes(captured, outlined))
    whole = footprint.block((4, 4), 0, BATCH)
    for b in range(count):
        expected = footprint.block(outlined.counts(count, "units"), b, BATCH)
        found = real_update(network, b, rows_for(network), TrainOptions(batch_size=BATCH))
        for kind in ("gradients", "moments"):
            assert getattr(expected, kind) == found[kind], kind
        assert expected.weights == pytest.approx(found["weights"], rel=0.005)
        assert expected.peak == pytest.approx(found["peak"], rel=0.1)
        assert (expected.resident > whole.resident) == (ends == "shared")


def rows_for(network: ConvertedNetwork) -> ArrayDataset:
    """Rows that fit a network's inputs and targets."""
    draw, target = np.random.default_rng(0), network.require_target()
    example = zip(network.input_names, network.analysis.captured.example, strict=True)
    inputs = {
        name: draw.integers(1, 9, (BATCH, *t.shape[1:]))
        if not t.is_floating_point()
        else draw.standard_normal((BATCH, *t.shape[1:]), np.float32)
        for name, t in example
    }
    if target.enters:
        return ArrayDataset(inputs, None)
    shape = (BATCH, *(target.layout.shape if target.kind in ("features", "bits") else target.positions))
    return ArrayDataset(inputs, draw.integers(0, 2, shape))


def test_new_labels_train_a_head_of_their_own() -> None:
    found = plan(mlp(), 1 << 40, batch=8, num_blocks=3, input_shape=(64,), new_labels=7)
    network = convert(mlp(), input_shape=(64,), num_blocks=3, new_labels=7)
    block = found.recommended.largest
    assert found.context == "stem"
    assert block.weights == _bytes(_held(module for _, module in network.own_modules(0)))
    assert block.resident == _bytes(_held([network.stem.module, network.require_target()]))
    fresh = sum(p.nbytes for of in (nn.LayerNorm(48), nn.Linear(48, 7)) for p in of.parameters())
    alone = _bytes(_held([network.blocks[0].module]))
    assert block.weights == alone + fresh
    with pytest.raises(BadInput, match="no original to learn from"):
        plan(mlp(), 1 << 40, input_shape=(64,), new_labels=7, targets="teacher")


def test_recurrent_depth_is_planned_as_one_application() -> None:
    def planned(**options: Any) -> Plan:
        return plan(looped()[0], 1 << 40, batch=8, input_shape=(64,), **options)

    found, whole = planned(recurrent=True), planned(context="stem", num_blocks=1)
    assert [d.blocks for d in found.divisions] == [1]
    assert (found.recommended.counts, found.units) == ((2,), 8)
    assert found.recommended.largest.activations < 0.5 * whole.recommended.largest.activations
    shared = sum(p.nbytes for of in (Unit(48), Unit(48)) for p in of.parameters())
    assert found.end_to_end.gradients == sum(p.nbytes for p in looped()[0].parameters()) > shared
    assert (
        shared <= whole.recommended.largest.gradients < 2.5 * shared
    )  # each application's conditioning, and the weights once
    with pytest.raises(BadInput, match="2 blocks"):
        planned(recurrent=True, num_blocks=2)
    with pytest.raises(BadInput, match="applied again"):
        plan(mlp(), 1 << 40, input_shape=(64,), recurrent=True)


def test_a_second_loss_is_counted() -> None:
    def kept(**options: Any) -> int:
        return plan(vit(), 1 << 40, batch=8, input_shape=(3, 32, 32), **options).recommended.largest.activations

    assert kept(clean=0.5) > kept()
    model, inputs = diffusion_model()
    with pytest.raises(BadInput, match="without z"):
        plan(model, 1 << 40, **inputs, task="diffusion", clean=0.5)


def test_averaged_weights_and_ranks_that_share_a_block_add_what_they_hold() -> None:
    def block(**options: Any) -> Bytes:
        return plan(vit(), 1 << 40, batch=64, num_blocks=2, input_shape=(3, 32, 32), **options).recommended.largest

    alone, averaged, shared = block(), block(ema=True), block(ranks=2)
    assert averaged.average == alone.gradients
    assert averaged.peak == alone.peak + alone.gradients
    assert alone.peak < shared.peak <= alone.peak + alone.gradients


def test_ranks_that_share_a_block_hold_its_gradients_once(tmp_path: Path, trained_mlp: nn.Module) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        team = Team(0, 2, distributed.group.WORLD)  # its second rank is never asked
        options = settled(network, TrainOptions(steps=1, batch_size=BATCH))
        data, residence = rows_for(network), Residence(network, torch.device("cpu"))
        held: list[tuple[list[torch.Tensor], list[torch.UntypedStorage]]] = []

        def look(*_: Any) -> None:
            own = [p.grad for p in network.blocks[0].module.parameters() if p.grad is not None]
            held.append((own, _distinct(own)))

        train_block(network, 0, data, options, residence, team=team, progress=look)
    finally:
        distributed.destroy_process_group()
    gradients, storages = held[0]
    assert len(storages) < len(gradients)  # they lie in the buckets that are added up
    assert sum(s.nbytes() for s in storages) == _bytes(gradients) > 0


def _distinct(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    return list({t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values())


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
@pytest.mark.parametrize("config", ["gpt2", "llama", "albert"])
def test_end_to_end_bytes_of_a_language_model_are_those_of_a_real_update(config: str) -> None:
    transformers = pytest.importorskip("transformers")
    if config == "gpt2":
        settings = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=100, use_cache=False)
        model = transformers.GPT2LMHeadModel(settings).eval()
    elif config == "albert":  # one layer's weights, applied three times
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "embedding_size": 32}
        settings = transformers.AlbertConfig(num_hidden_layers=3, vocab_size=100, **sizes)
        model = transformers.AlbertForMaskedLM(settings).eval()
    else:
        settings = transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=100
        )
        settings.use_cache = False
        model = transformers.LlamaForCausalLM(settings).eval()
    ids = torch.ones(BATCH, 24, dtype=torch.long)
    captured = capture(model, {"input_ids": ids})
    expected = Footprint(Passes(captured, outline(captured, Settings()))).whole(BATCH)
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
    ("name", "value"),
    [
        ("context", "whole"),
        ("tune", "all"),
        ("precision", "int8"),
        ("batch", 0),
        ("targets", "none"),
        ("ranks", 0),
        ("task", "any"),
        ("new_labels", 1),
    ],
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


def test_the_command_takes_what_a_training_is_told(tmp_path: Path) -> None:
    program = torch.export.export(mlp(), (torch.zeros(2, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "mlp.pt2")
    options = ["--task", "features", "--context", "stem", "--ends", "own", "--targets", "teacher", "--ema", "--ranks", "2"]  # fmt: skip
    known = [str(tmp_path / "mlp.pt2"), "--memory", "1GiB", "--batch", "8"]
    data = json.loads(invoke(*known, *options, "--json").stdout)
    said = {name: data[name] for name in ("task", "context", "ends", "targets", "ema", "ranks")}
    assert said == {"task": "features", "context": "stem", "ends": "own", "targets": "teacher", "ema": True, "ranks": 2}
    assert data["recommended"]["largest"]["average"] > 0
    refused = invoke(*known, "--context", "frozen", "--ends", "own")
    assert "Use --context stem" in str(refused.exception)


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
