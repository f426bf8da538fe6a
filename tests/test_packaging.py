"""The wheel holds the three rooms and nothing else; docstring examples run; the command's version is the distribution's."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("converter", "export", "runtime")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from a copy of the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_holds_every_module(wheel: list[str]) -> None:
    expected = {f"diffusionblocks/{room}/{p.name}" for room in ROOMS for p in (ROOT / room).glob("*.py")}
    assert expected <= set(wheel)
    assert {f"diffusionblocks/{room}/py.typed" for room in ROOMS} <= set(wheel)


def test_the_wheel_holds_nothing_else(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel} == {
        "diffusionblocks",
        f"diffusionblocks-{importlib.metadata.version('diffusionblocks')}.dist-info",
    }
    assert {name.split("/")[1] for name in wheel if name.startswith("diffusionblocks/")} == set(ROOMS)


@pytest.mark.parametrize("module", ["converter.network", "runtime.bundle"])
def test_docstring_examples(module: str, bundles, digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bundles["frozen"][1], tmp_path / "model.dblocks")
    monkeypatch.chdir(tmp_path)
    found = importlib.import_module(f"diffusionblocks.{module}")
    result = doctest.testmod(found, extraglobs={"x": digits[0][:3]}, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted > 0
