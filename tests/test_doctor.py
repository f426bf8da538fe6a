"""dbconvert doctor: each finding simulated by packages, programs and limits that a process of its own really sees."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from diffusionblocks.converter import doctor
from diffusionblocks.converter.doctor import LEAST, NOTE, OK, PROBLEM, examine, free_memory
from diffusionblocks.runtime.installing import install

RUN = "from diffusionblocks.converter.cli import main; main()"


def distribution(folder: Path, name: str, version: str, module: str | None = None) -> None:
    """A package that is installed in ``folder``, which comes before all others; its module if it has one."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if module is not None:
        (folder / f"{name.replace('-gpu', '')}.py").write_text(module)


def asked(folder: Path, *, before: str = "", path: Path | None = None) -> dict[str, dict[str, Any]]:
    """The findings of a process that sees the packages in ``folder``, by what they are about."""
    search = os.environ["PATH"] if path is None else f"{path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": search}
    program = f"import sys; sys.argv = ['dbconvert', 'doctor', '--json']; {before}\n{RUN}"
    made = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240)
    assert "Traceback" not in made.stderr, made.stderr
    said = json.loads(made.stdout)
    assert made.returncode == (0 if said["ok"] else 1)
    assert said["ok"] == all(f["status"] != PROBLEM for f in said["findings"])
    return {f["about"]: f for f in said["findings"]}


STUB = """
__version__ = "9.9"
def get_available_providers():
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]
class SessionOptions:
    pass
class InferenceSession:
    def __init__(self, model, options, providers):
        assert len(model) > 50
    def get_providers(self):
        return [{}"CPUExecutionProvider"]
"""


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A second onnxruntime whose CUDA does not load, a torch that cannot be imported, an old numpy, the other dbconvert, a GPU."""
    folder, programs = tmp_path_factory.mktemp("fakes"), tmp_path_factory.mktemp("programs")
    distribution(folder, "onnxruntime-gpu", "9.9", STUB.format(""))
    distribution(folder, "dbconvert", "2.0")
    distribution(folder, "numpy", "1.20")
    distribution(folder, "torch", "2.99", "raise ImportError('libtorch.so: no such file')")
    smi = programs / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Some GPU, 1024, 2048, 550.1'\n")
    smi.chmod(0o755)
    return asked(folder, path=programs)


def test_two_runtimes_are_a_conflict(fakes: dict[str, Any]) -> None:
    # by the name both have: of two findings about onnxruntime the second says what can run
    assert fakes["onnxruntime"]["found"] == "onnxruntime 9.9; runs on CUDA, CPU"
    assert fakes["onnxruntime on CUDA"]["status"] == PROBLEM
    assert "falls back to the CPU" in fakes["onnxruntime on CUDA"]["found"]


def test_packages_that_do_not_do_are_named_with_their_mend(fakes: dict[str, Any]) -> None:
    assert fakes["torch"]["status"] == PROBLEM
    assert "libtorch.so: no such file" in fakes["torch"]["found"]
    assert fakes["numpy"]["found"] == "1.20 is older than 1.26"
    assert fakes["numpy"]["mend"] == 'pip install "numpy>=1.26"'
    assert "a tool for databases" in fakes["dbconvert"]["found"]
    assert "pip uninstall -y dbconvert" in fakes["dbconvert"]["mend"]


def test_a_gpu_is_seen_without_torch(fakes: dict[str, Any]) -> None:
    assert fakes["GPU"]["status"] == OK
    assert fakes["GPU"]["found"] == "Some GPU, 1.0 GiB of 2.0 GiB free, driver 550.1"


def test_the_conflict_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "onnxruntime-gpu", "9.9")
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second = list(doctor._runtime())
    assert first.status == PROBLEM
    assert first.found == "onnxruntime and onnxruntime-gpu overwrite each other's files"
    assert first.mend == f"pip uninstall -y onnxruntime onnxruntime-gpu; {install('gpu')}"
    assert second.status == OK  # the one that is there runs


def test_without_any_runtime_no_bundle_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_is_runtime", lambda distribution: False)
    (only,) = doctor._runtime()
    assert (only.status, only.mend) == (PROBLEM, f"{install('cpu')}, or [gpu]")


def test_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examine()
    by = {f.about: f for f in found}
    for about in ("python", "diffusionblocks", "numpy", "onnx", "torch", "onnxruntime"):
        assert by[about].status == OK, by[about]
    assert onnxruntime.__version__ in by["onnxruntime"].found
    assert all(f.mend or f.about == "GPU" for f in found if f.status != OK)
    assert {f.about for f in found} >= {"memory", "disk, here", "disk, temporary files", "disk, cache"}


def test_the_graph_that_is_asked_of_cuda_is_one() -> None:
    session = onnxruntime.InferenceSession(base64.b64decode(doctor._IDENTITY), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([3.5], np.float32)})[0].tolist() == [3.5]


def test_little_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": LEAST - 1})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage)
    assert [f.status for f in doctor._disk()] == [PROBLEM] * 3
    monkeypatch.setattr(doctor, "free_memory", lambda: (LEAST + 1, ", by ulimit -v"))
    (memory,) = doctor._memory()
    assert memory.status == NOTE
    assert memory.found.endswith("free, by ulimit -v")
    monkeypatch.setattr(doctor, "free_memory", lambda: (None, ""))
    assert [f.status for f in doctor._memory()] == [NOTE]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of a process")
def test_the_limit_of_the_process_is_the_memory_there_is() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30));"
        "from diffusionblocks.converter.doctor import free_memory; print(*free_memory())"
    )
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == f"{3 << 30} , by ulimit -v"
    free, _ = free_memory()
    assert free is None or free > 0


def test_a_question_without_an_answer_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", 0.5)
    assert doctor._asked("import time; time.sleep(30)") == "no answer in 0.5 seconds"
    assert doctor._asked("import os; os._exit(3)") == "it ended with 3"
    assert "no such thing" in doctor._asked("raise OSError('no such thing')")
    assert doctor._asked("print('[1, 2]')") == [1, 2]


@pytest.mark.parametrize(
    ("told", "command"),
    [
        (None, 'pip install "diffusionblocks[gpu]"'),
        ('{"url": "file://HERE", "dir_info": {"editable": true}}', 'pip install -e "HERE[gpu]"'),
        ('{"url": "file://HERE", "dir_info": {}}', 'pip install "HERE[gpu]"'),
        ('{"url": "file://HERE/a%20wheel.whl", "archive_info": {}}', 'pip install "HERE/a wheel.whl[gpu]"'),
        ('{"url": "file://HERE/gone", "dir_info": {}}', 'pip install "diffusionblocks[gpu]"'),
        ('{"url": "https://somewhere/x.whl", "archive_info": {}}', 'pip install "diffusionblocks[gpu]"'),
        ("[]", 'pip install "diffusionblocks[gpu]"'),
        ("not json", 'pip install "diffusionblocks[gpu]"'),
    ],
)
def test_what_is_missing_is_installed_as_the_package_was(
    told: str | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder or the wheel it came from, where that is still there; an index may hold another package of the name, or none."""
    (tmp_path / "a wheel.whl").touch()
    distribution(tmp_path, "diffusionblocks", "1.0")
    if told is not None:
        (next(tmp_path.glob("*.dist-info")) / "direct_url.json").write_text(told.replace("HERE", str(tmp_path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert install("gpu") == command.replace("HERE", str(tmp_path))
