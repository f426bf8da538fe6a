"""DiffusionBlocks against end-to-end training on Fashion-MNIST: contexts, partitions, evidence, decoding.

    python benchmarks/fashion_mnist.py run        # select on held-out images, then read the test set; resumable, several may run at once
    python benchmarks/fashion_mnist.py report     # the tables, as Markdown
    python benchmarks/fashion_mnist.py collect    # all measurements into benchmarks/fashion_mnist.json

Each measurement is one JSON file in benchmarks/.cache, made under a lock, so that a run that was stopped goes on where it was; what was collected
is not measured again (remove the file to do so).
The data is the Debian package dataset-fashion-mnist, or any folder of the four idx files named by FASHION_MNIST.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.blocks import own_copy, select_trainable, set_batch_norm_training
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.train import step_seed
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import open_bundle
from fashion_report import CACHE, Result, cached, collect, report, stored
from fashion_variants import (
    BLOCKS,
    END_TO_END,
    FINETUNE,
    FINETUNE_STEM,
    SEEDS,
    Variant,
    selection_variants,
    test_variants,
)
from metrics import measure
from models import ResNet, ViT
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
DATA = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
MODELS: dict[str, Callable[[], nn.Module]] = {"vit": ViT, "resnet": ResNet}
BATCH = 64
HELD_OUT = 5000
Fit = Callable[[ConvertedNetwork, int, int, int, float], None]
Logits = Callable[[ConvertedNetwork, int, torch.Tensor], torch.Tensor]


# --- data ---


def idx(name: str) -> np.ndarray:
    """One gzipped idx file: a header of dimensions (big-endian), then bytes."""
    raw = gzip.decompress((DATA / name).read_bytes())
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(dims)).reshape(dims)


@cache
def data(part: str) -> tuple[np.ndarray, np.ndarray]:
    """``train`` (55,000), ``held-out`` (the last 5,000 of a fixed shuffle of the training set) or ``test`` (10,000)."""
    stem = "t10k" if part == "test" else "train"
    x = (idx(f"{stem}-images-idx3-ubyte.gz")[:, None].astype(np.float32) / 255 - 0.286) / 0.353
    y = idx(f"{stem}-labels-idx1-ubyte.gz").astype(np.int64)
    if part == "test":
        return x, y
    order = np.random.default_rng(0).permutation(len(y))
    rows = order[-HELD_OUT:] if part == "held-out" else order[:-HELD_OUT]
    return x[rows], y[rows]


# --- training ---


def fit(
    parameters: list[nn.Parameter],
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
    seed: int,
    lr: float,
    stream: int,
) -> None:
    """Plain cross-entropy by AdamW with a short warm-up and a cosine, as ``finetune`` has it; ``stream`` numbers the order of the data."""
    x, y = (torch.from_numpy(a) for a in data("train"))
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    warmup = max(1, steps // 10)
    for step in range(steps):
        late = 0.5 + 0.5 * float(np.cos(np.pi * max(0, step - warmup) / max(1, steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, late)
        rows = torch.randint(len(y), (BATCH,), generator=torch.Generator().manual_seed(step_seed(seed, stream, step)))
        loss = F.cross_entropy(logits_of(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def train(model: nn.Module, steps: int, seed: int, lr: float) -> float:
    """End to end; returns the seconds."""
    torch.manual_seed(seed)
    started = time.monotonic()
    model.train()
    fit(list(model.parameters()), model, steps, seed, lr, 99)
    model.eval()
    return time.monotonic() - started


def train_plain_block(network: ConvertedNetwork, b: int, steps: int, seed: int, lr: float) -> None:
    """A control: the same copy of the block on the same state and the same head, no z, no AdaLN."""
    module = network.blocks[b].module
    conditioning = {n for n, _ in select_trainable(module, "adaln") if not n.startswith(("entry", "readout"))}
    chosen = [p for n, p in select_trainable(module, "block") if n not in conditioning]
    set_batch_norm_training(module, True)
    fit(chosen, lambda x: plain(network, b, x), steps, seed, lr, b)
    set_batch_norm_training(module, False)


def train_exit_head(network: ConvertedNetwork, b: int, steps: int, seed: int, lr: float) -> None:
    """A control: a copy of the head alone (with the block's readout, where it has one) on the original's state after block b."""
    network.heads[b] = own_copy(network.head)
    readout = getattr(network.blocks[b].module, "readout", None)
    chosen = [*network.heads[b].module.parameters(), *(readout.parameters() if readout is not None else ())]
    fit([p for p in chosen if p.requires_grad], lambda x: exit_head(network, b, x), steps, seed, lr, b)


def exit_head(network: ConvertedNetwork, b: int, x: torch.Tensor) -> torch.Tensor:
    env = state_before(network, b + 1, x)
    readout = getattr(network.blocks[b].module, "readout", None)
    return network.run_head(env, env["stream"] if readout is None else readout(env["stream"]), b)[0]


def state_before(network: ConvertedNetwork, b: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
    env = network.inputs_env(x)
    with torch.no_grad():
        network.run_stem(env)
        for a in range(b if network.settings.context == "frozen" else 0):
            network.run_context(env, a)
    return env


def plain(network: ConvertedNetwork, b: int, x: torch.Tensor) -> torch.Tensor:
    """Block b's logits with its zero-initialised AdaLN, which passes z on to nothing."""
    target = network.require_target()
    return network.run_block(state_before(network, b, x), b, torch.zeros(len(x), target.dim), torch.ones(len(x)))[0]


# --- evaluation ---


def chunks(x: np.ndarray) -> list[torch.Tensor]:
    return list(torch.from_numpy(x).split(1000))


@torch.no_grad()
def logits(function: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray) -> np.ndarray:
    return torch.cat([function(part).log_softmax(-1) for part in chunks(x)]).numpy()


def decode(network: ConvertedNetwork, part: str, steps: int, start: str) -> Result:
    """Metrics after every step, and of the mean of the log-probabilities over the steps."""
    x, y = data(part)
    after: list[list[torch.Tensor]] = [[] for _ in range(steps)]
    for rows in chunks(x):
        network.denoise(rows, steps=steps, start=start, trace=lambda k, _b, _s, p: after[k].append(p))
    each = [torch.cat(parts) for parts in after]
    combined = torch.stack(each).mean(0).log_softmax(-1)
    return {"steps": [measure(p.numpy(), y) for p in each], "mean": measure(combined.numpy(), y)}


def decodings(network: ConvertedNetwork, part: str) -> dict[str, Result]:
    """Every number of steps from both starts on the held-out images; B steps on the test set."""
    counts = (BLOCKS,) if part == "test" else (1, BLOCKS, 2 * BLOCKS, 4 * BLOCKS)
    return {f"{n}-{start}": decode(network, part, n, start) for n in counts for start in ("mean", "noise")}


# --- measurements, one JSON file each ---


def measured(name: str, make: Callable[[], Result]) -> Result | None:
    """The cached result, or ``make``'s under a lock; None while another process is at it."""
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"{name}.json"
    if not path.exists() and name in stored():
        return stored()[name]
    with (CACHE / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not path.exists():
            print(name, flush=True)
            started = time.monotonic()
            result = make() | {"seconds": round(time.monotonic() - started, 1)}
            path.with_suffix(".tmp").write_text(json.dumps(result))
            path.with_suffix(".tmp").replace(path)
    return json.loads(path.read_text())


def new_model(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[kind]()


def weights(kind: str, seed: int) -> Path:
    return CACHE / f"{kind}-{seed}-end-to-end.pt"


def end_to_end(kind: str, seed: int) -> Result:
    model = new_model(kind, seed)
    seconds = train(model, END_TO_END, seed, 1e-3)
    torch.save(model.state_dict(), weights(kind, seed))
    result = {"train_seconds": seconds}
    for part in ("held-out", "test"):
        result[part] = measure(logits(model, data(part)[0]), data(part)[1])
    return result


def original(kind: str, seed: int) -> nn.Module:
    if not weights(kind, seed).exists():
        end_to_end(kind, seed)  # measured elsewhere: the same seed gives the same network
    model = new_model(kind, seed)
    model.load_state_dict(torch.load(weights(kind, seed), weights_only=True))
    return model.eval()


def trained_on(kind: str, seed: int, steps: int) -> Result:
    model = original(kind, seed)
    train(model, steps, seed + 100, 3e-4)
    return {"test": measure(logits(model, data("test")[0]), data("test")[1])}


def network_of(kind: str, seed: int, variant: Variant) -> ConvertedNetwork:
    model = new_model(kind, seed).eval() if variant.scratch else original(kind, seed)
    fields = {k: getattr(variant, k) for k in ("context", "partition", "evidence", "tune", "scratch")}
    return convert(model, input_shape=(1, 28, 28), num_blocks=BLOCKS, seed=seed, **fields)


def converted(kind: str, seed: int, variant: Variant, part: str, bundle: bool = False) -> Result:
    network = network_of(kind, seed, variant)
    zero = decode(network, part, BLOCKS, "mean")
    options = {"steps": variant.steps, "batch_size": BATCH, "lr": variant.lr, "anchor": variant.anchor, "seed": seed}
    logs = finetune(network, *data("train"), **options)
    result: Result = {"zero": zero, "decodings": decodings(network, part), "loss": [log.loss[-1] for log in logs]}
    result["training_bytes"] = [log.training_bytes for log in logs]
    if bundle:
        result["bundle"] = against_torch(network, data(part)[0][:2000])
    return result


def against_torch(network: ConvertedNetwork, x: np.ndarray) -> Result:
    """Largest difference of the exported bundle from torch, relative to torch's largest value, and rows predicted otherwise."""
    found: Result = {}
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(network, Path(folder) / "model.dblocks")
        with open_bundle(Path(folder) / "model.dblocks") as bundle:
            for mode in ("exact", "denoise") if not network.settings.scratch else ("denoise",):
                there = bundle.run(x, mode=mode)
                decoding = bundle.manifest.decoding
                batch = torch.from_numpy(x)
                here = (
                    network.exact(batch)[0]
                    if mode == "exact"
                    else network.denoise(batch, steps=BLOCKS, read=decoding.read)
                )
                scale = float(here.abs().max())
                found[mode] = {
                    "relative": float(np.abs(there - here.numpy()).max()) / scale,
                    "other_predictions": int((there.argmax(-1) != here.numpy().argmax(-1)).sum()),
                }
            found["peak_weight_bytes"] = bundle.peak_weight_bytes
    return found


def controls(kind: str, seed: int, variant: Variant, fit_one: Fit, logits_of: Logits) -> Result:
    """Every block trained by a control alone; metrics of each and of their mean, as for the steps of the sampler."""
    network = network_of(kind, seed, variant)
    for b in range(BLOCKS):
        fit_one(network, b, variant.steps, seed, variant.lr)
    x, y = data("test")
    each = [logits(lambda rows, b=b: logits_of(network, b, rows), x) for b in range(BLOCKS)]  # type: ignore[misc]
    combined = torch.from_numpy(np.stack(each)).mean(0).log_softmax(-1).numpy()
    return {"steps": [measure(p, y) for p in each], "mean": measure(combined, y)}


CONTROLS: dict[str, tuple[Variant, Fit, Logits]] = {
    "plain-blocks-frozen": (Variant("frozen"), train_plain_block, plain),
    "plain-blocks-stem": (Variant("stem", lr=1e-3, steps=FINETUNE_STEM), train_plain_block, plain),
    "exit-heads-frozen": (Variant("frozen", lr=1e-3), train_exit_head, exit_head),
}


def jobs(kinds: list[str]) -> list[tuple[str, Callable[[], Result]]]:
    found: list[tuple[str, Callable[[], Result]]] = []
    for kind in kinds:
        found += [(f"{kind}-{s}-end-to-end", lambda k=kind, s=s: end_to_end(k, s)) for s in SEEDS]  # type: ignore[misc]
        for v in selection_variants(kind):
            found.append((f"{kind}-0-select-{v.name}", lambda k=kind, v=v: converted(k, 0, v, "held-out")))  # type: ignore[misc]
        for s in SEEDS:
            for v in test_variants():
                run = lambda k=kind, s=s, v=v: converted(k, s, v, "test", bundle=s == 0)  # type: ignore[misc] # noqa: E731
                found.append((f"{kind}-{s}-test-{v.name}", run))
            for n in (FINETUNE, FINETUNE_STEM):
                found.append((f"{kind}-{s}-trained-on-{n}", lambda k=kind, s=s, n=n: trained_on(k, s, n)))  # type: ignore[misc]
            for c, (v, fit_one, logits_of) in CONTROLS.items():
                run = lambda k=kind, s=s, v=v, f=fit_one, g=logits_of: controls(k, s, v, f, g)  # type: ignore[misc] # noqa: E731
                found.append((f"{kind}-{s}-control-{c}", run))
    return sorted(found, key=lambda job: "test-scratch" in job[0])  # the longest last


def run(kinds: list[str]) -> None:
    """All measurements; what another process is at is left to it, and what needs its result waits."""
    torch.set_num_threads(1)
    todo = jobs(kinds)
    while todo:
        later = []
        for name, make in todo:
            kind, seed = name.split("-")[:2]
            waits = not name.endswith("end-to-end") and cached(f"{kind}-{seed}-end-to-end") is None
            if waits or measured(name, make) is None:
                later.append((name, make))
        todo = later
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report", "collect"))
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["vit", "resnet"])
    chosen = parser.parse_args()
    if chosen.command == "run":
        run(chosen.models)
    elif chosen.command == "collect":
        collect([name for name, _ in jobs(sorted(MODELS))])
    else:
        report(chosen.models, list(CONTROLS))


if __name__ == "__main__":
    main()
