"""Zeros without memory."""

from __future__ import annotations

import pytest
import torch
from diffusionblocks.converter.blank import ALIGNMENT, blank
from diffusionblocks.runtime.memory import peak_resident, restart_peak
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_they_are_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = blank(shape, dtype)
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
    assert made.dtype == dtype
    assert made.is_contiguous()
    assert made.numel() == 0 or made.data_ptr() % ALIGNMENT == 0


def test_they_take_memory_when_they_are_written_to() -> None:
    restart_peak()
    before = peak_resident()
    if before is None:
        pytest.skip("the system does not say what is resident")
    made = blank((64 << 20,))
    assert not made[:1000].any()
    assert peak_resident() - before < 8 << 20
    made[: 16 << 20] = 1
    assert peak_resident() - before > 48 << 20
    assert made.sum() == 16 << 20


def test_elsewhere_they_are_torchs() -> None:
    with torch.device("meta"):
        assert blank((2, 3)).is_meta
    with FakeTensorMode():
        assert isinstance(blank((2, 3)), FakeTensor)
