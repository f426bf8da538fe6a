"""``dbconvert train`` on what people have: folders of images, texts, tables; what the bundle keeps of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusionblocks.converter.cli import cli
from diffusionblocks.runtime.errors import BadInput
from torch import nn

SHORT = ["--steps", "3", "--batch-size", "8"]


def invoke(*args: object) -> str:
    done = CliRunner().invoke(cli, [str(a) for a in args])
    if isinstance(done.exception, BadInput):
        raise done.exception
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.stderr


class Small(nn.Module):
    """Residual convolutions on [N, 1, 8, 8] images."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.units = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for unit in self.units:
            x = x + unit(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve digits of each of four classes, as PNG, by class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data, folder = load_digits(), tmp_path / "images"
    for k, name in enumerate(("null", "one", "two", "three")):
        (folder / name).mkdir(parents=True)
        for i, digit in enumerate(data.images[data.target == k][:12]):
            Image.fromarray((digit * 15.9).astype(np.uint8)).save(folder / name / f"{i:02d}.png")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(
        Small().eval(), (torch.randn(3, 1, 8, 8),), dynamic_shapes=({0: batch},), strict=False
    )
    torch.export.save(program, tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def test_images_by_class(images: Path, model: Path, tmp_path: Path) -> None:
    """The class names are kept, and a later training numbers its folders by them."""
    bundle = tmp_path / "b"
    invoke(model, "--out", bundle, "--data", images, *SHORT, "--num-blocks", "2")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["class_names"] == ["null", "one", "three", "two"]
    assert manifest["trained"]
    (images / "one").rename(images / "unheard of")
    with pytest.raises(BadInput, match="unheard of"):
        invoke("train", bundle, "--data", images, *SHORT)


@pytest.mark.road
def test_images_that_cannot_be_read(images: Path, model: Path, tmp_path: Path) -> None:
    broken = images / "two" / "03.png"
    broken.write_bytes(broken.read_bytes()[:40])
    bundle = tmp_path / "b"
    invoke(model, "--out", bundle, "--num-blocks", "2")
    with pytest.raises(BadInput, match=r"1 of 48.*two/03\.png") as refusal:
        invoke("train", bundle, "--data", images, *SHORT)
    assert "--skip-bad" in str(refusal.value)
    assert not (bundle / "train" / "run").exists() or not list((bundle / "train" / "run").glob("block_*"))
    invoke("train", bundle, "--data", images, *SHORT, "--skip-bad")
    assert json.loads((bundle / "manifest.json").read_text())["trained"]


@pytest.mark.road
def test_more_classes_than_the_model_has(images: Path, model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    invoke(model, "--out", bundle, "--num-blocks", "2")
    (images / "null" / "00.png").rename(images / "five.png")
    (images / "five").mkdir()
    (images / "five.png").rename(images / "five" / "0.png")
    with pytest.raises(BadInput, match="5 classes"):
        invoke("train", bundle, "--data", images, *SHORT)
    invoke(model, "--out", tmp_path / "new", "--num-blocks", "2", "--new-labels", "5", "--data", images, *SHORT)
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert manifest["target"]["num_classes"] == 5
    assert manifest["decoding"]["mode"] == "denoise"


@pytest.mark.road
def test_images_without_labels_and_a_teacher(images: Path, model: Path, tmp_path: Path) -> None:
    flat, bundle = tmp_path / "flat", tmp_path / "b"
    flat.mkdir()
    for path in images.rglob("*.png"):
        path.rename(flat / f"{path.parent.name}_{path.name}")
    invoke(model, "--out", bundle, "--num-blocks", "2")
    with pytest.raises(BadInput, match="label"):
        invoke("train", bundle, "--data", flat, *SHORT)
    said = invoke(
        "train", bundle, "--data", flat, *SHORT, "--targets", "teacher", "--validate-every", "2", "--holdout", "0.5"
    )
    assert "alone" in said
    assert json.loads((bundle / "manifest.json").read_text())["trained"]


@pytest.mark.road
def test_texts_with_the_models_own_tokenizer(tmp_path: Path) -> None:
    """A folder of transformers: the tokenizer goes into the bundle, where a later training finds it."""
    import pydoc_data.topics

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    topics = [t[:400] for t in list(pydoc_data.topics.topics.values())[:24]]
    words.train_from_iterator(topics, trainers.WordLevelTrainer(vocab_size=200, special_tokens=["[UNK]", "[PAD]"]))
    folder, data, bundle = tmp_path / "bert", tmp_path / "texts", tmp_path / "b"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=200, num_labels=2, **sizes)).save_pretrained(folder)
    for i, text in enumerate(topics):
        (data / ("long" if i % 2 else "short")).mkdir(parents=True, exist_ok=True)
        (data / ("long" if i % 2 else "short") / f"{i}.txt").write_text(text)
    invoke(f"transformers:{folder}", "--out", bundle, "--num-blocks", "2", "--data", data, *SHORT)
    assert (bundle / "tokenizer" / "tokenizer.json").is_file()
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["preprocessing"]["tokenizer"] == "tokenizer"
    assert manifest["class_names"] == ["long", "short"]
    folder.rename(tmp_path / "gone")
    invoke("train", bundle, "--data", data, *SHORT)
    assert (bundle / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.road
def test_tensorboard_and_json_lines(images: Path, model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    invoke(model, "--out", bundle, "--num-blocks", "2")
    invoke("train", bundle, "--data", images, *SHORT, "--tensorboard", "--validate-every", "2", "--holdout", "0.5")
    lines = [json.loads(line) for line in (bundle / "train" / "logs" / "log.jsonl").read_text().splitlines()]
    assert {line["block"] for line in lines} == {0, 1}
    assert all(line["memory"] > 0 for line in lines if "loss" in line)
    scores = [line["validation"] for line in lines if "validation" in line]
    assert [(s["block"], s["rows"]) for s in scores] == [(0, 24), (1, 24)]
    assert all(0 <= s[what]["accuracy"] <= 1 for s in scores for what in ("alone", "chain"))
    assert list((bundle / "train" / "logs" / "tensorboard").rglob("events.*"))
    assert "train/logs/log.jsonl" in json.loads((bundle / "manifest.json").read_text())["files"]
