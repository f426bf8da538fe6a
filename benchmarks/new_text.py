"""A language model moved from one kind of text to another: end to end, LoRA (peft), and one block at a time.

    python benchmarks/new_text.py run        # resumable: each measurement is a JSON file in benchmarks/.cache/new_text; two may run at once
    python benchmarks/new_text.py report     # the table, as Markdown

A GPT of six layers on 64 bytes learns Python's documentation (Debian's python3.11-doc), and is fine-tuned on the King James Bible (bible-kjv). "Updates" are end-to-end steps, or
updates of each block, which cost a B-th of a step and what feeds the block. Rates are chosen on held-out text with the first seed. Scores are nats per byte on text that nothing was trained or
chosen on, each byte given those before it in its window; for blocks the sampler's, from z = 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import new_classes
import numpy as np
import torch
from coverage import use_torchvision
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.blocks import select_trainable
from diffusionblocks.converter.network import ConvertedNetwork
from models import GPT
from new_classes import _spread, kept_for_backward
from torch import nn
from torch.nn import functional as F

CACHE = Path(__file__).parent / ".cache" / "new_text"
DOCUMENTATION = Path("/usr/share/doc/python3.11/html/_sources")
SEEDS, RATES, BATCH, LENGTH, BLOCKS = (0, 1, 2), (3e-4, 1e-3, 3e-3), 32, 64, 3
PRETRAINING, UPDATES = 4000, 1000
CONTEXTS = ("frozen", "carry", "stem")
METHODS = ("before", "end to end", "LoRA", *CONTEXTS)


@cache
def corpus(name: str) -> dict[str, torch.Tensor]:
    """Bytes int64 of ``train`` (nine tenths), ``held-out`` and ``test`` (a twentieth each); what is no ASCII is left out."""
    if name == "documentation":
        text = "\n".join(p.read_text(encoding="utf-8") for p in sorted(DOCUMENTATION.rglob("*.txt")))
    else:
        said = subprocess.run(
            ["bible", "-l80", "gen1:1-rev22:21"], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        )
        text = said.stdout
    raw = np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
    data = torch.from_numpy(raw.astype(np.int64))
    first, second = len(data) * 9 // 10, len(data) * 19 // 20
    return {"train": data[:first], "held-out": data[first:second], "test": data[second:]}


def windows(name: str, split: str, count: int | None = None) -> torch.Tensor:
    """Windows [M, 64], one after another, or ``count`` of them spread evenly."""
    data = corpus(name)[split]
    whole = data[: len(data) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return whole if count is None else whole[:: max(1, len(whole) // count)][:count]


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].movedim(-1, 1), tokens[:, 1:])


def fit(model: nn.Module, text: torch.Tensor, updates: int, lr: float, seed: int) -> None:
    """AdamW, warm-up and cosine, as the blocks are trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    generator, warm = torch.Generator().manual_seed(seed), updates // 10
    for step in range(updates):
        done = (step - warm) / (updates - warm)
        for group in optimizer.param_groups:
            group["lr"] = lr * ((step + 1) / warm if step < warm else 0.5 * (1 + float(np.cos(np.pi * done))))
        rows = text[torch.randint(len(text), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        loss_of(model(rows), rows).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def pretrained(seed: int) -> GPT:
    """The network after 4,000 updates on the documentation."""
    path = CACHE / f"pretrained_{seed}.pt"
    torch.manual_seed(seed)
    model = GPT(128, length=LENGTH)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        fit(model.train(), windows("documentation", "train"), PRETRAINING, 3e-3, seed)
        torch.save(model.state_dict(), path)
    return model.eval()


@torch.no_grad()
def nats(model: Callable[[torch.Tensor], torch.Tensor], name: str, split: str) -> float:
    text = windows(name, split, 2000)
    return mean(float(loss_of(model(part), part)) for part in text.split(200))


def read_of(network: ConvertedNetwork) -> Callable[[torch.Tensor], torch.Tensor]:
    read = "mean" if network.settings.context == "stem" else "last"
    return lambda part: network.denoise((part,), read=read)


def whole(method: str, seed: int, lr: float) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, Any]]:
    model: Any = copy.deepcopy(pretrained(seed))
    if method == "LoRA":
        use_torchvision()
        from peft import LoraConfig, get_peft_model

        names = [f"layers.{n}" for n, m in model.layers.named_modules() if isinstance(m, nn.Linear)]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=names, modules_to_save=["head"]))
    text = windows("bible", "train")
    fit(model.train(), text, UPDATES, lr, seed)
    model.eval()
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    kept = kept_for_backward(lambda: model(text[:BATCH]), parameters)
    return model, {"state": 4 * sum(p.numel() for p in parameters) + 12 * trained, "activations": kept}


def blockwise(context: str, seed: int, lr: float) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, Any]]:
    text = windows("bible", "train")
    network = convert(pretrained(seed), (text[:3],), num_blocks=BLOCKS, context=context, task="lm", seed=seed)
    logs = finetune(network, text.numpy(), steps=UPDATES, batch_size=BATCH, lr=lr, seed=seed)
    frozen = sum(p.numel() for part in (network.stem, network.head) for p in part.module.parameters())
    kept = max(_kept_in_block(network, b, text[:BATCH]) for b in range(BLOCKS))
    return read_of(network), {"state": max(log.training_bytes for log in logs) + 4 * frozen, "activations": kept}


def _kept_in_block(network: ConvertedNetwork, b: int, x: torch.Tensor) -> int:
    env, module = network.inputs_env((x,)), network.blocks[b].module
    select_trainable(module, "block")
    with torch.no_grad():
        network.run_stem(env)
        for a in range(b if network.settings.context != "stem" else 0):
            network.run_context(env, a)
    z, sigma = torch.randn(len(x), *network.require_target().shape), torch.full((len(x),), 0.5)
    return kept_for_backward(lambda: network.run_block(env, b, z, sigma), list(module.parameters()))


def measured(method: str, seed: int) -> dict[str, Any]:
    """Nats per byte on both texts, and what training took; the first seed tries every rate on held-out text."""
    if method == "before":
        model: Any = pretrained(seed)
        return {name: nats(model, name, "test") for name in ("bible", "documentation")}
    make = blockwise if method in CONTEXTS else whole
    first = CACHE / f"{method.replace(' ', '_')}_0.json"
    rates = (json.loads(first.read_text())["rate"],) if seed and first.exists() else RATES
    best: tuple[float, float, Any, dict[str, Any]] | None = None
    for lr in rates:
        run, sizes = make(method, seed, lr)
        loss = nats(run, "bible", "held-out")
        if best is None or loss < best[0]:
            best = loss, lr, run, sizes
    assert best is not None
    _, lr, run, sizes = best
    return {**{name: nats(run, name, "test") for name in ("bible", "documentation")}, "rate": lr, **sizes}


def run() -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    new_classes.CACHE = CACHE
    for seed in SEEDS:
        for method in METHODS:
            new_classes.measured(f"{method} {seed}", lambda method=method, seed=seed: measured(method, seed))


def report() -> None:
    new_classes.CACHE = CACHE
    print(
        "| method | seeds | Bible, nats per byte | documentation | rate | state | activations |\n|---|---|---|---|---|---|---|"
    )
    for method in METHODS:
        found = [f for s in SEEDS if (f := new_classes.measured(f"{method} {s}", dict, only_stored=True)) is not None]
        if not found:
            continue
        texts = [_spread([f[name] for f in found], 4) for name in ("bible", "documentation")]
        sizes = [
            f"{mean(f[k] for f in found) / 1024:.0f} KiB" if k in found[0] else "" for k in ("state", "activations")
        ]
        cells = [method, str(len(found)), *texts, str(found[0].get("rate", "")), *sizes]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    {"run": run, "report": report}[parser.parse_args().command]()
