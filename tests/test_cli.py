"""The command, as its users meet it: exit codes, one message, nothing half-written."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from diffusionblocks.converter import cli
from torch import nn

QUICK = ["--steps", "3", "--batch-size", "8"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]):
    """Run ``dbconvert``; returns (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def refused(result: tuple[int, str, str], message: str, code: int = 2) -> None:
    assert result[0] == code, result
    assert " ".join(message.split()) in " ".join(result[2].split())
    assert result[2].count("Error:") == 1
    assert "Traceback" not in result[2]
    assert result[1] == ""


def empty_but(folder: Path, *names: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


def test_the_whole_road(command, program_file, data_file, digits, trained_mlp, tmp_path: Path) -> None:
    bundle = tmp_path / "m.dblocks"
    assert command(program_file, "--out", bundle, "--data", data_file, *QUICK)[0] == 0
    assert command("train", bundle, "--data", data_file, "--blocks", "1", *QUICK)[0] == 0
    assert command("verify", bundle, program_file)[0] == 0
    np.save(tmp_path / "x.npy", digits[0][1400:1405])
    x = ["--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy"]
    assert command("run", bundle, *x, "--mode", "exact")[0] == 0
    with torch.no_grad():
        expected = trained_mlp(torch.from_numpy(digits[0][1400:1405])).numpy()
    assert np.abs(np.load(tmp_path / "y.npy") - expected).max() < 1e-4
    assert command("run", bundle, *x, "--mode", "denoise", "--steps", "6")[0] == 0
    assert np.allclose(np.exp(np.load(tmp_path / "y.npy")).sum(-1), 1, atol=1e-5)


def test_inspect_prints_one_json_object(command, program_file) -> None:
    code, out, _ = command("inspect", program_file, "--json")
    data = json.loads(out)
    assert code == 0
    assert {"model", "units", "stages", "blocks", "side_inputs", "refused"} <= set(data)
    assert len(data["units"]) == 6
    assert [b["units"] for b in data["blocks"]]


@pytest.mark.parametrize("name", ["convert", "inspect", "train", "run", "verify"])
def test_help_has_an_example(command, name: str) -> None:
    code, out, _ = command(name, "--help")
    assert code == 0
    assert "Example" in out


def test_unknown_file_kind(command, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_text("hello")
    refused(command(tmp_path / "m.pt", "--out", tmp_path / "o"), "is a text file")
    assert empty_but(tmp_path, "m.pt")


def test_weights_that_do_not_fit(command, tmp_path: Path) -> None:
    torch.save({"conv9.weight": torch.ones(2)}, tmp_path / "w.pt")
    result = command(tmp_path / "w.pt", "--arch", "timm:resnet18", "--out", tmp_path / "o")
    refused(result, "do not fit timm:resnet18")
    assert "missing" in result[2]
    assert "unexpected 1: conv9.weight" in result[2]
    assert empty_but(tmp_path, "w.pt")


@pytest.mark.parametrize("name", ["vgg11", "densenet121"])
def test_no_residual_chain(command, tmp_path: Path, name: str) -> None:
    torch.save(timm.create_model(name).eval(), tmp_path / "m.pt")
    result = command(tmp_path / "m.pt", "--input-shape", "3x64x64", "--out", tmp_path / "o")
    refused(result, "no chain of residual units")
    assert "concatenations" in result[2]
    assert empty_but(tmp_path, "m.pt")


def test_more_blocks_than_units(command, program_file, tmp_path: Path) -> None:
    refused(command(program_file, "--out", tmp_path / "o", "--num-blocks", 9), "9 blocks were asked for")
    assert empty_but(tmp_path)


def test_denoise_on_an_untrained_bundle(command, program_file, digits, tmp_path: Path) -> None:
    assert command(program_file, "--out", tmp_path / "b")[0] == 0
    np.save(tmp_path / "x.npy", digits[0][:3])
    x = ["--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy"]
    refused(command("run", tmp_path / "b", *x, "--mode", "denoise"), "trained")
    assert empty_but(tmp_path, "b", "x.npy")


def _nan(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.copy()
    x[2, 3] = np.nan
    return x, y


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nan, "1 of 100 rows cannot be read: row 2 (NaN or infinity in input)"),
        (lambda x, y: (x, y + 5), "the model has the classes 0 to 9"),
        (lambda x, y: (x, y[:50]), "The data has 100 rows of input, 50 rows of y"),
        (lambda x, y: (x[:, :60], y), "input float32 [100, 60] for float32 ['batch', 64]"),
    ],
)
def test_bad_training_data(command, program_file, digits, tmp_path: Path, change, message: str) -> None:
    x, y = change(digits[0][:100], digits[1][:100])
    np.savez(tmp_path / "d.npz", x=x, y=y)
    refused(command(program_file, "--out", tmp_path / "o", "--data", tmp_path / "d.npz", *QUICK), message)
    assert empty_but(tmp_path, "d.npz")


def test_data_of_another_shape(command, bundles, digits, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(bundles["frozen"][1], bundle)
    np.save(tmp_path / "x.npy", digits[0][:3, :60])
    x = ["--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy"]
    refused(command("run", bundle, *x, "--mode", "exact"), "64")
    assert empty_but(tmp_path, "b", "x.npy")


def test_an_existing_output_folder_is_kept(command, program_file, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("keep")
    refused(command(program_file, "--out", tmp_path / "o"), "exists already")
    assert (tmp_path / "o" / "mine.txt").read_text() == "keep"


@pytest.mark.road
@pytest.mark.parametrize("kib", [1, 16, 36, 100])
def test_a_full_disk_leaves_nothing(command, program_file, tmp_path: Path, kib: int) -> None:
    """Writes fail in turn in a graph, a weights file, the trained tensors, and inside torch's own archive writer."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, old[1]))
    try:
        result = command(program_file, "--out", tmp_path / "o")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    refused(result, "The disk is full")
    assert empty_but(tmp_path)


def test_no_space_is_named(command, program_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffusionblocks.converter.exporting.save_training", full)
    refused(command(program_file, "--out", tmp_path / "o"), "The disk is full")
    assert empty_but(tmp_path)


@pytest.mark.road
def test_the_record_of_training_keeps_every_block(command, program_file, data_file, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    assert command(program_file, "--out", bundle, "--data", data_file, *QUICK)[0] == 0
    assert command("train", bundle, "--data", data_file, "--blocks", "1", "--steps", "2", "--lr", "1e-5")[0] == 0
    assert command("train", bundle, "--merge")[0] == 0
    blocks = json.loads((bundle / "manifest.json").read_text())["training"]["blocks"]
    assert [(b["block"], b["options"]["steps"]) for b in blocks] == [(0, 3), (1, 2), (2, 3)]
    assert [b["options"]["lr"] for b in blocks] == [3e-4, 1e-5, 3e-4]


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_bundle(command, bundles, digits, tmp_path: Path, damage: str) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(bundles["frozen"][1], bundle)
    victim = bundle / "block_01.bin"
    data = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(data[:-100] if damage == "truncated" else bytes([data[0] ^ 1]) + data[1:])
    np.save(tmp_path / "x.npy", digits[0][:3])
    x = ["--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy"]
    refused(command("run", bundle, *x, "--mode", "exact"), "block_01.bin")
    assert command("verify", bundle)[0] in (1, 2)
    assert empty_but(tmp_path, "b", "x.npy")


def test_ctrl_c_ends_cleanly(command, program_file, data_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusionblocks.converter.train.train_block", stop)
    code, _, err = command(program_file, "--out", tmp_path / "o", "--data", data_file, *QUICK)
    assert code == 130
    assert "Traceback" not in err
    assert empty_but(tmp_path)


def test_a_pickled_module_needs_its_shape(command, tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "m.pt")
    refused(command(tmp_path / "m.pt", "--out", tmp_path / "o"), "--input-shape")
