"""Texts computed position by position: the same predictions as from the whole window, in both modes and every context; what is kept; where nothing can be."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
import transformers
from diffusionblocks.converter import convert
from diffusionblocks.converter.cli import main
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.export import cached, export_bundle
from diffusionblocks.export.positions import NoForm
from diffusionblocks.export.verify import compare_cached, verify_bundle
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime import open_bundle
from diffusionblocks.runtime.errors import BadInput, BundleError, ClosedError
from diffusionblocks.runtime.language import generate, score
from torch import nn
from torch.nn import functional as F

LENGTH, VOCABULARY, WIDTH = 16, 40, 24
PIECES = ((0, 5), (5, 6), (6, 7), (7, LENGTH))


class Attention(nn.Module):
    """Of its own making: queries by keys, a mask, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -1e9).triu(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / 3 + self.mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Sinks(nn.Module):
    """Attention with a column behind those of all positions, which takes a share of the softmax and is dropped; ``answered``: it has a value, which is looked at too."""

    def __init__(self, answered: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.sinks, self.answer = nn.Parameter(torch.randn(2, 1)), nn.Parameter(torch.randn(2, 1, WIDTH // 2))
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -1e9).triu(1), persistent=False)
        self.answered = answered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / 3 + self.mask
        sinks = self.sinks[None, :, None].expand(len(x), -1, LENGTH, -1)
        scores = torch.cat([scores, sinks], -1)
        shares = (scores - scores.amax(-1, keepdim=True)).softmax(-1)
        if self.answered:
            made = shares @ torch.cat([v, self.answer.expand(len(x), -1, -1, -1)], 2)
        else:
            made = shares[..., :-1] @ v
        return self.out(made.transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """Each position with the two before it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class Mean(nn.Module):
    """The mean of all positions so far."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1) / torch.arange(1, LENGTH + 1)[:, None]


class Experts(nn.Module):
    """Each token by one of three experts, the tokens sorted by expert; ``ranked``: less the further behind a token is in the line of its expert, which is of all samples' tokens."""

    def __init__(self, ranked: bool = False) -> None:
        super().__init__()
        self.gate, self.weight = nn.Linear(WIDTH, 3), nn.Parameter(0.2 * torch.randn(3, WIDTH, WIDTH))
        self.ranked = ranked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        order = self.gate(rows).argmax(-1).argsort(stable=True)
        chosen = self.gate(rows).argmax(-1)[order]
        made = torch.bmm(rows[order][:, None], self.weight[chosen])[:, 0]
        if self.ranked:
            made = made / (1 + F.one_hot(chosen, 3).cumsum(0).gather(1, chosen[:, None]))
        return made[order.argsort()].reshape(x.shape)


class Layer(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2 = nn.LayerNorm(WIDTH), mixer, nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    def __init__(self, mixer: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.Sequential(*(Layer(mixer()) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.embedding(tokens) + self.position)))


def of_transformers(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=LENGTH, use_cache=False, pad_token_id=0, **settings,
    )  # fmt: skip
    made: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return made.eval()


MODELS = {
    "own attention": lambda: Language(Attention).eval(),
    "attention sinks": lambda: Language(Sinks).eval(),
    "convolution": lambda: Language(Convolution).eval(),
    "running mean": lambda: Language(Mean).eval(),
    "grouped queries": lambda: of_transformers("Llama", num_key_value_heads=2),
    "merged positions": lambda: of_transformers("OPT", ffn_dim=48, word_embed_proj_dim=WIDTH),
    "own experts": lambda: Language(Experts).eval(),
    "experts": lambda: of_transformers("Mixtral", num_key_value_heads=2, num_local_experts=4),
    "experts of heads": lambda: of_transformers("JetMoe", num_key_value_heads=2, kv_channels=8, num_local_experts=4),
}


def tokens(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def network_of(model: nn.Module, inputs: Any = None, **settings: Any) -> ConvertedNetwork:
    """Its conditioning does something, as after training."""
    network = convert(model, (tokens(3),) if inputs is None else inputs, num_blocks=2, task="lm", **settings)
    torch.manual_seed(1)
    for block in network.blocks:
        for module in block.module.modules():
            if hasattr(module, "projection"):
                nn.init.normal_(module.projection.weight, std=0.2)
    network.trained = [True] * network.num_blocks
    return network


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(network_of(MODELS["grouped queries"]()), tmp_path_factory.mktemp("lm") / "m")


def piecewise(folder: Path, inputs: dict[str, np.ndarray], mode: str, **options: Any) -> np.ndarray:
    with open_bundle(folder, **options) as opened:
        rows = len(next(iter(inputs.values())))
        with opened.continuing(rows, mode, steps=3 if mode == "denoise" else None) as text:
            assert text is not None
            return np.concatenate([text({n: v[:, a:b] for n, v in inputs.items()}) for a, b in PIECES], 1)


def at_once(folder: Path, inputs: dict[str, np.ndarray], mode: str) -> np.ndarray:
    with open_bundle(folder) as opened:
        return np.asarray(opened.run(inputs, mode, steps=3 if mode == "denoise" else None))


@pytest.mark.road
@pytest.mark.parametrize(
    ("name", "context"),
    [*((name, "frozen") for name in MODELS), ("grouped queries", "carry"), ("merged positions", "stem")],
)
def test_pieces_are_the_whole(name: str, context: str, tmp_path: Path) -> None:
    folder = export_bundle(network_of(MODELS[name](), context=context), tmp_path / "m")
    inputs = {manifests.read(folder).inputs[0].name: tokens(3, seed=1).numpy()}
    for mode in ("exact", "denoise"):
        np.testing.assert_allclose(piecewise(folder, inputs, mode), at_once(folder, inputs, mode), atol=2e-5)
    assert sum("position by position" in check.name for check in verify_bundle(folder).checks) == 2


@pytest.mark.road
def test_a_mask_is_followed_too(tmp_path: Path) -> None:
    """Tokens that are left out (padding on the left) are left out of what is kept."""
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    given = {"input_ids": tokens(3), "attention_mask": mask}
    folder = export_bundle(network_of(of_transformers("Llama", num_key_value_heads=2), given), tmp_path / "m")
    inputs = {name: value.numpy().copy() for name, value in given.items()}
    plain = at_once(folder, inputs, "denoise")
    inputs["attention_mask"][1, :3] = 0
    for mode in ("exact", "denoise"):
        whole, pieces = at_once(folder, inputs, mode), piecewise(folder, inputs, mode)
        np.testing.assert_allclose(pieces[0], whole[0], atol=2e-5)
        np.testing.assert_allclose(pieces[1, 3:], whole[1, 3:], atol=2e-5)
    assert np.abs(plain[1, 4:] - whole[1, 4:]).max() > 1e-3


@pytest.mark.road
@pytest.mark.parametrize("mode", ["exact", "denoise"])
def test_texts_are_the_same_with_and_without(bundle: Path, mode: str) -> None:
    """Also where they grow beyond the model's length, and for each row of a batch that is computed in parts."""
    prompt = tokens(3, seed=2).numpy()[:, :6]
    with open_bundle(bundle) as opened:
        kept, anew = (generate(opened, prompt, 20, mode=mode, seed=3, temperature=0.9, cached=c) for c in (True, False))
        scores = [score(opened, prompt, mode=mode, cached=c) for c in (True, False)]
    np.testing.assert_array_equal(kept, anew)
    assert kept.shape == (3, 20)
    np.testing.assert_allclose(*scores, atol=2e-5)
    largest = max(opened._sessions.size(g) + 3 * g.row_bytes for g in opened.manifest.graphs())
    with open_bundle(bundle, memory_budget=largest + 100_000) as small:
        assert (generate(small, prompt, 20, mode=mode, seed=3, temperature=0.9) == anew).all()


@pytest.mark.road
def test_half_precision(tmp_path: Path) -> None:
    folder = export_bundle(network_of(MODELS["own attention"]()), tmp_path / "m", dtype="float16")
    assert manifests.read(folder).stem.cached is not None
    assert verify_bundle(folder).ok


def test_noise_is_that_of_the_whole_window(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "m"))
    data = json.loads((folder / "manifest.json").read_text())
    data["decoding"]["start"] = "noise"
    (folder / "manifest.json").write_text(json.dumps(data))
    inputs = {manifests.read(folder).inputs[0].name: tokens(3, seed=1).numpy()}
    noisy = at_once(folder, inputs, "denoise")
    np.testing.assert_allclose(piecewise(folder, inputs, "denoise"), noisy, atol=2e-5)
    assert np.abs(noisy - at_once(bundle, inputs, "denoise")).max() > 1e-3


def test_the_manifest_fits_its_schema(bundle: Path) -> None:
    schema = json.loads((Path(__file__).parents[1] / "docs" / "manifest.schema.json").read_text())
    jsonschema.validate(json.loads((bundle / "manifest.json").read_text()), schema)


def test_keys_are_kept_before_they_are_repeated(bundle: Path) -> None:
    """Two heads of keys and values serve four of queries; each layer keeps the two."""
    block = manifests.read(bundle).blocks[0].block
    assert block is not None
    assert block.cached is not None
    sizes = [int(np.prod([s for s in c.shape if isinstance(s, int)])) for c in block.cached.caches]
    assert sizes == [2 * WIDTH // 4] * 4  # two layers, keys and values
    assert {c.shape.count("past") for c in block.cached.caches} == {1}


def test_every_graph_opens_alone_and_holds_no_weight_of_its_own(bundle: Path) -> None:
    found = manifests.read(bundle)
    for graph in found.graphs():
        assert graph.cached is not None
        own = graph.cached.graph
        onnx.checker.check_model(str(bundle / own.file))
        assert {(t.file, t.offset) for t in own.tensors} <= {(t.file, t.offset) for t in graph.tensors}


def test_a_budget_without_room_for_what_is_kept(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        largest = max(opened._sessions.size(g) + 3 * g.row_bytes for g in opened.manifest.graphs())
    with open_bundle(bundle, memory_budget=largest) as small:
        with small.continuing(1000, "exact") as text:
            assert text is None
        small.run(tokens(2).numpy(), "exact")  # the bundle was let go
        with pytest.raises(BadInput, match="the memory budget has no room"):
            generate(small, tokens(1000).numpy()[:, :3], 2, mode="exact", cached=True)


def test_too_many_positions_and_a_bundle_that_is_no_language_model(bundle: Path, bundles: Any) -> None:
    with open_bundle(bundle) as opened:
        with opened.continuing(1, "exact") as text:
            assert text is not None
            name = opened.manifest.inputs[0].name
            text({name: tokens(1).numpy()})
            with pytest.raises(BadInput, match="converted for 16 tokens"):
                text({name: tokens(1).numpy()[:, :1]})
        with pytest.raises(BadInput, match="mode 'other'"), opened.continuing(1, "other"):
            pass
    with pytest.raises(ClosedError), opened.continuing(1, "exact"):
        pass
    with open_bundle(bundles["frozen"][1]) as other, other.continuing(1, "exact") as text:
        assert text is None


def test_experts_whose_tokens_wait_for_each_other_are_computed_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a token's place in the line of an expert decides is not the same of new tokens alone: the comparison finds it."""
    model = Language(lambda: Experts(ranked=True)).eval()  # type: ignore[arg-type]
    folder = export_bundle(network_of(model), tmp_path / "m")
    assert "position by position: relative difference" in caplog.text
    assert "a text is computed anew for each of its tokens" in caplog.text
    assert not list(folder.glob("*_cached.onnx"))
    with open_bundle(folder) as opened, opened.continuing(1, "exact") as text:
        assert text is None


def test_sinks_that_are_looked_at_are_computed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Columns behind the positions are followed until they are dropped, and through no sum over both."""
    model = Language(lambda: Sinks(answered=True)).eval()  # type: ignore[arg-type]
    folder = export_bundle(network_of(model), tmp_path / "m")
    assert "keys and values cannot be kept" in caplog.text
    assert not list(folder.glob("*_cached.onnx"))
    with open_bundle(folder) as opened:
        assert generate(opened, tokens(1).numpy()[:, :3], 2).shape == (1, 2)


def test_what_cannot_be_kept_is_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator that no graph for new positions can be made of, and a rule that is wrong, which comparing the two finds."""

    def wrong(writer: Any, node: onnx.NodeProto, values: Any) -> tuple[list[str], Any]:
        return [values[0].name, *node.input[1:]], values[0].axes

    def none(*_: Any) -> Any:
        raise NoForm("an operator of a kind")

    network = network_of(MODELS["running mean"]())
    monkeypatch.setitem(cached.RULES, "CumSum", wrong)
    folders = {"position by position": export_bundle(network, tmp_path / "wrong")}
    monkeypatch.delitem(cached.RULES, "CumSum")
    monkeypatch.setattr(cached.Writer, "_on_all", none)
    folders["an operator of a kind"] = export_bundle(network, tmp_path / "none")
    for reason, folder in folders.items():
        assert reason in caplog.text
        found = manifests.read(folder)
        assert not found.cached_graphs()
        assert not list(folder.glob("*_cached.onnx"))
        assert {p.name for p in folder.glob("*.onnx")} == {name for name in found.files if name.endswith(".onnx")}
        assert compare_cached(folder, {}, {}) == []
        assert verify_bundle(folder).ok
        with open_bundle(folder) as opened:
            assert generate(opened, tokens(1).numpy()[:, :3], 2).shape == (1, 2)
            with pytest.raises(BadInput, match="cannot be kept"):
                generate(opened, tokens(1).numpy()[:, :3], 2, cached=True)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("shape", ["batch", 2, 6]),
        ("shape", ["batch", "past", "past", 6]),
        ("shape", ["rows", 2, "past", 6]),
        ("shape", ["batch", -2, "past", 6]),
        ("shape", ["batch", 2**39, "past", 2**39]),
        ("shape", ["9999999999*batch", 2, "past", 6]),
        ("dtype", "text"),
        ("name", "past.7"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(bundle: Path, part: str, value: Any) -> None:
    found = manifests.read(bundle)
    block = found.blocks[0]
    assert block.block is not None
    assert block.block.cached is not None
    first, *rest = block.block.cached.caches
    caches = (dataclasses.replace(first, **{part: tuple(value) if part == "shape" else value}), *rest)
    graph = dataclasses.replace(block.block, cached=dataclasses.replace(block.block.cached, caches=caches))
    blocks = (dataclasses.replace(block, block=graph), *found.blocks[1:])
    with pytest.raises(BundleError, match="whose new positions it computes"):
        manifests._check(dataclasses.replace(found, blocks=blocks))


@pytest.mark.road
def test_by_the_command(bundle: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    said = []
    for cache in (["--cache"], ["--no-cache"], []):
        with pytest.raises(SystemExit) as end:
            main(["generate", str(bundle), "--prompt-tokens", "3,5,7", "--tokens", "6", "--seed", "2", *cache])
        assert end.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    assert len(said[0].split(",")) == 6
