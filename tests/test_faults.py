"""A full disk, a read error or SIGKILL at a chosen place of a command: the bundle is whole or absent, an older one stays whole, nothing is left behind, and the same command again completes.

``pytest -m slow`` has every place of every job; ``python benchmarks/fuzz.py kills`` random times.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from diffusionblocks.export import replacing
from diffusionblocks.export.bundle import building
from diffusionblocks.runtime import BundleError, files, open_bundle

pytestmark = pytest.mark.road


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


faulting = sys.modules.get("faulting") or _module("faulting")
fuzzing = sys.modules.get("fuzzing") or _module("fuzzing")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp() / "fuzz-seeds"
    if not folder.exists():
        fuzzing.make_seeds(folder)
    return folder


@pytest.fixture(scope="module")
def server(seeds: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[faulting.Server]:
    folder = tmp_path_factory.mktemp("faults") / "jobs"
    shutil.copytree(seeds, folder)
    with faulting.Server(folder) as made:
        yield made


@pytest.fixture
def bundle(seeds: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(seeds / "model.dblocks", tmp_path / "model.dblocks"))


def _spread(count: int, number: int) -> list[int]:
    """``number`` places of 1 to ``count``, the first and the last among them."""
    return sorted({round(1 + k * (count - 1) / max(number - 1, 1)) for k in range(number)})


@pytest.mark.parametrize(
    ("job", "number"),
    [
        ("convert", 2),
        ("replace", 4),
        pytest.param("convert", 1000, marks=pytest.mark.slow),
        pytest.param("replace", 1000, marks=pytest.mark.slow),
        pytest.param("train", 1000, marks=pytest.mark.slow),
    ],
)
def test_killed_at_a_write(server: faulting.Server, job: str, number: int) -> None:
    whole = server.run(job)
    assert whole.code == 0, whole.said
    assert whole.writes > 20
    for place in _spread(whole.writes, min(number, whole.writes)):
        found = server.killed_and_again(job, kill=place)
        assert found.killed, place
        assert found.ok, f"{place}: {found}"


@pytest.mark.parametrize("job", ["convert", "replace"])
def test_killed_at_a_write_after_the_bundle_has_its_name(server: faulting.Server, job: str) -> None:
    """Its page is written again with the parity table: a killed process leaves no part of it in the bundle."""
    whole = server.run(job)
    states = []
    for place in range(whole.writes - 5, whole.writes + 1):
        found = server.killed_and_again(job, kill=place)
        assert found.killed, place
        assert found.ok, f"{place}: {found}"
        states.append(found.state)
    assert states[-3:] == ["whole"] * 3


@pytest.mark.parametrize(
    ("job", "fault", "number"),
    [
        ("replace", "full", 2),
        ("replace", "unreadable", 2),
        *(
            pytest.param(job, fault, 1000, marks=pytest.mark.slow)
            for job in faulting.JOBS
            for fault in ("full", "unreadable")
        ),
    ],
)
def test_a_full_disk_and_read_errors(server: faulting.Server, job: str, fault: str, number: int) -> None:
    """At every file that is opened. The first folder that cannot be made ends in a refusal, and a late read error in one as well."""
    whole = server.run(job)
    count = whole.writes if fault == "full" else whole.reads
    codes = []
    for place in _spread(count, min(number, count)):
        found = server.killed_and_again(job, **{fault: place})
        assert found.code in (0, 2), f"{place}: {found}"
        assert found.ok, f"{place}: {found}"
        codes.append(found.code)
    assert 2 in codes


@pytest.mark.parametrize(
    ("job", "limits"),
    [
        ("convert", [100]),
        *(pytest.param(job, [0, 100, 1000, 3000, 10_000, 50_000], marks=pytest.mark.slow) for job in faulting.JOBS),
    ],
)
def test_a_disk_that_is_full_in_the_midst_of_a_file(server: faulting.Server, job: str, limits: list[int]) -> None:
    """Also where torch or safetensors write in native code."""
    for limit in limits:
        found = server.killed_and_again(job, limit=limit)
        assert found.code in (0, 2), f"{limit}: {found}"
        assert found.ok, f"{limit}: {found}"
        assert limit > 1000 or (found.code == 2 and ("disk is full" in found.said or "File too large" in found.said))


def test_a_state_that_is_not_whole_is_seen(bundle: Path) -> None:
    assert faulting.state_of(bundle) == "whole"
    assert faulting.state_of(bundle / "nothing") == "absent"
    (bundle / "more.bin").write_bytes(b"1")
    assert faulting.state_of(bundle) == "broken"
    (bundle / "more.bin").unlink()
    data = (bundle / "stem.bin").read_bytes()
    (bundle / "stem.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert faulting.state_of(bundle) == "broken"


# Replacing


def _folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "manifest.json").write_text(text)
    return path


@pytest.mark.parametrize("exchanging", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanging: bool) -> None:
    if not exchanging:  # a file system that cannot
        monkeypatch.setattr(replacing, "exchange", lambda *_: False)
    new, target = _folder(tmp_path / "new", "new"), _folder(tmp_path / "b", "old")
    replacing.replace(new, target)
    assert (target / "manifest.json").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="names are exchanged on Linux and macOS")
def test_there_is_a_bundle_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, target = _folder(tmp_path / "new", "new"), _folder(tmp_path / "b", "old")

    def no_rename(*_: object) -> None:
        raise AssertionError("two renames")

    monkeypatch.setattr(os, "rename", no_rename)
    replacing.replace(new, target)
    assert (target / "manifest.json").read_text() == "new"


def test_an_older_folder_comes_back_where_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacing, "exchange", lambda *_: False)
    new, target, rename = _folder(tmp_path / "new", "new"), _folder(tmp_path / "b", "old"), os.rename

    def failing(source: Path, place: Path) -> None:
        if Path(source) == new:
            raise OSError(errno.EIO, "read error")
        rename(source, place)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="read error"):
        replacing.replace(new, target)
    assert (target / "manifest.json").read_text() == "old"


def test_what_killed_processes_left_is_cleared(tmp_path: Path) -> None:
    """Of this machine, of this bundle, and of processes that are gone; an older bundle that was aside comes back."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    prefix, target = f".b.{socket.gethostname()}_", tmp_path / "b"
    aside = tmp_path / f"{prefix}{dead.pid}.x"
    aside.mkdir()
    _folder(aside / replacing.OLD, "old")
    kept = [
        f"{prefix}{os.getpid()}.x",
        f".b.elsewhere_{dead.pid}.x",
        f".c.{socket.gethostname()}_{dead.pid}.x",
        f"{prefix}notes",
    ]
    for name in [*kept, f"{prefix}{dead.pid}.y"]:
        (tmp_path / name).mkdir()
    with building(target) as folder:
        assert (target / "manifest.json").read_text() == "old"
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "b", folder.name])


# Files that change while they are used


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("how", ["altered in place", "replaced", "cut off"])
def test_a_file_that_changes_between_two_calls(bundle: Path, mapped: bool, how: str) -> None:
    rows, weights = np.zeros((2, 4), np.float32), bundle / "stem.bin"
    with open_bundle(bundle, mapped=mapped) as opened:
        before = opened.run(rows, "exact")
        data = weights.read_bytes()
        if how == "replaced":
            (bundle / "other").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            (bundle / "other").replace(weights)
        else:
            weights.write_bytes(data[:-64] if how == "cut off" else data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BundleError, match=r"stem\.bin"):
            opened.run(rows, "exact")
        weights.write_bytes(data)
        assert np.array_equal(opened.run(rows, "exact"), before)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_that_is_cut_off_while_its_weights_are_held(bundle: Path, mapped: bool) -> None:
    """Mapped weights end the process with SIGBUS, which docs/bundle.md says; weights that were read survive."""
    program = f"""
import os
from pathlib import Path
from diffusionblocks.runtime import manifest
from diffusionblocks.runtime.weights import Buffers, Held

folder = Path({str(bundle)!r})
found = manifest.read(folder)
held = Held(folder, found.stem, found.files, None if {mapped} else Buffers())
os.truncate(folder / "stem.bin", 0)
print(sum(float(a.sum()) for a in held.arrays.values()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGBUS if mapped else 0), done.stderr


@pytest.mark.parametrize("what", ["hash", "manifest", "weights"])
def test_read_errors(bundle: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def failing(*_: object, **__: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    rows = np.zeros((2, 4), np.float32)
    if what == "manifest":
        monkeypatch.setattr(Path, "read_text", failing)
        with pytest.raises(BundleError, match=r"cannot be read: .*Input/output error"):
            open_bundle(bundle)
        return
    with open_bundle(bundle, mapped=False) as opened:
        if what == "hash":
            monkeypatch.setattr(files, "sha256_of", failing)
        else:
            opened.run(rows, "exact")
            monkeypatch.setattr(Path, "open", failing)
        with pytest.raises(BundleError, match=r"cannot be read: .*Input/output error"):
            opened.run(rows, "exact")


class Kernel:
    """Windows' answers about one process that is there, and one that has ended but is still known."""

    closed = 0

    def OpenProcess(self, access: int, inherit: bool, process: int) -> int:
        return process if process in (7, 8) else 0

    def WaitForSingleObject(self, handle: int, milliseconds: int) -> int:
        return 258 if handle == 7 else 0

    def CloseHandle(self, handle: int) -> None:
        self.closed += 1


def test_who_is_alive() -> None:
    from diffusionblocks.runtime.processes import _is_alive_on_windows, is_alive

    kernel = Kernel()
    assert [_is_alive_on_windows(process, kernel) for process in (7, 8, 9)] == [True, False, False]
    assert kernel.closed == 2
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert is_alive(os.getpid())
    assert not is_alive(ended.pid)
    assert not is_alive(1 << 40)
