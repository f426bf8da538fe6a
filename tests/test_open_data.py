"""Each kind of --data, and each way it is refused."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusionblocks.converter import content, folders, hub_data, tables
from diffusionblocks.converter.bad_rows import check_targets, scan
from diffusionblocks.converter.data import read_arrays
from diffusionblocks.converter.dataset import ArrayDataset, Batch
from diffusionblocks.converter.label_target import LabelTarget, new_table
from diffusionblocks.converter.open_data import open_data
from diffusionblocks.converter.stored import array_file, map_arrays
from diffusionblocks.runtime.arrays import plain_dtype
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.installing import install
from diffusionblocks.runtime.manifest import TensorSpec
from PIL import Image

IMAGE = (TensorSpec("x", "float32", ("batch", 1, 8, 8)),)
VECTOR = (TensorSpec("x", "float32", ("batch", 64)),)
TEXT = tuple(TensorSpec(n, "int64", ("batch", 12)) for n in ("input_ids", "attention_mask", "token_type_ids"))
PLAIN = {"input_size": [1, 8, 8], "mean": [0.0], "std": [1.0]}


def _classes(count: int) -> LabelTarget:
    return LabelTarget(new_table(count, 0), "analytic")


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tables go into a folder of the tests' own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    hub_data.cache_folder.cache_clear()
    yield
    patch.undo()
    hub_data.cache_folder.cache_clear()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 of scikit-learn's digits as PNG, a folder a class."""
    from sklearn.datasets import load_digits

    data, folder = load_digits(), tmp_path_factory.mktemp("digits [1]") / "train set"
    for i in range(120):
        place = folder / f"digit {data.target[i]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15).astype(np.uint8)).save(place / f"{i:03}.png")
    return folder


@pytest.fixture
def own(images: Path, tmp_path: Path) -> Path:
    """A copy of the images to spoil."""
    return Path(shutil.copytree(images, tmp_path / "own"))


@pytest.fixture(scope="module")
def lines() -> list[str]:
    from pydoc_data import topics

    text = "\n".join(topics.topics[t] for t in ("assert", "for", "if", "while", "import"))
    return [line.strip() for line in text.splitlines() if len(line.split()) > 3][:60]


@pytest.fixture(scope="module")
def tokenizer(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on those lines, as tokenizer.json alone."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]", "[CLS]"])
    made.train_from_iterator(lines, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def table(columns: dict[str, Any]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def every(data: Any) -> Batch:
    return data.batch(range(len(data)))


def refused(match: str) -> Any:
    return pytest.raises(BadInput, match=match)


# Images


def test_images_by_class(images: Path) -> None:
    data = open_data(str(images), IMAGE, PLAIN)
    found = every(data)
    paths = sorted(images.rglob("*.png"))
    assert data.class_names == tuple(f"digit {d}" for d in range(10))
    assert found.targets is not None
    assert found.targets.tolist() == [int(p.parent.name[-1]) for p in paths]
    np.testing.assert_allclose(found.inputs["x"][7, 0], np.asarray(Image.open(paths[7])) / 255, atol=1e-6)
    assert found.inputs["x"].dtype == torch.float32
    check_targets(data, _classes(10))


def test_rows_are_in_the_order_of_their_paths(images: Path) -> None:
    paths = sorted(images.rglob("*.png"), reverse=True)
    listing = folders._listing(hub_data.table_of({"file": [str(p) for p in paths]}), "file", images, None)
    assert listing.names() == sorted(listing.names())
    assert listing.name(0) == listing.names()[0]
    assert listing.labels is not None
    assert listing.labels.tolist() == [int(p.parent.name[-1]) for p in reversed(paths)]


def test_the_same_rows_give_the_same_bits(images: Path) -> None:
    data = open_data(str(images), IMAGE, PLAIN)
    a, b, whole = data.batch([5, 90, 5]), data.batch([5, 90, 5]), every(data)
    assert torch.equal(a.inputs["x"], b.inputs["x"])
    assert torch.equal(a.inputs["x"], whole.inputs["x"][[5, 90, 5]])
    assert a.targets is not None
    assert whole.targets is not None
    assert torch.equal(a.targets, whole.targets[[5, 90, 5]])


def test_nothing_is_written_beside_the_data(images: Path) -> None:
    before = sorted(images.rglob("*"))
    open_data(str(images), IMAGE, PLAIN)
    assert sorted(images.rglob("*")) == before


def test_images_are_decoded_when_a_batch_asks(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def counted(path: Path, preparing: Any, real: Callable[..., Any] = tables.image_array) -> Any:
        decoded.append(Path(path).name)
        return real(path, preparing)

    open_data(str(images), IMAGE, PLAIN)
    monkeypatch.setattr(tables, "image_array", counted)
    data = open_data(str(images), IMAGE, PLAIN)
    assert decoded == []  # all rows were read before, and the result was kept
    data.batch([3, 4])
    assert len(decoded) == 2
    data.batch([3])
    assert len(decoded) == 3
    check_targets(data, _classes(10))
    assert len(decoded) == 3


def test_channels_last(images: Path) -> None:
    last = (TensorSpec("x", "float32", ("batch", 8, 8, 1)),)
    found = open_data(str(images), last, PLAIN).batch([0, 1]).inputs["x"]
    assert torch.equal(found, open_data(str(images), IMAGE, PLAIN).batch([0, 1]).inputs["x"].permute(0, 2, 3, 1))


def test_without_a_config_images_are_resized_and_it_is_said(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    larger = (TensorSpec("pixel_values", "float16", ("batch", 3, 12, 10)),)
    with caplog.at_level(logging.WARNING):
        found = open_data(str(images), larger, None).batch([0]).inputs["pixel_values"]
    assert "resized to 12x10 and scaled to 0..1" in caplog.text
    assert found.shape == (1, 3, 12, 10)
    assert found.dtype == torch.float16
    assert 0 <= float(found.min()) < float(found.max()) <= 1


def test_a_flat_folder_has_no_labels(images: Path) -> None:
    flat = images / "digit 3"
    data = open_data(str(flat), IMAGE, PLAIN)
    assert data.class_names is None
    assert data.batch([0]).targets is None
    with refused("without classes"):
        open_data(str(flat), IMAGE, PLAIN, labelled=True)
    with refused("no labels"):
        check_targets(data, _classes(10))


def test_labels_that_are_not_wanted_are_left_out(images: Path) -> None:
    assert open_data(str(images), IMAGE, PLAIN, labelled=False).batch([0]).targets is None


def test_bad_images_are_counted_and_named(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = sorted(own.rglob("*.png"))[10:13]
    damaged[0].write_bytes(damaged[0].read_bytes()[:70])
    damaged[1].write_bytes(b"")
    damaged[2].write_text("no image")
    name = damaged[0].relative_to(own).as_posix()
    with refused(rf"3 of 120 images cannot be read: {name} \(.*\), .* \(not an image\)") as caught:
        open_data(str(own), IMAGE, PLAIN)
    assert "--skip-bad" in str(caught.value.hint)
    with caplog.at_level(logging.WARNING):
        data = open_data(str(own), IMAGE, PLAIN, skip_bad=True)
    assert f"3 of 120 images cannot be read: {name}" in caplog.text
    assert len(data) == len(every(data).inputs["x"]) == 117


def test_a_row_that_is_lost_later_is_named(own: Path) -> None:
    data = open_data(str(own), IMAGE, PLAIN)
    sorted(own.rglob("*.png"))[4].unlink()
    with refused(r"digit 0/.*\.png cannot be read: no such file"):
        data.batch([3, 4, 5])


def test_nothing_but_bad_images_is_refused(own: Path) -> None:
    for path in own.rglob("*.png"):
        path.write_bytes(b"")
    with refused("120 of 120 .* and 115 more: nothing is left"):
        open_data(str(own), IMAGE, PLAIN, skip_bad=True)


def test_more_classes_than_outputs_are_refused(images: Path) -> None:
    with refused("10 classes, the model 8 outputs: digit 8, digit 9 would have none"):
        check_targets(open_data(str(images), IMAGE, PLAIN), _classes(8))


def test_fewer_classes_are_allowed_and_said(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        check_targets(open_data(str(images), IMAGE, PLAIN), _classes(12))
    assert "10 of the model's 12 classes; none of 10, 11" in caplog.text


def test_a_bundles_classes_number_the_folders(own: Path) -> None:
    shutil.rmtree(own / "digit 0")
    known = [f"digit {d}" for d in range(10)]
    data = open_data(str(own), IMAGE, PLAIN, class_names=known)
    targets = every(data).targets
    assert data.class_names == tuple(known)
    assert targets is not None
    assert int(targets.min()) == 1
    (own / "digit 1").rename(own / "zebra")
    with refused("the classes zebra, which the bundle does not have"):
        open_data(str(own), IMAGE, PLAIN, class_names=known)


def test_an_empty_class_keeps_its_number(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (own / "digit 4").iterdir():
        path.unlink()
    with caplog.at_level(logging.WARNING):
        data = open_data(str(own), IMAGE, PLAIN)
    targets = every(data).targets
    assert "1 of 10 classes have no files: digit 4" in caplog.text
    assert targets is not None
    assert set(targets.tolist()) == set(range(10)) - {4}


def test_folders_that_are_no_classes_are_refused(own: Path, tmp_path: Path) -> None:
    shutil.copy(next(own.rglob("*.png")), own / "loose.png")
    with refused("1 of the files to be read: loose.png"):
        open_data(str(own), IMAGE, PLAIN)
    for part in ("train", "val"):
        shutil.copytree(own / "digit 1", tmp_path / "parts" / part / "digit 1")
    with refused("holds the parts train, val"):
        open_data(str(tmp_path / "parts"), IMAGE, PLAIN)


def test_what_is_left_out_of_a_folder_is_said(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    (own / "digit 1" / "Thumbs.db").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert len(open_data(str(own), IMAGE, PLAIN)) == 120
    assert "1 files of" in caplog.text
    (own / "digit 1" / "more.zip").write_bytes(b"PK")
    with refused("holds archives among the images: digit 1/more.zip"):
        open_data(str(own), IMAGE, PLAIN)


def test_images_for_a_model_of_vectors_are_refused(images: Path) -> None:
    with refused(r"images; the model takes x float32 \['batch', 64\]"):
        open_data(str(images), VECTOR, None)
    with refused("also takes mask"):
        open_data(str(images), (*IMAGE, TensorSpec("mask", "float32", ("batch", 8))), PLAIN)


def test_the_fingerprint_is_of_content_and_preparation(own: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path = own, inputs: Any = IMAGE, preprocessing: Any = PLAIN, **options: Any) -> str:
        return open_data(str(folder), inputs, preprocessing, **options).fingerprint

    first = fingerprint()
    moved = shutil.copytree(own, tmp_path / "elsewhere")
    os.utime(next(moved.rglob("*.png")), (1, 1))
    assert fingerprint(moved) == first
    assert fingerprint(preprocessing={**PLAIN, "std": [2.0]}) != first
    assert fingerprint(inputs=(TensorSpec("x", "float32", ("batch", 1, 9, 9)),)) != first
    assert fingerprint(labelled=False) != first
    path = next(own.rglob("*.png"))
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert fingerprint() != first
    path.unlink()
    assert fingerprint() not in (first, fingerprint(moved))


def test_a_relative_path_is_the_same_data(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = open_data(str(images), IMAGE, PLAIN)
    monkeypatch.chdir(images.parent)
    relative = open_data(images.name, IMAGE, PLAIN)
    assert relative.fingerprint == absolute.fingerprint
    monkeypatch.chdir("/")
    assert torch.equal(relative.batch([1]).inputs["x"], absolute.batch([1]).inputs["x"])


# Arrays


def test_arrays_are_mapped(digits: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", digits[0])
    np.savez(tmp_path / "both.npz", x=np.asfortranarray(digits[0]), y=digits[1].astype(np.uint8))
    np.savez_compressed(tmp_path / "small.npz", x=digits[0], y=digits[1])
    for name, labelled in (("x.npy", False), ("both.npz", True), ("small.npz", True)):
        found = map_arrays(tmp_path / name)
        assert all(isinstance(a, np.memmap) == (name != "small.npz") for a in found.values())
        data = open_data(str(tmp_path / name), VECTOR, None, labelled=labelled)
        np.testing.assert_array_equal(data.batch([3, 1]).inputs["x"], digits[0][[3, 1]])
        targets = data.batch([3, 1]).targets
        assert (targets is not None) == labelled
        if targets is not None:
            assert targets.dtype == torch.int64
            assert targets.tolist() == digits[1][[3, 1]].tolist()


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f8", "longdouble", ">i4", "<u2"])
@pytest.mark.parametrize("name", ["x.npy", "plain.npz", "small.npz"])
def test_arrays_of_any_order_of_bytes_and_precision_are_read(dtype: str, name: str, tmp_path: Path) -> None:
    x = np.arange(5 * 64).reshape(5, 64).astype(dtype)
    y = np.arange(10).reshape(5, 2).astype(dtype)
    made = {"x.npy": np.save, "plain.npz": np.savez, "small.npz": np.savez_compressed}[name]
    made(tmp_path / name, **({"arr": x} if name == "x.npy" else {"x": x, "y": y}))
    whole = read_arrays(tmp_path / name)["x"]
    assert whole.dtype == plain_dtype(x.dtype)
    np.testing.assert_array_equal(whole, x)
    data = open_data(str(tmp_path / name), VECTOR, None, labelled=name != "x.npy").batch([3, 1])
    assert data.inputs["x"].dtype == torch.float32
    np.testing.assert_array_equal(data.inputs["x"], x[[3, 1]].astype(np.float32))
    if name != "x.npy":
        assert data.targets is not None
        np.testing.assert_array_equal(data.targets.double(), y[[3, 1]].astype(np.float64))


def test_arrays_are_told_by_content(digits: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", digits[0])
    (tmp_path / "x.npy").rename(tmp_path / "x.txt")
    assert len(open_data(str(tmp_path / "x.txt"), VECTOR, None)) == len(digits[0])


def test_integers_become_floats_unscaled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.full((2, 64), 200, np.uint8))
    assert float(open_data(str(tmp_path / "a.npz"), VECTOR, None).batch([0]).inputs["x"][0, 0]) == 200.0


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": np.zeros((4, 63), np.float32)}, r"x float32 \[4, 63\] for float32 \['batch', 64\]"),
        ({"z": np.zeros((4, 64), np.float32)}, "has the inputs z; the model takes x"),
        ({"x": np.zeros((4, 64), np.float32), "y": np.zeros(3, int)}, "4 rows of x, 3 rows of y"),
        ({"x": np.zeros((0, 64), np.float32)}, "is empty"),
        ({"x": np.array([["a"] * 64])}, "array of <U1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, Any], match: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with refused(match):
        open_data(str(tmp_path / "a.npz"), VECTOR, None)


def test_floats_for_integers_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.zeros((2, 12), np.float32))
    with refused("input_ids float32"):
        open_data(str(tmp_path / "a.npz"), TEXT[:1], None)


def test_missing_labels_are_refused(digits: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", digits[0])
    with refused("training needs inputs and labels"):
        open_data(str(tmp_path / "x.npy"), VECTOR, None, labelled=True)


def test_rows_with_nan_are_bad_rows(digits: Any, tmp_path: Path) -> None:
    x = digits[0][:300].copy()
    x[7, 3], x[290, 0] = np.nan, np.inf
    np.savez(tmp_path / "a.npz", x=x, y=digits[1][:300])
    with refused(r"2 of 300 rows cannot be read: row 7 \(NaN or infinity in x\), row 290"):
        open_data(str(tmp_path / "a.npz"), VECTOR, None)
    data = open_data(str(tmp_path / "a.npz"), VECTOR, None, skip_bad=True)
    assert len(data) == 298
    assert torch.isfinite(every(data).inputs["x"]).all()


def test_labels_outside_the_classes_are_refused(digits: Any) -> None:
    x = digits[0][:4]
    for labels, match in (([0, 1, 2, 10], "from 0 to 10"), ([-1, 0, 0, 0], "from -1 to 0")):
        with refused(match):
            check_targets(ArrayDataset({"x": x}, np.asarray(labels)), _classes(10))
    with refused("the type float32"):
        check_targets(ArrayDataset({"x": x}, np.zeros(4, np.float32)), _classes(10))


def test_reading_is_reported(digits: Any) -> None:
    seen: list[tuple[int, int]] = []
    scan(ArrayDataset({"x": digits[0][:600]}, None), False, lambda done, of: seen.append((done, of)))
    assert seen == [(256, 600), (512, 600), (600, 600)]


# Tables


def test_a_saved_dataset_is_matched_by_name(digits: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"x": datasets.Sequence(datasets.Value("float32")), "label": datasets.ClassLabel(names=list("abcdefghij"))}
    )
    made = table({"x": digits[0][:50].tolist(), "label": digits[1][:50].tolist()}).cast(features)
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=made, test=made.select(range(5))).save_to_disk(str(tmp_path / "parts"))
    for name in ("saved", "parts"):
        data = open_data(str(tmp_path / name), VECTOR, None, labelled=True)
        assert data.class_names == tuple("abcdefghij")
        batch = data.batch([49, 2])
        np.testing.assert_array_equal(batch.inputs["x"], digits[0][[49, 2]])
        assert batch.targets is not None
        assert batch.targets.tolist() == digits[1][[49, 2]].tolist()
    shutil.copytree(tmp_path / "saved", tmp_path / "again")
    first, again = (open_data(str(tmp_path / n), VECTOR, None).fingerprint for n in ("saved", "again"))
    assert first == again


def test_parquet_in_one_file_and_in_several(digits: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i, part in enumerate(("train-0", "train-1", "test-0")):
        rows = slice(20 * i, 20 * i + 20)
        columns = {"x": digits[0][rows].reshape(20, 8, 8).tolist(), "y": digits[1][rows].tolist()}
        table(columns).to_parquet(str(tmp_path / "data" / f"{part}.parquet"))
    (tmp_path / "data" / "README.md").write_text("# digits")
    whole = open_data(str(tmp_path / "data"), VECTOR, None)
    np.testing.assert_array_equal(every(whole).inputs["x"], digits[0][:40])
    one = open_data(str(tmp_path / "data" / "train-1.parquet"), VECTOR, None)
    several = open_data(str(tmp_path / "data" / "train-*.parquet"), VECTOR, None)
    assert torch.equal(one.batch([0]).inputs["x"], whole.batch([20]).inputs["x"])
    assert len(several) == 40
    assert len({whole.fingerprint, one.fingerprint}) == 2


def test_images_in_parquet(images: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = sorted(images.rglob("*.png"))[:20]
    values = [{"bytes": p.read_bytes(), "path": p.name} for p in paths]
    values[4] = {"bytes": b"no image", "path": "x.png"}
    made = table({"picture": values, "label": [p.parent.name for p in paths]})
    made.cast_column("picture", datasets.Image(decode=False)).to_parquet(str(tmp_path / "a.parquet"))
    with refused(r"1 of 20 rows cannot be read: row 4 \(not an image\)"):
        open_data(str(tmp_path / "a.parquet"), IMAGE, PLAIN)
    data = open_data(str(tmp_path / "a.parquet"), IMAGE, PLAIN, skip_bad=True)
    assert data.class_names == tuple(sorted({p.parent.name for p in paths}))
    assert torch.equal(data.batch([5]).inputs["x"], open_data(str(images), IMAGE, PLAIN).batch([6]).inputs["x"])


def test_json_lines_and_csv(tmp_path: Path) -> None:
    two = (TensorSpec("x", "float32", ("batch", 2)), TensorSpec("w", "float32", ("batch",)))
    (tmp_path / "a.jsonl").write_text('{"x": [1, 2], "w": 0.5, "y": 1}\n{"x": [3, 4], "w": 1.5, "y": 0}\n')
    found = every(open_data(str(tmp_path / "a.jsonl"), two, None))
    assert found.inputs["x"].tolist() == [[1, 2], [3, 4]]
    assert found.inputs["w"].tolist() == [0.5, 1.5]
    (tmp_path / "a.csv").write_text("w,y\n0.5,1.25\n1.5,-2\n")
    found = every(open_data(str(tmp_path / "a.csv"), two[1:], None))
    assert found.targets is not None
    assert found.targets.tolist() == [1.25, -2.0]
    assert found.targets.dtype == torch.float32


def test_rows_of_a_table_that_do_not_fit_are_named(tmp_path: Path) -> None:
    two = (TensorSpec("x", "float32", ("batch", 2)),)
    rows = ('{"x": [1, 2], "y": 1}', '{"x": [1], "y": 1}', '{"x": null, "y": 1}', '{"x": [1, 2], "y": null}')
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with refused(
        r"3 of 4 rows cannot be read: row 1 \(x has 1 values, not \[2\]\), row 2 \(x is missing\), row 3 \(no label\)"
    ):
        open_data(str(tmp_path / "a.jsonl"), two, None)
    assert len(open_data(str(tmp_path / "a.jsonl"), two, None, skip_bad=True)) == 1


def test_columns_that_do_not_fit_are_refused(digits: Any, tmp_path: Path) -> None:
    table({"a": [1.0, 2.0], "b": [1, 2]}).to_parquet(str(tmp_path / "a.parquet"))
    with refused("has the columns a, b; none is the model's input x"):
        open_data(str(tmp_path / "a.parquet"), VECTOR, None)
    table({"x": digits[0][:3].tolist()}).to_parquet(str(tmp_path / "b.parquet"))
    with refused("the columns x, and no target"):
        open_data(str(tmp_path / "b.parquet"), VECTOR, None, labelled=True)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    table({"x": [1.0] * 50}).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:200])
    with refused("cannot be read as parquet"):
        open_data(str(tmp_path / "a.parquet"), VECTOR, None)


def test_parts_without_training_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = table({"x": [1.0]})
    datasets.DatasetDict(dev=part, test=part).save_to_disk(str(tmp_path / "parts"))
    with refused("has the parts dev, test, none of them for training"):
        open_data(str(tmp_path / "parts"), VECTOR, None)


def test_a_changed_table_is_another(tmp_path: Path) -> None:
    one = (TensorSpec("x", "float32", ("batch",)),)
    found = []
    for value in (1.0, 2.0):
        (tmp_path / "a.csv").write_text(f"x\n{value}\n")
        os.utime(tmp_path / "a.csv", (value, value))
        data = open_data(str(tmp_path / "a.csv"), one, None)
        found.append((data.fingerprint, float(data.batch([0]).inputs["x"])))
    assert found[0][0] != found[1][0]
    assert [v for _, v in found] == [1.0, 2.0]


# Texts


def test_a_text_a_line(lines: list[str], tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(lines), encoding="utf-8")
    data = open_data(str(tmp_path / "a.txt"), TEXT, {"tokenizer": str(tokenizer)})
    assert len(data) == len(lines)
    found = every(data)
    assert found.targets is None
    assert {n: tuple(t.shape) for n, t in found.inputs.items()} == {s.name: (len(lines), 12) for s in TEXT}
    import tokenizers

    ids = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(lines[1]).ids[:12]
    count = len(ids)
    assert found.inputs["input_ids"][1].tolist() == ids + [1] * (12 - count)
    assert found.inputs["attention_mask"][1].tolist() == [1] * count + [0] * (12 - count)
    with refused("without labels"):
        open_data(str(tmp_path / "a.txt"), TEXT, None, tokenizer=tokenizer, labelled=True)


def test_a_tokenizer_that_transformers_saved_does_the_same(lines: list[str], tokenizer: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"), pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(tmp_path / "saved")
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    ours, theirs = (
        every(open_data(str(tmp_path / "a.txt"), TEXT, None, tokenizer=place))
        for place in (tokenizer / "tokenizer.json", tmp_path / "saved")
    )
    for name in ours.inputs:
        assert torch.equal(ours.inputs[name], theirs.inputs[name])


def test_texts_by_class(lines: list[str], tokenizer: Path, tmp_path: Path) -> None:
    for i, line in enumerate(lines[:20]):
        place = tmp_path / "texts" / ("short" if len(line) < 60 else "long")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:02}.txt").write_text(line + "\n", encoding="utf-8")
    data = open_data(str(tmp_path / "texts"), TEXT, {"tokenizer": str(tokenizer)}, labelled=True)
    assert data.class_names == ("long", "short")
    targets = every(data).targets
    assert targets is not None
    assert targets.tolist() == sorted(int(len(line) < 60) for line in lines[:20])
    (tmp_path / "texts" / "long" / "zz.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "texts" / "short" / "zz.txt").write_text("")
    with refused(r"2 of 22 texts cannot be read: long/zz.txt \(not UTF-8\), short/zz.txt \(empty\)"):
        open_data(str(tmp_path / "texts"), TEXT, None, tokenizer=tokenizer)


def test_texts_in_a_table(lines: list[str], tokenizer: Path, tmp_path: Path) -> None:
    labels = ["ham", "spam"] * (len(lines) // 2)
    table({"text": lines[: len(labels)], "label": labels}).to_parquet(str(tmp_path / "a.parquet"))
    data = open_data(str(tmp_path / "a.parquet"), TEXT, None, tokenizer=tokenizer, class_names=("spam", "ham"))
    batch = data.batch([0, 1])
    assert batch.targets is not None
    assert batch.targets.tolist() == [1, 0]
    assert data.class_names == ("spam", "ham")


def test_a_line_that_is_no_utf8_is_named(lines: list[str], tokenizer: Path, tmp_path: Path) -> None:
    content = "\n".join(lines).encode() + b"\n\nna\xefve\n"
    (tmp_path / "a.txt").write_bytes(content)
    with refused(rf"1 of {len(lines) + 1} lines cannot be read: line {len(lines) + 2} \(not UTF-8\)"):
        open_data(str(tmp_path / "a.txt"), TEXT, None, tokenizer=tokenizer)


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n")
    with refused("the model came without a tokenizer"):
        open_data(str(tmp_path / "a.txt"), TEXT, None)
    with refused("does not exist"):
        open_data(str(tmp_path / "a.txt"), TEXT, {"tokenizer": str(tmp_path / "gone")})
    (tmp_path / "tokenizer.json").write_text("{}")
    with refused("cannot be read"):
        open_data(str(tmp_path / "a.txt"), TEXT, None, tokenizer=tmp_path)


def test_text_for_a_model_of_vectors_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n")
    with refused("not rows of token numbers of a fixed length"):
        open_data(str(tmp_path / "a.txt"), VECTOR, None, tokenizer=tokenizer)


def test_padding_that_is_read_as_text_is_said(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("some words\n")
    with caplog.at_level(logging.WARNING):
        open_data(str(tmp_path / "a.txt"), TEXT[:1], None, tokenizer=tokenizer)
    assert "takes no attention_mask" in caplog.text


def test_the_tokenizers_content_is_in_the_fingerprint(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n")
    shutil.copytree(tokenizer, tmp_path / "t")
    first, copied = (
        open_data(str(tmp_path / "a.txt"), TEXT, {"tokenizer": str(t)}).fingerprint for t in (tokenizer, tmp_path / "t")
    )
    assert first == copied
    text = (tmp_path / "t" / "tokenizer.json").read_text()
    (tmp_path / "t" / "tokenizer.json").write_text(text + " ")
    assert open_data(str(tmp_path / "a.txt"), TEXT, {"tokenizer": str(tmp_path / "t")}).fingerprint != first


# Functions

SOURCE = """
import numpy as np, torch
from diffusionblocks.converter.dataset import Batch

X, Y = np.arange(12, dtype=np.float32).reshape(3, 4), np.array([0, 1, 2])

def mapping(): return {"x": X, "y": Y}
def pair(): return torch.from_numpy(X), Y
def alone(): return X
def three(): return X, X, Y
def fails(): return 1 / 0
def words(): return {"x": ["a", "b"]}
def nothing(): return 5

class Own:
    names, class_names, fingerprint = ("x",), None, "own"
    def __len__(self): return 3
    def batch(self, rows): return Batch({"x": torch.from_numpy(X[list(rows)])}, torch.from_numpy(Y[list(rows)]))

class Breaks(Own):
    def batch(self, rows):
        if 1 in rows: raise KeyError("gone")
        return super().batch(rows)

class Wide(Own):
    def batch(self, rows): return Batch({"x": torch.zeros(len(rows), 5)}, None)

class Other(Own):
    names = ("z",)
"""
FOUR = (TensorSpec("x", "float32", ("batch", 4)),)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "made_data.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "made_data"
    sys.modules.pop("made_data", None)


@pytest.mark.parametrize("name", ["mapping", "pair", "Own"])
def test_a_function_returns_data(module: str, name: str) -> None:
    batch = open_data(f"{module}:{name}", FOUR, None, labelled=True).batch([2, 0])
    assert batch.inputs["x"].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [2, 0]
    assert open_data(f"{module}:{name}", FOUR, None, labelled=False).batch([0]).targets is None


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("alone", "returned no targets"),
        ("three", "returned 3 arrays; the model takes 1 inputs"),
        ("fails", r"fails\(\) failed: ZeroDivisionError"),
        ("words", "array of <U1"),
        ("nothing", "returned a int without names"),
        ("missing", "cannot be imported: AttributeError"),
        ("Wide", r"x float32 \[1, 5\] for"),
        ("Other", "data with the inputs z"),
        ("Breaks", r"1 of 3 rows cannot be read: row 1 \(.*batch\(\) failed for row 1: KeyError"),
    ],
)
def test_a_function_that_returns_no_data_is_named(module: str, name: str, match: str) -> None:
    with refused(match):
        open_data(f"{module}:{name}", FOUR, None, labelled=True)


def test_rows_a_function_cannot_read_are_left_out(module: str) -> None:
    assert len(open_data(f"{module}:Breaks", FOUR, None, skip_bad=True)) == 2


def test_a_module_that_does_not_exist_is_named() -> None:
    with refused("nowhere.at.all:f is no file, and cannot be imported"):
        open_data("nowhere.at.all:f", FOUR, None)


# Other things


def test_what_is_no_data_is_refused(images: Path, tmp_path: Path) -> None:
    with refused("does not exist"):
        open_data(str(tmp_path / "none"), VECTOR, None)
    (tmp_path / "empty").mkdir()
    with refused("holds no files"):
        open_data(str(tmp_path / "empty"), VECTOR, None)
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 9)
    with refused("of an unknown kind"):
        open_data(str(tmp_path / "a.bin"), VECTOR, None)
    (tmp_path / "b.bin").write_bytes(b"")
    with refused("is empty"):
        open_data(str(tmp_path / "b.bin"), VECTOR, None)
    with refused("a folder of images is read"):
        open_data(str(next(images.rglob("*.png"))), IMAGE, None)
    with refused("several kinds: 1 empty, 1 unknown|several kinds: 1 unknown, 1 empty"):
        open_data(str(tmp_path / "*.bin"), VECTOR, None)


def test_without_the_extra_it_is_named(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("datasets is not installed") as caught:
        open_data(str(images), IMAGE, PLAIN)
    assert install("data") in str(caught.value.hint)


def test_a_large_files_digest_reads_pieces_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "WHOLE", 1000)
    monkeypatch.setattr(content, "PIECE", 10)
    (tmp_path / "a").write_bytes(bytes(5000))
    read = sum(len(p) for p in content._pieces(tmp_path / "a", 5000))
    assert read == 10 * content.PIECES
    first = content.digest_files([("a", tmp_path / "a")])
    (tmp_path / "a").write_bytes(bytes(4999) + b"x")
    assert content.digest_files([("a", tmp_path / "a")]) != first


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((0, 4), np.float32))
    with pytest.raises(BadInput, match="holds no rows"):
        array_file(tmp_path / "x.npy", [TensorSpec("x", "float32", ("batch", 4))], None)
