"""Folders of transformers: the class from the config, safetensors alone, inputs from the config; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusionblocks.converter import convert, hugging
from diffusionblocks.converter.load import load_model
from diffusionblocks.runtime import BadInput, open_bundle
from torch import nn

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SMALL, "vocab_size": 100, "max_position_embeddings": 64}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
# class, config class, config, inputs expected, residual branches
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**TEXT, "num_labels": 7}, ["input_ids"], 6),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2}, ["input_ids"], 6),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, ["pixel_values"], 6),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, ["input_ids", "decoder_input_ids"], 10),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 16},
        ["input_ids", "pixel_values"],
        12,
    ),
}


def _model(name: str, **changes: object) -> nn.Module:
    import transformers

    model_class, config_class, config, *_ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**config, **changes})).eval()
    model.config.use_cache = False
    return model


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    _model("bert").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_converts_to_the_bit(name: str, tmp_path: Path) -> None:
    """To the bit of the captured graph; of the model itself to the last digits, since it leaves out a mask of ones when it is not captured."""
    model, (_, _, _, inputs, branches) = _model(name), MODELS[name]
    model.save_pretrained(tmp_path / name)
    source = load_model(str(tmp_path / name))
    assert list(source.example) == inputs
    network = convert(source.model, source.example, num_blocks=2)
    assert network.analysis.found.branches == branches
    for batch in (1, 3):
        x = {k: v[:batch] for k, v in source.example.items()}
        with torch.no_grad():
            expected = next(iter(model(**x).values()))
            captured = network.analysis.captured.graph(*(x[n] for n in network.input_names))[0]
        assert torch.equal(network.exact(x)[0], captured)
        assert (captured - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.road
def test_the_command_runs_a_folder(bert: Path, tmp_path: Path) -> None:
    from diffusionblocks.converter import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main([f"transformers:{bert}", "--out", str(tmp_path / "b"), "--num-blocks", "2"])
    assert stopped.value.code == 0
    ids = np.random.default_rng(0).integers(3, 100, (5, 16))
    with open_bundle(tmp_path / "b") as bundle, torch.no_grad():
        expected = _model("bert")(input_ids=torch.from_numpy(ids)).logits.numpy()
        assert np.abs(bundle.run(ids, mode="exact") - expected).max() < 1e-5


def test_a_model_type_has_random_weights_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    from diffusionblocks.converter.hugging import from_transformers

    source = from_transformers("resnet")
    assert "random weights" in caplog.text
    assert list(source.example) == ["pixel_values"]


def _changed(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_class_that_is_not_known(bert: Path) -> None:
    _changed(bert, architectures=["BertForPoetry"])
    with pytest.raises(BadInput, match="names the class BertForPoetry"):
        load_model(str(bert))


def test_a_model_type_that_is_not_known(bert: Path) -> None:
    _changed(bert, model_type="bard")
    with pytest.raises(BadInput, match="cannot read the config"):
        load_model(str(bert))


def test_weights_that_are_missing_are_named(bert: Path) -> None:
    _changed(bert, architectures=["BertForTokenClassification"], num_hidden_layers=4)
    with pytest.raises(BadInput, match=r"do not fit BertForTokenClassification[\s\S]*missing 16: bert.encoder.layer.3"):
        load_model(str(bert))


def test_pickled_weights_are_not_read(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    torch.save(_model("bert").state_dict(), bert / "pytorch_model.bin")
    with pytest.raises(BadInput, match="no weights in safetensors"):
        load_model(str(bert))


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"without a config\.json"):
        load_model(str(tmp_path))


def test_torchvision_by_name_and_weights_of_other_classes(tmp_path: Path) -> None:
    from torchvision import models

    model = models.get_model("resnet18", weights=None, num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    source = load_model(str(tmp_path / "w.pt"), arch="torchvision:resnet18")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(source.model(x), model(x))
    assert source.input_shape == (3, 224, 224)
    with pytest.raises(BadInput, match="torchvision cannot make 'resnet19'"):
        load_model("torchvision:resnet19")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ModuleNotFoundError("Could not import module 'BertModel'"), "torchvision was built for another torch"),
        (ValueError("hidden size 7 for 4 heads"), "Check its config"),
    ],
)
def test_a_class_that_cannot_be_built_says_what_to_do(error: Exception, hint: str) -> None:
    def build(config: object) -> None:
        raise error

    with pytest.raises(BadInput, match=hint):
        hugging._built(build, None, "a model")
