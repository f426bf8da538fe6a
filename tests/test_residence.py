"""What is in memory while a bundle runs: structures with weights as inputs, budgets, reading ahead, places on a device, threads, and a thousand calls."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusionblocks.converter import convert
from diffusionblocks.converter.cli import cli
from diffusionblocks.export import export_bundle
from diffusionblocks.export.intermediate import length_of
from diffusionblocks.runtime import (
    BadInput,
    BudgetError,
    BundleError,
    ClosedError,
    DeviceError,
    FallbackError,
    FileError,
    FormatError,
    InputError,
    engine,
    manifest,
    open_bundle,
)
from diffusionblocks.runtime.ahead import ask_for, lies_in_cache
from diffusionblocks.runtime.memory import peak_resident
from diffusionblocks.runtime.parts import bounds
from diffusionblocks.runtime.plan import Load, plan
from torch import nn

MODES = ("exact", "denoise")


@pytest.fixture
def copy(bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["frozen"][1], tmp_path / "copy.dblocks"))


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# Structures


def test_equal_blocks_have_one_structure_and_another_block_has_its_own(bundles) -> None:
    records = manifest.read(bundles["frozen"][1])
    assert len({b.context.structure for b in records.blocks}) == 1
    assert len({b.block.structure for b in records.blocks}) == 1
    assert records.blocks[0].context.structure != records.blocks[0].block.structure
    assert records.stem.structure != records.head.structure


def test_a_structure_holds_no_weights(bundles) -> None:
    folder = bundles["frozen"][1]
    weights = sum(p.stat().st_size for p in folder.glob("block_*.bin"))
    assert all(p.stat().st_size < min(weights / 3, 100_000) for p in folder.glob("structure_*.onnx"))


def test_a_bundle_without_structures_runs_by_a_session_a_block(copy: Path, digits) -> None:
    """As an earlier version wrote them."""
    data = json.loads((copy / "manifest.json").read_text())

    def strip(value: object) -> None:
        if isinstance(value, dict):
            for key in ("structure", "tensors", "row_bytes"):
                value.pop(key, None)
            for item in value.values():
                strip(item)
        elif isinstance(value, list):
            for item in value:
                strip(item)

    with open_bundle(copy) as bundle:
        expected = [bundle.run(digits[0][:3], mode) for mode in MODES]
    strip(data)
    (copy / "manifest.json").write_text(json.dumps(data))
    with open_bundle(copy) as bundle:
        assert all(_relative(bundle.run(digits[0][:3], m), e) < 1e-5 for m, e in zip(MODES, expected, strict=True))
        assert not bundle._sessions._structures


class Half(nn.Module):
    """Residual layers with weights of bfloat16, whole numbers that choose columns, and a scale of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4)).to(torch.bfloat16)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.order = nn.Buffer(torch.randperm(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.scale * layer(x[:, self.order].to(torch.bfloat16)).float()
        return x


def test_weights_of_any_type_are_fed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Half().eval()
    x = torch.randn(3, 16)
    folder = export_bundle(convert(model, (x,), num_blocks=2), tmp_path / "b")
    kinds = {t.dtype for b in manifest.read(folder).blocks for t in b.context.tensors}
    assert kinds == {"bfloat16", "float32", "int64"}
    with open_bundle(folder) as bundle:
        assert _relative(bundle.run(x.numpy(), "exact"), model(x).detach().numpy()) < 1e-2
        assert bundle._sessions._structures


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "object"},
        {"shape": [-1, 4]},
        {"offset": -64},
        {"offset": 1 << 40},
        {"shape": [1 << 40]},
        {"file": "head.bin"},
        {"file": None},
    ],
)
def test_a_weight_that_lies_nowhere_is_refused_before_it_is_read(copy: Path, change: dict) -> None:
    data = json.loads((copy / "manifest.json").read_text())
    data["blocks"][1]["context"]["tensors"][0].update(change)
    (copy / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="where it does not lie"):
        open_bundle(copy)


# Budgets


def test_a_plan_keeps_all_or_two_or_one() -> None:
    loads = [Load(name, 100, 10) for name in "abcd"]
    found = [plan(loads, budget) for budget in (None, 400 + 10, 400 + 35, 409, 210, 209, 110)]
    assert [p.resident for p in found] == ["one", "all", "all", "two", "two", "one", "one"]
    assert [p.rows for p in found] == [None, 1, 3, 20, 1, 10, 1]
    assert [p.prefetch for p in found] == [True, False, False, True, True, False, False]
    assert plan(loads, 110, prefetch=True).prefetch
    assert not plan(loads, None, prefetch=False).prefetch
    assert plan(loads, 110, split=False).rows is None
    beside = [plan(loads, budget, together=30) for budget in (139, 140, 240)]
    assert [(p.resident, p.weights, p.rows, p.limit) for p in beside] == [
        ("one", 100, 3, 100),
        ("one", 130, 1, 130),
        ("two", 230, 1, 230),
    ]
    with pytest.raises(BudgetError, match="--memory-budget 110"):
        plan(loads, 109)


def test_a_batch_is_divided_evenly() -> None:
    assert bounds(7, None) == [(0, 7)]
    assert bounds(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert bounds(6, 3) == [(0, 3), (3, 6)]
    assert bounds(2, 5) == [(0, 2)]


def test_lengths_of_a_graph_are_computed_for_one_row() -> None:
    texts = ("batch", "12*batch", "(batch*7)//2", "197", "u0 + 3", "batch**9", "__import__('os')", "")
    assert [length_of(text) for text in texts] == [1, 12, 3, 197, 4, 1, 1, 1]


def test_every_budget_gives_the_same(bundles, digits) -> None:
    """One block or two: the same bits. All: the same numbers, since ONNX Runtime then rearranges the weights."""
    folder, x = bundles["frozen"][1], digits[0][:9]
    records = manifest.read(folder)
    with open_bundle(folder) as bundle:
        expected = [bundle.run(x, mode) for mode in MODES]
        assert bundle.last_plan.resident == "one"
        most = max(bundle._sessions.size(g) + 3 * g.row_bytes for g in records.graphs())
    assert all(g.row_bytes for g in (records.stem, records.head, *(b.block for b in records.blocks)))
    seen = []
    for budget in (most, most + most // 3, 2 * most, 1 << 24):
        with open_bundle(folder, memory_budget=budget) as bundle:
            for mode, want in zip(MODES, expected, strict=True):
                assert _relative(bundle.run(x, mode), want) < 1e-5
                seen.append((bundle.last_plan.resident, bundle.last_plan.rows))
                assert bundle.peak_weight_bytes <= budget
    assert {kind for kind, _ in seen} == {"one", "two", "all"}
    assert any(rows < 9 for _, rows in seen)


def test_what_stays_in_memory_is_opened_once(bundles, digits) -> None:
    folder, x = bundles["frozen"][1], digits[0][:3]
    records = manifest.read(folder)
    for budget, again in ((1 << 24, 0), (None, None)):
        opened: list[str] = []
        with open_bundle(folder, memory_budget=budget) as bundle:
            real = bundle._sessions._opening
            bundle._sessions._opening = lambda record, real=real, opened=opened: (
                opened.append(record.file),
                real(record),
            )[1]
            bundle.run(x, "exact")
            bundle.run(x, "denoise")
            first = len(opened)
            bundle.run(x, "exact")
            bundle.run(x, "denoise")
            assert len(opened) - first == (first if again is None else again)
    assert first > len(records.blocks)


def test_reading_ahead_and_reading_instead_of_mapping_change_no_bit(bundles, digits) -> None:
    folder, x = bundles["frozen"][1], digits[0][:3]
    results = []
    for options in ({}, {"prefetch": False}, {"mapped": False}, {"mapped": False, "prefetch": True}, {"threads": 1}):
        with open_bundle(folder, **options) as bundle:
            results.append([bundle.run(x, mode) for mode in (*MODES, *MODES)])
    for result in results:
        assert all(np.array_equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system cannot be asked what it has in memory")
def test_what_the_system_has_in_memory_is_not_read_ahead(copy: Path, digits) -> None:
    with open_bundle(copy) as bundle:
        assert not lies_in_cache(copy / "block_01.bin")  # not hashed yet
        bundle.run(digits[0][:2], "exact")
        assert lies_in_cache(copy / "block_01.bin")
        begun = []
        start = bundle._sessions._ahead.start
        bundle._sessions._ahead.start = lambda record: (begun.append(record.file), start(record))
        bundle.run(digits[0][:2], "exact")
        assert begun == []
        file = os.open(copy / "block_01.bin", os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
        if not lies_in_cache(copy / "block_01.bin"):  # a file system in memory keeps it
            bundle.run(digits[0][:2], "exact")
            assert set(begun) == {"context_01.onnx"}


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system cannot be asked what it has in memory")
def test_all_of_a_file_is_read_ahead(tmp_path: Path) -> None:
    """Asked for all at once, Linux reads as much as its window for reading ahead."""
    path, count = tmp_path / "large.bin", 64 << 20
    path.write_bytes(bytes(count))
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if _in_memory(file.fileno(), count):
            pytest.skip("a file system in memory")
        ask_for(path)
        for seconds in (0.3, 3.0, 10.0):  # to ask has the system read on, so not often
            time.sleep(seconds)
            if _in_memory(file.fileno(), count):
                break
        else:
            pytest.fail("a part of the file was not read")


def _in_memory(file: int, count: int) -> bool:
    """Whether the system has a byte of every MiB of a file in memory."""
    try:
        return all(os.preadv(file, [bytearray(1)], at, os.RWF_NOWAIT) == 1 for at in range(0, count, 1 << 20))
    except BlockingIOError:
        return False


# A device's places, tried on the CPU


@pytest.mark.parametrize("context", ["frozen", "carry", "stem"])
def test_values_that_stay_on_the_device_change_nothing(bundles, digits, context: str, monkeypatch) -> None:
    folder, x = bundles[context][1], digits[0][:3]
    with open_bundle(folder) as bundle:
        expected = [bundle.run(x, mode) for mode in MODES]
    make = engine.Engine
    monkeypatch.setattr("diffusionblocks.runtime.bundle.Engine", lambda *a, **k: make(*a, **k, bound=True))
    for prefetch in (False, True):
        with open_bundle(folder, prefetch=prefetch) as bundle:
            for _ in range(3):
                assert all(np.array_equal(bundle.run(x, m), e) for m, e in zip(MODES, expected, strict=True))
            structures = {g.structure for g in bundle.manifest.graphs()}
            assert bundle._sessions._slots.made <= 2 * len(structures)


def test_onnxruntime_that_falls_back_to_the_cpu_is_an_error(bundles, digits, monkeypatch) -> None:
    real = engine.ort.InferenceSession
    monkeypatch.setattr(engine.ort, "get_available_providers", lambda: [engine.CUDA, engine.CPU])
    monkeypatch.setattr(
        engine.ort, "InferenceSession", lambda path, options, **_: real(path, options, providers=[engine.CPU])
    )
    with (
        open_bundle(bundles["frozen"][1], device="cuda") as bundle,
        pytest.raises(FallbackError, match="fell back to CPU"),
    ):
        bundle.run(digits[0][:1], "exact")


def test_two_onnxruntimes_in_one_environment_are_told(monkeypatch) -> None:
    class Distribution:
        def __init__(self, name: str) -> None:
            self.metadata = {"Name": name}

    found = [Distribution(n) for n in ("numpy", "onnxruntime", "onnxruntime-gpu")]
    monkeypatch.setattr(engine.importlib.metadata, "distributions", lambda: found)
    monkeypatch.setattr(engine.ort, "get_available_providers", lambda: [engine.CPU])
    with pytest.raises(DeviceError, match=r"onnxruntime, onnxruntime-gpu\)[\s\S]*uninstall both"):
        engine.Engine("cuda")


# Sampling


def test_until_stops_where_every_row_is_sure(bundles, digits) -> None:
    x = digits[0][1400:1420]
    seen: list[np.ndarray] = []
    with open_bundle(bundles["frozen"][1]) as bundle:
        bundle.run(x, "denoise", steps=9, callback=lambda *a: seen.append(a[3]))
        sure = [np.exp(p).max(-1) for p in seen]
        whole = bundle.run(x, "denoise", steps=9)
        p = float(min(np.max(s) for s in sure)) * 0.999
        rows = [int(np.argmax(s >= p)) for s in np.stack(sure).T]
        got = bundle.run(x, until=p, steps=9)
        last = max(k if sure[k][i] >= p else 8 for i, k in enumerate(rows))
        assert bundle.last_steps == last + 1
        for i, k in enumerate(rows):
            k = k if sure[k][i] >= p else 8
            assert np.array_equal(got[i], seen[k][i])
        easy = bundle.run(x, until=0.01, steps=9)
        assert bundle.last_steps == 1
        assert np.array_equal(easy, seen[0])
        assert np.array_equal(bundle.run(x, until=1.0, steps=9), whole)
        assert bundle.last_steps == 9
        mean = bundle.run(x, until=0.01, steps=9, read="mean")
        assert np.allclose(mean, seen[0], atol=1e-6)


def test_draws_are_averaged_in_one_pass_of_the_blocks(bundles, digits) -> None:
    x = digits[0][:4]
    with open_bundle(bundles["frozen"][1]) as bundle:
        shapes: list[tuple[int, ...]] = []
        got = bundle.run(x, start="noise", average=3, seed=5, callback=lambda *a: shapes.append(a[3].shape))
        opened = []
        real = bundle._sessions._opening
        bundle._sessions._opening = lambda record: (opened.append(record.file), real(record))[1]
        assert np.array_equal(bundle.run(x, start="noise", average=3, seed=5), got)
    assert shapes == [(4, 10)] * 3
    assert opened.count("block_01.onnx") == 1


@pytest.mark.parametrize("options", [{"until": 0.0}, {"until": 1.5}])
def test_no_probability_is_refused(bundles, digits, options) -> None:
    with (
        open_bundle(bundles["frozen"][1]) as bundle,
        pytest.raises(BadInput, match="probability"),
    ):
        bundle.run(digits[0][:1], "denoise", **options)


# Serving


def test_several_threads_get_what_one_gets(bundles, digits) -> None:
    x = digits[0][:16]
    with open_bundle(bundles["frozen"][1]) as bundle:
        expected = [bundle.run(x[i : i + 2], "denoise") for i in range(0, 16, 2)]
        got: list[np.ndarray | None] = [None] * 8

        def work(i: int) -> None:
            got[i] = bundle.run(x[2 * i : 2 * i + 2], "denoise")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_thousand_calls_grow_nothing_and_closing_leaves_no_thread(copy: Path, digits) -> None:
    x = digits[0][:4]
    before = threading.active_count()
    with open_bundle(copy) as bundle:
        first = bundle.run(x, "denoise")
        files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        for _ in range(100):
            bundle.run(x, "exact")
        resident = _resident()
        for k in range(900):
            bundle.run(x, "denoise" if k % 2 else "exact")
        assert _resident() - resident < 4 << 20
        assert np.array_equal(bundle.run(x, "denoise"), first)
        assert not files or len(os.listdir("/proc/self/fd")) <= files
    assert threading.active_count() == before
    with pytest.raises(ClosedError, match="was closed"):
        bundle.run(x, "exact")
    bundle.close()


def _resident() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


@pytest.mark.parametrize("mapped", [True, False])
def test_weights_that_change_between_two_calls_are_refused(copy: Path, digits, mapped: bool) -> None:
    x, weights = digits[0][:2], copy / "block_01.bin"
    data = weights.read_bytes()
    before = threading.active_count()
    with open_bundle(copy, mapped=mapped) as bundle:
        expected = bundle.run(x, "exact")
        for content, message in (
            (data[:-10], "bytes; the manifest says"),
            (data[:-1] + b"\x01", "altered"),
            (None, "missing"),
        ):
            weights.unlink(missing_ok=True)
            if content is not None:
                weights.write_bytes(content)
            with pytest.raises(FileError, match=rf"block_01.bin.*{message}"):
                bundle.run(x, "exact")
        weights.write_bytes(data)
        assert np.array_equal(bundle.run(x, "exact"), expected)
    assert threading.active_count() == before


def test_errors_have_a_class_each(copy: Path, digits) -> None:
    x = digits[0][:2]
    with open_bundle(copy) as bundle:
        for wrong in (x[:, :5], {"y": x}, x.astype(np.int64), np.full_like(x, np.nan)):
            with pytest.raises(InputError):
                bundle.run(wrong, "exact")
    with pytest.raises(BudgetError):
        open_bundle(copy, memory_budget="1KiB")
    with pytest.raises(DeviceError):
        open_bundle(copy, device="tpu")
    data = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**data, "format": 2}))
    with pytest.raises(FormatError, match="Upgrade diffusionblocks"):
        open_bundle(copy)


# The command


def test_the_command_prints_its_plan_and_what_was_used(bundles, digits, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", digits[0][:5])
    command = [
        "run",
        str(bundles["frozen"][1]),
        "--input",
        str(tmp_path / "x.npy"),
        "--output",
        str(tmp_path / "y.npy"),
    ]
    for options, text in (
        (["--mode", "exact"], "Plan: one block in memory"),
        (["--mode", "exact", "--memory-budget", "64MiB"], "Plan: all blocks stay in memory"),
        (["--mode", "exact", "--no-mmap", "--no-prefetch", "--threads", "1"], "Plan: one block in memory: "),
        (["--until", "0.01", "--steps", "6"], "5 rows in 1 steps"),
    ):
        done = CliRunner().invoke(cli, [*command, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert text in done.stderr
        assert "Peak of resident memory" in done.stderr or peak_resident() is None
    done = CliRunner().invoke(cli, [*command, "--until", "1.5"])
    assert done.exit_code == 2
