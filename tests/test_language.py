"""Causal language models: no position is told what comes behind it, in the network and through the bundle; texts as windows; next tokens as targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.cli import main
from diffusionblocks.converter.dataset import ArrayDataset
from diffusionblocks.converter.label_target import IGNORED
from diffusionblocks.converter.measure import compare_on
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.open_data import open_data
from diffusionblocks.converter.parts import default_decoding, input_specs
from diffusionblocks.converter.token_target import NextTokens
from diffusionblocks.export import export_bundle
from diffusionblocks.export.verify import verify_bundle
from diffusionblocks.runtime import open_bundle, schedule
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.language import generate, score
from diffusionblocks.runtime.schedule import information_share
from torch import nn
from torch.nn import functional as F

LENGTH, VOCABULARY, WIDTH = 12, 40, 24


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(causal), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    """Tokens [N, 12] -> logits [N, 12, 40]; the head's weights are the embedding's."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.Sequential(*(Layer(causal) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.embedding(tokens) + self.position)))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=4, n_head=2, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LENGTH, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def opt() -> nn.Module:
    """Its MLPs work on the positions of all samples as rows of one matrix, and three layers in two blocks are cut before one."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=48, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=LENGTH, use_cache=False,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


MODELS = {"own": lambda: Language().eval(), "gpt2": gpt2, "llama": llama, "opt": opt}


def tokens(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def network_of(model: nn.Module, **settings: Any) -> ConvertedNetwork:
    return convert(model, (tokens(3),), num_blocks=2, task="lm", **settings)


def stirred(network: ConvertedNetwork) -> ConvertedNetwork:
    """Conditioning that does something, as after training."""
    torch.manual_seed(1)
    for block in network.blocks:
        for module in block.module.modules():
            if hasattr(module, "projection"):
                nn.init.normal_(module.projection.weight, std=0.2)
    network.trained = [True] * network.num_blocks
    return network


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.mark.parametrize("context", ["frozen", "carry", "stem"])
def test_no_position_is_told_what_comes_behind(model: nn.Module, context: str) -> None:
    """With z given at every position: another token j, or another z_j, changes nothing before j, and something at j."""
    network = stirred(network_of(model, context=context))
    target, x, j = network.require_target(), tokens(2), 7
    z, sigma = torch.randn(2, *target.shape), torch.full((2,), 0.4)
    other_x, other_z = x.clone(), z.clone()
    other_x[:, j] = (x[:, j] + 1) % VOCABULARY
    other_z[:, j] += 1

    def f(inputs: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        env = network.inputs_env(inputs)
        network.run_stem(env)
        if context != "stem":
            network.advance(env, 0, network.carried(env, 0, noisy, sigma))
        return network.run_block(env, 1, noisy, sigma)[0]

    with torch.no_grad():
        plain = f(x, z)
        for moved in (f(other_x, z), f(x, other_z)):
            torch.testing.assert_close(moved[:, :j], plain[:, :j])
            assert float((moved - plain)[:, j].abs().amax()) > 1e-3


@pytest.mark.road
@pytest.mark.parametrize("name", ["own", "opt"])
def test_through_the_bundle_a_token_changes_no_prediction_before_it(name: str, tmp_path: Path) -> None:
    network = stirred(network_of(MODELS[name]()))
    folder = export_bundle(network, tmp_path / "m")
    assert verify_bundle(folder).ok
    x, j = tokens(2).numpy(), 5
    other = x.copy()
    other[:, j] = (x[:, j] + 1) % VOCABULARY
    with open_bundle(folder) as bundle:
        plain, moved = (bundle.run(v, "denoise", steps=4) for v in (x, other))
    assert plain.shape == (2, LENGTH, VOCABULARY)
    np.testing.assert_allclose(np.exp(plain).sum(-1), 1, atol=1e-4)
    np.testing.assert_allclose(moved[:, :j], plain[:, :j], atol=1e-5)
    assert np.abs(moved - plain)[:, j].max() > 1e-3
    torch.testing.assert_close(
        network.denoise(torch.from_numpy(x), steps=4), torch.from_numpy(plain), atol=1e-4, rtol=1e-4
    )


def test_an_untrained_language_model_is_the_original(model: nn.Module) -> None:
    network = network_of(model)
    with torch.no_grad():
        expected = model(tokens(2))
    expected = expected if isinstance(expected, torch.Tensor) else expected.logits
    assert torch.equal(network.exact((tokens(2),))[0], expected)
    assert network.require_target().positions == (LENGTH,)


def rule(rows: int, seed: int) -> np.ndarray:
    """Texts in which each token but the first is a function of the one before it."""
    after = np.random.default_rng(0).permutation(VOCABULARY)
    made = np.random.default_rng(seed).integers(VOCABULARY, size=(rows, LENGTH))
    for t in range(1, LENGTH):
        made[:, t] = after[made[:, t - 1]]
    return made.astype(np.int64)


@pytest.mark.road
def test_blocks_learn_the_next_token() -> None:
    model, x = Language().train(), torch.from_numpy(rule(2000, 1))
    optimizer, generator = torch.optim.AdamW(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
    for _ in range(20):  # not to the end, so that there is something left to learn
        rows = x[torch.randint(len(x), (64,), generator=generator)]
        optimizer.zero_grad()
        F.cross_entropy(model(rows)[:, :-1].movedim(-1, 1), rows[:, 1:]).backward()
        optimizer.step()
    network = network_of(model.eval())
    data = NextTokens(ArrayDataset({"tokens": rule(300, 2)}, None), "tokens")
    held = data.batch(range(300))
    before = compare_on(network, held.inputs, held.targets, default_decoding(network)).results
    assert before[0].scores["cross_entropy"] < 4.5
    finetune(network, rule(2000, 1), steps=150, lr=3e-3, batch_size=32)
    found = compare_on(network, held.inputs, held.targets, default_decoding(network))
    exact, denoise = (r.scores["cross_entropy"] for r in found.results)
    assert denoise < exact - 0.3
    assert found.better == "denoise"


def test_next_tokens_end_with_the_window_and_the_mask() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]).numpy()
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    data = NextTokens(ArrayDataset({"input_ids": ids, "attention_mask": mask}, None), "input_ids")
    found = data.batch([0, 1]).targets
    assert found is not None
    assert found.tolist() == [[2, 3, 4, IGNORED], [6, IGNORED, IGNORED, IGNORED]]
    plain = NextTokens(ArrayDataset({"input_ids": ids}, None), "input_ids").batch([1]).targets
    assert plain is not None
    assert plain.tolist() == [[6, 0, 0, IGNORED]]


class Averaged(Language):
    """Each unit also adds the mean over all positions so far as one state a sample: nothing of it has positions."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position
        state = self.layers(x[:, :1])
        return self.head(self.norm(x + 0 * state))


def test_what_is_no_causal_language_model_is_refused() -> None:
    with pytest.raises(BadInput, match="task lm is for causal language models; in this model the last token changes"):
        network_of(Language(causal=False).eval())
    with pytest.raises(BadInput, match=r"the 12 positions of the text are not to be told"):
        network_of(Averaged().eval())
    mlp = nn.Sequential(nn.Linear(8, WIDTH), *(Layer(True) for _ in range(2)), nn.Linear(WIDTH, VOCABULARY)).eval()
    with pytest.raises(BadInput, match="needs tokens"):
        convert(mlp, input_shape=(LENGTH, 8), num_blocks=2, task="lm")
    pooled = nn.Sequential(nn.Linear(8, WIDTH), Layer(True), Layer(True), nn.Flatten(), nn.Linear(LENGTH * WIDTH, 5))
    with pytest.raises(BadInput, match="task lm needs a first output of logits of the next token"):
        convert(pooled.eval(), input_shape=(LENGTH, 8), num_blocks=2, task="lm")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["[UNK]", "</s>"])
    made.train_from_iterator(["the block of a network and the noise of a step"] * 4, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusionblocks.converter import open_data as module

    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(module, "cache_folder", lambda: folder)


def windows(path: Path, tokenizer: Path) -> Any:
    specs = input_specs(network_of(Language().eval()))
    return open_data(str(path), specs, None, tokenizer=tokenizer, labelled=False, windows=True)


def test_texts_become_windows_one_after_another(tokenizer: Path, tmp_path: Path) -> None:
    """Three texts, an end between them, nothing added, nothing but the rest of a window left out; a table gives the same."""
    from tokenizers import Tokenizer

    texts = ["the block of a network\n\nand the noise", "of a step " * 9, "a network of noise"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    made = Tokenizer.from_file(str(tokenizer))
    end = made.token_to_id("</s>")
    expected = [n for i, t in enumerate(texts) for n in ([end] if i else []) + made.encode(t).ids]
    for path in (tmp_path / "*.txt", tmp_path / "rows" / "t.jsonl"):
        data = windows(path, tokenizer)
        found = data.batch(range(len(data))).inputs["tokens"]
        assert found.dtype == torch.int64
        assert found.flatten().tolist() == expected[: len(found) * LENGTH]
        assert len(expected) - found.numel() < LENGTH


def test_too_little_text_and_text_that_is_none(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the block")
    with pytest.raises(BadInput, match=r"the model takes windows of 12"):
        windows(tmp_path / "a.txt", tokenizer)
    (tmp_path / "b.txt").write_bytes(b"the block " * 9000 + b"\xff" * 40)
    with pytest.raises(BadInput, match=r"b.txt cannot be read: not UTF-8"):
        windows(tmp_path / "b.txt", tokenizer)


def test_a_text_that_is_none_is_left_out_where_that_is_asked_for(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("the block of a network " * 20)
    (tmp_path / "b.txt").write_bytes(b"the block " * 9000 + b"\xff" * 40)
    specs = input_specs(network_of(Language().eval()))
    given = {"tokenizer": tokenizer, "labelled": False, "windows": True}
    found = open_data(str(tmp_path), specs, None, skip_bad=True, **given)
    alone = open_data(str(tmp_path / "a.txt"), specs, None, **given)
    assert torch.equal(found.batch([0]).inputs["tokens"], alone.batch([0]).inputs["tokens"])
    assert "b.txt cannot be read (not UTF-8): left out" in caplog.text


@pytest.mark.road
def test_a_language_model_is_trained_by_the_command(tokenizer: Path, tmp_path: Path) -> None:
    program = torch.export.export(
        Language().eval(), (tokens(3),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},), strict=False
    )
    torch.export.save(program, tmp_path / "model.pt")
    (tmp_path / "text.txt").write_text("the block of a network and the noise of a step\n" * 200)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "model.pt"), "--out", str(tmp_path / "m"), "--task", "lm", "-B", "2"])
    assert end.value.code == 0
    train = ["train", str(tmp_path / "m"), "--data", str(tmp_path / "text.txt"), "--tokenizer", str(tokenizer)]
    with pytest.raises(SystemExit) as end:
        main(
            [*train, "--steps", "30", "--batch-size", "8", "--lr", "3e-3", "--holdout", "0.3", "--validate-every", "30"]
        )
    assert end.value.code == 0
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["task"] == "lm"
    exact, denoise = manifest["training"]["held_out"]["results"]
    assert denoise["cross_entropy"] < exact["cross_entropy"]


def test_the_information_of_a_large_table_is_the_same_without_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a number of rows products are not kept, and the rows are in float32: the same draws say the same."""
    table = np.random.default_rng(0).standard_normal((2000, 16))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    sigmas = [0.05, 0.2, 0.4, 1.0, 4.0]
    kept = information_share(table, sigmas, 512)
    monkeypatch.setattr(schedule, "LARGE", 1999)
    np.testing.assert_allclose(information_share(table, sigmas, 512), kept, atol=1e-5)
    np.testing.assert_allclose(information_share(table, sigmas, 512, seed=1), kept, atol=0.05)
    assert kept[0] > 0.98
    assert kept[-1] < 0.02


@pytest.fixture(scope="module")
def spoken(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that learned one sentence by heart, with its tokenizer."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(tokenizer))
    ids = made.encode("the block of a network and the noise of a step\n" * 40).ids
    rows = np.array([ids[i : i + LENGTH] for i in range(len(ids) - LENGTH)])
    network = network_of(Language().eval())
    finetune(network, rows, steps=120, lr=5e-3, batch_size=16)
    folder = tmp_path_factory.mktemp("spoken") / "lm.dblocks"

    def extra(place: Path) -> None:
        (place / "tokenizer").mkdir()
        (place / "tokenizer" / "tokenizer.json").write_bytes(tokenizer.read_bytes())

    return export_bundle(network, folder, extra=extra)


def test_scores_are_those_of_the_predictions(spoken: Path) -> None:
    ids = tokens(3).numpy()
    with open_bundle(spoken) as bundle:
        log = bundle.run(ids, "denoise")
        found = score(bundle, ids, mode="denoise")
        part = score(bundle, ids[:, :7], mode="denoise")
    np.testing.assert_allclose(found, -np.take_along_axis(log[:, :-1], ids[:, 1:, None], -1)[..., 0], atol=1e-4)
    np.testing.assert_allclose(part, found[:, :6], atol=1e-4)


def test_a_learned_sentence_is_continued_beyond_the_window(
    spoken: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the likeliest token, past the length of the window, by the command."""
    sentence = "the block of a network and the noise of a step "
    with pytest.raises(SystemExit) as end:
        main(
            [
                "generate",
                str(spoken),
                "--prompt",
                "the block of a",
                "--tokens",
                "24",
                "--temperature",
                "0",
                "--mode",
                "denoise",
            ]
        )
    assert end.value.code == 0
    said = capsys.readouterr().out.replace(" ", "").strip()
    assert said.startswith(sentence.replace(" ", ""))
    assert len(said) > len(sentence)  # more tokens than the window has


def test_draws_are_named_by_the_seed_and_the_row(spoken: Path) -> None:
    prompt = tokens(3)[:, :4].numpy()
    with open_bundle(spoken) as bundle:
        first = generate(bundle, prompt, 6, seed=5, temperature=2.0)
        again = generate(bundle, prompt, 6, seed=5, temperature=2.0)
        alone = generate(bundle, prompt[:1], 6, seed=5, temperature=2.0)
        other = generate(bundle, prompt, 6, seed=6, temperature=2.0)
        narrow = generate(bundle, prompt, 6, seed=6, top_p=1e-6)
        likeliest = generate(bundle, prompt, 6, temperature=0)
    assert (first == again).all()
    assert (first[:1] == alone).all()
    assert (first != other).any()
    assert (narrow == likeliest).all()


def test_a_stop_ends_a_row(spoken: Path) -> None:
    prompt = tokens(2)[:, :4].numpy()
    with open_bundle(spoken) as bundle:
        free = generate(bundle, prompt, 5, temperature=0)
        ended = generate(bundle, prompt, 5, temperature=0, stop=[int(free[0, 1])])
    assert ended[0].tolist()[:2] == free[0].tolist()[:2]
    assert set(ended[0, 1:].tolist()) == {int(free[0, 1])}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": np.zeros((1, LENGTH + 1), np.int64)}, "13 tokens; the model was converted for 12"),
        ({"prompt": np.array([[VOCABULARY]])}, "0 to 39"),
        ({"prompt": np.zeros((0, 3), np.int64)}, "integers"),
        ({"top_p": 0.0}, "top_p"),
        ({"count": 0}, "count"),
    ],
    ids=["longer than the window", "no such token", "nothing", "top_p", "count"],
)
def test_texts_that_do_not_fit_are_refused(spoken: Path, change: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"prompt": np.array([[1, 2]]), "count": 2, **change}
    with open_bundle(spoken) as bundle, pytest.raises(BadInput, match=text):
        generate(bundle, **given)


def test_only_language_models_generate(bundles, capsys: pytest.CaptureFixture[str]) -> None:
    with open_bundle(bundles["stem"][1]) as bundle, pytest.raises(BadInput, match="not of a language model"):
        score(bundle, np.array([[1, 2]]))
    for arguments, text in (
        (["--prompt", "x"], "holds no tokenizer"),
        (["--prompt-tokens", "a"], "no list of numbers"),
        ([], "must be one prompt"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["generate", str(bundles["stem"][1]), *arguments])
        assert end.value.code == 2
        assert text in capsys.readouterr().err
