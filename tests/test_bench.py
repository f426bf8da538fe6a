"""``dbconvert bench``: rows that agree, rows that are missing and say why, and no process left behind; the whole network as one graph."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusionblocks.converter import bench, cli, convert
from diffusionblocks.converter.bench import Request, compare, difference, random_inputs
from diffusionblocks.converter.bench_cold import Cold
from diffusionblocks.export import export_bundle, whole
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime import open_bundle
from diffusionblocks.runtime.errors import BadInput, CheckFailed
from diffusionblocks.runtime.manifest import TensorSpec
from torch import nn

DIM = 8
OWN = ("whole", "block", "resident", "sessions")
KEYS = ["row", "batch", "seconds", "ratio", "first_seconds", "peak_bytes", "difference", "cold_seconds", "missing"]


class Reader(nn.Module):
    """A residual unit that reads a side value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(DIM), nn.Linear(2 * DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, h: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return h + self.outer(torch.tanh(self.inner(torch.cat([self.norm(h), memory], -1))))


class TwoInputs(nn.Module):
    """``units`` different units, or one that is applied again and again."""

    def __init__(self, *, looped: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, DIM), nn.Linear(5, DIM), nn.Linear(DIM, 7)
        self.units = nn.ModuleList([Reader()] * 4 if looped else [Reader() for _ in range(4)])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h, memory = self.first(x), torch.tanh(self.second(y))
        for unit in self.units:
            h = unit(h, memory)
        return self.head(h)


EXAMPLE = {"x": torch.randn(3, 6), "y": torch.randn(3, 5)}


def made(folder: Path, *, looped: bool = False) -> Path:
    """The bundle of a network with side values."""
    torch.manual_seed(0)
    export_bundle(convert(TwoInputs(looped=looped).eval(), EXAMPLE, num_blocks=4), folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("units") / "model.dblocks")


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("looped") / "model.dblocks", looped=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network as an exported program."""
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=64)
    sizes = {name: {0: batch} for name in EXAMPLE}
    path = tmp_path_factory.mktemp("program") / "model.pt"
    torch.export.save(torch.export.export(TwoInputs().eval(), (), EXAMPLE, dynamic_shapes=sizes, strict=False), path)
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[bench.Worker]:
    """Every process that is started."""
    made: list[bench.Worker] = []

    class Noted(bench.Worker):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(bench, "Worker", Noted)
    return made


def command(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *map(str, args)])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def ended(workers: list[bench.Worker]) -> bool:
    return bool(workers) and all(w._process.poll() is not None for w in workers)


def opened(folder: Path, model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.road
def test_rows_agree(bundle, program: Path, capsys, started) -> None:
    """All rows but accelerate's, as JSON."""
    folder = bundle
    before = sorted(p.name for p in folder.rglob("*"))
    options = ["--batch", 2, "--rounds", 2, "--threads", 1, "--rows", ",".join((*OWN, "torch")), "--json"]
    code, out, err = command(capsys, folder, "--model", program, *options)
    assert code == 0, err
    data = json.loads(out)
    assert list(data) == ["bundle", "machine", "versions", "rounds", "threads", "rows", "read_seconds", "notes"]
    assert data["bundle"] == str(folder)
    assert set(data["machine"]) == {"cpu", "cores", "memory"}
    assert {"python", "onnxruntime", "numpy"} <= set(data["versions"])
    assert [row["row"] for row in data["rows"]] == [*OWN, "torch"]
    for row in data["rows"]:
        assert list(row) == KEYS
        assert row["missing"] is None
        assert row["cold_seconds"] is None
        assert row["difference"] < 1e-5
        assert row["seconds"] > 0
        assert row["first_seconds"] > 0
    assert data["rows"][0]["ratio"] == 1.0
    assert ended(started)
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_a_network_whose_block_is_applied_again(looped: Path) -> None:
    result = compare(Request(looped, rows=OWN, batches=(3,), rounds=1))
    assert [row.missing for row in result.rows] == [None] * 4
    assert all(row.difference is not None and row.difference < 1e-5 for row in result.rows)


@pytest.mark.parametrize("name", ["bundle", "looped"])
def test_whole_graph_is_the_original(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(name), folder)
    manifest = manifests.read(folder)
    model = whole.whole_graph(folder, manifest)
    onnx.save(model, folder / "whole.onnx")
    onnx.checker.check_model(str(folder / "whole.onnx"), full_check=True)
    assert [v.name for v in model.graph.input] == ["x", "y"]
    assert [v.name for v in model.graph.output] == [spec.name for spec in manifest.outputs]
    places = [p for t in model.graph.initializer if (p := whole._place(t))]
    assert len(places) == len(set(places)) == (12 if name == "looped" else 30)
    inputs = random_inputs(manifest.inputs, 5)
    with open_bundle(folder) as opened_bundle:
        expected = opened_bundle.run(inputs, mode="exact")
    found = difference(expected, opened(folder, model).run(None, inputs)[0])
    assert found is not None
    assert found < 1e-5


def test_nested_graphs_are_renamed() -> None:
    text = """<ir_version: 8, opset_import: ["": 18]>
    g (bool c, float[N] stream) => (float[N] o) {
      t = Neg (stream)
      o = If (c) <then_branch = a () => (float[N] u) { u = Add (t, stream) },
                  else_branch = b () => (float[N] u) { v = Neg (t)  u = Add (v, stream) }>
    }"""
    model = onnx.parser.parse_model(text)
    names = {"stream": "s", "c": "c", "o": "o"}
    made = {name for node in whole._nodes(model.graph) for name in node.output} - {"o"}
    whole._rename(model.graph, names | {name: f"part1/{name}" for name in made}, "part1/")
    model.graph.input[1].name = "s"
    onnx.checker.check_model(model, full_check=True)
    session = opened(Path(), model)
    s = np.arange(3, dtype=np.float32)
    assert np.array_equal(session.run(None, {"c": np.array(False), "s": s})[0], 2 * s)


def test_cold_runs(bundle) -> None:
    folder = bundle
    result = compare(Request(folder, rows=("whole", "block"), batches=(1,), rounds=1, cold=True))
    measured = [row.cold_seconds is not None for row in result.rows] + [result.read_seconds is not None]
    assert all(measured) or (not any(measured) and result.notes)


def test_dropping_without_effect_is_said(bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle
    monkeypatch.setattr("diffusionblocks.converter.bench_cold.cached_share", lambda path: 1.0)
    cold = Cold(folder, manifests.read(folder))
    assert not cold.drop()
    assert "had no effect" in cold.notes[0]
    monkeypatch.delattr(os, "posix_fadvise")
    cold = Cold(folder, manifests.read(folder))
    assert not cold.possible
    assert "cannot drop" in cold.notes[0]


def test_a_missing_row_says_why(bundle, capsys) -> None:
    """In the table; the others are there."""
    code, out, err = command(capsys, bundle, "--batch", 1, "--rounds", 1, "--rows", "block,torch")
    assert (code, out) == (0, "")
    assert "torch: missing: give --model" in err
    assert "are to block" in err


def test_a_model_that_does_not_load(bundle, capsys) -> None:
    options = ["--batch", 1, "--rounds", 1, "--rows", "block", "--rows", "torch", "--json"]
    code, out, _ = command(capsys, bundle, "--model", "nowhere.pt", *options)
    assert code == 0
    assert [row["missing"] for row in json.loads(out)["rows"]] == [None, "nowhere.pt does not exist."]


def test_no_row_at_all(bundle, started) -> None:
    request = Request(bundle, rows=("block",), batches=(1,), timeout=0.01)
    with pytest.raises(CheckFailed, match="no answer in"):
        compare(request)
    assert ended(started)


def test_a_process_that_is_killed(bundle, started) -> None:
    def kill(text: str) -> None:
        if "sessions, round 1" in text:
            started[1]._process.send_signal(signal.SIGTERM)
            started[1]._process.wait()

    request = Request(bundle, rows=("block", "sessions"), batches=(1,), rounds=2)
    block, sessions = compare(request, kill).rows
    assert block.missing is None
    assert sessions.missing is not None
    assert "ended with code -15" in sessions.missing
    assert sessions.first_seconds is None


def test_an_interrupt_leaves_no_process(bundle, started) -> None:
    def interrupt(text: str) -> None:
        if "round" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(Request(bundle, rows=("block", "sessions"), batches=(1,)), interrupt)
    assert len(started) == 2
    assert ended(started)


def test_inputs_of_ones_own(bundle, tmp_path: Path, capsys) -> None:
    np.savez(tmp_path / "x.npz", **{name: value.numpy() for name, value in EXAMPLE.items()})
    options = ["--rows", "block", "--batch", 4, "--rounds", 1, "--json", "--input"]
    code, out, _ = command(capsys, bundle, *options, tmp_path / "x.npz")
    assert code == 0
    assert json.loads(out)["rows"][0]["missing"] is None
    np.save(tmp_path / "x.npy", EXAMPLE["x"].numpy())
    code, _, err = command(capsys, bundle, *options, tmp_path / "x.npy")
    assert code == 2
    assert "this network takes x, y" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "whole,bloc"], "There is no row 'bloc'"),
        (["--batch", "0"], "0 is not in the range"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--plot", "no/where.png"], "in a folder that exists"),
        (["--plot", "chart.pdf"], "is no .png"),
    ],
)
def test_wrong_options(bundle, capsys, options: list[str], message: str) -> None:
    code, out, err = command(capsys, bundle, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_no_original(bundle, tmp_path: Path, capsys) -> None:
    manifest = dataclasses.replace(manifests.read(bundle), exact=False)
    manifests.write(manifest, tmp_path)
    code, _, err = command(capsys, tmp_path)
    assert code == 2
    assert "holds no original network" in err
    with pytest.raises(BadInput, match="does not hold the original"):
        whole.whole_graph(tmp_path, manifest)


def test_no_bundle(tmp_path: Path, capsys) -> None:
    code, _, err = command(capsys, tmp_path / "nothing")
    assert code == 2
    assert err.count("Error:") == 1


def test_random_inputs() -> None:
    specs = [TensorSpec("ids", "int64", ("batch", 9)), TensorSpec("attention_mask", "int64", ("batch", 9))]
    ids, mask = random_inputs(specs, 2).values()
    assert set(ids.flat) == {0, 1}
    assert mask.shape == (2, 9)
    assert mask.all()
    with pytest.raises(BadInput, match="No random values"):
        random_inputs([TensorSpec("x", "bfloat16", ("batch", 2))], 1)


def test_difference() -> None:
    a = np.array([1.0, -4.0, np.nan])
    assert difference(a, a + np.array([0, 1, 0])) == 0.25
    assert difference(a, a[:2]) is None
    assert difference(a, np.zeros(3)) is None


def test_plot(bundle, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    options = ["--rows", "block", "--batch", 1, "--batch", 2, "--rounds", 1, "--plot", tmp_path / "chart.png"]
    assert command(capsys, bundle, *options)[0] == 0
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = command(capsys, bundle, "--plot", tmp_path / "chart.png")
    assert code == 2
    assert "pip install matplotlib" in err


def test_help_has_an_example(capsys) -> None:
    code, out, _ = command(capsys, "--help")
    assert code == 0
    assert "Example" in out
