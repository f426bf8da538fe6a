"""The command ``dbconvert score``: what a text is worth to a language model's bundle."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.hub import local_folder
from numpy.typing import NDArray

LARGE = 1 << 26
"""Log-probabilities that are held at once."""


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``end`` of a text, of which those from ``scored`` on count."""

    start: int
    end: int
    scored: int


def windows(count: int, length: int, *, causal: bool, partial: bool) -> Iterator[Window]:
    """The windows of ``count`` tokens that a model of a fixed length is asked for, every token counted once.

    A causal model sees at least half a window before a token, where there is that much, and says nothing of the first one; others get one window after another, the
    last one shorter where ``partial`` is allowed, or left out.
    """
    if not causal:
        for start in range(0, count if partial else count - length + 1, length):
            yield Window(start, min(start + length, count), start)
        return
    done = 1
    while done < count:
        end = min(length if done == 1 else done + max(length // 2, 1), count)
        yield Window(max(0, end - length), end, done)
        done = end


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--data", required=True, type=click.Path(), metavar="TEXT|X.npy", help="A text, or tokens [N, T].")
@click.option("--tokens", type=click.IntRange(2), metavar="N", help="The first N tokens of it.  [default: all]")
@click.option("--mode", type=click.Choice(["exact", "denoise"]), help="Default: the bundle's own.")
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Denoising steps.  [default: the bundle's own]")
@click.option(
    "--draws", type=click.IntRange(1), default=8, show_default=True, help="Of hidden tokens a block, with --task mdm."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--memory-budget", metavar="256MiB", help="Bound on the graphs and weights open at once.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def score(
    bundle: str, data: str, tokens: int | None, device: str, memory_budget: str | None, as_json: bool, **options: Any
) -> None:
    """What a text is worth to BUNDLE, of a language model: nats per token, and bits per byte.

    Of a masked language model (--task mdm) both are bounds from above.

    \b
    Example: dbconvert score gpt2.dblocks --data held-out.txt --tokens 4096
    """
    bundle = str(local_folder(bundle))
    from diffusionblocks.runtime.bundle import open_bundle

    with open_bundle(bundle, memory_budget=memory_budget, device=device) as opened:
        target = opened.manifest.target
        if opened.manifest.task not in ("lm", "mdm") or target is None:
            raise BadInput(
                f"This bundle is of the task {opened.manifest.task}, not of a language model.",
                hint="Convert the model with --task lm or mdm.",
            )
        rows, offsets, text = _read(Path(bundle), Path(data), tokens)
        nats, count, first, last = _nats(opened, rows, options)
    found: dict[str, Any] = {"tokens": count, "nats_per_token": nats / count, "bound": target.masking is not None}
    if text is not None:
        size = len(text[offsets[first][0] : offsets[last][1]].encode())
        found |= {"bytes": size, "bits_per_byte": nats / math.log(2) / size}
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    bytes_ = f", {found['bits_per_byte']:.4f} bits per byte of {found['bytes']:,}" if text is not None else ""
    least = "at most " if found["bound"] else ""
    click.echo(f"{least}{found['nats_per_token']:.4f} nats per token of {count:,}{bytes_}")


def _nats(opened: Any, rows: NDArray[np.int64], options: dict[str, Any]) -> tuple[float, int, int, int]:
    """Nats of all that is scored, how many tokens that is, and the first and last of them in their row."""
    from diffusionblocks.runtime.infilling import bound
    from diffusionblocks.runtime.language import score as scored

    target = opened.manifest.target
    masking = target.masking
    length = target.dim if masking is not None else target.positions[0]
    asked = list(windows(rows.shape[1], length, causal=masking is None, partial=bool(masking and masking.mask)))
    if not asked:
        raise BadInput(
            f"The text has {rows.shape[1]} tokens; the model was converted for {length}.", hint="Give more text."
        )
    at_once = max(1, LARGE // (length * target.num_classes))
    nats, count = 0.0, 0
    for row in rows:
        for of in {w.end - w.start for w in asked}:
            same = [w for w in asked if w.end - w.start == of]
            for i in range(0, len(same), at_once):
                some = same[i : i + at_once]
                batch = np.stack([row[w.start : w.end] for w in some])
                if masking is None:
                    found = scored(opened, batch, mode=options["mode"], steps=options["steps"])
                    nats += sum(float(f[w.scored - w.start - 1 :].sum()) for f, w in zip(found, some, strict=True))
                else:
                    if options["steps"] is not None:
                        raise BadInput("--steps is for causal language models.", hint="Give --draws.")
                    draws = {k: options[k] for k in ("mode", "draws", "seed")}
                    nats += float(bound(opened, batch, **draws).sum())
                count += sum(w.end - w.scored for w in some)
    return nats, count, asked[0].scored, asked[-1].end - 1


def _read(bundle: Path, data: Path, most: int | None) -> tuple[NDArray[np.int64], list[tuple[int, int]], str | None]:
    """Rows of tokens; of a text one, with the place of each token in it."""
    from diffusionblocks.converter import data as arrays
    from diffusionblocks.converter.generate_cli import _tokenizer

    if not data.is_file():
        raise BadInput(f"{data} does not exist.", hint="Give a text file, or a .npy of tokens.")
    if data.suffix in (".npy", ".npz"):
        rows = np.asarray(next(iter(arrays.read_arrays(data).values())))
        if rows.ndim != 2 or rows.dtype.kind not in "iu" or not rows.size:
            raise BadInput(
                f"The tokens have the shape {rows.shape} and the type {rows.dtype}.", hint="Give integers [N, T]."
            )
        return rows[:, :most].astype(np.int64), [], None
    try:
        text = data.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise BadInput(f"{data} cannot be read as a text: {error}", hint="Give a text in UTF-8.") from error
    tokenizer = _tokenizer(bundle)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = tokenizer.encode(text, add_special_tokens=False)
    ids, offsets = list(encoded.ids)[:most], list(encoded.offsets)[:most]
    if len(ids) < 2:
        raise BadInput(f"{data} has {len(ids)} tokens.", hint="Give a longer text.")
    return np.asarray([ids], np.int64), offsets, text
