"""The examples run as they are, with fewer updates, and end with the figure they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs
EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path, steps: int | None) -> str:
    program = [sys.executable, str(EXAMPLES / f"{name}.py"), *([] if steps is None else ["--steps", str(steps)])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_tested() -> None:
    here = Path(__file__).read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.stem}", ' in here, path.name


def test_language(tmp_path: Path) -> None:
    said = run("language", tmp_path, 150)
    found = re.search(r"nats per byte: ([\d.]+) the original, ([\d.]+) its blocks", said)
    assert found is not None
    assert float(found[1]) < 3.2  # a count of bytes has about 3.3
    assert float(found[2]) < 3.4
    assert "Return the" in said


def test_unlabelled(tmp_path: Path) -> None:
    said = run("unlabelled", tmp_path, 200)
    last = re.findall(r"denoise, 3 steps: ([\d.]+) % right, ([\d.]+) % as the original", said)
    assert float(last[0][0]) > 85
    assert float(last[0][1]) > 90


def test_serve(tmp_path: Path) -> None:
    said = run("serve", tmp_path, 16)
    assert "answers as alone" in said
    found = re.search(r"at most ([\d.]+) MiB of ([\d.]+) MiB", said)
    assert found is not None
    assert float(found[1]) <= 12
    assert float(found[2]) > 20


def test_diffusion(tmp_path: Path) -> None:
    assert "denoise: 40 images in 24 steps" in run("diffusion", tmp_path, 60)
    assert (tmp_path / "demo" / "diffusion.png").stat().st_size > 1000


def test_digits(tmp_path: Path) -> None:
    said = run("digits", tmp_path, 40)
    accuracies = [float(n) for n in re.findall(r"([\d.]+) %", said)]
    assert min(accuracies[:3]) > 85  # the original's and, frozen, its blocks'
    differences = [float(n) for n in re.findall(r"\d\.\de-\d\d", said)]
    assert len(differences) == 4
    assert max(differences) < 1e-3
