"""Masked diffusion language models: what is hidden and what the loss is, blocks by decrements, the sampler and the bound through the bundle, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.cli import main
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.score_cli import windows
from diffusionblocks.converter.targets import Told
from diffusionblocks.converter.texts import mask_token_of
from diffusionblocks.export import export_bundle
from diffusionblocks.export.verify import compare, verify_bundle
from diffusionblocks.runtime import open_bundle, schedule
from diffusionblocks.runtime.errors import BadInput, BundleError
from diffusionblocks.runtime.infilling import bound, fill
from torch import nn
from torch.nn import functional as F

LENGTH, TOKENS, WIDTH, HIDDEN = 10, 8, 16, 8


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.causal = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.attention, self.norm = Attention(causal), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.mlp(self.norm(x))


class Masked(nn.Module):
    """Tokens [N, 10], of which 8 is hidden -> logits [N, 10, 8], or [N, 10, 9] with the hidden token among them."""

    def __init__(self, *, causal: bool = False, classes: int = TOKENS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.position = nn.Embedding(TOKENS + 1, WIDTH), nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.Sequential(*(Layer(causal) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.embedding(tokens) + self.position)))


def converted(model: nn.Module | None = None, **settings: Any) -> ConvertedNetwork:
    example = (torch.zeros(3, LENGTH, dtype=torch.long),)
    settings = {"num_blocks": 3, "task": "mdm", "mask_token": HIDDEN, **settings}
    return convert((model or Masked()).eval(), example, **settings)


def repeated(rows: int, seed: int = 0) -> np.ndarray:
    """Texts of one token again and again: log 8 is all there is to know of a row."""
    return np.random.default_rng(seed).integers(0, TOKENS, (rows, 1)).repeat(LENGTH, 1)


@pytest.fixture(scope="module")
def trained() -> ConvertedNetwork:
    network = converted(scratch=True)
    finetune(network, repeated(512), steps=150, batch_size=64, lr=5e-3)
    return network


@pytest.fixture(scope="module")
def bundle(trained: ConvertedNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(trained, tmp_path_factory.mktemp("masked") / "text.dblocks")


def test_blocks_own_equal_decrements_the_first_the_most_hidden():
    network = converted()
    assert network.edges == pytest.approx((1, 2 / 3, 1 / 3, 1e-3))
    assert network.noise_partition == "equal-decrements"
    assert [d.upper for d in network.densities] == pytest.approx([1, 2 / 3 + 0.05 / 3, 1 / 3 + 0.05 * (1 / 3 - 1e-3)])
    assert [d.lower for d in network.densities] == pytest.approx([2 / 3 - 0.05 / 3, 1 / 3 - 0.05 / 3, 1e-3])
    u = np.linspace(0, 1, 5)
    assert network.densities[0].sigma(u) == pytest.approx(np.linspace(network.densities[0].lower, 1, 5))
    again = schedule.density_from_json(network.densities[1].to_json())
    assert again == network.densities[1]


def test_blocks_are_the_originals_units_until_they_are_trained():
    """No conditioning is added: a block between stem and head computes what its units compute."""
    model = Masked().eval()
    network = converted(model, num_blocks=1)
    tokens = torch.from_numpy(repeated(4))
    tokens[:, ::2] = HIDDEN
    with torch.no_grad():
        expected = model(tokens)
    assert torch.equal(network.exact(tokens)[0], expected)
    assert torch.equal(network.denoise(tokens), expected.log_softmax(-1))
    assert {n.op for n in network.blocks[0].module.graph.nodes if n.name in ("z", "sigma") and n.users} == set()


def test_tokens_are_hidden_with_their_share_each_by_itself():
    target = converted().require_target()
    y = torch.from_numpy(repeated(4000))
    y[:, 3] = -1 - y[:, 3]  # neither hidden nor learned
    noise = torch.randn(len(y), LENGTH, generator=torch.Generator().manual_seed(0))
    share = torch.full((len(y),), 0.3)
    z = target.noisy(y, share, noise)
    hidden = z == HIDDEN
    assert not hidden[:, 3].any()
    assert torch.equal(z[:, 3], -1 - y[:, 3])
    rest = hidden[:, [0, 1, 2, 4, 5]].double()
    assert rest.mean() == pytest.approx(0.3, abs=0.01)
    assert torch.corrcoef(rest.T)[0, 1:].abs().max() < 0.05
    assert torch.equal(z[~hidden & (y >= 0)], y[~hidden & (y >= 0)])
    assert (target.noisy(y, torch.ones(len(y)), noise)[:, 0] == HIDDEN).all()


def test_the_loss_is_the_elbo():
    """Summed over every pattern of hidden tokens by its probability, the loss at t is 1/t times the expected cross-entropy of what is hidden."""
    target = converted().require_target()
    torch.manual_seed(0)
    log = torch.randn(1, LENGTH, TOKENS, dtype=torch.float64).log_softmax(-1)
    y, t = torch.randint(TOKENS, (1, LENGTH)), 0.4
    total = 0.0
    for pattern in itertools.product((False, True), repeat=LENGTH):
        hidden = torch.tensor([pattern])
        z = torch.where(hidden, HIDDEN, y)
        probability = t ** sum(pattern) * (1 - t) ** (LENGTH - sum(pattern))
        sigma = torch.tensor([t], dtype=torch.float64)
        total += probability * float(target.losses(Told(log, z, sigma, y), "elbo")[0])
    # each token is hidden with probability t, which 1/t cancels: the mean cross-entropy of all tokens
    assert total == pytest.approx(float(F.cross_entropy(log[0], y[0])), rel=1e-9)


def test_the_hidden_token_is_never_predicted():
    network = converted(Masked(classes=TOKENS + 1))
    tokens = torch.from_numpy(repeated(4))
    tokens[:, ::2] = HIDDEN
    prediction = network.denoise(tokens)
    assert prediction.shape == (4, LENGTH, TOKENS + 1)
    assert torch.isneginf(prediction[..., HIDDEN]).all()
    assert prediction[..., :HIDDEN].exp().sum(-1).numpy() == pytest.approx(1, abs=1e-5)
    assert not torch.isneginf(converted().denoise(tokens)).any()


def test_each_row_is_filled_by_the_block_that_owns_its_share(trained: ConvertedNetwork, bundle: Path):
    tokens = repeated(6)
    for row, count in enumerate((10, 7, 6, 4, 3, 0)):
        tokens[row, :count] = HIDDEN
    whole = trained.denoise(torch.from_numpy(tokens))
    for row, block in enumerate((0, 0, 1, 1, 2, 2)):
        env = trained.inputs_env(torch.from_numpy(tokens[row : row + 1]))
        trained.run_stem(env, block)
        with torch.no_grad():
            f = trained.run_block(env, block, torch.zeros(1), torch.zeros(1))[0]
        assert torch.allclose(whole[row], f[0].log_softmax(-1), atol=1e-6)
    with open_bundle(bundle) as opened:
        assert np.allclose(opened.run(tokens, "denoise"), whole.numpy(), atol=1e-5)
        for budget in ("200KiB", "20MiB"):
            with open_bundle(bundle, memory_budget=budget) as small:
                assert np.allclose(small.run(tokens, "denoise"), whole.numpy(), atol=1e-5)


def test_bundles_verify_and_say_what_they_are(bundle: Path):
    report = verify_bundle(bundle)
    assert [c.name for c in report.checks if c.ok] == ["files", "denoise"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["task"] == "mdm"
    assert manifest["target"]["masking"] == {"token": HIDDEN, "input": "tokens", "mask": ""}
    probe = np.load(bundle / "probe.npz")["input.tokens"]
    shares = (probe == HIDDEN).mean(1)
    assert [schedule.block_of(float(s), manifest["schedule"]["edges"]) for s in shares] == [0, 1, 2]  # every block


def test_a_fine_tuned_original_keeps_its_mode_exact(tmp_path: Path):
    network = converted(Masked(classes=TOKENS + 1))
    finetune(network, repeated(64), steps=3)
    out = export_bundle(network, tmp_path / "b")
    assert [c.name for c in verify_bundle(out).checks if c.ok] == ["files", "exact.output", "denoise"]
    with open_bundle(out) as opened:
        for mode in ("exact", "denoise"):
            made = fill(opened, np.full((2, LENGTH), HIDDEN), mode=mode, steps=4)
            assert made.shape == (2, LENGTH)
            assert (made < HIDDEN).all()


def test_it_learns_to_repeat(trained: ConvertedNetwork, bundle: Path):
    with open_bundle(bundle) as opened:
        made = fill(opened, np.full((40, LENGTH), HIDDEN), steps=LENGTH * 2, seed=3)
        right = (np.diff(made, axis=1) == 0).mean()
        nats = bound(opened, repeated(64, seed=9), draws=16).mean()
        random = np.random.default_rng(0).integers(0, TOKENS, (64, LENGTH))
        other = bound(opened, random, draws=16).mean()
    assert right > 0.8
    assert (
        np.log(TOKENS) - 0.1 < nats < 8
    )  # between log 8 = 2.1, which is all there is to know, and 10 log 8 = 20.8 of an untrained model
    assert other > 20


def test_the_bound_of_a_model_that_knows_the_tokens_alone(tmp_path: Path):
    """With every hidden token equally likely the bound is T log K exactly, whatever is drawn."""
    model = Masked()
    nn.init.normal_(model.head.weight, std=1e-6)
    nn.init.zeros_(model.head.bias)
    out = export_bundle(converted(model), tmp_path / "b")
    with open_bundle(out) as opened:
        found = [bound(opened, repeated(200), mode="exact", draws=n).mean() for n in (1, 16)]
    # 1/t times the number of hidden tokens has the mean T
    assert found[1] == pytest.approx(LENGTH * np.log(TOKENS), rel=0.02)
    assert found[0] == pytest.approx(LENGTH * np.log(TOKENS), rel=0.2)


def test_filling_in_keeps_what_is_known_and_depends_on_the_seed_alone(bundle: Path):
    tokens = np.full((3, LENGTH), HIDDEN)
    tokens[:, 4] = 5
    with open_bundle(bundle) as opened:
        first = fill(opened, tokens, seed=1, steps=7)
        assert (first[:, 4] == 5).all()
        assert (first < HIDDEN).all()
        assert np.array_equal(fill(opened, tokens, seed=1, steps=7), first)
        assert np.array_equal(fill(opened, tokens[:1], seed=1, steps=7), first[:1])
        hot = [fill(opened, tokens, seed=s, steps=7, temperature=9.0) for s in (1, 2)]
        assert not np.array_equal(*hot)
        greedy = [fill(opened, tokens, seed=s, steps=1, temperature=0) for s in (1, 2)]
        assert np.array_equal(*greedy)  # one step hides nothing behind the seed
        assert np.array_equal(fill(opened, repeated(2)), repeated(2))  # nothing is hidden
        told: list[tuple[int, int, float]] = []
        fill(opened, tokens, steps=6, callback=lambda step, block, share, log: told.append((step, block, share)))
    assert [(s, b) for s, b, _ in told] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert told[0][2] == pytest.approx(0.9)


@pytest.mark.parametrize(("start", "count"), [(1.0, 12), (0.5, 7), (0.2, 3), (1.0, 2), (1.0, 1)])
def test_steps_go_from_the_share_that_is_hidden_to_none(start: float, count: int):
    edges = schedule.masked_edges(3)
    plan = schedule.unmasking_steps(edges, count, start)
    assert len(plan) == count
    assert plan[0].sigma == start
    assert plan[-1].sigma_next == 0
    assert all(a.sigma_next == pytest.approx(b.sigma) for a, b in itertools.pairwise(plan))
    for step in plan[:-1]:
        assert edges[step.block] + 1e-9 >= step.sigma > step.sigma_next
    if count % 3 == 0 and start == 1:
        assert [s.sigma - s.sigma_next for s in plan] == pytest.approx([1 / count] * count)
    with pytest.raises(BadInput, match="0 unmasking steps"):
        schedule.unmasking_steps(edges, 0)


@pytest.mark.road
def test_positions_that_a_mask_leaves_out_are_neither_hidden_nor_scored(tmp_path: Path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
    )
    example = {"input_ids": torch.randint(5, 30, (3, LENGTH)), "attention_mask": torch.ones(3, LENGTH).long()}
    network = convert(transformers.BertForMaskedLM(config).eval(), example, num_blocks=3, task="mdm", mask_token=4)
    tokens, mask = np.random.default_rng(0).integers(5, 30, (40, LENGTH)), np.ones((40, LENGTH), np.int64)
    mask[:, 6:] = 0
    env = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}
    y = network.require_target().from_inputs(env)
    assert (y[:, 6:] < 0).all()
    assert (y[:, :6] >= 0).all()
    finetune(network, {"input_ids": tokens, "attention_mask": mask}, steps=2)
    out = export_bundle(network, tmp_path / "b")
    assert verify_bundle(out).ok
    with open_bundle(out) as opened:
        short = fill(opened, np.full((2, 6), 4), steps=6, seed=0)  # filled up and left out by the mask
        assert short.shape == (2, 6)
        long = {"input_ids": np.full((2, LENGTH), 4), "attention_mask": mask[:2]}
        made = fill(opened, long, steps=6, seed=0)
        assert (made[:, :6] != 4).all()
        assert (made[:, 6:] == 4).all()
        nats = bound(opened, tokens[:2, :6])
        assert np.isfinite(nats).all()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "frozen": ({"context": "frozen"}, "The task mdm with the context frozen"),
    "carry": ({"context": "carry"}, "The task mdm with the context carry"),
    "adaln": ({"tune": "adaln"}, "The task mdm with --tune adaln"),
    "partition": ({"partition": "equal-information"}, "shares of hidden tokens"),
    "no token": ({"mask_token": -1}, "a token stands for hidden ones"),
    "token beyond": ({"mask_token": 9}, "embeddings for 0 to 8"),
    "token for another task": ({"task": "lm"}, "in the task mdm, and in no other"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_are_refused(case: str):
    settings, message = REFUSED[case]
    with pytest.raises(BadInput, match=message):
        converted(**settings)


def test_models_of_other_families_are_refused():
    with pytest.raises(BadInput, match="read a text to both sides"):
        converted(Masked(causal=True))
    image = nn.Sequential(nn.Linear(6, WIDTH), Masked().layers, nn.Linear(WIDTH, 4)).eval()
    with pytest.raises(BadInput, match="The task mdm needs a first output of logits of every token"):
        convert(image, (torch.zeros(3, LENGTH, 6),), task="mdm", mask_token=HIDDEN)
    network = converted()
    with pytest.raises(BadInput, match="EDM's is for noise levels"):
        finetune(network, repeated(8), steps=1, weighting="edm")
    with pytest.raises(BadInput, match="no prediction without z"):
        finetune(network, repeated(8), steps=1, clean=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: fill(b, np.full((1, 4), HIDDEN)), "The text has 4 tokens; the model was converted for 10"),
        (lambda b: fill(b, np.full((1, 11), HIDDEN)), "The text has 11 tokens"),
        (lambda b: fill(b, np.full((1, LENGTH), 9)), "The tokens hold 9"),
        (lambda b: fill(b, np.full((1, LENGTH), 0.5)), "Give integers"),
        (lambda b: fill(b, np.full((1, LENGTH), HIDDEN), top_p=0), "top_p above 0"),
        (lambda b: fill(b, np.full((1, LENGTH), HIDDEN), mode="exact"), "does not hold the original"),
        (lambda b: bound(b, np.full((1, LENGTH), HIDDEN)), "holds hidden tokens"),
        (lambda b: bound(b, repeated(1), draws=0), "0 draws"),
        (lambda b: b.run(repeated(1), "denoise", steps=3), "Leave the sampler's options out"),
        (lambda b: b.sample(count=1), "no diffusion model"),
    ],
)
def test_calls_that_do_not_fit_are_refused(bundle: Path, call: Any, message: str):
    with open_bundle(bundle) as opened, pytest.raises(BadInput, match=message):
        call(opened)


def test_a_manifest_whose_masking_does_not_fit_is_refused(bundle: Path, tmp_path: Path):
    manifest = json.loads((bundle / "manifest.json").read_text())
    for change in ({"token": -1}, {"input": "other"}, {"mask": "other"}, None):
        said = json.loads(json.dumps(manifest))
        said["target"]["masking"] = change if change is None else {**said["target"]["masking"], **change}
        folder = tmp_path / str(change is None or next(iter(change)))
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps(said))
        with pytest.raises(BundleError, match="mask"):
            open_bundle(folder)


def test_minus_infinity_is_compared_by_its_place():
    a = np.array([[-np.inf, -1.0, -2.0]])
    assert compare("x", a, a).ok
    assert not compare("x", np.array([[-5.0, -1.0, -2.0]]), a).ok
    assert not compare("x", a, np.array([[-5.0, -1.0, -2.0]])).ok


@pytest.mark.parametrize("partial", [False, True])
def test_every_token_of_a_text_is_scored_once(partial: bool):
    for count, length, causal in itertools.product((2, 9, 10, 11, 37), (4, 10), (True, False)):
        scored = [i for w in windows(count, length, causal=causal, partial=partial) for i in range(w.scored, w.end)]
        expected = range(1, count) if causal else range(count if partial else count // length * length)
        assert scored == list(expected)
        for w in windows(count, length, causal=causal, partial=partial):
            assert w.end - w.start <= length
            assert w.scored > w.start or not causal
            assert not causal or w.start == 0 or w.scored - w.start >= length // 2


@pytest.mark.road
def test_from_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Texts, a tokenizer with a mask token, training, generating and scoring."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({**{c: i for i, c in enumerate("abcdefgh")}, "[MASK]": HIDDEN}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["[MASK]"])
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("abcdefgh" * 40)
    monkeypatch.chdir(tmp_path)
    torch.export.save(
        torch.export.export(
            Masked().eval(),
            (torch.zeros(3, LENGTH, dtype=torch.long),),
            dynamic_shapes=({0: torch.export.Dim("n")},),
        ),
        "model.pt2",
    )
    with pytest.raises(SystemExit) as stopped:
        main(["model.pt2", "--task", "mdm", "--out", "x"])
    assert stopped.value.code == 2
    assert "Give --mask-token K" in capsys.readouterr().err
    arguments = ["model.pt2", "--task", "mdm", "--tokenizer", "tok", "--data", "text.txt", "--out", "text.dblocks"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--steps", "2", "--batch-size", "4"])
    assert stopped.value.code == 0, capsys.readouterr().err
    capsys.readouterr()
    for prompt, tokens in (("abc", "4"), ("a[MASK]c[MASK]e", "0"), ("", "10")):
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "text.dblocks", "--prompt", prompt, "--tokens", tokens, "--steps", "3"])
        assert stopped.value.code == 0
        made = capsys.readouterr().out.split()
        assert len(made) == len(prompt.replace("[MASK]", "_")) + int(tokens)
        assert set(made) <= set("abcdefgh")
        assert all(a in ("_", b) for a, b in zip(prompt.replace("[MASK]", "_"), made, strict=False))
    for wrong, said in (({"--tokens": "8"}, "8 are to follow"), ({"--stop": "a"}, "in no order")):
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "text.dblocks", "--prompt", "abc", *(x for pair in wrong.items() for x in pair)])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["score", "text.dblocks", "--data", "text.txt", "--tokens", "35", "--json"])
    assert stopped.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == found["bytes"] == 30  # three windows of 10, a byte a token
    assert found["bound"] is True
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_token"] / np.log(2))
    assert found["nats_per_token"] == pytest.approx(np.log(TOKENS), rel=0.5)


def test_the_mask_token_is_the_tokenizers_own(tmp_path: Path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "<hid>": 1, "[MASK]": 2}, "a")).save(str(tmp_path / "tokenizer.json"))
    assert mask_token_of(None, "mdm", tmp_path / "tokenizer.json") == 2
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "<hid>"}}))
    assert mask_token_of(None, "mdm", tmp_path) == 1
    assert mask_token_of("a", "mdm", tmp_path) == 0
    assert mask_token_of("17", "mdm", None) == 17
    assert mask_token_of(None, "lm", tmp_path) == -1
    with pytest.raises(BadInput, match=r"has no <mask>"):
        mask_token_of("<mask>", "mdm", tmp_path)
    with pytest.raises(BadInput, match="the tokenizer is not there"):
        mask_token_of(None, "mdm", None)
    with pytest.raises(BadInput, match="for masked language models"):
        mask_token_of("5", "lm", None)
