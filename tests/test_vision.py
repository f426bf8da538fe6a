"""torchvision of another build than torch: networks are built without its compiled operators, and the doctor says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusionblocks.converter.vision import import_module

BROKEN = """
import torch
if not hasattr(torch.ops.torchvision, "nms"):
    raise RuntimeError("operator torchvision::nms does not exist")
loaded = True
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A torchvision whose operators are not there, and a package that imports it."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN)
    (tmp_path / "mynet.py").write_text("import torchvision\nvalue = torchvision.loaded\n")
    return tmp_path


def test_without_help_it_cannot_be_imported(folder: Path) -> None:
    assert "nms does not exist" in run("import mynet", folder).stderr


def test_a_package_that_imports_it_can_be_imported(folder: Path) -> None:
    program = """
from diffusionblocks.converter.vision import import_module
import torch
assert import_module("mynet").value
try:
    torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except NotImplementedError:
    print("declared, not defined")
"""
    done = run(program, folder)
    assert done.returncode == 0, done.stderr
    assert "declared, not defined" in done.stdout


def test_another_failure_stays_one(folder: Path) -> None:
    (folder / "torchvision" / "__init__.py").write_text("raise RuntimeError('no such library')")
    done = run("from diffusionblocks.converter.vision import import_module\nimport_module('mynet')", folder)
    assert "no such library" in done.stderr


def test_what_is_missing_stays_missing() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("no_such_package_at_all")


def test_a_network_of_its_own_is_named_first() -> None:
    """In a process that has imported neither torchvision nor what imports it."""
    program = "from diffusionblocks.converter.specs import architecture\narchitecture('torchvision:resnet18')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
