"""Trainings in real processes: killed at any moment, spread over ranks, gathered from copies; always the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusionblocks.converter import finetune
from diffusionblocks.converter.dataset import ArrayDataset
from diffusionblocks.converter.ranks import Share, shares_of
from diffusionblocks.converter.roster import is_alive
from diffusionblocks.converter.runs import Run
from diffusionblocks.converter.saved import read_safetensors
from diffusionblocks.converter.train_options import TrainOptions
from diffusionblocks.converter.training_run import Plan, open_for_training, train_bundle
from diffusionblocks.runtime.errors import BadInput
from rich.console import Console

pytestmark = pytest.mark.road

OPTIONS = ["--steps", "60", "--batch-size", "16", "--save-every", "7", "--threads", "1"]
BLOCKS = [f"train/block_{b:02d}.safetensors" for b in range(3)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "diffusionblocks.converter", *map(str, args)]


def run(*args: object) -> str:
    done = subprocess.run(command(*args), capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def torchrun(ranks: int, *args: object) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m"]
    program += ["--master-port", str(random.randrange(20000, 60000)), "diffusionblocks.converter", *map(str, args)]
    return subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment())


def weights(bundle: Path) -> list[bytes]:
    return [(bundle / name).read_bytes() for name in BLOCKS]


@pytest.fixture(scope="module")
def fresh(program_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh") / "model.dblocks"
    run(program_file, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def serial(fresh: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """What one uninterrupted process trains."""
    folder = tmp_path_factory.mktemp("serial") / "model.dblocks"
    shutil.copytree(fresh, folder)
    run("train", folder, "--data", data_file, *OPTIONS)
    return weights(folder)


@pytest.fixture
def bundle(fresh: Path, tmp_path: Path) -> Path:
    shutil.copytree(fresh, tmp_path / "model.dblocks")
    return tmp_path / "model.dblocks"


def test_killed_at_any_moment(bundle: Path, serial: list[bytes], data_file: Path) -> None:
    """SIGKILL as soon as some checkpoint is there, three times, then the rest; the bundle opens after each."""
    at = random.Random(os.getpid())
    for kill in range(3):
        process = subprocess.Popen(command("train", bundle, "--data", data_file, *OPTIONS), env=environment())
        before, deadline = _checkpoints(bundle), time.monotonic() + 60
        while _checkpoints(bundle) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(at.random() * 0.2)
        process.kill()
        process.wait()
        open_for_training(bundle)
        assert kill or _checkpoints(bundle)
    run("train", bundle, "--data", data_file, *OPTIONS)
    assert weights(bundle) == serial
    assert not (bundle / "train" / "run").exists()


def _checkpoints(bundle: Path) -> list[tuple[str, int]]:
    return [(p.parent.name, p.stat().st_mtime_ns) for p in sorted(bundle.glob("train/run/block_*/tr*.safetensors"))]


def test_two_ranks_give_the_bits_of_one(bundle: Path, serial: list[bytes], data_file: Path) -> None:
    process = torchrun(2, "train", bundle, "--data", data_file, *OPTIONS)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert weights(bundle) == serial
    logs = [json.loads(line) for p in bundle.glob("train/logs/rank_*.jsonl") for line in p.read_text().splitlines()]
    assert {line["block"] for line in logs} == {0, 1, 2}


def test_ranks_that_share_a_block_agree(bundle: Path, serial: list[bytes], data_file: Path) -> None:
    """Four ranks for three blocks: two share the last, which then differs from one rank's by rounding alone."""
    process = torchrun(4, "train", bundle, "--data", data_file, *OPTIONS)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    found = weights(bundle)
    assert found[:2] == serial[:2]
    assert found[2] != serial[2]
    ours, theirs = read_safetensors(bundle / BLOCKS[2])[0], _read(serial[2], bundle.parent / "serial.safetensors")
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-3, atol=1e-4), name


def _read(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    path.write_bytes(data)
    return read_safetensors(path)[0]


@pytest.mark.parametrize("killed", ["training", pytest.param("watching", marks=pytest.mark.slow)])
def test_the_others_finish_when_a_rank_dies(bundle: Path, serial: list[bytes], data_file: Path, killed: str) -> None:
    process = torchrun(2, "train", bundle, "--data", data_file, *OPTIONS, "--steps", "900")
    about = _wait_for(bundle / "train" / "run" / "rank_1.json")
    _wait_for(bundle / "train" / "run" / "block_01" / "training.safetensors", read=False)
    other = _wait_for(bundle / "train" / "run" / "rank_0.json")["processes"][0]
    os.kill(about["processes"][0 if killed == "training" else 1], signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    deadline = time.monotonic() + 60
    while is_alive(other) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "goes on in process" in err
    if killed == "training":
        assert "Rank 1 was ended by signal 9" in err
        assert "Left to train: block 1 (at update" in err
        assert Run(bundle / "train" / "run").finished() == [0, 2]
        run("train", bundle, "--data", data_file, *OPTIONS, "--steps", "900")
    assert not (bundle / "train" / "run").exists()  # whoever is last refreshes the bundle
    assert all((bundle / name).is_file() for name in BLOCKS)


def _wait_for(path: Path, *, read: bool = True) -> dict[str, list[int]]:
    deadline = time.monotonic() + 60
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    found: dict[str, list[int]] = json.loads(path.read_text()) if read else {}
    return found


def test_blocks_trained_elsewhere_are_gathered(bundle: Path, serial: list[bytes], data_file: Path) -> None:
    copies = []
    for b in (2, 0, 1):
        copies.append(bundle.parent / f"copy_{b}.dblocks")
        shutil.copytree(bundle, copies[-1])
        said = run("train", copies[-1], "--data", data_file, "--blocks", b, *OPTIONS)
        assert f"Finished here: block {b}" in said
    run("train", bundle, "--merge", *[a for copy in copies for a in ("--from", copy)])
    assert weights(bundle) == serial


def test_carried_blocks_one_command_each(program_file: Path, data_file: Path, tmp_path: Path) -> None:
    """A block reads what the finished block before it makes, before any of them is in the bundle; the order is kept."""
    apart, whole = tmp_path / "apart.dblocks", tmp_path / "whole.dblocks"
    run(program_file, "--out", apart, "--num-blocks", "2", "--context", "carry")
    shutil.copytree(apart, whole)
    with pytest.raises(BadInput, match="block 1 reads what block 0 makes"):
        _train(apart, SHORT, blocks=(1,))
    for b in (0, 1):
        _train(apart, SHORT, blocks=(b,))
    _train(whole, SHORT, blocks=(0, 1))
    names = [f"train/run/block_{b:02d}/trained.safetensors" for b in range(2)]
    assert [(apart / n).read_bytes() for n in names] == [(whole / n).read_bytes() for n in names]


def _train(bundle: Path, options: TrainOptions, **plan: object) -> None:
    with np.load(bundle.parents[1] / "train.npz") if (bundle.parents[1] / "train.npz").exists() else _digits() as data:
        arrays = {"x": data["x"][:200]}, data["y"][:200]
    chosen = Plan(**{"holdout": 0.2, "save_every": 2, "blocks": (0,), **plan})
    train_bundle(
        bundle,
        lambda network: ArrayDataset({network.input_names[0]: arrays[0]["x"]}, arrays[1]),
        options,
        chosen,
        Console(quiet=True),
    )


class _digits:
    def __enter__(self) -> dict[str, np.ndarray]:
        from sklearn.datasets import load_digits

        data = load_digits()
        return {"x": (data.data / 16 - 0.3).astype(np.float32), "y": data.target.astype(np.int64)}

    def __exit__(self, *_: object) -> None: ...


SHORT = TrainOptions(steps=5, batch_size=8)


def _half_way(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training of block 0 that stopped after its second checkpoint."""
    from diffusionblocks.converter import state

    saved = state.BlockState.save

    def save(self: state.BlockState, folder: Path, about: dict[str, object]) -> None:
        saved(self, folder, about)
        if about["updates"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state.BlockState, "save", save)
        with pytest.raises(KeyboardInterrupt):
            _train(bundle, SHORT)
    return bundle / "train" / "run" / "block_00"


def test_another_training_is_not_gone_on_with(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _half_way(bundle, monkeypatch)
    assert (folder / "training.safetensors").is_file()
    with pytest.raises(BadInput, match="--steps was 5, is 6") as refusal:
        _train(bundle, TrainOptions(steps=6, batch_size=8))
    assert "--restart" in str(refusal.value)
    with pytest.raises(BadInput, match="threads was"):
        _train(bundle, SHORT, threads=torch.get_num_threads() + 1)
    _train(bundle, TrainOptions(steps=6, batch_size=8), restart=True)
    assert Run(folder.parent).finished() == [0]


@pytest.mark.parametrize("what", ["cut off", "of another block"])
def test_a_checkpoint_that_does_not_fit(bundle: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    path = _half_way(bundle, monkeypatch) / "training.safetensors"
    if what == "cut off":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        tensors, metadata = read_safetensors(path)
        from diffusionblocks.converter.mapped import write_tensors

        write_tensors(
            {k: t.clone() for k, t in tensors.items() if "linear" not in k and "0.weight" not in k}, path, metadata
        )
    with pytest.raises(BadInput, match="checkpoint") as refusal:
        _train(bundle, SHORT)
    assert "--restart" in str(refusal.value)


def test_a_loss_that_is_no_number(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names block, update and sigma; the last good checkpoint stays, and training goes on from it."""
    from diffusionblocks.converter import label_target

    honest, calls = label_target.F.cross_entropy, []

    def spoiled(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        losses: torch.Tensor = honest(*args, **kwargs)  # type: ignore[arg-type]
        return losses * torch.where(torch.arange(8) == 3, float("nan"), 1.0) if len(calls) == 4 else losses

    with monkeypatch.context() as patch:
        patch.setattr(label_target.F, "cross_entropy", spoiled)
        with pytest.raises(BadInput, match=r"loss of block 0 is nan at update 3, where sigma is \d"):
            _train(bundle, SHORT)
    run_folder = Run(bundle / "train" / "run")
    assert run_folder.updates(0) == 2
    _train(bundle, SHORT)
    assert run_folder.is_finished(0)


def test_a_write_that_fails_leaves_the_last_checkpoint(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusionblocks.converter import mapped

    path = _half_way(bundle, monkeypatch) / "training.safetensors"
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(mapped.os, "fsync", _full)
        with pytest.raises(OSError, match="No space left"):
            _train(bundle, SHORT)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".part")] == []


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_shares_of_ranks() -> None:
    assert shares_of([0, 1, 2], 2) == (Share((0, 2), (0,)), Share((1,), (1,)))
    assert [s.ranks for s in shares_of([4, 7], 5)] == [(0, 1), (0, 1), (2, 3, 4), (2, 3, 4), (2, 3, 4)]
    assert [s.blocks for s in shares_of([4, 7], 5)] == [(4,), (4,), (7,), (7,), (7,)]


def test_finetune_in_memory_equals_the_bundle(bundle: Path, serial: list[bytes], digits) -> None:
    """The same network trained by the Python interface, on weights in memory."""
    from diffusionblocks.converter.measure import split_rows

    _, network = open_for_training(bundle)
    kept, _ = split_rows(1400, 0.05, 0)
    finetune(network, digits[0][:1400][kept], digits[1][:1400][kept], steps=60, batch_size=16)
    for b, data in enumerate(serial):
        theirs = _read(data, bundle.parent / f"serial_{b}.safetensors")
        assert all(torch.equal(theirs[n], t) for n, t in network.block_state(b).items())
