"""What travels: bundles of earlier versions, the original's licence, facts inside the graphs, source and wheel archives."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from diffusionblocks.converter.cli import main
from diffusionblocks.converter.licences import keep_licence, licence_files, licence_of
from diffusionblocks.export.verify import verify_bundle
from diffusionblocks.runtime import BundleError, manifest, open_bundle

FIRST = Path(__file__).parent / "data" / "bundle_format_1"
"""Written by the first version, before structures, separate weights, several kinds of targets and this page of tests."""


def command(*args: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(args)
    return int(done.value.code or 0)


class TestFormats:
    def test_the_first_version_s_bundle_runs(self) -> None:
        verify_bundle(FIRST).raise_for_failures()
        probe = np.load(FIRST / "probe.npz")
        with open_bundle(FIRST) as bundle:
            rows = {n.removeprefix("input."): probe[n] for n in probe.files if n.startswith("input.")}
            assert np.allclose(bundle.run(rows, mode="exact"), probe["exact.output"], rtol=1e-4)
            assert np.allclose(bundle.run(rows, mode="denoise"), probe["denoise.prediction"], rtol=1e-4)

    def test_it_has_a_page(self, tmp_path: Path) -> None:
        assert command("report", str(FIRST), "--out", str(tmp_path / "page.html")) == 0

    @pytest.mark.parametrize("number", [0, 2, "1", None, 1.5])
    def test_another_format_is_refused(self, tmp_path: Path, number: object) -> None:
        folder = shutil.copytree(FIRST, tmp_path / "b")
        data = json.loads((folder / "manifest.json").read_text())
        data["format"] = number
        (folder / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(BundleError, match=r"format(.|\n)*(upgrade|Upgrade|version)"):
            open_bundle(folder)


class TestFactsInGraphs:
    def test_a_graph_says_what_it_is(self, bundles) -> None:
        folder = bundles["frozen"][1]
        said = manifest.read(folder)
        for block in said.blocks:
            assert block.block is not None
            facts = properties(folder / block.block.file)
            assert facts["part"] == "block"
            assert facts["block"] == str(block.index)
            assert json.loads(facts["sigma"]) == list(block.sigma)
            assert json.loads(facts["units"]) == list(block.units)
            assert facts["version"] == said.versions["diffusionblocks"]
            assert facts["format"] == str(said.format)
            assert block.context is not None
            assert properties(folder / block.context.file)["part"] == "context"
        assert properties(folder / "stem.onnx") == {
            "version": said.versions["diffusionblocks"],
            "format": str(said.format),
            "part": "stem",
            "task": "classification",
        }

    def test_structures_do_not_differ_by_them(self, bundles) -> None:
        said = manifest.read(bundles["frozen"][1])
        assert len({b.block.structure for b in said.blocks if b.block is not None}) == 1


def properties(path: Path) -> dict[str, str]:
    model = onnx.load(path, load_external_data=False)
    return {p.key.removeprefix("diffusionblocks."): p.value for p in model.metadata_props}


class TestLicence:
    @pytest.mark.parametrize(
        ("card", "licence"),
        [
            ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Model", "apache-2.0"),
            ("---\ntags: [a]\nlicense: 'mit'\n---\n", "mit"),
            ("---\nlicense: other\nlicense_name: my-own\n---\n", "my-own"),
            ("---\nlicense: other\n---\n", "other"),
            ("# Model\nlicense: apache-2.0\n", None),
            ("---\nmodel:\n  license: apache-2.0\n---\n", None),
            ("", None),
        ],
    )
    def test_what_a_card_says(self, tmp_path: Path, card: str, licence: str | None) -> None:
        (tmp_path / "README.md").write_text(card)
        assert licence_of(tmp_path) == licence

    def test_a_folder_without_a_card(self, tmp_path: Path) -> None:
        assert licence_of(tmp_path) is None
        assert licence_files(tmp_path / "none") == ()

    def test_files_that_say_it(self, tmp_path: Path) -> None:
        for name in ("LICENSE", "LICENCE.txt", "NOTICE", "licensed.py", "weights.bin", "COPYING"):
            (tmp_path / name).write_text(name)
        (tmp_path / "LICENSE.md").mkdir()
        (tmp_path / "LICENSE-LARGE").write_bytes(b"x" * (1 << 21))
        found = licence_files(tmp_path)
        assert [p.name for p in found] == ["COPYING", "LICENCE.txt", "LICENSE", "NOTICE"]
        (tmp_path / "b").mkdir()
        keep_licence(found, tmp_path / "b")
        assert (tmp_path / "b" / "licence" / "NOTICE").read_text() == "NOTICE"

    @pytest.mark.road
    def test_it_travels_into_the_bundle_and_through_training(self, tmp_path: Path) -> None:
        import torch
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4, num_labels=3
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
        (tmp_path / "model" / "LICENSE").write_text("Do as you like.\n")
        bundle = tmp_path / "b"
        assert command(f"transformers:{tmp_path / 'model'}", "--out", str(bundle), "-B", "2") == 0
        np.savez(tmp_path / "d.npz", x=np.zeros((8, 3, 8, 8), np.float32), y=np.arange(8) % 3)
        assert command("train", str(bundle), "--data", str(tmp_path / "d.npz"), "--steps", "2") == 0
        said = manifest.read(bundle)
        assert said.source["licence"] == "cc-by-4.0"
        assert "licence/LICENSE" in said.files
        assert (bundle / "licence" / "LICENSE").read_text() == "Do as you like.\n"
        assert "cc-by-4.0" in (bundle / "report.html").read_text("utf-8")


def test_the_source_archive_builds_the_wheel(tmp_path: Path) -> None:
    from setuptools import build_meta

    root = Path(__file__).parents[1]
    source = tmp_path / "source"
    for name in ("converter", "export", "runtime"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(source)
        archive = build_meta.build_sdist(str(tmp_path))
    with tarfile.open(tmp_path / archive) as packed:
        names = {"/".join(name.split("/")[1:]) for name in packed.getnames()}
        packed.extractall(tmp_path / "unpacked")
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    rooms = ("converter", "export", "runtime")
    assert {f"{room}/{p.name}" for room in rooms for p in (root / room).glob("*.py")} <= names
    assert {f"{room}/py.typed" for room in rooms} <= names
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(next((tmp_path / "unpacked").iterdir()))
        wheel = build_meta.build_wheel(str(tmp_path))
    assert (tmp_path / wheel).stat().st_size > 100_000
