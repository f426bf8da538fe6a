"""The benchmark's metrics on cases worked out by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

_path = Path(__file__).parent.parent / "benchmarks" / "metrics.py"
_spec = importlib.util.spec_from_file_location("metrics", _path)
assert _spec is not None
assert _spec.loader is not None
metrics = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(metrics)


def test_accuracy_and_cross_entropy() -> None:
    p = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    labels = np.array([0, 2])
    assert metrics.accuracy(p, labels) == 0.5
    assert metrics.cross_entropy(p, labels) == pytest.approx((np.log(2) + np.log(10)) / 2)


def test_calibration_error() -> None:
    p = np.log(np.tile([0.75, 0.25], (4, 1)))
    assert metrics.calibration_error(p, np.array([0, 0, 0, 1])) == pytest.approx(0.0)
    assert metrics.calibration_error(p, np.array([1, 1, 1, 1])) == pytest.approx(0.75)


def test_calibration_does_not_average_away_opposite_gaps() -> None:
    p = np.log([[0.6, 0.4], [0.9, 0.1]])
    assert metrics.calibration_error(p, np.array([0, 1])) == pytest.approx((0.4 + 0.9) / 2)
