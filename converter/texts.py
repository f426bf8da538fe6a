"""Texts as a model's inputs: the model's own tokenizer, cut or padded to the length the model was captured with."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.converter.saved import import_package, one_line
from diffusionblocks.converter.unreadable import Unreadable
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import TensorSpec

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Encode = Callable[[list[str]], list[tuple[list[int], list[int]]]]
Plain = Callable[[str], list[int]]
MASK, TYPES = "attention_mask", "token_type_ids"
_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "spiece*", "*.model", "*.tiktoken")


def takes_text(inputs: Sequence[TensorSpec]) -> bool:
    """Whether the first input is a row of token numbers."""
    return bool(inputs) and inputs[0].dtype.startswith("int") and len(inputs[0].shape) == 2


class Tokens:
    """Token numbers, and the mask and types that go with them where the model takes those; ``names`` are the inputs it makes, each [N, length].

    ``plain(text)``: all token numbers of a text, nothing added; ``end``: the number of the end-of-text token, None where there is none.
    """

    def __init__(self, tokenizer: Path | None, inputs: Sequence[TensorSpec]) -> None:
        """
        Args:
            tokenizer: a folder that transformers saved a tokenizer in, or a ``tokenizer.json``.
            inputs: the model's; the first are the tokens.

        Raises:
            BadInput: no tokenizer, one that cannot be read, or an input whose length is not fixed.
        """
        if tokenizer is None:
            raise BadInput(
                "The data is text, and the model came without a tokenizer.",
                hint="Give --tokenizer FOLDER (tokenizer.json, or what save_pretrained wrote), or token numbers as input_ids in a .npz.",
            )
        length = inputs[0].shape[1] if takes_text(inputs) else None
        if not isinstance(length, int):
            shapes = ", ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in inputs)
            raise BadInput(
                f"The data is text; the model takes {shapes}, not rows of token numbers of a fixed length.",
                hint="Give data of the kind the model takes, or convert with --example FILE.npz that has input_ids [N, length].",
            )
        self.length, self.main = length, inputs[0].name
        self.names = (self.main, *(s.name for s in inputs[1:] if s.name in (MASK, TYPES)))
        self._encode, self._pad, self._left, self.plain, self.end = _load(tokenizer, length)
        self.digest = _digest(tokenizer)
        if MASK not in self.names:
            log.warning("the model takes no %s: what shorter texts are padded with is read as text", MASK)

    def read(self, values: Sequence[Any]) -> dict[str, Array]:
        """Texts as int64 [N, length] by name.

        Raises:
            Unreadable: a value that is no text, or an empty one.
        """
        for i, text in enumerate(values):
            if not isinstance(text, str):
                raise Unreadable("no text", i)
            if not text.strip():
                raise Unreadable("empty", i)
            if "\ufffd" in text:
                raise Unreadable("not UTF-8", i)
        made = {name: np.zeros((len(values), self.length), np.int64) for name in self.names}
        made[self.main][:] = self._pad
        for i, (numbers, types) in enumerate(self._encode(list(values))):
            place = slice(self.length - len(numbers), None) if self._left else slice(len(numbers))
            made[self.main][i, place] = numbers
            if MASK in made:
                made[MASK][i, place] = 1
            if TYPES in made:
                made[TYPES][i, place] = types
        return made


def _load(path: Path, length: int) -> tuple[Encode, int, bool, Plain, int | None]:
    """How to encode, the number to pad with, whether to pad on the left, how to encode a text whole, and the number that ends one."""
    folder = path if path.is_dir() else path.parent
    try:
        if path.is_dir() and (path / "tokenizer_config.json").is_file():
            return _of_transformers(folder, length)
        return _of_tokenizers(path / "tokenizer.json" if path.is_dir() else path, length)
    except BadInput:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise BadInput(
            f"The tokenizer in {path} cannot be read: {one_line(error)}",
            hint="Give --tokenizer FOLDER with tokenizer.json, or with what transformers' save_pretrained wrote.",
        ) from error


def _of_transformers(folder: Path, length: int) -> tuple[Encode, int, bool, Plain, int | None]:
    transformers = import_package("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)

    def encode(texts: list[str]) -> list[tuple[list[int], list[int]]]:
        made = tokenizer(
            texts, truncation=True, max_length=length, padding=False, return_token_type_ids=True, verbose=False
        )
        return list(zip(made["input_ids"], made["token_type_ids"], strict=True))

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    return encode, int(pad or 0), tokenizer.padding_side == "left", plain, end


def _of_tokenizers(file: Path, length: int) -> tuple[Encode, int, bool, Plain, int | None]:
    if not file.is_file():
        raise BadInput(
            f"{file} does not exist.", hint="Give --tokenizer FOLDER with the tokenizer the model was trained with."
        )
    tokenizer, whole = (import_package("tokenizers").Tokenizer.from_file(str(file)) for _ in range(2))
    padding = tokenizer.padding or {}
    whole.no_padding()
    whole.no_truncation()
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)

    def encode(texts: list[str]) -> list[tuple[list[int], list[int]]]:
        return [(e.ids, e.type_ids) for e in tokenizer.encode_batch(texts)]

    names = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")
    known = (n for n in map(tokenizer.token_to_id, names) if n is not None)
    pad, left = int(padding.get("pad_id") or next(known, 0)), padding.get("direction") == "left"
    ends = (n for n in map(tokenizer.token_to_id, ("<|endoftext|>", "</s>", "<eos>", "[SEP]")) if n is not None)
    return encode, pad, left, lambda text: list(whole.encode(text, add_special_tokens=False).ids), next(ends, None)


def mask_token_of(said: str | None, task: str, tokenizer: Path | None) -> int:
    """The number of the token that stands for a hidden one; -1 for tasks without.

    Args:
        said: its number or text, None for what the tokenizer calls its own.

    Raises:
        BadInput: another task, or no such token.
    """
    if task != "mdm":
        if said is not None:
            raise BadInput("--mask-token is for masked language models.", hint="Add --task mdm.")
        return -1
    if said is not None and said.isdigit():
        return int(said)
    wanted = [said] if said is not None else [*_own_mask(tokenizer), "[MASK]", "<mask>", "<|mask|>"]
    known = {} if tokenizer is None else _vocabulary(tokenizer)
    found = [known[text] for text in wanted if text in known]
    if not found:
        said_of = f"has no {' or '.join(wanted)}" if known else "is not there"
        raise BadInput(
            f"The task mdm needs the token that stands for a hidden one, and the tokenizer {said_of}.",
            hint="Give --mask-token K, its number.",
        )
    return found[0]


def _own_mask(tokenizer: Path | None) -> list[str]:
    """What a tokenizer's folder calls its mask token."""
    names = ("tokenizer_config.json", "special_tokens_map.json")
    files = [] if tokenizer is None or not tokenizer.is_dir() else [tokenizer / n for n in names]
    found = [json.loads(f.read_text(encoding="utf-8")).get("mask_token") for f in files if f.is_file()]
    return [text for said in found if (text := said.get("content") if isinstance(said, dict) else said)]


def _vocabulary(path: Path) -> dict[str, int]:
    folder = path if path.is_dir() else path.parent
    try:
        if path.is_dir() and (path / "tokenizer_config.json").is_file():
            return dict(
                import_package("transformers")
                .AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
                .get_vocab()
            )
        file = path / "tokenizer.json" if path.is_dir() else path
        return dict(import_package("tokenizers").Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))
    except BadInput:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise BadInput(
            f"The tokenizer in {path} cannot be read: {one_line(error)}", hint="Give --mask-token K, its number."
        ) from error


def _digest(path: Path) -> str:
    """Of the content of a tokenizer's files."""
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(f"{file.name}/".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    files = {f for pattern in _FILES for f in path.glob(pattern)} if path.is_dir() else {path}
    return sorted(f for f in files if f.is_file())


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, and no others, into ``folder``."""
    folder.mkdir()
    for path in _files(source):
        target = folder / ("tokenizer.json" if source.is_file() else path.name)
        target.write_bytes(path.read_bytes())
