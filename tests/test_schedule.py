"""Noise levels: the paper's edges, the information table, sampling steps, EDM's preconditioning."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.errors import BadInput


def test_edges_of_the_paper() -> None:
    assert schedule.equal_probability_edges(3)[1:-1] == pytest.approx((0.505, 0.1796), rel=1e-3)
    assert schedule.equal_probability_edges(4)[1:-1] == pytest.approx((0.6766, 0.3012, 0.1341), rel=1e-3)


def test_high_sigma_goes_to_the_first_layers() -> None:
    edges = schedule.equal_probability_edges(3)
    assert edges[0] == 80.0
    assert edges[-1] == 0.002
    assert [schedule.block_of(s, edges) for s in (80.0, 1.0, 0.3, 0.05)] == [0, 0, 1, 2]


def test_an_edge_belongs_to_the_lower_sigma_block() -> None:
    edges = schedule.equal_probability_edges(3)
    assert schedule.block_of(edges[1], edges) == 1
    assert schedule.block_of(edges[1] * 1.0001, edges) == 0


def _rows(count: int, dim: int) -> np.ndarray:
    rows = np.random.default_rng(1).standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("count", "dim", "sigmas"), [(10, 64, (0.215, 0.441, 0.722, 4.48)), (100, 192, (0.199, 0.363, 0.562, 3.16))]
)
def test_information_edges_of_random_rows(count: int, dim: int, sigmas: tuple[float, ...]) -> None:
    edges, _ = schedule.equal_information_edges(_rows(count, dim), 3)
    assert list(edges) == sorted(edges, reverse=True)
    shares = schedule.information_share(_rows(count, dim), sorted(sigmas))
    assert shares == pytest.approx((0.99, 2 / 3, 1 / 3, 0.01), abs=0.05)


def test_information_is_monotone_and_bounded() -> None:
    shares = schedule.information_share(_rows(10, 16), np.geomspace(0.01, 100, 30), samples=500)
    assert (np.diff(shares) <= 0).all()
    assert shares[0] == pytest.approx(1.0, abs=1e-6)
    assert shares[-1] < 0.01


@pytest.mark.parametrize("kind", ["log-normal", "information"])
def test_densities_stay_in_their_interval_and_round_trip(kind: str) -> None:
    edges, curve = schedule.equal_information_edges(_rows(10, 16), 3)
    density = (
        curve.between(edges[1], edges[2]) if kind == "information" else schedule.LogNormalDensity(0.5, 0.1, -1.2, 1.2)
    )
    u = np.linspace(0, 1, 101)[:-1]
    sigma = density.sigma(u)
    assert sigma.min() >= density.lower
    assert sigma.max() <= density.upper
    assert len(np.unique(sigma)) > 90
    assert np.array_equal(schedule.density_from_json(density.to_json()).sigma(u), sigma)


def test_information_density_is_uniform_in_the_share() -> None:
    edges, curve = schedule.equal_information_edges(_rows(10, 16), 2)
    sigma = np.sort(curve.sigma((np.arange(400) + 0.5) / 400))
    inside = np.mean(sigma > edges[1])
    assert inside == pytest.approx(0.5, abs=0.01)


def test_widening_is_clipped_and_symmetric_in_log_sigma() -> None:
    upper, lower = schedule.widen(0.4, 0.1, 0.05, 80.0, 0.002)
    assert upper / 0.4 == pytest.approx(4**0.05)
    assert 0.1 / lower == pytest.approx(4**0.05)
    assert schedule.widen(80.0, 1.0, 0.1, 80.0, 0.002)[0] == 80.0


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 12])
def test_sampling_steps(steps: int) -> None:
    edges = (8.0, 2.0, 0.5, 0.1)
    plan = schedule.sampling_steps(edges, steps)
    assert len(plan) == steps
    assert plan[0].sigma == 8.0
    assert plan[-1].sigma_next == 0.0
    assert all(s.sigma > s.sigma_next for s in plan)
    assert all(a.sigma_next == pytest.approx(b.sigma) for a, b in pairwise(plan))
    counts = [sum(s.block == b for s in plan) for b in range(3)]
    base, extra = divmod(steps, 3)
    assert counts == [base + (b < extra) for b in range(3)]
    assert all(edges[s.block] >= s.sigma > edges[s.block + 1] for s in plan)


def test_no_steps_are_refused() -> None:
    with pytest.raises(BadInput, match="0 denoising steps"):
        schedule.sampling_steps((2.0, 1.0), 0)


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_edm_preconditioning_serves_arrays_and_tensors(make) -> None:
    sigma, data = make([0.1, 1.0, 10.0]), 0.5
    identity = schedule.c_skip(sigma, data) ** 2 * (data**2 + sigma**2) + (schedule.c_out(sigma, data)) ** 2 - data**2
    assert float(abs(identity).max()) < 1e-6
    assert float(abs(schedule.c_in(sigma, data) ** 2 * (sigma**2 + data**2) - 1).max()) < 1e-6
    assert schedule.edm_weight(sigma, data).shape == sigma.shape
    assert float(abs(schedule.edm_weight(sigma, data) * schedule.c_out(sigma, data) ** 2 - 1).max()) < 1e-6


def test_euler_reaches_the_denoised_point_at_zero() -> None:
    z, d = np.array([3.0, -1.0]), np.array([1.0, 1.0])
    assert np.allclose(schedule.euler_step(z, d, 2.0, 0.0), d)
