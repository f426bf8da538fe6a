"""Export: the same bytes every time, a dynamic batch or a refusal, nothing replaced unasked, a manifest that fits its schema."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from diffusionblocks.converter import convert
from diffusionblocks.export import export_bundle
from diffusionblocks.export.graph import Exporter, Piece, to_onnx
from diffusionblocks.export.weights import PAGE, WeightFiles
from diffusionblocks.runtime import BadInput, BundleError, manifest, open_bundle
from torch import nn

SCHEMA = Path(__file__).parents[1] / "docs" / "manifest.schema.json"


def _hashes(folder: Path) -> dict[str, str]:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: record["sha256"] for name, record in files.items() if not name.startswith("train/")}


@pytest.mark.road
def test_exporting_twice_gives_the_same_bytes(trained_mlp, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_bundle(convert(trained_mlp, input_shape=(64,), num_blocks=2), tmp_path / name)
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")


def test_a_batch_that_is_a_constant_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x.reshape(3, 8) * 2,)

    with pytest.raises(BadInput, match="hard-coded batch"):
        to_onnx(Piece(Fixed(), ("stream",), ("stream_out",), (torch.randn(3, 8),)))


def test_a_graph_without_a_kernel_is_refused_at_export() -> None:
    """onnx has a convolution in double precision, onnxruntime has none on a CPU."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(2, 2, 3).double()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.convolution(x),)

    with pytest.raises(BadInput, match=r"does not open it: .*Conv(.|\n)*model.float"):
        to_onnx(Piece(Twice(), ("x",), ("y",), (torch.randn(3, 2, 8, 8).double(),)))


def test_an_output_without_a_batch_is_refused() -> None:
    class Total(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x.sum(),)

    with pytest.raises(BadInput, match="stream_out became a constant"):
        to_onnx(Piece(Total(), ("stream",), ("stream_out",), (torch.randn(3, 8),)))


class Compared(nn.Module):
    """Residual layers on two inputs; every row of one is compared with every row of the other, and a loss is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for mlp in self.mlps:
            x = x + mlp(x)
        logits = x @ y.t()
        return logits, nn.functional.cross_entropy(logits, torch.arange(x.shape[0]))


def test_rows_compared_with_each_other_are_no_classes_and_a_loss_has_no_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Compared().eval()
    network = convert(model, (torch.randn(3, 8), torch.randn(3, 8)), num_blocks=2)
    assert network.target is None
    export_bundle(network, tmp_path / "bundle")
    with open_bundle(tmp_path / "bundle") as bundle:
        assert [spec.shape for spec in bundle.manifest.outputs] == [("batch", "batch"), ()]
        for rows in (1, 5):
            x, y = torch.randn(rows, 8), torch.randn(rows, 8)
            with torch.no_grad():
                logits, loss = model(x, y)
                assert all(map(torch.equal, network.exact((x, y)), (logits, loss)))
            got = bundle.run_all({"x": x.numpy(), "y": y.numpy()})
            assert np.abs(got["output"] - logits.numpy()).max() < 1e-5
            assert abs(got["output_1"] - loss.numpy()) < 1e-5


def test_an_input_that_is_an_output_keeps_its_names() -> None:
    class Same(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    model = to_onnx(Piece(Same(), ("stream",), ("stream_out", "stream_carry"), (torch.randn(3, 8),)))
    assert [o.name for o in model.graph.output] == ["stream_out", "stream_carry"]


def test_a_tensor_of_two_graphs_is_stored_once(tmp_path: Path) -> None:
    linear = nn.Linear(64, 64, bias=False)

    class Tuple(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.linear, self.scale = linear, scale

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.linear(x) * self.scale,)

    export, files = Exporter(), WeightFiles(tmp_path)
    pieces = [Piece(Tuple(s), ("stream",), ("stream_out",), (torch.randn(3, 64),)) for s in (1.5, 2.5)]
    graphs = [export.apart(piece) for piece in pieces]
    files.store(graphs[:1], "w.bin")
    files.store(graphs[1:], "v.bin")
    assert (tmp_path / "w.bin").stat().st_size == 64 * 64 * 4
    assert not (tmp_path / "v.bin").exists()
    tensors = [next(t for t in g.model.graph.initializer if t.external_data) for g in graphs]
    entries = [{e.key: e.value for e in t.external_data} for t in tensors]
    assert entries[0] == entries[1]
    assert int(entries[0]["offset"]) % PAGE == 0


def test_an_existing_folder_is_replaced_only_by_force(trained_mlp, tmp_path: Path) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2)
    out = tmp_path / "o"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(BadInput, match="exists already"):
        export_bundle(network, out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    export_bundle(network, out, force=True)
    assert (out / "manifest.json").is_file()
    assert not (out / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_an_export_that_fails_keeps_what_was_there(trained_mlp, tmp_path: Path) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2)
    out = export_bundle(network, tmp_path / "o")
    before = _hashes(out)

    def fail(folder: Path) -> None:
        raise RuntimeError("stopped while writing")

    with pytest.raises(RuntimeError, match="stopped"):
        export_bundle(network, out, force=True, extra=fail)
    assert _hashes(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


@pytest.mark.parametrize("context", ["frozen", "carry", "stem"])
def test_the_manifest_fits_its_schema(bundles, context: str) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    data = json.loads((bundles[context][1] / "manifest.json").read_text())
    validator.validate(data)
    for damage in ({"format": 2}, {"surprise": 1}, {"context": "all"}, {"blocks": []}, {"exact": "yes"}):
        assert not validator.is_valid({**data, **damage})


def test_a_manifest_without_a_target_fits_its_schema(tmp_path: Path) -> None:
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)]
    out = export_bundle(convert(nn.Sequential(*layers).eval(), input_shape=(5, 16), num_blocks=2), tmp_path / "o")
    data = json.loads((out / "manifest.json").read_text())
    assert data["target"] is None
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))


RECORDS = (
    "GraphRecord",
    "CachedRecord",
    "TensorSpec",
    "BlockRecord",
    "TargetRecord",
    "DenoiserRecord",
    "Decoding",
    "Manifest",
)


@pytest.mark.parametrize("record", RECORDS)
def test_the_schema_names_the_keys_that_are_read(record: str) -> None:
    schema = json.loads(SCHEMA.read_text())
    part = schema if record == "Manifest" else schema["$defs"][record]
    assert set(part["properties"]) == {f.name for f in fields(getattr(manifest, record))}
    assert part["additionalProperties"] is False


def test_small_and_large_weights_survive(tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(400, 8))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x @ self.large.T + (x * self.small).sum(-1, keepdim=True),)

    module, x = Table(), torch.randn(3, 8)
    apart = Exporter().apart(Piece(module, ("stream",), ("stream_out",), (x,)))
    WeightFiles(tmp_path).store([apart], "w.bin")
    onnx.save(apart.model, tmp_path / "g.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {"stream": x.numpy()})[0]
    assert np.allclose(got, module(x)[0].detach().numpy(), atol=1e-5)


class Looped(nn.Module):
    """One residual unit applied six times, or six of them."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        units = [Residual() for _ in range(1 if tied else 6)]
        self.units = nn.ModuleList(units * (6 if tied else 1))
        self.table = nn.Embedding(50, 64)
        self.head = nn.Linear(64, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for unit in self.units:
            x = unit(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(64), nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_several_pieces_are_stored_once_only_where_they_are_the_same(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Looped(tied).eval(), torch.randint(0, 50, (3, 7))
    folder = export_bundle(convert(model, (ids,), num_blocks=3), tmp_path / "b")
    stored = sum(p.stat().st_size for p in folder.glob("*.bin"))
    large = sum(p.numel() * 4 for p in model.parameters() if p.numel() * 4 >= 1024)
    assert large <= stored < 1.3 * large
    with open_bundle(folder) as bundle:
        assert [bool(b.context.shared) for b in bundle.manifest.blocks] == [False, tied, tied]
        for batch in (1, 5):
            some = torch.randint(0, 50, (batch, 7))
            assert np.allclose(bundle.run(some.numpy(), mode="exact"), model(some).detach().numpy(), atol=1e-5)
    (folder / "block_00.bin").write_bytes(b"0" * (folder / "block_00.bin").stat().st_size)
    with open_bundle(folder) as bundle, pytest.raises(BundleError, match=r"block_00\.bin"):
        bundle._sessions.run(
            bundle.manifest.blocks[2 if tied else 0].context, [{"stream": np.zeros((1, 7, 64), np.float32)}]
        )
