"""Bundles in float16: half the bytes, about the numbers, and what must stay float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusionblocks.converter.cli import main
from diffusionblocks.export import export_bundle, verify_bundle
from diffusionblocks.export.half import halved
from diffusionblocks.runtime import BadInput, manifest, open_bundle


@pytest.fixture(scope="module")
def half(bundles, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("half")
    return {c: export_bundle(bundles[c][0], folder / c, dtype="float16") for c in ("frozen", "stem")}


@pytest.mark.parametrize("context", ["frozen", "stem"])
def test_float16_has_half_the_bytes_and_about_the_numbers(half, bundles, digits, context: str) -> None:
    folder, x = half[context], digits[0][1400:1440]
    assert verify_bundle(folder).ok
    sizes = [sum(b.block.bytes for b in manifest.read(f).blocks) for f in (folder, bundles[context][1])]
    assert 0.5 <= sizes[0] / sizes[1] < 0.51
    for mode in ("exact", "denoise"):
        results = []
        for path in (folder, bundles[context][1]):
            with open_bundle(path) as bundle:
                results.append(bundle.run(x, mode))
        assert 0 < np.abs(results[0] - results[1]).max() / np.abs(results[1]).max() < 1e-2
        assert results[0].dtype == np.float32
        assert (results[0].argmax(-1) == results[1].argmax(-1)).mean() > 0.97


def test_the_sampling_step_and_the_noise_level_stay_float32(half) -> None:
    records = manifest.read(half["frozen"])
    assert records.dtype == "float16"
    assert {t.dtype for t in records.target.graph.tensors} <= {"float32", "int64"}
    assert {t.dtype for t in records.blocks[0].block.tensors} == {"float16"}
    model = onnx.load(half["frozen"] / records.blocks[0].block.structure, load_external_data=False)
    kinds = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*kinds.value_info, *kinds.input, *kinds.output)}
    sines = [n for n in kinds.node if n.op_type in ("Sin", "Cos")]
    assert sines
    assert all(types[n.input[0]] == onnx.TensorProto.FLOAT for n in sines)
    assert any(
        types.get(n.output[0]) == onnx.TensorProto.FLOAT16 for n in kinds.node if n.op_type in ("MatMul", "Gemm")
    )


def test_large_weights_become_the_largest_and_no_other_type_is_known(bundles, tmp_path: Path) -> None:
    given = torch.tensor([1e6, -1e6, float("inf"), float("-inf"), 0.1])
    assert halved(given).tolist() == [65504.0, -65504.0, float("inf"), float("-inf"), pytest.approx(0.1, rel=1e-3)]
    with pytest.raises(BadInput, match="bfloat16"):
        export_bundle(bundles["frozen"][0], tmp_path / "b", dtype="bfloat16")
    assert not (tmp_path / "b").exists()


@pytest.mark.road
@pytest.mark.parametrize("said", ["fp16", "float16"])
def test_the_command_writes_float16(program_file: Path, tmp_path: Path, said: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(program_file), "--out", str(tmp_path / "b"), "--num-blocks", "2", "--deploy", "--dtype", said])
    assert end.value.code == 0
    assert manifest.read(tmp_path / "b").dtype == "float16"
