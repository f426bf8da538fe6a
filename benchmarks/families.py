"""Diffusion transformers: trained whole, as blocks from scratch, and converted from the trained one: by distillation from its own samples, or trained further on the data.

    python benchmarks/families.py run [--seeds 0 1 2] [--only "distilled 2"]    # resumable: each measurement is a JSON file in benchmarks/.cache/families; two may run at once
    python benchmarks/families.py report                                        # the table, as Markdown

A DiT of six layers (width 96, patches of 4 x 4, EDM) on Fashion-MNIST with classes; 1,500 updates end to end, or of each block, batch 64, averaged weights. "Distance" is the Frechet
distance between 2,000 samples and the 10,000 test images in the 64 features of a small classifier trained here (its accuracy is in the report): lower is better. It is no FID.
Blocks are sampled as the runtime does it, steps divided over the blocks; the whole network on the grid of one block, and also on Karras' grid (rho 7).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import new_classes
import numpy as np
import torch
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.denoiser_target import Denoiser
from diffusionblocks.converter.generation import generate
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.runtime import parameterisation, schedule
from fashion_mnist import data
from torch import nn
from torch.nn import functional as F

CACHE = Path(__file__).parent / ".cache" / "families"
EXAMPLE = Path(__file__).parents[1] / "examples" / "diffusion.py"
SEEDS, BATCH, UPDATES, EMA, RATE = (0, 1, 2), 64, 1500, 0.995, 2e-3
STEPS, SAMPLES, PART = (10, 25, 50), 2000, 250
METHODS = ("end to end", "scratch 2", "scratch 3", "distilled 2", "distilled 3", "tuned 2", "tuned 3")


def dit() -> nn.Module:
    spec = importlib.util.spec_from_file_location("diffusion_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: nn.Module = module.DiT(96, 6, 4, side=28, patch=4)
    nn.init.zeros_(made.out.weight)
    return made


@cache
def images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [-1, 1] and classes; ``train`` with what is held out elsewhere."""
    x, y = map(torch.from_numpy, data(split))
    return (x * 0.353 + 0.286) * 2 - 1, y


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convolutions = [(1, 32), (32, 64), (64, 64)]
        layers = [m for i, o in convolutions for m in (nn.Conv2d(i, o, 3, 2, 1), nn.ReLU())]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@cache
def judge() -> tuple[nn.Module, float]:
    """The features, and the accuracy of the classifier they are of."""
    path = CACHE / "judge.pt"
    torch.manual_seed(0)
    model = Classifier()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        x, y = images("train")
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        for _ in range(1500):
            rows = torch.randint(len(x), (128,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        torch.save(model.state_dict(), path)
    x, y = images("test")
    with torch.no_grad():
        return model.features.eval(), float((model(x).argmax(-1) == y).double().mean())


@torch.no_grad()
def distance(made: torch.Tensor) -> float:
    a, b = (judge()[0](x).double().numpy() for x in (made.clamp(-1, 1), images("test")[0]))
    first, second = np.cov(a.T), np.cov(b.T)
    shared = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0)).sum()  # the trace of the product's square root
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * shared)


def whole(seed: int) -> nn.Module:
    """The network trained end to end, its averaged weights."""
    path = CACHE / f"whole_{seed}.pt"
    torch.manual_seed(seed)
    model, average = dit(), dit()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    average.load_state_dict(model.state_dict())
    x, y = images("train")
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    warm, generator = UPDATES // 10, torch.Generator().manual_seed(seed)
    density = schedule.LogNormalDensity(80.0, 0.002, -1.2, 1.2)
    for step in range(UPDATES):
        cosine = 0.5 * (1 + float(np.cos(np.pi * (step - warm) / (UPDATES - warm))))
        optimizer.param_groups[0]["lr"] = RATE * ((step + 1) / warm if step < warm else cosine)
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        u = torch.rand(BATCH, generator=generator, dtype=torch.float64)
        sigma = torch.from_numpy(density.sigma(u.numpy()).astype(np.float32))[:, None, None, None]
        z = x[rows] + sigma * torch.randn(x[rows].shape, generator=generator)
        f = model(z * parameterisation.input_scale("edm", sigma), sigma.flatten().log() / 4, y[rows])
        error = parameterisation.denoised("edm", z, f, sigma) - x[rows]
        optimizer.zero_grad()
        (error.square() * parameterisation.weight("edm", sigma)).flatten(1).mean(1).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for a, b in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(b, 1 - EMA)
    torch.save(average.state_dict(), path)
    return average.eval()


def converted(model: nn.Module, blocks: int, seed: int, **settings: Any) -> ConvertedNetwork:
    x, y = images("train")
    example = {"x": x[:3], "t": torch.zeros(3), "y": y[:3]}
    return convert(
        model.eval(), example, num_blocks=blocks, task="diffusion", denoiser=Denoiser("edm"), seed=seed, **settings
    )


def blockwise(method: str, seed: int) -> ConvertedNetwork:
    kind, count = method.split()
    x, y = images("train")
    options: dict[str, Any] = {"steps": UPDATES, "batch_size": BATCH, "ema": EMA, "lr": RATE, "seed": seed}
    if kind == "scratch":
        torch.manual_seed(seed)
        network = converted(dit(), int(count), seed, scratch=True)
        finetune(network, {"x": x.numpy(), "y": y.numpy()}, **options)
        return network
    network = converted(whole(seed), int(count), seed)
    if kind == "tuned":
        finetune(network, {"x": x.numpy(), "y": y.numpy()}, **options)
        return network
    drawn = [samples(network, 25, k, original=True) for k in range(3)]  # 6,000 of its own samples are all the data
    own = {"x": torch.cat(drawn).clamp(-1, 1).numpy(), "y": classes().repeat(3).numpy()}
    finetune(network, own, **{**options, "targets": "teacher"})
    return network


def classes() -> torch.Tensor:
    return torch.arange(SAMPLES) % 10


def samples(network: ConvertedNetwork, steps: int, seed: int, *, original: bool) -> torch.Tensor:
    parts = classes().split(PART)
    made = [
        generate(network, {"y": part}, steps=steps, seed=1000 * seed + k, original=original)
        for k, part in enumerate(parts)
    ]
    return torch.cat(made)


@torch.no_grad()
def on_karras_grid(network: ConvertedNetwork, steps: int) -> torch.Tensor:
    """The whole network by Euler steps on Karras' grid."""
    levels = [*(np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps) ** 7), 0.0]
    made = []
    for k, part in enumerate(classes().split(PART)):
        z = (
            torch.from_numpy(np.random.default_rng([k, 0]).standard_normal((len(part), 1, 28, 28), dtype=np.float32))
            * 80
        )
        for level, after in itertools.pairwise(levels):
            sigma = torch.full((len(part),), level)
            f = network.exact(network.require_target().entered({"y": part}, z, sigma))[0]
            _, denoised, z = network.require_target()(z, f, sigma, torch.full((len(part),), after))
        made.append(denoised)
    return torch.cat(made)


def measured(method: str, seed: int) -> dict[str, Any]:
    original = method == "end to end"
    began = time.monotonic()
    network = converted(whole(seed), 1, seed) if original else blockwise(method, seed)
    found: dict[str, Any] = {"training": round(time.monotonic() - began, 1), "judge": judge()[1]}
    for steps in STEPS:
        began = time.monotonic()
        made = samples(network, steps, 7, original=original)
        found[f"seconds {steps}"] = round(time.monotonic() - began, 1)
        found[str(steps)] = distance(made)
        if original:
            found[f"karras {steps}"] = distance(on_karras_grid(network, steps))
    return found


def run(seeds: list[int], only: list[str]) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    new_classes.CACHE = CACHE
    for seed in seeds or SEEDS:
        for method in only or METHODS:
            new_classes.measured(f"{method} {seed}", lambda method=method, seed=seed: measured(method, seed))


def report() -> None:
    new_classes.CACHE = CACHE
    print(
        "| | seeds | "
        + " | ".join(f"{n} steps" for n in STEPS)
        + " | seconds for 2,000 at 50 |\n|---|---|"
        + "---|" * (len(STEPS) + 1)
    )
    for method in METHODS:
        found = [f for s in SEEDS if (f := new_classes.measured(f"{method} {s}", dict, only_stored=True)) is not None]
        for prefix in ("", "karras ") if found and "karras 10" in found[0] else ("",):
            cells = [_spread([f[f"{prefix}{n}"] for f in found]) for n in STEPS] if found else []
            seconds = [_spread([f["seconds 50"] for f in found])] if found else []
            if found:
                print(
                    f"| {method}{', Karras grid' if prefix else ''} | {len(found)} | "
                    + " | ".join([*cells, *seconds])
                    + " |"
                )
    stored = sorted(CACHE.glob("*.json"))
    if stored:
        print(f"\nThe classifier's accuracy: {100 * json.loads(stored[0].read_text())['judge']:.1f} %.")


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ±{stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[])
    parser.add_argument("--only", nargs="*", choices=METHODS, default=[], help="these methods alone")
    given = parser.parse_args()
    run(given.seeds, given.only) if given.command == "run" else report()
