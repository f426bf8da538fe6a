"""Accuracy, cross-entropy and calibration of log-probabilities [N, K] against labels [N]."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def accuracy(log_probabilities: Array, labels: Array) -> float:
    """Share of rows whose largest entry is the label."""
    return float((log_probabilities.argmax(-1) == labels).mean())


def cross_entropy(log_probabilities: Array, labels: Array) -> float:
    """Mean negative log-probability of the label, in nats."""
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def calibration_error(log_probabilities: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| over equal-width bins of the top probability, weighted by their rows."""
    confidence = np.exp(log_probabilities.max(-1))
    right = log_probabilities.argmax(-1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[index == b].sum() - confidence[index == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(labels))


def measure(log_probabilities: Array, labels: Array) -> dict[str, float]:
    """The three of them."""
    return {
        "accuracy": accuracy(log_probabilities, labels),
        "cross_entropy": cross_entropy(log_probabilities, labels),
        "ece": calibration_error(log_probabilities, labels),
    }
