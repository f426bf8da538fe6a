"""Training one block against training the whole network: memory in bytes, time of an update, two ranks against one process.

    python benchmarks/training.py memory       # a 24-layer ViT, B = 2, 3, 4, 6; each row a process of its own
    python benchmarks/training.py time         # an update of a block against its share of an end-to-end step, in turns
    python benchmarks/training.py ranks        # two blocks on two ranks against one process, one thread each
    python benchmarks/training.py memory time --device cuda --width 1024 --image 224 --patch 16 --batch 32

``memory`` on a CPU is the peak of resident memory above what the process had when it was ready: with torch and the tool loaded, a tiny network trained and the network's
weights on disk (end to end: before it is built). Beside it stands what `dbconvert plan` computes beforehand. The tool itself takes more than plain torch; that is a column of its own. On a GPU it is what torch allocated at most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from coverage import use_torchvision

BLOCKS = (2, 3, 4, 6)
DEPTH, CLASSES, ROWS = 24, 100, 64


def network_of(given: argparse.Namespace) -> Any:
    """timm's VisionTransformer with random weights."""
    use_torchvision()
    import torch
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=given.image,
        patch_size=given.patch,
        embed_dim=given.width,
        depth=DEPTH,
        num_heads=given.width // 64,
        num_classes=CLASSES,
    ).eval()


def data_of(given: argparse.Namespace) -> tuple[Any, Any]:
    import numpy as np

    draw = np.random.default_rng(0)
    return draw.standard_normal((ROWS, 3, given.image, given.image), np.float32), np.arange(ROWS) % CLASSES


class Peak:
    """Bytes above what there was when it was made."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            self.base = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        import torch

        return (
            int(torch.cuda.max_memory_allocated()) - self.base
            if self.device == "cuda"
            else _status("VmHWM") - self.base
        )


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def warm(given: argparse.Namespace) -> None:
    """Train a network of one thousandth of the size, so that the code of all that follows is in memory."""
    small = argparse.Namespace(**{**vars(given), "width": 64, "batch": 2})
    run = EndToEnd(small, network_of(small))
    for _ in range(2):
        run.step()


class EndToEnd:
    """AdamW on everything; ``recompute`` keeps the state between layers alone."""

    def __init__(self, given: argparse.Namespace, model: Any, *, recompute: bool = False) -> None:
        import torch

        self.model, self.batch = (
            model.eval().to(given.device),
            given.batch,
        )  # no rate of dropout: in train mode it would only take memory
        self.model.set_grad_checkpointing(recompute)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        self.x, self.y = (torch.from_numpy(a) for a in data_of(given))
        self.device, self.generator = given.device, torch.Generator().manual_seed(0)

    def step(self) -> None:
        import torch

        rows = torch.randint(ROWS, (self.batch,), generator=self.generator)
        self.optimizer.zero_grad(
            set_to_none=True
        )  # before the forward pass, so that no gradient lies beside its activations
        logits = self.model(self.x[rows].to(self.device))
        loss = torch.nn.functional.cross_entropy(logits, self.y[rows].to(self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def end_to_end(given: argparse.Namespace, *, recompute: bool) -> dict[str, Any]:
    use_torchvision()
    import timm.models  # noqa: F401 - belongs to what was there before
    import torch

    torch.set_num_threads(given.threads)
    warm(given)
    peak = Peak(given.device)
    model = network_of(given)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    run = EndToEnd(given, model, recompute=recompute)
    for _ in range(given.steps):
        run.step()
    return {"peak": peak.read(), "weights": weights}


def one_block(given: argparse.Namespace, folder: Path, *, recompute: bool) -> dict[str, Any]:
    import torch
    from diffusionblocks.converter.dataset import ArrayDataset
    from diffusionblocks.converter.engine import train_block
    from diffusionblocks.converter.parts import load_training
    from diffusionblocks.converter.residence import Residence, device_of
    from diffusionblocks.converter.train import TrainOptions, only_what_trains, settled

    torch.set_num_threads(given.threads)
    warm(given)
    before = _status("VmRSS")
    network = load_training(folder)
    x, y = data_of(given)
    data = ArrayDataset({network.input_names[0]: x}, y)
    options = settled(network, TrainOptions(steps=given.steps, batch_size=given.batch, checkpointing=recompute))
    with tempfile.TemporaryDirectory() as resting, only_what_trains(network):
        residence = Residence(network, device_of(given.device), Path(resting))
        tool, peak = _status("VmRSS") - before, Peak(given.device)
        record = train_block(network, network.num_blocks - 1, data, options, residence)
        return {"peak": peak.read(), "tool": tool, "state": record.training_bytes}


def prepare(given: argparse.Namespace, context: str, blocks: int, folder: Path) -> None:
    from diffusionblocks.converter import convert
    from diffusionblocks.converter.parts import save_training

    model = network_of(given)
    save_training(convert(model, input_shape=(3, given.image, given.image), num_blocks=blocks, context=context), folder)


def child(given: argparse.Namespace, *what: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    options = [f"--{n}={getattr(given, n)}" for n in ("width", "image", "patch", "batch", "steps", "threads", "device")]
    command = [sys.executable, __file__, "one", *options, "--what", *what]
    from diffusionblocks.converter.mapped import LARGE

    threshold = {"MALLOC_MMAP_THRESHOLD_": str(LARGE)}  # as `dbconvert train` sets it: what is freed goes back
    environment = {**os.environ, **threshold}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "{}")
    return found


def planned(given: argparse.Namespace) -> dict[str, Any]:
    """What is computed from the architecture alone: bytes at the peak."""
    from diffusionblocks.converter.capture import capture
    from diffusionblocks.converter.footprint import Footprint
    from diffusionblocks.converter.outline import outline
    from diffusionblocks.converter.passes import Passes
    from diffusionblocks.converter.settings import Settings

    captured = capture(network_of(given), input_shape=(3, given.image, given.image))
    found: dict[str, Any] = {}
    for context in ("stem", "frozen", "carry"):
        passes = Passes(captured, outline(captured, Settings(context=context)))
        found["whole"] = Footprint(passes).whole(given.batch).peak
        for recompute in (False, True):
            of = Footprint(passes, checkpointing=recompute)
            for blocks in BLOCKS:
                counts = [2 * DEPTH // blocks] * blocks
                name = f"{blocks} {context}" + ", checkpointing" * recompute
                found[name] = of.block(counts, blocks - 1, given.batch).peak
    return found


def memory(given: argparse.Namespace) -> None:
    plan = child(given, "plan")
    whole = child(given, "whole")
    recomputed = child(given, "whole", "recompute")
    weights, activations = whole["weights"], whole["peak"] - 4 * whole["weights"]
    print(
        f"weights {_mb(weights)}, end to end {_mb(whole['peak'])}: 4 P L + {_mb(activations)} of activations and the rest; "
        f"planned {_mb(plan['whole'])}"
    )
    print(f"end to end, activation checkpointing {_mb(recomputed['peak'])}: {recomputed['peak'] / whole['peak']:.2f}")
    print(
        "\n| B | context | one block | of end to end | times B (aim 1.15) | formula (4P+A)L/B | planned | measured / planned | the tool itself |\n|---|---|---|---|---|---|---|---|---|"
    )
    for blocks in BLOCKS:
        for context in ("stem", "frozen", "carry"):
            with tempfile.TemporaryDirectory() as parent:
                folder = str(Path(parent) / "train")
                child(given, "prepare", context, str(blocks), folder)
                for extra in ((), ("recompute",)) if context == "stem" else ((),):
                    found = child(given, "block", folder, *extra)
                    share = found["peak"] / whole["peak"]
                    name = context + (", checkpointing" if extra else "")
                    formula = _mb(whole["peak"] / blocks)
                    before = plan.get(f"{blocks} {name}")
                    beside = "- | -" if before is None else f"{_mb(before)} | {found['peak'] / before:.2f}"
                    print(
                        f"| {blocks} | {name} | {_mb(found['peak'])} | {share:.3f} | {share * blocks:.2f} | {formula} | {beside} | {_mb(found['tool'])} |",
                        flush=True,
                    )


def seconds(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an end-to-end step and of an update of each block, measured in turns in one process."""
    import torch
    from diffusionblocks.converter import convert
    from diffusionblocks.converter.dataset import ArrayDataset
    from diffusionblocks.converter.engine import train_block
    from diffusionblocks.converter.residence import Residence, device_of
    from diffusionblocks.converter.train import TrainOptions, only_what_trains, settled

    torch.set_num_threads(given.threads)
    run = EndToEnd(given, network_of(given))
    network = convert(
        network_of(given), input_shape=(3, given.image, given.image), num_blocks=given.blocks, context="stem"
    )
    x, y = data_of(given)
    data = ArrayDataset({network.input_names[0]: x}, y)
    options = settled(network, TrainOptions(steps=given.steps + 2, batch_size=given.batch))
    residence, whole, blocks = Residence(network, device_of(given.device)), [], []
    with only_what_trains(network):
        for b in range(network.num_blocks):
            at: list[float] = []

            def mark(*_: Any, at: list[float] = at) -> None:
                _wait(given.device)
                at.append(time.perf_counter())

            for _ in range(given.steps):
                mark()
                run.step()
            mark()
            whole.append(median(b - a for a, b in pairwise(at[1:])))
            at.clear()
            train_block(network, b, data, options, residence, progress=mark)
            blocks.append(median(b - a for a, b in pairwise(at[1:])))
    return {"whole": whole, "blocks": blocks}


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def times(given: argparse.Namespace) -> None:
    found = child(given, "seconds")
    print(
        "\n| block | update of the block (s) | end-to-end step (s), beside it | share of it: 1/B | ratio (aim 1.1) |\n|---|---|---|---|---|"
    )
    ratios = []
    for b, (block, whole) in enumerate(zip(found["blocks"], found["whole"], strict=True)):
        ratios.append(block / (whole / len(found["blocks"])))
        print(f"| {b} | {block:.3f} | {whole:.3f} | {whole / len(found['blocks']):.3f} | {ratios[-1]:.2f} |")
    print(f"\nmedian ratio {median(ratios):.2f}")


def ranks(given: argparse.Namespace) -> None:
    """The command itself, from its start to the end of training: two blocks, one process against two ranks, one thread each; and one process on all cores."""
    import numpy as np

    with tempfile.TemporaryDirectory() as parent:
        made = Path(parent) / "made"
        child(given, "bundle", str(made))
        x, y = data_of(given)
        np.savez(Path(parent) / "data.npz", x=x, y=y)
        common = [
            "train", "BUNDLE", "--data", str(Path(parent) / "data.npz"), "--steps", str(given.steps), "--batch-size", str(given.batch), "--blocks", "0,1",
        ]  # fmt: skip
        kinds = {
            "one process, one thread": (["-m", "diffusionblocks.converter"], 1),
            "two ranks, one thread each": (
                ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "diffusionblocks.converter"],
                1,
            ),
            "one process, all cores": (["-m", "diffusionblocks.converter"], os.cpu_count() or 1),
        }
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for turn in range(given.pairs):
            for kind, (start, threads) in kinds.items():
                bundle = Path(parent) / f"{kind.replace(' ', '_')}_{turn}"
                subprocess.run(["cp", "-r", str(made), str(bundle)], check=True)
                command = [
                    sys.executable,
                    *start,
                    *(str(bundle) if a == "BUNDLE" else a for a in common),
                    "--threads",
                    str(threads),
                ]
                began = time.time()
                subprocess.run(
                    command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
                )
                whole = time.time() - began
                lines = [
                    json.loads(t)
                    for p in (bundle / "train" / "run").glob("*.jsonl")
                    for t in p.read_text().splitlines()
                ]
                found[kind].append((whole, max(n["time"] for n in lines) - min(n["time"] for n in lines)))
        base = found["one process, one thread"]
        print(
            "\n| | whole command (s) | from the first to the last update (s) | ratio of the command | ratio of the updates (aim 0.6) |\n|---|---|---|---|---|"
        )
        for kind, runs in found.items():
            command_time, update_time = (median(r[i] for r in runs) for i in (0, 1))
            ratio = [median(r[i] / b[i] for r, b in zip(runs, base, strict=True)) for i in (0, 1)]
            print(f"| {kind} | {command_time:.1f} | {update_time:.1f} | {ratio[0]:.2f} | {ratio[1]:.2f} |")


def bundle(given: argparse.Namespace, folder: Path) -> None:
    from diffusionblocks.converter import convert
    from diffusionblocks.converter.exporting import export_network
    from rich.console import Console

    network = convert(network_of(given), input_shape=(3, given.image, given.image), num_blocks=2)
    export_network(network, folder, Console(quiet=True), source={})


def one(given: argparse.Namespace) -> None:
    kind, *rest = given.what
    recompute = "recompute" in rest
    if kind == "whole":
        print(json.dumps(end_to_end(given, recompute=recompute)))
    elif kind == "block":
        print(json.dumps(one_block(given, Path(rest[0]), recompute=recompute)))
    elif kind == "plan":
        print(json.dumps(planned(given)))
    elif kind == "seconds":
        print(json.dumps(seconds(given)))
    elif kind == "bundle":
        bundle(given, Path(rest[0]))
    else:
        prepare(given, rest[0], int(rest[1]), Path(rest[2]))


def _mb(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=["memory", "time", "ranks", "one"])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--image", type=int, default=64)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--blocks", type=int, default=4, help="B of `time`")
    parser.add_argument("--pairs", type=int, default=3, help="turns of `ranks`")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--what", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for kind in given.kinds:
        {"memory": memory, "time": times, "ranks": ranks, "one": one}[kind](given)


if __name__ == "__main__":
    main()
