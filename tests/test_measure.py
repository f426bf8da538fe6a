"""Held-out rows decide which mode ``run`` uses by default."""

from __future__ import annotations

import numpy as np
import pytest
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.measure import Comparison, ModeResult, choose, compare_modes, split_rows
from diffusionblocks.converter.parts import default_decoding


@pytest.mark.parametrize(
    ("count", "share", "held"), [(1000, 0.05, 50), (100_000, 0.05, 2000), (100, 0.05, 0), (1000, 0.0, 0)]
)
def test_rows_are_split_without_overlap(count: int, share: float, held: int) -> None:
    kept, out = split_rows(count, share, seed=0)
    assert len(out) == held
    assert sorted([*kept, *out]) == list(range(count))
    assert np.array_equal(out, split_rows(count, share, seed=0)[1])


def test_another_seed_holds_out_other_rows() -> None:
    assert not np.array_equal(split_rows(1000, 0.1, seed=0)[1], split_rows(1000, 0.1, seed=1)[1])


def test_a_network_that_learned_nothing_new_runs_exact(trained_mlp, digits) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2)
    finetune(network, digits[0][:200], digits[1][:200], steps=1, lr=1e-6)
    rows = slice(1400, 1700)
    found = compare_modes(
        network, {network.input_names[0]: digits[0][rows]}, digits[1][rows], default_decoding(network)
    )
    assert found.better == "exact"
    assert choose(default_decoding(network), found).mode == "exact"
    assert "uses exact" in found.describe()


def test_a_network_fine_tuned_to_new_labels_denoises(trained_mlp, digits) -> None:
    x, y = digits[0], (digits[1] + 3) % 10
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2)
    finetune(network, x[:1400], y[:1400], steps=150, lr=2e-3)
    found = compare_modes(network, {network.input_names[0]: x[1400:]}, y[1400:], default_decoding(network))
    by_mode = {r.mode: r for r in found.results}
    assert by_mode["denoise"].scores["accuracy"] > 0.8 > 0.3 > by_mode["exact"].scores["accuracy"]
    assert found.better == "denoise"
    assert "uses denoise" in found.describe()


def test_from_scratch_there_is_one_mode(trained_mlp, digits) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2, context="stem", scratch=True)
    finetune(network, digits[0][:200], digits[1][:200], steps=1)
    rows = {network.input_names[0]: digits[0][:50]}
    found = compare_modes(network, rows, digits[1][:50], default_decoding(network))
    assert [r.mode for r in found.results] == ["denoise"]
    assert choose(default_decoding(network), found).mode == "denoise"


def test_a_comparison_is_plain_data() -> None:
    found = Comparison(
        (
            ModeResult("exact", {"accuracy": 0.5, "cross_entropy": 1.0}, 20),
            ModeResult("denoise", {"accuracy": 0.75, "cross_entropy": 0.5}, 20),
        ),
        "denoise",
    )
    assert found.to_json()["results"][1] == {"mode": "denoise", "accuracy": 0.75, "cross_entropy": 0.5, "rows": 20}
