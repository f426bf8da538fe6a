"""Families of text models from scratch, each against the same network trained whole: causal, masked diffusion, recurrent depth.

    python benchmarks/families_text.py run [--seeds 0 1 2] [--families masked]     # resumable: each measurement is a JSON file in benchmarks/.cache/families_text; two may run at once
    python benchmarks/families_text.py report                  # the tables, as Markdown

Windows of 64 bytes of Python's documentation (Debian's python3.11-doc). Six layers of width 64, B = 3 blocks; of recurrent depth one layer applied K = 8 times. 3,000 updates of batch 32, end to end or
of each block, rate 2e-3. "Causal": nats per byte on 2,000 test windows, for blocks of the sampler from z = 0 (the mean over the steps, and the last step); and what a 6-gram model of the training
text gives for 500 windows that were generated at temperature 1, also in nats per byte (the real text's own is beside it). "Masked": the ELBO in bits per byte on the same windows, 4 draws a
block. "Recurrent": nats per byte at several numbers of applications, and floating-point operations of one update as torch counts them.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import new_classes
import new_text
import numpy as np
import torch
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.dataset import ArrayDataset
from diffusionblocks.converter.generation import losses_of
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.residence import Residence
from models import GPT, TransformerLayer
from new_classes import _spread
from new_text import LENGTH, loss_of, windows
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

CACHE = Path(__file__).parent / ".cache" / "families_text"
TEXT = "documentation"
SEEDS, BATCH, UPDATES, RATE, BLOCKS = (0, 1, 2), 32, 3000, 2e-3, 3
BYTES, HIDDEN, TIMES, ORDER = 128, 128, 8, 6
METHODS = (
    "causal end to end",
    "causal blocks",
    "masked end to end",
    "masked blocks",
    "recurrent end to end",
    "recurrent one pass",
    "recurrent applied once",
)
FAMILIES = list(dict.fromkeys(method.split()[0] for method in METHODS))


class MaskedGPT(GPT):
    """The same layers, each seeing the whole window; the token 128 is hidden. Positions are as large as tokens: no causal mask tells them, and it takes long to find small ones."""

    def __init__(self) -> None:
        super().__init__(BYTES, length=LENGTH)
        self.embedding = nn.Embedding(BYTES + 1, 64)
        self.position = nn.Parameter(torch.randn(LENGTH, 64))
        self.layers = nn.Sequential(*(TransformerLayer(64, 4, causal=False) for _ in range(6)))


class LoopedGPT(GPT):
    """One layer, applied ``times`` times."""

    def __init__(self, times: int) -> None:
        super().__init__(BYTES, length=LENGTH, depth=1)
        self.times = times

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position
        for _ in range(self.times):
            x = self.layers(x)
        return self.head(self.norm(x))


def made(kind: type[nn.Module], seed: int, *arguments: Any) -> Any:
    torch.manual_seed(seed)
    return kind(*arguments)


def trained(model: nn.Module, seed: int, **settings: Any) -> ConvertedNetwork:
    text = windows(TEXT, "train")
    network = convert(model.eval(), (text[:3],), scratch=True, context="stem", seed=seed, **settings)
    finetune(network, text.numpy(), steps=UPDATES, batch_size=BATCH, lr=RATE, seed=seed)
    return network


def whole(model: nn.Module, seed: int) -> nn.Module:
    new_text.fit(model.train(), windows(TEXT, "train"), UPDATES, RATE, seed)
    return model.eval()


def test_nats(predict: Any) -> float:
    return new_text.nats(predict, TEXT, "test")


class Ngrams:
    """Bytes by the five before them, interpolated with shorter contexts (Witten and Bell 1991)."""

    def __init__(self, text: np.ndarray) -> None:
        self.counts: list[defaultdict[bytes, Counter[int]]] = [defaultdict(Counter) for _ in range(ORDER)]
        raw = text.astype(np.uint8).tobytes()
        for i in range(ORDER, len(raw)):
            for n in range(ORDER):
                self.counts[n][raw[i - n : i]][raw[i]] += 1

    def nats(self, text: bytes) -> float:
        """Mean over the bytes that have five before them."""
        total = 0.0
        for i in range(ORDER - 1, len(text)):
            p = 1 / BYTES
            for n in range(ORDER):
                seen = self.counts[n].get(text[i - n : i])
                if seen:
                    count, kinds = sum(seen.values()), len(seen)
                    p = (seen[text[i]] + kinds * p) / (count + kinds)
            total -= math.log(p)
        return total / (len(text) - ORDER + 1)


@cache
def judge() -> Ngrams:
    return Ngrams(new_text.corpus(TEXT)["train"].numpy())


@torch.no_grad()
def generated(predict: Any, rows: int = 500) -> torch.Tensor:
    """Windows that begin with the first byte of test windows."""
    tokens = torch.zeros(rows, LENGTH, dtype=torch.long)
    tokens[:, 0] = windows(TEXT, "test", rows)[:, 0]
    generator = torch.Generator().manual_seed(0)
    for i in range(1, LENGTH):
        p = predict(tokens)[:, i - 1].softmax(-1)
        tokens[:, i] = torch.multinomial(p, 1, generator=generator)[:, 0]
    return tokens


def judged(tokens: torch.Tensor) -> float:
    return float(np.mean([judge().nats(bytes(row.tolist())) for row in tokens]))


def bits(network: ConvertedNetwork) -> float:
    """The bound, in bits per byte: blocks own equal parts of the way, so it is the mean of theirs."""
    data = ArrayDataset({network.input_names[0]: windows(TEXT, "test", 2000).numpy()}, None)
    residence = Residence(network, torch.device("cpu"))
    losses = [
        losses_of(network, data, b, residence, original=False, seed=s)
        for b in range(network.num_blocks)
        for s in range(4)
    ]
    return float(torch.cat(losses).mean()) / math.log(2)


def operations(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def measured(method: str, seed: int) -> dict[str, Any]:
    text = windows(TEXT, "train")
    if method == "causal end to end":
        model = whole(made(GPT, seed, BYTES, 64, 6, 4, LENGTH), seed)
        real = windows(TEXT, "test", 500)
        return {"nats": test_nats(model), "generated": judged(generated(model)), "real": judged(real)}
    if method == "causal blocks":
        network = trained(made(GPT, seed, BYTES, 64, 6, 4, LENGTH), seed, task="lm", num_blocks=BLOCKS)
        read = {name: (lambda part, name=name: network.denoise((part,), read=name)) for name in ("mean", "last")}
        found = {name: test_nats(predict) for name, predict in read.items()}
        return {"nats": found["mean"], "last": found["last"], "generated": judged(generated(read["mean"]))}
    if method.startswith("masked"):
        count = 1 if method == "masked end to end" else BLOCKS
        return {"bits": bits(trained(made(MaskedGPT, seed), seed, task="mdm", mask_token=HIDDEN, num_blocks=count))}
    if method == "recurrent one pass":
        network = trained(made(LoopedGPT, seed, TIMES), seed, task="lm", recurrent=True)
        found = {str(k): test_nats(lambda part, k=k: network.denoise((part,), steps=k)) for k in (1, TIMES, 2 * TIMES)}
        mean = test_nats(lambda part: network.denoise((part,), steps=TIMES, read="mean"))
        one = convert(made(LoopedGPT, seed, TIMES).eval(), (text[:3],), scratch=True, task="lm", recurrent=True)
        flops = operations(lambda: finetune(one, text.numpy()[:BATCH], steps=1, batch_size=BATCH, lr=RATE))
        return {**found, "mean": mean, "operations": flops}
    times = 1 if method.endswith("once") else TIMES
    model = whole(made(LoopedGPT, seed, times), seed)
    found = {}
    for k in (1, TIMES, 2 * TIMES):
        model.times = k
        found[str(k)] = test_nats(model)
    model.times = times
    return {**found, "operations": operations(lambda: loss_of(model(text[:BATCH]), text[:BATCH]).backward())}


def run(seeds: list[int], families: list[str]) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    new_classes.CACHE = CACHE
    for seed in seeds or SEEDS:
        for method in (m for m in METHODS if m.split()[0] in families):
            new_classes.measured(f"{method} {seed}", lambda method=method, seed=seed: measured(method, seed))


def report() -> None:
    new_classes.CACHE = CACHE
    tables = {
        "causal": ("nats", "last", "generated", "real"),
        "masked": ("bits",),
        "recurrent": ("1", str(TIMES), str(2 * TIMES), "mean", "operations"),
    }
    for family, columns in tables.items():
        print(f"\n| {family} | seeds | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 2))
        for method in (m for m in METHODS if m.startswith(family)):
            found = [
                f for s in SEEDS if (f := new_classes.measured(f"{method} {s}", dict, only_stored=True)) is not None
            ]
            if found:
                cells = [_cell(name, [f[name] for f in found if name in f]) for name in columns]
                print(f"| {method.removeprefix(family + ' ')} | {len(found)} | " + " | ".join(cells) + " |")


def _cell(name: str, values: list[float]) -> str:
    if not values:
        return ""
    return f"{values[0] / 1e9:.2f} G" if name == "operations" else _spread(values, 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    asked = parser.parse_args()
    run(asked.seeds, asked.families) if asked.command == "run" else report()
