"""What a trained network is worth on rows it was not trained on, in each mode: it decides what ``run`` does by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.runtime.manifest import Decoding
from torch.nn import functional as F

FEWEST, MOST, CHUNK = 20, 2000, 256
Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class ModeResult:
    """One mode on ``rows`` held-out rows: ``accuracy`` in [0, 1], ``cross_entropy`` in nats."""

    mode: str
    accuracy: float
    cross_entropy: float
    rows: int


@dataclass(frozen=True)
class Comparison:
    """The modes a bundle has, ``exact`` first, and the one that is better on held-out rows."""

    results: tuple[ModeResult, ...]
    better: str

    def to_json(self) -> dict[str, Any]:
        return {"results": [asdict(r) for r in self.results], "better": self.better}

    def describe(self) -> str:
        """One line for a person."""
        parts = [f"{r.mode} {100 * r.accuracy:.1f} %, {r.cross_entropy:.4f} nats" for r in self.results]
        line = f"On {self.results[0].rows} held-out rows: {'; '.join(parts)}."
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


def compare_modes(
    network: ConvertedNetwork, inputs: Arrays, labels: np.ndarray[Any, Any], decoding: Decoding
) -> Comparison:
    """:func:`compare_on` of arrays."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
    return compare_on(network, tensors, torch.from_numpy(np.asarray(labels, np.int64)), decoding)


def compare_on(
    network: ConvertedNetwork, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, decoding: Decoding
) -> Comparison:
    """Both modes on held-out rows; ``denoise`` is better where its cross-entropy is lower by more than a standard error of the rows' differences."""
    losses: dict[str, torch.Tensor] = {}
    results = []
    truth = labels.long()
    for mode in ("exact", "denoise") if _answers_the_labels(network) else ("denoise",):
        logits = torch.cat(
            [
                _logits(network, {k: t[i : i + CHUNK] for k, t in inputs.items()}, mode, decoding)
                for i in range(0, len(truth), CHUNK)
            ]
        )
        losses[mode] = F.cross_entropy(logits.double(), truth, reduction="none")  # [N]
        accuracy = float((logits.argmax(-1) == truth).double().mean())
        results.append(ModeResult(mode, accuracy, float(losses[mode].mean()), len(truth)))
    if "exact" not in losses:
        return Comparison(tuple(results), "denoise")
    gain = losses["exact"] - losses["denoise"]
    error = gain.std() / len(gain) ** 0.5
    return Comparison(tuple(results), "denoise" if bool(gain.mean() > error) else "exact")


def _answers_the_labels(network: ConvertedNetwork) -> bool:
    """Whether the original is kept, and answers for the classes the blocks learn."""
    return not network.settings.scratch and not network.settings.new_labels


def _logits(network: ConvertedNetwork, batch: dict[str, torch.Tensor], mode: str, decoding: Decoding) -> torch.Tensor:
    if mode == "exact":
        return network.exact(batch)[0].float()
    return network.denoise(batch, steps=decoding.steps, start=decoding.start, read=decoding.read)


def choose(decoding: Decoding, comparison: Comparison) -> Decoding:
    """The decoding with the better mode as its default."""
    return replace(decoding, mode=comparison.better)
