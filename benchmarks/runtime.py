"""Ways of running ViT-L/16 compared in one run by ``dbconvert bench``: one session, this runtime, a session per block, torch, accelerate.

    python benchmarks/runtime.py                                     # 24 blocks, batches of 1 and 8, in a temporary folder
    python benchmarks/runtime.py --folder vitl.dblocks --cold        # the bundle is made where it is not there, and kept
    python benchmarks/runtime.py --blocks 4 --width 192 --batch 1    # a quick look
    python benchmarks/runtime.py --json > runtime.json

Random weights of timm's architecture. What follows ``--`` goes to ``dbconvert bench`` as it is: ``python benchmarks/runtime.py -- --rows whole,block``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "benchmarks.runtime:make"
NAME = "vit_large_patch16_224"


def packages() -> tuple[Any, Any]:
    """timm and torch, also beside a CPU build of torch."""
    from diffusionblocks.converter.vision import ensure_torchvision

    ensure_torchvision()
    return importlib.import_module("timm"), importlib.import_module("torch")


timm, torch = packages() if __name__ != "__main__" else (None, None)  # when this is imported: it counts as an import


def make() -> Any:
    """The network, of the size that the environment says (so that every process makes the same one)."""
    blocks, width = int(os.environ["BENCH_BLOCKS"]), int(os.environ["BENCH_WIDTH"])
    torch.manual_seed(0)
    return timm.create_model(NAME, depth=blocks, embed_dim=width, num_heads=max(1, width // 64)).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="the bundle; made where it is not there")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE.png")
    parser.add_argument("more", nargs="*", help="further options of dbconvert bench, behind --")
    given = parser.parse_args()
    os.environ |= {"BENCH_BLOCKS": str(given.blocks), "BENCH_WIDTH": str(given.width)}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch) / "model.dblocks"
        if not folder.exists():
            made = dbconvert(
                MODEL, "--input-shape", "3x224x224", "--num-blocks", given.blocks, "--out", folder, "--deploy"
            )
            if made:
                return made
        options = ["--rounds", given.rounds, *(word for n in given.batch or () for word in ("--batch", n))]
        options += ["--cold"] * given.cold + ["--json"] * given.json + ["--plot", given.plot] * bool(given.plot)
        return dbconvert("bench", folder, "--model", MODEL, *options, *given.more)


def dbconvert(*arguments: object) -> int:
    """Exit code of the command."""
    return subprocess.run(
        [sys.executable, "-m", "diffusionblocks.converter", *map(str, arguments)], check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
