"""Denoising with several steps a block: the time of a step against that of a block that stays where it is.

    python benchmarks/steps.py                     # ViT-L/16, 24 blocks of random weights, batch 1, 4 and 8 steps a block
    python benchmarks/steps.py --width 384 --batch 8 --no-alone
    python benchmarks/steps.py --device cuda       # weights copied to the GPU, two places a structure

The blocks are not trained (their time is the same). ``frozen`` context: the original block's pass, once for each visit of a block, is what `exact` takes, and is reported beside. A block that
stays: its graph, head and sampling step opened once and run again and again. Rounds take turns; ratios are paired.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from coverage import use_torchvision
from diffusionblocks.converter import convert
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import open_bundle


def bundle_of(given: argparse.Namespace, folder: Path) -> Path:
    use_torchvision()
    import torch
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    heads = given.width // 64
    model = VisionTransformer(img_size=224, patch_size=16, embed_dim=given.width, depth=24, num_heads=heads).eval()
    network = convert(
        model, input_shape=(3, 224, 224), num_blocks=given.blocks, context="frozen", partition="equal-probability"
    )
    network.trained = [True] * given.blocks
    return export_bundle(network, folder / "model.dblocks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--alone", action=argparse.BooleanOptionalAction, default=True, help="as `dbconvert run` opens it"
    )
    given = parser.parse_args()
    x = np.random.default_rng(0).standard_normal((given.batch, 3, 224, 224), np.float32)
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        open_bundle(bundle_of(given, Path(folder)), alone=given.alone, device=given.device) as bundle,
    ):
        times: dict[str, list[float]] = {"stays": [], "exact": [], "4": [], "8": []}
        for _ in range(given.rounds + 1):
            times["stays"].append(_stays(bundle, x))
            times["exact"].append(_seconds(lambda: bundle.run(x, "exact")))
            for steps in (4, 8):
                seconds = _seconds(lambda n=steps: bundle.run(x, "denoise", steps=n * given.blocks))
                times[str(steps)].append((seconds - times["exact"][-1]) / (steps * given.blocks))
        kept = {what: seconds[1:] for what, seconds in times.items()}
        print(
            f"context pass (exact, whole network): {1e3 * median(kept['exact']):.0f} ms; a block that stays: {1e3 * median(kept['stays']):.1f} ms a step"
        )
        for steps in ("4", "8"):
            ratio = median(a / b for a, b in zip(kept[steps], kept["stays"], strict=True))
            print(f"{steps} steps a block: {1e3 * median(kept[steps]):.1f} ms a step, {ratio:.3f} of that")


def _stays(bundle: object, x: np.ndarray) -> float:
    """Seconds of a step of the middle block, its graph, head and sampling step open."""
    manifest, sessions = bundle.manifest, bundle._sessions  # type: ignore[attr-defined]
    block = manifest.blocks[len(manifest.blocks) // 2].block
    values = {manifest.inputs[0].name: x}
    (outputs,) = sessions.run(manifest.stem, [values])
    values |= {"stream": outputs.pop("stream_out"), **outputs}
    z, sigma = np.zeros((len(x), *manifest.target.shape), np.float32), np.ones(len(x), np.float32)
    with (
        sessions.opened(block) as opened,
        sessions.opened(manifest.head) as head,
        sessions.opened(manifest.target.graph) as target,
    ):
        seconds = []
        for _ in range(9):
            start = time.perf_counter()
            made = opened({**values, "z": z, "sigma": sigma})
            f = head({**values, "stream": made["stream_out"]})[manifest.head.outputs[0]]
            target({"z": z, "f": f, "sigma": sigma, "sigma_next": sigma / 2})
            seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def _seconds(run: object) -> float:
    start = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
