"""Weights without a named architecture: recognised where exactly one architecture fits; several, or none, are named. The index is kept and read with care."""

from __future__ import annotations

import functools
import gzip
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import timm
import torch
from diffusionblocks.converter import architectures, recognise
from diffusionblocks.converter.architectures import Package, describe, unfilled
from diffusionblocks.converter.load import load_model, load_weights
from diffusionblocks.converter.specs import architecture
from diffusionblocks.runtime.caches import cache_file
from diffusionblocks.runtime.errors import BadInput
from torch import nn

VIT, RESNET, MOBILE = (
    "vit_tiny_patch16_224",
    "timm:test_resnet",
    "transformers:mobilevit:MobileViTForImageClassification",
)
Builds = Mapping[str, Callable[[], nn.Module]]


class Net(nn.Module):
    """A network whose weights have the same names and shapes whatever the options."""

    def __init__(
        self, heads: int = 2, eps: float = 1e-5, act: type[nn.Module] = nn.GELU, stride: int = 1, classes: int = 10
    ) -> None:
        super().__init__()
        self.num_heads = heads
        self.stem = nn.Conv2d(3, 8, 3, stride=stride)
        self.norm, self.act = nn.LayerNorm(8, eps=eps), act()
        self.fc = nn.Linear(8, classes)


def _timm(*names: str) -> Builds:
    return {f"timm:{n}": functools.partial(timm.create_model, n) for n in names}


def _spec(spec: str) -> Builds:
    return {spec: lambda: architecture(spec).model}


@pytest.fixture
def know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Makes these architectures the known ones, with an empty cache; returns the list of what is built from then on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))

    def install(builds: Builds, *, name: str = "zoo", version: str = "1") -> list[str]:
        built: list[str] = []

        def counted(spec: str) -> nn.Module:
            built.append(spec)
            return builds[spec]()

        known = {spec: functools.partial(counted, spec) for spec in builds}
        monkeypatch.setattr(architectures, "installed", lambda: [Package(name, version, lambda: known)])
        return built

    return install


def _flat(shapes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of these shapes that take no memory and no disk."""
    return {k: torch.zeros(()).expand(v.shape) for k, v in shapes.items()}


def _state(build: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    with unfilled():
        model = build()
    return _flat(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_vision_transformer_trained_for_other_classes(know, tmp_path: Path, caplog, dtype: torch.dtype) -> None:
    know(_timm(VIT, "deit_tiny_patch16_224", "vit_tiny_patch16_384", "vit_small_patch16_224"))
    torch.manual_seed(0)
    model = timm.create_model(VIT, num_classes=5).to(dtype).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    source = load_model(str(tmp_path / "model.pth"))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(source.model(x), model.float()(x))
    message = "model.pth: recognised as timm:vit_tiny_patch16_224 (the same network as timm:deit_tiny_patch16_224) by the names and shapes of its 152 weights; --arch overrides this."
    assert message in caplog.messages


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"model": {f"module.{k}": v for k, v in w.items()}},
        lambda w: {"model_state_dict": {f"_orig_mod.{k}": v for k, v in w.items()}},
        lambda w: {f"model.{k}": v for k, v in w.items()},
        lambda w: {f"module.model.{k}": v for k, v in w.items()},
        lambda w: {k: v for k, v in w.items() if not k.endswith("num_batches_tracked")},
    ],
    ids=["state_dict", "module.", "_orig_mod.", "model.", "module.model.", "no counters"],
)
def test_wrappers_prefixes_and_missing_counters(know, tmp_path: Path, wrap) -> None:
    know(_timm("test_resnet", "test_vit"))
    model = timm.create_model("test_resnet", num_classes=7).eval()
    torch.save(wrap(model.state_dict()), tmp_path / "w.pt")
    loaded = load_model(str(tmp_path / "w.pt"))
    assert loaded.name == "w.pt (timm:test_resnet)"
    assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in model.state_dict().items())


def test_an_architecture_of_two_packages_is_asked_for(know, tmp_path: Path) -> None:
    """Names and shapes agree; the blurred one computes something else, and that the two others do not is not known."""
    know({**_timm("resnet18", "resnetblur18", "resnet34"), **_spec("torchvision:resnet18")})
    torch.save(_state(functools.partial(timm.create_model, "resnet18")), tmp_path / "w.pt")
    with pytest.raises(BadInput) as error:
        load_model(str(tmp_path / "w.pt"))
    assert "fit 3 architectures" in str(error.value)
    assert "timm:resnet18, timm:resnetblur18, torchvision:resnet18." in str(error.value)
    assert "--arch timm:resnet18" in str(error.value)
    assert load_model(str(tmp_path / "w.pt"), arch="torchvision:resnet18").name == "w.pt (torchvision:resnet18)"


@pytest.mark.parametrize("options", [{"heads": 4}, {"eps": 1e-6}, {"act": nn.ReLU}, {"stride": 2}], ids=str)
def test_what_shapes_do_not_show_is_ambiguous(know, options) -> None:
    know({"a:one": Net, "a:same": Net, "a:other": functools.partial(Net, **options)})
    with pytest.raises(BadInput, match=r"fit 2 architectures[\s\S]*a:one = a:same, a:other[\s\S]*--arch a:one"):
        recognise.recognise("w.pt", [Net(classes=3).state_dict()])


def test_networks_that_agree_in_everything_are_one(know, caplog) -> None:
    know({"a:one": Net, "a:same": functools.partial(Net, classes=77)})
    assert recognise.recognise("w.pt", [Net(heads=2, classes=3).state_dict()]) == "a:one"
    assert "recognised as a:one (the same network as a:same)" in caplog.text


def test_many_candidates_are_cut(know) -> None:
    know({f"a:{heads}": functools.partial(Net, heads=heads) for heads in range(1, 15)})
    with pytest.raises(BadInput, match=r"a:10 and 4 more\."):
        recognise.recognise("w.pt", [Net().state_dict()])


def test_no_match_names_the_nearest(know, tmp_path: Path) -> None:
    know(_timm(VIT, "vit_small_patch16_224", "resnet18", "test_vit"))
    weights = _state(functools.partial(timm.create_model, VIT, img_size=64))
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(
        BadInput, match=r"none of 4 known ones has their names and shapes[\s\S]*--arch timm:NAME"
    ) as error:
        load_model(str(tmp_path / "w.pt"))
    nearest = re.findall(r"(timm:\w+) \(([^)]*)\)", str(error.value))
    assert nearest[0] == (f"timm:{VIT}", "every name, other shapes")
    assert [n for n, _ in nearest[:2]] == [f"timm:{VIT}", "timm:vit_small_patch16_224"]
    torch.save({"surprise": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="none shares a name"):
        load_model(str(tmp_path / "w.pt"))


def test_classes_must_be_one_number(know) -> None:
    def heads() -> nn.Module:
        model = nn.ModuleDict({"head": nn.Linear(4, 10), "aux": nn.Linear(4, 10)})
        model.pretrained_cfg = {"classifier": ("head", "aux")}
        return model

    know({"a:two": heads})
    weights = heads().state_dict()
    for classes, fits in ((3, True), (4, False)):
        weights |= {"aux.weight": torch.zeros(3, 4), "aux.bias": torch.zeros(3)}
        weights |= {"head.weight": torch.zeros(classes, 4), "head.bias": torch.zeros(classes)}
        found = recognise.matches(recognise.load_index(architectures.installed()).entries, recognise._shapes(weights))
        assert bool(found) == fits


@pytest.mark.parametrize("head", ["", ":BertForMaskedLM", ":BertForSequenceClassification"])
def test_transformers_heads_and_tied_weights(know, caplog, head: str) -> None:
    """What transformers saves lacks the second name of a tied tensor."""
    import transformers

    names = ("BertModel", "BertForMaskedLM", "BertForSequenceClassification")
    builds = {
        f"transformers:bert:{n}": functools.partial(getattr(transformers, n), transformers.BertConfig()) for n in names
    }
    know({"transformers:bert": builds.pop("transformers:bert:BertModel"), **builds})
    spec = f"transformers:bert{head}"
    with unfilled():
        model = getattr(transformers, head[1:] or "BertModel")(transformers.BertConfig(num_labels=5))
    full = _flat(model.state_dict())
    saved = {k: v for k, v in full.items() if not k.startswith("cls.predictions.decoder.")}
    assert len(saved) < len(full) or "Masked" not in head
    assert recognise.recognise("w.pt", [full]) == recognise.recognise("w.pt", [saved]) == spec


def test_a_class_of_transformers_is_recognised_and_loaded(know, tmp_path: Path) -> None:
    import transformers

    know({**_spec(MOBILE), **_spec("transformers:mobilevit")})
    torch.manual_seed(0)
    model = transformers.MobileViTForImageClassification(transformers.MobileViTConfig(num_labels=7)).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    source = load_model(str(tmp_path / "w.pt"))
    assert source.name == f"w.pt ({MOBILE})"
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(source.model(pixel_values=x).logits, model(pixel_values=x).logits)


def test_a_tied_tensor_saved_once_is_not_missing() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.out.weight = self.embedding.weight

    model, given = Tied(), torch.randn(5, 3)
    load_weights(model, {"embedding.weight": given}, Path("w.pt"), "a:b")
    assert torch.equal(model.out.weight, given)
    with pytest.raises(BadInput, match="missing 2"):
        load_weights(model, {"other": given}, Path("w.pt"), "a:b")


@pytest.mark.parametrize(
    "spec", [RESNET, "timm:test_vit", "timm:test_efficientnet", "torchvision:squeezenet1_1", MOBILE]
)
def test_an_entry_depends_on_neither_the_device_nor_the_classes(spec: str) -> None:
    real, other = architecture(spec).model, architecture(spec, num_classes=7).model
    with unfilled():
        meta = architecture(spec).model if not spec.startswith("transformers") else None
    entries = [describe(spec, m) for m in (real, other, meta) if m is not None]
    assert all(
        (e.names, e.shapes, e.configuration) == (entries[0].names, entries[0].shapes, entries[0].configuration)
        for e in entries
    )
    assert entries[0].classifier


def test_sizes_computed_with_tensors_are_built_with_the_weights_alone_on_the_meta_device(know) -> None:
    def computed() -> nn.Module:
        return nn.Sequential(nn.Linear(3, int(torch.arange(4).sum())), nn.BatchNorm1d(6))

    def impossible() -> nn.Module:
        raise ImportError("an optional package")

    know({"a:computed": computed, "a:impossible": impossible})
    index = recognise.load_index(architectures.installed())
    assert [e.spec for e in index.entries] == ["a:computed"]
    assert index.skipped == 1
    with pytest.raises(BadInput, match=r"none of 1 known ones \(1 could not be built and were not compared\)"):
        recognise.recognise("w.pt", [{"x": torch.zeros(1)}])


def test_nothing_is_printed_or_logged_by_what_is_built(know, capsys, caplog) -> None:
    def talkative() -> nn.Module:
        print("data goes to stdout")
        logging.getLogger("some.package").warning("deprecated")
        return Net()

    know({"a:one": talkative})
    recognise.load_index(architectures.installed())
    assert capsys.readouterr().out == ""
    assert all("deprecated" not in m for m in caplog.messages)
    assert "Indexing the 1 architectures of zoo 1" in caplog.text
    assert logging.root.manager.disable == logging.NOTSET


def test_the_index_is_built_once_per_version(know) -> None:
    builds = {"a:one": Net, "a:two": functools.partial(Net, heads=4)}
    packages = lambda: recognise.load_index(architectures.installed())  # noqa: E731
    built = know(builds)
    first = packages()
    assert built == ["a:one", "a:two"]
    assert packages() == first
    assert built == ["a:one", "a:two"]
    again = know(builds, version="2")
    assert packages() == first
    assert again == ["a:one", "a:two"]
    other = know({"b:one": Net}, name="other")
    assert [e.spec for e in packages().entries] == ["b:one"]
    assert other == ["b:one"]
    kept = know(builds, version="2")
    assert packages() == first
    assert kept == []
    assert os.listdir(cache_file().parent) == [cache_file().name]


def _text(data: object) -> bytes:
    return gzip.compress(json.dumps(data).encode(), mtime=0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04garbage",
        _text({"format": 1, "packages": {}})[:-9],
        b"\x1f\x8b" + b"\x00" * 30,
        gzip.compress(b"\xff\xfe", mtime=0),
        _text([1, 2]),
        _text({"format": 0, "packages": {}}),
        _text({"format": 1, "packages": [1]}),
        _text({"format": 1, "packages": {"zoo": 3}}),
        _text({"format": 1, "packages": {"zoo": {"version": f"1, torch {torch.__version__}", "patterns": [], "entries": [{"spec": "x"}]}}}),
    ],
    ids=lambda content: f"{len(content)} bytes",
)  # fmt: skip
def test_a_broken_cache_is_built_again(know, content: bytes) -> None:
    built = know({"a:one": Net})
    path = cache_file()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for _ in range(2):
        assert recognise.recognise("w.pt", [Net().state_dict()]) == "a:one"
        assert built == ["a:one"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has LOCALAPPDATA, always absolute")
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, folder in (
        (str(tmp_path / "x"), tmp_path / "x"),
        ("relative", tmp_path / ".cache"),
        ("", tmp_path / ".cache"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache_file().parent == folder / "diffusionblocks"


def test_a_cache_that_cannot_be_written_is_done_without(know, tmp_path: Path, caplog) -> None:
    built = know({"a:one": Net})
    (tmp_path / "cache").write_text("a file")
    for count in (1, 2):
        assert recognise.recognise("w.pt", [Net().state_dict()]) == "a:one"
        assert len(built) == count
    assert "cannot be kept" in caplog.text


def test_packages_that_are_missing_or_cannot_be_imported(know, tmp_path: Path, monkeypatch, caplog) -> None:
    def broken() -> Builds:
        raise RuntimeError("operator torchvision::nms does not exist")

    know({"a:one": Net})
    [package] = architectures.installed()
    monkeypatch.setattr(architectures, "installed", lambda: [Package("bad", "1", broken), package])
    assert recognise.recognise("w.pt", [Net().state_dict()]) == "a:one"
    assert "bad cannot be imported, so its architectures are not compared: operator torchvision::nms" in caplog.text
    monkeypatch.setattr(architectures, "installed", list)
    torch.save(Net().state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadInput, match=r"holds 6 weights, but no architecture\.\n.*--arch timm:NAME"):
        load_model(str(tmp_path / "w.pt"))


@pytest.mark.slow
def test_the_whole_index(know, monkeypatch, tmp_path: Path) -> None:
    """Every architecture is built, few are left out, and hundreds of recognised networks are recognised as themselves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = recognise.load_index(architectures.installed())
    specs = {e.spec for e in index.entries}
    for package, fewest in (("timm", 1300), ("torchvision", 100), ("transformers", 1300)):
        assert sum(s.startswith(f"{package}:") for s in specs) >= fewest
    assert index.skipped < 0.05 * len(specs)
    assert not any(s.startswith("torchvision:quantized") for s in specs)
    for name in ("convnext_tiny", "efficientvit_b0", "mobilenetv3_large_150d", "swin_tiny_patch4_window7_224"):
        weights = _state(functools.partial(timm.create_model, name, num_classes=12))
        assert recognise.recognise("w.pt", [weights]) == f"timm:{name}"
