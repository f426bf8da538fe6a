"""One image as the model's own library prepares it, and what cannot be read."""

from __future__ import annotations

import importlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusionblocks.converter.images import image_array, prepare, read_image
from diffusionblocks.converter.preprocessing import Preprocessing, of_folder, of_timm, of_transformers
from diffusionblocks.converter.unreadable import Unreadable
from diffusionblocks.runtime.errors import BadInput
from PIL import Image

SIZES = ((40, 31), (31, 40), (33, 33), (17, 90), (224, 224))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (3, 24, 24), "crop_pct": 0.875, "interpolation": "bicubic", "mean": MEAN, "std": STD},
        {"input_size": (3, 25, 25), "crop_pct": 0.9, "interpolation": "bilinear", "mean": MEAN, "std": STD},
        {"input_size": (3, 24, 24), "crop_pct": 1.0, "crop_mode": "squash", "mean": MEAN, "std": STD},
        {"input_size": (3, 25, 25), "crop_pct": 0.9, "crop_mode": "border", "mean": MEAN, "std": STD},
        {"input_size": (3, 24, 32), "crop_pct": 0.95, "interpolation": "bicubic", "mean": MEAN, "std": STD},
    ],
    ids=lambda c: f"{c.get('crop_mode', 'center')}-{c['input_size'][1]}x{c['input_size'][2]}",
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_timm(config: dict[str, Any], size: tuple[int, int]) -> None:
    create = pytest.importorskip("timm.data").create_transform
    theirs = create(**config, is_training=False)(picture(*size)).numpy()
    preparing = of_timm(config, None).sized(*config["input_size"])
    ours = prepare(picture(*size), preparing)
    assert ours.shape == config["input_size"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


PROCESSORS = [
    ("vit", "ViTImageProcessorPil", {"size": {"height": 24, "width": 24}, "image_mean": list(MEAN)}),
    ("vit", "ViTImageProcessorPil", {"size": {"height": 24, "width": 20}, "resample": 3, "do_normalize": False}),
    ("clip", "CLIPImageProcessorPil", {"size": {"shortest_edge": 27}, "crop_size": {"height": 24, "width": 24}}),
    ("clip", "CLIPImageProcessorPil", {"size": {"shortest_edge": 20}, "crop_size": {"height": 25, "width": 25}}),
    ("convnext", "ConvNextImageProcessorPil", {"size": {"shortest_edge": 24}, "crop_pct": 0.875}),
    ("convnext", "ConvNextImageProcessorPil", {"size": {"shortest_edge": 384}}),
    (
        "mobilevit",
        "MobileViTImageProcessorPil",
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}},
    ),
    ("efficientnet", "EfficientNetImageProcessorPil", {"size": {"height": 24, "width": 24}}),
    ("efficientnet", "EfficientNetImageProcessorPil", {"size": {"height": 24, "width": 24}, "rescale_offset": True}),
]


@pytest.mark.parametrize(("module", "name", "options"), PROCESSORS, ids=lambda v: str(v)[:40])
def test_as_transformers(module: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    build = getattr(importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name)
    processor = build(**options)
    processor.save_pretrained(tmp_path)
    preparing = of_folder(tmp_path)
    assert preparing is not None
    for size in SIZES:
        image = picture(*size)
        theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
        ours = prepare(image, preparing.sized(*theirs.shape))
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=f"{size}")


def test_a_config_survives_the_manifest() -> None:
    for found in (of_timm({"input_size": (3, 24, 24), "mean": MEAN, "std": STD}, None), Preprocessing(tokenizer="/t")):
        assert Preprocessing.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_timms_own_words_are_read() -> None:
    old = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "crop_pct": 0.9}
    found = Preprocessing.from_json(old)
    assert (found.mean, found.interpolation, found.resize) == (MEAN, "bicubic", "shortest")


@pytest.mark.parametrize(
    ("data", "word"), [({"zoom": 2}, "zoom"), ({"resize": "wild"}, "wild"), ({"interpolation": "cubic"}, "cubic")]
)
def test_a_config_without_meaning_is_refused(data: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInput, match=word):
        Preprocessing.from_json(data)


def test_another_size_keeps_the_proportion() -> None:
    config = {"input_size": (3, 224, 224), "crop_pct": 0.875, "mean": MEAN, "std": STD}
    sized = of_timm(config, None).sized(3, 112, 112)
    assert (sized.resize_to, sized.input_size) == ((128, 128), (3, 112, 112))


def test_one_channel_has_the_mean_of_three() -> None:
    sized = of_timm({"input_size": (3, 8, 8), "mean": MEAN, "std": STD}, (1, 8, 8)).sized(1, 8, 8)
    assert sized.mean == pytest.approx((sum(MEAN) / 3,))
    assert prepare(read_image(stored(picture(9, 9)), 1), sized).shape == (1, 8, 8)


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(BadInput, match="3 means for an input of 4 channels"):
        of_timm({"input_size": (3, 8, 8), "mean": MEAN, "std": STD}, None).sized(4, 8, 8)


def test_steps_that_are_not_known_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        of_transformers({"size": {"height": 8, "width": 8}, "do_pad": True})
    assert "do_pad" in caplog.text


def test_a_size_that_is_not_known_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = of_transformers({"size": {"longest_edge": 90}})
    assert "longest_edge" in caplog.text
    assert found.sized(3, 8, 8).resize_to == (8, 8)


def test_a_folder_without_configs_says_nothing(tmp_path: Path) -> None:
    assert of_folder(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert of_folder(tmp_path) == Preprocessing(tokenizer=str(tmp_path.resolve()))


PLAIN = Preprocessing().sized(3, 6, 8)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "LA", "CMYK"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    image = picture(8, 6).convert(mode)
    content = stored(image, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(image_array(content, PLAIN), prepare(image.convert("RGB"), PLAIN))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = (np.arange(48, dtype=np.uint32).reshape(6, 8) * 65535 // 47).astype(np.uint16)
    found = image_array(stored(Image.fromarray(deep)), PLAIN)
    np.testing.assert_allclose(found[0], deep / 65535, atol=0.5 / 255 + 1e-6)


def test_floats_have_no_range() -> None:
    with pytest.raises(Unreadable, match="mode F"):
        image_array(stored(Image.fromarray(np.zeros((6, 8), np.float32)), "TIFF"), PLAIN)


def test_an_image_is_turned_upright() -> None:
    image, exif = picture(6, 8), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    found = image_array(stored(image, exif=exif), PLAIN)
    np.testing.assert_array_equal(found, prepare(image.transpose(Image.Transpose.ROTATE_270), PLAIN))


def test_damage_is_named(tmp_path: Path) -> None:
    whole = stored(picture(64, 64), "JPEG")
    for content, reason in ((whole[: len(whole) // 2], "truncated"), (b"no", "not an image"), (b"", "not an image")):
        with pytest.raises(Unreadable, match=reason):
            image_array(content, PLAIN)
    with pytest.raises(Unreadable, match="no such file"):
        image_array(tmp_path / "none.png", PLAIN)
