"""Texts as windows of one long row of tokens: what a language model is trained on. The tokens are written to a file once and mapped."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from diffusionblocks.converter.bad_rows import BadRow
from diffusionblocks.converter.stored import ModelArrays
from diffusionblocks.converter.texts import MASK, Tokens
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import TensorSpec

log = logging.getLogger(__name__)

PIECE = 1 << 20
"""Characters that are tokenised together."""


def packed(
    texts: Iterable[Iterable[str]], content: str, tokens: Tokens, inputs: Sequence[TensorSpec], folder: Path
) -> ModelArrays:
    """Windows of as many tokens as the model takes, one after another; what is left at the end is dropped.

    Args:
        texts: each as its pieces; an end-of-text token is put between texts, where the tokenizer has one.
        content: changes with the texts.
        tokens: the tokenizer, and the length of a window.
        inputs: the model's.
        folder: where the tokens are written, under a name made of content and tokenizer.

    Raises:
        BadInput: less text than one window, or an input that texts do not give.
    """
    missing = [s.name for s in inputs if s.name not in (tokens.main, MASK)]
    if missing:
        raise BadInput(
            f"The data is text; the model also takes {', '.join(missing)}.",
            hint="Give windows of tokens in a .npz, with an array for each input.",
        )
    file = folder / f"tokens_{hashlib.sha256(f'{content}/{tokens.digest}'.encode()).hexdigest()[:32]}.npy"
    if not file.is_file():
        _write(_numbers(texts, tokens), file)
    flat = np.load(file, mmap_mode="r")
    count = len(flat) // tokens.length
    if not count:
        raise BadInput(
            f"The texts have {len(flat)} tokens; the model takes windows of {tokens.length}.",
            hint="Give more text, or convert the model for shorter windows (--example).",
        )
    windows = flat[: count * tokens.length].reshape(count, tokens.length)
    arrays = {tokens.main: windows}
    if any(s.name == MASK for s in inputs):
        arrays[MASK] = np.broadcast_to(np.ones((), np.int64), windows.shape)
    return ModelArrays(arrays, None, inputs)


def texts_of_files(files: Sequence[Path], *, skip_bad: bool) -> Iterator[Iterator[str]]:
    """The texts of files, each in pieces that end with a line.

    Raises:
        BadRow: one that cannot be read, or is not UTF-8; with ``skip_bad`` it is left out from there on, with a warning.
    """
    for path in files:
        yield _pieces(path, skip_bad=skip_bad)


def _pieces(path: Path, *, skip_bad: bool) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(PIECE):
                yield piece + file.readline()
    except (UnicodeDecodeError, OSError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or "unreadable"
        if not skip_bad:
            raise BadRow(str(path), reason) from error
        log.warning("%s cannot be read (%s): left out", path, reason)


def _numbers(texts: Iterable[Iterable[str]], tokens: Tokens) -> Iterator[list[int]]:
    for number, text in enumerate(texts):
        if number and tokens.end is not None:
            yield [tokens.end]
        yield from map(tokens.plain, text)


def _write(pieces: Iterable[list[int]], file: Path) -> None:
    """Numbers one after another as a .npy of int32, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        raw = part.with_suffix(".raw")
        count = 0
        with raw.open("wb") as out:
            for piece in pieces:
                out.write(np.asarray(piece, np.int32).tobytes())
                count += len(piece)
        made = np.lib.format.open_memmap(part, "w+", np.dtype(np.int32), (count,)) if count else None
        if made is None:
            np.save(part.open("wb"), np.zeros(0, np.int32))
        else:
            made[:] = np.memmap(raw, np.int32, "r", shape=(count,))
            made.flush()
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
        part.with_suffix(".raw").unlink(missing_ok=True)
