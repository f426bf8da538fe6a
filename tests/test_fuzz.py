"""Damaged and hostile inputs: every reader works or refuses, within a second and bounded memory, and writes nowhere else. What the long run (benchmarks/fuzz.py) found has a test each."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusionblocks.converter.cli import main
from diffusionblocks.converter.data import read_arrays
from diffusionblocks.converter.load import load_model
from diffusionblocks.converter.stored import map_arrays
from diffusionblocks.converter.training_run import open_for_training
from diffusionblocks.export.verify import verify_bundle
from diffusionblocks.runtime import BadInput, BundleError, open_bundle
from diffusionblocks.runtime.engine import Engine
from diffusionblocks.runtime.errors import DiffusionBlocksError
from diffusionblocks.runtime.files import checked_path, sha256_of
from diffusionblocks.runtime.inputs import checked_inputs
from diffusionblocks.runtime.manifest import TensorSpec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.road


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzzing = sys.modules.get("fuzzing") or _module("fuzzing")
EXAMPLES = {
    "manifest": 80,
    "layout": 40,
    "graph": 150,
    "text": 40,
    "names": 100,
    "npy": 60,
    "npz": 60,
    "inputs": 150,
    "safetensors": 100,
    "checkpoint": 60,
    "pickle": 60,
    "legacy": 100,
    "program": 15,
    "session": 8,
    "command": 12,
    "recipe": 4,
}
"""By target: some seconds in all."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp() / "fuzz-seeds"
    if not folder.exists():
        fuzzing.make_seeds(folder)
    return folder


@pytest.fixture(scope="module")
def targets(seeds: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fuzzing.targets(seeds, tmp_path_factory.mktemp("scratch"))


@pytest.fixture
def bundle(seeds: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(seeds / "model.dblocks", tmp_path / "model.dblocks"))


ROWS = np.zeros((2, 4), np.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLES)
def test_readers_work_or_refuse(targets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    target = targets[name]
    for data in target.valid:
        target.read(data)

    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64))
    def tried(number: int) -> None:
        data = target.make(random.Random(number))
        found = fuzzing.outcome_of(target.read, data)
        assert found.ok, f"{number}: {found.kind}: {found.detail}"

    with fuzzing.guarded(tmp_path_factory.getbasetemp()):
        tried()


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda: [][1], "crash"),
        (lambda: bytearray(400 << 20), "memory"),
        (lambda: Path("/dev/shm/fuzzed").write_text("x"), "outside"),
        (lambda: os.system("true"), "outside"),
        (lambda: sum(1 for _ in range(10**8)), "hang"),
    ],
)
def test_the_oracle_sees(tmp_path: Path, read: Callable[[], Any], kind: str) -> None:
    """Whatever the process had before: once 800 MiB here."""
    bytearray(800 << 20)
    with fuzzing.guarded(tmp_path):
        assert fuzzing.outcome_of(lambda _: read() and None, b"").kind == kind
    Path("/dev/shm/fuzzed").unlink(missing_ok=True)


def test_what_is_slow_once_is_no_hang(tmp_path: Path) -> None:
    tries = []

    def read(_: bytes) -> None:
        tries.append(1)
        if len(tries) == 1:
            sum(1 for _ in range(10**8))

    with fuzzing.guarded(tmp_path):
        assert fuzzing.outcome_of(read, b"").kind == "read"


# Arrays


def _npy(header: str, data: bytes = b"\0" * 64) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def _head(shape: object, descr: str = "<f4") -> str:
    return repr({"descr": descr, "fortran_order": False, "shape": shape})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_npy(_head((10**15,))), "4000000000000000 bytes; 64 are there"),
        (_npy(_head((10**40, 10**40))), "64 are there"),
        (_npy(_head((-1,))), r"\(-1,\)"),
        (_npy(_head((4,), "|O")), "Python objects"),
        (_npy("__import__('os').mkdir('executed')"), "header"),
        (_npy("(" * 9000), "cannot be read"),
    ],
)
@pytest.mark.parametrize("packed", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_headers_that_claim_more_than_there_is(tmp_path: Path, data: bytes, message: str, packed: int | None) -> None:
    path = tmp_path / "x.npz"
    if packed is None:
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w", packed) as archive:
            archive.writestr("x.npy", data)
    for read in (read_arrays, map_arrays):
        with pytest.raises(BadInput, match=message):
            read(path)
    assert not Path("executed").exists()


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        file.write(_npy(_head((300 << 20,), "|u1"), b""))
        for _ in range(300):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    for read in (read_arrays, map_arrays):
        with pytest.raises(BadInput, match="would unpack to 3145"):
            read(path)
    np.savez_compressed(tmp_path / "y.npz", x=np.zeros(1 << 20))  # eight million bytes of zeros are no attack
    assert read_arrays(tmp_path / "y.npz")["x"].shape == (1 << 20,)


def test_members_that_are_no_arrays_or_have_one_name(tmp_path: Path) -> None:
    for names, message in ((["x.npy", "notes.txt"], "notes.txt"), (["x.npy", "x.npy"], "one name")):
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            for name in names:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("warnings.warn", lambda *a, **k: None)
                    archive.writestr(name, _npy(_head((4,))))
        with pytest.raises(BadInput, match=message):
            read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "value", [[[1], [1, 2]], np.full((2, 2), 2**63, np.uint64), [[None, 1]] * 2, np.full((2, 2), -1, "M8[s]")]
)
def test_whole_numbers_that_do_not_fit(value: object) -> None:
    spec = TensorSpec("ids", "int32", ("batch", 2))
    with pytest.raises(BadInput, match="input ids"):
        checked_inputs([spec], value)
    assert checked_inputs([spec], np.full((2, 2), 2**31 - 1, np.uint64))["ids"].dtype == np.int32


# Bundles


def _said(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return found


def _say(bundle: Path, said: dict[str, Any], *replaced: tuple[str, str]) -> None:
    text = json.dumps(said)
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new, 1)
    (bundle / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{"format": 1', '{"format": 1, "format": 1', "key twice"),
        ('"trained": true', '"trained": true, "trained": false', "key twice"),
        ('"dim": ', '"dim": 1e400, "x": ', "no number"),
        ('"dim": ', '"dim": NaN, "x": ', "NaN is no number"),
        ('"dim": ', f'"dim": {10**30}, "x": ', "no number"),
        ('"dim": ', f'"dim": {"9" * 6000}, "x": ', "no number"),
        ('"source": {', '"source": {"a": ' + "[" * 100_000, "not JSON"),
    ],
)
def test_json_that_readers_take_differently(bundle: Path, old: str, new: str, message: str) -> None:
    _say(bundle, _said(bundle), (old, new))
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def _record(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda said: said["blocks"][0]["block"]["tensors"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_record(offset=1), "does not lie"),
        (_record(offset=2**62), "does not lie"),
        (_record(shape=[2**31, 2**31, 2**31]), "does not lie"),
        (_record(shape=[1] * 70), "does not lie"),
        (_record(shape=[0], file="elsewhere.bin"), "does not lie"),
        (_record(shape=[0, 2**62], file=None), "does not lie"),
        (_record(dtype="object"), "does not lie"),
        (lambda said: said["files"].update({"Stem.ONNX": {"sha256": "", "bytes": 1}}), "upper and lower case"),
        (lambda said: said["files"].update({"a\ud800": {"sha256": "", "bytes": 1}}), "plain path"),
        (lambda said: said["files"].update({"a\x1b[2J": {"sha256": "", "bytes": 1}}), "plain path"),
        (lambda said: said["files"]["stem.onnx"].update(bytes=-1), "-1 bytes"),
        (lambda said: said["decoding"].update(steps=10**12), "steps"),
        (lambda said: said.update(inputs=[]), "inputs"),
        (lambda said: said["inputs"][0].update(shape=[]), "input"),
        (lambda said: said["inputs"][0].update(dtype="float8"), "float8"),
        (lambda said: said["stem"].update(outputs=["other"]), "does not make stream_out"),
        (lambda said: said["target"]["graph"].update(outputs=["prediction"]), "does not make denoised, z_next"),
        (lambda said: said["stem"].update(file="stem.ort"), "no hash|no .onnx"),
        (lambda said: said["stem"].update(row_bytes=-1), "below 0"),
        (lambda said: said.update(preprocessing={"tokenizer": "/root/.ssh"}), "plain path"),
        (lambda said: said.update(preprocessing={"tokenizer": 3}), "no name"),
    ],
)
def test_a_manifest_that_lies(bundle: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    said = _said(bundle)
    change(said)
    _say(bundle, said)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_a_graph_that_reads_what_nothing_makes(bundle: Path) -> None:
    said = _said(bundle)
    said["blocks"][0]["block"]["inputs"][0] = "nothing"
    _say(bundle, said)
    with (
        open_bundle(bundle) as opened,
        pytest.raises(BundleError, match="reads nothing, which no graph before it makes"),
    ):
        opened.run(ROWS, "denoise")


def _outside(location: str, **more: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer.add(name="extra", data_type=1, dims=[1], data_location=1)
        for key, value in {"location": location, "offset": "0", "length": "4", **more}.items():
            tensor.external_data.add(key=key, value=value)

    return change


def _in_a_branch(model: onnx.ModelProto) -> None:
    """The same in an attribute of a graph in an attribute of a node of a function."""
    function = model.functions.add(name="f", domain="own", output=["y"])
    branch = function.node.add(op_type="If", output=["y"]).attribute.add(name="then_branch", type=5).g
    constant = branch.node.add(op_type="Constant", output=["z"]).attribute.add(name="value", type=4).t
    constant.data_location = 1
    constant.external_data.add(key="location", value="/etc/passwd")


def _operator(domain: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: setattr(model.graph.node[0], "domain", domain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_outside("/etc/passwd"), "plain path"),
        (_outside("../outside.bin"), "plain path"),
        (_outside("a/../../outside.bin"), "plain path"),
        (_outside("link.bin"), "is a link"),
        (_outside("unrecorded.bin"), "no hash for unrecorded.bin"),
        (_outside("*/_ORT_MEM_ADDR_/", offset="4096"), "plain path"),
        (_outside("stem.bin", length="99999999"), "does not lie"),
        (_outside("stem.bin", offset="-4"), "offset or length"),
        (
            lambda model: [
                _outside("stem.bin")(model),
                model.graph.initializer[-1].external_data.add(key="location", value="/etc/passwd"),
            ],
            "two entries",
        ),
        (_in_a_branch, "plain path"),
        (_operator("com.microsoft"), "not ONNX's own"),
        (_operator("ai.stranger"), "'ai.stranger"),
    ],
)
@pytest.mark.parametrize("kind", ["stem.onnx", "structure_00.onnx"])
def test_a_graph_that_points_outside_never_reaches_onnxruntime(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[onnx.ModelProto], None], message: str, kind: str
) -> None:
    model = onnx.load(bundle / kind, load_external_data=False)
    change(model)
    (bundle / kind).write_bytes(model.SerializeToString())
    (bundle.parent / "outside.bin").write_bytes(bytes(64))
    (bundle / "unrecorded.bin").write_bytes(bytes(64))
    (bundle / "link.bin").symlink_to(bundle / "stem.bin")
    said = _said(bundle)
    said["files"]["link.bin"] = said["files"]["stem.bin"]
    said["files"][kind] = {"sha256": sha256_of(bundle / kind), "bytes": (bundle / kind).stat().st_size}
    _say(bundle, said)
    opened_paths: list[str] = []
    session = Engine.session
    monkeypatch.setattr(
        Engine, "session", lambda self, path, **k: [opened_paths.append(path.name), session(self, path, **k)][1]
    )
    with (
        open_bundle(bundle, memory_budget="1GiB" if kind == "stem.onnx" else None) as opened,
        pytest.raises(BundleError, match=message),
    ):
        opened.run(ROWS, "exact")
    assert kind not in opened_paths


def test_what_the_exporter_writes_is_let_through(bundle: Path) -> None:
    for budget in ("1GiB", None):
        with open_bundle(bundle, memory_budget=budget) as opened:
            assert opened.run(ROWS, "exact").shape == (2, 3)


@pytest.mark.parametrize("what", ["fifo", "device", "folder", "link", "link to a folder"])
def test_no_plain_file(bundle: Path, tmp_path: Path, what: str) -> None:
    path, place = bundle / "stem.bin", tmp_path / "place"
    files = open_bundle(bundle).manifest.files
    path.rename(place)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": Path("/dev/zero"), "link": place}.get(what, tmp_path))
    with pytest.raises(BundleError, match=r"stem.bin"):
        checked_path(bundle, "stem.bin", files)


@pytest.mark.parametrize("option", ["model", "--example", "--data", "--input"])
def test_a_fifo_does_not_hang_the_command(bundle: Path, tmp_path: Path, option: str) -> None:
    fifo = tmp_path / "fifo.npy"
    os.mkfifo(fifo)
    args = {
        "model": ("inspect", fifo),
        "--example": ("inspect", "fuzzing:network", "--example", fifo),
        "--data": ("train", bundle, "--data", fifo),
        "--input": ("run", bundle, "--input", fifo, "--output", tmp_path / "y.npy"),
    }
    with fuzzing.guarded(tmp_path), pytest.raises(DiffusionBlocksError):
        fuzzing.call(*args[option])


def test_names_do_not_reach_the_terminal_as_they_are(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither what a terminal obeys nor what rich takes for markup."""
    said = _said(bundle)
    probe = dict(np.load(bundle / "probe.npz"))
    np.savez(bundle / "probe.npz", **probe, **{"exact.[/x]\x1b[2J": ROWS})
    said["files"]["probe.npz"] = {
        "sha256": sha256_of(bundle / "probe.npz"),
        "bytes": (bundle / "probe.npz").stat().st_size,
    }
    _say(bundle, said)
    with pytest.raises(SystemExit) as end:
        main(["verify", str(bundle)])
    text = capsys.readouterr().err
    assert end.value.code == 1
    assert "exact.[/x]" in text
    assert "\x1b[2J" not in text


def test_a_probe_that_is_no_archive(bundle: Path) -> None:
    (bundle / "probe.npz").write_bytes(b"PK\x03\x04" + bytes(40))
    said = _said(bundle)
    said["files"]["probe.npz"] = {"sha256": sha256_of(bundle / "probe.npz"), "bytes": 44}
    _say(bundle, said)
    with pytest.raises(BundleError, match=r"probe\.npz cannot be read"):
        verify_bundle(bundle)


def test_what_training_reads_must_be_recorded(bundle: Path) -> None:
    said = _said(bundle)
    del said["files"]["train/recipe.json"]
    _say(bundle, said)
    with pytest.raises(BundleError, match=r"no hash for train/recipe.json"):
        open_for_training(bundle)


@pytest.mark.parametrize(
    "change",
    [lambda r: r.pop("settings"), lambda r: r.update(trained=3), lambda r: r["settings"].update(seed=float("inf"))],
)
def test_a_recipe_that_does_not_fit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from diffusionblocks.converter.parts import load_training

    recipe = json.loads((bundle / "train" / "recipe.json").read_text())
    change(recipe)
    (bundle / "train" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(BundleError, match="does not fit together"):
        load_training(bundle / "train")


# Models


@pytest.mark.parametrize(
    "name", ["this:s", "timm:hf-hub:stranger/model", "transformers:folder", "diffusers:folder", "../x"]
)
@pytest.mark.parametrize("key", ["arch", "args"])
def test_a_checkpoint_may_not_name_code(tmp_path: Path, name: str, key: str) -> None:
    """A spec that the user gives is imported and called; one that a file names is neither."""
    path = tmp_path / "weights.pt"
    torch.save({key: {"model": name} if key == "args" else name, "state_dict": {"a": torch.zeros(1)}}, path)
    with pytest.raises(BadInput, match="no name of timm or torchvision"):
        load_model(str(path))
    assert "this" not in sys.modules


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_may_not_ask_for_memory(tmp_path: Path, legacy: bool) -> None:
    evil = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    path = tmp_path / "model.pt"
    if legacy:
        path.write_bytes(evil)
    else:
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(1)}, buffer)
        with zipfile.ZipFile(buffer) as before, zipfile.ZipFile(path, "w") as after:
            for name in before.namelist():
                after.writestr(name, evil if name.endswith("data.pkl") else before.read(name))
    with pytest.raises(BadInput, match=r"builtins\.bytearray"):
        load_model(str(path))


def test_many_small_pickles_are_scanned_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\x80\x02N." * 50_000)
    with fuzzing.guarded(tmp_path):
        assert fuzzing.outcome_of(lambda _: load_model(str(path)) and None, b"").kind == "refused"


@pytest.mark.parametrize("kind", ["torch", "exported"])
def test_model_archives_that_unpack_to_far_more(seeds: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.pt"
    shutil.copyfile(seeds / ("module.pt" if kind == "torch" else "model.pt2"), path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        root = archive.namelist()[0].split("/")[0]
        with archive.open(f"{root}/data/999", "w", force_zip64=True) as file:
            for _ in range(300):
                file.write(bytes(1 << 20))
    with pytest.raises(BadInput, match="would unpack to"):
        load_model(str(path))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 0, 9])
def test_lengths_of_a_safetensors_header(seeds: Path, tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + (seeds / "weights.safetensors").read_bytes()[8:])
    with pytest.raises(BadInput):
        load_model(str(path), arch="fuzzing:plain")
