"""What a trained network is worth on rows it was not trained on, in each mode: it decides what ``run`` does by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.dataset import Dataset, Subset
from diffusionblocks.converter.generation import compared
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.runlog import spoken
from diffusionblocks.converter.targets import averaged, chunk_of
from diffusionblocks.runtime.manifest import Decoding

FEWEST, MOST = 20, 2000
FEW_IMAGES = 256
"""Of a diffusion model: every row costs the whole network once for each block."""
Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class ModeResult:
    """One mode on ``rows`` held-out rows; ``scores``: the target's figures of merit, such as ``accuracy`` in [0, 1] and ``cross_entropy`` in nats."""

    mode: str
    scores: dict[str, float]
    rows: int

    def to_json(self) -> dict[str, Any]:
        return {"mode": self.mode, **self.scores, "rows": self.rows}


@dataclass(frozen=True)
class Comparison:
    """The modes a bundle has, ``exact`` first, and the one that is better on held-out rows; ``taught``: against the original's own output, which ``exact`` is."""

    results: tuple[ModeResult, ...]
    better: str
    taught: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"results": [r.to_json() for r in self.results], "better": self.better}

    def describe(self) -> str:
        """One line for a person."""
        parts = [f"{r.mode} {spoken(r.scores)}" for r in self.results]
        against = ", against the original's own output" if self.taught else ""
        line = f"On {self.results[0].rows} held-out rows{against}: {'; '.join(parts)}."
        if self.taught:
            return f"{line} run uses exact, which is that output, unless --mode says otherwise."
        if len(self.results) == 1:
            return line
        if self.better == "exact":
            return f"{line} denoise is not better here, so that run uses exact unless --mode says otherwise."
        return f"{line} run uses denoise unless --mode says otherwise."


def split_rows(count: int, share: float, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Indices to train on and to hold out (at most 2,000; none where they were fewer than 20), both ascending."""
    held = min(int(share * count), MOST)
    if held < FEWEST:
        return np.arange(count), np.arange(0)
    order = np.random.default_rng([seed, count]).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def too_few_held(count: int) -> str:
    """What is said where :func:`split_rows` holds no row out although it was to."""
    return (
        f"Of {count:,} rows fewer than {FEWEST} would be held out, so none is: the two modes are not compared, and run denoises. "
        "A larger --holdout compares them."
    )


def compare_modes(
    network: ConvertedNetwork, inputs: Arrays, labels: np.ndarray[Any, Any] | None, decoding: Decoding
) -> Comparison:
    """:func:`compare_on` of arrays."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
    return compare_on(network, tensors, None if labels is None else torch.from_numpy(np.asarray(labels)), decoding)


def compare_on(
    network: ConvertedNetwork, inputs: Mapping[str, torch.Tensor], y: torch.Tensor | None, decoding: Decoding
) -> Comparison:
    """Both modes on held-out rows; ``denoise`` is better where it is wrong by less, by more than a standard error of the rows' differences.

    Without y ``denoise`` is held against the original's own output, and never better.
    """
    target = network.require_target()
    taught = y is None
    modes = ("exact", "denoise") if _answers_the_labels(network) else ("denoise",)
    losses: dict[str, list[torch.Tensor]] = {mode: [] for mode in modes}
    scores: dict[str, list[tuple[int, dict[str, float]]]] = {mode: [] for mode in modes}
    count = len(next(iter(inputs.values())))
    step = chunk_of(target)
    for start in range(0, count, step):
        batch = {k: t[start : start + step] for k, t in inputs.items()}
        found = {mode: _prediction(network, batch, mode, decoding) for mode in modes}
        truth = target.decided(found["exact"]) if y is None else y[start : start + step]
        for mode in modes:
            prediction = target.read(found[mode]) if mode == "exact" else found[mode]
            losses[mode].append(target.row_losses(prediction, truth))
            scores[mode].append((len(truth), target.scores(prediction, truth)))
    results = tuple(
        ModeResult(mode, averaged(scores[mode]), count) for mode in modes if not (taught and mode == "exact")
    )
    if "exact" not in losses:
        return Comparison(results, "denoise")
    gain = torch.cat(losses["exact"]) - torch.cat(losses["denoise"])
    error = gain.std() / len(gain) ** 0.5
    return Comparison(results, "denoise" if not taught and bool(gain.mean() > error) else "exact", taught)


def compare_rows(network: ConvertedNetwork, data: Dataset, decoding: Decoding) -> Comparison:
    """The modes on all rows of a dataset."""
    if network.require_target().enters:
        return compare_images(network, data)
    batch = data.batch(range(len(data)))
    return compare_on(network, batch.inputs, batch.targets, decoding)


def compare_images(network: ConvertedNetwork, data: Dataset) -> Comparison:
    """The blocks of a diffusion model, or of a masked language model, against the original, each on its own noise levels: mean losses, which have no say in the mode, since a block costs a B-th of a step."""
    rows = min(len(data), FEW_IMAGES)
    found = compared(network, Subset(data, np.arange(rows)))
    modes = ("denoise",) if network.settings.scratch else ("exact", "denoise")
    results = tuple(ModeResult(mode, {"loss": found[mode]["loss"]}, rows) for mode in modes)
    return Comparison(results, "denoise")


def _prediction(
    network: ConvertedNetwork, batch: dict[str, torch.Tensor], mode: str, decoding: Decoding
) -> torch.Tensor:
    """The network's first output in the mode ``exact``, or the sampler's prediction."""
    if mode == "exact":
        return network.exact(batch)[0].float()
    return network.denoise(batch, steps=decoding.steps, start=decoding.start, read=decoding.read)


def _answers_the_labels(network: ConvertedNetwork) -> bool:
    """Whether the original is kept, and answers for the classes the blocks learn."""
    return not network.settings.scratch and not network.settings.new_labels


def choose(decoding: Decoding, comparison: Comparison) -> Decoding:
    """The decoding with the better mode as its default."""
    return replace(decoding, mode=comparison.better)
