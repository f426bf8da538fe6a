"""Bundles run by the torch-free runtime: equal to torch in both modes, one block open at a time, damage refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusionblocks.export import verify_bundle
from diffusionblocks.runtime import BadInput, BundleError, CheckFailed, open_bundle
from diffusionblocks.runtime.files import sha256_of

CONTEXTS = ("frozen", "carry", "stem")


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("batch", [1, 5])
def test_exact_is_the_original(bundles, trained_mlp, digits, context: str, batch: int) -> None:
    x = digits[0][1400 : 1400 + batch]
    with open_bundle(bundles[context][1]) as bundle:
        got = bundle.run(x, mode="exact")
    with torch.no_grad():
        expected = trained_mlp(torch.from_numpy(x)).numpy()
    assert got.shape == (batch, 10)
    assert _relative(got, expected) < 1e-4
    assert (got.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 13])
@pytest.mark.parametrize(("start", "read"), [("mean", "last"), ("mean", "mean"), ("noise", "last")])
def test_denoise_equals_torch(bundles, digits, context: str, steps: int, start: str, read: str) -> None:
    network, folder = bundles[context]
    x = digits[0][1400:1405]
    seen: list[tuple[int, int, float]] = []
    with open_bundle(folder) as bundle:
        got = bundle.run(
            x,
            "denoise",
            steps=steps,
            start=start,
            read=read,
            seed=3,
            callback=lambda k, b, s, p: seen.append((k, b, s)),
        )
    expected = network.denoise(torch.from_numpy(x), steps=steps, start=start, read=read, seed=3).numpy()
    assert got.dtype == np.float32
    assert _relative(got, expected) < 1e-4
    assert np.allclose(np.exp(got).sum(-1), 1, atol=1e-5)
    assert [k for k, _, _ in seen] == list(range(steps))
    assert [b for _, b, _ in seen] == sorted(b for _, b, _ in seen)
    assert all(s > 0 for _, _, s in seen)


def test_seed_reproduces_bit_for_bit_and_averages(bundles, digits) -> None:
    x = digits[0][1400:1404]
    with open_bundle(bundles["stem"][1]) as bundle:
        first, second, other = (bundle.run(x, "denoise", start="noise", seed=s) for s in (1, 1, 2))
        average = bundle.run(x, "denoise", start="noise", seed=1, average=4)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert np.allclose(np.exp(average).sum(-1), 1, atol=1e-5)


def test_one_block_is_open_at_a_time(bundles, digits) -> None:
    folder = bundles["frozen"][1]
    with open_bundle(folder) as bundle:
        bundle.run(digits[0][:2], "exact")
        exact = bundle.peak_weight_bytes
        bundle.run(digits[0][:2], "denoise", steps=7)
        denoise = bundle.peak_weight_bytes
        files = bundle.manifest.files
        block = max(files[b.block.file].bytes + b.block.bytes for b in bundle.manifest.blocks)
        assert block < sum(f.bytes for n, f in files.items() if n.endswith(".bin")) / 2
        small = sum(files[n].bytes for n in ("head.onnx", "head.bin", "target.onnx", "target.bin") if n in files)
    assert exact <= block
    assert denoise <= block + small


def test_memory_budget(bundles, digits) -> None:
    folder = bundles["frozen"][1]
    with pytest.raises(BadInput, match="below block_0") as error:
        open_bundle(folder, memory_budget="1KiB")
    smallest = int(str(error.value).split("--memory-budget ")[1].split()[0])
    with open_bundle(folder, memory_budget=smallest) as bundle, open_bundle(folder) as free:
        got, expected = (b.run(digits[0][:3], "denoise", steps=4) for b in (bundle, free))
        assert bundle.peak_weight_bytes <= smallest
    assert _relative(got, expected) < 1e-5  # row by row


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((2, 63), np.float32), r"\(N, 64\)"),
        (np.full((2, 64), np.nan, np.float32), "NaN"),
        (np.zeros((0, 64), np.float32), "no rows"),
        ({"image": np.zeros((2, 64), np.float32)}, "takes input"),
        (np.zeros((2, 64), np.int64), "int64"),
    ],
)
def test_bad_inputs(bundles, inputs, message: str) -> None:
    with open_bundle(bundles["frozen"][1]) as bundle, pytest.raises(BadInput, match=message):
        bundle.run(inputs, "exact")


def test_float64_and_the_name_x_are_understood(bundles, digits) -> None:
    x = digits[0][:2]
    with open_bundle(bundles["frozen"][1]) as bundle:
        expected = bundle.run(x, "exact")
        assert np.array_equal(bundle.run({"x": x.astype(np.float64)}, "exact"), expected)


@pytest.mark.parametrize("context", CONTEXTS)
def test_graphs_open_alone_in_any_tool(bundles, context: str) -> None:
    folder = bundles[context][1]
    for path in sorted(folder.glob("*.onnx")):
        onnx.checker.check_model(str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert all(i.shape[0] == "batch" for i in session.get_inputs() if not i.name.startswith("weight."))
        said = {p.key for p in onnx.load(path, load_external_data=False).metadata_props}
        assert all(key.startswith("diffusionblocks.") for key in said)  # and no stack traces
        assert bool(said) != path.name.startswith("structure_")


def test_context_and_block_share_their_bytes(bundles) -> None:
    """`adaln` keeps the original weights, so one .bin serves both graphs."""
    network, folder = bundles["frozen"]
    for b in range(3):
        distinct = sum(p.numel() * 4 for p in network.blocks[b].module.parameters())
        tensors = 2 * len(list(network.blocks[b].module.parameters()))
        assert (folder / f"block_{b:02d}.bin").stat().st_size <= distinct + 4096 * tensors
        offsets = [_offsets(folder / f"{kind}_{b:02d}.onnx") for kind in ("context", "block")]
        assert offsets[0] <= offsets[1]


def _offsets(path: Path) -> set[tuple[str, str]]:
    model = onnx.load(path, load_external_data=False)
    entries = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    assert all(int(e["offset"]) % (4096 if int(e["length"]) >= 4096 else 64) == 0 for e in entries)
    return {(e["location"], e["offset"]) for e in entries}


@pytest.fixture
def copy(bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["frozen"][1], tmp_path / "copy.dblocks"))


def test_a_missing_truncated_or_altered_file_is_refused(copy: Path, digits) -> None:
    weights = copy / "block_01.bin"
    data = weights.read_bytes()
    for content, message in (
        (None, "missing"),
        (data[:-10], "bytes; the manifest says"),
        (data[:-1] + b"\x01", "altered"),
    ):
        weights.unlink(missing_ok=True)
        if content is not None:
            weights.write_bytes(content)
        with pytest.raises(BundleError, match=rf"block_01.bin.*{message}"):
            verify_bundle(copy)
        with open_bundle(copy) as bundle, pytest.raises(BundleError, match=message):
            bundle.run(digits[0][:2], "denoise")


def test_wrong_numbers_fail_the_check(copy: Path) -> None:
    """An altered weight with its hash put right: only the numbers tell."""
    weights = copy / "block_02.bin"
    data = bytearray(weights.read_bytes())
    data[:4096] = np.frombuffer(bytes(data[:4096]), np.float32).__mul__(np.float32(3)).tobytes()
    weights.write_bytes(data)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["block_02.bin"]["sha256"] = sha256_of(weights)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckFailed, match="relative difference"):
        verify_bundle(copy).raise_for_failures()


def test_links_and_unsafe_names_are_refused(copy: Path, digits, tmp_path: Path) -> None:
    outside = tmp_path / "outside.bin"
    (copy / "head.bin").rename(outside)
    (copy / "head.bin").symlink_to(outside)
    with open_bundle(copy) as bundle, pytest.raises(BundleError, match="link"):
        bundle.run(digits[0][:1], "exact")
    for name in ("../outside.bin", "/etc/passwd", "a\\b.bin", "c:x.bin"):
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["head"]["weights"] = name
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match="plain path"):
            open_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=99), "format 99"),
        (lambda m: m.update(surprise=1), "unknown: surprise"),
        (lambda m: m.pop("stem"), "missing: stem"),
        (lambda m: m.update(blocks=[]), "numbered"),
        (lambda m: m["schedule"].update(edges=[1, 2, 3, 4]), "descending"),
        (lambda m: m.update(trained="yes"), "expected bool"),
        (lambda m: m["decoding"].update(mode="guess"), "guess"),
    ],
)
def test_a_damaged_manifest_is_refused(copy: Path, change, message: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100000])
def test_no_json_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError):
        open_bundle(copy)


def test_cuda_without_a_provider_is_an_error(bundles) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    with pytest.raises(BadInput, match=r"no CUDA provider[\s\S]*\[gpu\]"):
        open_bundle(bundles["frozen"][1], device="cuda")


@pytest.mark.gpu
def test_cuda_equals_cpu(bundles, digits) -> None:
    results = []
    for device in ("cpu", "cuda"):
        with open_bundle(bundles["frozen"][1], device=device) as bundle:
            results.append(bundle.run(digits[0][:5], "denoise"))
    assert _relative(results[1], results[0]) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("context", CONTEXTS)
def test_cuda_fills_one_place_while_the_other_computes(bundles, digits, context: str) -> None:
    """Two places for each structure, taken once, and the same bits with and without reading ahead."""
    results = []
    for prefetch in (True, False):
        with open_bundle(bundles[context][1], device="cuda", prefetch=prefetch) as bundle:
            results += [bundle.run(digits[0][:5], mode) for mode in ("exact", "denoise", "exact", "denoise")]
            assert bundle._sessions._slots.made <= 2 * len({g.structure for g in bundle.manifest.graphs()})
    assert all(np.array_equal(a, b) for a, b in zip(results[:4], results[4:], strict=True))


def test_runtime_needs_neither_torch_nor_onnx(bundles, digits, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", digits[0][:3])
    program = f"""
import sys
for name in ("torch", "onnx", "onnxscript", "safetensors"):
    sys.modules[name] = None
import numpy as np
from diffusionblocks.runtime import open_bundle
with open_bundle({str(bundles["frozen"][1])!r}) as bundle:
    print(bundle.run(np.load({str(tmp_path / "x.npy")!r}), "denoise").shape, bundle.run(np.load({str(tmp_path / "x.npy")!r}), "exact").shape)
from diffusionblocks.converter.cli import main
main(["run", {str(bundles["frozen"][1])!r}, "--input", {str(tmp_path / "x.npy")!r}, "--output", {str(tmp_path / "y.npy")!r}])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(3, 10) (3, 10)"
    assert np.load(tmp_path / "y.npy").shape == (3, 10)


def test_asking_for_steps_is_asking_to_denoise(bundles, digits, tmp_path) -> None:
    """A bundle whose default is exact denoises when something of the sampler is asked for, and not otherwise."""
    bundle_path = tmp_path / "b"
    shutil.copytree(bundles["frozen"][1], bundle_path)
    manifest_file = bundle_path / "manifest.json"
    data = json.loads(manifest_file.read_text())
    data["decoding"]["mode"] = "exact"
    manifest_file.write_text(json.dumps(data))
    x = digits[0][:3]
    with open_bundle(bundle_path) as bundle:
        assert np.array_equal(bundle.run(x), bundle.run(x, mode="exact"))
        assert np.array_equal(bundle.run(x, steps=4), bundle.run(x, mode="denoise", steps=4))
        assert np.array_equal(bundle.run(x, read="mean"), bundle.run(x, mode="denoise", read="mean"))
