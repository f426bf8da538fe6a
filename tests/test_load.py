"""MODEL is told by its content; nothing in a file is executed before it is checked."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from diffusionblocks.converter import architectures
from diffusionblocks.converter.load import load_model
from diffusionblocks.runtime.errors import BadInput
from torch import nn
from torch.export import ExportedProgram

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 32}
NAME = "vit_tiny_patch16_224"


class Evil:
    """Unpickling it makes the file ``target``."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=7).eval()


def test_an_exported_program_under_any_name(program_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    path.write_bytes(program_file.read_bytes())
    source = load_model(str(path))
    assert source.kind == "exported"
    assert isinstance(source.model, ExportedProgram)


def test_pickled_modules_of_known_packages(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    vit = timm.create_model(NAME, **SMALL)
    for model, shape in ((encoder, (2, 4, 16)), (vit, (2, 3, 32, 32))):
        path = tmp_path / "model.pt"
        torch.save(model.eval(), path)
        source = load_model(str(path))
        x = torch.randn(shape)
        assert source.kind == "module"
        with torch.no_grad():
            assert torch.equal(source.model(x), model(x))


def test_files_of_before_torch_1_6(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(3, 2)), tmp_path / "model.pt"
    torch.save(model, path, _use_new_zipfile_serialization=False)
    with pytest.raises(BadInput, match=r"before 1\.6[\s\S]*--allow-pickle"):
        load_model(str(path))
    assert load_model(str(path), allow_pickle=True).kind == "module"
    torch.save(resnet().state_dict(), path, _use_new_zipfile_serialization=False)
    assert load_model(str(path), arch="timm:resnet18").kind == "weights"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"model": {f"module.{k}": v for k, v in w.items()}},
        lambda w: {"model_state_dict": {f"model.{k}": v for k, v in w.items()}},
    ],
    ids=["plain", "state_dict", "model+module.", "model_state_dict+model."],
)
def test_weights_with_arch(tmp_path: Path, wrap) -> None:
    model = resnet()
    torch.save(wrap(model.state_dict()), tmp_path / "w.pt")
    loaded = load_model(str(tmp_path / "w.pt"), arch="timm:resnet18").model
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("where", ["arch", "args"])
def test_a_checkpoint_that_names_its_architecture(tmp_path: Path, where: str) -> None:
    model = resnet()
    named = {"arch": "resnet18"} if where == "arch" else {"args": argparse.Namespace(model="resnet18", lr=0.1)}
    torch.save({"state_dict": model.state_dict(), **named}, tmp_path / "last.pth.tar")
    source = load_model(str(tmp_path / "last.pth.tar"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(source.model(x), model(x))


def test_safetensors_with_arch_and_with_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text("from torch import nn\ndef small():\n    return nn.Linear(3, 2)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = nn.Linear(3, 2)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.bin")
    loaded = load_model(str(tmp_path / "w.bin"), arch="my_models:small").model
    assert torch.equal(loaded.weight, model.weight)


def test_weights_that_do_not_fit_name_the_keys(tmp_path: Path) -> None:
    weights = resnet().state_dict()
    weights["surprise.weight"] = weights.pop("conv1.weight")
    weights["bn1.weight"] = torch.ones(3)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(BadInput) as error:
        load_model(str(tmp_path / "w.pt"), arch="timm:resnet18")
    for text in ("missing 1: conv1.weight", "unexpected 1: surprise.weight", "misshapen 1: bn1.weight (3,) for (64,)"):
        assert text in str(error.value)


def test_weights_without_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "installed", list)
    torch.save(resnet().state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadInput, match="--arch timm:NAME"):
        load_model(str(tmp_path / "w.pt"))


def _onnx(path: Path) -> None:
    path.write_bytes(b"\x08\x0a\x12\x07pytorch" + b"\x00" * 64)


def _script(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/code/__torch__.py", "x")
        archive.writestr("m/data.pkl", b"\x80\x02N.")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b""), "an empty file"),
        (lambda p: p.write_text("hello"), "a text file"),
        (lambda p: p.write_text("<!DOCTYPE html><html>"), "an HTML page"),
        (lambda p: p.write_bytes(b"\x93\xff\xfe\x00" * 30), "of an unknown kind"),
        (lambda p: p.write_bytes(b"PK\x03\x04cut"), "a truncated zip archive"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: None, "does not exist"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "a zip archive without a model"),
        (_onnx, "an ONNX file"),
        (_script, "a TorchScript archive"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path: Path, make, message: str) -> None:
    path = tmp_path / "model.pt"
    make(path)
    with pytest.raises(BadInput, match=message):
        load_model(str(path))


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    torch.save(resnet().state_dict(), tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput):
        load_model(str(tmp_path / "w.pt"), arch="timm:resnet18")


def test_a_foreign_class_is_named_with_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "foreign_models.py"
    package.write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.layer = nn.Linear(2, 2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import foreign_models  # type: ignore[import-not-found]

    path = tmp_path / "model.pt"
    torch.save(foreign_models.Net(), path)
    with pytest.raises(BadInput) as error:
        load_model(str(path))
    for text in ("foreign_models.Net", "--trust foreign_models", "--allow-pickle", "torch.export.save", "--arch"):
        assert text in str(error.value)
    assert load_model(str(path), trust=["foreign_models"]).kind == "module"
    assert load_model(str(path), allow_pickle=True).kind == "module"


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_not_executed(tmp_path: Path, legacy: bool) -> None:
    target = tmp_path / "executed"
    path = tmp_path / "model.pt"
    torch.save({"state_dict": Evil(target)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadInput, match=r"mkdir[\s\S]*Nothing in it was executed"):
        load_model(str(path))
    assert not target.exists()


def _rewrite(source: Path, target: Path, change) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))


def test_a_pickle_hidden_in_an_exported_program_is_not_executed(program_file: Path, tmp_path: Path) -> None:
    buffer, target = io.BytesIO(), tmp_path / "executed"
    torch.save(Evil(target), buffer)
    path = tmp_path / "model.pt2"
    _rewrite(program_file, path, lambda name, data: buffer.getvalue() if "sample_inputs" in name else data)
    with pytest.raises(BadInput, match=r"is refused"):
        load_model(str(path))
    assert not target.exists()


def test_a_raw_pickle_in_an_exported_program_is_not_executed(program_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    path = tmp_path / "model.pt2"
    _rewrite(program_file, path, lambda name, data: pickle.dumps(Evil(target)) if "sample_inputs" in name else data)
    with pytest.raises(BadInput, match=r"is refused"):
        load_model(str(path))
    assert not target.exists()


def test_weights_that_begin_like_a_pickle_are_read(program_file: Path, tmp_path: Path) -> None:
    """One tensor in 256 does; the archive says which members are plain numbers."""
    path, hits = tmp_path / "model.pt2", []

    def change(name: str, data: bytes) -> bytes:
        if name.endswith("/weight_0"):
            hits.append(name)
            return b"\x80\x05\x93\x00" + data[4:]
        return data

    _rewrite(program_file, path, change)
    assert len(hits) == 1
    assert load_model(str(path)).kind == "exported"


@pytest.mark.parametrize("what", ["said to be one", "said to be both", "twice", "an object", "another name"])
def test_a_weight_that_is_a_pickle_is_not_executed(program_file: Path, tmp_path: Path, what: str) -> None:
    path, target = tmp_path / "model.pt2", tmp_path / "executed"
    evil = pickle.dumps(Evil(target))

    def change(name: str, data: bytes) -> bytes:
        if name.endswith("/weight_0"):
            return evil
        if name.endswith("weights_config.json"):
            entries = json.loads(data)["config"]
            first = next(key for key, entry in entries.items() if entry["path_name"] == "weight_0")
            if what == "said to be one":
                entries[first]["use_pickle"] = True
            elif what == "said to be both":
                entries["other"] = entries[first] | {"use_pickle": True}
            elif what == "another name":
                entries[first]["path_name"] = "./weight_0"
            elif what == "an object":
                entries[first] = entries[first] | {"path_name": "custom_obj_0"}
            return json.dumps({"config": entries}).encode()
        return data

    _rewrite(program_file, path, change)
    if what == "twice":
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
            warnings.simplefilter("ignore")
            archive.writestr(next(n for n in archive.namelist() if n.endswith("/weight_0")), evil)
    with pytest.raises(BadInput, match="is refused"):
        load_model(str(path))
    assert not target.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"torch.ops.aten.linear.default", b"os.system(1)", "operator"),
        (b"torch.ops.aten.linear.default", b"torch.ops.aten.from_file.default", "operator"),
    ],
)
def test_expressions_and_operators_of_an_exported_program(
    program_file: Path, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    path, hits = tmp_path / "model.pt2", []

    def change(name: str, data: bytes) -> bytes:
        if name.endswith(".json") and old in data:
            hits.append(name)
            return data.replace(old, new)
        return data

    _rewrite(program_file, path, change)
    assert hits
    with pytest.raises(BadInput, match=message):
        load_model(str(path))


def test_a_symbolic_expression_that_is_code_is_refused(program_file: Path, tmp_path: Path) -> None:
    path, target, hits = tmp_path / "model.pt2", tmp_path / "executed", []
    code = f"__import__('os').mkdir('{target}')"

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith(".json"):
            return data
        text, count = re.subn(r'("expr_str"\s*:\s*)"[^"]*"', lambda m: f'{m[1]}"{code}"', data.decode())
        hits.append(count)
        return text.encode()

    _rewrite(program_file, path, change)
    assert sum(hits) > 0
    with pytest.raises(BadInput, match="symbolic expression"):
        load_model(str(path))
    assert not target.exists()


def test_an_archive_of_several_disks_is_refused(tmp_path: Path) -> None:
    """zipfile raises on it (of some versions) where it is asked whether a file is an archive."""
    path = tmp_path / "model.pt"
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 2)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, 0, 0, 0)
    path.write_bytes(b"x" * 100 + locator + end)
    with pytest.raises(BadInput, match=r"model\.pt is"):
        load_model(str(path))


def test_a_member_whose_own_name_is_no_text_is_refused(program_file: Path, tmp_path: Path) -> None:
    """Each member says its name twice; this one where its bytes are, as UTF-8 that it is not."""
    data = bytearray(program_file.read_bytes())
    members = [i for i in zipfile.ZipFile(program_file).infolist() if i.filename.endswith("model.json")]
    at, length = members[0].header_offset, len(members[0].filename)
    data[at + 7] |= 8  # the flag of a name in UTF-8
    data[at + 30 : at + 30 + length] = b"\xff" * length
    (tmp_path / "model.pt2").write_bytes(data)
    with pytest.raises(BadInput, match="damaged archive"):
        load_model(str(tmp_path / "model.pt2"))


def test_a_module_without_its_parameters_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    del model.__dict__["_parameters"]
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(BadInput, match="damaged Sequential"):
        load_model(str(tmp_path / "model.pt"))


class ByGetattr:
    """Pickled as ``getattr(owner, name)``, as Python before 3.11.4 pickles members of enumerations."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, (self.owner, self.name)


def test_members_of_enumerations_however_they_are_pickled(tmp_path: Path) -> None:
    from timm.layers import Format

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.output_fmt = ByGetattr(Format, "NHWC")
    torch.save(model, tmp_path / "model.pt")
    assert load_model(str(tmp_path / "model.pt")).model.output_fmt is Format.NHWC


@pytest.mark.parametrize("name", ["mro", "__init__", "__subclasses__", "none"])
def test_getattr_reaches_nothing_else(tmp_path: Path, name: str) -> None:
    from timm.layers import Format

    for owner in (Format, torch.nn.Linear):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        model.output_fmt = ByGetattr(owner, name)
        torch.save(model, tmp_path / "model.pt")
        with pytest.raises(BadInput, match=r"asks for the attribute"):
            load_model(str(tmp_path / "model.pt"))
