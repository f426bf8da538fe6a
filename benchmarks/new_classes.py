"""Fine-tuning a trained network on new data: end to end, LoRA (peft) and one block at a time; and learning from the original instead of labels.

    python benchmarks/new_classes.py run [--only stem LoRA]    # resumable: each measurement is a JSON file in benchmarks/.cache/new_classes; two may run at once
    python benchmarks/new_classes.py report     # the tables, as Markdown

A ViT is trained on five of the classes of Fashion-MNIST, and fine-tuned on the other five, three seeds. "Updates" are end-to-end steps, or updates of each block, which cost
a B-th of a step and what feeds the block. "State" is what weights that are trained, their gradients and Adam's moments take, with the frozen weights that must be there meanwhile;
"activations" what autograd keeps for a batch of 64.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from coverage import use_torchvision
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.network import ConvertedNetwork
from fashion_mnist import data
from models import ViT
from torch import nn
from torch.nn import functional as F

CACHE = Path(__file__).parent / ".cache" / "new_classes"
SEEDS, BATCH, UPDATES, BLOCKS = (0, 1, 2), 64, 2000, 3
LEARNED, NEW = tuple(range(5)), tuple(range(5, 10))
OWN = "stem, own ends"  # a copy of stem and head for each block, trained with it
CONTEXTS = ("stem", OWN, "frozen", "carry")
METHODS = ("end to end", "LoRA", *CONTEXTS)
TAUGHT = ("labels", "teacher")


def half(split: str, classes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = map(torch.from_numpy, data(split))
    chosen = torch.isin(y, torch.tensor(classes))
    return x[chosen], y[chosen] - classes[0]


def fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor, updates: int, lr: float, seed: int) -> None:
    """AdamW, warm-up and cosine, as the blocks are trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    generator, warm = torch.Generator().manual_seed(seed), updates // 10
    for step in range(updates):
        factor = (
            (step + 1) / warm if step < warm else 0.5 * (1 + float(np.cos(np.pi * (step - warm) / (updates - warm))))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        rows = torch.randint(len(y), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def pretrained(seed: int) -> nn.Module:
    """The network after 4,000 updates on the five classes it knows."""
    path = CACHE / f"pretrained_{seed}.pt"
    torch.manual_seed(seed)
    model = ViT()
    model.head = nn.Linear(model.head.in_features, len(LEARNED))
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        fit(model.train(), *half("train", LEARNED), 4000, 1e-3, seed)
        torch.save(model.state_dict(), path)
    return model.eval()


def scores(logits: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    return {
        "accuracy": 100 * float((logits.argmax(-1) == y).double().mean()),
        "cross_entropy": float(F.cross_entropy(logits, y)),
    }


@torch.no_grad()
def logits_of(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part) for part in x.split(1000)])


def kept_for_backward(run: Callable[[], Any], parameters: list[nn.Parameter]) -> int:
    """Bytes that autograd keeps in ``run``, weights left out."""
    own, found = {p.untyped_storage().data_ptr() for p in parameters}, dict[int, int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(found.values())


def whole(method: str, seed: int) -> dict[str, Any]:
    """End to end or LoRA, with a fresh head, both rates tried on held-out images."""
    x, y = half("train", NEW)
    held_x, held_y = half("held-out", NEW)
    best: tuple[float, float, nn.Module] | None = None
    for lr in (3e-4, 1e-3, 3e-3):
        model = copy.deepcopy(pretrained(seed))
        torch.manual_seed(seed)
        model.head = nn.Linear(model.head.in_features, len(NEW))
        if method == "LoRA":
            use_torchvision()
            from peft import LoraConfig, get_peft_model

            names = [n for n, m in model.layers.named_modules() if isinstance(m, nn.Linear)]
            config = LoraConfig(r=8, target_modules=[f"layers.{n}" for n in names], modules_to_save=["head"])
            model = get_peft_model(model, config)
        fit(model.train(), x, y, UPDATES, lr, seed)
        model.eval()
        loss = float(F.cross_entropy(logits_of(model, held_x), held_y))
        if best is None or loss < best[0]:
            best = loss, lr, model
    assert best is not None
    _, lr, model = best
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    state = 4 * sum(p.numel() for p in parameters) + 12 * trained
    activations = kept_for_backward(lambda: model(x[:BATCH].clone()), parameters)
    test_x, test_y = half("test", NEW)
    return {**scores(logits_of(model, test_x), test_y), "rate": lr, "state": state, "activations": activations}


def blockwise(context: str, seed: int) -> dict[str, Any]:
    """New heads, each block by itself; both rates tried on held-out images."""
    x, y = half("train", NEW)
    held_x, held_y = half("held-out", NEW)
    best: tuple[float, float, ConvertedNetwork, int] | None = None
    for lr in (3e-4, 1e-3, 3e-3):
        network = convert(
            pretrained(seed),
            input_shape=(1, 28, 28),
            num_blocks=BLOCKS,
            context="stem" if context == OWN else context,
            ends="own" if context == OWN else "shared",
            new_labels=len(NEW),
            seed=seed,
        )
        logs = finetune(network, x.numpy(), y.numpy(), steps=UPDATES, batch_size=BATCH, lr=lr, seed=seed)
        loss = float(F.cross_entropy(denoised(network, held_x), held_y))
        if best is None or loss < best[0]:
            best = loss, lr, network, max(log.training_bytes for log in logs)
    assert best is not None
    _, lr, network, state = best
    frozen = 0 if context == OWN else 4 * sum(p.numel() for p in network.stem.module.parameters())
    test_x, test_y = half("test", NEW)
    activations = max(kept_in_block(network, b, x[:BATCH].clone()) for b in range(BLOCKS))
    return {
        **scores(denoised(network, test_x), test_y),
        "rate": lr,
        "state": state + frozen,
        "activations": activations,
    }


def kept_in_block(network: ConvertedNetwork, b: int, x: torch.Tensor) -> int:
    from diffusionblocks.converter.blocks import select_trainable

    env = network.inputs_env(x)
    modules = [m for _, m in network.own_modules(b)]
    for module in modules:
        select_trainable(module, "block")
    z, sigma = torch.randn(len(x), network.require_target().dim), torch.full((len(x),), 0.5)
    parameters = [p for m in modules for p in m.parameters()]

    def update() -> Any:
        with torch.set_grad_enabled(network.stems[b] is not None):
            network.run_stem(env, b)
            for a in range(b if network.settings.context != "stem" else 0):
                network.run_context(env, a)
        return network.run_block(env, b, z, sigma)

    return kept_for_backward(update, parameters)


def denoised(network: ConvertedNetwork, x: torch.Tensor) -> torch.Tensor:
    read = "mean" if network.settings.context == "stem" else "last"
    return logits_of(lambda part: network.denoise(part, read=read), x)


def taught(targets: str, seed: int) -> dict[str, Any]:
    """The classes the network knows, learned from labels or from the original's predictions alone: after each block of the chain."""
    x, y = half("train", LEARNED)
    network = convert(pretrained(seed), input_shape=(1, 28, 28), num_blocks=BLOCKS, context="frozen", seed=seed)
    labels = y.numpy() if targets == "labels" else None
    finetune(network, x.numpy(), labels, steps=UPDATES, batch_size=BATCH, seed=seed, targets=targets)
    test_x, test_y = half("test", LEARNED)
    found: dict[str, Any] = {"original": scores(logits_of(lambda part: network.exact(part)[0], test_x), test_y)}
    for steps in range(1, BLOCKS + 1):
        found[f"step {steps}"] = scores(logits_of(lambda part, n=steps: network.denoise(part, steps=n), test_x), test_y)
    return found


def measured(name: str, make: Callable[[], dict[str, Any]], *, only_stored: bool = False) -> dict[str, Any] | None:
    path = CACHE / f"{name.replace(' ', '_').replace(',', '')}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    if only_stored:
        return None
    with (CACHE / f"{path.stem}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        began = time.time()
        result = make()
        path.write_text(json.dumps({**result, "seconds": round(time.time() - began, 1)}))
        print(name, path.read_text(), flush=True)
        return result


def run(only: list[str]) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in SEEDS:
        pretrained(seed)
        for method in only or METHODS:
            one = blockwise if method in CONTEXTS else whole
            measured(f"{method} {seed}", lambda one=one, method=method, seed=seed: one(method, seed))
        for targets in () if only else TAUGHT:
            measured(f"{targets} {seed}", lambda targets=targets, seed=seed: taught(targets, seed))


def report() -> None:
    print("| method | accuracy % | cross-entropy | state | activations |\n|---|---|---|---|---|")
    for method in METHODS:
        found = [f for s in SEEDS if (f := measured(f"{method} {s}", dict, only_stored=True)) is not None]
        if found:
            size = [f"{mean(f[k] for f in found) / 1024:.0f} KiB" for k in ("state", "activations")]
            print(
                f"| {method} | {_spread([f['accuracy'] for f in found], 2)} | {_spread([f['cross_entropy'] for f in found], 4)} | {size[0]} | {size[1]} |"
            )
    print(
        "\n| learned from | original | "
        + " | ".join(f"step {n}" for n in range(1, BLOCKS + 1))
        + " |\n|---|"
        + "---|" * (BLOCKS + 1)
    )
    for targets in TAUGHT:
        found = [f for s in SEEDS if (f := measured(f"{targets} {s}", dict, only_stored=True)) is not None]
        cells = (
            [
                f"{_spread([f[k]['accuracy'] for f in found], 2)}, {mean(f[k]['cross_entropy'] for f in found):.4f}"
                for k in ("original", *(f"step {n}" for n in range(1, BLOCKS + 1)))
            ]
            if found
            else []
        )
        print(f"| {targets} | " + " | ".join(cells) + " |")


def _spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ±{stdev(values):.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--only", nargs="*", choices=METHODS, default=[], help="these methods alone")
    given = parser.parse_args()
    run(given.only) if given.command == "run" else report()
