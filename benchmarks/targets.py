"""What blocks learn beside labels: features, numbers, several labels, classes of every pixel; each context with both kinds of evidence.

    python benchmarks/targets.py run        # resumable: each measurement is a JSON file in benchmarks/.cache/targets; two may run at once
    python benchmarks/targets.py report     # the table, as Markdown

A ViT of six layers is trained end to end on each task, on images of Fashion-MNIST, and converted to three blocks, which are trained for 1,000 updates each (features: on the
original's own output, without labels). Every row is measured on images that nothing was trained or chosen on.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from diffusionblocks.converter import convert, finetune
from fashion_mnist import data
from models import ViT
from torch import nn
from torch.nn import functional as F

CACHE = Path(__file__).parent / ".cache" / "targets"
SEEDS, BATCH, BLOCKS, PRETRAINING, UPDATES = (0, 1, 2), 64, 3, 3000, 1000
WAYS = tuple((context, evidence) for context in ("frozen", "carry", "stem") for evidence in ("analytic", "learned"))
Pair = tuple[torch.Tensor, torch.Tensor]


class Tokens(nn.Module):
    """The ViT with its normed tokens [N, 16, 64] as output, or their mean [N, 64], or three numbers a pixel [N, 3, 28, 28], or ``outputs`` a sample."""

    def __init__(self, vit: ViT, what: str, outputs: int = 10) -> None:
        super().__init__()
        self.patch, self.position, self.layers, self.norm, self.what = (
            vit.patch,
            vit.position,
            vit.layers,
            vit.norm,
            what,
        )
        self.head = nn.Linear(64, {"pixels": 3 * 49, "tokens": 1, "pooled": 1}.get(what, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.layers(self.patch(x).flatten(2).transpose(1, 2) + self.position))
        if self.what == "tokens":
            return tokens
        if self.what == "pooled":
            return tokens.mean(1)
        if self.what == "pixels":
            made = self.head(tokens).reshape(-1, 4, 4, 7, 7, 3)
            return made.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, 28, 28)
        return self.head(tokens.mean(1))


@dataclass(frozen=True)
class Task:
    """``make(x, y, seed)`` -> inputs and targets; ``taught``: the blocks learn the original's own output, of a network trained on labels."""

    task: str
    output: str
    make: Callable[[torch.Tensor, torch.Tensor, int], Pair]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    measure: str
    taught: bool = False
    outputs: int = 10


def plain(x: torch.Tensor, y: torch.Tensor, seed: int) -> Pair:
    return x, y


def turned(x: torch.Tensor, y: torch.Tensor, seed: int) -> Pair:
    """Images turned by up to 60 degrees and moved by up to 3 pixels; y: the angle in radians and the two shifts in pixels."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 2 * torch.rand(len(x), 3, generator=generator) - 1
    angle, shift = drawn[:, 0] * math.pi / 3, drawn[:, 1:] * 3
    rows = torch.stack([angle.cos(), -angle.sin(), shift[:, 0] / 14, angle.sin(), angle.cos(), shift[:, 1] / 14], -1)
    grid = F.affine_grid(rows.reshape(-1, 2, 3), list(x.shape), align_corners=False)
    moved = F.grid_sample(x - x.min(), grid, align_corners=False) + x.min()
    return moved, torch.cat([angle[:, None], shift], 1)


def paired(x: torch.Tensor, y: torch.Tensor, seed: int) -> Pair:
    """Two images in one, the brighter pixel of each; y: which of the ten classes are there."""
    other = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return torch.maximum(x, x[other]), (F.one_hot(y, 10) | F.one_hot(y[other], 10)).float()


def hidden(x: torch.Tensor, y: torch.Tensor, seed: int) -> Pair:
    """Images under noise of the images' own spread, times two; y: whether each pixel is dark, grey or bright."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    low, high = x.min(), x.max()
    grey = (x[:, 0] - low) / (high - low)
    return x + 2 * x.std() * noise, (grey > 0.1).long() + (grey > 0.6).long()


TASKS = {
    "features [64]": Task("features", "pooled", plain, F.cross_entropy, "explained", taught=True),
    "features [16, 64]": Task("features", "tokens", plain, F.cross_entropy, "explained", taught=True),
    "regression [3]": Task("regression", "numbers", turned, F.mse_loss, "explained", outputs=3),
    "multi-label [10]": Task("multi-label", "numbers", paired, F.binary_cross_entropy_with_logits, "cross_entropy"),
    "classes of pixels [3, 28, 28]": Task("classification", "pixels", hidden, F.cross_entropy, "cross_entropy"),
}


def rows(task: Task, split: str) -> Pair:
    x, y = map(torch.from_numpy, data(split))
    return task.make(x, y, {"train": 0, "held-out": 1, "test": 2}[split])


def pretrained(name: str, seed: int) -> nn.Module:
    """The network after its training end to end; one that gives features learned the ten classes by a head that is gone."""
    task, path = TASKS[name], CACHE / f"{slug(name)}_{seed}.pt"
    torch.manual_seed(seed)
    vit = ViT()
    model = Tokens(vit, task.output, task.outputs)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    fitted: nn.Module = vit if task.taught else model
    x, y = rows(task, "train")
    optimizer = torch.optim.AdamW(fitted.parameters(), 1e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, PRETRAINING, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(PRETRAINING):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        task.loss(fitted.train()(x[chosen]), y[chosen]).backward()
        optimizer.step()
        scheduler.step()
    torch.save(model.state_dict(), path)
    return model.eval()


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")


def measured(name: str, context: str, evidence: str, seed: int) -> dict[str, Any]:
    """The blocks' scores after each step and of their mean, the original's, and each block's last loss."""
    task = TASKS[name]
    model = pretrained(name, seed)
    network = convert(
        model, input_shape=(1, 28, 28), num_blocks=BLOCKS, context=context, evidence=evidence, task=task.task, seed=seed
    )
    x, y = rows(task, "train")
    began = time.monotonic()
    logs = finetune(
        network,
        x.numpy(),
        None if task.taught else y.numpy(),
        steps=UPDATES,
        batch_size=BATCH,
        seed=seed,
        targets="teacher" if task.taught else "labels",
    )
    seconds = time.monotonic() - began
    x, y = (part[:4000] for part in rows(task, "test"))
    target = network.require_target()
    steps: list[list[torch.Tensor]] = [[] for _ in range(BLOCKS)]
    original = torch.cat([network.exact(part)[0] for part in x.split(500)])
    for part in x.split(500):
        network.denoise(part, trace=lambda k, b, sigma, prediction: steps[k].append(prediction))
    truth = original if task.taught else y
    predictions = [torch.cat(parts) for parts in steps]
    return {
        "seconds": round(seconds, 1),
        "exact": target.scores(target.read(original), truth),
        "steps": [target.scores(p, truth) for p in predictions],
        "mean": target.scores(target.combined(torch.stack(predictions)), truth),
        "loss": [log.loss[-1] for log in logs],
    }


def run(names: list[str], seeds: list[int]) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    for seed in seeds or SEEDS:
        for name in [n for n in TASKS if not names or any(n.startswith(given) for given in names)]:
            for context, evidence in WAYS:
                path = CACHE / f"{slug(name)}_{context}_{evidence}_{seed}.json"
                with path.with_suffix(".lock").open("w") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    if path.exists():
                        continue
                    found = measured(name, context, evidence, seed)
                    path.write_text(json.dumps(found))
                    print(name, context, evidence, seed, found["exact"], found["steps"][-1], found["mean"], flush=True)


def report() -> None:
    print("| target | context | evidence | seeds | original | after step 1 | step 2 | step 3 | mean of the steps |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, task in TASKS.items():
        for context, evidence in WAYS:
            files = [CACHE / f"{slug(name)}_{context}_{evidence}_{seed}.json" for seed in SEEDS]
            found = [json.loads(path.read_text()) for path in files if path.exists()]
            if not found:
                continue
            columns = [[f["exact"] for f in found], *([f["steps"][k] for f in found] for k in range(BLOCKS))]
            cells = [_cell(task, column) for column in (*columns, [f["mean"] for f in found])]
            print(f"| {name} | {context} | {evidence} | {len(found)} | " + " | ".join(cells) + " |")


def _cell(task: Task, scores: list[dict[str, float]]) -> str:
    if task.measure == "explained":
        return _spread([100 * s["explained"] for s in scores], 1) + " %"
    return _spread([100 * s["accuracy"] for s in scores], 1) + " %, " + _spread([s["cross_entropy"] for s in scores], 3)


def _spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ±{stdev(values):.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--only", nargs="*", default=[], help="targets whose names begin so")
    parser.add_argument("--seeds", nargs="*", type=int, default=[])
    given = parser.parse_args()
    run(given.only, given.seeds) if given.command == "run" else report()
