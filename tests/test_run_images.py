"""`dbconvert run` on images: prepared as in training, answered by name, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from diffusionblocks.converter import convert
from diffusionblocks.converter.cli import main
from diffusionblocks.converter.exporting import export_network
from diffusionblocks.converter.preprocessing import of_timm
from diffusionblocks.converter.run_images import answers, image_files
from diffusionblocks.runtime import manifest
from PIL import Image
from rich.console import Console

NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=3
    ).eval()


@pytest.fixture(scope="module")
def bundle(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "b"
    network = convert(model, input_shape=(3, 32, 32), num_blocks=2)
    preparing = of_timm(model.pretrained_cfg, (3, 32, 32)).to_json()
    export_network(
        network, folder, Console(quiet=True), source={}, preprocessing=preparing, class_names=NAMES, deploy=True
    )
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for i, size in enumerate(((32, 32), (50, 40), (31, 64))):
        Image.fromarray(draw.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "deeper").mkdir()
    Image.fromarray(draw.integers(0, 255, (20, 20), np.uint8)).save(folder / "deeper" / "grey.jpg")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def command(*args: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([*map(str, args)])
    return int(done.value.code or 0)


def test_it_is_the_model_on_images_prepared_by_timm(model, bundle: Path, photos: Path, tmp_path: Path, capsys) -> None:
    assert command("run", bundle, "--input", photos, "--output", tmp_path / "y.npy", "--json") == 0
    out = capsys.readouterr()
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(model.pretrained_cfg) | {"input_size": (3, 32, 32)}
    )
    files = sorted(p for p in photos.rglob("*") if p.suffix in (".png", ".jpg") and p.name[0] != ".")
    x = torch.stack([transform(Image.open(p).convert("RGB")) for p in files])
    with torch.no_grad():
        expected = model(x)
    assert np.allclose(np.load(tmp_path / "y.npy"), expected, atol=1e-4)
    said = json.loads(out.out)["answers"]
    assert [a["file"] for a in said] == [p.relative_to(photos).as_posix() for p in files]
    best = expected.softmax(1).max(1)
    assert [a["classes"][0] for a in said] == [NAMES[k] for k in best.indices]
    assert np.allclose([a["probabilities"][0] for a in said], best.values, atol=1e-3)
    for answer in said:
        assert answer["file"] in out.err
        assert f"{answer['probabilities'][0]:.2f}" in out.err


def test_one_image(bundle: Path, photos: Path, tmp_path: Path) -> None:
    assert command("run", bundle, "--input", photos / "0.png", "--output", tmp_path / "a.npy") == 0
    assert command("run", bundle, "--input", photos, "--output", tmp_path / "b.npy") == 0
    assert np.allclose(np.load(tmp_path / "a.npy")[0], np.load(tmp_path / "b.npy")[0], atol=1e-5)


def test_without_torch(bundle: Path, photos: Path, tmp_path: Path) -> None:
    program = f"""
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "timm"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Forbidden())
from diffusionblocks.converter.cli import main
main(["run", {str(bundle)!r}, "--input", {str(photos)!r}, "--output", {str(tmp_path / "y.npy")!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "y.npy").shape == (4, 3)


@pytest.mark.parametrize("what", ["empty folder", "broken image", "text file", "nothing"])
def test_what_cannot_be_read_is_named(bundle: Path, tmp_path: Path, capsys, what: str) -> None:
    given = tmp_path / "given"
    if what == "empty folder":
        given.mkdir()
    elif what == "broken image":
        given = tmp_path / "broken.png"
        given.write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    elif what == "text file":
        given.write_text("words")
    assert command("run", bundle, "--input", given, "--output", tmp_path / "y.npy") == 2
    said = capsys.readouterr().err
    assert given.name in said
    assert "Traceback" not in said
    assert not (tmp_path / "y.npy").exists()


def test_a_network_of_numbers_takes_no_images(bundles, photos: Path, tmp_path: Path, capsys) -> None:
    assert command("run", bundles["frozen"][1], "--input", photos, "--output", tmp_path / "y.npy") == 2
    assert "64" in capsys.readouterr().err


def test_names_only_where_they_fit(bundle: Path) -> None:
    said = manifest.read(bundle)
    files = [Path("a.png")]
    assert answers(np.array([[0.0, 9.0, 1.0]]), files, said)[0].classes == ("dog", "owl", "cat")
    assert answers(np.zeros((1, 5)), files, said)[0].classes[0] == "0"  # a head of other classes
    assert answers(np.zeros((1, 5, 2)), files, said) == []


def test_what_is_an_image(photos: Path) -> None:
    assert image_files(str(photos / "notes.txt")) is None
    assert image_files(str(photos / "none")) is None
    assert [p.name for p in image_files(str(photos)) or []] == ["0.png", "1.png", "2.png", "grey.jpg"]


@pytest.mark.road
def test_training_on_folders_names_the_classes(model: torch.nn.Module, tmp_path: Path, capsys) -> None:
    draw = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = draw.integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    torch.save(model, tmp_path / "model.pt")
    bundle, images = tmp_path / "b", tmp_path / "images"
    assert command(tmp_path / "model.pt", "--out", bundle, "-B", "2") == 0
    assert manifest.read(bundle).class_names is None
    assert command("train", bundle, "--data", images, "--steps", "2", "--batch-size", "4") == 0
    assert "fewer than 20 would be held out" in " ".join(capsys.readouterr().err.split())
    assert manifest.read(bundle).class_names == NAMES
    assert command("run", bundle, "--input", images, "--output", tmp_path / "y.npy") == 0
    assert "cat/0.png" in capsys.readouterr().err
